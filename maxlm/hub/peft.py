"""Adapters in the format of Hugging Face's `peft`: adapter_config.json and adapter_model.safetensors.

A tensor is called `base_model.model.`, the name of the base's module, and what the adapter has there: `lora_A.weight`
[rank, inputs], `lora_B.weight` [outputs, rank], `lora_magnitude_vector` [outputs]; of AdaLoRA `lora_A`, `lora_B` and
`lora_E` [rank, 1]; or `ia3_l` ([outputs, 1], or [1, inputs] of feedforward_modules). Since B begins as zeros, an
adapter under a wrong name does nothing and says nothing: so every name must be there, and no other (their
docs/source/developer_guides/checkpoint.md).

What is written: `Lora`, and as plain LoRA `DyLora` (its largest rank); `AdaLora`; `Ia3`; and by peft_prompts.py the
kinds with learned vectors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never

import jax.numpy as jnp
import numpy as np

from maxlm import shapes
from maxlm.config import (
    AdaLora,
    Adapter,
    Bottleneck,
    DyLora,
    Ia3,
    LlamaAdapter,
    Lora,
    ModelConfig,
    PrefixTuning,
    PromptTuning,
    UserError,
)
from maxlm.config.json_file import read_object
from maxlm.hub.folder import Pieces
from maxlm.hub.names import Names, Piece, Tensor, Transposed, tensors, to_ours, to_theirs
from maxlm.hub.peft_files import BASE_MODEL, FILE, PeftAdapter, Values, exactly, require_shape, write_files
from maxlm.hub.peft_prompts import PROMPTS, read_prompts, write_prompts
from maxlm.hub.peft_settings import (
    ADDED_TO_RANK,
    CONFIG,
    adalora_of,
    ends,
    is_target,
    kept_triplets,
    rank_of,
    require_known,
    said_of_adalora,
    said_of_lora,
    short,
)
from maxlm.models.adapters import base_of, replaced
from maxlm.shapes import Array


def read_peft(folder: Path, base: ModelConfig, names: Names) -> PeftAdapter:
    """A folder as an adapter of a model.

    Args:
        folder: with CONFIG and FILE.
        base: the model that it is for.
        names: what the family of that calls its tensors.

    Raises:
        UserError: a file is missing or damaged, says something that is not understood, lacks a tensor that it should
            have, has another one, or one of another shape than the base's; or the kind is not one of ours.
    """
    said = read_object(folder / CONFIG, "the settings of an adapter, as peft writes them")
    require_known(folder, said)
    if said.get("peft_type") in PROMPTS:
        return read_prompts(folder, said, base, names)
    linear = {array.name for array in shapes.arrays(base) if shapes.is_linear(array)}
    whole = tensors(base, names)
    modules = {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in whole
        if tensor.name.endswith(".weight") and all(part.array.name in linear for part in tensor.parts)
    }
    modules = {name: tensor for name, tensor in modules.items() if is_target(folder, said, name)}
    saved = [tensor for tensor in whole if ends(tensor.name.rpartition(".")[0], said.get("modules_to_save") or [])]
    for name in said.get("modules_to_save") or []:
        if not any(ends(tensor.name.rpartition(".")[0], [name]) for tensor in saved):
            raise UserError(f"{folder / CONFIG}: modules_to_save has {name}, which this base has not")
    own = _endings(folder, said)
    wanted = {f"{BASE_MODEL}{name}.{ending}" for name in modules for ending in own}
    wanted |= {BASE_MODEL + tensor.name for tensor in saved}
    tied = BASE_MODEL + _head(names) if base.tied and said.get("ensure_weight_tying") else None
    with exactly(folder, wanted, [tied] if tied else []) as files:
        if tied in files.entries and not any(
            np.array_equal(files.read(tied), files.read(BASE_MODEL + one.name)) for one in saved
        ):
            raise UserError(f"{folder / FILE}: {tied} differs from the embedding table, which the base ties it to")
        read = lambda name: np.asarray(files.read(BASE_MODEL + name), np.float32)
        found = {name: {ending: read(f"{name}.{ending}") for ending in own} for name in modules}
        full = {tensor.name: read(tensor.name) for tensor in saved}
    adapter = Adapter(kind=_kind(folder, said, modules, found), full=_full(saved))
    if base.tied and "embed" in adapter.full and not said.get("ensure_weight_tying"):
        raise UserError(
            f"{folder / CONFIG}: modules_to_save has the embedding table, which is the head's too in this base, but "
            "without ensure_weight_tying peft has trained one of the two alone; merge it with peft"
        )
    made = dataclasses.replace(base, adapter=adapter)
    declared = {array.name: array for array in shapes.arrays(made)}
    arrays: dict[str, Values] = {}
    norms: dict[str, float] = {}

    def put(array: Array, at: tuple[int, ...], values: Values) -> None:
        initial = 1.0 if array.init == shapes.Constant(1) else 0.0
        arrays.setdefault(array.name, np.full(array.shape, initial, np.float32))[at] = values

    for name, tensor in modules.items():
        for piece, values in _own_pieces(folder, said, adapter, tensor, found[name], declared):
            put(piece.array, piece.at, values)
        norms[name] = _norm(said, name, found[name])
    for tensor in saved:
        require_shape(folder, tensor.name, full[tensor.name], tensor.shape)
        for piece, values in zip(tensor.parts, tensor.split(full[tensor.name]), strict=True):
            put(piece.array, piece.at, values)
    for name, array in declared.items():
        if name.startswith(f"{shapes.PREFIX}/"):  # the means by which AdaLoRA chooses, which peft does not keep
            arrays.setdefault(name, np.zeros(array.shape, np.float32))
    return PeftAdapter(adapter=adapter, arrays=arrays, norms=norms)


def over(base: ModelConfig, parameters: dict[str, Any], read: PeftAdapter) -> tuple[ModelConfig, dict[str, Any]]:
    """A model with an adapter, and its parameters, of those of its base."""
    model = dataclasses.replace(base, adapter=read.adapter)
    for name, values in read.arrays.items():
        parameters = replaced(parameters, name.split("/"), jnp.asarray(values))
    return model, parameters


def write_peft(folder: Path, config: ModelConfig, pieces: Pieces, names: Names, base: str | None) -> dict[str, float]:
    """Write an adapter alone.

    Args:
        folder: new.
        config: the model, with its adapter.
        pieces: parts of the arrays of its parameters.
        names: what the family of its base calls the tensors.
        base: where that is, for other programs; None: they are told.

    Returns:
        As `PeftAdapter.norms`.

    Raises:
        UserError: peft has no such kind; matrices that are one in the family's files cannot be told apart there; or
            something is at `folder`.
    """
    adapter = config.adapter
    assert adapter is not None
    if isinstance(adapter.kind, PromptTuning | PrefixTuning | LlamaAdapter):
        return write_prompts(folder, config, pieces, names, base)
    declared = {array.name: array for array in shapes.arrays(config)}
    of_base, own = tensors(base_of(config), names), _Own(config, pieces, declared)
    changed = {array.name for array in shapes.targets(adapter.kind, shapes.arrays(base_of(config)))}
    at_modules: dict[str, dict[str, Values]] = {}
    transposed = set()
    inputs_of = []
    for tensor in of_base:
        parts = [part for part in tensor.parts if part.array.name in changed]
        if not parts:
            continue
        module = tensor.name.removesuffix(".weight")
        transposed.add(isinstance(tensor.layout, Transposed))
        at_modules[module] = own.theirs(tensor, changed)
        if isinstance(adapter.kind, Ia3) and "inputs" in own.names(parts[0]):
            inputs_of.append(module)
    modules = list(at_modules)
    everything = [tensor.name.removesuffix(".weight") for tensor in of_base if tensor.name.endswith(".weight")]
    of_kind, at_modules = _said(adapter, at_modules, short(inputs_of, everything))
    out = {f"{BASE_MODEL}{module}.{end}": one for module, ends in at_modules.items() for end, one in ends.items()}
    full = {array.name for array in declared.values() if array.trained and not array.name.startswith(shapes.PREFIX)}
    saved = [tensor for tensor in of_base if any(part.array.name in full for part in tensor.parts)]
    for tensor in saved:
        out[BASE_MODEL + tensor.name] = np.asarray(tensor.join(pieces(tensor.parts)), np.float32)
        if config.tied and tensor.parts[0].array.name == "embed":  # peft wants both, and keeps them one
            out[BASE_MODEL + _head(names)] = out[BASE_MODEL + tensor.name]
    said = {
        "bias": "none",
        **({"ensure_weight_tying": True} if config.tied and "embed" in full else {}),
        "fan_in_fan_out": transposed == {True},
        "modules_to_save": sorted({tensor.name.rpartition(".")[0] for tensor in saved}) or None,
        "target_modules": short(modules, everything),
        **of_kind,
    }
    write_files(folder, base, said, out)
    return {module: _norm(said, module, ends) for module, ends in at_modules.items()}


def _said(
    adapter: Adapter, at_modules: dict[str, dict[str, Values]], inputs_of: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Values]]]:
    """What adapter_config.json has of a kind alone, and what stands at the modules, as peft computes with both."""
    match kind := adapter.kind:
        case Lora() | DyLora():
            ranks = {module: len(own["lora_A.weight"]) for module, own in at_modules.items()}
            grown = {module: rank for module, rank in ranks.items() if rank != kind.rank}
            return said_of_lora(kind, grown), at_modules
        case AdaLora():
            rank = max(len(own["lora_A"]) for own in at_modules.values())  # of all alike in peft
            return said_of_adalora(kind, rank), {module: _filled(own, rank) for module, own in at_modules.items()}
        case Ia3():
            return {"peft_type": "IA3", "feedforward_modules": list(inputs_of)}, at_modules
        case Bottleneck() | PromptTuning() | PrefixTuning() | LlamaAdapter():
            raise AssertionError("written elsewhere, or refused before")
        case _:
            assert_never(kind)


def _filled(own: Mapping[str, Values], rank: int) -> dict[str, Values]:
    """Triplets of one module with as many zeros as make that rank, and with what undoes peft's 1e-5."""
    more = rank - len(own["lora_A"])
    return {
        "lora_A": np.pad(own["lora_A"], [(0, more), (0, 0)]),
        "lora_B": np.pad(own["lora_B"], [(0, 0), (0, more)]),
        "lora_E": np.pad(own["lora_E"], [(0, more), (0, 0)]) * np.float32((rank + ADDED_TO_RANK) / rank),
    }


class _Own:
    """An adapter's arrays in the shapes of peft."""

    def __init__(self, config: ModelConfig, pieces: Pieces, declared: Mapping[str, Array]) -> None:
        assert config.adapter is not None
        self._kind, self._pieces, self._declared = config.adapter.kind, pieces, declared

    def names(self, part: Piece) -> list[str]:
        """Of what the adapter has at a matrix of the base."""
        prefix = f"{shapes.PREFIX}/{part.array.name}/"
        return [name.removeprefix(prefix) for name in self._declared if name.startswith(prefix)]

    def theirs(self, tensor: Tensor, changed: set[str]) -> dict[str, Values]:
        """What peft has at one module, by the ends of names."""
        here = [part.array.name in changed for part in tensor.parts]
        match kind := self._kind:
            case Lora() | DyLora():
                a, b, _ = self._low_rank(tensor, here)
                magnitude = self._magnitude(tensor, here)
                return {"lora_A.weight": a, "lora_B.weight": b, **magnitude}
            case AdaLora():
                a, b, diagonal = self._low_rank(tensor, here)
                return {"lora_A": a, "lora_B": b, "lora_E": diagonal[:, None]}
            case Ia3():
                if "inputs" in self.names(tensor.parts[here.index(True)]):
                    if len(tensor.parts) > 1:
                        raise UserError(f"{tensor.name}: peft has one input of {len(tensor.parts)} matrices; use Lora")
                    return {"ia3_l": self._one(tensor.parts[0], "inputs", ()).T}
                outputs = self._joined(tensor, here, "outputs", (), 1.0)
                return {"ia3_l": outputs[:, None]}
            case Bottleneck():
                raise UserError("model.adapter.kind = Bottleneck is not written in peft's format; use the run folder")
            case PromptTuning() | PrefixTuning() | LlamaAdapter():
                raise AssertionError(f"{type(kind).__name__} is written elsewhere")
            case _:
                assert_never(kind)

    def _low_rank(self, tensor: Tensor, here: Sequence[bool]) -> tuple[Values, Values, Values]:
        """A [rank, inputs], B [outputs, rank], and what stands between them, [rank]: ones, or AdaLoRA's L.

        The parts of a tensor share one A in peft: if ours do not, theirs is all of them one below another."""
        targeted = [part for part, there in zip(tensor.parts, here, strict=True) if there]
        parts = [self._one(part, "a", part.array.inputs) for part in targeted]
        between = [self._diagonal(part, len(a)) for part, a in zip(targeted, parts, strict=True)]
        if all(np.array_equal(a, parts[0]) for a in parts) and all(np.array_equal(e, between[0]) for e in between):
            return parts[0], self._joined(tensor, here, "b", ("rank",), 0.0), between[0]
        alone = [[part is one for part in tensor.parts] for one in targeted]
        b = [self._joined(tensor, only, "b", ("rank",), 0.0) for only in alone]
        return np.concatenate(parts), np.concatenate(b, axis=1), np.concatenate(between)

    def _diagonal(self, part: Piece, rank: int) -> Values:
        if not isinstance(self._kind, AdaLora):
            return np.ones(rank, np.float32)
        return self._values(self._array(part, "diagonal", ()))

    def _magnitude(self, tensor: Tensor, here: Sequence[bool]) -> dict[str, Values]:
        """Nothing but of DoRA."""
        if "magnitude" not in self.names(tensor.parts[here.index(True)]):
            return {}
        if not all(here):
            raise UserError(f"{tensor.name}: peft has one length for all its matrices; let targets name them all")
        return {"lora_magnitude_vector": self._joined(tensor, here, "magnitude", (), 1.0)}

    def _array(self, part: Piece, name: str, inputs: tuple[str, ...]) -> Piece:
        array = self._declared[f"{shapes.PREFIX}/{part.array.name}/{name}"]
        return Piece(dataclasses.replace(array, inputs=inputs), part.at)

    def _values(self, piece: Piece) -> Values:
        (found,) = self._pieces([piece])
        return np.asarray(found, np.float32)

    def _one(self, part: Piece, name: str, inputs: tuple[str, ...]) -> Values:
        """[outputs, inputs]."""
        piece = self._array(part, name, inputs)
        return to_theirs(self._values(piece), piece)

    def _joined(self, tensor: Tensor, here: Sequence[bool], name: str, inputs: tuple[str, ...], other: float) -> Values:
        """Of all parts, with the same number everywhere in those that have none."""
        first = tensor.parts[here.index(True)]
        found, values = [], []
        for part, there in zip(tensor.parts, here, strict=True):
            if there:
                piece = self._array(part, name, inputs)
                values.append(self._values(piece))
            else:
                like = self._array(first, name, inputs).array
                sizes = dict(zip(like.dims, like.shape, strict=True)) | part.dims
                dims = {dim: sizes[dim] for dim in (*inputs, *part.outputs)}
                piece = Piece(dataclasses.replace(like, dims=tuple(dims), shape=tuple(dims.values())), ())
                values.append(np.full(tuple(dims.values()), other, np.float32))
            found.append(piece)
        return _outputs_only(tensor, found).join(values)


def _outputs_only(tensor: Tensor, parts: Sequence[Piece]) -> Tensor:
    """How other arrays with the same outputs lie in a tensor."""
    layout = tensor.layout.inner if isinstance(tensor.layout, Transposed) else tensor.layout
    return Tensor(tensor.name, layout, tuple(parts))


def _own_pieces(
    folder: Path,
    said: Mapping[str, Any],
    adapter: Adapter,
    tensor: Tensor,
    found: Mapping[str, Values],
    declared: Mapping[str, Array],
) -> Iterator[tuple[Piece, Values]]:
    """Our arrays of what peft has at one module."""
    first = tensor.parts[0]
    rows, columns = sum(part.rows for part in tensor.parts), first.size(first.inputs)
    module = tensor.name.removesuffix(".weight")
    mine = lambda part, name, inputs: Piece(
        dataclasses.replace(declared[f"{shapes.PREFIX}/{part.array.name}/{name}"], inputs=inputs), part.at
    )
    match kind := adapter.kind:
        case Lora():
            a, b = found["lora_A.weight"], found["lora_B.weight"]
            if (rank := len(a)) != (told := rank_of(said, module)):
                raise UserError(
                    f"{folder / CONFIG}: says rank {told} of {module}, whose tensors in {FILE} have {rank}; use both "
                    "files from one place"
                )
            require_shape(folder, f"{module}: A", a, (rank, columns))
            require_shape(folder, f"{module}: B", b, (rows, rank))
            b = b * (_scale(said, module, rank) / kind.scale)
            a, b = np.pad(a, [(0, kind.rank - rank), (0, 0)]), np.pad(b, [(0, 0), (0, kind.rank - rank)])
            for part in tensor.parts:
                piece = mine(part, "a", part.inputs)
                yield piece, to_ours(a, piece)
            pieces = [mine(part, "b", ("rank",)) for part in tensor.parts]
            yield from zip(pieces, _outputs_only(tensor, pieces).split(b), strict=True)
            if kind.dora:
                magnitude = found["lora_magnitude_vector"]
                require_shape(folder, f"{module}: magnitudes", magnitude, (rows,))
                pieces = [mine(part, "magnitude", ()) for part in tensor.parts]
                yield from zip(pieces, _outputs_only(tensor, pieces).split(magnitude), strict=True)
        case AdaLora():
            kept = kept_triplets(folder, said, module, kind.rank)
            for name, shape in (
                ("lora_A", (len(kept), columns)), ("lora_B", (rows, len(kept))), ("lora_E", (len(kept), 1)),
            ):  # fmt: skip
                require_shape(folder, f"{module}.{name}", found[name], shape)
            a, b, diagonal = (
                np.zeros(shape, np.float32) for shape in ((kind.rank, columns), (rows, kind.rank), kind.rank)
            )
            a[kept], b[:, kept] = found["lora_A"], found["lora_B"]
            diagonal[kept] = found["lora_E"][:, 0] * np.float32(_scale(said, module, kind.rank) / kind.scale)
            for part in tensor.parts:
                piece = mine(part, "a", part.inputs)
                yield piece, to_ours(a, piece)
                yield mine(part, "diagonal", ()), diagonal
            pieces = [mine(part, "b", ("rank",)) for part in tensor.parts]
            yield from zip(pieces, _outputs_only(tensor, pieces).split(b), strict=True)
        case Ia3():
            values = found["ia3_l"]
            if shapes.is_input_of(kind, first.array):
                require_shape(folder, module, values, (1, columns))
                for part in tensor.parts:
                    piece = mine(part, "inputs", ())
                    yield piece, to_ours(values[0], piece)
            else:
                require_shape(folder, module, values, (rows, 1))
                pieces = [mine(part, "outputs", ()) for part in tensor.parts]
                yield from zip(pieces, _outputs_only(tensor, pieces).split(values[:, 0]), strict=True)
        case _:
            raise AssertionError(f"{type(kind).__name__} is not read")


def _kind(
    folder: Path, said: Mapping[str, Any], modules: Mapping[str, Tensor], found: Mapping[str, Mapping[str, Values]]
) -> Lora | AdaLora | Ia3:
    names = sorted({part.array.name for tensor in modules.values() for part in tensor.parts})
    if said["peft_type"] == "IA3":
        ahead = [name for name in modules if ends(name, said.get("feedforward_modules") or [])]
        inputs_of = sorted({part.array.name for name in ahead for part in modules[name].parts})
        return Ia3(targets=tuple(name for name in names if name not in inputs_of), inputs_of=tuple(inputs_of))
    if said["peft_type"] == "ADALORA":
        return adalora_of(said, names)
    dora = bool(said.get("use_dora"))
    layers = {
        part.array.name: math.prod(part.array.shape[: len(part.at)]) for t in modules.values() for part in t.parts
    }
    if dora and sum(len(tensor.parts) for tensor in modules.values()) != sum(layers.values()):
        raise UserError(f"{folder / CONFIG}: use_dora with some layers alone is not read; merge it with peft")
    ranks = {name: len(own["lora_A.weight"]) for name, own in found.items()}
    rank = max(ranks.values())
    scales = {_scale(said, name, ranks[name]) for name in modules}
    stabilized = bool(said.get("use_rslora"))
    scale = scales.pop() if len(scales) == 1 else 1.0
    return Lora(
        rank=rank,
        alpha=float(scale * (math.sqrt(rank) if stabilized else rank)),
        rank_stabilized=stabilized,
        dora=dora,
        dropout=float(said.get("lora_dropout") or 0.0),
        targets=tuple(names),
    )


def _scale(said: Mapping[str, Any], module: str, rank: int) -> float:
    """Of a module's B A, as peft computes it."""
    if said["peft_type"] == "ADALORA":
        return adalora_of(said, ["*"]).alpha / (rank + ADDED_TO_RANK)
    patterns = said.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if ends(module, [key])), said.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if said.get("use_rslora") else rank)


def _norm(said: Mapping[str, Any], module: str, found: Mapping[str, Values]) -> float:
    if "ia3_l" in found:
        return float(np.linalg.norm(found["ia3_l"].astype(np.float64) - 1))
    if "lora_E" in found:
        a, b, rank = found["lora_A"] * found["lora_E"], found["lora_B"], adalora_of(said, ["*"]).rank
    else:
        a, b, rank = found["lora_A.weight"], found["lora_B.weight"], len(found["lora_A.weight"])
    a, b = a.astype(np.float64), b.astype(np.float64)
    square = np.sum((a @ a.T) * (b.T @ b))  # of a product of low rank, which is never made
    return float(_scale(said, module, rank) * math.sqrt(max(square, 0.0)))


def _endings(folder: Path, said: Mapping[str, Any]) -> list[str]:
    match said.get("peft_type"):
        case "LORA":
            return ["lora_A.weight", "lora_B.weight", *["lora_magnitude_vector"] * bool(said.get("use_dora"))]
        case "ADALORA":
            return ["lora_A", "lora_B", "lora_E"]
        case "IA3":
            return ["ia3_l"]
        case other:
            known = ", ".join(["LORA", "ADALORA", "IA3", *PROMPTS])
            raise UserError(f"{folder / CONFIG}: peft_type = {other!r} must be one of {known}")


def _head(names: Names) -> str:
    """What a family calls an output table."""
    return next((theirs for theirs, ours in names.top.items() if ours == "unembed"), "lm_head.weight")


def _full(saved: Sequence[Tensor]) -> tuple[str, ...]:
    return tuple(sorted({part.array.name for tensor in saved for part in tensor.parts}))
