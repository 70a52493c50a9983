"""The commands by which other servers serve a folder in Hugging Face's form.

Options by the documentation of vLLM (docs.vllm.ai, `vllm serve`) and of SGLang (docs.sglang.io, server arguments).
"""

from __future__ import annotations

import enum
import shlex
from typing import assert_never

from maxlm.config import MESH_AXES, ChosenModel, EngineConfig, UserError, WeightFormat

_PARALLEL = {"tensor": "--tensor-parallel-size", "stage": "--pipeline-parallel-size", "data": "--data-parallel-size"}
"""Mesh axis -> what both call it."""


class OtherServer(enum.Enum):
    """Servers that are not this one."""

    VLLM = "vllm"
    SGLANG = "sglang"


def command(
    server: OtherServer,
    model: ChosenModel,
    *,
    max_seq_len: int,
    name: str,
    host: str,
    port: int,
    slots: int,
    key: str | None,
) -> str:
    """One line for a shell.

    Args:
        server: whose.
        model: of it the folder and the layout.
        max_seq_len: tokens of a text, at most.
        name: what requests call the model.
        host: address to listen at.
        port: TCP port.
        slots: texts at once; if they are the engine's default, the server takes its own.
        key: variable of the environment that holds what clients must send; None: nothing.

    Raises:
        UserError: there is nothing like it there.
    """
    check(server, model)
    match server:
        case OtherServer.VLLM:
            words, length, texts = ["vllm", "serve", model.place], "--max-model-len", "--max-num-seqs"
        case OtherServer.SGLANG:
            words = ["python", "-m", "sglang.launch_server", "--model-path", model.place]
            length, texts = "--context-length", "--max-running-requests"
        case _:
            assert_never(server)
    words += ["--served-model-name", name, length, str(max_seq_len), "--host", host, "--port", str(port)]
    for axis, option in _PARALLEL.items():
        if (size := getattr(model.sharding, axis)) > 1:
            words += [option, str(size)]
    if slots != EngineConfig().slots:
        words += [texts, str(slots)]
    return shlex.join(words) + ("" if key is None else f' --api-key "${key}"')


def check(server: OtherServer, model: ChosenModel) -> None:
    """Whether the server can take the model as it was chosen.

    Raises:
        UserError: it cannot.
    """
    asked = f"--print {server.value}"
    if model.hf is None:
        raise UserError(
            f"{asked} is for --hf DIR, a folder in Hugging Face's form; python -m maxlm.convert writes one of a run"
        )
    if model.weights is not WeightFormat.DTYPE:
        raise UserError(f"{asked} has nothing like --weights {model.weights.value}; leave it out")
    for axis in MESH_AXES:
        size = getattr(model.sharding, axis)
        if size == -1:
            raise UserError(f"{asked} is told no devices, so --sharding.{axis} -1 is unknown; give a number")
        if size > 1 and axis not in _PARALLEL:
            raise UserError(
                f"{asked} has nothing like --sharding.{axis} {size}; use --sharding.{', --sharding.'.join(_PARALLEL)}"
            )
