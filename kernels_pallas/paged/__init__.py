"""Attention of single tokens to keys that lie in blocks all over a cache, each text's blocks in a table.

api.py: paged_attention: checks, choice
problem.py: one call
xla.py: plain operations: every device
tpu.py: Mosaic kernel, blocks copied as they are needed
gpu.py: the same for Hopper, Mosaic GPU
"""
