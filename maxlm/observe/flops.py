"""Parameters and FLOPs of a model, counted from its config: nothing is built, nothing is measured.

The count of training is that of PaLM, appendix B (arXiv:2204.02311): 6N + 12*L*N_heads*H*T FLOPs a token, forward and
backward. One multiply-add is two FLOPs; the backward pass costs twice the forward.

What N is. PaLM's N is every parameter. Here N leaves out the input embedding table, because looking a row up
multiplies nothing; a tied table is the output projection too, so it counts, once. For LLaMA 7B this N is 1.9 % smaller
than all parameters, for Llama 3 8B 6.5 %, and the MFU is lower by about as much: the honest direction.
"""

from __future__ import annotations

from dataclasses import dataclass

from maxlm.config import AttentionConfig, BlockConfig, GluConfig, ModelConfig, Remat


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
    norms: int
    """Scales on the residual stream: two a block, and the final one."""
    tied: bool

    @property
    def total(self) -> int:
        return self.embedding + self.unembedding + self.attention + self.ffn + self.norms

    @property
    def matmul(self) -> int:
        """N of the FLOPs formula: all parameters, less an input table that is only looked up."""
        return self.total if self.tied else self.total - self.embedding


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
    repeats = model.n_layers // len(model.blocks)
    table = model.vocab_size * model.d_model
    return ParameterCount(
        embedding=table,
        unembedding=0 if model.tie_embeddings else table,
        attention=repeats * sum(_attention_parameters(block.attention, model.d_model) for block in model.blocks),
        ffn=repeats * sum(_ffn_parameters(block.ffn, model.d_model) for block in model.blocks),
        norms=(2 * model.n_layers + 1) * model.d_model,
        tied=model.tie_embeddings,
    )


def flops_per_token(model: ModelConfig, seq_len: int) -> FlopsPerToken:
    """FLOPs of training `model` on one token of sequences of `seq_len` tokens."""
    repeats = model.n_layers // len(model.blocks)
    attention, causal, recompute = 0, 0.0, 0
    for block in model.blocks:
        heads = block.attention.n_heads * block.attention.head_dim
        reach = min(seq_len, block.attention.window or seq_len)
        attention += 12 * heads * reach
        causal += 12 * heads * _mean_visible_keys(seq_len, reach)
        recompute += _recomputed(model, block, reach)
    return FlopsPerToken(
        parameters_term=6 * parameter_count(model).matmul,
        attention_term=repeats * attention,
        causal_attention_term=repeats * causal,
        recompute=repeats * recompute,
    )


def mfu(*, flops_per_token: float, tokens_per_s: float, n_devices: int, peak_flops: float) -> float:
    """Model FLOPs utilisation, 0..1: FLOPs the model needs for what was trained, over what the devices could have done.

    `flops_per_token` is `FlopsPerToken.total`, `peak_flops` FLOP/s of one device (PaLM, appendix B).
    """
    return flops_per_token * tokens_per_s / (n_devices * peak_flops)


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


def _ffn_parameters(ffn: GluConfig, d_model: int) -> int:
    return 3 * d_model * ffn.d_ff + (2 * ffn.d_ff + d_model if ffn.bias else 0)


def _mean_visible_keys(seq_len: int, reach: int) -> float:
    """Keys that a query sees, itself included, averaged over a sequence: min(t, reach) for t = 1..T."""
    return reach - reach * (reach - 1) / (2 * seq_len)


def _recomputed(model: ModelConfig, block: BlockConfig, reach: int) -> int:
    """Multiplications of one block that the backward pass does again, in FLOPs a token.

    The down projection is never among them: no gradient needs its output.
    """
    attention, d_ff = block.attention, block.ffn.d_ff
    heads = attention.n_heads * attention.head_dim
    scores = 4 * heads * reach
    qkv = 2 * model.d_model * (heads + 2 * attention.n_kv_heads * attention.head_dim)
    out = 2 * heads * model.d_model
    gate_up = 4 * model.d_model * d_ff
    match model.remat:
        case Remat.NONE:
            return 0
        case Remat.DOTS:
            return scores
        case Remat.NAMES | Remat.OFFLOAD:
            return out + gate_up
        case Remat.FULL:
            return qkv + scores + out + gate_up
