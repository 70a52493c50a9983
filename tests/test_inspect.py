"""`python -m maxlm.inspect`: what it lists, verifies and hashes, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.state_hash import state_hash
from maxlm.config import CheckpointConfig, UserError
from maxlm.inspect import main


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Finished steps 2, 4 and 6, and an unfinished 8."""
    with Checkpointer(tmp_path / "checkpoints", CheckpointConfig(keep_last=2, keep_every=2)) as checkpointer:
        for step in (2, 4, 6):
            checkpointer.save(step, params={"w": jnp.full((4,), step)}, optimizer={}, meta={"data": {"position": step}})
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    return tmp_path


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    code = main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def statuses(found: dict[str, Any]) -> dict[int, str]:
    return {entry["step"]: entry["status"] for entry in found["steps"]}


def test_list_claims_no_verification(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = report(capsys, str(run_dir))
    assert (code, found["run_dir"], found["latest"]) == (0, str(run_dir), 6)
    assert statuses(found) == {2: "finished", 4: "finished", 6: "finished", 8: "unfinished"}
    assert "hash" not in found
    for entry in found["steps"][:3]:
        files = [p for p in (run_dir / "checkpoints" / str(entry["step"])).rglob("*") if p.is_file()]
        assert entry["files"] == len(files) - 1  # all but the manifest
        assert entry["bytes"] == sum(p.stat().st_size for p in files if p.name != "manifest.json")
    assert [entry["kept"] for entry in found["steps"]] == ["multiple of 2", *["newest 2, multiple of 2"] * 2, None]


def test_verify_names_the_file_and_exits_1(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = report(capsys, str(run_dir), "--verify")
    assert code == 0
    assert statuses(found) == {2: "ok", 4: "ok", 6: "ok", 8: "unfinished"}
    damaged = run_dir / "checkpoints" / "6" / "params" / "_METADATA"
    damaged.write_bytes(damaged.read_bytes().replace(b"{", b"[", 1))
    assert report(capsys, str(run_dir))[0] == 0  # not looked at
    code, found = report(capsys, str(run_dir), "--verify")
    assert (code, found["latest"]) == (1, 4)
    assert statuses(found)[6] == "damaged"
    assert found["steps"][2]["problems"][0].startswith("params/_METADATA: sha256 ")
    assert report(capsys, str(run_dir), "--verify", "--step", "4")[0] == 0
    assert main([str(run_dir), "--verify"]) == 1
    assert "step 6 is damaged: params/_METADATA: sha256" in capsys.readouterr().out
    (run_dir / "checkpoints" / "6" / "manifest.json").write_text("")
    code, found = report(capsys, str(run_dir))
    assert (code, statuses(found)[6]) == (1, "damaged")


def test_hash_is_that_of_the_newest_intact_or_the_named_step(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hashes = {step: state_hash(run_dir / "checkpoints", step) for step in (2, 4, 6)}
    assert len(set(hashes.values())) == 3
    code, found = report(capsys, str(run_dir), "--hash")
    assert (code, found["hash_step"], found["hash"]) == (0, 6, hashes[6])
    assert statuses(found) == {2: "finished", 4: "finished", 6: "ok", 8: "unfinished"}
    assert report(capsys, str(run_dir), "--hash", "--step", "2")[1]["hash"] == hashes[2]
    (run_dir / "checkpoints" / "6" / "meta" / "metadata").write_text("{}")
    code, found = report(capsys, str(run_dir), "--hash")
    assert (code, found["hash_step"], found["hash"]) == (1, 4, hashes[4])
    code, found = report(capsys, str(run_dir), "--hash", "--step", "6")
    assert (code, found["hash"]) == (1, None)
    assert main([str(run_dir), "--hash", "--step", "4"]) == 0
    assert f"state hash of step 4: {hashes[4]}" in capsys.readouterr().out


def test_mistakes_are_one_line(run_dir: Path, tmp_path: Path) -> None:
    for argv, words in (
        ([str(tmp_path / "none")], "no such folder"),
        ([str(run_dir / "checkpoints" / "2")], "no checkpoints"),
        ([str(run_dir), "--step", "5"], r"no such step; there are \[2, 4, 6, 8\]"),
        ([str(run_dir), "--verfy"], "unknown key --verfy"),
        ([], "RUN_DIR"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            main(argv)
        assert "\n" not in str(caught.value)


def test_listing_and_help_do_not_import_jax(run_dir: Path) -> None:
    for argument in ("--help", str(run_dir)):
        code = "import sys; from maxlm.inspect import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        code += "print([m for m in ('jax', 'orbax', 'numpy') if m in sys.modules])"
        command = [sys.executable, "-c", code, argument, *(["--verify"] if argument != "--help" else [])]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
        assert done.stdout.endswith("[]\n"), done.stdout
