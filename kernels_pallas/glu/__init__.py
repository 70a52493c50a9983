"""Gated linear units.

api.py: fused_glu, fused_glu_mlp: checks, choice, gradients
problem.py: one call
activations.py: values and slopes
xla.py: plain products
tpu.py: Mosaic kernels
gpu.py: Mosaic GPU kernels
"""
