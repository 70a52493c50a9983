"""Published tensors in few bits: the numbers that they stand for, and files that do not fit each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import published
import pytest
import safetensors.numpy

from maxlm.config import ShardingConfig, UserError
from maxlm.hub.folder import open_folder
from maxlm.hub.models import load_model
from maxlm.hub.published import Published
from maxlm.hub.quantized import Dequantised
from maxlm.hub.tensor_files import SINGLE

FP8 = {"quant_method": "fp8", "weight_block_size": [4, 3]}
MXFP4 = {"quant_method": "mxfp4"}


def write_raw(folder: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """A safetensors file of tensors in any of its formats: a header and bytes, as its documentation has them."""
    entries, data = {}, b""
    for name, (dtype, values) in tensors.items():
        content = np.ascontiguousarray(values).tobytes()
        offsets = [len(data), len(data) + len(content)]
        entries[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        data += content
    header = json.dumps(entries).encode()
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + data)


def opened(folder: Path, quantization: dict[str, Any]) -> Dequantised:
    return Dequantised(folder, Published({"quantization_config": quantization}, "config.json"))


def fp8(shape: tuple[int, ...] = (10, 7)) -> np.ndarray:
    """Every finite number of its bits, again and again."""
    bits = np.arange(256, dtype=np.uint8)
    return np.resize(bits[(bits & 127) != 127], shape).view(ml_dtypes.float8_e4m3fn)


def e4m3(bits: int) -> float:
    """arXiv:2209.05433, table 1: a sign, 4 bits of the exponent with bias 7, 3 of the mantissa."""
    sign, exponent, mantissa = -1.0 if bits >> 7 else 1.0, bits >> 3 & 15, bits & 7
    return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)


@pytest.mark.parametrize(("name", "dtype"), [("F32", np.float32), ("BF16", ml_dtypes.bfloat16)])
def test_fp8_by_blocks_that_do_not_divide_the_shape(name: str, dtype: Any, tmp_path: Path) -> None:
    numbers, factors = fp8(), (np.random.default_rng(0).random((3, 3)) + 0.5).astype(dtype)
    plain = np.arange(6, dtype=np.float32)
    write_raw(tmp_path, {"w": ("F8_E4M3", numbers), "w_scale_inv": (name, factors), "b": ("F32", plain)})
    folder = opened(tmp_path, FP8)
    assert sorted(folder.entries) == ["b", "w"] and folder.entries["w"].shape == (10, 7)
    bits = numbers.view(np.uint8)
    want = [[e4m3(int(bits[i, j])) * float(factors[i // 4, j // 3]) for j in range(7)] for i in range(10)]
    np.testing.assert_array_equal(folder.read("w"), np.array(want, np.float64).astype(np.float32))
    np.testing.assert_array_equal(folder.read("b"), plain)


BLOCKS, SCALES = np.zeros((2, 6, 3, 16), np.uint8), np.full((2, 6, 3), 127, np.uint8)
FACTORS = np.ones((3, 3), np.float32)


@pytest.mark.parametrize(
    ("kind", "tensors", "match"),
    [
        (FP8, {"w": ("F8_E4M3", fp8())}, r": w_scale_inv is missing, w is there; download the model again"),
        (FP8, {"w_scale_inv": ("F32", FACTORS)}, r": w is missing, w_scale_inv is there"),
        (
            FP8,
            {"w": ("F8_E4M3", fp8((13, 7))), "w_scale_inv": ("F32", FACTORS)},
            r"w is F8_E4M3 \[13, 7\], w_scale_inv is F32 \[3, 3\]; they must be .* for each block of \[4, 3\]",
        ),
        (FP8, {"w": ("F32", np.ones((10, 7), np.float32)), "w_scale_inv": ("F32", FACTORS)}, r"w is F32 \[10, 7\]"),
        (FP8, {"w": ("F8_E4M3", fp8((10,))), "w_scale_inv": ("F32", FACTORS[0])}, r"w is F8_E4M3 \[10\]"),
        (FP8, {"w": ("F8_E4M3", fp8()), "w_scale_inv": ("I32", FACTORS)}, r"w_scale_inv is I32 \[3, 3\]"),
        (FP8 | {"weight_block_size": [4]}, {}, r"weight_block_size = \[4\] must be two numbers"),
        (FP8 | {"weight_block_size": [4, 0]}, {}, r"weight_block_size = 0 must be positive"),
        (MXFP4, {"w_blocks": ("U8", BLOCKS)}, r": w_scales is missing, w_blocks is there; download the model again"),
        (MXFP4, {"w_scales": ("U8", SCALES)}, r": w_blocks is missing, w_scales is there"),
        (
            MXFP4,
            {"w_blocks": ("U8", BLOCKS), "w_scales": ("U8", SCALES[:, :5])},
            r"w_blocks is U8 \[2, 6, 3, 16\], w_scales is U8 \[2, 5, 3\]; they must be U8 \[experts, outputs, ",
        ),
        (MXFP4, {"w_blocks": ("U8", BLOCKS[..., :8]), "w_scales": ("U8", SCALES)}, r"w_blocks is U8 \[2, 6, 3, 8\]"),
        (MXFP4, {"w_blocks": ("U8", BLOCKS[0]), "w_scales": ("U8", SCALES[0])}, r"w_blocks is U8 \[6, 3, 16\]"),
        (MXFP4, {"w_blocks": ("I8", BLOCKS), "w_scales": ("U8", SCALES)}, r"w_blocks is I8"),
        ({"quant_method": "awq"}, {}, r"quant_method = 'awq' is not supported; it may be fp8 or mxfp4"),
        ({"load_in_4bit": True}, {}, r"quant_method = 'none' is not supported.* take the model as it was"),
    ],
)
def test_numbers_and_factors_that_do_not_fit(
    kind: dict[str, Any], tensors: dict[str, tuple[str, np.ndarray]], match: str, tmp_path: Path
) -> None:
    write_raw(tmp_path, {"b": ("F32", np.ones(3, np.float32)), **tensors})
    with pytest.raises(UserError, match=match):
        opened(tmp_path, kind)


# OCP Microscaling Formats 1.0: table 5 for FP4 E2M1, section 5.4.1 for the scales.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def test_mxfp4_is_the_table_of_its_specification(tmp_path: Path) -> None:
    """All bytes, and all scales whose products are finite."""
    rng = np.random.default_rng(0)
    blocks = rng.permutation(np.resize(np.arange(256, dtype=np.uint8), 2 * 6 * 22 * 16)).reshape(2, 6, 22, 16)
    scales = np.resize(np.arange(253, dtype=np.uint8), (2, 6, 22))  # from 2^-127
    write_raw(tmp_path, {"w_blocks": ("U8", blocks), "w_scales": ("U8", scales)})
    folder = opened(tmp_path, MXFP4)
    want = np.empty((2, 22 * 32, 6))
    for e, o, n, i in np.ndindex(blocks.shape):
        byte, power = int(blocks[e, o, n, i]), 2.0 ** (int(scales[e, o, n]) - 127)
        want[e, 32 * n + 2 * i, o] = E2M1[byte & 15] * power
        want[e, 32 * n + 2 * i + 1, o] = E2M1[byte >> 4] * power
    assert folder.entries.keys() == {"w"} and folder.entries["w"].shape == want.shape
    found = folder.read("w")
    np.testing.assert_array_equal(found.astype(np.float64), want)
    np.testing.assert_array_equal(np.signbit(found.astype(np.float64)), np.signbit(want))


@pytest.mark.parametrize(("byte", "scale"), [(0x01, 255), (0x77, 254)], ids=["no number", "too large"])
def test_mxfp4_that_is_not_finite_is_refused(byte: int, scale: int, tmp_path: Path) -> None:
    blocks, scales = BLOCKS.copy(), SCALES.copy()
    blocks[1, 2, 0, 3], scales[1, 2, 0] = byte, scale
    write_raw(tmp_path, {"w_blocks": ("U8", blocks), "w_scales": ("U8", scales)})
    with pytest.raises(UserError, match=r"w holds numbers that are not finite"):
        opened(tmp_path, MXFP4).read("w")


def test_a_packed_model_is_that_of_transformers(tmp_path: Path) -> None:
    """On a mesh that cuts experts and their d_ff; and scales that are missing have a name."""
    (name,) = published.MXFP4
    published.write_model(published.MXFP4[name], tmp_path)
    model, _ = load_model(tmp_path, sharding=ShardingConfig(data=1, tensor=2, expert=2))
    np.testing.assert_allclose(model(published.ids()), published.logits(name), atol=2e-5)
    assert open_folder(tmp_path).dtype == ml_dtypes.bfloat16  # of most numbers, which lose nothing there
    found = safetensors.numpy.load_file(tmp_path / SINGLE)
    lost = found.pop("model.layers.1.mlp.experts.down_proj_scales")
    assert lost.shape == (4, 32, 2)
    safetensors.numpy.save_file(found, tmp_path / SINGLE)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.experts.down_proj_scales is missing"):
        load_model(tmp_path)
