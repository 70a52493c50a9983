"""Tensors that a published model has in few bits, as the numbers that they stand for.

fp8     F8_E4M3 numbers `NAME`, and a wider factor for each block of them in `NAME_scale_inv` (DeepSeek-V3,
        arXiv:2412.19437, section 3.3.2)
mxfp4   FP4 numbers, two in a byte, 16 bytes in a block, in `NAME_blocks`, and a power of two for each block in
        `NAME_scales` (gpt-oss, arXiv:2508.10925, section 2.1; OCP Microscaling Formats 1.0, sections 5.3 and 5.4)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.config.fields import Positive, require
from maxlm.hub.published import Published
from maxlm.hub.tensor_files import TensorEntry, TensorFolder


class Dequantised(TensorFolder):
    """A folder of tensors, of which some may be quantised as config.json says; those have names, shapes and dtypes here
    as if they were not."""

    def __init__(self, folder: Path, published: Published) -> None:
        """Raises UserError as `TensorFolder`; and where the kind is not supported, numbers have no factors or factors
        no numbers, or their shapes or dtypes do not fit."""
        super().__init__(folder)
        self._packed: dict[str, tuple[TensorEntry, TensorEntry]] = {}
        config = published.get("quantization_config", dict, None)
        if config is None:
            return
        said = Published(config, f"{published.place}: quantization_config")
        self._kind: _Fp8 | _Mxfp4
        match said.get("quant_method", str, "none"):  # of an old bitsandbytes
            case "fp8":
                self._kind = _Fp8.read(said)
            case "mxfp4":
                self._kind = _Mxfp4()
            case method:
                raise UserError(
                    f"{said.place}.quant_method = {method!r} is not supported; it may be fp8 or mxfp4: take the model "
                    "as it was before, in bfloat16, or write it so with transformers (dequantize, save_pretrained)"
                )
        wholes = (self._kind.whole(key, entry) for key, entry in self.entries.items())
        for name in sorted({name for name in wholes if name is not None}):
            self._join(name)

    def _join(self, name: str) -> None:
        """Make one entry of a tensor's numbers and factors."""
        names = [name + ending for ending in self._kind.endings]
        for one, other in (names, reversed(names)):
            if one not in self.entries:
                raise UserError(f"{self.folder}: {one} is missing, {other} is there; download the model again")
        numbers, factors = (self.entries.pop(one) for one in names)
        entry = self._kind.entry(numbers, factors)
        if entry is None:
            said = [
                f"{key} is {one.dtype} {list(one.shape)}" for key, one in zip(names, (numbers, factors), strict=True)
            ]
            raise UserError(f"{self.folder}: {', '.join(said)}; they must be {self._kind}: download the model again")
        self.entries[name], self._packed[name] = entry, (numbers, factors)

    def read(self, name: str) -> npt.NDArray[Any]:
        """As of `TensorFolder`."""
        if name not in self._packed:
            return super().read(name)
        (numbers, factors), endings = self._packed[name], self._kind.endings
        packed = self.read_bytes(name + endings[0], numbers.file).reshape(numbers.shape)  # numpy has no type for all
        return self._finite(name, self._kind.values(packed, self._opened(factors.file).get_tensor(name + endings[1])))


class _Fp8:
    endings = "", "_scale_inv"

    def __init__(self, blocks: Sequence[int]) -> None:
        """`blocks`: rows and columns of those that share a factor."""
        self._blocks = blocks

    @classmethod
    def read(cls, said: Published) -> _Fp8:
        blocks = said.get("weight_block_size", list)
        for size in blocks:
            require(f"{said.place}.weight_block_size", size, Positive[int])
        if len(blocks) != 2:
            raise UserError(f"{said.place}.weight_block_size = {blocks} must be two numbers, rows and columns")
        return cls(blocks)

    def __str__(self) -> str:
        return f"F8_E4M3 [rows, columns], and F32 or BF16 with a factor for each block of {self._blocks}"

    def whole(self, key: str, entry: TensorEntry) -> str | None:
        """The name of the tensor that these numbers or factors are of."""
        return key.removesuffix("_scale_inv") if key.endswith("_scale_inv") or entry.dtype == "F8_E4M3" else None

    def entry(self, numbers: TensorEntry, factors: TensorEntry) -> TensorEntry | None:
        """Of the tensor; None: they are none."""
        wanted = tuple(-(-size // block) for size, block in zip(numbers.shape, self._blocks, strict=False))
        fits = len(numbers.shape) == 2 and factors.shape == wanted
        fits = fits and numbers.dtype == "F8_E4M3" and factors.dtype in ("F32", "BF16")
        return numbers._replace(dtype="F32") if fits else None

    def values(self, packed: npt.NDArray[np.uint8], factors: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """float32, of the shape of `packed`."""
        rows, columns = self._blocks
        values = packed.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        for i, of_row in enumerate(factors):
            values[i * rows : (i + 1) * rows] *= np.repeat(of_row.astype(np.float32), columns)[: values.shape[1]]
        return values


_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])
"""E2M1, by its 4 bits."""
_PAIRS = np.stack([_FP4[np.arange(256) & 15], _FP4[np.arange(256) >> 4]], -1)
"""[256, 2]: the numbers in a byte, that of the low bits first."""
_POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
"""E8M0, by its 8 bits; the last stands for no number."""


class _Mxfp4:
    endings = "_blocks", "_scales"

    def __str__(self) -> str:
        return "U8 [experts, outputs, blocks, 16] and U8 [experts, outputs, blocks]"

    def whole(self, key: str, entry: TensorEntry) -> str | None:
        """As above."""
        return next((key.removesuffix(one) for one in self.endings if key.endswith(one)), None)

    def entry(self, numbers: TensorEntry, factors: TensorEntry) -> TensorEntry | None:
        """As above; the tensor that is not quantised has inputs before outputs."""
        fits = len(numbers.shape) == 4 and numbers.shape[-1] == 16 and factors.shape == numbers.shape[:-1]
        if not fits or {numbers.dtype, factors.dtype} != {"U8"}:
            return None
        experts, outputs, blocks, _ = numbers.shape
        return numbers._replace(shape=(experts, blocks * 32, outputs), dtype="BF16")

    def values(self, packed: npt.NDArray[np.uint8], factors: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """bfloat16 [experts, inputs, outputs]: two bits after the point, and all the powers, so nothing is rounded."""
        experts, outputs, blocks, _ = packed.shape
        values = np.empty((experts, blocks * 32, outputs), ml_dtypes.bfloat16)
        for expert in range(experts):  # wide numbers of one at a time
            numbers = _PAIRS[packed[expert]].reshape(outputs, blocks, 32)
            with np.errstate(over="ignore"):  # what is too large is refused
                wide = numbers * _POWERS[factors[expert]][..., None]
            values[expert] = wide.reshape(outputs, -1).T
        return values
