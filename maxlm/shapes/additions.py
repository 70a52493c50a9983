"""The arrays that an adapter adds, and which of its base are trained."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import assert_never

from maxlm.config import (
    ALL_LINEAR,
    AdaLora,
    Adapter,
    AdapterKind,
    Bottleneck,
    DyLora,
    Ia3,
    LlamaAdapter,
    Lora,
    LstmEncoder,
    MlpEncoder,
    PrefixTuning,
    PromptTuning,
    UserError,
)
from maxlm.shapes.array import Array, Constant, Normal, Part, Role

PREFIX = "adapter"
"""What an adapter adds lies under it, each array beside the name of what it changes."""


def with_adapter(adapter: Adapter, base: Sequence[Array]) -> list[Array]:
    """The arrays of the base, of which few are trained, and those of the adapter.

    Raises:
        UserError: a pattern of names has no array, or two say something else of one.
    """
    found = {array.name: replace(array, learning_rate=0.0) for array in base}
    for array in chosen("model.adapter.full", adapter.full, base):
        found[array.name] = array
    for array in targets(adapter.kind, base):
        if found[array.name].trained:
            raise UserError(f"model.adapter.full has {array.name}, which model.adapter.kind.targets has too; use one")
    new = [new for array in targets(adapter.kind, base) for new in added(adapter.kind, array)]
    return [*found.values(), *new, *_shared(adapter.kind)]


def targets(kind: AdapterKind, base: Sequence[Array]) -> list[Array]:
    """The matrices of the base that an adapter changes.

    Raises:
        UserError: a pattern has no matrix.
    """
    possible = [array for array in base if is_linear(array)]
    key = "model.adapter.kind.targets"
    match kind:
        case Lora(targets=patterns) | DyLora(targets=patterns) | AdaLora(targets=patterns):
            return chosen(key, patterns, possible)
        case Bottleneck(targets=patterns):
            return chosen(
                key, patterns, [array for array in possible if array.name.endswith(("/o_proj", "/down_proj"))]
            )
        case Ia3(targets=patterns, inputs_of=inputs_of):
            found = chosen(key, patterns, possible)
            more = chosen("model.adapter.kind.inputs_of", inputs_of, possible)
            if both := [array.name for array in more if array in found]:
                raise UserError(f"model.adapter.kind has {both[0]} in targets and inputs_of; use one")
            return found + more
        case PromptTuning():
            return [array for array in base if array.name == "embed"]
        case PrefixTuning():
            if any("from_latent" in array.dims for array in base):
                raise UserError("model.adapter.kind = PrefixTuning has keys and values, not latents as this model")
            return [array for array in possible if array.name.endswith(("attention/k_proj", "attention/v_proj"))]
        case LlamaAdapter():
            for dim, made in (("from_latent", "latents"), ("sinusoids", "distances")):
                if any(dim in array.dims for array in base):
                    raise UserError(
                        f"model.adapter.kind = LlamaAdapter has keys of its own, and those of this model have {made}"
                    )
            return [array for array in possible if array.name.endswith("attention/q_proj")]
        case _:
            assert_never(kind)


def is_input_of(kind: Ia3, array: Array) -> bool:
    """Whether an IA3 multiplies what goes into this one of its matrices."""
    return any(_fits(array.name, pattern) for pattern in kind.inputs_of)


def chosen(key: str, patterns: Sequence[str], arrays: Sequence[Array]) -> list[Array]:
    """Those arrays whose names end as one of the patterns does.

    Raises:
        UserError: no name does.
    """
    found = []
    for pattern in patterns:
        whole = pattern == ALL_LINEAR
        these = [array for array in arrays if whole or _fits(array.name, pattern)]
        if not these:
            ends = dict.fromkeys(array.name.split("/", 2)[-1] for array in arrays)
            words = dict.fromkeys(word for end in ends for word in (end, end.split("/")[-1]))
            near = difflib.get_close_matches(pattern, words, n=3, cutoff=0.0)
            raise UserError(f"{key} has {pattern!r}, and no array that it may name ends so; use {' or '.join(near)}")
        found += [array for array in these if array not in found]
    return found


def added(kind: AdapterKind, array: Array) -> Iterator[Array]:
    """What stands beside one matrix of the base."""
    sizes = dict(zip(array.dims, array.shape, strict=True))
    layers = {dim: sizes.pop(dim) for dim in ("layers",) if dim in sizes}
    inputs = {dim: sizes.pop(dim) for dim in array.inputs}

    def one(name: str, dims: dict[str, int], init: Normal | Constant, role: Role) -> Array:
        dims = layers | dims
        path = f"{PREFIX}/{array.name}/{name}"
        return Array(path, tuple(dims.values()), tuple(dims), init, role, Part.ADAPTER, array.uses)

    R, into = {"rank": _rank(kind)}, Normal((3 * math.prod(inputs.values())) ** -0.5)
    match kind:
        case Lora() | DyLora():
            yield one("a", inputs | R, into, Role.PRODUCT)
            yield one("b", R | sizes, Constant(0), Role.PRODUCT)
            if isinstance(kind, Lora) and kind.dora:
                yield one("magnitude", sizes, Constant(1), Role.OTHER)
        case AdaLora():
            for name, dims, init, role in (
                ("a", inputs | R, Normal(0.02), Role.PRODUCT),
                ("b", R | sizes, Normal(0.02), Role.PRODUCT),
                ("diagonal", R, Constant(0), Role.OTHER),
            ):
                yield one(name, dims, init, role)
                for mean in ("importance", "uncertainty"):
                    yield one(f"{name}_{mean}", dims, Constant(0), Role.OTHER)
        case Ia3():
            if is_input_of(kind, array):
                yield one("inputs", inputs, Constant(1), Role.OTHER)
            else:
                yield one("outputs", sizes, Constant(1), Role.OTHER)
        case Bottleneck():
            D = sizes["embed"]
            yield one("down", sizes | R, Normal((3 * D) ** -0.5), Role.PRODUCT)
            yield one("down_bias", R, Constant(0), Role.OTHER)
            yield one("up", R | sizes, Constant(0), Role.PRODUCT)
            yield one("up_bias", {"vector": D}, Constant(0), Role.OTHER)
        case PromptTuning(length=length, encoder=encoder):
            yield replace(one("rows", {"rank": length, "vector": array.shape[1]}, Normal(0.02), Role.OTHER), uses=0.0)
            for name, shape in _of_encoder(encoder, array.shape[1]):
                init = Constant(0) if len(shape) == 1 else Normal((3 * shape[0]) ** -0.5)
                path = f"{PREFIX}/{array.name}/{name}"
                role = Role.OTHER if len(shape) == 1 else Role.PRODUCT
                yield Array(path, shape, ("rank",) * len(shape), init, role, Part.ADAPTER, 0)
        case LlamaAdapter(length=length):
            yield replace(one("rows", {"rank": length} | inputs, Normal(0.02), Role.OTHER), uses=0.0)
            gates = {"rank": 1} if kind.one_gate else {"heads": sizes["heads"]}
            yield one("gate", gates, Constant(0), Role.OTHER)
        case PrefixTuning():
            if kind.hidden is None:
                yield replace(one("rows", {"rank": kind.length} | sizes, Normal(0.02), Role.OTHER), uses=0.0)
                return
            into = Normal((3 * kind.hidden) ** -0.5)
            yield replace(one("out", {"rank": kind.hidden} | sizes, into, Role.PRODUCT), uses=0.0)
            yield replace(one("out_bias", sizes, Constant(0), Role.OTHER), uses=0.0)
        case _:
            assert_never(kind)


def _rank(kind: AdapterKind) -> int:
    match kind:
        case Lora(rank=rank) | DyLora(rank=rank) | AdaLora(rank=rank):
            return rank
        case Bottleneck(size=size):
            return size
        case Ia3() | PromptTuning() | PrefixTuning() | LlamaAdapter():
            return 0
        case _:
            assert_never(kind)


def _of_encoder(encoder: MlpEncoder | LstmEncoder | None, D: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what makes a prompt's embeddings."""
    match encoder:
        case None:
            return
        case MlpEncoder(hidden=hidden):
            widths: tuple[int, ...] = (D, hidden, hidden, D)
        case LstmEncoder(hidden=hidden):
            widths = (2 * hidden, hidden, D)
            for way in ("forward", "backward"):
                yield f"{way}_inputs", (D, 4 * hidden)
                yield f"{way}_state", (hidden, 4 * hidden)
                yield f"{way}_bias", (4 * hidden,)
        case _:
            assert_never(encoder)
    for i, (into, out) in enumerate(itertools.pairwise(widths)):
        yield f"layer_{i}", (into, out)
        yield f"layer_{i}_bias", (out,)


def _shared(kind: AdapterKind) -> Iterator[Array]:
    """What all layers of a prefix are made of."""
    if isinstance(kind, PrefixTuning) and kind.hidden is not None:
        size = kind.hidden
        of = lambda name, shape, init, role: Array(
            f"{PREFIX}/prefix/{name}", shape, ("rank",) * len(shape), init, role, Part.ADAPTER, 0
        )
        yield of("rows", (kind.length, size), Normal(0.02), Role.OTHER)
        yield of("inner", (size, size), Normal((3 * size) ** -0.5), Role.PRODUCT)
        yield of("inner_bias", (size,), Constant(0), Role.OTHER)


def is_linear(array: Array) -> bool:
    """Whether it is a matrix that every token is multiplied by in a layer; experts are not."""
    of_layer = array.part in (Part.ATTENTION, Part.MLP)
    return of_layer and array.role is Role.PRODUCT and bool(array.inputs) and "experts" not in array.dims


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*/{pattern}")
