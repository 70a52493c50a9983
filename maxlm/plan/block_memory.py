"""What one block of the decoder holds of each token: saved for the backward pass, and at work in it.

Bytes a token on a device. What is saved follows from the blocks' code and from what jax saves of it, and a test
compares the two; what is at work is the compilers' choice, learnt from the buffers of compiled programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, assert_never

from maxlm.config import (
    BlockConfig,
    Context,
    DeepNorm,
    Experts,
    GroupedQuery,
    LatentAttention,
    Mlp,
    OutputNorm,
    Parallel,
    PostNorm,
    PreNorm,
    Remat,
    RunConfig,
    Sandwich,
)
from maxlm.config.remat import SAVED_NAMES
from maxlm.plan.machines import Platform
from maxlm.shapes import FLOAT32, block_norms, shared_experts


class BlockMemory(NamedTuple):
    """Bytes a token on a device of one block's intermediates."""

    input: int
    """What enters the block: a vector of the residual stream, of which sequence_parallel leaves a part."""
    saved: int
    """What `execution.remat` keeps on the device for the backward pass, the input included."""
    backward: int
    """The fullest moment of the block's backward pass, without what is saved anyhow: the MLP's products and their
    gradients, four vectors of the residual stream, and attention at work."""


def block_memory(
    config: RunConfig, sizes: Mapping[str, int], platform: Platform, block: BlockConfig, tokens: int
) -> BlockMemory:
    """Of one block config, in a run on a mesh with axes of these sizes, whose devices have so many tokens at a time."""
    remat, attention, mlp = config.execution.remat, block.attention, block.mlp
    itemsize, tensor, tpu = config.execution.dtype.itemsize, sizes["tensor"], platform is Platform.TPU
    gathered = sizes["seq"] if config.sharding.context is Context.ALL_GATHER else 1  # every device needs all keys
    width = config.model.d_model * itemsize
    own = width // (tensor if config.sharding.sequence_parallel else 1)
    heads, kv_heads = (n * itemsize // tensor for n in (attention.n_heads, attention.n_kv_heads))
    query, key = heads * attention.key_head_dim, kv_heads * attention.key_head_dim
    out, value = heads * attention.value_head_dim, kv_heads * attention.value_head_dim
    match attention:  # what norms of it read
        case GroupedQuery(qk_norm=qk_norm):
            normed, latents = 0 if qk_norm is None else query + key, 0
        case LatentAttention(kv_rank=kv_rank, query_rank=query_rank):
            normed = latents = (kv_rank + (query_rank or 0)) * itemsize
        case _:
            assert_never(attention)
    # Of the MLP that every token uses: what its last product reads, and what is multiplied to that, a gate or not.
    dense = shared_experts(mlp) if isinstance(mlp, Experts) else mlp
    hidden = 0 if dense is None else dense.d_ff * itemsize // tensor
    gate_up = hidden if isinstance(dense, Mlp) else 2 * hidden
    # Last products of attention and MLP that a norm reads, alone or in a sum; that of routed experts is made again.
    match block.residual:
        case Parallel():
            sums = 0
        case PreNorm():
            sums = 1
        case PostNorm() | OutputNorm() | DeepNorm() | Sandwich():
            sums = 1 if dense is None else 2
        case _:
            assert_never(block.residual)
    unnamed, gate_up_all, products, moved = 0, gate_up, gate_up, 0
    if isinstance(mlp, Experts):
        # Rows of the buffer that a device's experts read, for each of the device's tokens (`ops/experts.py`).
        rows = mlp.buffer_rows(tokens, seq_len=config.train.seq_len, devices=sizes["expert"]) / tokens
        gate_up_all += round(rows * 2 * mlp.d_ff * itemsize / tensor)
        # What comes out of them, which their gates' gradients need, and the router's scores.
        products = gate_up_all + round(rows * width) + FLOAT32 * mlp.n_experts
        # On the way to experts and back: the rows that leave, that arrive, that return, and each choice's.
        moved = round((2 * rows + mlp.top_k) * width)
        # Their gated unit is plain float32: five arrays of it, or eight with a clamp, and what the last product reads,
        # the rows, the router's input, and every choice's result.
        unit = ((5 if mlp.clamp is None else 8) * FLOAT32 + itemsize) * mlp.d_ff // tensor
        unnamed = round(rows * (unit + width)) + FLOAT32 * config.model.d_model * (1 + mlp.top_k)

    # XLA for GPUs computes queries, keys and values wherever keys are needed.
    copies = 1 if tpu else gathered
    named = {
        "query": query * copies,
        "key": key * copies,
        "value": value * copies,
        "attention_out": out,
        "attention_lse": FLOAT32 * attention.n_heads // tensor,
        "glu_gate": hidden,
        "glu_up": gate_up - hidden,
        "grouped_out": sums * own + normed + products,  # with all products that only Remat.DOTS keeps
    }
    kept = lambda policy: sum(named[name] for name in SAVED_NAMES[policy])
    match remat:
        case Remat.NONE:
            # Of each norm its input, the normalised input, both in float32, and its output, twice where attention and
            # the MLP share it; of attention the named arrays; of the MLP gate, up and what the last product reads.
            norms = len(block_norms(block))
            inputs = 2 * FLOAT32 * (norms * own + normed) // itemsize + latents
            saved = inputs + max(norms, 2) * width + kept(Remat.NAMES) + gate_up + hidden + unnamed
        case Remat.OFFLOAD:
            saved = own
        case _:
            saved = own + kept(remat)

    found = remat in (Remat.NONE, Remat.DOTS) or (remat is Remat.GLU and not isinstance(mlp, Experts))
    times = 1 if found else 2  # the MLP's products
    if tpu:
        # Our kernels read and write the arrays as they are; elsewhere attention turns its operands round, and sums
        # gradients in float32, and experts' rows have their gradients beside them.
        backward = gate_up_all * times + moved + query + out + (key + value) * gathered
    else:
        backward = products * times + 2 * moved + 4 * query + out + 2 * (key + value) * gathered
    return BlockMemory(input=own, saved=saved, backward=backward + 4 * own)
