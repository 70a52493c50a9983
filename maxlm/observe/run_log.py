"""The one object that a training loop tells what happens; it goes to the console, the run folder and the writers."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from maxlm.config import Experts, RunConfig, UserError, pipeline_bubble
from maxlm.config.serialize import flatten
from maxlm.observe.console import Console
from maxlm.observe.devices import Device, memory_in_use, peak_flops
from maxlm.observe.guard import Guarded
from maxlm.observe.metrics import COLUMNS, Row, RowLog, Throughput, readable_rows
from maxlm.observe.plots import loss_curve
from maxlm.observe.report import SavedCheckpoint, write_report
from maxlm.observe.text import short
from maxlm.observe.writers import TensorBoardWriter, WandbWriter, Writer, import_wandb
from maxlm.shapes import FlopsPerToken, arrays, flops_per_token, mfu, parameter_count

_PICTURE_S = 120.0
"""Seconds for loss.png: matplotlib looks at every font when it is first imported."""
_PACKAGES = ("maxlm", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What `RunLog.finish` wrote; None: it could not."""

    report: Path | None
    loss_png: Path | None

    @classmethod
    def found(cls, run_dir: Path) -> Finished:
        """What an earlier call wrote."""
        report, picture = run_dir / "report.html", run_dir / "loss.png"
        return cls(report=report if report.is_file() else None, loss_png=picture if picture.is_file() else None)


class RunLog:
    """Figures of a run, to everywhere they go.

        with RunLog(config, run_dir, resume_step=start, is_main=jax.process_index() == 0, devices=jax.devices()) as log:
            ...                                  # compile, or run one step and wait for it
            log.start_clock(step, tokens)
            ...
            log.step(step, tokens, {"loss": ..., "learning_rate": ..., "grad_norm": ...})     # every log_every steps
            with log.pause():                    # measurement, checkpoint: not training time
                ...
            log.measured("eval", step, {"eval_loss": ...}, line="held-out loss ...")
            log.finish(checkpoints=...)

    Every process makes the same calls; only the main one writes or prints. A file or service that fails, or does not
    answer, is told once, switched off, and named in run.json and the report; nothing of it is raised here.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        *,
        resume_step: int,
        is_main: bool,
        devices: Sequence[Device],
        console: Console | None = None,
        measures: Sequence[str] = (),
        only_say: bool = False,
    ) -> None:
        """`resume_step`: steps that the restored checkpoint had done, 0 without one; later rows are dropped.

        `devices`: all of the run, as `jax.devices()` lists them. `measures`: names that `measured` will get, beside
        "eval" and "sample". `only_say`: touch no file, as nothing will happen.

        Raises:
            UserError: observe.wandb_project is set and wandb is absent.
        """
        self._config, self._run_dir, self._is_main = config, run_dir, is_main
        self._throughput = Throughput()
        self._moe_layers = [i for i, block in enumerate(config.model.layers) if isinstance(block.mlp, Experts)]
        self._n_devices, kind = len(devices), devices[0].device_kind
        self._stages = config.sharding.sizes(self._n_devices)["stage"]
        self._flops = self._flops_of(config)
        self._peak = peak_flops(kind, config.execution.dtype)
        self._console = console or Console(enabled=is_main)
        self._writers: list[Guarded[Writer]] = []
        self._files: dict[str, Guarded[RowLog]] = {}
        self._run_json: Guarded[Path] | None = None
        self._off: dict[str, str] = {}
        self._near_devices = [device for device in devices if device.process_index == 0]
        if not is_main:
            return
        self._facts = self._find_facts(kind, 1 + max(device.process_index for device in devices))
        if not only_say:
            watch = ["watch"] if config.observe.watch else []
            names = ["metrics", "evals", "samples", *watch, *(f"{name}s" for name in measures)]
            self._open(resume_step, dict.fromkeys(names))
        self._console.start(
            config.train.steps,
            resume_step,
            self._header(self._facts),
            memory_limit=memory_in_use(self._near_devices).limit,
        )

    def _open(self, resume_step: int, names: Iterable[str]) -> None:
        run_dir, project = self._run_dir, self._config.observe.wandb_project
        wandb = None if project is None else import_wandb(project)
        self._run_json = Guarded(str(run_dir / "run.json"), lambda: run_dir / "run.json", self.switched_off)

        def rows(path: Path) -> Guarded[RowLog]:
            make = lambda: RowLog(path, resume_step=resume_step, warn=self.warning)
            return Guarded(str(path), make, self.switched_off)

        self._files |= {name: rows(run_dir / f"{name}.jsonl") for name in names}
        make_board = lambda: TensorBoardWriter(run_dir, resume_step=resume_step)
        self._writers.append(Guarded(str(run_dir / "tensorboard"), make_board, self.switched_off))
        if wandb is not None and project is not None:
            make_wandb = lambda: WandbWriter(wandb, project, run_dir, flatten(self._config))
            name = f"observe.wandb_project = {project!r}"
            self._writers.append(Guarded(name, make_wandb, self.switched_off, wait=False))
        self._write_facts()

    def _flops_of(self, config: RunConfig) -> FlopsPerToken:
        again = self._stages > 1 and config.sharding.remat_stages
        return flops_per_token(config.model, config.train.seq_len, config.execution.remat, remat_stages=again)

    def phase(self, config: RunConfig) -> None:
        """From now on a step is as this config says."""
        self._flops = self._flops_of(config)

    def went_back(self, step: int, windows: int, first: int, found: int, what: str) -> None:
        """The run goes on from the state after `step`, past so many windows of the data, because of a spike: the high
        steps `first` + 1 to `found`, told by `what`. Rows of steps that are made again are dropped, and
        `rollbacks.jsonl` gets one, under the first step that is made again."""
        self.warning(f"spike: {what}; going back to step {step:,}, and on after {windows:,} windows of the data")
        if not self._is_main or not self._files:
            return
        self._close_writers()
        names = list(self._files)
        self._close_files()
        self._open(step, names)
        row = {"restored_step": step, "first_step": first + 1, "last_step": found, "skipped_windows": windows}
        self._files["rollbacks"](lambda file: file.append({"step": step + 1, **row}))

    def switched_off(self, name: str, reason: str) -> None:
        """Say once that a file or service gets no more, as the run goes on without it; from any thread."""
        if not self._is_main or name in self._off:
            return
        self._off[name] = reason
        self.warning(f"{name}: {reason}; it is switched off, the run goes on without it")
        self._write_facts()

    def _write_facts(self) -> None:
        if self._run_json is not None:
            text = json.dumps({**self._facts, "switched_off": self._off}, indent=2) + "\n"
            self._run_json(lambda path: path.write_text(text))

    def start_clock(self, step: int, tokens: int) -> None:
        """Begin to measure throughput, with `step` steps done and the device idle: after compilation."""
        self._throughput.start(step, tokens)

    def pause(self) -> AbstractContextManager[None]:
        """Leave out of the throughput what happens inside; wait for the last step before entering."""
        return self._throughput.pause()

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Show for how long something goes on."""
        return self._console.waiting(what)

    def progress(self, step: int) -> None:
        """So many steps were given to the devices: cheap, for every step."""
        self._console.progress(step)

    def step(self, step: int, tokens: int, figures: Mapping[str, float | list[float]]) -> Row:
        """Log what `step` steps on `tokens` tokens have come to, with throughput since the row before.

        `figures` has `loss`, `grad_norm`, `learning_rate` and whatever else there is to log; a list has one figure for
        each layer that has it.
        """
        speed = self._throughput.read(step, tokens)
        known: Row = {
            "step": step,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "tokens": tokens,
            "tokens_per_s": speed[0] if speed else None,
            "step_time_s": speed[1] if speed else None,
            "mfu": self._mfu(speed[0]) if speed else None,
            "memory_bytes": memory_in_use(self._near_devices).in_use if self._is_main else None,
            **figures,
        }
        row = {key: known[key] for key in (*COLUMNS, *known) if key in known}
        if self._is_main:
            self._files["metrics"](lambda file: file.append(row))
            self._write(step, "train", row)
            self._console.log(row)
        return row

    def measured(self, name: str, step: int, row: Mapping[str, Any], line: str) -> None:
        """Log a measurement: a row of `NAMEs.jsonl`, its numbers to writers as `NAME/...`, `line` to the console."""
        if not self._is_main:
            return
        self._files[f"{name}s"](lambda file: file.append({"step": step, **row}))
        self._write(step, name, {key.removeprefix(f"{name}_"): value for key, value in row.items()})
        self._console.measured(line)

    def watched(self, step: int, row: Mapping[str, float | list[float]]) -> None:
        """Log a row of watch.jsonl; its numbers to writers as `watch/...`."""
        if self._is_main:
            self._files["watch"](lambda file: file.append({"step": step, **row}))
            self._write(step, "watch", row)

    def has_measured(self, name: str, step: int) -> bool:
        """Whether `NAMEs.jsonl` has a row of the step."""
        return any(row["step"] == step for row in readable_rows(self._run_dir / f"{name}s.jsonl"))

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.say(text)

    def warning(self, text: str) -> None:
        """Print a line that stands out."""
        self._console.warning(text)

    def finish(self, checkpoints: Sequence[SavedCheckpoint] = (), *, complete: int | None = None) -> Finished | None:
        """Write loss.png and report.html and say where they are; None on the other processes.

        `complete`: the step that the run is at, with all its measurements; the report then says so to `report_step`.
        """
        if not self._is_main:
            return None
        self._console.stop()
        self._close_writers()  # so that the report names what fails as it ends

        def draw(path: Path) -> Path | None:
            metrics, evals = (readable_rows(self._run_dir / f"{name}.jsonl") for name in ("metrics", "evals"))
            try:
                return loss_curve(metrics, evals, path)
            except UserError as error:  # matplotlib is absent
                self.warning(str(error))
                return None

        def write(folder: Path) -> Path:
            return write_report(folder, checkpoints, switched_off=self._off, complete=complete)

        picture, page = self._run_dir / "loss.png", self._run_dir / "report.html"
        loss_png = Guarded(str(picture), lambda: picture, self.switched_off, patience_s=_PICTURE_S)(draw)
        report = Guarded(str(page), lambda: self._run_dir, self.switched_off)(write)
        for path in (loss_png, report):
            if path is not None:
                self.say(f"wrote {path}")
        return Finished(report=report, loss_png=loss_png)

    def close(self) -> None:
        """Close files and writers."""
        self._console.stop()
        self._close_writers()
        self._close_files()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close(lambda rows: rows.close())
        if self._run_json is not None:
            self._run_json.close()

    def _close_writers(self) -> None:
        while self._writers:
            self._writers.pop().close(lambda writer: writer.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _mfu(self, tokens_per_s: float) -> float | None:
        if self._peak is None:
            return None
        return mfu(
            flops_per_token=self._flops.total,
            tokens_per_s=tokens_per_s,
            n_devices=self._n_devices,
            peak_flops=self._peak,
        )

    def _write(self, step: int, group: str, values: Mapping[str, Any]) -> None:
        """Pass on what a curve can show: known and finite. A figure of several layers is a curve for each; points are a
        picture of their own."""
        values = {key: value for key, value in values.items() if not _is_points(value)}
        curves = {key: value for key, value in values.items() if not isinstance(value, list | str)}
        for key, figures in values.items():
            if isinstance(figures, list):
                layers = self._moe_layers if len(figures) == len(self._moe_layers) else range(len(figures))
                curves |= {f"{key}/layer_{i}": value for i, value in zip(layers, figures, strict=True)}
        named = {
            f"{group}/{key}": value
            for key, value in curves.items()
            if key != "step" and value is not None and math.isfinite(value)
        }
        if named:
            for writer in self._writers:
                writer(lambda to: to.write(step, named))

    def _find_facts(self, kind: str, n_processes: int) -> dict[str, Any]:
        """What run.json says: things that the config does not."""
        count, train = parameter_count(self._config.model), self._config.train
        versions = {"python": platform.python_version()}
        for package in _PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        return {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "steps": train.steps,
            "tokens_per_step": train.batch_size * train.seq_len,
            "device_kind": kind,
            "n_devices": self._n_devices,
            "n_processes": n_processes,
            "peak_flops_per_device": self._peak,
            "parameters": {
                **asdict(count),
                "total": count.total,
                "active": count.active,
                "matmul": count.matmul,
                "trained": sum(array.size for array in arrays(self._config.model) if array.trained),
            },
            "flops_per_token": {
                **asdict(self._flops),
                "total": self._flops.total,
                "causal": self._flops.causal,
            },
            "mfu_rule": self._mfu_rule(kind, count.matmul),
            "pipeline_bubble": self._bubble(),
            "versions": versions,
        }

    def _bubble(self) -> float | None:
        """Share of a pipeline's time that a stage idles, if turns take equally long; None without one."""
        if self._stages == 1:
            return None
        return pipeline_bubble(self._stages, self._config.sharding.virtual_stages, self._config.train.micro_batches)

    def _mfu_rule(self, kind: str, n: int) -> str:
        dtype = self._config.execution.dtype.value
        of_experts = " for a token, of the experts those that it is sent to" if self._moe_layers else ""
        if self._peak is None:
            return f"MFU not reported: no {dtype} peak FLOP/s known for device kind {kind!r}"
        return (
            f"MFU = (6N + 12·L·N_heads·H·T) x tokens/s / ({self._n_devices} x {self._peak / 1e12:.4g} TFLOP/s), "
            f"PaLM appendix B (arXiv:2204.02311); N = {short(n)} parameters that multiply{of_experts} "
            f"(no input table), peak of {kind} in {dtype}, dense; attention in full (not halved for causality), "
            "recompute not counted"
        )

    def _mfu_header(self, kind: str) -> str:
        if self._peak is None:
            return f"MFU not reported: no {self._config.execution.dtype.value} peak FLOP/s known for {kind!r}"
        peak = f"{self._n_devices:,} x {self._peak / 1e12:.4g} TFLOP/s"
        return f"MFU = (6N + 12·L·N_heads·H·T) x tokens/s / ({peak}): run.json"

    def _header(self, facts: dict[str, Any]) -> list[str]:
        parameters = facts["parameters"]
        processes = f" in {facts['n_processes']} processes" if facts["n_processes"] > 1 else ""
        machine = f"{self._n_devices} x {facts['device_kind']}{processes}"
        size = f"{short(parameters['total'])} parameters ({parameters['total']:,})"
        if self._moe_layers:
            size += f", {short(parameters['active'])} active a token ({parameters['active']:,}),"
        if (trained := parameters["trained"]) < parameters["total"]:
            size += f", of which {short(trained)} ({trained:,}) are trained,"
        lines = [
            f"run folder {self._run_dir}",
            f"model of {size} on {machine}, {facts['tokens_per_step']:,} tokens a step",
            self._mfu_header(facts["device_kind"]),
        ]
        if (bubble := facts["pipeline_bubble"]) is not None:
            sharding, parts = self._config.sharding, self._config.train.micro_batches
            virtual = f" x {sharding.virtual_stages} virtual" if sharding.virtual_stages > 1 else ""
            lines.append(
                f"pipeline of {self._stages} stages{virtual}, {parts} micro-batches: each stage idles "
                f"{100 * bubble:.3g} % of a step's layers (pipeline bubble, by count of turns)"
            )
        return lines


def _is_points(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)
