"""The attention tests can fail: with one line of a body changed in its source, the comparison with the oracle must."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import build, compare, mask_of, reference

import kernels_pallas
from kernels_pallas.attention.problem import MASKED, AttentionBlocks, AttentionProblem, Buckets, Operands

FOLDER = Path(kernels_pallas.__file__).parent / "attention"
MODULES = {"xla": ["xla"], "tpu": ["tpu_tile", "tpu_backward", "tpu"]}  # in the order of their imports
BLOCKS = {
    "xla": AttentionBlocks(q=16, k=16, q_backward=16, k_backward=16),
    "tpu": AttentionBlocks(q=128, k=128, q_backward=128, k_backward=128),
}


@dataclass(frozen=True)
class Mutation:
    """In a module of a body, the text that occurs once and what takes its place."""

    module: str
    old: str
    new: str
    passes: str = "forward"
    """The pass that must go wrong."""
    segments: bool = True
    """Without: where segments would hide the same keys as what is taken away."""
    visible_to: bool = False
    """With: the mask then hides nothing from above."""


XLA = {
    "mask": Mutation("xla", "self.problem.mask.visible(queries, keys) & (keys", "(queries >= -999) & (keys"),
    "end_of_keys": Mutation("xla", "& (keys < self.problem.S)", "& (keys >= 0)", segments=False),
    "segments": Mutation("xla", "seen &= self.q_segments[i]", "seen |= self.q_segments[i]"),
    "position": Mutation("xla", "self.q_offset[:, None, None] + i", "0 * self.q_offset[:, None, None] + i"),
    "first_maximum": Mutation("xla", "start = zeros + MASKED, zeros,", "start = zeros, zeros,"),
    "first_accumulator": Mutation("xla", "zeros, jnp.broadcast_to(zero, (*", "zeros, jnp.broadcast_to(zero + 1, (*"),
    "rescale_of_accumulator": Mutation("xla", "acc * shrink[..., None] + update", "acc + update"),
    "rescale_of_sum": Mutation("xla", "total * shrink + p.sum(-1)", "total + p.sum(-1)"),
    "second_where": Mutation(
        "xla", "jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)", "jnp.exp(scores - new_top[..., None])"
    ),
    "clamp_of_sum": Mutation("xla", "total = jnp.where(total == 0, 1.0, total)", "total = 1.0 * total"),
    "soft_cap": Mutation("xla", "scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)", "scores"),
    "alibi": Mutation("xla", "* jnp.abs(distance)", "* distance"),
    "bucket": Mutation("xla", "jnp.where(distance >= start,", "jnp.where(distance > start,"),
    "scale": Mutation("xla", "    scores = products * scale\n", "    scores = products\n"),
    "last_key_block": Mutation(
        "xla", "-(-jnp.minimum(stop, self.problem.S) //", "(jnp.minimum(stop, self.problem.S) //"
    ),
    "ends": Mutation("xla", "seen &= keys < self.visible_to", "seen &= keys <= self.visible_to", visible_to=True),
    "last_key_block_by_ends": Mutation(
        "xla", "self.furthest[i], 0, stop)", "self.furthest[i] - 16, 0, stop)", visible_to=True
    ),
    "query_blocks_by_ends": Mutation(
        "xla",
        "jnp.maximum(start, first_reaching)",
        "jnp.maximum(start, first_reaching + 1)",
        "backward",
        visible_to=True,
    ),
    "mask_backward": Mutation("xla", "jnp.where(tiles.seen(i, j).swapaxes(2, 3),", "jnp.where(True,", "backward"),
    "delta": Mutation("xla", "p * (dp - delta[i][:, :, None])", "p * dp", "backward"),
    "cap_slope": Mutation("xla", "ds *= 1 - (capped", "ds *= 1 - 0 * (capped", "backward"),
    "scale_of_dk": Mutation("xla", "(dk * problem.scale)", "dk", "backward"),
    "first_query_block": Mutation("xla", "jnp.clip((start - jnp.max", "jnp.clip(2 + (start - jnp.max", "backward"),
    "diagonals": Mutation("xla", "[:, :, ::-1]", "", "backward"),
}
TPU = {
    "mask": Mutation("tpu_tile", "seen = p.mask.visible(q, k)", "seen = (q >= -999) & (k >= 0)"),
    "end_of_keys": Mutation("tpu_tile", "            seen &= k < p.S", "            pass", segments=False),
    "segments": Mutation(
        "tpu_tile", 'seen &= self.refs["outer_segments"][...] ==', 'seen &= self.refs["outer_segments"][...] >='
    ),
    "first_maximum": Mutation("tpu", "top[...] = jnp.full(top.shape, MASKED)", "pass"),
    "first_sum": Mutation("tpu", "total[...] = jnp.zeros(total.shape)", "pass"),
    "first_accumulator": Mutation("tpu", "acc[...] = jnp.zeros(acc.shape)", "pass"),
    "rescale_of_accumulator": Mutation("tpu", "acc[...] = acc[...] * shrink +", "acc[...] = acc[...] +"),
    "rescale_of_sum": Mutation("tpu", "total[...] = total[...] * shrink +", "total[...] = total[...] +"),
    "second_where": Mutation("tpu", "weights = jnp.where(seen, weights, 0.0)", "pass"),
    "clamp_of_sum": Mutation("tpu", "jnp.where(nothing, 1.0, total[...])", "total[...]"),
    "padding": Mutation("tpu", "v = tile.inner_rows(v)", "pass"),
    "mask_backward": Mutation(
        "tpu_backward", "jnp.where(seen, weights, 0.0), jnp.where(seen, ds, 0.0)", "weights, ds", "backward"
    ),
    "delta": Mutation("tpu_backward", "weights * (dp - delta)", "weights * dp", "backward"),
    "cap_slope": Mutation("tpu_backward", "ds if slope is None else ds * slope", "ds", "backward"),
    "first_dk": Mutation("tpu_backward", "dk[...] = jnp.zeros(dk.shape)", "pass", "backward"),
    "first_dq": Mutation("tpu_backward", "dq[...] = jnp.zeros(dq.shape)", "pass", "backward"),
    "group": Mutation("tpu_backward", "@pl.when((member == 0) & (step == 0))", "@pl.when(step == 0)", "backward"),
    "ends": Mutation("tpu_tile", "seen &= k < self.refs", "seen &= k <= self.refs", visible_to=True),
    "clear_by_ends": Mutation(
        "tpu_tile", 'clear &= self._ends("least") > last_k', "pass", segments=False, visible_to=True
    ),
    "key_blocks_by_ends": Mutation(
        "tpu_tile", "stop = pl.cdiv(jnp.clip(most, 0, p.S), walk.k)", "stop = most // walk.k", visible_to=True
    ),
    "query_blocks_by_ends": Mutation(
        "tpu_tile", 'self._ends("most") > first_k', 'self._ends("most") > last_k', "backward", visible_to=True
    ),
    "steps_of_the_walk": Mutation("tpu_tile", "return block, step < seen", "return block, step + 1 < seen"),
}
CASES = [("xla", name) for name in XLA] + [("tpu", name) for name in TPU]
QUICK = {("xla", name) for name in ("mask", "rescale_of_accumulator", "first_maximum", "second_where", "clamp_of_sum")}
SLOW = {("xla", "delta"), ("tpu", "mask"), ("tpu", "mask_backward")}
"""Of each body and each pass some; the others are nightly."""


def load(body: str, mutation: Mutation | None, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A fresh copy of a body's modules, mutated."""
    for name in MODULES[body]:
        source = (FOLDER / f"{name}.py").read_text()
        if mutation is not None and mutation.module == name:
            assert source.count(mutation.old) == 1, f"{name}.py has {source.count(mutation.old)} of {mutation.old!r}"
            source = source.replace(mutation.old, mutation.new)
        module = types.ModuleType(f"kernels_pallas.attention.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(source, f"{name}.py, mutated", "exec"), module.__dict__)
    return module


def examine(body: str, module: types.ModuleType, passes: str, segments: bool = True, visible_to: bool = False) -> None:
    """Compare one pass of a body with the oracle, with every feature in use and several blocks each way."""
    T, S = (45, 55) if body == "xla" else (150, 270)
    row: dict[str, Any] = {
        "words": ("or", ("local", 40, 20), ("prefix", 9)),
        "dims": (8, 12),
        "lengths": (T, S),
        "heads": (4, 2),
        "q_offset": "array",
        "dtype": "float32",
        "segments": "foreign" if segments else None,  # and with them queries that see nothing
        "visible_to": "any" if visible_to else None,
        "bias": (20, True),
        "soft_cap": 3.0,
        "alibi": True,
        "sinks": False,
        "return_lse": True,
        "scale": None,
    }
    options, arrays, d_out, d_lse = build(row, body)
    want = reference(options, arrays, d_out, d_lse)
    mask = mask_of(options.words).opened() if visible_to else mask_of(options.words)
    problem = AttentionProblem(
        B=2, T=T, S=S, N=4, K=2, H=8, Hv=12, dtype=jnp.dtype("float32"), mask=mask, scale=8**-0.5,
        soft_cap=3.0, segments=segments, alibi=True, buckets=Buckets(n=16, max_distance=20, bidirectional=True),
        q_offset=None, visible_to=visible_to,
    )  # fmt: skip
    operands = Operands(
        arrays["q"], arrays["k"], arrays["v"], arrays.get("segment_ids"), arrays.get("kv_segment_ids"),
        arrays["q_offset"], arrays["alibi_slopes"], arrays["bias_table"], arrays.get("visible_to"),
    )  # fmt: skip
    interpret = True if body == "tpu" else None
    if passes == "forward":
        run = lambda operands: module.forward(problem, BLOCKS[body], operands, interpret=interpret)
        names, got = ("out", "lse"), jax.jit(run)(operands)
    else:
        lse = jnp.asarray(np.maximum(want["lse"], MASKED), jnp.float32)
        delta = jnp.asarray((want["out"] * np.asarray(d_out)).sum(-1).swapaxes(1, 2) - d_lse, jnp.float32)
        run = lambda *a: module.backward(problem, BLOCKS[body], *a, interpret=interpret)
        names, got = ("d_q", "d_k", "d_v", "d_bias_table"), jax.jit(run)(operands, lse, delta, d_out)
    compare(dict(zip(names, got, strict=True)), want, "float32")


@pytest.mark.parametrize("visible_to", [False, True])
@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("body", ["xla", pytest.param("tpu", marks=pytest.mark.slow)])
def test_the_body_itself_passes(body, passes, visible_to, monkeypatch):
    examine(body, load(body, None, monkeypatch), passes, not visible_to, visible_to)


@pytest.mark.parametrize(
    "body, name",
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow if case in SLOW else pytest.mark.nightly)
        for case in CASES
    ],
)
def test_a_mutation_is_noticed(body, name, monkeypatch):
    mutation = {"xla": XLA, "tpu": TPU}[body][name]
    module = load(body, mutation, monkeypatch)
    with pytest.raises(AssertionError, match=r"^(out|lse|d_\w+): "):
        examine(body, module, mutation.passes, mutation.segments, mutation.visible_to)
