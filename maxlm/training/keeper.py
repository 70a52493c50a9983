"""The state of a run in its folder: restored where that is right, saved where it is sound."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from maxlm import shapes
from maxlm.checkpoint import manifest
from maxlm.checkpoint.checkpointer import Checkpointer, Restored
from maxlm.checkpoint.reference import Reference
from maxlm.checkpoint.store import Record, named_leaves
from maxlm.config import RunConfig, UserError, serialize
from maxlm.models.base import own
from maxlm.observe.report import SavedCheckpoint, report_step
from maxlm.processes.joining import on_rank_0
from maxlm.sharding import Layout
from maxlm.training import stability
from maxlm.training.config_file import ConfigFile
from maxlm.training.finite import Diverged, not_finite
from maxlm.training.spikes import Spike, Spikes
from maxlm.training.stability import Stability
from maxlm.training.state import CRITIC, TrainState, of_model

_STABILITY = "stability"


class Keeper:
    """Restores and saves the state of one run; keeps its config.json in step with that.

    Every process makes the same calls. `check` and `wait` are those of `Checkpointer`.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        identity: Mapping[str, str | None],
        *,
        allow_change: Sequence[str],
        warn: Callable[[str], None],
    ) -> None:
        """`identity`: fingerprints of "data" and "tokenizer", which a run keeps. The rest is as `loop.run` says."""
        self._identity, self._warn = identity, warn
        self._run_dir = Path(config.run_dir)
        self._folder = self._run_dir / "checkpoints"
        self._machine = machine_facts(layout)
        self._file = ConfigFile(config, self._run_dir, allow_change, warn)
        self._saved = Checkpointer(self._folder, config.checkpoint, warn=warn, sealed=self._file.sealed)
        self.check, self.wait = self._saved.check, self._saved.wait
        self.meta: dict[str, Any] = {}
        """Of the checkpoint that the run goes on from; empty in a new run."""
        self.reference: Reference | None = None
        """To what is read and not trained, for later checkpoints."""
        self.base: Mapping[str, str] | None = None
        """Where the base under an adapter is and what it is, for later checkpoints."""

    @property
    def config(self) -> RunConfig:
        """What later checkpoints are of: with the starts of phases that have begun early."""
        return self._file.config

    @config.setter
    def config(self, now: RunConfig) -> None:
        self._file.config = now

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._saved.close()

    def restore(self, wanted: TrainState) -> TrainState | None:
        """The state of the newest intact checkpoint, without what is frozen, and without the base under an adapter, in
        whose places the parameters have None; None without one.

        Raises:
            UserError: nothing can be written there; or the checkpoint was trained with settings that may not change, on
                other data or with another tokenizer, holds another model, NaN, or more steps than train.steps.
        """
        on_rank_0("prepare the folder of checkpoints", self._saved.prepare)
        restored = self._saved.restore_latest(
            params=self._own(wanted.parameters), optimizer=_as_saved(wanted), judge=self._file.compare
        )
        if restored is None:
            if (done := report_step(self._run_dir)) is not None:
                raise UserError(
                    f"{self._run_dir}: holds the report of a run of {done:,} steps and none of its checkpoints; bring "
                    "them back, set another run_dir, or remove report.html to begin anew here"
                )
            return None
        self.meta, place = restored.meta, self._folder / str(restored.step)
        self._compare_identity(place)
        state = self._state(wanted, restored)
        remedy = (
            f"rename that folder to {restored.step}.set-aside and run the same command again to go on from the "
            "checkpoint before"
        )
        require_finite(state, str(place), remedy)
        if restored.step > self.config.train.steps:
            raise UserError(
                f"train.steps = {self.config.train.steps} is less than the {restored.step} steps that {self._run_dir} "
                f"has done; use at least {restored.step}, or set another run_dir"
            )
        return state

    def go_back(self, spike: Spike, state: TrainState) -> TrainState:
        """The state of the newest intact checkpoint far enough before a spike, or before it at all, from which the run
        goes on. Newer ones are set aside, and the arrays of `state` are gone.

        Raises:
            UserError: there is no such checkpoint.
        """
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        for leaf in jax.tree.leaves((state.parameters, state.optimizer)):
            leaf.delete()  # there is no room for two states
        own, beside = self._own(like.parameters), _as_saved(like)
        restored = self._saved.go_back(spike.wanted, spike.first, spike.what, params=own, optimizer=beside)
        self.meta = restored.meta
        self._file.follow(restored.meta, restored.step)
        return dataclasses.replace(self._state(like, restored), frozen=state.frozen)

    def begin(self) -> None:
        """Say what is not as it was; write config.json, on process 0, for a run without a checkpoint or one that has
        lost it."""
        self._file.say()
        if (moved := moved_words(self.meta.get("machine"), self._machine)) is not None:
            self._warn(moved)
        if jax.process_index() == 0:
            self._file.begin()

    def save(
        self, state: TrainState, step: int, memory: Mapping[str, Any], spikes: Spikes, recovery: Mapping[str, Any]
    ) -> None:
        """Begin to write the state after so many steps, and the memory of the feed, of spikes and of recovery; returns
        once it may be changed.

        Raises:
            Diverged: not every number in it is finite.
            UserError: it cannot be written.
        """
        own, beside = self._own(state.parameters), _optimizer_item(state)
        if (bad := not_finite({"parameters": own} | beside)) is not None:
            raise Diverged(
                f"step {step}: the state is not finite and was not saved: {bad}; the checkpoints before are as they "
                "were; lower optimizer.learning_rate, or look at the batches since the last of them"
            )
        meta: dict[str, Any] = {
            "data": {"next_batch": step, "fingerprint": self._identity["data"]},
            "tokenizer": self._identity["tokenizer"],
            "config": serialize.to_dict(self.config),
            "machine": self._machine,
        }
        if memory:
            meta["feed"] = dict(memory)
        if spikes.skipped:
            meta["data"]["skipped"] = [list(one) for one in spikes.skipped]
        if spikes.memory:
            meta["spikes"] = spikes.memory
        if recovery:
            meta["recovery"] = dict(recovery)
        if self.reference is not None:
            meta["frozen"] = self.reference.to_json()
        if self.base is not None:
            meta["base"] = dict(self.base)
        stacks = {array.name for array in shapes.arrays(self.config.model) if array.dims[0] == "layers"}
        self._saved.save(step, params=own, optimizer=beside, meta=meta, stacks=stacks)

    def listed(self) -> list[SavedCheckpoint]:
        """The finished checkpoints, as the report lists them."""
        records = []
        for step in self._saved.steps():
            with contextlib.suppress(manifest.ManifestError):  # one that was passed over
                records.append(manifest.load(self._folder / str(step)))
        return [
            SavedCheckpoint(step=record.step, n_bytes=record.total_bytes, saved=datetime.fromisoformat(record.written))
            for record in records
        ]

    def _own(self, parameters: Any) -> Any:
        """What a checkpoint has of them as the model's."""
        return own(self.config.model, of_model(parameters))

    def _state(self, wanted: TrainState, restored: Restored) -> TrainState:
        """Of what a checkpoint holds."""
        beside = restored.optimizer or {}
        critic = {CRITIC: beside.pop(CRITIC)} if CRITIC in beside else {}
        steady = self._steady(wanted.stability, beside.pop(_STABILITY, {}))
        return TrainState(parameters=restored.params | critic, stability=steady, **beside)

    def _steady(self, wanted: Stability, saved: dict[str, jax.Array]) -> Stability:
        """Of each part what a checkpoint has of it; as at a first step, where it has none or one of another length, but
        of products' largest numbers, the newest of which are first, as many as both have."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
        new = jax.jit(lambda: stability.begin(self.config), out_shardings=shardings)()

        def part(name: str, begun: Any) -> Any:
            leaves = named_leaves({name: begun})
            if all(at in saved and saved[at].shape == leaf.shape for at, leaf in leaves.items()):
                return jax.tree.unflatten(jax.tree.structure(begun), [saved[at] for at in leaves])
            return begun

        for name in new.largest or ():
            at = f"largest/{name}"
            if at in saved and saved[at].shape[:-1] == new.largest[name].shape[:-1]:
                n = min(saved[at].shape[-1], new.largest[name].shape[-1])
                saved[at] = new.largest[name].at[..., :n].set(saved[at][..., :n])
        return Stability(**{name: part(name, begun) for name, begun in new._asdict().items()})

    def _compare_identity(self, place: Path) -> None:
        tokenizer, data = self.meta.get("tokenizer"), self.meta["data"]["fingerprint"]
        if tokenizer != self._identity["tokenizer"]:
            raise UserError(
                f"{place}: was trained with tokenizer {str(tokenizer)[:12]}..., the config's data has "
                f"{str(self._identity['tokenizer'])[:12]}...; restore the data that the run began with, or set another "
                "run_dir"
            )
        if data != self._identity["data"]:
            now = str(self._identity["data"])
            differ = f"{place}: was trained with data {data[:12]}..., the config names data {now[:12]}..."
            if not self._file.other_data():
                raise UserError(
                    f"{differ}; restore the data that the run began with, set another run_dir, or say "
                    "--allow_change data"
                )
            self._warn(f"{differ}, as --allow_change says; going on with batch {int(place.name):,} of these")


def require_finite(state: TrainState, place: str, remedy: str) -> None:
    """Refuse a state that nothing can be trained from.

    Raises:
        UserError: a parameter, or a number of the optimizer's, is not finite.
    """
    if (bad := not_finite({"parameters": state.parameters, "optimizer": state.optimizer})) is not None:
        raise UserError(f"{place}: not finite: {bad}; {remedy}")


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    """All of the state but the model's parameters: what inference never reads."""
    critic = {CRITIC: state.parameters[CRITIC]} if CRITIC in state.parameters else {}
    return critic | {
        "step": state.step,
        "optimizer": state.optimizer,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
        _STABILITY: state.stability,
    }


def _as_saved(wanted: TrainState) -> Callable[[Record], dict[str, Any]]:
    """The same, of a state of shapes, with the stability that a checkpoint has, whatever this run asks for: it is of
    another length, or not there, where another config wrote it."""

    def item(record: Record) -> dict[str, Any]:
        lead, everywhere = f"{_STABILITY}/", wanted.step.sharding
        saved = {
            name.removeprefix(lead): jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
            for name, (dtype, shape) in record.items["optimizer"].items()
            if name.startswith(lead)
        }
        return _optimizer_item(wanted) | {_STABILITY: saved}

    return item


def machine_facts(layout: Layout) -> dict[str, Any]:
    """What decides, beside config and data, in which order numbers are summed: the same gives the same bits."""
    devices = layout.mesh.devices.flat
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": " x ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items() if size > 1) or "one device",
        "processes": jax.process_count(),
        # XLA:CPU cuts its work by them.
        "cores": len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else None,
        "jax": jax.__version__,
    }


def moved_words(was: dict[str, Any] | None, now: dict[str, Any]) -> str | None:
    """What to say to who goes on elsewhere; None: nothing, or an earlier version wrote the checkpoint."""
    if was is None or was == now:
        return None
    changes = ", ".join(f"{name} {was.get(name)} -> {now[name]}" for name in now if was.get(name) != now[name])
    return f"going on elsewhere ({changes}): from here on, numbers may differ in their last bits from a run that stayed"
