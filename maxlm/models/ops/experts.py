"""Experts on the mesh: each choice of a token travels to the device that has its expert, and its result travels back.

A *choice* is one (token, expert) pair; a device with n tokens has n k of them. A *slot* is a row of the buffer that the
experts read. A dispatch decides which choice stands in which slot, and which finds none and is dropped. Everything then
is gathers by the two tables of `_Slots`, forwards and backwards: no scatter-add, so the sums have one order. Where
experts choose (`picked_experts`) a token has any number of choices, and a scatter-add sums them, in float32.

All of it is local to a device but the all-to-all over the expert axis, which has a part of the tokens as well as a part
of the experts, and the gathering of weights over fsdp. Experts' d_ff is cut over tensor, so a device has only its part
of every sum over d_ff; the parts leave `shard_map` side by side and are added by the compiler. That way no replicated
result leaves it, and its transpose needs no sums but the necessary ones, although `check_vma` (which kernels cannot
have) is off.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import grouped_matmul, mixed_einsum
from kernels_pallas.glu.activations import activate
from maxlm.config import Dropless, Nonlinearity
from maxlm.models.ops.dense import formula
from maxlm.models.ops.narrow_groups import narrow_grouped
from maxlm.models.weights.narrow import Narrow, narrow_einsum
from maxlm.sharding import Layout

EXPERT_IN_DIMS = ("experts", "embed", "mlp")
EXPERT_OUT_DIMS = ("experts", "mlp", "embed")
EXPERT_IN_BIAS_DIMS = ("experts", "mlp")
EXPERT_OUT_BIAS_DIMS = ("experts", "vector")


class ExpertWeights(NamedTuple):
    """Parameters of gated MLPs: matrices as `of_experts` gives them, biases in float32."""

    gate_proj: jax.Array | Narrow
    """[E, D, F], dims EXPERT_IN_DIMS, as up_proj."""
    up_proj: jax.Array | Narrow
    down_proj: jax.Array | Narrow
    """[E, F, D], dims EXPERT_OUT_DIMS."""
    gate_bias: jax.Array | None = None
    """[E, F], dims EXPERT_IN_BIAS_DIMS, as up_bias; all three or none."""
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None
    """[E, D], dims EXPERT_OUT_BIAS_DIMS."""
    swish_beta: jax.Array | None = None
    """[1]: of all experts, where the activation learns it."""


class GatedUnit(NamedTuple):
    """activation(min(gate, clamp)) * (min(max(up, -clamp), clamp) + up_offset), elementwise."""

    activation: Nonlinearity
    clamp: float | None = None
    """None: neither is cut off."""
    up_offset: float = 0.0

    def __call__(self, gate: jax.Array, up: jax.Array, swish_beta: jax.Array | None) -> jax.Array:
        """In float32; of one shape and dtype, which the result has."""
        wide_gate, wide_up = gate.astype(jnp.float32), up.astype(jnp.float32)
        if self.clamp is not None:
            wide_gate, wide_up = jnp.minimum(wide_gate, self.clamp), jnp.clip(wide_up, -self.clamp, self.clamp)
        if self.up_offset:
            wide_up += self.up_offset
        act, beta = formula(self.activation, swish_beta)
        return (activate(act, wide_gate, beta) * wide_up).astype(gate.dtype)


class _Slots(NamedTuple):
    """Where choices stand. Choice t k + j is the j-th of token t."""

    of_choice: jax.Array
    """int32 [n k]: the slot of each choice; the number of slots if it has none."""
    choice_in: jax.Array
    """int32 [M]: the choice in each slot; n k if it is empty."""


def top_k(layout: Layout, by: jax.Array, values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Where `by` is largest along its last dim: the values there, [..., k], and the places, int32, largest first.

    by and values are [B, T, ...], cut over rows and along the sequence. The compiler by itself would gather all of them
    on every device before it chooses. The gradient is that of the values alone.
    """
    spec = layout.activation("batch", "seq", *[None] * (by.ndim - 2))

    @functools.partial(layout.shard_map, in_specs=(spec, spec), out_specs=(spec, spec))
    def local(by: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, places = jax.lax.top_k(jax.lax.stop_gradient(by), k)
        return jnp.take_along_axis(values, places, -1), places

    return local(by, values)


def dropless_experts(
    layout: Layout,
    x: jax.Array,
    choices: jax.Array,
    gates: jax.Array,
    experts: ExpertWeights,
    *,
    unit: GatedUnit,
    config: Dropless,
) -> tuple[jax.Array, jax.Array]:
    """The sum of each token's chosen experts, each times its gate (MegaBlocks, arXiv:2211.15841).

    A device sorts its choices by expert. With one device on the expert axis that is the order in which grouped products
    take them, and nothing is ever dropped. With more, each device sends every other the choices of its experts, in a
    buffer of fixed size, and sorts what it receives by expert again.

    Args:
        layout: the mesh.
        x: [B, T, D].
        choices: int32 [B, T, k], the experts of each token, all different.
        gates: float32 [B, T, k], their weights.
        experts: all experts' weights.
        unit: of gate and up.
        config: rows that a device can receive, as a multiple of n k, its even share, or whatever comes. Of what a
            device has for another, the experts of higher number are dropped first.

    Returns:
        [B, T, D] in x's dtype, and bool [B, T, k]: which choices were computed.
    """
    E, X = experts.gate_proj.shape[0], layout.mesh.shape["expert"]

    def dispatch(x: jax.Array, choices: jax.Array, experts: ExpertWeights) -> tuple[jax.Array, _Slots]:
        n, k = choices.shape
        room = math.ceil(config.room(n * k, top_k=k, n_experts=E, devices=X))
        slots, counts = _assign(choices[None], E, experts_in_window=E // X, room=room if X > 1 else n * k)
        rows = _move(k, x, slots.choice_in, slots.of_choice)
        if X == 1:
            return _grouped_mlp(rows, experts, counts[0], unit), slots
        counts = counts.reshape(X, E // X)
        sent = jnp.clip(room - (jnp.cumsum(counts, 1) - counts), 0, counts)
        received = _exchange(sent, 0, 0)  # [X, E / X]: rows from each device for each expert here
        # What a device sent lies sorted by expert at the front of its part; empty slots belong behind all groups.
        expert = (jnp.arange(room)[:, None] >= jnp.cumsum(received, 1)[:, None]).sum(-1).reshape(-1)
        order = jnp.argsort(expert, stable=True)
        inverse = jnp.argsort(order)
        rows = _move(1, _exchange(rows, 0, 0), order, inverse)
        rows = _grouped_mlp(rows, experts, received.sum(0), unit)
        return _exchange(_move(1, rows, inverse, order), 0, 0), slots

    return _routed(layout, dispatch, x, choices, gates, experts)


def capacity_experts(
    layout: Layout,
    x: jax.Array,
    choices: jax.Array,
    gates: jax.Array,
    experts: ExpertWeights,
    *,
    unit: GatedUnit,
    group: int,
    room: int,
) -> tuple[jax.Array, jax.Array]:
    """As `dropless_experts`, but an expert takes at most `room` tokens of each `group` consecutive ones.

    First choices come before second choices, and earlier tokens before later ones (GShard, arXiv:2006.16668, algorithm
    1). `group` divides the tokens of a sequence that a device has.
    """
    E, X = experts.gate_proj.shape[0], layout.mesh.shape["expert"]

    def dispatch(x: jax.Array, choices: jax.Array, experts: ExpertWeights) -> tuple[jax.Array, _Slots]:
        k = choices.shape[-1]
        slots, _ = _assign(choices.reshape(-1, group, k), E, experts_in_window=1, room=room)
        rows = _move(k, x, slots.choice_in, slots.of_choice).reshape(E, -1, x.shape[-1])
        return _batched_mlp(rows, experts, unit, X).reshape(-1, x.shape[-1]), slots

    return _routed(layout, dispatch, x, choices, gates, experts)


def picked_experts(
    layout: Layout, x: jax.Array, picks: jax.Array, gates: jax.Array, experts: ExpertWeights, *, unit: GatedUnit
) -> jax.Array:
    """The sum over the experts that picked a token, each times its gate (expert choice, arXiv:2202.09368).

    Args:
        layout: the mesh.
        x: [B, T, D].
        picks: int32 [B, G, E, C], the tokens that each expert picked of each of a sequence's G groups: their places in
            the group.
        gates: float32 [B, G, E, C], their weights.
        experts: all experts' weights.
        unit: of gate and up.

    Returns:
        [B, T, D] in x's dtype.
    """
    E, X, group = experts.gate_proj.shape[0], layout.mesh.shape["expert"], x.shape[1] // picks.shape[1]

    def local(x: jax.Array, picks: jax.Array, gates: jax.Array, experts: ExpertWeights) -> jax.Array:
        D, groups = x.shape[-1], picks.shape[0] * picks.shape[1]
        by_expert = lambda table: table.reshape(groups, E, -1).swapaxes(0, 1).reshape(E, -1)
        first = group * jnp.arange(groups)[:, None, None]
        tokens, gates = by_expert(picks.reshape(groups, E, -1) + first), by_expert(gates)
        flat = x.reshape(-1, D)
        # float32: the gradient adds up what all experts that picked a token say.
        rows = flat.astype(jnp.float32)[tokens].astype(x.dtype)
        out = _batched_mlp(rows, _whole(layout, experts), unit, X)
        y = jnp.zeros(flat.shape, jnp.float32).at[tokens].add(out.astype(jnp.float32) * gates[..., None])
        return y.astype(x.dtype).reshape(1, *x.shape)

    spec = layout.activation("batch", "seq", None, None)
    parts = layout.shard_map(
        local,
        in_specs=(layout.activation("batch", "seq", None), spec, spec, _weight_specs(layout)),
        out_specs=layout.activation("mlp", "batch", "seq", None),
        check_vma=False,
    )(x, picks, gates, experts)
    return _sum_of_parts(parts)


def _routed(
    layout: Layout,
    dispatch: Callable[[jax.Array, jax.Array, ExpertWeights], tuple[jax.Array, _Slots]],
    x: jax.Array,
    choices: jax.Array,
    gates: jax.Array,
    experts: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    """On each device: `dispatch` its tokens [n, D] with choices [n, k] to slots [M, D], then sum what comes back."""

    def local(
        x: jax.Array, choices: jax.Array, gates: jax.Array, experts: ExpertWeights
    ) -> tuple[jax.Array, jax.Array]:
        (*_, D), k = x.shape, choices.shape[-1]
        out, slots = dispatch(x.reshape(-1, D), choices.reshape(-1, k), _whole(layout, experts))
        back = _move(1, out, slots.of_choice, slots.choice_in).reshape(*choices.shape, D)
        y = (back.astype(jnp.float32) * gates[..., None]).sum(-2).astype(x.dtype)
        return y[None], (slots.of_choice < out.shape[0]).reshape(choices.shape)

    tokens = layout.activation("batch", "seq", None)
    parts, computed = layout.shard_map(
        local,
        in_specs=(tokens, tokens, tokens, _weight_specs(layout)),
        out_specs=(layout.activation("mlp", "batch", "seq", None), tokens),
        check_vma=False,
    )(x, choices, gates, experts)
    return _sum_of_parts(parts), computed


def _sum_of_parts(parts: jax.Array) -> jax.Array:
    """[tensor, B, T, D] -> [B, T, D]; the compiler's sum over devices, in the format of the parts."""
    return jax.lax.reduce(parts, np.zeros((), parts.dtype), jax.lax.add, (0,))


def _assign(choices: jax.Array, E: int, *, experts_in_window: int, room: int) -> tuple[_Slots, jax.Array]:
    """Slots for the choices [G, g, k] of groups of tokens, and how often each expert was chosen, int32 [G, E].

    Slots lie as [E / experts_in_window, G, room]. The choices of one window's experts in one group get its first slots,
    sorted by expert, then by rank among a token's choices, then by token; those beyond `room` get none.
    """
    G, g, k = choices.shape
    W, size = E // experts_in_window, g * k
    by_rank = choices.swapaxes(1, 2).reshape(G, size)
    order = jnp.argsort(by_rank, axis=1, stable=True)
    counts = jax.nn.one_hot(by_rank, E, dtype=jnp.int32).sum(1)
    in_window = counts.reshape(G, W, experts_in_window).sum(-1)
    start = jnp.cumsum(in_window, 1) - in_window

    window = by_rank // experts_in_window
    place = jnp.argsort(order, axis=1) - jnp.take_along_axis(start, window, 1)
    slot = jnp.where(place < room, (window * G + jnp.arange(G)[:, None]) * room + place, W * G * room)
    of_choice = slot.reshape(G, k, g).swapaxes(1, 2).reshape(-1)

    places = jnp.arange(room)
    wanted = jnp.minimum(start[..., None] + places, size - 1).reshape(G, -1)
    found = jnp.take_along_axis(order, wanted, 1)
    choice = jnp.arange(G)[:, None] * size + found % g * k + found // g
    filled = places < in_window[..., None]
    choice_in = jnp.where(filled, choice.reshape(G, W, room), G * size).swapaxes(0, 1).reshape(-1)
    return _Slots(of_choice, choice_in), counts


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _move(copies: int, rows: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Row i of the result is copy source[i] of the copies c of rows [c // copies], or 0 where there is no such copy.

    target is the other direction: where each copy went, out of range if nowhere. The gradient is a gather by it.
    """
    return jnp.take(rows, source // copies, axis=0, mode="fill", fill_value=0)


def _move_fwd(copies: int, rows: jax.Array, source: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _move(copies, rows, source, target), target


def _move_bwd(copies: int, target: jax.Array, d: jax.Array) -> tuple[jax.Array, None, None]:
    d_copies = jnp.take(d, target, axis=0, mode="fill", fill_value=0)
    return d_copies.reshape(-1, copies, d.shape[-1]).sum(1), None, None


_move.defvjp(_move_fwd, _move_bwd)


def _grouped_mlp(rows: jax.Array, experts: ExpertWeights, sizes: jax.Array, unit: GatedUnit) -> jax.Array:
    """Rows [M, D] sorted by expert, sizes int32 [E] -> [M, D]: this device's part of the sum over d_ff."""
    ends = jnp.cumsum(sizes)
    place = jnp.arange(rows.shape[0])[:, None]
    own = (place >= ends - sizes) & (place < ends)  # bool [M, E]: the expert of each row

    def product(x: jax.Array, w: jax.Array | Narrow, bias: jax.Array | None) -> jax.Array:
        y = narrow_grouped(w.products, x, w.values, sizes) if isinstance(w, Narrow) else grouped_matmul(x, w, sizes)
        return y if bias is None else y + _of_group(bias, own).astype(y.dtype)

    gate, up = product(rows, experts.gate_proj, experts.gate_bias), product(rows, experts.up_proj, experts.up_bias)
    return product(unit(gate, up, experts.swish_beta), experts.down_proj, _of_one_part(experts.down_bias))


@jax.custom_vjp
def _of_group(values: jax.Array, own: jax.Array) -> jax.Array:
    """For each row the values [E, F] of its group, own bool [M, E]; a row of none has any. The gradient is a product,
    which sums the rows of a group in one order, as a scatter-add would not."""
    return values[own.argmax(1)]


def _of_group_fwd(values: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
    return values[own.argmax(1)], own


def _of_group_bwd(own: jax.Array, d: jax.Array) -> tuple[jax.Array, None]:
    return jnp.einsum("me,mf->ef", own.astype(d.dtype), d), None


_of_group.defvjp(_of_group_fwd, _of_group_bwd)


def _batched_mlp(rows: jax.Array, experts: ExpertWeights, unit: GatedUnit, X: int) -> jax.Array:
    """Slots [E, c, D] of this device's tokens for all experts -> [E, c, D], by way of the experts' devices."""
    if X > 1:
        rows = _exchange(rows, 0, 1)  # [E / X, X c, D]: everybody's tokens for the experts here

    def product(x: jax.Array, w: jax.Array | Narrow, bias: jax.Array | None) -> jax.Array:
        if isinstance(w, Narrow):
            y = jax.vmap(functools.partial(narrow_einsum, w.products, "cd,df->cf"))(x, w.values)
        else:
            y = mixed_einsum("ecd,edf->ecf", x, w)
        # The name of grouped_matmul's results: remat policies need not know how tokens come to experts.
        y = checkpoint_name(y, "grouped_out")
        return y if bias is None else y + bias[:, None].astype(y.dtype)

    gate, up = product(rows, experts.gate_proj, experts.gate_bias), product(rows, experts.up_proj, experts.up_bias)
    out = product(unit(gate, up, experts.swish_beta), experts.down_proj, _of_one_part(experts.down_bias))
    return _exchange(out, 1, 0) if X > 1 else out


def _of_one_part(bias: jax.Array | None) -> jax.Array | None:
    """What is added to a device's part of a sum over d_ff: to the first part the bias, to the others 0."""
    return None if bias is None else jnp.where(jax.lax.axis_index("tensor") == 0, bias, 0)


def _exchange(x: jax.Array, split: int, concat: int) -> jax.Array:
    """Part i of dim `split` goes to device i of the expert axis; what comes is joined along dim `concat`."""
    return jax.lax.all_to_all(x, "expert", split, concat, tiled=True)


def _weight_specs(layout: Layout) -> ExpertWeights:
    """The spec of each, also of those that are not there."""
    matrices = EXPERT_IN_DIMS, EXPERT_IN_DIMS, EXPERT_OUT_DIMS
    biases = EXPERT_IN_BIAS_DIMS, EXPERT_IN_BIAS_DIMS, EXPERT_OUT_BIAS_DIMS
    specs: list[Any] = [layout.parameter(dims) for dims in (*matrices, *biases, ("vector",))]
    return ExpertWeights(*specs)


def _whole(layout: Layout, experts: ExpertWeights) -> ExpertWeights:
    """The weights with their embed dim gathered. The transpose leaves each device the sum of its shard's gradient."""

    def gather(w: jax.Array | Narrow, dims: tuple[str, ...]) -> jax.Array | Narrow:
        dim = dims.index("embed")
        cut = layout.parameter(dims)[dim]
        if cut is None or layout.mesh.shape[cut] == 1:
            return w
        return jax.tree.map(lambda w: jax.lax.all_gather(w, cut, axis=dim, tiled=True), w)

    return experts._replace(
        gate_proj=gather(experts.gate_proj, EXPERT_IN_DIMS),
        up_proj=gather(experts.up_proj, EXPERT_IN_DIMS),
        down_proj=gather(experts.down_proj, EXPERT_OUT_DIMS),
    )
