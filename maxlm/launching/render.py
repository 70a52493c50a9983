"""A launch as the text that starts it: a template of `launch/`, filled in.

What is filled in are quoted words, never pieces of a program.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import assert_never

from maxlm.config import UserError
from maxlm.launching.destinations import Gke, Local, SkyPilot, Slurm, SlurmClean, TpuPod, TpuVm
from maxlm.launching.request import Launch, devices

ROOT = Path(__file__).resolve().parent.parent.parent
"""Of the repository."""


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
            nodes = {"nodes": target.nodes, "gpus-per-node": target.gpus_per_node}
            return _with_directives(_script("slurm_gpu.sh", launch, {}), target, nodes)
        case SlurmClean():
            return _with_directives(_script("slurm_clean.sh", launch, {}), target, {})
        case Gke():
            # Kubernetes reads $(NAME) and $$ in a command.
            command = json.dumps([word.replace("$", "$$") for word in launch.command], ensure_ascii=False)
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
                "COMMAND": shlex.join(launch.command),
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
        f"# {shlex.join(launch.command)}\n",
    ]


def _script(name: str, launch: Launch, settings: Mapping[str, str]) -> str:
    """A script of launch/, with its environment variables and its arguments set in its first lines."""
    head, body = _template(name)
    lines = [f"export {key}={shlex.quote(value)}\n" for key, value in settings.items()]
    lines.append(f"set -- {shlex.join(launch.arguments)}\n")
    return "".join([*head, "#\n", *_notes(launch), *lines, body])


def _with_directives(script: str, job: Slurm | SlurmClean, more: Mapping[str, int]) -> str:
    """The script with the job's #SBATCH options in place of its own."""
    said = {"job-name": job.name, **more, "time": job.time, "partition": job.partition, "account": job.account}
    options = {name: value for name, value in said.items() if value is not None}
    lines = script.splitlines(keepends=True)
    kept = [line for line in lines if not any(line.startswith(f"#SBATCH --{name}=") for name in options)]
    return "".join([kept[0], *(f"#SBATCH --{name}={value}\n" for name, value in options.items()), *kept[1:]])


def _manifest(name: str, launch: Launch, values: Mapping[str, str], more: str = "") -> str:
    """A manifest of launch/, with ${NAME} replaced by what NAME is."""
    _, body = _template(name)
    return "".join([*_notes(launch, more), re.sub(r"\$\{([A-Z_]+)\}", lambda found: values[found[1]], body)])
