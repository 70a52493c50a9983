"""What is timed: shapes with their arrays, their rivals, and the float32 reference that a result must match first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import masks
from kernels_pallas.attention.api import flash_attention
from kernels_pallas.attention.problem import AttentionBlocks
from kernels_pallas.attention.scores import Scores
from kernels_pallas.glu.api import fused_glu, fused_glu_mlp
from kernels_pallas.glu.problem import GluBlocks
from kernels_pallas.grouped.api import grouped_matmul
from kernels_pallas.grouped.problem import GroupedBlocks
from kernels_pallas.masks import Mask, count_visible
from kernels_pallas.measuring.timing import Call
from kernels_pallas.paged.api import paged_attention
from kernels_pallas.paged.problem import PagedBlocks

Arrays = tuple[jax.Array, ...]
Rival = Callable[[], Call]
"""Makes the call; raises where the rival cannot do it."""

CEILINGS = {
    "out": 1.5e-2,
    "dq": 2e-2,
    "dk": 2e-2,
    "dv": 2e-2,
    **dict.fromkeys(("h", "y", "dx", "dw", "dw_gate", "dw_up", "dw_down"), 1e-2),
}
"""Largest error of a bfloat16 result, as a part of the reference's largest magnitude: those of the tests."""

RIVALS_MAY = 2.0
"""Times as far off as we: a rival that rounds between its steps is no wrong one."""

_CHUNK = 1024  # rows of the reference that exist at a time


@dataclass(frozen=True)
class Goal:
    """Speed as a multiple of the fastest of `rivals`: enough to release, what we aim for, what would be remarkable."""

    ship: float
    aim: float
    stretch: float | None
    rivals: tuple[str, ...]

    def verdict(self, ratio: float) -> str:
        if self.stretch is not None and ratio >= self.stretch:
            return "stretch"
        return "aim" if ratio >= self.aim else "ship" if ratio >= self.ship else "below"


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """Self-attention in bfloat16 on unit normal q, k and v."""

    direction: Literal["forward", "backward"]
    B: int
    T: int
    N: int
    K: int
    H: int
    Hv: int
    mask: Mask = masks.causal
    documents: tuple[int, ...] | None = None
    """Lengths of the documents packed into each row; they sum to T."""
    soft_cap: float | None = None
    goal: Goal | None = None

    op = "flash_attention"

    @property
    def name(self) -> str:
        """Unique in the list of cases."""
        width = f"H{self.H}" if self.Hv == self.H else f"H{self.H}/{self.Hv}"
        packed = f" {len(self.documents)} documents" if self.documents else ""
        cap = f" soft cap {self.soft_cap:g}" if self.soft_cap else ""
        shape = f"{self.B}x{self.T} heads {self.N}/{self.K} {width}"
        return f"attention {self.direction} {self.mask}{packed}{cap} {shape}"

    @property
    def flops(self) -> int:
        """Over the visible scores: two products forward, five backward."""
        pairs = sum(count_visible(self.mask, n, n) for n in self.documents or (self.T,))
        widths = self.H + self.Hv if self.direction == "forward" else 3 * self.H + 2 * self.Hv
        return 2 * self.B * self.N * pairs * widths

    def arrays(self) -> Arrays:
        """q, k, v, segment ids, and the gradient of the output."""
        shapes = (self.N, self.H), (self.K, self.H), (self.K, self.Hv), (self.N, self.Hv)
        q, k, v, d_out = (_normal(i, (self.B, self.T, *shape)) for i, shape in enumerate(shapes))
        lengths = self.documents or (self.T,)
        ids = jnp.repeat(jnp.arange(len(lengths), dtype=jnp.int32), jnp.array(lengths), total_repeat_length=self.T)
        return q, k, v, jnp.broadcast_to(ids, (self.B, self.T)), d_out

    def kernel(self, arrays: Arrays, backend: str, blocks: AttentionBlocks | None = None) -> Call:
        """The call under test."""
        return self._call(self._attend(backend, blocks), arrays, self._segments(arrays))

    def trial(self, arrays: Arrays, backend: str, blocks: AttentionBlocks | None = None) -> Call:
        """Forward and backward in one call, which can be traced with shapes alone."""
        attend = self._attend(backend, blocks)

        def both(d_out: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array) -> Any:
            return jax.vjp(lambda q, k, v: attend(q, k, v, *segments), q, k, v)[1](d_out)

        return Call(both, (arrays[4], *arrays[:3], *self._segments(arrays)))

    def _segments(self, arrays: Arrays) -> Arrays:
        return () if self.documents is None else (arrays[3],)

    def _attend(self, backend: str, blocks: AttentionBlocks | None) -> Callable[..., jax.Array]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None) -> jax.Array:
            return flash_attention(
                q,
                k,
                v,
                mask=self.mask,
                segment_ids=segments,
                soft_cap=self.soft_cap,
                backend=backend,
                blocks=blocks,
            )

        return attend

    def rivals(self, arrays: Arrays) -> dict[str, Rival]:
        """cuDNN through jax.nn, and our own plain XLA."""
        return {"cudnn": lambda: self._cudnn(arrays), "xla": lambda: self.kernel(arrays, "xla")}

    def _cudnn(self, arrays: Arrays) -> Call:
        window = self.mask.as_window()
        if self.soft_cap is not None:
            raise NotImplementedError("cuDNN through jax.nn has no soft cap")
        if window is None or window[1] != 0:
            raise NotImplementedError(f"cuDNN through jax.nn has no mask {self.mask}")
        left = None if window[0] is None else (window[0], 0)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, *mask: jax.Array) -> jax.Array:
            # It wants equal widths, so values are padded with zeros: the only way to use it where they differ.
            v = jnp.pad(v, [(0, 0)] * 3 + [(0, self.H - self.Hv)])
            out = jax.nn.dot_product_attention(
                q, k, v, mask=mask[0] if mask else None, is_causal=True, local_window_size=left, implementation="cudnn"
            )
            return out[..., : self.Hv]

        ids = arrays[3]
        # Only as a boolean T x S array; making it is not timed.
        return self._call(attend, arrays, (ids[:, None, :, None] == ids[:, None, None, :],) if self.documents else ())

    def _call(self, attend: Callable[..., jax.Array], arrays: Arrays, constants: Arrays) -> Call:
        q, k, v, _, d_out = arrays
        if self.direction == "forward":
            return Call(attend, (q, k, v, *constants))
        _, pull_back = jax.jit(lambda q, k, v, *constants: jax.vjp(lambda *qkv: attend(*qkv, *constants), q, k, v))(
            q, k, v, *constants
        )
        return Call(lambda pull_back, d_out: pull_back(d_out), (pull_back, d_out))

    def reference(self, arrays: Arrays) -> dict[str, jax.Array]:
        """The formula in float32, where no more than a chunk of queries by all keys of one key head exists."""
        q, k, v, ids, d_out = arrays
        C, G = min(self.T, _CHUNK), self.N // self.K

        def one_head(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
            @jax.checkpoint
            def rows(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
                q, positions, own = chunk
                scores = jnp.einsum("tgh,sh->gts", q, k) * self.H**-0.5
                if self.soft_cap is not None:
                    scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
                seen = self.mask.visible(positions[:, None], jnp.arange(self.T)[None, :]) & (own[:, None] == ids)
                return jnp.einsum("gts,sh->tgh", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)

            chunks = q.reshape(-1, C, G, self.H), jnp.arange(self.T).reshape(-1, C), ids.reshape(-1, C)
            return lax.map(rows, chunks).reshape(self.T, G, self.Hv)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            heads = q.reshape(self.B, self.T, self.K, G, self.H).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)
            out = lax.map(
                lambda row: lax.map(lambda qkv: one_head(qkv[0], qkv[1], qkv[2], row[1]), row[0]), (heads, ids)
            )
            return out.swapaxes(1, 2).reshape(self.B, self.T, self.N, self.Hv)

        q, k, v, d_out = (x.astype(jnp.float32) for x in (q, k, v, d_out))
        with jax.default_matmul_precision("highest"):
            if self.direction == "forward":
                return {"out": jax.jit(attend)(q, k, v)}
            gradients = jax.jit(lambda q, k, v, d_out: jax.vjp(attend, q, k, v)[1](d_out))(q, k, v, d_out)
        return dict(zip(("dq", "dk", "dv"), gradients, strict=True))


@dataclass(frozen=True, kw_only=True)
class GluCase:
    """SwiGLU in bfloat16, alone or with the down projection; "forward and backward" computes again what it needs."""

    direction: Literal["forward", "forward and backward"]
    op: Literal["fused_glu", "fused_glu_mlp"]
    M: int
    D: int
    F: int
    goal: Goal | None = None

    @property
    def name(self) -> str:
        """Unique in the list of cases."""
        return f"{'glu' if self.op == 'fused_glu' else 'glu mlp'} {self.direction} {self.M}x{self.D}x{self.F}"

    @property
    def flops(self) -> int:
        """Two products, three with the down projection, and twice that backward. Recomputation does not count."""
        products = (2 if self.op == "fused_glu" else 3) * (1 if self.direction == "forward" else 3)
        return products * 2 * self.M * self.D * self.F

    def arrays(self) -> Arrays:
        """x [M, D], the weights, scaled so that what they make is about unit normal too, and the result's gradient."""
        x = _normal(0, (self.M, self.D))
        gate, up = (_normal(i, (self.D, self.F), self.D**-0.5) for i in (1, 2))
        if self.op == "fused_glu":
            return x, gate, up, _normal(3, (self.M, self.F))
        return x, gate, up, _normal(3, (self.F, self.D), self.F**-0.5), _normal(4, (self.M, self.D))

    def kernel(self, arrays: Arrays, backend: str, blocks: GluBlocks | None = None) -> Call:
        """The call under test."""
        function = fused_glu if self.op == "fused_glu" else fused_glu_mlp
        return self._call(functools.partial(function, backend=backend, blocks=blocks), arrays)

    def trial(self, arrays: Arrays, backend: str, blocks: GluBlocks | None = None) -> Call:
        """Forward and backward in one call, which can be traced with shapes alone."""
        return replace(self, direction="forward and backward").kernel(arrays, backend, blocks)

    def rivals(self, arrays: Arrays) -> dict[str, Rival]:
        """XLA as one writes it, and as one product with [w_gate w_up], which are put together beforehand."""
        x, gate, up, *rest = arrays
        both = jnp.concatenate([gate, up], axis=1)
        checkpoint = (lambda f: f) if self.direction == "forward" else jax.checkpoint

        def concatenated() -> Call:
            call = self._call(checkpoint(self._with_down(_glu_concatenated)), (x, both, *rest))
            if self.direction == "forward":
                return call

            def with_two_gradients(*operands: jax.Array) -> Arrays:
                result, dx, d_both, *others = call.function(*operands)
                return result, dx, d_both[:, : self.F], d_both[:, self.F :], *others

            return Call(with_two_gradients, call.operands)

        return {
            "xla": lambda: self._call(checkpoint(self._with_down(_glu)), arrays),
            "xla concatenated": concatenated,
        }

    def _with_down(self, glu: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        if self.op == "fused_glu":
            return glu
        return lambda *operands: glu(*operands[:-1]) @ operands[-1]

    def _call(self, function: Callable[..., jax.Array], arrays: Arrays) -> Call:
        if self.direction == "forward":
            return Call(function, arrays[:-1])

        def both(*operands: jax.Array) -> Arrays:
            result, pull_back = jax.vjp(function, *operands[:-1])
            return result, *pull_back(operands[-1])

        return Call(both, arrays)

    def reference(self, arrays: Arrays) -> dict[str, jax.Array]:
        """The formula in float32, a chunk of rows at a time."""
        formula = self._with_down(_glu)

        def in_chunks(x: jax.Array, *weights: jax.Array) -> jax.Array:
            rows = jax.checkpoint(lambda rows: formula(rows, *weights))
            return lax.map(rows, x.reshape(-1, min(self.M, _CHUNK), self.D)).reshape(self.M, -1)

        names = ("h" if self.op == "fused_glu" else "y", "dx", "dw_gate", "dw_up", "dw_down")
        call = self._call(in_chunks, tuple(a.astype(jnp.float32) for a in arrays))
        with jax.default_matmul_precision("highest"):
            results = jax.jit(call.function)(*call.operands)
        return dict(zip(names, (results,) if self.direction == "forward" else results, strict=False))


@dataclass(frozen=True, kw_only=True)
class GroupedCase:
    """Rows times the matrix of their group in bfloat16; the groups are as uneven as a new router's."""

    direction: Literal["forward", "forward and backward"]
    M: int
    D: int
    F: int
    E: int
    goal: Goal | None = None

    op = "grouped_matmul"

    @property
    def name(self) -> str:
        """Unique in the list of cases."""
        return f"grouped {self.direction} {self.M}x{self.D}x{self.F} {self.E} groups"

    @property
    def flops(self) -> int:
        """Of the rows there are: one product, and two backward."""
        return (1 if self.direction == "forward" else 3) * 2 * self.M * self.D * self.F

    def arrays(self) -> Arrays:
        """x [M, D], w [E, D, F], the sizes of the groups, which sum to M, and the result's gradient."""
        popularity = jax.random.normal(jax.random.key(2), (self.E,)) / 2
        sizes = jnp.bincount(jax.random.categorical(jax.random.key(3), popularity, shape=(self.M,)), length=self.E)
        w = _normal(1, (self.E, self.D, self.F), self.D**-0.5)
        return _normal(0, (self.M, self.D)), w, sizes, _normal(4, (self.M, self.F))

    def kernel(self, arrays: Arrays, backend: str, blocks: GroupedBlocks | None = None) -> Call:
        """The call under test."""
        return self._call(functools.partial(grouped_matmul, backend=backend, blocks=blocks), arrays)

    def rivals(self, arrays: Arrays) -> dict[str, Rival]:
        """XLA's own."""
        return {"ragged_dot": lambda: self._call(lax.ragged_dot, arrays)}

    def _call(self, function: Callable[..., jax.Array], arrays: Arrays) -> Call:
        if self.direction == "forward":
            return Call(function, arrays[:-1])

        def both(x: jax.Array, w: jax.Array, sizes: jax.Array, dy: jax.Array) -> Arrays:
            y, pull_back = jax.vjp(lambda x, w: function(x, w, sizes), x, w)
            return y, *pull_back(dy)

        return Call(both, arrays)

    def reference(self, arrays: Arrays) -> dict[str, jax.Array]:
        """In float32, one group after the other: all rows, of which those of the group count."""

        def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
            group = jnp.repeat(jnp.arange(self.E), sizes, total_repeat_length=self.M)

            @jax.checkpoint
            def add(y: jax.Array, of_group: Arrays) -> tuple[jax.Array, None]:
                e, w = of_group
                return y + jnp.where((group == e)[:, None], x, 0) @ w, None

            return lax.scan(add, jnp.zeros((self.M, self.F)), (jnp.arange(self.E), w))[0]

        x, w, sizes, dy = arrays
        call = self._call(product, (*(a.astype(jnp.float32) for a in (x, w)), sizes, dy.astype(jnp.float32)))
        with jax.default_matmul_precision("highest"):
            results = jax.jit(call.function)(*call.operands)
        return dict(zip(("y", "dx", "dw"), (results,) if self.direction == "forward" else results, strict=False))


@dataclass(frozen=True, kw_only=True)
class PagedCase:
    """One token of each of T texts in bfloat16, whose lengths go evenly up to `longest`, in a layer of a cache."""

    T: int
    longest: int
    N: int
    K: int
    H: int
    C: int = 16
    mask: Mask = masks.causal
    goal: Goal | None = None

    op = "paged_attention"
    direction = "forward"

    @property
    def name(self) -> str:
        """Unique in the list of cases."""
        return f"paged {self.mask} {self.T} texts to {self.longest} heads {self.N}/{self.K} H{self.H}"

    @property
    def flops(self) -> int:
        """Over the visible scores."""
        ends = [self.longest * (t + 1) // self.T for t in range(self.T)]
        return 2 * self.N * sum(count_visible(self.mask, 1, end, end - 1) for end in ends) * 2 * self.H

    def arrays(self) -> Arrays:
        """q, k, v, the layer, tables of blocks in no order, slots, positions."""
        M = -(-self.longest // self.C)
        cache = 2, self.T * M + 1, self.K, self.C, self.H
        tables = 1 + jax.random.permutation(jax.random.key(3), self.T * M).reshape(self.T, M).astype(jnp.int32)
        slots = jnp.arange(self.T, dtype=jnp.int32)
        positions = self.longest * (slots + 1) // self.T - 1
        q, k, v = _normal(0, (self.T, self.N, self.H)), _normal(1, cache), _normal(2, cache)
        return q, k, v, jnp.int32(1), tables, slots, positions

    def kernel(self, arrays: Arrays, backend: str, blocks: PagedBlocks | None = None) -> Call:
        """The call under test."""
        attend = functools.partial(paged_attention, scores=Scores(mask=self.mask), backend=backend, blocks=blocks)
        return Call(attend, arrays)

    def rivals(self, arrays: Arrays) -> dict[str, Rival]:
        """XLA's loop, and attention to a copy of all texts at full length."""
        return {"xla": lambda: self.kernel(arrays, "xla"), "gathered": lambda: Call(self._gathered, arrays)}

    def _gathered(self, q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, *texts: jax.Array) -> jax.Array:
        tables, slots, positions = texts
        of_text = lambda cache: cache[layer, tables[slots]].swapaxes(1, 2).reshape(self.T, self.K, -1, self.H)
        rows = q.reshape(self.T, self.K, -1, self.H)
        scores = jnp.einsum("tkgh,tksh->tkgs", rows, of_text(k), preferred_element_type=jnp.float32) * self.H**-0.5
        seen = self.mask.visible(positions[:, None], jnp.arange(scores.shape[-1]))
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf)).astype(q.dtype)
        return jnp.einsum("tkgs,tksh->tkgh", weights, of_text(v)).reshape(q.shape)

    def reference(self, arrays: Arrays) -> dict[str, jax.Array]:
        """In float32, one text after the other."""
        q, k, v, layer, tables, slots, positions = arrays
        alone = replace(self, T=1)

        def text(row: Arrays) -> jax.Array:
            query, slot, position = (x[None] for x in row)
            return alone._gathered(query, *(x.astype(jnp.float32) for x in (k, v)), layer, tables, slot, position)[0]

        with jax.default_matmul_precision("highest"):
            return {"out": jax.jit(lambda *rows: lax.map(text, rows))(q.astype(jnp.float32), slots, positions)}


Case = AttentionCase | GluCase | GroupedCase | PagedCase


def _normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _glu(x: jax.Array, gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(x @ gate) * (x @ up)


def _glu_concatenated(x: jax.Array, both: jax.Array) -> jax.Array:
    a, g = jnp.split(x @ both, 2, axis=1)
    return jax.nn.silu(a) * g
