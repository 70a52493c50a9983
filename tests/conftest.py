"""Eight CPU devices, forced before jax is imported, so that every test may build a real mesh."""

import os
import signal
import tempfile

from xla_flags import xla_flags

# A shell without job control starts what it puts in the background deaf to Ctrl-C, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
# What tests compile for plans is kept apart from the user's, and is gone with them.
_plans = tempfile.TemporaryDirectory(prefix="maxlm-plans-")
os.environ["MAXLM_PLAN_CACHE"] = _plans.name
