"""The public operation: checks, the choice of a body, and the rule of its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import dispatch
from kernels_pallas.decision import Plan
from kernels_pallas.grouped.problem import GroupedBlocks, GroupedProblem


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    backend: str = "auto",
    blocks: GroupedBlocks | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Rows of x, sorted by group, each times the matrix of its group (as of MegaBlocks, arXiv:2211.15841).

    The first group_sizes[0] rows are multiplied by w[0], the next group_sizes[1] by w[1], and so on. Rows after the
    last group give 0, and neither they nor their cotangents have a part in any gradient; they need not be numbers.
    The products run in x's dtype and are summed in float32 or wider. The gradient of w is formed and returned in w's
    own dtype. The result is named "grouped_out" for remat policies (`jax.ad_checkpoint.checkpoint_name`).

    Args:
        x: [M, D] float32, bfloat16 or float16 (float64 with "xla" and "loop").
        w: [E, D, F], of any floating dtype.
        group_sizes: [E] of an integer dtype, not negative; they sum to M at most (not checked: they are traced).
        backend: "xla" (`jax.lax.ragged_dot`), "loop" (XLA products of blocks of rows) or "tpu"; "auto" follows the
            table recorded for the chip. The compiler cannot split the kernels of "tpu" over devices: call them inside
            `jax.shard_map(..., check_vma=False)`.
        blocks: tile sizes; None: from the tuning table.
        interpret: run the "tpu" kernel in Pallas' interpreter: True, or its parameters object.

    Returns:
        [M, F] in x's dtype.

    Raises:
        ValueError: arguments do not fit each other, or the named backend cannot do this.
    """
    plan = _plan(x, w, group_sizes, backend=backend, blocks=blocks, interpret=interpret)
    return _grouped(_Call.of(plan, interpret), *_varying_alike(x, w, group_sizes.astype(jnp.int32)))


def _varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Each varying over the mesh axes that any of them varies over, as inside `shard_map` a custom rule wants it.

    The transpose sums over devices: the gradient of weights that are the same on all, in the weights' dtype.
    """
    varying = [frozenset(jax.typeof(array).manual_axis_type.varying) for array in arrays]
    axes = frozenset().union(*varying)
    return [
        lax.pcast(array, tuple(axes - own), to="varying") if axes - own else array
        for array, own in zip(arrays, varying, strict=True)
    ]


def _plan(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    backend: str,
    blocks: GroupedBlocks | None,
    interpret: Any,
) -> Plan:
    for name, array, dims in (("x", x, "M, D"), ("w", w, "E, D, F")):
        if array.ndim != dims.count(",") + 1 or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} {array.dtype}{list(array.shape)} must be floating point [{dims}]; reshape it")
    E, D, F = w.shape
    if x.shape[1] != D:
        raise ValueError(f"w {list(w.shape)} must be [E, {x.shape[1]}, F], as x is {list(x.shape)}; is it transposed?")
    if group_sizes.shape != (E,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        given = f"{group_sizes.dtype}{list(group_sizes.shape)}"
        raise ValueError(f"group_sizes {given} must be int32[{E}], one for each matrix of w")
    problem = GroupedProblem(M=x.shape[0], D=D, F=F, E=E, dtype=jnp.dtype(x.dtype), weight_dtype=jnp.dtype(w.dtype))
    return dispatch.decide("grouped_matmul", problem, backend=backend, blocks=blocks, interpret=interpret)


@dataclass(frozen=True)
class _Call:
    """What is known at compile time."""

    problem: GroupedProblem
    backend: str
    blocks: GroupedBlocks | None
    interpret: Any

    @classmethod
    def of(cls, plan: Plan, interpret: Any) -> _Call:
        assert isinstance(plan.problem, GroupedProblem)
        assert plan.blocks is None or isinstance(plan.blocks, GroupedBlocks)
        return cls(plan.problem, plan.backend, plan.blocks, interpret)

    def body(self, function: str, *operands: jax.Array) -> jax.Array:
        """A function of the chosen body."""
        run = getattr(dispatch.GROUPED[self.backend], function)
        return run(self.problem, self.blocks, *operands, interpret=self.interpret)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(call: _Call, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return _forward(call, x, w, sizes)


def _forward(call: _Call, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return checkpoint_name(call.body("forward", x, w.astype(x.dtype), sizes), "grouped_out")


Residuals = tuple[jax.Array, jax.Array, jax.Array]


def _fwd(call: _Call, x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Residuals]:
    # Not _grouped itself: remat policies look for names in this rule, and do not look into custom rules.
    return _forward(call, x, w, sizes), (x, w, sizes)


def _bwd(call: _Call, residuals: Residuals, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = residuals
    dx = call.body("row_gradient", dy, w.astype(x.dtype), sizes)
    return dx, call.body("weight_gradient", x, dy, sizes), None


_grouped.defvjp(_fwd, _bwd)
