"""Launch a training run somewhere: `python -m maxlm.launch --target gke --config configs/llama7b.py [--print] ...`.

The templates are in `launch/`; each works by hand, too, and ends in the same `python -m maxlm.train` line. What is
filled in are quoted words, never pieces of a program. Nothing is rendered for a mesh that does not fit the devices.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from maxlm.config import RunConfig, UserError
from maxlm.config.cli import parse_known, parse_run, run_command
from maxlm.config.launch import SHARED, TARGETS, Gke, Local, SkyPilot, Slurm, Target, TpuPod, TpuSlice, TpuVm

ROOT = Path(__file__).resolve().parent.parent

_PROG = "python -m maxlm.launch"
_USAGE = f"""\
{_PROG} --target TARGET --config FILE [--print] [options of the target] [overrides]

Start `python -m maxlm.train --config FILE [overrides]` somewhere. docs/launch.md has a section for each target.

--target TARGET    One of {", ".join(TARGETS)}; with --help: the options of that target.
--config FILE      Python file with get_config().
--print            Show the script or manifest, and start nothing. Needs no credentials and no network.
--debug            Show tracebacks.
"""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What was asked: where, and with which arguments of `maxlm.train`."""

    target: Target
    config: RunConfig
    arguments: tuple[str, ...]
    """CONFIG and the overrides, as they were typed."""

    @property
    def train(self) -> list[str]:
        """The command that every target ends in."""
        config, *overrides = self.arguments
        return ["python", "-m", "maxlm.train", "--config", config, *overrides]


@dataclass(frozen=True)
class Devices:
    """What the run finds at its target."""

    count: int
    groups: int
    """TPU slices, or hosts of GPUs: what `sharding.slices` may say."""
    hosts: int
    words: str


def devices(target: Target) -> Devices | None:
    """The devices of a target; None if nobody said how many this machine has."""
    match target:
        case Local():
            count = target.devices
            return None if count is None else Devices(count, 1, 1, f"{count} devices of this machine")
        case TpuVm():
            return _tpu_devices(target.slice, 1)
        case TpuPod() | Gke():
            return _tpu_devices(target.slice, target.slices)
        case SkyPilot() if target.slice is not None:
            return _tpu_devices(target.slice, 1)
        case Slurm() | SkyPilot():
            count = target.nodes * target.gpus_per_node
            words = f"{count} GPUs: {target.nodes} x {target.gpus_per_node}"
            return Devices(count, target.nodes, target.nodes, words)
    assert_never(target)


def _tpu_devices(part: TpuSlice, slices: int) -> Devices:
    shape = "x".join(map(str, part.topology))
    words = (
        f"{part.devices * slices} devices: {slices} x {part.name}, {shape} chips on {part.hosts} hosts of "
        f"{part.chips_per_host}"
    )
    return Devices(part.devices * slices, slices, part.hosts * slices, words)


def check(launch: Launch) -> None:
    """Everything that can be known before a machine is rented.

    Raises:
        UserError: the mesh does not fit the devices, or files would be written where they are lost.
    """
    found, target, config = devices(launch.target), launch.target, launch.config
    for word in launch.arguments:
        if not word.isprintable():
            raise UserError(f"{word!r} has a line break or another control character; leave it out")
    if found is None:
        return
    config.validate(found.count)
    slices = config.sharding.slices
    crosses = isinstance(target, Gke | TpuPod)
    if slices != found.groups and (crosses or slices != 1):
        raise UserError(
            f"sharding.slices = {slices}, but these are {found.groups} "
            f"{'TPU slice(s)' if isinstance(target, Gke | TpuPod | TpuVm) else 'host(s)'}; "
            f"add --sharding.slices={found.groups}"
        )
    match target:
        case Gke() | SkyPilot():
            folder = SHARED + "/"
            why = f"only {SHARED} outlives the machines"
        case TpuPod() if found.hosts > 1:
            folder, why = "/", "all hosts must see the same folder, a mounted bucket or file system"
        case Local() | TpuVm() | TpuPod() | Slurm():
            return
        case _:
            assert_never(target)
    paths = {"run_dir": config.run_dir} | {
        f"data.datasets.{i}.path": dataset.path for i, dataset in enumerate(config.data.datasets)
    }
    wrong = [
        f"{key} = {path}: {why}; use --{key}={folder if len(folder) > 1 else '/MOUNTED/'}{path.lstrip('/')}"
        for key, path in paths.items()
        if not path.startswith(folder)
    ]
    if wrong:
        raise UserError("\n".join(wrong))


def render(launch: Launch) -> str:
    """The script or manifest, whole: a function of the launch and the template alone."""
    target = launch.target
    match target:
        case Local():
            return _script("local.sh", launch, {"ROOT": str(ROOT)})
        case TpuVm():
            return _script("tpu_vm.sh", launch, {"ROOT": str(ROOT), "PYTHON": target.python})
        case TpuPod():
            runtime = target.slice.generation.runtime
            assert runtime is not None, "TpuPod refuses the others"
            settings = {
                "NAME": target.name,
                "ZONE": target.zone,
                "ACCELERATOR": target.slice.name,
                "RUNTIME": runtime,
                "SLICES": str(target.slices),
                "SPOT": json.dumps(target.spot),
                "REPO": target.repo,
                "FOLDER": target.folder,
                "PYTHON": target.python,
                "RESTARTS": str(target.restarts),
            }
            return _script("tpu_pod.sh", launch, settings)
        case Slurm():
            options = {
                "job-name": target.name,
                "nodes": target.nodes,
                "gpus-per-node": target.gpus_per_node,
                "time": target.time,
                "partition": target.partition,
                "account": target.account,
            }
            given = {name: str(value) for name, value in options.items() if value is not None}
            return _with_directives(_script("slurm_gpu.sh", launch, {}), given)
        case Gke():
            # Kubernetes reads $(NAME) and $$ in a command.
            command = json.dumps([word.replace("$", "$$") for word in launch.train], ensure_ascii=False)
            part = target.slice
            values = {
                "NAME": target.name,
                "RESTARTS": str(target.restarts),
                "SLICES": str(target.slices),
                "HOSTS": str(part.hosts),
                "TPU": part.generation.gke,
                "TOPOLOGY": "x".join(map(str, part.topology)),
                "IMAGE": target.image,
                "COMMAND": command,
                "CHIPS_PER_HOST": str(part.chips_per_host),
                "CLAIM": target.claim,
            }
            text = _manifest("gke_jobset.yaml", launch, values, f"; node pools of {part.machine}")
            return text if target.spot else "".join(
                line for line in text.splitlines(keepends=True) if "# spot nodes only" not in line
            )  # fmt: skip
        case SkyPilot():
            values = {
                "NAME": target.name,
                "NODES": str(target.nodes),
                "ACCELERATOR": target.accelerator if target.slice is None else f"tpu-{target.slice.name}",
                "SPOT": json.dumps(target.spot),
                "BUCKET": target.bucket,
                "EXTRA": "gpu" if target.slice is None else "tpu",
                "COMMAND": shlex.join(launch.train),
            }
            return _manifest("skypilot.yaml", launch, values)
    assert_never(target)


def _template(name: str) -> tuple[list[str], str]:
    """The comment that a file of launch/ begins with, and the rest."""
    path = ROOT / "launch" / name
    if not path.is_file():
        raise UserError(f"{path}: no such file; run this from a clone of the repository, with pip install -e .")
    lines = path.read_text().splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return lines[:end], "".join(lines[end:])


def _notes(launch: Launch, more: str = "") -> list[str]:
    found = devices(launch.target)
    return [
        "# Rendered by python -m maxlm.launch.\n",
        f"# {found.words}{more}\n" if found else "",
        f"# {shlex.join(launch.train)}\n",
    ]


def _script(name: str, launch: Launch, settings: Mapping[str, str]) -> str:
    """A script of launch/, with its environment variables and its arguments set in its first lines."""
    head, body = _template(name)
    lines = [f"export {key}={shlex.quote(value)}\n" for key, value in settings.items()]
    lines.append(f"set -- {shlex.join(launch.arguments)}\n")
    return "".join([*head, "#\n", *_notes(launch), *lines, body])


def _with_directives(script: str, options: Mapping[str, str]) -> str:
    """The script with these #SBATCH options in place of its own."""
    lines = script.splitlines(keepends=True)
    kept = [line for line in lines if not any(line.startswith(f"#SBATCH --{name}=") for name in options)]
    return "".join([kept[0], *(f"#SBATCH --{name}={value}\n" for name, value in options.items()), *kept[1:]])


def _manifest(name: str, launch: Launch, values: Mapping[str, str], more: str = "") -> str:
    """A manifest of launch/, with ${NAME} replaced by what NAME is."""
    _, body = _template(name)
    return "".join([*_notes(launch, more), re.sub(r"\$\{([A-Z_]+)\}", lambda found: values[found[1]], body)])


def start(launch: Launch) -> int:
    """Hand the rendered text to the program that runs it; its exit code.

    Raises:
        UserError: that program is not installed.
    """
    text = render(launch)
    match launch.target:
        case Local() | TpuVm():
            return _run(["bash", "-c", text])
        case TpuPod():
            return _run(["bash", "-c", text], needs="gcloud")
        case Gke():
            return _run(["kubectl", "apply", "-f", "-"], text)
        case Slurm():
            return _run(["sbatch"], text)
        case SkyPilot():
            with tempfile.NamedTemporaryFile("w", prefix="maxlm-", suffix=".yaml") as file:
                file.write(text)
                file.flush()
                return _run(["sky", "jobs", "launch", "--yes", file.name])
    assert_never(launch.target)


def _run(command: Sequence[str], text: str | None = None, needs: str | None = None) -> int:
    program = needs or command[0]
    if shutil.which(program) is None:
        raise UserError(
            f"{program} is not installed on this machine; install it, or add --print and use the text elsewhere"
        )
    return subprocess.run(command, input=text, text=True, cwd=ROOT).returncode


def parse(argv: Sequence[str]) -> tuple[Launch, bool]:
    """Read `--target TARGET --config FILE [--print] [options of the target] [overrides]`; also whether to print only.

    Raises:
        UserError: something is missing, unknown or of the wrong type, in words of the command line.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--target")
    parser.add_argument("--config")
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--debug", action="store_true")
    try:
        options, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from None
    if options.target is None and ({"-h", "--help"} & set(rest)):
        print(_USAGE)
        sys.exit(0)
    if options.target not in TARGETS:
        known = ", ".join(TARGETS)
        raise UserError(f"--target {options.target or 'is missing'}: choose one of {known} (--help says what they are)")
    prog = f"{_PROG} --target {options.target}"
    target, overrides = parse_known(TARGETS[options.target], rest, prog=prog, description=_USAGE)
    if options.config is None:
        raise UserError("--config is missing; name a file, for example --config configs/llama7b.py")
    asked = parse_run(["--config", options.config, *overrides], prog=_PROG, description="")
    if asked.print_config:
        raise UserError("--print_config belongs to maxlm.train; here --print shows what would be launched")
    file = Path(options.config).resolve()
    if file.is_relative_to(ROOT):  # where every target runs the command
        file = file.relative_to(ROOT)
    elif isinstance(target, TpuPod | Gke | SkyPilot):
        raise UserError(
            f"--config {options.config}: is outside {ROOT}, which is all that the machines get; move it there"
        )
    return Launch(target=target, config=asked.config, arguments=(str(file), *overrides)), options.print


def main(argv: list[str]) -> int:
    """The command line."""
    launch, only_print = parse(argv)
    check(launch)
    if only_print:
        print(render(launch), end="")
        return 0
    return start(launch)


if __name__ == "__main__":
    run_command(main)
