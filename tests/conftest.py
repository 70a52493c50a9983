"""Eight CPU devices, forced before jax is imported, so that every test may build a real mesh."""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from xla_flags import xla_flags

# A shell without job control starts what it puts in the background deaf to Ctrl-C, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
# What tests compile for plans is kept apart from the user's, and is gone with them.
_plans = tempfile.TemporaryDirectory(prefix="maxlm-plans-")
os.environ["MAXLM_PLAN_CACHE"] = _plans.name


@pytest.fixture(scope="module")
def programs_kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests compile several times, as engines of one model, is compiled once, by whichever process comes first."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    changes = {
        "jax_compilation_cache_dir": str(shared / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: jax.config.values[name] for name in changes}
    for values in (changes, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is changes:
            yield


_MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def programs_forgotten() -> Iterator[None]:
    """jax keeps every program, and a program on a CPU is three mappings of memory. Linux gives a process 65,530, which
    the whole suite passes: what is compiled afterwards ends in a segmentation fault."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 25_000:
        import jax

        jax.clear_caches()
        gc.collect()
