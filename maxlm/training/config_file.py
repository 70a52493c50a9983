"""`config.json` of a run folder: what the newest checkpoint was trained with, at every moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maxlm.config import RunConfig, UserError, serialize
from maxlm.config.changes import DATA_ORDER, Changed, go_on
from maxlm.config.fields import Changes


class ConfigFile:
    """Judges the config of a run that goes on, and writes it once a checkpoint was trained with it."""

    def __init__(self, config: RunConfig, run_dir: Path, allowed: Sequence[str], warn: Callable[[str], None]) -> None:
        """`allowed`: keys and groups that may change whatever they do to the run. `warn` gets a line for each change,
        and one if the file cannot be brought up to date."""
        self._declared, self._run_dir, self._allowed, self._warn = config, run_dir, allowed, warn
        self.config = config
        """With the starts of phases that have begun early."""
        self._trained: RunConfig | None = None
        self._step = 0
        self._changes: list[Changed] = []

    def compare(self, checkpoint: Path, meta: dict[str, Any]) -> None:
        """With what the checkpoint to go on from was trained with.

        Raises:
            UserError: a line for each change that is refused.
        """
        self._step = int(checkpoint.name)
        try:
            self._trained = serialize.from_dict(RunConfig, meta["config"])
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}") from error
        self.follow(meta, self._step)
        self._changes = go_on(self._trained, self.config, self._allowed, str(checkpoint), self._step)

    def follow(self, meta: dict[str, Any], step: int) -> None:
        """Take the starts of phases that had begun early from the checkpoint of a step, to which the run comes."""
        self.config = self._declared.as_begun(serialize.from_dict(RunConfig, meta["config"]), step)

    def other_data(self) -> bool:
        """Whether batches of another order, or with other contents, are allowed."""
        return "data" in self._allowed or any(
            one.change is Changes.IDENTITY and one.within(DATA_ORDER) for one in self._changes
        )

    def say(self) -> None:
        """A line for each change."""
        for one in self._changes:
            allowed = " (as --allow_change says)" if one.change is Changes.IDENTITY else ""
            self._warn(f"changed after step {self._step:,}: {one}{allowed}")

    def begin(self) -> None:
        """Write the file for a run without a checkpoint, before its first step; and what the checkpoint was trained
        with, for one whose file is gone or cannot be read.

        Raises:
            UserError: it cannot be written.
        """
        try:
            if self._trained is None:
                self._write("config.json", self.config)
            elif not self._is_readable():
                self._warn(f"{self._run_dir / 'config.json'}: was missing or unreadable; written anew, as trained")
                self._write("config.json", self._trained)
        except OSError as error:
            raise UserError(f"{self._run_dir / 'config.json'}: cannot be written ({error.strerror})") from error

    def sealed(self) -> None:
        """A checkpoint of this config is finished: bring the file up to date, and keep the one before where that says
        something else of the training. Readers take what they need of the model from the checkpoint itself."""
        try:
            if self._trained is not None and self._changes:
                self._write(f"config.before-step-{self._step}.json", self._trained)
            self._write("config.json", self.config)
        except OSError as error:
            self._warn(f"{self._run_dir / 'config.json'}: cannot be brought up to date ({error.strerror})")

    def _is_readable(self) -> bool:
        try:
            serialize.load(RunConfig, self._run_dir / "config.json")
        except UserError:
            return False
        return True

    def _write(self, name: str, config: RunConfig) -> None:
        """In one rename, unless the file says that already."""
        path, part = self._run_dir / name, self._run_dir / f"{name}.part"
        try:
            serialize.save(config, part)
            if not path.is_file() or path.read_bytes() != part.read_bytes():
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
