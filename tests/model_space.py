"""Hypothesis strategies for models: every choice of `maxlm.config` that shapes one, in tiny sizes."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from hypothesis import reject
from hypothesis import strategies as st
from published import MODELS

from maxlm.config import (
    Activation,
    AdaLora,
    Adapter,
    AdapterKind,
    Alibi,
    Attention,
    BlockConfig,
    Bottleneck,
    Capacity,
    DeepNorm,
    Dropless,
    DyLora,
    DynamicNtkScaling,
    ExpertChoiceRouter,
    ExpertGroups,
    Experts,
    GatedMlp,
    GroupedQuery,
    Ia3,
    LatentAttention,
    LayerNorm,
    Learned,
    LinearScaling,
    Llama3RopeScaling,
    LmHead,
    LongRopeScaling,
    Lora,
    Mlp,
    ModelConfig,
    NoisyTopKRouter,
    NtkScaling,
    OutputNorm,
    Parallel,
    PostNorm,
    PreNorm,
    QkNorm,
    RelativeBias,
    ResidualInit,
    RmsNorm,
    Rope,
    RopeScaling,
    Sandwich,
    ScalarHead,
    SigmoidRouter,
    Sinusoidal,
    TopKRouter,
    UserError,
    YarnScaling,
)
from maxlm.hub.families import FAMILIES
from maxlm.hub.published import Published

T = TypeVar("T")
LONGEST = 48
FLAG = st.booleans()


def some(*values: T) -> st.SearchStrategy[T]:
    return st.sampled_from(values)


def _scalings(dims: int) -> st.SearchStrategy[RopeScaling | None]:
    """For so many rotated dims."""
    known, factor = some(8, LONGEST, 100), some(1.0, 4.0)
    factors = st.lists(some(1.0, 1.3, 5.0), min_size=dims // 2, max_size=dims // 2).map(tuple)
    attention_factor = some(None, 1.2)
    kinds: list[st.SearchStrategy[RopeScaling | None]] = [
        st.none(),
        st.builds(LinearScaling, factor=factor),
        st.builds(Llama3RopeScaling, factor=factor, original_max_len=known),
        st.builds(
            YarnScaling,
            factor=factor,
            original_max_len=known,
            truncate=FLAG,
            attention_factor=attention_factor,
            mscale=some(0.0, 1.0),
            mscale_all_dim=some(0.0, 0.7),
        ),
        st.builds(
            LongRopeScaling,
            short_factors=factors,
            long_factors=factors,
            original_max_len=known,
            attention_factor=attention_factor,
        ),
    ]
    if dims >= 4:
        kinds += [
            st.builds(NtkScaling, factor=factor),
            st.builds(DynamicNtkScaling, factor=factor, original_max_len=known),
        ]
    return st.one_of(kinds)


@st.composite
def ropes(draw: st.DrawFn, width: int) -> Rope:
    dims = draw(some(None, *range(2, width + 1, 2)) if width % 2 == 0 else some(*range(2, width, 2)))
    return Rope(
        theta=draw(some(30.0, 10_000.0)),
        scaling=draw(_scalings(dims or width)),
        dims=dims,
        interleaved=draw(FLAG),
        decay=draw(some(None, None, 4.0)),
    )


@st.composite
def grouped_queries(draw: st.DrawFn) -> GroupedQuery:
    kv_heads, head_dim = draw(some(2, 2, 1, 3)), draw(some(8, 4, 5))
    relative = st.builds(RelativeBias, buckets=some(2, 6), max_distance=some(4, 20))
    return GroupedQuery(
        n_heads=kv_heads * draw(some(1, 2)),
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        position=draw(st.one_of(ropes(head_dim), ropes(head_dim), st.none(), st.builds(Alibi), relative)),
        window=draw(some(None, None, 1, 5, 100)),
        soft_cap=draw(some(None, 2.0)),
        qkv_bias=draw(FLAG),
        out_bias=draw(FLAG),
        qk_norm=draw(some(None, *QkNorm)),
        scale=draw(some(None, 0.4)),
        sinks=draw(FLAG),
        log_length=draw(some(None, 2, 10)),
    )


@st.composite
def latent_attentions(draw: st.DrawFn) -> LatentAttention:
    rope = draw(some(2, 4, 6))
    return LatentAttention(
        n_heads=draw(some(2, 4, 1)),
        kv_rank=draw(some(8, 12, 3)),
        query_rank=draw(some(None, 8, 5)),
        content_head_dim=draw(some(3, 6)),
        rope_head_dim=rope,
        value_head_dim=draw(some(2, 7, 12)),
        position=draw(ropes(rope)),
        scale=draw(some(None, 0.4)),
    )


def attentions() -> st.SearchStrategy[Attention]:
    return st.one_of(grouped_queries(), grouped_queries(), latent_attentions())


def dense_mlps() -> st.SearchStrategy[Mlp | GatedMlp]:
    values: dict[str, Any] = {"d_ff": some(10, 24), "activation": some(*Activation), "bias": FLAG}
    return st.one_of(st.builds(Mlp, **values), st.builds(GatedMlp, **values))


@st.composite
def experts(draw: st.DrawFn) -> Experts:
    groups = some(None, ExpertGroups(n_groups=3, top_groups=2), ExpertGroups(n_groups=2, top_groups=1))
    normalized, top_k = draw(FLAG), some(2, 3)
    router = draw(
        st.one_of(
            st.builds(TopKRouter, top_k=top_k, normalize=st.just(normalized), groups=groups),
            st.builds(TopKRouter, top_k=st.just(1), normalize=st.just(False)),
            st.builds(SigmoidRouter, top_k=top_k, normalize=st.just(normalized), groups=groups),
            st.builds(NoisyTopKRouter, top_k=some(2, 6)),
            st.builds(ExpertChoiceRouter),
        )
    )
    capacity = st.builds(Capacity, factor=some(0.5, 2.0), group_size=some(None, 4))
    only = isinstance(router, ExpertChoiceRouter)
    return Experts(
        n_experts=6,
        d_ff=draw(some(6, 10)),
        router=router,
        dispatch=draw(capacity if only else st.one_of(some(Dropless(), Dropless(buffer=1.5)), capacity)),
        n_shared_experts=draw(some(0, 1, 2)),
        routed_scaling=draw(some(1.0, 2.5)),
        router_z_loss=draw(some(0.0, 0.1)),
        activation=draw(some(*Activation)),
    )


def norms() -> st.SearchStrategy[RmsNorm | LayerNorm]:
    return st.one_of(
        st.builds(RmsNorm, eps=some(1e-5, 1e-2), one_plus=FLAG),
        st.builds(LayerNorm, eps=some(1e-5, 1e-2), scale=FLAG, bias=FLAG),
    )


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Of up to six layers."""
    deep = st.builds(DeepNorm, alpha=some(None, 2.0), beta=some(None, 0.5))
    of_all = draw(st.one_of(st.none(), st.none(), st.none(), deep))
    plain = some(PreNorm(), PreNorm(), PostNorm(), OutputNorm(), Sandwich(), Parallel(), Parallel(two_norms=True))

    def blocks(mlps: st.SearchStrategy[Any], least: int, most: int) -> tuple[BlockConfig, ...]:
        residual = plain if of_all is None else st.just(of_all)
        one = st.builds(BlockConfig, attention=attentions(), mlp=mlps, residual=residual)
        return draw(st.lists(one, min_size=least, max_size=most).map(tuple))

    first = blocks(dense_mlps(), 0, draw(some(0, 0, 1, 2)))
    pattern = blocks(st.one_of(dense_mlps(), experts()), 1, draw(some(1, 1, 2, 3)))
    head = st.builds(
        LmHead,
        tied=FLAG,
        bias=FLAG,
        scale=some(None, 0.5),
        soft_cap=some(None, 3.0),
        normalized=some(False, False, True),
    )
    found = draw(st.one_of(head, head, head, head, st.builds(ScalarHead)))
    normalized = isinstance(found, LmHead) and found.normalized
    return ModelConfig(
        vocab_size=draw(some(32, 32, 31)),
        d_model=draw(some(16, 24, 15)),
        n_layers=len(first) + len(pattern) * draw(some(1, 2)),
        blocks=pattern,
        max_seq_len=LONGEST,
        norm=draw(norms()),
        embedding_norm=draw(FLAG),
        embedding_scale=draw(some(None, 4.0)),
        final_norm=draw(FLAG),
        embedded_position=draw(
            st.one_of(st.none(), st.builds(Learned, offset=some(0, 2)), st.builds(Sinusoidal))
            if draw(FLAG)
            else st.none()
        ),
        head=found,
        init_std=draw(some(0.02, 0.3)),
        residual_init=draw(some(*ResidualInit)) if of_all is None else ResidualInit.ALL_LAYERS,
        mup_base_width=None if normalized else draw(some(None, 8)),
        first_blocks=first,
    )


def adapters() -> st.SearchStrategy[AdapterKind]:
    """That any model can have."""
    targets = some(("q_proj", "v_proj"), ("all-linear",), ("o_proj",), ("attention/*",))
    low_rank: dict[str, Any] = {"rank": some(1, 3), "alpha": some(1.0, 8.0), "targets": targets}
    return st.one_of(
        st.builds(Lora, **low_rank, rank_stabilized=FLAG, dora=FLAG, dropout=some(0.0, 0.5)),
        st.builds(DyLora, **low_rank),
        st.builds(AdaLora, rank=some(3, 4), target_rank=some(1, 3), targets=targets),
        st.builds(Ia3, targets=some((), ("v_proj",)), inputs_of=some(("o_proj",), ("q_proj", "o_proj"))),
        st.builds(
            Bottleneck, size=some(1, 5), activation=some(*Activation), parallel=FLAG, scale=some(1.0, 4.0),
            targets=st.just(("o_proj",)),
        ),
    )  # fmt: skip


@st.composite
def adapted_models(draw: st.DrawFn) -> ModelConfig:
    """Any model, with an adapter."""
    return dataclasses.replace(draw(models()), adapter=Adapter(kind=draw(adapters()), full=draw(some((), ("embed",)))))


@st.composite
def nearly_published(draw: st.DrawFn) -> ModelConfig:
    """A published model in which up to two things are as of another one of `models`: often no family can say it."""
    config = MODELS[draw(some(*MODELS))]
    model = FAMILIES[config["model_type"]].read(Published(config, "config.json"))
    for _ in range(draw(some(0, 1, 2))):
        other = draw(models())
        theirs = other.blocks[0]
        values: list[Any] = [
            ({field: getattr(other, field)}, None, None)
            for field in ("norm", "embedding_norm", "embedding_scale", "final_norm", "embedded_position", "head",
                          "residual_init", "mup_base_width", "init_std")
        ]  # fmt: skip
        values += [(None, {field: getattr(theirs, field)}, None) for field in ("mlp", "residual", "attention")]
        fields = [field.name for field in dataclasses.fields(theirs.attention)]
        values += [(None, None, {field: getattr(theirs.attention, field)}) for field in fields]
        of_model, of_block, of_attention = draw(st.sampled_from(values))

        def changed(block: BlockConfig, of_block: Any = of_block, of_attention: Any = of_attention) -> BlockConfig:
            attention = dataclasses.replace(block.attention, **(of_attention or {}))
            return dataclasses.replace(block, **{"attention": attention, **(of_block or {})})

        try:
            model = dataclasses.replace(
                model,
                blocks=tuple(map(changed, model.blocks)),
                first_blocks=tuple(map(changed, model.first_blocks)),
                **(of_model or {}),
            )
        except (UserError, TypeError):  # the two do not go together
            reject()
    return model
