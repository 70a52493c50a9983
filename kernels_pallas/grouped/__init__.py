"""One matrix for each group of rows.

api.py: grouped_matmul: checks, choice, gradient
problem.py: one call
xla.py: jax.lax.ragged_dot
loop.py: plain products of blocks of rows
tpu.py: Mosaic kernels
"""
