"""Hand a rendered launch to the program that runs it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import assert_never

from maxlm.config import UserError
from maxlm.launching.destinations import Gke, Local, SkyPilot, Slurm, SlurmClean, TpuPod, TpuVm
from maxlm.launching.render import ROOT, render
from maxlm.launching.request import Launch


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
        case Slurm() | SlurmClean():
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
