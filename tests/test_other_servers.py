"""`python -m maxlm.serve --print`: the command of another server."""

from __future__ import annotations

import shlex
from pathlib import Path

import published
import pytest

from maxlm.config import ChosenModel, ShardingConfig, UserError, WeightFormat
from maxlm.serve import main
from maxlm.serving.other_servers import OtherServer, check


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "my model"
    published.write_model(published.MODELS["llama"], place)
    return place


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    main(list(words))
    (line,) = capsys.readouterr().out.splitlines()
    return shlex.split(line)


def test_vllm(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAXLM_API_KEY", raising=False)
    words = ("--print", "vllm", "--hf", str(folder))
    assert printed(capsys, *words, "--sharding.tensor", "4", "--sharding.stage", "2") == [
        "vllm", "serve", str(folder), "--served-model-name", "my model", "--max-model-len", "32",
        "--host", "127.0.0.1", "--port", "8000", "--tensor-parallel-size", "4", "--pipeline-parallel-size", "2",
    ]  # fmt: skip


def test_sglang(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The key itself is not printed."""
    monkeypatch.setenv("MAXLM_API_KEY", "secret")
    more = ("--name", "mine", "--port", "30000", "--sharding.data", "2", "--engine.slots", "64", "--host", "0.0.0.0")
    assert printed(capsys, "--print", "sglang", "--hf", str(folder), *more) == [
        "python", "-m", "sglang.launch_server", "--model-path", str(folder), "--served-model-name", "mine",
        "--context-length", "32", "--host", "0.0.0.0", "--port", "30000", "--data-parallel-size", "2",
        "--max-running-requests", "64", "--api-key", "$MAXLM_API_KEY",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (ChosenModel(run="runs/x"), r"--print vllm is for --hf DIR.*maxlm.convert"),
        (ChosenModel(gguf="x.gguf"), r"--print vllm is for --hf DIR"),
        (ChosenModel(hf="x", weights=WeightFormat.INT8), r"nothing like --weights int8"),
        (ChosenModel(hf="x", sharding=ShardingConfig(tensor=-1)), r"--sharding.data -1|--sharding.tensor -1"),
        (ChosenModel(hf="x", sharding=ShardingConfig(data=1, fsdp=2)), r"nothing like --sharding.fsdp 2"),
    ],
)
def test_what_another_server_cannot_do(model: ChosenModel, match: str) -> None:
    with pytest.raises(UserError, match=match):
        check(OtherServer.VLLM, model)
