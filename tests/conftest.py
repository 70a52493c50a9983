"""Eight CPU devices, forced before jax is imported, so that every test may build a real mesh."""

import os
import signal
import tempfile

# A shell without job control starts what it puts in the background deaf to Ctrl-C, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile many small programs once: the least optimisation halves their time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
# What tests compile for plans is kept apart from the user's, and is gone with them.
_plans = tempfile.TemporaryDirectory(prefix="maxlm-plans-")
os.environ["MAXLM_PLAN_CACHE"] = _plans.name
