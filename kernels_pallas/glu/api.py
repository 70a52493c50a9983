"""The public operations: checks, the choice of a body, and the gradients' frame that all bodies share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import dispatch
from kernels_pallas.decision import Plan
from kernels_pallas.glu import xla
from kernels_pallas.glu.activations import ACTIVATIONS
from kernels_pallas.glu.problem import GluBlocks, GluProblem, Save
from kernels_pallas.targets import current_target

Shaped = jax.Array | jax.ShapeDtypeStruct
"""What has a shape and a dtype."""


def fused_glu(
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    *,
    b_gate: jax.Array | None = None,
    b_up: jax.Array | None = None,
    act: str = "silu",
    beta: float = 1.0,
    save: Save = "none",
    backend: str = "auto",
    blocks: GluBlocks | None = None,
    interpret: Any = None,
) -> jax.Array:
    """act(x @ w_gate + b_gate) * (x @ w_up + b_up) (Shazeer 2020, arXiv:2002.05202).

    The products run in x's dtype; gradients of weights and biases are formed and returned in their own dtype. The
    values that a backward pass may want are named for remat policies (`jax.ad_checkpoint.checkpoint_name`): with
    save="ag" "glu_gate" and "glu_up" (the two products with their biases), and always the result, "glu_out".

    Under `jax.checkpoint` use save="ag": what the checkpoint computes again then serves the backward pass, which would
    with "none" compute it once more.

    Args:
        x: [..., D] float32, bfloat16 or float16 (float64 with XLA).
        w_gate, w_up: [D, F], of any floating dtype.
        b_gate, b_up: [F], both or neither.
        act: one of "silu", "swish", "gelu" (exact), "gelu_tanh", "relu", "relu2", "sigmoid", "identity".
        beta: of act = "swish", a sigmoid(beta a); the others have none.
        save: beside x and the weights, "ag" keeps both products for the backward pass, 2 * M * F elements for the M
            rows of x; "none" keeps nothing and computes them again, one more forward pass of FLOPs.
        backend: "xla", "tpu" or "gpu" (Hopper); "auto" follows the table recorded for the chip. The compiler cannot
            split the kernels of "tpu" and "gpu" over devices: call them inside `jax.shard_map(..., check_vma=False)`.
        blocks: tile sizes of the kernel; None: from the tuning table.
        interpret: run the "tpu" or "gpu" kernel in Pallas' interpreter: True, or its parameters object.

    Returns:
        [..., F] in x's dtype.

    Raises:
        ValueError: arguments do not fit each other, or the named backend cannot do this.
    """
    problem = _problem(x, w_gate, w_up, None, b_gate, b_up, act, beta, save)
    plan = dispatch.decide("fused_glu", problem, backend=backend, blocks=blocks, interpret=interpret)
    h = _glu(_Call.of(plan, interpret), _rows(plan, x), _Gates(w_gate, w_up, b_gate, b_up))
    return h.reshape(*x.shape[:-1], h.shape[-1])


def fused_glu_mlp(
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    b_gate: jax.Array | None = None,
    b_up: jax.Array | None = None,
    act: str = "silu",
    beta: float = 1.0,
    save: Save = "none",
    backend: str = "auto",
    blocks: GluBlocks | None = None,
    interpret: Any = None,
) -> jax.Array:
    """fused_glu(x, w_gate, w_up) @ w_down, which knows more in the backward pass than the two by themselves.

    As the gradient of the hidden values, dy @ w_down^T, is a sum over the model's width like the two products of the
    gate, the kernels compute all three in one loop (save="none"), and neither it nor they reach memory. The hidden
    values are not kept for the gradient of w_down: they are computed again, from the products or with them.

    Args:
        w_down: [F, Dout]. The other arguments and the names of values are those of `fused_glu`.

    Returns:
        [..., Dout] in x's dtype.

    Raises:
        ValueError: as `fused_glu`; and with save="none" the kernels need Dout = D.
    """
    problem = _problem(x, w_gate, w_up, w_down, b_gate, b_up, act, beta, save)
    plan = dispatch.decide("fused_glu_mlp", problem, backend=backend, blocks=blocks, interpret=interpret)
    y = _glu_mlp(_Call.of(plan, interpret), _rows(plan, x), _Gates(w_gate, w_up, b_gate, b_up), w_down)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def plan_glu(
    x: Shaped,
    w_gate: Shaped,
    w_up: Shaped,
    *,
    b_gate: Shaped | None = None,
    b_up: Shaped | None = None,
    act: str = "silu",
    beta: float = 1.0,
    save: Save = "none",
    backend: str = "auto",
    blocks: GluBlocks | None = None,
    interpret: Any = None,
    device: jax.Device | None = None,
) -> Plan:
    """How `fused_glu` would run with these arguments, from shapes and dtypes alone.

    Args:
        device: the chip that it is for, if not the one that is traced for.

    Raises:
        ValueError: as `fused_glu`.
    """
    problem = _problem(x, w_gate, w_up, None, b_gate, b_up, act, beta, save)
    target = current_target(device)
    return dispatch.choose("fused_glu", problem, target, backend=backend, blocks=blocks, interpret=interpret)


def _problem(
    x: Shaped,
    w_gate: Shaped,
    w_up: Shaped,
    w_down: Shaped | None,
    b_gate: Shaped | None,
    b_up: Shaped | None,
    act: str,
    beta: float,
    save: Save,
) -> GluProblem:
    if act not in ACTIVATIONS:
        raise ValueError(f"act = {act!r} is unknown; use one of {sorted(ACTIVATIONS)}")
    if act != "swish" and beta != 1:
        raise ValueError(f"beta = {beta} is the number of act = 'swish', but act = {act!r}; leave it out")
    if save not in ("ag", "none"):
        raise ValueError(f"save = {save!r} is unknown; use 'ag' to keep both products or 'none' to compute them again")
    if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x {x.dtype}{list(x.shape)} must be floating point [..., D]; cast or reshape it")
    for name, w in (("w_gate", w_gate), ("w_up", w_up), ("w_down", w_down), ("b_gate", b_gate), ("b_up", b_up)):
        if w is not None and not jnp.issubdtype(w.dtype, jnp.floating):
            raise ValueError(f"{name} is {w.dtype}; it must be floating point")
    D = x.shape[-1]
    if w_gate.ndim != 2 or w_gate.shape[0] != D:
        raise ValueError(f"w_gate {list(w_gate.shape)} must be [{D}, F], as x is {list(x.shape)}; is it transposed?")
    F = w_gate.shape[1]
    if w_up.shape != (D, F):
        raise ValueError(f"w_up {list(w_up.shape)} must be [{D}, {F}], the shape of w_gate")
    if (b_gate is None) != (b_up is None):
        lone, missing = ("b_gate", "b_up") if b_up is None else ("b_up", "b_gate")
        raise ValueError(f"{lone} is given without {missing}; give both or neither (zeros for one that is not there)")
    for name, bias in (("b_gate", b_gate), ("b_up", b_up)):
        if bias is not None and bias.shape != (F,):
            raise ValueError(f"{name} {list(bias.shape)} must be [{F}], the columns of w_gate")
    if w_down is not None and (w_down.ndim != 2 or w_down.shape[0] != F):
        raise ValueError(f"w_down {list(w_down.shape)} must be [{F}, Dout], as w_gate is {list(w_gate.shape)}")
    return GluProblem(
        M=math.prod(x.shape[:-1]),
        D=D,
        F=F,
        dtype=jnp.dtype(x.dtype),
        act=act,
        beta=float(beta),
        save=save,
        biases=b_gate is not None,
        down=None if w_down is None else w_down.shape[1],
    )


class _Gates(NamedTuple):
    """The parameters of both products: w [D, F], b [F] or None."""

    w_gate: jax.Array
    w_up: jax.Array
    b_gate: jax.Array | None
    b_up: jax.Array | None


@dataclass(frozen=True)
class _Call:
    """What is known at compile time."""

    problem: GluProblem
    backend: str
    blocks: GluBlocks | None
    interpret: Any

    @classmethod
    def of(cls, plan: Plan, interpret: Any) -> _Call:
        assert isinstance(plan.problem, GluProblem) and (plan.blocks is None or isinstance(plan.blocks, GluBlocks))
        return cls(plan.problem, plan.backend, plan.blocks, interpret)

    def body(self, function: str, *operands: jax.Array | None) -> tuple[jax.Array, ...]:
        """A function of the chosen body; weights and biases go in with the dtype of x, the first operand."""
        assert operands[0] is not None
        cast = (None if o is None else o.astype(operands[0].dtype) for o in operands)
        run = getattr(dispatch.GLU[self.backend], function)
        return run(self.problem, self.blocks, *cast, interpret=self.interpret)


def _rows(plan: Plan, x: jax.Array) -> jax.Array:
    """Kernels take [M, D]; XLA keeps the leading dims, and with them the compiler's sharding."""
    return x if plan.backend == "xla" else x.reshape(-1, x.shape[-1])


Saved = tuple[jax.Array, jax.Array] | None
"""(a, g) with save="ag"."""


# The rules of the gradient call bodies and no function with a rule of its own: remat policies look for products and
# names in the forward rule, and do not look into custom rules.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _glu(call: _Call, x: jax.Array, gates: _Gates) -> jax.Array:
    return _forward(_without_saving(call), x, gates)[0]


def _glu_fwd(call: _Call, x: jax.Array, gates: _Gates) -> tuple[jax.Array, tuple[jax.Array, _Gates, Saved]]:
    h, saved = _forward(call, x, gates)
    return h, (x, gates, saved)


def _glu_bwd(call: _Call, residuals: tuple[jax.Array, _Gates, Saved], dh: jax.Array) -> tuple[jax.Array, _Gates]:
    x, gates, saved = residuals
    if saved is None:
        da, dg = call.body("pre_gradients", x, *gates, dh)
    else:
        da, dg = xla.gated_gradients(call.problem, *saved, dh)
    return _input_gradients(x, gates, da, dg)


_glu.defvjp(_glu_fwd, _glu_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _glu_mlp(call: _Call, x: jax.Array, gates: _Gates, w_down: jax.Array) -> jax.Array:
    h, _ = _forward(_without_saving(call), x, gates)
    return xla.project(h, w_down.astype(x.dtype))


def _glu_mlp_fwd(
    call: _Call, x: jax.Array, gates: _Gates, w_down: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, _Gates, jax.Array, Saved]]:
    h, saved = _forward(call, x, gates)
    return xla.project(h, w_down.astype(x.dtype)), (x, gates, w_down, saved)


def _glu_mlp_bwd(
    call: _Call, residuals: tuple[jax.Array, _Gates, jax.Array, Saved], dy: jax.Array
) -> tuple[jax.Array, _Gates, jax.Array]:
    x, gates, w_down, saved = residuals
    if saved is None:
        w_gate, w_up, b_gate, b_up = gates
        da, dg, h = call.body("mlp_pre_gradients", x, w_gate, w_up, w_down, b_gate, b_up, dy)
    else:
        da, dg = xla.gated_gradients(call.problem, *saved, xla.project(dy, w_down.astype(x.dtype), 1))
        h = xla.gated(call.problem, *saved)
    return *_input_gradients(x, gates, da, dg), _weight_gradient(h, dy, w_down)


_glu_mlp.defvjp(_glu_mlp_fwd, _glu_mlp_bwd)


def _without_saving(call: _Call) -> _Call:
    """For a call that nobody differentiates."""
    return replace(call, problem=replace(call.problem, save="none"))


def _forward(call: _Call, x: jax.Array, gates: _Gates) -> tuple[jax.Array, Saved]:
    h, *saved = call.body("forward", x, *gates)
    h = checkpoint_name(h, "glu_out")
    if not saved:
        return h, None
    a, g = saved
    return h, (checkpoint_name(a, "glu_gate"), checkpoint_name(g, "glu_up"))


def _input_gradients(x: jax.Array, gates: _Gates, da: jax.Array, dg: jax.Array) -> tuple[jax.Array, _Gates]:
    """The gradients of x and of the parameters for the cotangents of a and g."""
    w_gate, w_up, b_gate, b_up = gates
    dx = xla.project(da, w_gate.astype(x.dtype), 1) + xla.project(dg, w_up.astype(x.dtype), 1)
    return dx, _Gates(
        _weight_gradient(x, da, w_gate),
        _weight_gradient(x, dg, w_up),
        _bias_gradient(da, b_gate),
        _bias_gradient(dg, b_up),
    )


def _weight_gradient(x: jax.Array, d_out: jax.Array, w: jax.Array) -> jax.Array:
    """x^T d_out over all rows: summed over devices, as formed here, in the weight's own dtype."""
    rows = tuple(range(x.ndim - 1))
    return lax.dot_general(x, d_out, ((rows, rows), ((), ())), preferred_element_type=w.dtype)


def _bias_gradient(d_out: jax.Array, bias: jax.Array | None) -> jax.Array | None:
    """The sum over all rows, in float32 or wider and rounded once."""
    if bias is None:
        return None
    wide = jnp.promote_types(d_out.dtype, jnp.float32)
    return d_out.sum(tuple(range(d_out.ndim - 1)), dtype=wide).astype(bias.dtype)
