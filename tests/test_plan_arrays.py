"""The list of parameters made without jax, against the real tree, published sizes and jax's own shards."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import pytest
from helpers import PRESETS, latent_model, small_model, with_attention

from maxlm.config import (
    BaseFormat,
    BlockConfig,
    Capacity,
    DeepNorm,
    ExpertChoiceRouter,
    Experts,
    GatedMlp,
    GroupedQuery,
    LayerNorm,
    Learned,
    LmHead,
    ModelConfig,
    NoisyTopKRouter,
    OutputNorm,
    QkNorm,
    ShardingConfig,
    SigmoidRouter,
    StatePart,
    Swish,
    TopKRouter,
    Zero,
    llama,
    with_experts,
)
from maxlm.config.cli import parse_run
from maxlm.models import init_parameters, parameter_dims
from maxlm.shapes import Part, arrays, device_bytes, parameter_count
from maxlm.sharding import make_layout


def model_of(name: str) -> ModelConfig:
    return parse_run(["--config", f"configs/{name}.py"], prog="test", description="").config.model


def experts(router, **changes) -> ModelConfig:
    return with_experts(small_model(), Experts(n_experts=4, d_ff=48, router=router, **changes))


def pattern_of_two() -> ModelConfig:
    """Two kinds of layers in turn after a dense first one."""
    narrow = BlockConfig(attention=GroupedQuery(n_heads=4, n_kv_heads=2, head_dim=6), mlp=GatedMlp(d_ff=16))
    model = experts(TopKRouter(top_k=2), n_shared_experts=3)
    return replace(model, n_layers=5, blocks=(narrow, *model.blocks), first_blocks=(narrow,))


ODD = {
    "tied": small_model(head=LmHead(tied=True)),
    "biases and norms of heads": with_attention(
        small_model(blocks=(replace(small_model().blocks[0], mlp=GatedMlp(d_ff=24, bias=True)),)),
        qkv_bias=True,
        out_bias=True,
        qk_norm=QkNorm.HEADS,
    ),
    "sinks, norms of all heads and an offset": with_attention(
        small_model(embedded_position=Learned(offset=2)), sinks=True, qk_norm=QkNorm.WHOLE, position=None
    ),
    "a bias and more norms": small_model(
        norm=LayerNorm(scale=False),
        embedding_norm=True,
        head=LmHead(tied=True, bias=True, normalized=True),
        blocks=(replace(small_model().blocks[0], residual=DeepNorm()),),
    ),
    "no numbers in norms": small_model(
        norm=LayerNorm(scale=False, bias=False), blocks=(replace(small_model().blocks[0], residual=OutputNorm()),)
    ),
    "latents": latent_model(small_model(norm=LayerNorm()), query_rank=8),
    "noisy": experts(NoisyTopKRouter(top_k=2)),
    "sigmoid": experts(SigmoidRouter(top_k=2), n_shared_experts=1),
    "gpt-oss": experts(TopKRouter(top_k=2, bias=True), bias=True, activation=Swish(), n_shared_experts=1),
    "a learned Swish": small_model(
        blocks=(replace(small_model().blocks[0], mlp=GatedMlp(d_ff=24, activation=Swish())),)
    ),
    "expert choice": experts(ExpertChoiceRouter(), dispatch=Capacity(factor=2.0)),
    "pattern of two": pattern_of_two(),
}
MODELS = {name: model_of(name) for name in PRESETS} | ODD


def paths(tree) -> dict[str, object]:
    is_names = lambda leaf: isinstance(leaf, tuple)
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_names)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", MODELS)
def test_is_the_real_tree(name):
    model = MODELS[name]
    if model.adapter is not None:  # what is held in fewer bits has arrays of its own
        model = replace(model, adapter=replace(model.adapter, base=BaseFormat.FLOAT32))
    shapes = paths(jax.eval_shape(lambda: init_parameters(model, jax.random.key(0))))
    dims = paths(parameter_dims(model))
    want = [(name, leaf.shape, dims[name]) for name, leaf in shapes.items()]
    assert [(array.name, array.shape, array.dims) for array in arrays(model)] == want


@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up_to_the_counts(name):
    count = parameter_count(MODELS[name])
    found = dict.fromkeys(Part, 0)
    further = 0
    for array in arrays(MODELS[name]):
        if array.name.startswith("mtp/"):
            further += array.size
        else:
            found[array.part] += array.size
    assert found[Part.EMBEDDING] == count.embedding
    assert found[Part.UNEMBEDDING] == count.unembedding
    assert found[Part.ATTENTION] == count.attention
    assert found[Part.MLP] + found[Part.EXPERTS] == count.mlp
    assert found[Part.NORMS] == count.norms
    assert further == count.mtp
    assert sum(found.values()) + further == count.total


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # The released weights; the papers round: "6.7B, 13.0B, 32.5B, 65.2B" (arXiv:2302.13971, table 2).
        ("llama7b", 6_738_415_616),
        ("llama13b", 13_015_864_320),
        ("llama33b", 32_528_943_616),
        ("llama65b", 65_285_660_672),
        ("llama2_70b", 68_976_648_192),
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("mixtral8x7b", 46_702_792_704),
    ],
)
def test_published_sizes(name, published):
    assert sum(array.size for array in arrays(MODELS[name])) == published


def test_gpt3_has_175_billion():
    """Table 2.1 of arXiv:2005.14165: 96 layers, d_model 12288, 96 heads of 128, "175.0B".

    Its MLP has two matrices of 4 d^2; our gated one has three, so that d_ff = 8/3 d gives the same 8 d^2, and a layer
    12 d^2. What differs then: GPT-3 has learned positions (2048 d), biases and two numbers a norm, which are under
    0.02 % of it, and one table for input and output.
    """
    d = 12_288
    gpt3 = llama(
        vocab_size=50_257, d_model=d, n_layers=96, n_heads=96, d_ff=8 * d // 3, max_seq_len=2048, tie_embeddings=True
    )
    found = arrays(gpt3)
    matrices = sum(a.size for a in found if a.part in (Part.ATTENTION, Part.MLP))
    assert matrices == 12 * 96 * d**2
    positions, biases, shifts = 2048 * d, 96 * (4 * d + 5 * d), (2 * 96 + 1) * d
    total = sum(a.size for a in found)
    assert round((total + positions + biases + shifts) / 1e9, 1) == 174.6  # 96 layers and one table
    assert abs(total / 175.0e9 - 1) < 0.005


MESHES = [
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 1, "fsdp": 4, "tensor": 2},
    {"data": 1, "fsdp": 2, "tensor": 2, "stage": 2},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"data": 1, "seq": 4, "expert": 2},
]


@pytest.mark.parametrize("zero", Zero)
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_bytes_are_those_of_jax_shards(axes, zero):
    config = ShardingConfig(**axes, zero=zero)
    layout = make_layout(config)
    found = arrays(replace(pattern_of_two(), n_layers=5, d_model=32))
    for array in found:
        for part in StatePart:
            shard = layout.sharding(layout.parameter(array.dims, part)).shard_shape(array.shape)
            assert device_bytes(array, config.sizes(8), zero, part) == 4 * math.prod(shard), (array.name, part)


# Table 1 of arXiv:1910.02054: GB a device of a model of 7.5B parameters, by number of devices, for ZeRO 1, 2 and 3. The
# first row of figure 1 is no ZeRO at all: 120 GB.
TABLE_1 = {
    4: (52.5, 41.3, 30.0),
    16: (35.6, 21.6, 7.5),
    64: (31.4, 16.6, 1.88),
    256: (30.4, 15.4, 0.47),
    1024: (30.1, 15.1, 0.12),
}
# Adam in mixed precision (section 3.1): 2 bytes a parameter, 2 its gradient, 12 the float32 copy and two moments.
BYTES = {StatePart.PARAMETERS: 2, StatePart.GRADIENTS: 2, StatePart.OPTIMIZER: 12}


def one_matrix(size: int):
    """A parameter that fsdp cuts, of about so many numbers, in the way of a layer's."""
    model = llama(vocab_size=1024, d_model=1024, n_layers=1, n_heads=8, d_ff=size // 1024, max_seq_len=8)
    return next(array for array in arrays(model) if array.name.endswith("gate_proj"))


@pytest.mark.parametrize("devices", TABLE_1)
def test_zero_papers_table(devices):
    """The same cutting with the paper's bytes.

    Ours are others: float32 parameters 4, moments 8, gradients 4, and bfloat16 copies as long as a product needs
    them, which the table of parts shows as working memory: 16 bytes a parameter too, cut at other places.
    """
    matrix = one_matrix(7_500_000_000)
    sizes = ShardingConfig(data=1, fsdp=devices).sizes(devices)
    for zero, want in zip(Zero, TABLE_1[devices], strict=True):
        got = sum(device_bytes(matrix, sizes, zero, part, itemsize) for part, itemsize in BYTES.items()) / 1e9
        assert got == pytest.approx(want, abs=0.06), zero


def test_zero_papers_whole_copy():
    matrix, sizes = one_matrix(7_500_000_000), ShardingConfig().sizes(64)
    whole = sum(device_bytes(matrix, sizes, Zero.PARAMETERS, part, itemsize) for part, itemsize in BYTES.items())
    assert whole / 1e9 == pytest.approx(120, abs=0.06)
    assert whole / matrix.size == 16
