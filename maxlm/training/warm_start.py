"""A new run that starts from the parameters of another one (`checkpoint.init_from`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import PartitionSpec

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.reference import keep_published, run_and_step
from maxlm.checkpoint.store import Record
from maxlm.config import ModelConfig, RunConfig, UserError, serialize
from maxlm.config.changes import changes
from maxlm.models import abstract_parameters
from maxlm.models.upcycle import upcycle
from maxlm.models.weights.holding import QUANTISED
from maxlm.sharding import Layout
from maxlm.training.state import TrainState
from maxlm.training.step import Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStart:
    """A state at step 0, and where its parameters come from."""

    state: TrainState
    step: int
    """Of the other run, its newest intact one where none was named."""
    changes: tuple[str, ...]
    """What the other run's model has otherwise: `key: old -> new`."""
    keep: Callable[[Path], None]
    """As of `Source`."""
    base: Mapping[str, str] | None = None
    """What checkpoints say of the base, if the model has an adapter."""


Start = Callable[[Trainer, TrainState | None, Mapping[str, str] | None], WarmStart]
"""Trainer; the state that the newest checkpoint has, and what that says of the base, both None in a new run -> the
state to begin with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Parameters of another model, and what came with them."""

    parameters: Any
    """As the shapes say that they were asked for with."""
    model: ModelConfig
    """As it was trained."""
    tokenizer: str | None
    """Fingerprint of the tokenizer that it was trained with; None: not known."""
    step: int = 0


class Source(Protocol):
    """Where parameters come from."""

    model: ModelConfig
    """Whose arrays it has."""

    def read(self, shapes: dict[str, Any]) -> Origin:
        """The parameters, in the shardings of these `jax.ShapeDtypeStruct`s of all arrays."""
        ...

    def keep(self, run_dir: Path) -> None:
        """Write what a published model came with into the folder of the new run, as `PUBLISHED` says."""
        ...


class RunSource:
    """A run folder, or one of its checkpoints, RUN_DIR/checkpoints/STEP."""

    def __init__(self, place: str) -> None:
        self._path, self._step = run_and_step(place)
        self._config = serialize.load(RunConfig, self._path / "config.json")
        self.model = self._config.model
        if self.model.adapter is not None:
            raise UserError(
                f"{self._path}: has an adapter; merge it (python -m maxlm.convert --from run:{self._path} --to hf:DIR) "
                "and name what that writes"
            )

    def read(self, shapes: dict[str, Any]) -> Origin:
        def plain(record: Record) -> dict[str, Any]:
            if record.meta.get(QUANTISED):
                raise UserError(f"{self._path}: its weights are quantised; start from the run that it was made of")
            return shapes

        with Checkpointer(self._path / "checkpoints", self._config.checkpoint) as checkpointer:
            restored = checkpointer.restore_params(self._step, plain)
        trained = restored.meta.get("config")  # of this very step
        return Origin(
            parameters=restored.params,
            model=serialize.from_dict(RunConfig, trained).at(restored.step - 1).model if trained else self.model,
            tokenizer=restored.meta["tokenizer"],
            step=restored.step,
        )

    def keep(self, run_dir: Path) -> None:
        keep_published(self._path, run_dir)


def warm_start(
    place: str,
    open_source: Callable[[str], Source],
    model: ModelConfig,
    layout: Layout,
    trainer: Trainer,
    tokenizer: str,
    key: str = "checkpoint.init_from",
) -> WarmStart:
    """A new state of `trainer` with the parameters of another model, mapped to `model` by `upcycle`.

    Args:
        place: of the other one.
        open_source: what finds it there, as RunSource does.
        model: of this run.
        layout: of this run; the other one's does not matter.
        trainer: of this run.
        tokenizer: fingerprint of this run's.
        key: of the config, that names it.

    Raises:
        UserError: there is nothing, it is damaged, has another tokenizer, or does not fit the model.
    """
    try:
        source = open_source(place)
        shapes = _source_shapes(source.model, layout)
        start = functools.partial(upcycle, source.model, model)
        jax.eval_shape(start, shapes, trainer.state.parameters)  # what does not fit is said before anything is read
        origin = source.read(shapes)
        check_tokenizer(origin.tokenizer, tokenizer)
    except UserError as error:
        raise UserError(f"{key} = {place}: {error}") from error
    initial = trainer.init().parameters
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trainer.state.parameters)
    parameters = jax.jit(start, out_shardings=shardings, donate_argnums=1)(origin.parameters, initial)
    return WarmStart(
        state=trainer.begin(parameters),
        step=origin.step,
        changes=tuple(str(one) for one in changes(origin.model, model, "model.")),
        keep=source.keep,
    )


def check_tokenizer(there: str | None, here: str) -> None:
    """Compare fingerprints: of the one that a model was trained with, None where nobody knows, and of this run's.

    Raises:
        UserError: they differ.
    """
    if there is not None and there != here:
        raise UserError(
            f"was trained with tokenizer {there[:12]}..., the data has {here[:12]}...; prepare the data with that "
            "model's tokenizer"
        )


def _source_shapes(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    """What to read of the other run: stacks that this mesh's stages cannot cut are whole on each stage."""
    shapes = abstract_parameters(model, layout)
    if model.repeats % layout.mesh.shape["stage"] == 0:
        return shapes

    def uncut(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(*(None if axes == "stage" else axes for axes in leaf.sharding.spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(spec))

    return jax.tree.map(uncut, shapes)
