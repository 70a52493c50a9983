"""Whether a state may be saved, or gone on from: every number in it is finite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from maxlm.checkpoint.store import named_leaves
from maxlm.config import UserError

_NAMED = 3


class Diverged(UserError):
    """The loss, gradient or update was not finite for too many steps in a row, or the state is not."""

    exit_code = 1


@jax.jit
def _count(tree: Any) -> Any:
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.int32) if floating(x) else jnp.int32(0), tree)


def not_finite(tree: Any) -> str | None:
    """The arrays that hold NaN or infinity, with how many of their values do, in a few words; None: there is none.

    Every rank must call it.
    """
    counts = jax.device_get(_count(tree))
    bad = {name: int(count) for name, count in named_leaves(counts).items() if count}
    if not bad:
        return None
    sizes = {name: leaf.size for name, leaf in named_leaves(tree).items()}
    words = [f"{name} ({bad[name]:,} of {sizes[name]:,} values)" for name in list(bad)[:_NAMED]]
    return ", ".join(words) + (f" and {len(bad) - _NAMED} more arrays" if len(bad) > _NAMED else "")
