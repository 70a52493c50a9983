"""The table of layouts: which mesh axis cuts which named dim of a parameter or activation.

Every array names its dims ("batch", "embed", ...); to change a layout, change this table. `maxlm/sharding.py` makes
jax's shardings of it, `maxlm/plan/` counts bytes with it, without jax.
"""

from __future__ import annotations

import enum

from maxlm.config.sharding import Zero

Axes = tuple[str, ...]
"""Mesh axes that cut one dim together."""

PARAMETER_DIMS: dict[str, Axes] = {
    "layers": ("stage",),  # stacked layers: a loop on every device, or a pipeline
    "vocab": ("tensor",),
    "embed": ("fsdp",),  # d_model of a weight matrix: the dim that every matrix has
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "latent": (),  # of what keys and values are made from
    "from_latent": ("fsdp",),  # the same, where it is what a weight multiplies
    "mlp": ("tensor",),
    "experts": ("expert",),
    "router": (),  # a router's scores of all experts: small, so everywhere
    "classes": (),  # of a head that tells texts apart
    "positions": (),
    "buckets": (),  # of a learned bias by distance
    "sinusoids": (),  # of a distance
    "rank": (),  # the inner size of what an adapter adds: small, so everywhere
    "vector": (),  # norm scales and biases of the residual stream: small, so everywhere
}
"""Dim of a parameter -> the mesh axes that cut it. The fsdp axis counts only as far as `ShardingConfig.zero` says."""

ACTIVATION_DIMS: dict[str, Axes] = {
    "batch": ("data", "fsdp", "expert", "stage"),
    "stages": ("stage",),
    "stage_batch": ("data", "fsdp", "expert"),  # rows of a micro-batch inside a pipeline
    "seq": ("seq",),
    "residual_seq": ("seq",),  # of the residual stream between blocks; also tensor with sequence_parallel
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""Dim of an activation -> the mesh axes that cut it."""


class StatePart(enum.Enum):
    """The three kinds of arrays that have a parameter's shape."""

    PARAMETERS = enum.auto()
    GRADIENTS = enum.auto()
    OPTIMIZER = enum.auto()


CUT_BY_FSDP = {
    Zero.OPTIMIZER: {StatePart.OPTIMIZER},
    Zero.GRADIENTS: {StatePart.OPTIMIZER, StatePart.GRADIENTS},
    Zero.PARAMETERS: {StatePart.OPTIMIZER, StatePart.GRADIENTS, StatePart.PARAMETERS},
}
"""The arrays that the fsdp axis cuts."""
