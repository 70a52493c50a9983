"""Models with an adapter: merged with their base, alone in peft's format, and back."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maxlm import shapes
from maxlm.checkpoint.reference import PUBLISHED, run_and_step
from maxlm.config import ChosenModel, ModelConfig, UserError
from maxlm.hub.converting import Opened, family_of_origin, open_published, open_run, write_run
from maxlm.hub.family import ModelFamily
from maxlm.hub.folder import family_of
from maxlm.hub.models import KINDS, open_base, pieces_of
from maxlm.hub.names import Names, Piece
from maxlm.hub.peft import over, read_peft, write_peft
from maxlm.hub.peft_settings import CONFIG
from maxlm.inference import load
from maxlm.inference.bases import Base, BaseReference
from maxlm.inference.mixed_adapters import LoadedAdapter
from maxlm.models import declared
from maxlm.models.adapters import base_of, without_makers
from maxlm.models.merging import Weighted, merged, weighted_sum

_SHOWN = 8


def merge(opened: Opened) -> Opened:
    """A model without an adapter that computes what this one does with its own; it is held in memory.

    Raises:
        UserError: its adapter is of a kind that cannot be merged.
    """
    parameters = jax.jit(functools.partial(merged, opened.model))(opened.parameters())
    return _holding(opened, base_of(opened.model), parameters)


def write_adapter(opened: Opened, folder: Path) -> Iterator[str]:
    """A model's adapter alone, as peft has it.

    Returns:
        What is to be told.

    Raises:
        UserError: it has none, or as `write_peft`.
    """
    if opened.model.adapter is None:
        raise UserError(f"{opened.place}: has no adapter; --to peft:DIR takes a run with model.adapter")
    if (model := without_makers(opened.model)) != opened.model:  # what a run's parameters are when they are loaded
        opened = _holding(opened, model, opened.parameters())
    names = _names(opened.model, opened.family)
    yield from _told(write_peft(folder, opened.model, opened.pieces, names, _place_of_base(opened)))


def open_on_base(folder: Path, place: str) -> tuple[Opened, list[str]]:
    """A folder of peft as a model with an adapter, on a base as `checkpoint.init_from` names it.

    Returns:
        The model, and what is to be told.

    Raises:
        UserError: there is no such base, or as `read_peft`.
    """
    kind, _, path = place.partition(":")
    base = open_published(KINDS[kind](Path(path))) if kind in KINDS else open_run(Path(path if path else place))
    if base.model.adapter is not None:
        raise UserError(f"--base {place}: has an adapter; merge it first, with --to hf:DIR or --to run:DIR")
    read = read_peft(folder, base.model, _names(base.model, base.family))
    model, parameters = over(base.model, base.parameters(), read)
    checkpoint = dataclasses.replace(base.config.checkpoint, init_from=place)
    opened = dataclasses.replace(base, config=dataclasses.replace(base.config, model=model, checkpoint=checkpoint))
    return _holding(opened, model, parameters), list(_told(read.norms))


def write_adapter_run(opened: Opened, folder: Path) -> None:
    """A run folder of what `open_on_base` made, which has the adapter alone.

    Raises:
        UserError: as `write_run`.
    """
    assert opened.config.checkpoint.init_from is not None
    base = open_base(opened.config.checkpoint.init_from)
    own = jax.tree.map(lambda array, x: x if array.trained else None, declared(opened.model), opened.parameters())
    reference = BaseReference(place=base.place, fingerprint=base.fingerprint())
    write_run(opened, folder, parameters=own, more={"base": reference.to_json()})


def load_adapters(chosen: ChosenModel, named: Sequence[str]) -> dict[str, LoadedAdapter]:
    """Adapters of what a command line names, from `NAME=DIR`, a run folder or a folder of peft each; or sums of such,
    `NAME=0.7*DIR+0.3*DIR`, and with one, NAME=0.5*DIR, a weaker one.

    Raises:
        UserError: one is not written so, a name comes twice, or as `load.load_adapter`, `read_peft`, `weighted_sum`.
    """
    found = dict[str, LoadedAdapter]()
    base = open_base(_place(chosen)) if named else None
    for one in named:
        name, equals, text = one.partition("=")
        if not (name and equals and text) or name in found:
            why = "comes twice" if name in found else "must be NAME=DIR"
            raise UserError(f"--adapter {one} {why}; use a name of its own for each, as in --adapter sums=runs/sums")
        assert base is not None
        found[name] = _load(text, base)
    return found


def _load(text: str, base: Base) -> LoadedAdapter:
    def one(folder: Path) -> LoadedAdapter:
        return load_peft_adapter(folder, base) if (folder / CONFIG).is_file() else load.load_adapter(folder, base)

    if Path(text).exists() or "*" not in text:
        return one(Path(text))
    parts = list[Weighted]()
    for term in text.split("+"):
        weight, _, folder = term.partition("*")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or not folder:
            raise UserError(f"--adapter ...={text}: {term!r} must be WEIGHT*DIR, as in 0.7*runs/sums+0.3*runs/words")
        parts.append(Weighted(*one(Path(folder)), number))
    adapter, arrays = weighted_sum(parts)
    return LoadedAdapter(dataclasses.replace(base.model, adapter=adapter), arrays)


def load_peft_adapter(folder: Path, base: Base) -> LoadedAdapter:
    """A folder of peft beside a base in memory.

    Raises:
        UserError: as `read_peft`.
    """
    read = read_peft(folder, base.model, _names(base.model, _family_of(base)))
    model, parameters = over(base.model, {}, read)
    return LoadedAdapter(model, parameters.get(shapes.PREFIX, {}))


def _holding(opened: Opened, model: ModelConfig, parameters: Any) -> Opened:
    pieces = pieces_of(parameters)
    return dataclasses.replace(
        opened,
        model=model,
        config=dataclasses.replace(opened.config, model=model),
        pieces=pieces,
        layer=lambda array, number: pieces([Piece(array, () if number is None else (number,))])[0],
        parameters=lambda: parameters,
        dtype=str(jnp.float32.dtype),
        quantised=None,
    )


def _names(model: ModelConfig, origin: ModelFamily | None) -> Names:
    base = base_of(model)
    return family_of(base, origin)[0].names_of(base)


def _family_of(base: Base) -> ModelFamily | None:
    kind, _, path = base.place.partition(":")
    if kind in KINDS:
        return KINDS[kind](Path(path)).weights.family
    return family_of_origin(run_and_step(base.place)[0] / PUBLISHED)


def _place_of_base(opened: Opened) -> str | None:
    """Where other programs find it."""
    kind, _, path = (opened.config.checkpoint.init_from or "").partition(":")
    return path if kind == "hf" else None


def _told(norms: dict[str, float]) -> Iterator[str]:
    """How much the adapter changes: a module of which it changes nothing was not trained, or not read."""
    ranked = sorted(norms.items(), key=lambda pair: -pair[1])
    yield f"{len(norms)} modules, norms of what the adapter adds from {ranked[-1][1]:.3g} to {ranked[0][1]:.3g}:"
    for name, norm in ranked[:_SHOWN]:
        yield f"  {norm:10.4g}  {name}"
    if len(ranked) > _SHOWN:
        yield f"  ... and {len(ranked) - _SHOWN} more"
    if still := [name for name, norm in ranked if norm == 0]:
        yield f"{len(still)} of them are 0, where it does nothing: {', '.join(still[:3])}{', ...' * (len(still) > 3)}"


def _place(chosen: ChosenModel) -> str:
    """As `checkpoint.init_from` names it."""
    if chosen.run is not None:
        return chosen.run if chosen.step is None else str(Path(chosen.run, "checkpoints", str(chosen.step)))
    return next(f"{kind}:{place}" for kind in KINDS if (place := getattr(chosen, kind)) is not None)
