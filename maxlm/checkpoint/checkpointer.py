"""Save the state of a run as it trains, and restore the newest state that is intact."""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from maxlm.checkpoint import manifest, retention
from maxlm.checkpoint.store import Deferred, Record, Store, Tree, describe_leaf, first_difference, named_leaves
from maxlm.config.errors import UserError
from maxlm.config.run import CheckpointConfig
from maxlm.processes.joining import on_rank_0

_LOG = logging.getLogger("maxlm.checkpoint")

OptimizerTree = Tree | Callable[[Record], Tree]
"""What to restore beside the parameters; or what it is, by what the step holds."""
_PROBE_BYTES = 1 << 16
_CAUSES = tuple(
    os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG)
)
"""What file systems say, wherever it stands in a library's message."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a step held."""

    step: int
    params: Tree
    optimizer: Tree | None
    """None if only parameters were asked for."""
    meta: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run, in `folder` (usually `run_dir/checkpoints`), one folder a step.

    With several processes, each must make the same calls in the same order, on a shared file system. Process 0 alone
    writes manifests, deletes, and decides which step is restored; the others follow it.

    Creating one touches nothing on disk, so inference may read a folder that training writes.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        warn: Callable[[str], None] = _LOG.warning,
        sealed: Callable[[], None] | None = None,
    ) -> None:
        """`warn` gets one line for each refused step, each leftover removed, and a start without a finished step.
        `sealed` is called on process 0, in the background, as soon as a step that was saved here is finished.

        Raises:
            UserError: `folder` is a URL.
        """
        if re.match(r"[a-z0-9]+:/", str(folder)):
            raise UserError(
                f"{folder}: checkpoints need a folder, not a URL; mount the bucket and name the mount point"
            )
        self._folder = folder.absolute()
        self._config = config
        self._warn = warn
        self._sealed = sealed
        self._store = Store()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._identity: tuple[int, int] | None = None  # of the run folder, once it is prepared
        self._current: int | None = None  # the newest step that this run wrote or continued from

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def prepare(self) -> None:
        """Make the folder and see that a step could be written there. A run's process 0 calls it before it computes.

        Raises:
            UserError: it is not a folder, or cannot be written (no right to, no space, a name too long).
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".probe-", dir=self._folder) as probe:
                deepest = Path(probe, "params", "ocdbt.process_0", "d", "0" * 40)
                deepest.parent.mkdir(parents=True)
                with deepest.open("wb") as file:
                    file.write(bytes(_PROBE_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            why = "it is a file, or a link to nothing" if isinstance(error, FileExistsError) else error.strerror
            raise UserError(
                f"{self._folder}: checkpoints cannot be written there ({why}); mend that, or set another run_dir"
            ) from error
        self._identity = _identity(self._folder.parent)

    def save(
        self, step: int, *, params: Tree, optimizer: Tree, meta: dict[str, Any], stacks: Collection[str] = ()
    ) -> None:
        """Write a step in the background; returns once the arrays are copied to the host, so they may be donated.

        Leaves must be jax arrays that span all devices (scalars too, with several processes). Waits first for an
        earlier save. Does nothing if this run just wrote or restored `step`. Steps newer than the one this run
        continued from (refused as damaged, or left behind by going back) are set aside, not deleted, and so are steps
        without a manifest. `stacks` are the paths of parameters whose first dim is that of layers, which are written
        to be read layer by layer.

        Raises:
            UserError: this save could not begin, or the one before it failed.
        """
        self.wait()
        if step == self._current:
            return
        path = retention.writing(self._folder, step)
        try:
            if jax.process_index() == 0:
                if (moved := self._was_moved()) is not None:
                    raise moved
                self._folder.mkdir(parents=True, exist_ok=True)
                self._clear_the_way(step)
            self._store.begin(path, {"params": params, "optimizer": optimizer}, meta, stacks=stacks)
        except (TypeError, UserError):
            raise
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = step, self._thread.submit(self._finish, step)

    def check(self) -> None:
        """Raise what has gone wrong in the background, if anything; never waits. Call it every few steps.

        Raises:
            UserError: the last save failed (for example: disk full). Said once; the next save tries anew.
        """
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Block until the last save is finished, manifest included.

        Raises:
            UserError: it failed.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            raise self._failed(step, error) from error
        self._current = step

    def close(self) -> None:
        """`wait`, then release the threads. A run must call it, or use the object in a `with` block."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._store.close()

    def steps(self) -> list[int]:
        """Finished steps in rising order, as this process sees the folder now."""
        return retention.finished(self._folder)

    def restore_latest(
        self,
        *,
        params: Tree,
        optimizer: OptimizerTree,
        judge: Callable[[Path, dict[str, Any]], None] | None = None,
    ) -> Restored | None:
        """Restore the newest step that is intact, in the shardings of the given trees of `jax.ShapeDtypeStruct`.

        The mesh and the number of devices may differ from those that wrote it. Each damaged step is refused with a
        warning. None: there is no finished step, so the run starts from the beginning. `judge` gets the step's folder
        and `meta` before any array is looked at, and may raise. What the optimizer's tree is may depend on what the
        step says of itself.

        Raises:
            UserError: there are finished steps and none is intact; or the step holds other arrays than asked for.
        """
        self.wait()
        step = self._agree(self._newest_intact)
        if step is None:
            return None
        if judge is not None:
            judge(self._folder / str(step), self.record(step).meta)
        restored = self._restore_state(step, params, optimizer)
        self._current = step
        return restored

    def go_back(self, wanted: int, limit: int, why: str, *, params: Tree, optimizer: OptimizerTree) -> Restored:
        """Restore the newest intact step of at most `wanted`, or of at most `limit` where there is none, as
        `restore_latest` does, and go on from there: newer ones are set aside at once, so that a run that is killed now
        does not go on from them.

        A step that is a multiple of `checkpoint.every` is taken before others, which are there because somebody stopped
        the run: where it goes back to does not depend on that. `why`: in a few words, for the error.

        Raises:
            UserError: there is none; or the step holds other arrays than asked for.
        """
        self.wait()

        def choose() -> int:
            there = [step for step in retention.finished(self._folder) if step <= limit]
            best = lambda step: (step <= wanted, step % self._config.every == 0, step)
            for step in sorted(there, key=best, reverse=True):
                if not (problems := self._problems(step, ())):
                    for newer in reversed([other for other in retention.finished(self._folder) if other > step]):
                        place = retention.move_aside(self._folder, newer)
                        self._warn(f"{place}: checkpoint {newer} was moved here, as the run goes back to {step}")
                    return step
                self._warn(f"{self._folder / str(step)}: checkpoint refused: {problems[0]}; trying another")
            raise UserError(
                f"{why}; {self._folder}: no intact checkpoint of step {limit} or before to go back to; there are "
                f"{retention.finished(self._folder) or 'none'}"
            )

        step = self._agree(choose)
        assert step is not None
        restored = self._restore_state(step, params, optimizer)
        self._current = step
        return restored

    def restore_params(
        self, step: int | None, params: Tree | Callable[[Record], Tree], *, deferred: bool = False
    ) -> Restored:
        """Restore only the parameters of `step`, or of the newest intact step if None; `optimizer` is None. What the
        tree is may depend on what the step says of itself.

        With `deferred` each array is a `Deferred`, read into host memory when it is asked for, also after `close`.

        Raises:
            UserError: there is no such step, it is damaged, or it holds other parameters than asked for.
        """
        chosen = self.choose(step)
        params = params(self.record(chosen)) if callable(params) else params
        if deferred:
            return self._open_params(chosen, params)
        return self._restore(chosen, {"params": params})

    def choose(self, step: int | None) -> int:
        """The step, if its parameters are intact; the newest whose are, if None.

        Raises:
            UserError: there is none, or it is damaged.
        """
        self.wait()

        def choose() -> int:
            chosen = self._newest_intact(skip=("optimizer",)) if step is None else self._intact(step, ("optimizer",))
            if chosen is None:
                raise UserError(f"{self._folder}: no finished checkpoint; is this the folder of a run that has saved?")
            return chosen

        chosen = self._agree(choose)
        assert chosen is not None
        return chosen

    def some_parameters(self, step: int, params: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Some parameters of a step that was chosen, by their names in its record, in the shardings of these."""
        return self._read(step, lambda path: self._store.some(path, "params", params))

    def deferred_parameters(self, step: int, names: Iterable[str], *, item: str = "params") -> dict[str, Deferred]:
        """The same, to be read into host memory when each is asked for, also after `close`; `optimizer` is the item
        that has an average of them."""
        return self._read(step, lambda path: self._store.deferred(path, item, names))

    def verify(self, step: int, *, skip: tuple[str, ...] = ()) -> None:
        """Compare the checksums of what a step holds, but for the items that are skipped.

        Raises:
            UserError: there is no such step, or it is damaged.
        """
        self.wait()
        self._agree(lambda: self._intact(step, skip))

    def read_meta(self, step: int) -> dict[str, Any]:
        """What `save` got as `meta`.

        Raises:
            UserError: there is no such step, or it is damaged.
        """
        self.verify(step, skip=("params", "optimizer"))
        return self.record(step).meta

    def _finish(self, step: int) -> None:
        """In the background: wait for Orbax, see that the step opens, seal it with its manifest and give it its name;
        then delete what the keep rule drops."""
        self._store.wait()
        if jax.process_index() != 0:
            return
        rule = {"keep_last": self._config.keep_last, "keep_every": self._config.keep_every}
        draft = retention.writing(self._folder, step)
        self._store.check(draft)
        manifest.write(draft, step=step, **rule)
        retention.publish(self._folder, step)
        if self._sealed is not None:
            self._sealed()
        finished = retention.finished(self._folder)
        kept = retention.kept(finished, **rule)
        for old in finished:
            if old not in kept:
                retention.remove(self._folder / str(old))

    def _clear_the_way(self, step: int) -> None:
        """Remove what killed runs left, and set aside steps that are not of this run's past or have no manifest.

        Those would be restored in place of the new step, or take the place of a good one in the keep rule.
        """
        for path in retention.temporary(self._folder):
            self._warn(f"{path}: unfinished checkpoint of a run that was stopped; removed")
            retention.remove(path)
        for other in retention.unsealed(self._folder):
            place = retention.move_aside(self._folder, other)
            self._warn(f"{place}: checkpoint {other}, which has no {manifest.NAME}, was moved here; nothing reads it")
        if os.path.lexists(target := self._folder / str(step)) and not target.is_dir():
            self._warn(f"{retention.move_aside(self._folder, step)}: was {target}, which is no folder")
        past = step - 1 if self._current is None else min(self._current, step - 1)
        for other in retention.finished(self._folder):
            if other > past:
                place = retention.move_aside(self._folder, other)
                self._warn(
                    f"{place}: checkpoint {other}, which this run did not continue from, was moved here before saving "
                    f"step {step}; delete it once you no longer want it"
                )

    def _newest_intact(self, skip: tuple[str, ...] = ()) -> int | None:
        finished = retention.finished(self._folder)
        for step in reversed(finished):
            problems = self._problems(step, skip)
            if not problems:
                for newer in retention.unsealed(self._folder):
                    if newer > step:
                        self._warn(
                            f"{self._folder / str(newer)}: has no {manifest.NAME}, so nothing says that it is whole; "
                            f"passed over for step {step} ({_seal(self._folder, newer)} if you know better)"
                        )
                return step
            more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
            self._warn(f"{self._folder / str(step)}: checkpoint refused: {problems[0]}{more}; trying the one before")
        if finished:
            raise UserError(
                f"{self._folder}: checkpoints {finished} are all damaged; mend or restore one from a copy "
                "(python -m maxlm.inspect RUN_DIR --verify lists the files), or set another run_dir to start anew"
            )
        if unsealed := retention.unsealed(self._folder):
            raise UserError(
                f"{self._folder}: checkpoints {unsealed} have no {manifest.NAME}, so nothing says that they are whole, "
                f"and there is no other; bring the manifests back, or, if you know that a step is whole, make a new "
                f"one: {_seal(self._folder, unsealed[-1])}; to start anew, set another run_dir"
            )
        if leftovers := [p.name for p in (*retention.temporary(self._folder), *retention.set_aside(self._folder))]:
            self._warn(f"{self._folder}: no finished checkpoint, only {', '.join(leftovers)}; starting from step 0")
        return None

    def _intact(self, step: int, skip: tuple[str, ...]) -> int:
        finished = retention.finished(self._folder)
        if step not in finished:
            raise UserError(f"{self._folder}: no finished checkpoint of step {step}; there are {finished or 'none'}")
        if problems := self._problems(step, skip):
            raise UserError(
                f"{self._folder / str(step)}: checkpoint is damaged: {problems[0]}; use another of {finished}"
            )
        return step

    def _problems(self, step: int, skip: tuple[str, ...]) -> list[manifest.BrokenFile]:
        return manifest.verify(self._folder / str(step), step, checksums=self._config.verify, skip=skip)

    def _agree(self, choose: Callable[[], int | None]) -> int | None:
        """What rank 0 chooses, on every rank."""
        return on_rank_0("choose a checkpoint", choose)

    def _open_params(self, step: int, params: Tree) -> Restored:
        record, wanted = self._matching_record(step, {"params": params}), named_leaves(params)
        leaves = self.deferred_parameters(step, wanted)
        tree = jax.tree.unflatten(
            jax.tree.structure(params), [leaf.astype(wanted[name].dtype) for name, leaf in leaves.items()]
        )
        return Restored(step=step, params=tree, optimizer=None, meta=record.meta)

    def _matching_record(self, step: int, items: dict[str, Tree]) -> Record:
        """Of a step that has these arrays. Parameters that are read alone may be asked for in float32 where it has them
        in bfloat16, of which each number is one."""
        record, widens = self.record(step), "optimizer" not in items
        for item, tree in items.items():
            wanted = {name: describe_leaf(leaf) for name, leaf in named_leaves(tree).items()}
            stored = dict(record.items[item])
            for name, (dtype, shape) in record.items[item].items():
                if widens and dtype == "bfloat16" and wanted.get(name) == ("float32", shape):
                    stored[name] = wanted[name]
            if difference := first_difference(item, stored, wanted):
                raise UserError(
                    f"{self._folder / str(step)}: {difference}; use the config that wrote it (model and optimizer), or "
                    "another run_dir"
                )
        return record

    def _restore_state(self, step: int, params: Tree, optimizer: OptimizerTree) -> Restored:
        tree = optimizer(self.record(step)) if callable(optimizer) else optimizer
        return self._restore(step, {"params": params, "optimizer": tree})

    def _restore(self, step: int, items: dict[str, Tree]) -> Restored:
        record = self._matching_record(step, items)
        trees = self._read(step, lambda path: self._store.arrays(path, items))
        return Restored(step=step, params=trees["params"], optimizer=trees.get("optimizer"), meta=record.meta)

    def record(self, step: int) -> Record:
        """What a step that is there says of itself."""
        return self._read(step, self._store.record)

    def _read(self, step: int, read: Callable[[Path], Any]) -> Any:
        path = self._folder / str(step)
        try:
            return read(path)
        except UserError:
            raise
        except Exception as error:
            if self._config.verify:  # checksums are right, so this is not damage: show it as it is
                raise
            raise UserError(
                f"{path}: cannot be read ({_reason(error)}); checkpoint.verify = False let a damaged step through, set "
                "it to True to use the one before"
            ) from error

    def _was_moved(self) -> UserError | None:
        """What to say where the run folder is no longer the one that was prepared."""
        if self._identity in (None, _identity(self._folder.parent)):
            return None
        return UserError(
            f"{self._folder.parent}: was removed or replaced while this run was using it, so nothing more is written "
            "there; run the same command again, with run_dir where the folder is now"
        )

    def _failed(self, step: int, error: Exception) -> UserError:
        if (moved := self._was_moved()) is not None:
            return moved
        try:
            safe = retention.finished(self._folder)
        except OSError:
            safe = []
        kept = f"step {safe[-1]} is the last finished one and can be restored" if safe else "no step is finished yet"
        return UserError(
            f"{self._folder / str(step)}: checkpoint could not be written ({_reason(error)}); {kept}; mend the "
            "cause (free space, or set another run_dir) and run the same command again"
        )


def _seal(folder: Path, step: int) -> str:
    return f"python -m maxlm.inspect {shlex.quote(str(folder.parent))} --seal {step}"


def _identity(folder: Path) -> tuple[int, int] | None:
    """Which folder this is, whatever its name; None: there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _reason(error: Exception) -> str:
    """One line that names the cause, which libraries put anywhere in long messages."""
    text = " ".join(str(error).split())
    for cause in _CAUSES:
        if cause in text:
            return cause
    return f"{type(error).__name__}: {text[:200]}"
