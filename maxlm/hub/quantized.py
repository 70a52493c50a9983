"""Tensors that a published model has in few bits, as the numbers that they stand for.

fp8     F8_E4M3 numbers `NAME`, and a float32 factor for each block of them in `NAME_scale_inv` (DeepSeek-V3,
        arXiv:2412.19437, section 3.3.2)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.config.fields import Positive, require
from maxlm.hub.published import Published
from maxlm.hub.tensor_files import TensorEntry, TensorFolder

_FACTORS = "_scale_inv"


class Dequantised(TensorFolder):
    """A folder of tensors, of which some may be quantised as config.json says; those are float32 here."""

    def __init__(self, folder: Path, published: Published) -> None:
        """Raises UserError as `TensorFolder`; and where the kind is not supported, or numbers have no factors."""
        super().__init__(folder)
        self._factors: dict[str, TensorEntry] = {}
        config = published.get("quantization_config", dict, None)
        if config is None:
            return
        said = Published(config, f"{published.place}: quantization_config")
        if (method := said.get("quant_method", str)) != "fp8":
            raise UserError(f"{said.place}.quant_method = {method!r} is not supported; it may be fp8")
        self._blocks = said.get("weight_block_size", list)
        for size in self._blocks:
            require(f"{said.place}.weight_block_size", size, Positive[int])
        if len(self._blocks) != 2:
            raise UserError(f"{said.place}.weight_block_size = {self._blocks} must be two numbers, rows and columns")
        for name in [name for name in self.entries if name.endswith(_FACTORS)]:
            self._join(name.removesuffix(_FACTORS), self.entries.pop(name))

    def _join(self, name: str, factors: TensorEntry) -> None:
        """Make one entry of a tensor and its factors."""
        if name not in self.entries:
            raise UserError(f"{self.folder}: {name} is missing, {name}{_FACTORS} is there; download the model again")
        entry = self.entries[name]
        wanted = tuple(-(-size // block) for size, block in zip(entry.shape, self._blocks, strict=False))
        if len(entry.shape) != 2 or factors.shape != wanted or entry.dtype != "F8_E4M3":
            raise UserError(
                f"{self.folder}: {name} is {entry.dtype} {list(entry.shape)}, {name}{_FACTORS} {list(factors.shape)}; "
                f"they must be F8_E4M3, and a factor for each block of {self._blocks}"
            )
        self.entries[name] = entry._replace(dtype="F32")
        self._factors[name] = factors

    def read(self, name: str) -> npt.NDArray[Any]:
        """As of `TensorFolder`."""
        if name not in self._factors:
            return super().read(name)
        entry, factors = self.entries[name], self._factors[name]
        numbers = self.read_bytes(name, entry.file).view(ml_dtypes.float8_e4m3fn).reshape(entry.shape)
        rows, columns = self._blocks
        values = numbers.astype(np.float32)
        for i, of_row in enumerate(self._opened(factors.file).get_tensor(name + _FACTORS)):
            values[i * rows : (i + 1) * rows] *= np.repeat(of_row, columns)[: values.shape[1]]
        return self._finite(name, values)
