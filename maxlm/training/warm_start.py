"""A new run that starts from the parameters of another one (`checkpoint.init_from`)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.reference import run_and_step
from maxlm.config import ModelConfig, RunConfig, UserError, serialize
from maxlm.config.changes import changes
from maxlm.models import abstract_parameters
from maxlm.models.upcycle import upcycle
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


def warm_start(place: str, model: ModelConfig, layout: Layout, trainer: Trainer, tokenizer: str) -> WarmStart:
    """A new state of `trainer` with the parameters of another run, mapped to `model` by `upcycle`.

    Args:
        place: a run folder, or one of its checkpoints, RUN_DIR/checkpoints/STEP.
        model: of this run.
        layout: of this run; the other one's does not matter.
        trainer: of this run.
        tokenizer: fingerprint of this run's.

    Raises:
        UserError: no such run or checkpoint, it is damaged, has another tokenizer, or does not fit the model.
    """
    path, step = run_and_step(place)
    try:
        source = serialize.load(RunConfig, path / "config.json")
        shapes = _source_shapes(source.model, layout)
        start = functools.partial(upcycle, source.model, model)
        jax.eval_shape(start, shapes, trainer.state.parameters)  # what does not fit is said before anything is read
        with Checkpointer(path / "checkpoints", source.checkpoint) as checkpointer:
            restored = checkpointer.restore_params(step, shapes)
    except UserError as error:
        raise UserError(f"checkpoint.init_from = {place}: {error}") from error
    if restored.meta["tokenizer"] != tokenizer:
        raise UserError(
            f"checkpoint.init_from = {place}: was trained with tokenizer {restored.meta['tokenizer'][:12]}..., the "
            f"data has {tokenizer[:12]}...; prepare the data with that run's tokenizer"
        )
    state = trainer.init()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trainer.state.parameters)
    parameters = jax.jit(start, out_shardings=shardings, donate_argnums=1)(restored.params, state.parameters)
    trained = restored.meta.get("config")  # of this very step
    was = serialize.from_dict(RunConfig, trained).model if trained else source.model
    return WarmStart(
        state=dataclasses.replace(state, parameters=parameters),
        step=restored.step,
        changes=tuple(str(one) for one in changes(was, model, "model.")),
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
