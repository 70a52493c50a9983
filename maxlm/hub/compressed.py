"""Quantised weights in the layout of compressed-tensors, which transformers and vLLM read.

Format: https://github.com/vllm-project/compressed-tensors, 0.20. Of a module's matrix [outputs, inputs]:

pack-quantized    `weight_packed` int32 [outputs, inputs b / 32], numbers of b bits plus 2^(b - 1), the first in the low
                  bits; `weight_scale` [outputs, groups], one group where outputs have one scale; `weight_shape`;
                  and where 0 is not the middle of the numbers, `weight_zero_point` int32 [outputs b / 32, groups], the
                  code of 0, packed in the same way, the first output in the low bits
int-quantized     `weight` int8, `weight_scale` [outputs, 1]; activations are rounded by token when the model runs
float-quantized   `weight` F8_E4M3, `weight_scale` [outputs, 1]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from maxlm.hub.held_weights import HeldWeights, WrittenTensor
from maxlm.hub.names import Stacked, Tensor, Transposed
from maxlm.hub.tensor_files import Spec
from maxlm.models.weights.by_channel import ByChannel, Float8, Int8, Int8Activations, Int8Outliers
from maxlm.models.weights.by_group import ByGroup
from maxlm.models.weights.kinds import Quantised
from maxlm.models.weights.normal_float import NormalFloat4


class Scheme(NamedTuple):
    """How the numbers of a matrix are kept."""

    format: str
    bits: int
    group: int | None
    """Inputs with one scale; None: all."""
    symmetric: bool = True
    """Whether the code 0 means 0."""

    def said(self) -> dict[str, Any]:
        """In config.json, but for its targets."""
        args = {"num_bits": self.bits, "type": "float" if self.format == "float-quantized" else "int"}
        weights = args | {
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group is None else "group",
            "group_size": self.group,
            "dynamic": False,
        }
        by_token = args | {"symmetric": True, "strategy": "token", "dynamic": True}
        activations = by_token if self.format == "int-quantized" else None
        return {"weights": weights, "input_activations": activations, "output_activations": None}


class CompressedTensors:
    """What a quantised model's tensors become."""

    def __init__(self, parameters: Any, dtype: np.dtype[Any]) -> None:
        """
        Args:
            parameters: nested dicts, with `Quantised` weights among them, whose arrays may be `Deferred`.
            dtype: number format of scales.
        """
        self._held, self._dtype = HeldWeights(parameters), dtype
        self._modules: dict[Scheme, list[str]] = {}

    def entries(self, tensor: Tensor) -> list[WrittenTensor] | None:
        """What is written in the place of a tensor; None: itself, with the numbers that it stands for. So it is of
        tables, of what is no Linear there (GPT-2's Conv1D, experts in one tensor), of plain arrays, and of blocks of
        Q4_1, whose offsets are no multiples of their scales."""
        weights = [self._held.weight(part.array.name) for part in tensor.parts]
        schemes = {_scheme(weight) if isinstance(weight, Quantised) else None for weight in weights}
        table = any("vocab" in part.array.dims for part in tensor.parts)
        if table or isinstance(tensor.layout, Transposed | Stacked) or len(schemes) > 1 or None in schemes:
            return None
        (scheme,) = schemes
        assert scheme is not None
        module, (rows, inputs) = tensor.name.removesuffix(".weight"), tensor.shape
        self._modules.setdefault(scheme, []).append(module)
        codes = lambda: self._held.joined(tensor, _codes)
        scales = lambda: self._held.joined(tensor, lambda weight: weight.scales)
        of_groups = (rows, 1 if scheme.group is None else inputs // scheme.group)
        entries = [
            WrittenTensor(f"{module}.weight_scale", Spec(of_groups, self._dtype), lambda: scales().astype(self._dtype))
        ]
        if scheme.format != "pack-quantized":
            dtype = np.dtype(np.int8) if scheme.format == "int-quantized" else np.dtype(jnp.float8_e4m3fn)
            return [WrittenTensor(tensor.name, Spec((rows, inputs), dtype), codes), *entries]
        middle = 2 ** (scheme.bits - 1) if scheme.symmetric else 0
        pack = lambda values: pack_to_int32(values.astype(np.int64) + middle, scheme.bits)
        words, size = -(-inputs * scheme.bits // 32), np.array([rows, inputs], np.int64)
        if not scheme.symmetric:
            zeros = lambda: pack(self._held.joined(tensor, _zero_points).T).T
            packed = Spec((-(-rows * scheme.bits // 32), of_groups[1]), np.dtype(np.int32))
            entries.append(WrittenTensor(f"{module}.weight_zero_point", packed, zeros))
        return [
            *entries,
            WrittenTensor(f"{module}.weight_packed", Spec((rows, words), np.dtype(np.int32)), lambda: pack(codes())),
            WrittenTensor(f"{module}.weight_shape", Spec((2,), np.dtype(np.int64)), lambda: size),
        ]

    def config(self) -> dict[str, Any]:
        """`quantization_config`, of the tensors whose entries were asked for; empty where there were none."""
        if not self._modules:
            return {}
        groups = {
            f"group_{number}": {"targets": _targets(modules, self._modules.values())} | scheme.said()
            for number, (scheme, modules) in enumerate(self._modules.items())
        }
        said: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": next(iter(self._modules)).format,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
        }
        if [scheme.symmetric for scheme in self._modules] == [False]:
            # transformers 5.24 makes room for zero points that are not packed, and then refuses those that are, unless
            # it unpacks all as it reads; it does so by the first group alone.
            said["dequantize"] = True
        return {"quantization_config": said}


def _scheme(weight: Quantised) -> Scheme | None:
    match weight:
        case Int8() | Int8Outliers():
            return Scheme("pack-quantized", 8, None)
        case Int8Activations():
            return Scheme("int-quantized", 8, None)
        case Float8():
            return Scheme("float-quantized", 8, None)
        case ByGroup(values=values, offsets=offsets):
            bits = 4 if values.dtype == jnp.uint8 else 8
            if offsets is not None and offsets.dtype != jnp.float32:
                return None
            return Scheme("pack-quantized", bits, weight.group, symmetric=offsets is None)
        case NormalFloat4():
            return None
        case _:
            assert_never(weight)


def _codes(weight: ByChannel | ByGroup) -> jax.Array:
    return weight.values if isinstance(weight, ByChannel) else weight.codes()


def _zero_points(weight: ByGroup) -> jax.Array:
    """The code 0 .. 15 that means 0, of each group."""
    assert weight.offsets is not None
    scales = weight.scales.astype(jnp.float32)
    return jnp.round(-weight.offsets / jnp.where(scales == 0, 1, scales)).astype(jnp.int32)


def _targets(modules: Sequence[str], all_modules: Any) -> list[str]:
    """Patterns of modules' names, by their last part; the names themselves where others of that part differ."""
    last = lambda name: name.rpartition(".")[2]
    others = {last(name) for some in all_modules if some is not modules for name in some}
    ends = sorted({last(name) for name in modules} - others)
    return [rf"re:.*\.{re.escape(end)}$" for end in ends] + [name for name in modules if last(name) in others]


def pack_to_int32(values: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.int32]:
    """Numbers 0 .. 2^bits - 1 [rows, n] in words of 32 bits, 32 / bits in each, the first in the low bits: [rows,
    n bits / 32], rounded up, zeros in what is left."""
    each = 32 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % each))).astype(np.uint32).reshape(len(values), -1, each)
    words = np.bitwise_or.reduce(padded << (bits * np.arange(each, dtype=np.uint32)), axis=-1)
    return words.astype(np.uint32).view(np.int32)
