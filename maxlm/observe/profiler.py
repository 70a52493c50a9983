"""A window of steps recorded by JAX's profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from maxlm.config import StepRange
from maxlm.observe.guard import reason


class ProfileWindow:
    """Records steps first, ..., last - 1 into `run_dir/profile`.

        with window.step(i, wait_for=state):
            state, metrics = train_step(state, batch)

    A run resumed in the middle of the range records what is left of it. With `steps` None nothing happens.
    """

    def __init__(
        self,
        steps: StepRange | None,
        run_dir: Path,
        say: Callable[[str], None],
        off: Callable[[str, str], None] | None = None,
    ) -> None:
        """`off` gets folder and reason if the profiler fails, which then records no more; None: it raises."""
        self._steps, self._off = steps, off
        self._folder = run_dir / "profile"
        self._say = say
        self._recording = False

    @contextlib.contextmanager
    def step(self, i: int, *, wait_for: Any) -> Iterator[None]:
        """Surrounds step `i`, counted from 0. `wait_for` is any tree of arrays that step i - 1 made: the window waits
        for it before it opens and before it closes, so that it holds whole steps, and these only."""
        if self._recording and self._steps is not None and i >= self._steps.last:
            self.close(wait_for=wait_for)
        if not self._recording and self._steps is not None and self._steps.first <= i < self._steps.last:
            jax.block_until_ready(wait_for)
            self._recording = self._attempt(lambda: jax.profiler.start_trace(str(self._folder)))
        with jax.profiler.StepTraceAnnotation("train", step_num=i) if self._recording else contextlib.nullcontext():
            yield

    def close(self, *, wait_for: Any = None) -> None:
        """Stop recording, if it goes on; the end of a run inside the range needs this."""
        if not self._recording:
            return
        jax.block_until_ready(wait_for)
        self._recording = False
        if not self._attempt(jax.profiler.stop_trace):
            return
        self._say(
            f"profile of steps {self._steps} written to {self._folder}; open its newest *.trace.json.gz in "
            f"https://ui.perfetto.dev, or: pip install xprof && xprof --logdir {self._folder}"
        )

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Whether it went well."""
        try:
            call()
        except Exception as error:
            if self._off is None:
                raise
            self._steps = None
            self._off(str(self._folder), reason(error))
            return False
        return True
