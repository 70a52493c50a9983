"""How tests compile for this machine's processor: many small programs, each of which runs once."""

import importlib.metadata


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process with that many devices. Least optimisation; and before jax 0.12, which has but the newer
    emitter of loops, the older one, which takes half the time. Tolerances hold with either."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    old = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12)
    return f"{flags} --xla_cpu_use_fusion_emitters=false" if old else flags
