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

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import assert_never

from maxlm.config import (
    Attention,
    BlockConfig,
    FixedPattern,
    GroupedQuery,
    LatentAttention,
    ModelConfig,
    Remat,
    StridedPattern,
)
from maxlm.config.remat import SAVED_NAMES
from maxlm.shapes.array import Array, Part, Role
from maxlm.shapes.arrays import MTP, arrays, block


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters by what they do."""

    embedding: int
    """Input table [V, D], and that of learned positions."""
    unembedding: int
    """Output projection [V, D], which is not counted where it is the input table, and its bias."""
    attention: int
    """Projections, their biases, position tables, and the norms of query and key heads."""
    mlp: int
    """MLPs, routers and all experts."""
    mlp_active: int
    """Of these, what one token uses: all but the experts that it is not sent to. With expert choice the mean over
    tokens."""
    norms: int
    """Scales and biases on the residual stream: of each block's norms, and of the final one."""
    medusa: int
    """Heads that guess at later tokens."""
    mtp: int
    """Modules that predict further tokens in training, experts and all."""
    mtp_active: int
    """Of these, what one token uses."""
    adapter: int
    """What is trained beside a model that is not."""
    looked_up: int
    """Of the tables, what a token only looks a row up in."""

    @property
    def total(self) -> int:
        outside = self.embedding + self.unembedding + self.norms + self.medusa + self.mtp + self.adapter
        return outside + self.attention + self.mlp

    @property
    def active(self) -> int:
        """What one token uses in training; less than the total in a mixture of experts alone."""
        return self.total - self.mlp + self.mlp_active - self.mtp + self.mtp_active

    @property
    def matmul(self) -> int:
        """N of the FLOPs formula: the active parameters, less the tables that are only looked up."""
        return self.active - self.looked_up


@dataclass(frozen=True, kw_only=True)
class FlopsPerToken:
    """Training FLOPs of one token in a sequence of a given length, forward and backward."""

    parameters_term: int
    """6N."""
    attention_term: int
    """12*N_heads*H*min(T, window), summed over the layers: scores and weighted values over every key in reach. Of
    attention with a pattern every key that it leaves."""
    causal_attention_term: float
    """The same with only the keys that a causal mask leaves: (T + 1) / 2 on average without a window. With a pattern as
    without, as our kernels compute all those scores."""
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


@functools.cache
def parameter_count(model: ModelConfig) -> ParameterCount:
    """Count the parameters of `model`."""
    found = arrays(model.main)
    further = [array for array in arrays(model) if array.name.startswith(f"{MTP}/")]
    sizes = {part: sum(array.size for array in found if array.part is part) for part in Part}
    active = sum(array.size * array.uses for array in found if array.part in (Part.MLP, Part.EXPERTS))
    return ParameterCount(
        embedding=sizes[Part.EMBEDDING],
        unembedding=sizes[Part.UNEMBEDDING],
        attention=sizes[Part.ATTENTION],
        mlp=sizes[Part.MLP] + sizes[Part.EXPERTS],
        mlp_active=round(active),
        norms=sizes[Part.NORMS],
        medusa=sizes[Part.MEDUSA],
        mtp=sum(array.size for array in further),
        mtp_active=round(sum(array.size * array.uses for array in further)),
        adapter=sizes[Part.ADAPTER],
        looked_up=sum(array.size for array in found if array.uses == 0),
    )


@functools.cache
def flops_per_token(model: ModelConfig, seq_len: int, remat: Remat, *, remat_stages: bool = False) -> FlopsPerToken:
    """FLOPs of training `model` on one token of sequences of `seq_len` tokens.

    A matrix under an adapter has no gradient of its own: two thirds of the FLOPs; and in front of Medusa heads, where
    nothing goes back, one third. Where Medusa heads are trained, the model's own head is not used; each of the modules
    of `model.mtp` uses it once more.

    `remat` decides what is computed again; `remat_stages`: the run has a pipeline that computes each stage a second
    time (`sharding.remat_stages`).
    """
    attention, causal, recompute, causal_recompute = 0, 0.0, 0.0, 0.0
    if model.medusa is not None:
        return _flops_of_heads(model, seq_len)
    kinds = [*((block, 1) for block in model.first_blocks), *((block, model.repeats) for block in model.blocks)]
    if model.mtp is not None:
        kinds.append((model.blocks[-1], model.mtp.depth))
    for config, times in kinds:
        per_key = 3 * _flops_of_a_key(config.attention)
        reach = min(seq_len, config.attention.window or seq_len)
        visible = _mean_visible_keys(seq_len, reach)
        attention += times * per_key * _of_pattern(config.attention, seq_len, reach)
        causal += times * per_key * visible
        recompute += times * _recomputed(model, config, remat, reach, remat_stages)
        causal_recompute += times * _recomputed(model, config, remat, visible, remat_stages)
    return FlopsPerToken(
        parameters_term=_of_parameters(model),
        attention_term=attention,
        causal_attention_term=causal,
        recompute=round(recompute),
        causal_recompute=causal_recompute,
    )


def reading_flops(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of the forward pass alone on one token of sequences of `seq_len` tokens, with the keys that a causal mask
    leaves."""
    model = model.main
    attention = flops_per_token(model, seq_len, Remat.NONE).causal_attention_term / 3
    return 2 * sum(array.size * array.uses for array in arrays(model)) + attention


def _of_parameters(model: ModelConfig) -> int:
    """6N; 4 for each number that gradients go through and that has none."""
    if model.adapter is None:
        further = 0 if model.mtp is None else model.mtp.depth
        return 6 * (parameter_count(model).matmul + further * model.vocab_size * model.d_model)
    return round(sum(array.size * array.uses * (6 if array.trained else 4) for array in arrays(model)))


def _flops_of_heads(model: ModelConfig, seq_len: int) -> FlopsPerToken:
    """Of training Medusa heads: a forward pass of the rest but for the model's own head, and three of the heads."""
    count = parameter_count(model)
    rest = flops_per_token(replace(model, medusa=None), seq_len, Remat.NONE)
    own = model.vocab_size * model.d_model
    return FlopsPerToken(
        parameters_term=rest.parameters_term // 3 - 2 * own + 6 * count.medusa,
        attention_term=rest.attention_term // 3,
        causal_attention_term=rest.causal_attention_term / 3,
        recompute=0,
        causal_recompute=0.0,
    )


def decoding_flops(model: ModelConfig, context: int) -> int:
    """FLOPs of one decoded token that sees `context` keys, itself included: 2N, and scores and weighted values over
    every key in reach; without guesses of Medusa heads. A layer of GPT with d_ff = 4 D and as many key heads as query
    heads needs 24 D^2 + 4 D context.

    Latents are seen as keys and values themselves, wider than a head's (arXiv:2405.04434, appendix C).
    """
    layers = [layer.attention for layer in model.layers]
    seen = sum(_flops_of_a_kept_key(one) * min(context, one.window or context) for one in layers)
    count = parameter_count(model.main)
    return 2 * (count.matmul - count.medusa) + seen


def prefill_flops(model: ModelConfig, tokens: int) -> int:
    """FLOPs of reading a prompt of so many tokens into the cache, and of the logits of its last one alone."""
    tables = sum(a.size for a in arrays(model) if a.part in (Part.EMBEDDING, Part.UNEMBEDDING) and a.uses)
    seen = 0
    for attention in (layer.attention for layer in model.layers):
        reach = min(tokens, attention.window or tokens)
        seen += _flops_of_a_kept_key(attention) * (tokens * reach - reach * (reach - 1) // 2)  # min(t, reach), t = 1..
    count = parameter_count(model.main)
    return 2 * (tokens * (count.matmul - count.medusa - tables) + tables) + seen


def mfu(*, flops_per_token: float, tokens_per_s: float, n_devices: int, peak_flops: float) -> float:
    """Model FLOPs utilisation, 0..1: FLOPs the model needs for what was trained, over what the devices could have done.

    `flops_per_token` is `FlopsPerToken.total`, `peak_flops` FLOP/s of one device (PaLM, appendix B).
    """
    return flops_per_token * tokens_per_s / (n_devices * peak_flops)


def _mean_visible_keys(seq_len: int, reach: int) -> float:
    """Keys that a query sees, itself included, averaged over a sequence: min(t, reach) for t = 1..T."""
    return reach - reach * (reach - 1) / (2 * seq_len)


def _of_pattern(attention: Attention, seq_len: int, reach: int) -> int:
    """Keys within reach of a query that its pattern leaves, at most."""
    pattern = attention.pattern if isinstance(attention, GroupedQuery) else None
    match pattern:
        case StridedPattern(stride=stride):
            return min(seq_len, stride + seq_len // stride)
        case FixedPattern(chunk=chunk, summary=summary):
            return min(seq_len, chunk + summary * (seq_len // chunk))
        case None:
            return reach
        case _:
            assert_never(pattern)


def _recomputed(model: ModelConfig, config: BlockConfig, remat: Remat, keys: float, stage: bool) -> float:
    """Multiplications of one block that the backward pass does again, in FLOPs a token that sees so many keys; with
    `stage` those of a second forward pass too."""
    scores = _flops_of_a_key(config.attention) * keys
    own = [array for array in block(config, model) if array.part is not Part.NORMS]
    out = _flops(array for array in own if array.name == "attention/o_proj")
    qkv = _flops(array for array in own if array.part is Part.ATTENTION and array.role is Role.PRODUCT) - out
    inner = [array for array in own if array.name.startswith("mlp/")]
    gate_and_up = _flops(a for a in inner if a.part is Part.MLP and a.name.endswith(("gate_proj", "up_proj")))
    # A down projection is among them where it is an expert's: the gradient of the gate that multiplies its output needs
    # that.
    mlp = gate_and_up + _flops(array for array in inner if array.part is Part.EXPERTS or array.role is Role.ROUTER)
    forward = scores + _flops(own) if stage else 0.0
    if remat in (Remat.NONE, Remat.DOTS):
        return forward
    saved = SAVED_NAMES[remat]
    again = [qkv] * ("query" not in saved) + [scores] * ("attention_out" not in saved) + [out, mlp]
    return forward + sum(again) - ("glu_gate" in saved) * gate_and_up


def _flops_of_a_key(attention: Attention) -> int:
    """Of a query's scores of one key, and of that key's value, all heads, forward."""
    return 2 * attention.n_heads * (attention.key_head_dim + attention.value_head_dim)


def _flops_of_a_kept_key(attention: Attention) -> int:
    """The same with a cache."""
    match attention:
        case GroupedQuery():
            return _flops_of_a_key(attention)
        case LatentAttention(n_heads=heads, kv_rank=rank, rope_head_dim=rope):
            return 2 * heads * (rank + rope + rank)
        case _:
            assert_never(attention)


def _flops(found: Iterable[Array]) -> float:
    """Of a token's products with these arrays."""
    return 2 * sum(array.size * array.uses for array in found)
