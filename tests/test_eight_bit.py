"""Moments of 8 bits: how far a rounded number may be off, and AdamW with them beside AdamW without."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_optimizers import DIMS, LAYERS, declared_as, narrow, parameters_and_gradients, run

from maxlm.config import AdamW, EightBitMoments
from maxlm.training.eight_bit import SIGNED, UNSIGNED, dequantised, quantised
from maxlm.training.optimizers import make_optimizer


def test_the_tables_are_those_of_dynamic_trees():
    """Section 1.3 of arXiv:2110.02861: after the sign, zero bits are a power of 10, and what follows the first one is a
    linear fraction. 0 has a code of a first moment alone."""
    assert (len(SIGNED), len(UNSIGNED)) == (256, 255)
    for table, bits in ((SIGNED[SIGNED > 0], 6), (UNSIGNED, 7)):
        assert table[-1] == 1
        for e in range(7):
            of_power = table[:-1][(table[:-1] > 10.0 ** -(e + 1)) & (table[:-1] < 10.0**-e)]
            n = 2 ** (bits - e)
            np.testing.assert_allclose(of_power, 10.0**-e * (0.1 + 0.9 * (np.arange(n) + 0.5) / n), rtol=1e-6)
    np.testing.assert_array_equal(SIGNED[SIGNED < 0], -SIGNED[SIGNED > 0][:-1][::-1])
    assert 0 in SIGNED and UNSIGNED.min() > 0


@pytest.mark.parametrize("n", [5, 8, 21])
@pytest.mark.parametrize(("table", "worst"), [(SIGNED, 0.0071), (UNSIGNED, 0.0036)], ids=["signed", "unsigned"])
def test_a_number_comes_back_as_the_nearest_of_its_block(n, table, worst):
    """Blocks of 8, of sizes from 1e-6 to 1e6, the last one shorter; a block of zeros."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, n)) * np.geomspace(1e-6, 1e6, 6).reshape(2, 3, 1)
    x[0, 1] = 0
    x = np.abs(x) if table is UNSIGNED else x
    codes, scales = jax.jit(lambda x: quantised(x, table, 8))(jnp.asarray(x, jnp.float32))
    assert codes.dtype == jnp.uint8 and codes.shape == x.shape and scales.shape == (2, 3, -(-n // 8))
    back = dequantised(codes, scales, table, 8)
    for start in range(0, n, 8):
        block = x[..., start : start + 8]
        largest = np.abs(block).max(-1, keepdims=True)
        assert (np.abs(back[..., start : start + 8] - block) <= worst * largest).all()
    assert table is SIGNED or (np.asarray(back)[x > 0] > 0).all()


def test_large_matrices_alone_are_kept_in_eight_bits():
    """Here those with 24 numbers or more in a layer: not thin ones, tables, norms or biases."""
    config = AdamW(eight_bit=EightBitMoments(block=4, min_size=24))
    parameters, _ = parameters_and_gradients()
    state = make_optimizer(config, rate_of_nothing, declared_as(DIMS), layers=LAYERS).init(narrow(parameters))
    kinds = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        kinds.setdefault(getattr(path[-1], "key", None), []).append((leaf.dtype.name, leaf.shape))
    assert kinds["stacked"] == [("uint8", (3, 4, 6)), ("float32", (3, 4, 2))] * 2
    assert kinds["heads"] == [("uint8", (3, 9, 2, 8)), ("float32", (3, 9, 2, 2))] * 2
    assert kinds["norm"] == [("float32", (3, 7))] * 2


def rate_of_nothing(count):
    return 0.0 * count


def test_adamw_with_moments_of_eight_bits_goes_nearly_the_same_way():
    """Over six steps whose gradients grow ten-thousandfold: within a few hundredths of the way of each array."""
    parameters, gradients = parameters_and_gradients()
    config = AdamW(eight_bit=EightBitMoments(block=256, min_size=0), weight_decay=0.0)
    got, want = run(config, parameters, gradients), run(AdamW(weight_decay=0.0), parameters, gradients)
    for name, start in parameters.items():
        way, off = want[name] - start, np.asarray(got[name]) - np.asarray(want[name])
        assert np.linalg.norm(off) <= 0.05 * np.linalg.norm(way), name
        assert off.any() == ("embed" in DIMS[name]), name


def test_a_parameter_whose_gradients_end_does_not_run_away():
    """A second moment that becomes small beside its block must not be rounded to 0, by which steps are divided."""
    rng = np.random.default_rng(0)
    parameters = {"matrix": np.zeros((7, 5))}
    gradients = [{"matrix": rng.normal(size=(7, 5)) * np.array([1, 1e-3, 1e-4, 1e-5, 1e-6])} for _ in range(3)]
    gradients += [{"matrix": np.outer(rng.normal(size=7), [1, 0, 0, 0, 0])} for _ in range(20)]
    config = AdamW(eight_bit=EightBitMoments(min_size=0), weight_decay=0.0, clip_norm=None)
    got = run(config, parameters, gradients, {"matrix": DIMS["matrix"]})["matrix"]
    want = run(AdamW(weight_decay=0.0, clip_norm=None), parameters, gradients, {"matrix": DIMS["matrix"]})["matrix"]
    assert np.abs(got).max() < 2 * np.abs(want).max()
