"""Parameters and FLOPs of a model, counted from its config: nothing is built, nothing is measured.

The count of training is that of PaLM, appendix B (arXiv:2204.02311): 6N + 12*L*N_heads*H*T FLOPs a token, forward and
backward. One multiply-add is two FLOPs; the backward pass costs twice the forward.

What N is. PaLM's N is every parameter. Here N leaves out the input embedding table, because looking a row up
multiplies nothing; a tied table is the output projection too, so it counts, once. For LLaMA 7B this N is 1.9 % smaller
than all parameters, for Llama 3 8B 6.5 %, and the MFU is lower by about as much: the honest direction. Of a mixture of
experts N has what one token uses: router, shared experts, and as many of the others as it is sent to. Choices that find
no room count all the same, and padding and the moving of tokens do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, assert_never

from maxlm.config import (
    AttentionConfig,
    BlockConfig,
    ExpertChoiceRouter,
    FfnConfig,
    GluConfig,
    ModelConfig,
    MoeConfig,
    NoisyTopKRouter,
    Remat,
    SigmoidRouter,
    TopKRouter,
)
from maxlm.config.remat import SAVED_NAMES


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters by what they do."""

    embedding: int
    """Input table [V, D]."""
    unembedding: int
    """Output projection [V, D]; 0 when it is the input table."""
    attention: int
    """Projections, their biases, and the norms of query and key heads."""
    ffn: int
    """MLPs, routers and all experts."""
    ffn_active: int
    """Of these, what one token uses: all but the experts that it is not sent to. With expert choice the mean over
    tokens."""
    norms: int
    """Scales on the residual stream: two a block, and the final one."""
    tied: bool

    @property
    def total(self) -> int:
        return self.embedding + self.unembedding + self.attention + self.ffn + self.norms

    @property
    def active(self) -> int:
        """What one token uses; less than the total in a mixture of experts alone."""
        return self.total - self.ffn + self.ffn_active

    @property
    def matmul(self) -> int:
        """N of the FLOPs formula: the active parameters, less an input table that is only looked up."""
        return self.active if self.tied else self.active - self.embedding


@dataclass(frozen=True, kw_only=True)
class FlopsPerToken:
    """Training FLOPs of one token in a sequence of a given length, forward and backward."""

    parameters_term: int
    """6N."""
    attention_term: int
    """12*N_heads*H*min(T, window), summed over the layers: scores and weighted values over every key in reach."""
    causal_attention_term: float
    """The same with only the keys that a causal mask leaves: (T + 1) / 2 on average without a window."""
    recompute: int
    """What the remat policy computes a second time. In no other figure here, and never in MFU: it is work, but not of
    use. Kernels that recompute scores, and a loss that recomputes logits, come on top."""
    causal_recompute: float
    """The same with only the keys that a causal mask leaves, which are those that our kernels compute."""

    @property
    def total(self) -> int:
        """The FLOPs of MFU: 6N + 12*L*N_heads*H*T."""
        return self.parameters_term + self.attention_term

    @property
    def causal(self) -> float:
        """`total` without the masked half of attention."""
        return self.parameters_term + self.causal_attention_term


def parameter_count(model: ModelConfig) -> ParameterCount:
    """Count the parameters of `model`."""
    ffn = [(_ffn_parameters(block.ffn, model.d_model), times) for block, times in _kinds(model)]
    table = model.vocab_size * model.d_model
    return ParameterCount(
        embedding=table,
        unembedding=0 if model.tie_embeddings else table,
        attention=sum(times * _attention_parameters(block.attention, model.d_model) for block, times in _kinds(model)),
        ffn=sum(times * count.total for count, times in ffn),
        ffn_active=sum(times * count.active for count, times in ffn),
        norms=(2 * model.n_layers + 1) * model.d_model,
        tied=model.tie_embeddings,
    )


def flops_per_token(model: ModelConfig, seq_len: int, *, remat_stages: bool = False) -> FlopsPerToken:
    """FLOPs of training `model` on one token of sequences of `seq_len` tokens.

    `remat_stages`: the run has a pipeline that computes each stage a second time (`sharding.remat_stages`).
    """
    attention, causal, recompute, causal_recompute = 0, 0.0, 0.0, 0.0
    for block, times in _kinds(model):
        heads = block.attention.n_heads * block.attention.head_dim
        reach = min(seq_len, block.attention.window or seq_len)
        visible = _mean_visible_keys(seq_len, reach)
        attention += times * 12 * heads * reach
        causal += times * 12 * heads * visible
        recompute += times * _recomputed(model, block, reach, remat_stages)
        causal_recompute += times * _recomputed(model, block, visible, remat_stages)
    return FlopsPerToken(
        parameters_term=6 * parameter_count(model).matmul,
        attention_term=attention,
        causal_attention_term=causal,
        recompute=round(recompute),
        causal_recompute=causal_recompute,
    )


def mfu(*, flops_per_token: float, tokens_per_s: float, n_devices: int, peak_flops: float) -> float:
    """Model FLOPs utilisation, 0..1: FLOPs the model needs for what was trained, over what the devices could have done.

    `flops_per_token` is `FlopsPerToken.total`, `peak_flops` FLOP/s of one device (PaLM, appendix B).
    """
    return flops_per_token * tokens_per_s / (n_devices * peak_flops)


def _kinds(model: ModelConfig) -> list[tuple[BlockConfig, int]]:
    """Every block config, and how many layers it is."""
    return [*((block, 1) for block in model.first_blocks), *((block, model.repeats) for block in model.blocks)]


def _attention_parameters(attention: AttentionConfig, d_model: int) -> int:
    query = attention.n_heads * attention.head_dim
    key = attention.n_kv_heads * attention.head_dim
    count = 2 * d_model * query + 2 * d_model * key  # q and o, k and v
    if attention.qkv_bias:
        count += query + 2 * key
    if attention.out_bias:
        count += d_model
    if attention.qk_norm:
        count += 2 * attention.head_dim
    return count


class _Ffn(NamedTuple):
    total: int
    active: int


def _ffn_parameters(ffn: FfnConfig, d_model: int) -> _Ffn:
    match ffn:
        case GluConfig():
            count = 3 * d_model * ffn.d_ff + (2 * ffn.d_ff + d_model if ffn.bias else 0)
            return _Ffn(count, count)
        case MoeConfig():
            expert = 3 * d_model * ffn.d_ff
            always = _router_parameters(ffn, d_model) + ffn.n_shared_experts * expert
            return _Ffn(always + ffn.n_experts * expert, always + round(ffn.experts_per_token * expert))
        case _:
            assert_never(ffn)


def _router_parameters(ffn: MoeConfig, d_model: int) -> int:
    scores = d_model * ffn.n_experts
    match ffn.router:
        case TopKRouter() | ExpertChoiceRouter():
            return scores
        case NoisyTopKRouter():
            return 2 * scores  # the scores' and the noise's
        case SigmoidRouter():
            return scores + ffn.n_experts  # and the biases
        case _:
            assert_never(ffn.router)


def _mean_visible_keys(seq_len: int, reach: int) -> float:
    """Keys that a query sees, itself included, averaged over a sequence: min(t, reach) for t = 1..T."""
    return reach - reach * (reach - 1) / (2 * seq_len)


def _recomputed(model: ModelConfig, block: BlockConfig, keys: float, stage: bool) -> float:
    """Multiplications of one block that the backward pass does again, in FLOPs a token that sees so many keys; with
    `stage` those of a second forward pass too."""
    attention = block.attention
    heads = attention.n_heads * attention.head_dim
    scores = 4 * heads * keys
    qkv = 2 * model.d_model * (heads + 2 * attention.n_kv_heads * attention.head_dim)
    out = 2 * heads * model.d_model
    ffn = _recomputed_ffn(block.ffn, model.d_model)
    forward = 0.0
    if stage:
        forward = scores + 2 * _attention_parameters(attention, model.d_model)
        forward += 2 * _ffn_parameters(block.ffn, model.d_model).active
    if model.remat in (Remat.NONE, Remat.DOTS):
        return forward
    saved = SAVED_NAMES[model.remat]
    again = [qkv] * ("query" not in saved) + [scores] * ("attention_out" not in saved) + [out, ffn]
    return forward + sum(again) - ("glu_gate" in saved) * _gate_and_up(block.ffn, model.d_model)


def _recomputed_ffn(ffn: FfnConfig, d_model: int) -> int:
    """FLOPs a token of the products that a backward pass from the FFN's input needs again.

    A down projection is among them where it is an expert's: the gradient of the gate that multiplies its output needs
    that.
    """
    plain = _gate_and_up(ffn, d_model)
    match ffn:
        case GluConfig():
            return plain
        case MoeConfig():
            scores = d_model * ffn.n_experts * (2 if isinstance(ffn.router, NoisyTopKRouter) else 1)
            return 2 * scores + plain + round(ffn.experts_per_token * 6 * d_model * ffn.d_ff)
        case _:
            assert_never(ffn)


def _gate_and_up(ffn: FfnConfig, d_model: int) -> int:
    """FLOPs a token of the first two products of what is a plain MLP: all of it, or the shared experts."""
    match ffn:
        case GluConfig():
            return 4 * d_model * ffn.d_ff
        case MoeConfig():
            return 4 * d_model * ffn.n_shared_experts * ffn.d_ff
        case _:
            assert_never(ffn)
