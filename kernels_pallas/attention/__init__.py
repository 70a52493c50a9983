"""Softmax attention without the T x S score matrix in memory.

api.py: flash_attention: checks, choice, gradient
problem.py: one call, as every body receives it
scores.py: all that shapes the scores, in one value
merge.py: results over parts of the keys; sinks
xla.py: blocks of plain operations: every device
tpu.py: Mosaic kernel for TPUs, forward
tpu_backward.py: the same, backward
tpu_tile.py: the tile of scores that the two share
gpu.py: Mosaic GPU kernel for Hopper, forward
gpu_backward.py: the same, backward
gpu_tile.py: the tile of scores that the two share
cudnn.py: what cuDNN can do
"""
