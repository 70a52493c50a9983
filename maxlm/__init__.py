"""maxlm: language models in JAX, from text to a served model, for TPUs, GPUs and one's own laptop.

train.py: command: train
launch.py: command: train somewhere else
generate.py: command: continue a text
evaluate.py: command: held-out loss
inspect.py: command: list, verify, hash
sharding.py: the mesh, and jax shardings of the table in config/dims.py
hardware.py: every chip: FLOP/s, memory, links, with sources
processes.py: joining several processes; stopping all at the same step
compile_cache.py: compiled programs kept between runs
"""

__version__ = "0.1.0"
