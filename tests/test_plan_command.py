"""`python -m maxlm.plan` as a user runs it: what it prints, its exit codes, and what it does not import."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aot import require_compiler
from rich.console import Console

from maxlm.config import RunConfig, UserError
from maxlm.config.cli import load_config
from maxlm.config.serialize import save
from maxlm.hardware import CHIPS
from maxlm.plan import __main__, machines
from maxlm.plan.analysis import CompilerReport, analyse
from maxlm.plan.machines import memory_limit, parse_machine
from maxlm.plan.tables import print_verdict
from maxlm.shapes import flops_per_token, parameter_count

ROOT = Path(__file__).parent.parent
TINY, SEVEN_B = ("--config", "configs/tiny.py"), ("--config", "configs/llama7b.py")
KEYS = {
    "parameters", "target", "devices", "mesh", "fits", "tier", "hbm_bytes", "peak_bytes", "bytes", "flops_per_token",
    "flops_per_step", "traffic", "bound", "tokens_per_day", "device_hours", "days", "breaks_first", "warnings",
}  # fmt: skip


def plan(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "maxlm.plan", *arguments]
    variables = {**os.environ, "COLUMNS": "120", **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=variables)


def as_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Standard output is one JSON object and nothing else."""
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def test_one_json_object_and_nothing_else() -> None:
    done = plan(*SEVEN_B, "--target", "tpu:v5p:4x4x4", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report, config = as_json(done), load_config(str(ROOT / "configs/llama7b.py"))
    assert set(report) >= KEYS
    assert report["parameters"]["total"] == parameter_count(config.model).total
    assert report["devices"] == 64 and report["mesh"]["fsdp"] == 32 and report["mesh"]["data"] == 2
    assert report["hbm_bytes"] == memory_limit(parse_machine("tpu:v5p:4x4x4"))
    assert report["tier"] == "analytic" and report["fits"] and report["peak_bytes"]["compiled"] is None
    assert report["peak_bytes"]["analytic"] == sum(report["bytes_at_peak"].values())
    total = flops_per_token(config.model, 2048, config.execution.remat).total
    assert report["flops_per_token"] == total and report["flops_per_step"] == total * 2048 * 2048
    assert {one["axis"] for one in report["traffic"]} == {"data", "fsdp"}
    seconds = report["bound"]["step_seconds"]
    assert report["tokens_per_day"] == pytest.approx(2048 * 2048 / seconds * 86_400)
    assert report["device_hours"] == pytest.approx(64 * config.train.steps * seconds / 3600)


def test_arithmetic_needs_no_jax() -> None:
    """Neither a plan, nor advice, nor a search, nor a page of HTML."""
    code = (
        "import sys\n"
        "from maxlm.plan.__main__ import main\n"
        "codes = [main(line.split()) for line in sys.argv[1:]]\n"
        "print(codes, sorted(name for name in ('jax', 'flax', 'numpy', 'optax') if name in sys.modules))"
    )
    lines = [
        "--config configs/tiny.py --target cpu:8 --json",
        "--config configs/llama7b.py --target gpu:h100:8 --sharding.fsdp 1 --train.batch_size 64 --json",
        "--config configs/tiny.py --target gpu:h200:8 --search",
    ]
    done = subprocess.run([sys.executable, "-c", code, *lines], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[0, 3, 0] []", done.stderr


def test_the_tables_name_what_matters() -> None:
    done = plan(*SEVEN_B, "--target", "tpu:v5p:4x4x4")
    assert done.returncode == 0
    words = "fits, with|64 devices as data 2 x fsdp 32|6.74 G|activations|by arithmetic|limited by|nothing is measured"
    words += "|tokens a day|device-hours|cache, if it decoded|FLOPs a byte|over ICI"
    for word in words.split("|"):
        assert word in done.stdout, word


def test_idle_stages_are_in_the_time_of_computing() -> None:
    """27 micro-batches on 4 stages: 31 turns, of which 27 compute, so a step lasts 31 / 27 of its products' time."""
    words = (*SEVEN_B, "--target", "gpu:h200:8", "--sharding.fsdp", "2", "--sharding.stage", "4",
             "--train.micro_batches", "27", "--train.batch_size", "2160", "--sharding.data", "1")  # fmt: skip
    report = as_json(plan(*words, "--json"))
    bound = report["bound"]
    assert bound["limited_by"] == "compute"
    assert bound["step_seconds"] == pytest.approx(bound["compute_seconds"] * 31 / 27)
    (line,) = (line for line in plan(*words).stdout.splitlines() if line.startswith("compute "))
    assert line.split()[1] == f"{bound['step_seconds']:,.3g}" and "13% of it idle stages" in line


def test_layers_that_are_unrolled_are_warned_of() -> None:
    words = (*TINY, "--target", "gpu:h200:1", "--execution.scan_layers")
    told = [any("scan_layers" in line for line in as_json(plan(*words, value, "--json"))["warnings"])
            for value in ("True", "False")]  # fmt: skip
    assert told == [False, True]


def test_a_lower_bound_is_called_one() -> None:
    """Where the compiler gave up before it knew how much is missing."""
    report = analyse(load_config(str(ROOT / "configs/llama7b.py")), parse_machine("tpu:v5p:4x4x4"))
    assert report.limit is not None
    for at_least, text in ((True, "at least 1.00 GiB a device too much"), (False, "fit: 1.00 GiB a device too much")):
        answer = CompilerReport(fits=False, peak=report.limit + 2**30, at_least=at_least, details={})
        console = Console(file=io.StringIO(), width=200)
        print_verdict(report.with_compiled(answer), console)
        assert isinstance(console.file, io.StringIO) and text in console.file.getvalue()


@pytest.mark.parametrize("columns", ["80", "120"])
def test_no_table_is_wider_than_the_console(columns: str) -> None:
    done = plan(*SEVEN_B, "--target", "tpu:v5p:4x4x4", COLUMNS=columns)
    assert max(map(len, done.stdout.splitlines())) <= int(columns)


@pytest.mark.slow
def test_what_does_not_fit_comes_with_changes_that_would() -> None:
    """Twelve bytes a parameter, whole on every device, are 75 GiB; a program has 59 of an H100."""
    words = (*SEVEN_B, "--target", "gpu:h100:8", "--sharding.fsdp", "1", "--train.batch_size", "64")
    done = plan(*words, "--json")
    report = as_json(done)
    assert done.returncode == 3 and not report["fits"]
    assert report["peak_bytes"]["analytic"] > report["hbm_bytes"]
    assert 1 <= len(report["changes"]) <= 3
    assert all(one["margin_bytes"] >= 0 for one in report["changes"])
    # The advice, followed: the overrides that it names make the same command succeed. No override chooses a class.
    here = [one for one in report["changes"] if one["target"] == report["target"]]
    overrides = next(
        one["changes"] for one in here if not any(what.startswith("optimizer =") for what in one["changes"])
    )
    again = plan(*words, *("--" + what.replace(" = ", "=") for what in overrides), "--json")
    assert again.returncode == 0, again.stderr
    text = plan(*words).stdout
    assert "does not fit" in text and "cheapest changes" in text


VERIFY = (*TINY, "--target", "gpu:h200:8", "--search", "--compile")
MISTAKES = {
    "unknown target": ((*TINY, "--target", "tpu:v5p:4x4"), "--target tpu:v5p:4x4"),
    "mesh": ((*SEVEN_B, "--target", "gpu:h200:8", "--sharding.data", "3"), "sharding: data=3 x fsdp=32 needs 96"),
    "slices of the machine": (
        (*SEVEN_B, "--target", "tpu:v5p:4x4x4:2"),
        "tpu:v5p:4x4x4:2 has 2 slices; use --sharding.slices 2",
    ),
    "slices of one": (
        (*SEVEN_B, "--target", "tpu:v5p:4x4x4", "--sharding.slices", "2"),
        "has 1 slice; use --sharding.slices 1",
    ),
    "slices of hosts": (
        (*SEVEN_B, "--target", "gpu:h100:8x8", "--sharding.slices", "2"),
        "has 8 hosts; use --sharding.slices 1 or --sharding.slices 8",
    ),
    "a pipeline without layers": ((*TINY, "--target", "cpu:8", "--sharding.stage", "8"), "sharding.stage 8"),
    "no config": (("--target", "cpu:8"), "--config is missing"),
    "picture": ((*TINY, "--target", "cpu:8", "--picture", "x.gif"), ".png or .html"),
    "picture in no folder": ((*TINY, "--target", "cpu:8", "--picture", "no/x.png"), "no folder no"),
    "out without search": ((*TINY, "--target", "cpu:8", "--out", "x.json"), "add --search"),
    "out is no JSON": ((*TINY, "--target", "gpu:h200:8", "--search", "--out", "x.py"), "for example --out x.json"),
    "out in no folder": ((*TINY, "--target", "gpu:h200:8", "--search", "--out", "no/x.json"), "no folder no"),
    "searching a processor": ((*TINY, "--target", "cpu:8", "--search"), "name a machine"),
    "no target": ((*TINY, "--target", ""), "--target  is unknown"),
    "a switch with a value": (
        (*TINY, "--target", "cpu:8", "--json=1"),
        "--json: ignored explicit argument '1'; write --json",
    ),
    "verify nothing": ((*VERIFY, "--verify", "0"), "--verify 0 must be from 1 to 10"),
    "verify too many": ((*VERIFY, "--verify", "11"), "--verify 11 must be from 1 to 10"),
    "verify without a compiler": ((*VERIFY[:-1], "--verify", "2"), "add --search --compile"),
    "verify no number": ((*VERIFY, "--verify", "few"), "invalid int value: 'few'; write --verify 3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_line(name: str) -> None:
    arguments, words = MISTAKES[name]
    done = plan(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert all(line.startswith("error: ") for line in done.stderr.splitlines()) and words in done.stderr


def nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """No work is done in this process."""
    for work in ("analyse", "search"):
        monkeypatch.setattr(__main__, work, lambda *arguments: pytest.fail("work was done"))


def test_files_that_cannot_be_written_are_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_happens(monkeypatch)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "folder.png").mkdir()
    for arguments in (
        (*TINY, "--target", "gpu:h200:8", "--search", "--out", str(tmp_path / "folder.json")),
        (*TINY, "--target", "gpu:h200:8", "--picture", str(tmp_path / "folder.png")),
    ):
        with pytest.raises(UserError, match=r"folder\.\w+ cannot be written; name another file$"):
            __main__.main(list(arguments))


def test_a_missing_compiler_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_happens(monkeypatch)
    monkeypatch.setattr(machines, "missing_compiler", lambda target: "no compiler")
    with pytest.raises(UserError, match="no compiler"):
        __main__.main([*TINY, "--target", "gpu:h200:8", "--compile"])


def verify(
    monkeypatch: pytest.MonkeyPatch, answers: Sequence[CompilerReport | UserError], *words: str
) -> tuple[int, list[RunConfig]]:
    """Exit code of a search whose compiler gives these answers one after the other; what it was asked."""
    asked = []

    def ask(config: RunConfig, target: Any) -> CompilerReport:
        asked.append(config)
        answer = answers[(len(asked) - 1) % len(answers)]
        if isinstance(answer, UserError):
            raise answer
        return answer

    monkeypatch.setattr(__main__, "prepare_compiler", lambda target: None)
    monkeypatch.setattr(__main__, "_ask_compiler", ask)
    return __main__.main([*SEVEN_B, "--target", "gpu:h200:8", "--search", "--compile", *words]), asked


FITS = CompilerReport(fits=True, peak=2**30, details={})
TOO_LARGE = CompilerReport(fits=False, peak=2**40, details={})
REFUSED = UserError("vmem is exhausted")


def test_a_search_goes_on_after_what_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, asked = verify(monkeypatch, [REFUSED, TOO_LARGE, FITS, FITS], "--verify", "2", "--json")
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (code, err, len(asked)) == (0, "", 4)
    places = [place for place, one in enumerate(found["ranked"]) if "compiled_peak_bytes" in one]
    assert len(places) == 3 and found["chosen"] in places
    assert found["ranked"][found["chosen"]]["compiled_peak_bytes"] == 2**30
    (failed,) = found["verified"].pop("failed")
    assert failed["message"] == "vmem is exhausted" and failed["place"] not in places
    assert found["verified"] == {"wanted": 2, "fit": 2, "compiled": 3}


@pytest.mark.slow
def test_a_search_says_what_it_compiles_and_how_many_it_verified(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, asked = verify(monkeypatch, [REFUSED, FITS, TOO_LARGE, TOO_LARGE, TOO_LARGE])
    out, err = capsys.readouterr()
    assert code == 0 and len(asked) == __main__.MOST_COMPILED
    assert "verified 2 of 3 by the compiler, which compiled 8" in out
    assert len(re.findall(r"number \d+ cannot be compiled: vmem is exhausted", out)) == 2
    assert len(re.findall(r"^compiling number \d+: \w+ \d+", err, re.MULTILINE)) == len(asked)
    assert verify(monkeypatch, [TOO_LARGE])[0] == 3
    with pytest.raises(UserError, match="vmem is exhausted"):
        verify(monkeypatch, [REFUSED])


def test_the_target_may_stand_in_the_config(tmp_path: Path) -> None:
    tiny = load_config(str(ROOT / "configs/tiny.py"))
    file = tmp_path / "run.json"
    save(dataclasses.replace(tiny, target="gpu:h200:4"), file)
    assert as_json(plan("--config", str(file), "--json"))["target"] == "gpu:h200:1x4"
    save(dataclasses.replace(tiny, target=None), file)
    done = plan("--config", str(file))
    assert done.returncode == 2 and done.stderr.startswith("error: --target is missing")


def test_a_search_writes_a_config_that_the_same_command_takes(tmp_path: Path) -> None:
    file, page = tmp_path / "found.json", tmp_path / "memory.html"
    done = plan(*TINY, "--target", "gpu:h200:8", "--search", "--json", "--out", str(file), "--picture", str(page))
    assert done.returncode == 0, done.stderr
    found = as_json(done)
    best = found["ranked"][found["chosen"]]
    assert found["fits"] and found["tier"] == "analytic" and "<html" in page.read_text()
    again = as_json(plan("--config", str(file), "--json"))
    assert again["mesh"] == best["mesh"] and again["peak_bytes"]["analytic"] == best["peak_bytes"]
    assert again["bound"]["step_seconds"] == best["step_seconds"]
    tiny, loaded = load_config(str(ROOT / "configs/tiny.py")), load_config(str(file))
    assert loaded.target == "gpu:h200:1x8"
    loaded.validate(8)
    assert (
        dataclasses.replace(
            loaded, execution=tiny.execution, sharding=tiny.sharding, train=tiny.train, target=tiny.target
        )
        == tiny
    )
    listing = plan(*TINY, "--target", "gpu:h200:8", "--search").stdout
    assert "limited by" in listing and "--sharding." in listing


@pytest.mark.slow
def test_the_compiler_decides_when_asked() -> None:
    """This machine's own compiler, which is always there."""
    done = plan(*TINY, "--target", "cpu:8", "--compile", "--json")
    assert done.returncode == 0, done.stderr
    report = as_json(done)
    assert report["tier"] == "compiled" and report["peak_bytes"]["compiled"] == report["memory"]["peak"]
    assert {"collectives", "forbidden", "compile_cpu_seconds"} <= set(report)
    text = plan(*TINY, "--target", "cpu:8", "--compile").stdout  # from the cache
    assert "The compiler's word" in text and "by the compiler" in text and "all-reduce" in text


@pytest.mark.slow
def test_a_search_asks_the_compiler_for_its_best() -> None:
    require_compiler("h200")
    words = (*TINY, "--target", "gpu:h200:2", "--search", "--compile", "--verify", "1", "--json")
    found = as_json(plan(*words))
    assert found["tier"] == "compiled" and found["fits"]
    verified = [one for one in found["ranked"] if "compiled_peak_bytes" in one]
    assert len(verified) == 1
    assert found["ranked"][found["chosen"]]["compiled_peak_bytes"] > 0


def test_targets_lists_every_chip_and_what_plans_for_it() -> None:
    done = plan("--targets")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split(":")[1]: line for line in done.stdout.splitlines() if line.startswith(("tpu:", "gpu:"))}
    assert set(lines) == set(CHIPS)
    assert lines["h200"].rstrip().endswith("arithmetic, compiler") and lines["rtx4090"].rstrip().endswith("only")
    done = plan("--targets", "--jsno")
    assert (done.returncode, done.stderr) == (2, "error: --targets stands alone; leave out --jsno\n")


def test_a_consumer_gpu_is_for_arithmetic() -> None:
    done = plan(*TINY, "--target", "gpu:rtx4090:1")
    assert done.returncode == 0 and "75% of the 24.0 GiB of each rtx4090" in done.stdout
    done = plan(*TINY, "--target", "gpu:rtx4090:1", "--compile")
    assert done.returncode == 2 and "rtx4090 is planned for by arithmetic only" in done.stderr


def test_what_breaks_is_told_when_asked() -> None:
    asked = (*SEVEN_B, "--target", "tpu:v5p:4x4x4")
    assert "breaks first" not in plan(*asked).stdout
    assert plan(*asked, "--breaks").stdout.count("breaks first: on ") == 2


def test_a_pipe_gets_whole_lines_and_no_empty_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "maxlm.plan", *SEVEN_B, "--target", "tpu:v5p:4x4x4", "--breaks"],
        cwd=ROOT, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "COLUMNS"},
    )  # fmt: skip
    assert max(map(len, done.stdout.splitlines())) > 120
    assert all(line.startswith("breaks first: on ") for line in done.stdout.splitlines() if "cannot be cut" in line)
    assert not any(line.startswith("a step") for line in plan(*TINY, "--target", "cpu:1").stdout.splitlines())
