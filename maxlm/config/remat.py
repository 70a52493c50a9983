"""Which named results of a block each remat policy keeps for the backward pass: the model makes jax's policies of this
table, `maxlm/plan` and
`maxlm/shapes` count by it."""

from __future__ import annotations

from collections.abc import Mapping

from maxlm.config.execution import Remat

_INPUTS = ("query", "key", "value")
_ATTENTION = (*_INPUTS, "attention_out", "attention_lse")

SAVED_NAMES: Mapping[Remat, tuple[str, ...]] = {
    Remat.FULL: (),
    Remat.QKV: _INPUTS,
    Remat.NAMES: _ATTENTION,
    Remat.OFFLOAD: _ATTENTION,  # in the host's memory
    Remat.GLU: (*_ATTENTION, "glu_gate", "glu_up"),
    Remat.DOTS: (*_ATTENTION, "grouped_out"),  # and what else is a product with weights
}
"""Names as of `jax.ad_checkpoint.checkpoint_name`; `Remat.NONE` keeps everything, named or not."""
