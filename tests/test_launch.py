"""`python -m maxlm.launch`: what it renders is run here with stand-ins for the programs of clouds and clusters."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from maxlm import launch
from maxlm.config import UserError
from maxlm.config.cli import run_command
from maxlm.hardware import CHIPS, Torus
from maxlm.launching.destinations import DESTINATIONS
from maxlm.launching.render import render
from maxlm.launching.request import check
from maxlm.launching.tpu_slices import GENERATIONS, tpu_slice
from maxlm.train import EXIT_INTERRUPTED

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))

# Options that each target of training needs, for 64 devices; configs/llama7b.py has fsdp = 32.
OPTIONS = {
    "local": ["--devices=64"],
    "tpu-vm": ["--accelerator=v6e-8", "--sharding.fsdp=8"],
    "tpu-pod": ["--name=mine", "--zone=us-east5-a", "--accelerator=v5p-128", "--repo=https://example.com/maxlm.git"],
    "gke": ["--name=mine", "--accelerator=v5p-128", "--image=example.com/maxlm:1", "--claim=storage"],
    "slurm": ["--nodes=8"],
    "skypilot": ["--accelerator=H100:8", "--nodes=8", "--bucket=gs://mine"],
}
PLACES = ["--run_dir=/shared/run", "--data.datasets.0.path=/shared/data"]
NASTY = [
    "a b", "a  b ", "'", '"', "it's", "; touch PWNED", "$(touch PWNED)", "`touch PWNED`", "&& touch PWNED",
    "| touch PWNED", "\\", "\\'", "\\n", "*", "~", "#x", " # x", "${NAME}", "$NAME", "$$(NAME)", "$(NAME)", "!x", "-n",
    "a: b", "- a", "{a: b}", "%s", "\\0", "é", "\\g<0>", "> PWNED", "'; touch PWNED; '", '"; touch PWNED; "',
    "]", '", "x',
]  # fmt: skip


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of the repository in a folder with a space, whose python only notes its arguments."""
    root = tmp_path / "a clone"
    for folder in ("launch", "configs"):
        shutil.copytree(ROOT / folder, root / folder)
    program(root / ".venv/bin/python", 'printf "%s\\0" "$@" > "$NOTES"; exit "${EXIT_CODE:-0}"')
    (root / ".venv/.tpu").touch()
    for module in ("launch", "launching.render", "launching.start"):
        monkeypatch.setattr(importlib.import_module(f"maxlm.{module}"), "ROOT", root)
    monkeypatch.chdir(root)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return root


def program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def noted(clone: Path) -> list[str]:
    """The arguments that python was called with."""
    return (clone.parent / "notes").read_text().split("\0")[:-1]


def arguments(target: str, *more: str, config: str = "configs/llama7b.py") -> list[str]:
    return ["--target", target, "--config", config, *OPTIONS[target], *PLACES, *more]


def rendered(target: str, *more: str, config: str = "configs/llama7b.py") -> str:
    asked, _ = launch.parse_launch(arguments(target, *more, config=config))
    check(asked)
    return render(asked)


def complaint(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        check(launch.parse_launch(argv)[0])
    return str(caught.value)


def manifest(target: str, *more: str) -> dict[str, Any]:
    found = yaml.safe_load(rendered(target, *more))
    assert isinstance(found, dict)
    return found


def run_script(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", text], env={**os.environ, **environment}, capture_output=True, text=True)


# Accelerators


@pytest.mark.parametrize(
    ("name", "chips", "devices", "hosts", "topology"),
    [  # docs.cloud.google.com/tpu/docs/{v4,v5p,v5e,v6e,tpu7x}
        ("v4-8", 4, 4, 1, (2, 2, 1)),
        ("v4-32", 16, 16, 4, (2, 2, 4)),
        ("v4-4096", 2048, 2048, 512, (8, 16, 16)),
        ("v5p-8", 4, 4, 1, (2, 2, 1)),
        ("v5p-16", 8, 8, 2, (2, 2, 2)),
        ("v5p-64", 32, 32, 8, (2, 4, 4)),
        ("v5p-128", 64, 64, 16, (4, 4, 4)),
        ("v5p-256", 128, 128, 32, (4, 4, 8)),
        ("v5p-512", 256, 256, 64, (4, 8, 8)),
        ("v5p-2048", 1024, 1024, 256, (8, 8, 16)),
        ("v5litepod-1", 1, 1, 1, (1, 1)),
        ("v5litepod-8", 8, 8, 1, (2, 4)),
        ("v5litepod-16", 16, 16, 4, (4, 4)),
        ("v6e-4", 4, 4, 1, (2, 2)),
        ("v6e-32", 32, 32, 8, (4, 8)),
        ("v6e-256", 256, 256, 64, (16, 16)),
        ("tpu7x-8", 4, 8, 1, (2, 2, 1)),
        ("tpu7x-128", 64, 128, 16, (4, 4, 4)),
    ],
)
def test_sizes_of_slices(name: str, chips: int, devices: int, hosts: int, topology: tuple[int, ...]) -> None:
    found = tpu_slice(name)
    assert (found.name, found.chips, found.devices, found.hosts, found.topology) == (
        name, chips, devices, hosts, topology
    )  # fmt: skip
    assert found.chips_per_host * found.hosts == found.chips


def test_other_names_and_shapes_of_slices() -> None:
    assert tpu_slice("v5e-16") == tpu_slice("v5litepod-16")
    assert tpu_slice("7x-128") == tpu_slice("tpu7x-128")
    assert tpu_slice("v5p-384", "4x4x12").chips == 192
    assert tpu_slice("v5p-128", "2x4x8").topology == (2, 4, 8)


@pytest.mark.parametrize(
    ("name", "topology", "words"),
    [
        ("v5e-2", None, "v5e comes as v5e-1, v5e-4, v5e-8, v5e-16"),
        ("v5p-4", None, "use v5p-8, v5p-16"),
        ("v5p-9", None, "two a chip"),
        ("v5p-384", None, "or --target gke with --topology AxBxC"),
        ("v5p-128", "4x4", "must be AxBxC with a product of 64 chips"),
        ("v5p-128", "4x4x8", "must be AxBxC with a product of 64 chips"),
        ("v6e-16", "x", "must be AxB with a product of 16 chips"),
        ("h100-8", None, "8 chips are v4-16, v5p-16, v5e-8, v6e-8, 7x-16"),
        ("v5p", None, "not a TPU"),
        ("v5p-", None, "not a TPU"),
        ("v5p-8; ls", None, "not a TPU"),
    ],
)
def test_slices_that_do_not_exist(name: str, topology: str | None, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        tpu_slice(name, topology)


def test_the_table_of_chips_agrees_on_tori() -> None:
    """`maxlm/hardware.py` gives figures per device; where a chip is two devices, both must say so."""
    for generation in GENERATIONS:
        network = CHIPS[generation.names[-1]].network
        assert isinstance(network, Torus)
        assert (network.dims, network.devices_per_chip) == (generation.torus, generation.devices_per_chip)


# The same command everywhere, word for word


@pytest.mark.parametrize("target", OPTIONS)
def test_every_word_arrives_as_it_was_typed(target: str, clone: Path) -> None:
    overrides = [f"--observe.sample_prompt={word}" for word in NASTY]
    for word in NASTY:
        overrides += ["--observe.wandb_project", f"x{word}"]
    text = rendered(target, *overrides)
    own = OPTIONS[target] if target == "tpu-vm" else []
    expected = ["-m", "maxlm.train", "--config", "configs/llama7b.py", *own[1:], *PLACES, *overrides]
    line = next(line for line in text.splitlines() if line.startswith("# python -m maxlm.train"))
    assert shlex.split(line.removeprefix("# ")) == ["python", *expected]
    match target:
        case "gke":
            spec = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
            command = [as_kubernetes_reads(word) for word in spec["containers"][0]["command"]]
            assert command == ["python", *expected]
            return
        case "skypilot":
            script = yaml.safe_load(text)["run"]
            done = run_script(script, EXTRA="gpu", SKYPILOT_NUM_NODES="1")
        case "slurm":
            program(clone.parent / "bin/srun", 'shift; exec "$@"')
            done = run_script(text, SLURM_GPUS_ON_NODE="8")
        case "tpu-pod":
            cloud(clone, "ACTIVE")
            done = run_script(text)
        case _:
            done = run_script(text)
    assert (done.returncode, done.stderr) == (0, "")
    assert noted(clone) == expected
    assert not list(clone.parent.rglob("PWNED"))


CLEANING = ["/shared/text", "--recipe=fineweb", "--out=/shared/clean", "--slurm.partition=cpu"]


def test_every_word_of_a_cleaning_arrives_as_it_was_typed(clone: Path) -> None:
    """And what `sbatch` reads is the job's own, not that of the arrays."""
    own = ["--target", "slurm-clean", "--time=2-00:00:00", "--account=me", "--partition=small", "--name=wash"]
    words = [f"/texts/{word}" for word in NASTY]
    asked, _ = launch.parse_launch([*own, *words, *CLEANING[1:], "--pattern", NASTY[0]])
    check(asked)
    text = render(asked)
    expected = ["-m", "maxlm.data", "clean", *words, *CLEANING[1:], "--pattern", NASTY[0]]
    line = next(line for line in text.splitlines() if line.startswith("# python -m maxlm.data"))
    assert shlex.split(line.removeprefix("# ")) == ["python", *expected]
    done = run_script(text)
    assert (done.returncode, done.stderr) == (0, "")
    assert noted(clone) == [*expected, "--engine", "slurm", "--slurm.wait"]
    assert not list(clone.parent.rglob("PWNED"))
    said = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
    assert said == said | {"job-name": "wash", "time": "2-00:00:00", "account": "me", "partition": "small"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--config", "configs/tiny.py"], "--config configs/tiny.py belongs to training"),
        (["--engine=ray"], "--engine is slurm here"),
        (["--recipe=finewebb"], "did you mean fineweb"),
        (["--slurm.partishion=x"], "did you mean --slurm.partition"),
        (["--stdlib"], "name files and folders, or say --stdlib"),
        (["--text_key=a\nb"], "line break"),
        (["--partition=a b"], "--partition 'a b' must be a name as Slurm knows it"),
    ],
)
def test_mistakes_in_a_cleaning_are_told_before_it_is_handed_in(more: list[str], words: str) -> None:
    assert words in complaint("--target", "slurm-clean", *CLEANING, *more)
    assert "needs --slurm.partition" in complaint("--target", "slurm-clean", *CLEANING[:-1])


def as_kubernetes_reads(word: str) -> str:
    """$$ is a dollar, $(NAME) a variable if there is one; of all the others nothing changes."""
    return re.sub(r"\$(\$|\(\w+\))", lambda found: "$" if found[1] == "$" else "VARIABLE", word)


@pytest.mark.parametrize("target", ["local", "tpu-vm", "slurm"])
def test_a_config_path_with_spaces_and_quotes(target: str, clone: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s $(touch PWNED) "here"'
    shutil.copytree(ROOT / "configs", folder)
    config = str(folder / "llama7b.py")
    program(clone.parent / "bin/srun", 'shift; exec "$@"')
    done = run_script(rendered(target, config=config), SLURM_GPUS_ON_NODE="8")
    assert (done.returncode, done.stderr) == (0, "")
    assert noted(clone)[:4] == ["-m", "maxlm.train", "--config", config]
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize("target", OPTIONS)
@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\x1b", "\x85", "\u2028", "\udcff"])
def test_control_characters_are_refused(target: str, character: str) -> None:
    message = complaint(*arguments(target, f"--observe.sample_prompt=a{character}b"))
    assert "control character" in message and message.isprintable()


@pytest.mark.parametrize(
    ("target", "option"),
    [
        ("tpu-pod", "--name=a b"),
        ("tpu-pod", "--name=Mine"),
        ("tpu-pod", "--zone=$(ls)"),
        ("tpu-pod", "--repo=a\nb"),
        ("gke", "--name=a\nb"),
        ("gke", "--image=a: b"),
        ("gke", "--claim=${X}"),
        ("gke", "--slices=0"),
        ("slurm", "--time=1h; ls"),
        ("slurm", "--partition=a b"),
        ("slurm", "--nodes=0"),
        ("skypilot", "--bucket=gs://a b"),
        ("skypilot", "--bucket=mine"),
        ("skypilot", "--accelerator=H100:8\n"),
        ("skypilot", "--accelerator=H100:0"),
        ("local", "--devices=0"),
    ],
)
def test_options_that_are_no_plain_words(target: str, option: str) -> None:
    message = complaint(*arguments(target, option))
    assert option.partition("=")[0] in message and "\n" not in message


# What fits and what does not


@pytest.mark.parametrize("target", OPTIONS)
def test_a_mesh_that_does_not_fit_is_refused(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = complaint(*arguments(target, "--sharding.fsdp=3"))
    assert "fsdp=3 needs a multiple of 3 devices" in message
    devices = 8 if target == "tpu-vm" else 64
    assert f"there are {devices}; use sizes whose product is one of [1, 2, 4, 8" in message
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("target", "slices"), [("tpu-pod", 2), ("gke", 2)])
def test_slices_must_be_what_the_config_says(target: str, slices: int) -> None:
    message = complaint(*arguments(target, f"--slices={slices}"))
    assert f"sharding.slices = 1, but these are {slices} TPU slice(s); add --sharding.slices={slices}" in message
    assert complaint(*arguments(target, "--sharding.slices=2")).endswith("add --sharding.slices=1")
    assert f"# 128 devices: {slices} x v5p-128" in rendered(target, f"--slices={slices}", f"--sharding.slices={slices}")


def test_hosts_of_gpus_may_count_as_slices_or_not() -> None:
    assert rendered("slurm") and rendered("slurm", "--sharding.slices=8", "--sharding.fsdp=8")
    assert "8 host(s); add --sharding.slices=8" in complaint(*arguments("slurm", "--sharding.slices=2"))


def test_one_host_is_one_host() -> None:
    assert "v6e-16 has 4 hosts" in complaint(*arguments("tpu-vm", "--accelerator=v6e-16"))


def test_ironwood_is_rented_through_gke() -> None:
    assert "use --target gke" in complaint(*arguments("tpu-pod", "--accelerator=7x-128"))


@pytest.mark.parametrize(("target", "storage"), [("gke", "storage"), ("skypilot", "gs://mine")])
def test_files_must_outlive_the_machines(target: str, storage: str) -> None:
    lines = complaint(*arguments(target, "--run_dir=runs/x", "--data.datasets.0.path=/data")).splitlines()
    where = f"/shared, where the machines see {storage}, outlives them"
    assert lines == [
        f"run_dir = runs/x: only {where}; use --run_dir=/shared/runs/x",
        f"data.datasets.0.path = /data: only {where}; use --data.datasets.0.path=/shared/data",
    ]


def test_hosts_of_a_slice_must_see_the_same_files() -> None:
    assert "run_dir = runs/x: all hosts must see" in complaint(*arguments("tpu-pod", "--run_dir=runs/x"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--target is missing: choose one of local, tpu-vm"),
        (["--target"], "--target"),
        (["--target", "aws"], "--target aws: choose one of local"),
        (["--target", "local"], "--config is missing"),
        (["--target", "local", "--config", "configs/llama7.py"], "did you mean"),
        (["--target", "gke", "--config", "configs/tiny.py", "--name", "a"], "--accelerator"),
        (["--target", "slurm", "--config", "configs/tiny.py", "--nodes=two"], "two"),
        (["--target", "slurm", "--config", "configs/tiny.py", "--nodes=2", "--node=3"], "unknown key --node"),
        (["--target", "local", "--config", "configs/tiny.py", "--train.stps=3"], "did you mean --train.steps?"),
        (["--target", "local", "--config", "configs/tiny.py", "--print_config"], "belongs to maxlm.train"),
        (["--target", "gke", *OPTIONS["gke"], "--config", "maxlm/train.py"], "get_config"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    message = complaint(*argv)
    assert words in message and "\n" not in message


def test_machines_elsewhere_get_the_repository_only(tmp_path: Path) -> None:
    config = shutil.copy(ROOT / "configs/llama7b.py", tmp_path)
    assert "which is all that the machines get" in complaint(*arguments("gke", config=str(config)))


def test_a_bare_name_is_the_file_that_it_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert rendered("gke", config="llama7b") == rendered("gke", config=str(ROOT / "configs/llama7b.py"))


# Manifests and directives


@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize(("accelerator", "hosts", "chips"), [("v5p-128", 16, 4), ("v6e-8", 1, 8), ("7x-16", 2, 4)])
def test_a_jobset(accelerator: str, hosts: int, chips: int, spot: bool) -> None:
    options = ["--sharding.fsdp=8", f"--accelerator={accelerator}", "--slices=3", "--sharding.slices=3"]
    options += ["--train.batch_size=1536", *(["--spot"] if spot else [])]
    found = manifest("gke", *options)
    assert (found["apiVersion"], found["kind"], found["metadata"]["name"]) == (
        "jobset.x-k8s.io/v1alpha2", "JobSet", "mine"
    )  # fmt: skip
    assert found["spec"].keys() == {"failurePolicy", "replicatedJobs"}
    (part,) = found["spec"]["replicatedJobs"]
    assert part["replicas"] == 3
    job = part["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (hosts, hosts, 0)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    generation = tpu_slice(accelerator).generation
    selector = {
        "cloud.google.com/gke-tpu-accelerator": generation.gke,
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, tpu_slice(accelerator).topology)),
    }
    assert pod["nodeSelector"] == selector | ({"cloud.google.com/gke-spot": "true"} if spot else {})
    assert container["resources"] == {key: {"google.com/tpu": chips} for key in ("requests", "limits")}
    assert container["image"] == "example.com/maxlm:1"
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "storage"}}]

    # Preemption. Kubernetes accepts a podFailurePolicy only with restartPolicy Never and a container that exists.
    policy = found["spec"]["failurePolicy"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (10, "BlockingRecreate")
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert pod["restartPolicy"] == "Never"
    evicted, stopped = job["podFailurePolicy"]["rules"]
    assert evicted == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert stopped["onExitCodes"] == {
        "containerName": container["name"], "operator": "In", "values": [EXIT_INTERRUPTED]
    }  # fmt: skip
    assert pod["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("word", ["null", "yes", "on", "e1"])
def test_names_stay_words_in_yaml(word: str) -> None:
    assert manifest("gke", f"--name={word}", f"--claim={word}")["metadata"]["name"] == word
    assert manifest("skypilot", f"--name={word}")["name"] == word


def test_a_sky_task_on_gpus() -> None:
    found = manifest("skypilot", "--spot")
    assert found["resources"] == {
        "accelerators": "H100:8",
        "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": 3, "recover_on_exit_codes": [EXIT_INTERRUPTED]},
    }
    assert (found["name"], found["num_nodes"], found["envs"]) == ("maxlm", 8, {"EXTRA": "gpu"})
    assert found["file_mounts"] == {"/shared": {"source": "gs://mine", "mode": "MOUNT"}}


def test_a_sky_task_on_a_tpu() -> None:
    found = manifest("skypilot", "--accelerator=v6e-32", "--nodes=1", "--sharding.fsdp=32")
    assert (found["resources"]["accelerators"], found["num_nodes"], found["envs"]) == (
        "tpu-v6e-32", 1, {"EXTRA": "tpu"}
    )  # fmt: skip
    assert "one TPU slice" in complaint(*arguments("skypilot", "--accelerator=v6e-32", "--nodes=2"))
    assert "must be a node's GPUs, such as H100:8" in complaint(*arguments("skypilot", "--accelerator=H100"))


def test_nodes_of_sky_find_each_other(clone: Path) -> None:
    """As jax and `maxlm/processes.py` read it."""
    program(clone / ".venv/bin/python", 'env | grep ^JAX_ | sort > "$NOTES"')
    environment = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8"}
    done = run_script(manifest("skypilot")["run"], EXTRA="gpu", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    lines = set((clone.parent / "notes").read_text().splitlines())
    assert lines >= {"JAX_COORDINATOR_ADDRESS=10.0.0.7:8476", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1"}


def test_directives_of_slurm() -> None:
    text = rendered("slurm", "--gpus_per_node=4", "--time=1-00:00:00", "--account=me", "--sharding.fsdp=32")
    found = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert text.count("#SBATCH") == len(found), "an option is given twice"
    assert found["job-name"] == "maxlm"
    assert (found["nodes"], found["gpus-per-node"], found["ntasks-per-node"]) == ("8", "4", "1")
    assert (found["time"], found["account"], "partition" in found) == ("1-00:00:00", "me", False)
    assert found["signal"].startswith("TERM@") and "requeue" in found
    first_command = text.index("set --")
    assert text.rindex("#SBATCH") < first_command  # Slurm stops reading there


# Preemption


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (0, "RUNNING", False),
        (75, "RUNNING", True),
        (75, "COMPLETING", False),
        (75, "PENDING", False),
        (2, "RUNNING", False),
    ],
)
def test_slurm_goes_back_to_the_queue(code: int, state: str, requeued: bool, clone: Path) -> None:
    bin = clone.parent / "bin"
    program(bin / "srun", 'shift; exec "$@"')
    program(bin / "squeue", f"echo {state}")
    program(bin / "scontrol", 'echo "$@" > "$NOTES.requeue"')
    done = run_script(rendered("slurm"), SLURM_GPUS_ON_NODE="8", SLURM_JOB_ID="17", EXIT_CODE=str(code))
    assert (done.returncode, done.stderr) == (code, "")
    notes = clone.parent / "notes.requeue"
    assert notes.exists() == requeued
    assert not requeued or notes.read_text() == "requeue 17\n"


def test_the_shell_of_slurm_outlives_the_signal(clone: Path) -> None:
    """Slurm may signal it together with the processes; it must wait for them all the same."""
    program(clone.parent / "bin/srun", 'kill -TERM "$PPID"; sleep 0.2; exit 3')
    assert run_script(rendered("slurm"), SLURM_GPUS_ON_NODE="8").returncode == 3


def cloud(clone: Path, state: str, *codes: int | str) -> Path:
    """gcloud with one queued resource; hosts run the command in a home folder of their own.

    `codes`: exit codes of the runs; one with a word puts the resource into that state.
    """
    folder = clone.parent / "cloud"
    (folder / "home").mkdir(parents=True)
    shutil.copytree(clone, folder / "home/maxlm", symlinks=True)
    (folder / "state").write_text(state)
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    program(
        clone.parent / "bin/gcloud",
        f"""\
cd {shlex.quote(str(folder))}
echo "$*" >> calls
case "$3 $4" in
  "queued-resources describe") state=$(cat state); [[ $state == NONE ]] && exit 1; echo "$state" ;;
  "queued-resources create") echo ACTIVE > state ;;
  "queued-resources delete") echo NONE > state ;;
  "tpu-vm ssh")
    code=$(head -n 1 codes); sed -i 1d codes
    [[ $code == *:* ]] && echo "${{code#*:}}" > state
    for argument in "$@"; do
      if [[ $argument == --command=* ]]; then
        cd home; EXIT_CODE=${{code%:*}} HOME=$PWD bash -c "${{argument#--command=}}"; exit
      fi
    done ;;
esac""",
    )
    return folder


def calls(folder: Path) -> list[str]:
    """What gcloud was asked, in a word or two each."""
    words = {"describe": "", "create": "create", "delete": "delete", "ssh": "train"}
    lines = (folder / "calls").read_text().splitlines()
    return [word for line in lines if (word := words[line.split()[3]])]


@pytest.mark.parametrize(
    ("state", "codes", "code", "expected"),
    [
        ("ACTIVE", [0], 0, ["train"]),
        ("NONE", [0], 0, ["create", "train"]),
        ("SUSPENDED", [0], 0, ["delete", "create", "train"]),
        ("ACTIVE", [75, 75, 0], 0, ["train"] * 3),
        ("ACTIVE", ["255:SUSPENDED", 0], 0, ["train", "delete", "create", "train"]),
        ("ACTIVE", ["75:SUSPENDED", "1:FAILED", 0], 0, ["train", "delete", "create"] * 2 + ["train"]),
        ("ACTIVE", [255, 0], 0, ["train", "train"]),
        ("ACTIVE", [2], 2, ["train"]),
        ("ACTIVE", [1], 1, ["train"]),
        ("ACTIVE", [75] * 9, 75, ["train"] * 4),
    ],
)
def test_a_spot_slice_is_rented_again(
    state: str, codes: list[int | str], code: int, expected: list[str], clone: Path
) -> None:
    folder = cloud(clone, state, *codes)
    done = run_script(rendered("tpu-pod", "--spot", "--restarts=3"), POLL_SECONDS="0")
    assert done.returncode == code, done.stderr
    assert calls(folder) == expected
    for line in (folder / "calls").read_text().splitlines():
        assert "--zone=us-east5-a" in line
        if " create " in line:
            assert "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --node-id=mine --spot" in line


def test_slices_are_started_together(clone: Path) -> None:
    folder = cloud(clone, "NONE", 0, 0)
    done = run_script(rendered("tpu-pod", "--slices=2", "--sharding.slices=2"), POLL_SECONDS="0")
    assert (done.returncode, done.stderr) == (0, "")
    lines = (folder / "calls").read_text().splitlines()
    assert any(line.endswith("--node-count=2 --node-prefix=mine") for line in lines)
    started = sorted(line.split()[4] for line in lines if " ssh " in line)
    assert started == ["mine-0", "mine-1"] and all("--worker=all" in line for line in lines if " ssh " in line)


def test_a_host_clones_and_installs_once(clone: Path) -> None:
    folder = cloud(clone, "ACTIVE", 0, 0)
    shutil.rmtree(folder / "home/maxlm")
    (clone / ".venv/.tpu").unlink()
    program(clone.parent / "bin/git", f'echo "$*" >> "$NOTES.git"; cp -r {shlex.quote(str(clone))} "${{@: -1}}"')
    program(clone.parent / "bin/python3", 'echo "$*" >> "$NOTES.venv"')
    program(
        clone / ".venv/bin/python",
        'if [[ $2 == pip ]]; then echo "$*" >> "$NOTES.pip"; else printf "%s\\0" "$@" > "$NOTES"; fi',
    )
    for _ in range(2):
        done = run_script(rendered("tpu-pod"))
        assert (done.returncode, done.stderr) == (0, "")
    note = lambda name: (clone.parent / f"notes.{name}").read_text()
    assert note("git") == "clone --quiet https://example.com/maxlm.git maxlm\n"
    assert note("venv") == "-m venv .venv\n"
    assert note("pip") == "-m pip install -q --disable-pip-version-check -e .[tpu]\n"


# Running


@pytest.mark.parametrize(
    ("target", "name", "argv"),
    [("gke", "kubectl", "apply -f -"), ("slurm", "sbatch", ""), ("skypilot", "sky", "jobs launch --yes FILE")],
)
def test_without_print_a_program_gets_the_text(target: str, name: str, argv: str, clone: Path) -> None:
    body = 'echo "$*" > "$NOTES.argv"; if [[ $* == *.yaml ]]; then cat "${@: -1}"; else cat; fi > "$NOTES"; exit 7'
    program(clone.parent / "bin" / name, body)
    assert launch.main(arguments(target)) == 7
    assert (clone.parent / "notes").read_text() == rendered(target)
    got = (clone.parent / "notes.argv").read_text().strip()
    assert got == argv.replace("FILE", got.split()[-1] if got else "")


def test_local_runs_here(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXIT_CODE", "75")
    assert launch.main(arguments("local")) == 75
    assert noted(clone)[:4] == ["-m", "maxlm.train", "--config", "configs/llama7b.py"]


@pytest.mark.parametrize(
    ("target", "name"), [("gke", "kubectl"), ("slurm", "sbatch"), ("skypilot", "sky"), ("tpu-pod", "gcloud")]
)
def test_a_missing_program_is_one_line(
    target: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["launch", *arguments(target)])
    with pytest.raises(SystemExit) as stop:
        run_command(launch.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {name} is not installed on this machine; install it, or add --print and use the text elsewhere\n"
    )


@pytest.mark.parametrize("argv", [["--help"], ["--target", "gke", "--help"], [*arguments("gke"), "--print"]])
def test_nothing_heavy_is_loaded(argv: list[str]) -> None:
    code = (
        "import sys\nfrom maxlm.launch import main\n"
        f"try: main({argv!r})\nexcept SystemExit: pass\n"
        "print(*({'jax', 'numpy', 'flax', 'orbax'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "\n"
    assert "--accelerator" in done.stdout or "--target TARGET" in done.stdout or "kind: JobSet" in done.stdout


def test_help_of_a_target_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for name, cls in DESTINATIONS.items():
        with pytest.raises(SystemExit) as stop:
            launch.parse_launch(["--target", name, "--help"])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert all(f"--{field.name}" in out for field in dataclasses.fields(cls))


# The files themselves


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    works = r'python -m maxlm\.(train --config "[^"]+" "\$(@|\{@:2\})"|data clean "\$@")'
    assert re.search(works, script.read_text()) or script.name == "tpu_pod.sh"


def test_a_script_works_by_hand(clone: Path) -> None:
    subprocess.run([clone / "launch/local.sh", "configs/tiny.py", "--train.steps=5"], cwd="/", check=True)
    assert noted(clone) == ["-m", "maxlm.train", "--config", "configs/tiny.py", "--train.steps=5"]


def test_a_manifest_works_by_hand() -> None:
    """With envsubst, as its first lines say; here by its rule."""
    values = dict.fromkeys(re.findall(r"\$\{(\w+)\}", (ROOT / "launch/gke_jobset.yaml").read_text()), "1")
    values["COMMAND"] = json.dumps(["python", "-m", "maxlm.train", "--config", "configs/llama7b.py"])
    text = re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], (ROOT / "launch/gke_jobset.yaml").read_text())
    assert yaml.safe_load(text)["kind"] == "JobSet"


def documented() -> list[tuple[str, str]]:
    """Commands of docs/launch.md with the output that is shown below them."""
    text = (ROOT / "docs/launch.md").read_text()
    command = r"```bash [\w =-]+\n(python -m maxlm\.launch (?:.*\\\n)*.*)\n```"
    blocks = re.findall(rf"^{command}\n\n```text\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [(command.replace("\\\n", " "), shown) for command, shown in blocks]


@pytest.mark.parametrize(("command", "shown"), documented())
def test_the_documentation_shows_what_is_rendered(
    command: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", shlex.split(command)[2:])
    with pytest.raises(SystemExit):
        run_command(launch.main)
    rest = "".join(capsys.readouterr()).replace(str(ROOT), "/home/me/maxlm")
    parts = [part.strip("\n") for part in re.split(r"^\.\.\.$", shown, flags=re.MULTILINE)]
    assert any(parts)
    for part in filter(None, parts):
        assert f"\n{part}\n" in f"\n{rest}", part
        rest = rest[rest.index(part) + len(part) :]


def test_every_target_is_documented() -> None:
    shown = " ".join(command for command, _ in documented())
    assert all(f"--target {name}" in shown for name in DESTINATIONS)
