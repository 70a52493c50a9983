"""Cleaning past one machine: what SLURM is handed, by stand-ins for its programs; and SLURM and Ray themselves."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_cleaning import begun, real_job, texts, without_seconds, written

from maxlm.config import UserError
from maxlm.config.cleaning.engines import CleaningEngine, SlurmArrays
from maxlm.config.errors import MachineFailure
from maxlm.data.__main__ import main
from maxlm.data.claimed import claimed
from maxlm.data.cleaning import cluster
from maxlm.data.cleaning.cleaning_work import CleaningWork, finished
from maxlm.data.cleaning.cluster import JOBS, ClusterTask, run_on_cluster
from maxlm.data.cleaning.local_pool import run_locally
from maxlm.launch import parse_launch
from maxlm.launching.render import render

SLURM = SlurmArrays(partition="cpu", tasks_at_once=3, memory_gb=5, time="1:00:00")
NOT_WAITED_FOR = "the same command says later what became of them"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight files, one of them a copy of another."""
    (tmp_path / "input").mkdir()
    for i in range(8):
        lines = [json.dumps({"text": text}) for text in texts(i % 7, 40)]
        (tmp_path / "input" / f"{i}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "input"


@pytest.fixture
def work(data: Path, tmp_path: Path) -> CleaningWork:
    return begun(real_job(data), tmp_path / "out")


# What SLURM is handed


@pytest.fixture
def handed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[str, str]]]:
    """Instead of SLURM's programs some that keep what they get: command lines and scripts of the arrays so far.

    `queue` in their folder is what squeue says; sbatch refuses what `refused` there names.
    """
    pytest.importorskip("datatrove")
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, body in {
        "sbatch": f"""n=$(ls {bin} | grep -c script)
if [ -f {bin}/refused ] && grep -q -f {bin}/refused "${{@: -1}}"; then echo "invalid partition" >&2; exit 1; fi
echo "$@" > {bin}/line$n; cat "${{@: -1}}" > {bin}/script$n; echo Submitted batch job $((100 + n))""",
        "squeue": f"if [ -f {bin}/queue ]; then cat {bin}/queue; else echo no controller >&2; exit 1; fi",
    }.items():
        (bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin / name).chmod(0o755)
    (bin / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")

    def arrays() -> list[tuple[str, str]]:
        count = len(list(bin.glob("script*")))
        both = [((bin / f"line{i}").read_text(), (bin / f"script{i}").read_text()) for i in range(count)]
        return [(line, script) for line, script in both if "launch_pickled_pipeline" in script]

    return arrays


def directives(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))


def test_each_stage_is_an_array_after_the_one_before(
    work: CleaningWork, handed: Callable[[], list[tuple[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_on_cluster(work, CleaningEngine.SLURM, 1, SLURM)
    arrays = handed()
    assert NOT_WAITED_FOR in capsys.readouterr().out
    assert [directives(script)["job-name"] for _, script in arrays] == [f"maxlm-{one.name}" for one in work.stages]
    numbers = json.loads((work.out / JOBS).read_text())
    assert len(set(numbers)) == len(arrays) > 3
    for (line, script), stage, before in zip(arrays, work.stages, [None, *numbers], strict=False):
        said = directives(script)
        assert ("--dependency" in line) == bool(before) and (not before or f"--dependency=afterok:{before}" in line)
        assert said["array"] == f"0-{stage.tasks - 1}%3" and said["kill-on-invalid-dep"] == "yes"
        assert (said["partition"], said["mem-per-cpu"], said["time"]) == ("cpu", "5G", "1:00:00")
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
        assert f"export PATH={Path(sys.executable).parent}:$PATH" in script


def test_a_job_hands_in_jobs_that_know_nothing_of_it(
    work: CleaningWork, handed: Callable[[], list[tuple[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM refuses a step whose memory is asked for in two ways: for a node by one job, for a core by another."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("#!/bin/bash\n", f"#!/bin/bash\nenv > {tmp_path}/environment\n"))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4096")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    run_on_cluster(work, CleaningEngine.SLURM, 1, SLURM)
    seen = [line for line in (tmp_path / "environment").read_text().splitlines() if line.startswith("SLURM_")]
    assert seen == ["SLURM_CONF=/etc/slurm.conf"] and os.environ["SLURM_MEM_PER_NODE"] == "4096"


def test_what_is_in_the_queue_is_not_handed_in_again(
    work: CleaningWork,
    handed: Callable[[], list[tuple[str, str]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_on_cluster(work, CleaningEngine.SLURM, 1, SLURM)
    first, numbers = handed(), json.loads((work.out / JOBS).read_text())
    (tmp_path / "bin" / "queue").write_text(f"{numbers[-1]}\n{numbers[-1]}\n9\n")  # and somebody else's
    capsys.readouterr()
    run_on_cluster(work, CleaningEngine.SLURM, 1, SLURM)
    assert handed() == first
    assert f"2 of its jobs are in SLURM's queue; {NOT_WAITED_FOR}" in capsys.readouterr().out
    (tmp_path / "bin" / "queue").unlink()
    with pytest.raises(MachineFailure, match=r"squeue does not say .*\(no controller\)"):
        run_on_cluster(work, CleaningEngine.SLURM, 1, SLURM)
    assert handed() == first


def test_what_failed_is_handed_in_again_alone(
    work: CleaningWork, handed: Callable[[], list[tuple[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    dill = pytest.importorskip("dill")
    run_on_cluster(work, CleaningEngine.SLURM, 1, SLURM)
    before = len(handed())
    pass0 = work.stages[0]
    missing = (1, pass0.tasks - 1)
    for task in set(range(pass0.tasks)) - {*missing}:
        work.do(0, task)
    capsys.readouterr()
    run_on_cluster(work, CleaningEngine.SLURM, 1, SLURM)
    assert f"2 of {pass0.tasks} tasks of pass0 were not done; see " in capsys.readouterr().out
    again = [directives(script)["array"] for _, script in handed()[before:]]
    assert again == ["0-1%3", *(f"0-{stage.tasks - 1}%3" for stage in work.stages[1:])]
    (task,) = dill.loads((work.out / "logs" / "pass0" / "executor.pik").read_bytes()).pipeline
    assert task == ClusterTask(str(work.out), 0, missing, os.getcwd())


def test_who_waits_hands_in_again_until_all_is_done(
    work: CleaningWork,
    handed: Callable[[], list[tuple[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first time one task fails, and nothing after its stage is done; and it is not tried for ever."""
    looks = iter(["in the queue", "one failed", "empty", "in the queue", "all were done"])

    def slurm(jobs: list[str]) -> int:
        match look := next(looks):
            case "in the queue":
                return 1
            case "one failed" | "all were done":
                for number, stage in enumerate(work.stages):
                    for task in set(range(stage.tasks)) - work.done(stage):
                        if look == "one failed" and (number, task) == (1, 0):
                            return 0
                        work.do(number, task)
        return 0

    monkeypatch.setattr(cluster, "_in_queue", slurm)
    monkeypatch.setattr(cluster, "PAUSE_S", 0.001)
    run_on_cluster(work, CleaningEngine.SLURM, 1, dataclasses.replace(SLURM, wait=True))
    out = capsys.readouterr().out
    assert finished(work.out) and not list(looks)
    assert out.count("this command waits for them") == 2 and "what is left is handed in again" in out


def test_what_fails_each_time_is_given_up(work: CleaningWork, handed: Callable[[], list[tuple[str, str]]]) -> None:
    with pytest.raises(MachineFailure, match=r"of pass0 were not done; see .*, after 2 tries \(--slurm\.tries\)"):
        run_on_cluster(work, CleaningEngine.SLURM, 1, dataclasses.replace(SLURM, wait=True, tries=2))
    assert len(handed()) == 2 * len(work.stages)


def test_what_slurm_takes_before_it_refuses_is_known(
    work: CleaningWork, handed: Callable[[], list[tuple[str, str]]], tmp_path: Path
) -> None:
    (tmp_path / "bin" / "refused").write_text("job-name=maxlm-report")
    with pytest.raises(UserError, match="SLURM does not take the jobs of report, as sbatch says above; `sinfo`"):
        run_on_cluster(work, CleaningEngine.SLURM, 1, SLURM)
    taken, numbers = handed(), json.loads((work.out / JOBS).read_text())
    assert len(numbers) == len(taken) == len(work.stages) - 1
    (tmp_path / "bin" / "queue").write_text(numbers[0])
    run_on_cluster(work, CleaningEngine.SLURM, 1, SLURM)
    assert handed() == taken


def test_a_name_that_a_script_cannot_hold_is_refused(
    data: Path, tmp_path: Path, handed: Callable[[], list[tuple[str, str]]]
) -> None:
    for name in ("two words", "Ann's", "[1]", "a$b", "50%j"):
        with pytest.raises(UserError, match=r"its whole path may have letters, digits and .* only"):
            run_on_cluster(begun(real_job(data), tmp_path / name), CleaningEngine.SLURM, 1, SLURM)
    assert not handed()


def test_without_slurm_is_one_line(work: CleaningWork, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch here"):
        run_on_cluster(work, CleaningEngine.SLURM, 1, SLURM)


def test_a_task_whose_process_is_killed_is_not_done_and_is_done_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its input is named from where the command was given, which is not where the task runs."""
    monkeypatch.chdir(data)
    work = begun(real_job(Path(".")), tmp_path / "out")
    task = ClusterTask(str(work.out), 0, (2, 1), str(data))
    monkeypatch.chdir("/")
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "worker_command", lambda out: ["bash", "-c", "kill -9 $$"])
        with pytest.raises(MachineFailure, match="task 1 of stage 0 failed: exit code -9"):
            task(None, 1, 2)
    assert not work.done(work.stages[0])
    task(None, 1, 2)
    assert work.done(work.stages[0]) == {1}


def test_a_ray_that_does_not_answer_is_one_line(work: CleaningWork, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datatrove")

    def refuse(**options: object) -> None:
        raise ConnectionError("no token\nin the call")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=refuse))
    with pytest.raises(MachineFailure, match=r"--engine ray: the Ray cluster .* \(no token in the call\)"):
        run_on_cluster(work, CleaningEngine.RAY, 1, SLURM)


# SLURM and Ray themselves


def partition() -> str:
    """Of the SLURM that answers here: the first that it names."""
    try:
        asked = subprocess.run(
            ["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, timeout=20, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        pytest.skip("no SLURM here: sinfo is not installed or does not answer")
    if asked.returncode or not asked.stdout.split():
        pytest.skip(f"no SLURM here: sinfo says {asked.stderr.strip() or 'no partition'}")
    return asked.stdout.split()[0]


def wait_for(ended: Callable[[], bool]) -> None:
    """Ten minutes at most, of a cluster that may be busy."""
    for _ in range(600):
        if ended():
            return
        time.sleep(1)
    raise AssertionError("nothing has ended")


def assert_as_here(out: Path, data: Path, folder: Path) -> None:
    """The same bytes as this machine's processes write."""
    here = begun(real_job(data), folder)
    with claimed(here.out, "cleans") as lock:
        run_locally(here, 3, lambda stage, done, tasks: None, lock)
    assert written(out) == written(here.out)
    assert without_seconds(out) == without_seconds(here.out)


def test_datatroves_own_executor_keeps_the_same(data: Path, tmp_path: Path) -> None:
    """Asked as a user does: it forks, which a process with jax's threads should not."""
    pytest.importorskip("datatrove")
    words = ["clean", str(data), "--recipe=code", "--part_bytes=4000", "--workers=2"]
    command = [sys.executable, "-m", "maxlm.data", *words, "--engine=datatrove", f"--out={tmp_path / 'there'}"]
    subprocess.run(command, check=True, timeout=300)
    assert main([*words, f"--out={tmp_path / 'here'}"]) == 0
    assert written(tmp_path / "there") == written(tmp_path / "here")


@pytest.mark.parametrize("engine", [CleaningEngine.DATATROVE, CleaningEngine.RAY, CleaningEngine.SLURM])
@pytest.mark.nightly
def test_engines_keep_the_same(engine: CleaningEngine, work: CleaningWork, data: Path, tmp_path: Path) -> None:
    slurm = SlurmArrays(partition=partition() if engine is CleaningEngine.SLURM else None)
    run_on_cluster(work, engine, 2, slurm)
    wait_for(lambda: finished(work.out))  # nobody else waits for SLURM
    assert_as_here(work.out, data, tmp_path / "here")


@pytest.mark.nightly
def test_the_script_that_is_launched_cleans(data: Path, tmp_path: Path) -> None:
    """As a job of SLURM, from a folder where the environment is."""
    out = tmp_path / "launched"
    words = [
        "--target",
        "slurm-clean",
        "--print",
        str(data),
        "--recipe=code",
        "--part_bytes=4000",
        f"--out={out}",
        f"--slurm.partition={partition()}",
    ]
    asked, _ = parse_launch(words)
    root = tmp_path / "root"
    root.mkdir()
    (root / ".venv").symlink_to(sys.prefix)
    words = ["sbatch", "--wait", f"--output={root}/log"]
    subprocess.run(words, input=render(asked), text=True, cwd=root, timeout=600, check=True)
    here = tmp_path / "here"
    assert main(["clean", str(data), "--recipe=code", "--part_bytes=4000", f"--out={here}"]) == 0
    assert written(out) == written(here)


@pytest.mark.nightly
def test_a_task_that_slurm_kills_is_done_again(work: CleaningWork, data: Path, tmp_path: Path) -> None:
    slurm = SlurmArrays(partition=partition())
    run_on_cluster(work, CleaningEngine.SLURM, 1, slurm)
    jobs, last_pass = json.loads((work.out / JOBS).read_text()), work.stages[-2]
    subprocess.run(["scancel", f"{jobs[-2]}_1"], check=True)  # it waits yet for the arrays before it
    wait_for(lambda: not cluster._in_queue(jobs))
    assert work.done(last_pass) == {*range(last_pass.tasks)} - {1} and not work.done(work.stages[-1])
    run_on_cluster(work, CleaningEngine.SLURM, 1, slurm)
    run_on_cluster(work, CleaningEngine.SLURM, 1, slurm)  # says that they are in the queue
    wait_for(lambda: finished(work.out))
    assert_as_here(work.out, data, tmp_path / "here")
