"""Mixed products against their formula in float64 numpy, values and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import mixed_einsum


@pytest.mark.parametrize("subscripts", ["btd,df->btf", "btd,dnh->btnh", "btnh,nhd->btd", "td,vd->tv"])
@pytest.mark.parametrize("formats", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_mixed_einsum(subscripts, formats):
    sizes = {"b": 2, "t": 5, "d": 6, "f": 7, "n": 3, "h": 4, "v": 9}
    dims, out_dims = subscripts.split("->")
    rng = np.random.default_rng(0)
    normal = lambda letters, dtype: jnp.asarray(rng.normal(size=[sizes[c] for c in letters]), dtype)
    x_dims, w_dims = dims.split(",")
    x, w, g = normal(x_dims, formats[0]), normal(w_dims, formats[1]), normal(out_dims, formats[0])
    y, pull = jax.vjp(functools.partial(mixed_einsum, subscripts), x, w)
    dx, dw = pull(g)
    assert y.dtype == dx.dtype == x.dtype and dw.dtype == w.dtype

    x64, g64 = np.asarray(x, np.float64), np.asarray(g, np.float64)
    w64 = np.asarray(w.astype(x.dtype), np.float64)  # what enters the product
    tolerance = lambda dtype: 1e-5 if dtype == "float32" else 2**-7
    for got, want, dtype in (
        (y, np.einsum(subscripts, x64, w64), formats[0]),
        (dx, np.einsum(f"{out_dims},{w_dims}->{x_dims}", g64, w64), formats[0]),
        # Of two bfloat16 factors the products are exact in float32: a float32 weight's gradient is summed that finely.
        (dw, np.einsum(f"{x_dims},{out_dims}->{w_dims}", x64, g64), formats[1]),
    ):
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=tolerance(dtype), atol=tolerance(dtype) * np.abs(want).max()
        )
