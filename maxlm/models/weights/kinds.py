"""All that a product takes as its weight."""

from __future__ import annotations

import jax

from maxlm.models.weights.around import Begun, MlpAfter, Prompted, Rescaled
from maxlm.models.weights.by_channel import Float8, Int8, Int8Activations, Int8Outliers
from maxlm.models.weights.by_group import ByGroup
from maxlm.models.weights.by_layer import ByLayer
from maxlm.models.weights.by_row import ByRow
from maxlm.models.weights.low_rank import LowRank
from maxlm.models.weights.narrow import Narrow
from maxlm.models.weights.normal_float import NormalFloat4
from maxlm.models.weights.watched import Watched

Quantised = Int8 | Int8Activations | Int8Outliers | Float8 | ByGroup | NormalFloat4
"""Fewer bits than a number of the compute dtype has."""
Weight = jax.Array | Quantised | Watched | Narrow | ByLayer | LowRank | Rescaled | MlpAfter | Begun | Prompted | ByRow
"""`ops/dense.py` alone looks inside. A further kind is a member here, and a case in `ops.project`."""
