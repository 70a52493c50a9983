"""The parameters of a model as its loss multiplies by them."""

from __future__ import annotations

from typing import Any, assert_never

import jax

from maxlm import shapes
from maxlm.config import Float8Products, Int8Products, ModelConfig, PlainProducts, Products, RoundedWeights
from maxlm.models import declared
from maxlm.models.weights.holding import quantised
from maxlm.models.weights.kinds import Weight
from maxlm.models.weights.narrow import Narrow

SCALES = "scales"
"""Parameters under this key are scales of 8-bit floats, by the name of the weight (`models/weights/narrow.py`)."""


def in_products(products: Products, model: ModelConfig, parameters: Any) -> Any:
    """Parameters of the model, with SCALES beside or not, as `execution.products` says; gradients go through to the
    arrays that they were.

    In 8 bits are the products of every layer's attention and dense MLP, and of routed experts where that is asked for.
    Tables, the logits, routers and what Medusa's heads do are computed in the compute dtype. What is held in fewer bits
    already stays as it is.
    """
    scales = parameters.get(SCALES, {})
    parameters = {name: tree for name, tree in parameters.items() if name != SCALES}
    match products:
        case PlainProducts():
            return parameters
        case RoundedWeights():
            return jax.tree.map(lambda array, w: _rounded(products, array, w), declared(model), parameters)
        case Int8Products() | Float8Products():

            def narrow(array: shapes.Array, w: Weight) -> Weight:
                of_expert = products.experts and array.part is shapes.Part.EXPERTS and array.role is shapes.Role.PRODUCT
                if not ((shapes.is_linear(array) or of_expert) and isinstance(w, jax.Array)):
                    return w
                return Narrow(w, products, scales.get(array.name))

            return jax.tree.map(narrow, declared(model), parameters)
        case _:
            assert_never(products)


def _rounded(products: RoundedWeights, array: shapes.Array, w: Weight) -> Weight:
    if not isinstance(w, jax.Array):
        return w
    held: Weight = quantised(w, array, products.format, products.group_size)
    return w if isinstance(held, jax.Array) else w + jax.lax.stop_gradient(held.dense(w.dtype) - w)
