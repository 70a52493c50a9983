"""NF4 weights in the layout of bitsandbytes, which transformers reads.

Format: https://github.com/bitsandbytes-foundation/bitsandbytes, 0.50, `QuantState.as_dict`. Of a module's matrix
[outputs, inputs], whose n numbers lie row by row in blocks of 64:

weight                  uint8 [n / 2, 1], two codes in each, the first in the high bits
weight.absmax           uint8 [n / 64], the codes of the blocks' scales
weight.quant_map        float32 [16], what codes of numbers mean
weight.nested_absmax    float32 [n / 64 / 256], rounded up: scales of the scales
weight.nested_quant_map float32 [256], what codes of scales mean
weight.quant_state.bitsandbytes__nf4
                        uint8: JSON, with the mean that scales have too little, the matrix' shape and number format
"""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from maxlm.hub.held_weights import HeldWeights, WrittenTensor
from maxlm.hub.names import Tensor
from maxlm.hub.tensor_files import Spec
from maxlm.models.weights.normal_float import BLOCK, BLOCK_OF_SCALES, LEVELS, NormalFloat4, dynamic_map

_STATE_BYTES = 256
"""Spaces fill it up, so that its size is known before its numbers."""


def has_nf4(parameters: Any) -> bool:
    """Whether any weight of nested dicts is in NF4."""
    is_nf4 = lambda weight: isinstance(weight, NormalFloat4)
    return any(map(is_nf4, jax.tree.leaves(parameters, is_leaf=is_nf4)))


class BitsAndBytes:
    """What the tensors of a model in NF4 become."""

    def __init__(self, parameters: Any, dtype: np.dtype[Any]) -> None:
        """
        Args:
            parameters: nested dicts, with `Quantised` weights among them, whose arrays may be `Deferred`.
            dtype: number format that the numbers have once they are unpacked.
        """
        self._held, self._dtype = HeldWeights(parameters), dtype
        self._plain: list[str] = []

    def entries(self, tensor: Tensor) -> list[WrittenTensor] | None:
        """What is written in the place of a tensor; None: itself, with the numbers that it stands for. So it is of
        tables and of weights that are not in NF4; of what is no Linear there; and of a tensor of several of our arrays,
        each of which has blocks of scales and a mean of its own."""
        (first, *others), name = tensor.parts, tensor.name
        nf4 = isinstance(self._held.weight(first.array.name), NormalFloat4)
        if others or not nf4 or not isinstance(tensor.layout, str) or "experts" in first.array.dims:
            if first.is_matrix and "vocab" not in first.array.dims:
                self._plain.append(name.removesuffix(".weight"))
            return None
        matrix = lambda: self._held.read(first.array.name)[first.at]

        def packed() -> npt.NDArray[np.uint8]:
            codes = self._held.joined(tensor, lambda weight: weight.codes()).reshape(-1, 2)
            return (codes[:, :1] << 4) | codes[:, 1:]

        uint8, float32 = np.dtype(np.uint8), np.dtype(np.float32)
        numbers = math.prod(tensor.shape)
        blocks = numbers // BLOCK
        return [
            WrittenTensor(name, Spec((numbers // 2, 1), uint8), packed),
            WrittenTensor(f"{name}.absmax", Spec((blocks,), uint8), lambda: np.asarray(matrix().absmax)),
            WrittenTensor(f"{name}.quant_map", Spec(LEVELS.shape, float32), lambda: LEVELS),
            WrittenTensor(
                f"{name}.nested_absmax",
                Spec((-(-blocks // BLOCK_OF_SCALES),), float32),
                lambda: np.asarray(matrix().scales),
            ),
            WrittenTensor(f"{name}.nested_quant_map", Spec((256,), float32), dynamic_map),
            WrittenTensor(
                f"{name}.quant_state.bitsandbytes__nf4",
                Spec((_STATE_BYTES,), uint8),
                lambda: self._state(tensor, float(matrix().mean)),
            ),
        ]

    def config(self) -> dict[str, Any]:
        """`quantization_config`, of the tensors whose entries were asked for."""
        said = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": self._dtype.name,
            "llm_int8_skip_modules": ["lm_head", *self._plain],
        }
        return {"quantization_config": said}

    def _state(self, tensor: Tensor, mean: float) -> npt.NDArray[np.uint8]:
        said = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": self._dtype.name,
            "shape": tensor.shape,
            "nested_blocksize": BLOCK_OF_SCALES,
            "nested_dtype": "float32",
            "nested_offset": mean,
        }
        return np.frombuffer(json.dumps(said).ljust(_STATE_BYTES).encode(), np.uint8)
