"""The command line and the rules of a config: every mistake is one line that says what to do."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ONE_OF_A_FAMILY, small_run
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config import (
    MESH_AXES,
    Activation,
    AdamW,
    GatedMlp,
    GroupedQuery,
    Nonlinearity,
    Remat,
    RunConfig,
    ShardingConfig,
    StepRange,
    Swish,
    UserError,
    Zero,
    serialize,
)
from maxlm.config.cli import Command, describe_config, load_config, parse, parse_run, run_command
from maxlm.generate import GenerateOptions

ROOT = Path(__file__).parent.parent
TINY = ("--config", str(ROOT / "configs" / "tiny.py"))


def command(*argv: str) -> Command:
    return parse_run(argv, prog="python -m maxlm.train", description="Train.")


def complaint(*argv: str) -> str:
    """What the user reads: one line."""
    with pytest.raises(UserError) as caught:
        command(*argv)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


# What is typed arrives


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("--train.steps=7", "train.steps", 7),
        ("--train.steps=1e3", "train.steps", 1000),
        ("--model.blocks.0.attention.window=6.4e1", "model.blocks.0.attention.window", 64),
        ("--optimizer.learning_rate=1e-3", "optimizer.learning_rate", 1e-3),
        ("--optimizer.clip_norm=None", "optimizer.clip_norm", None),
        ("--optimizer.schedule.warmup_steps=3", "optimizer.schedule.warmup_steps", 3),
        ("--execution.remat=dots", "execution.remat", "dots"),
        ("--model.head.tied=True", "model.head.tied", True),
        ("--data.verify=False", "data.verify", False),
        ("--model.blocks.0.attention.window=64", "model.blocks.0.attention.window", 64),
        ("--data.datasets.0.path=data/other", "data.datasets.0.path", "data/other"),
        ("--sharding.fsdp=-1", "sharding.fsdp", -1),
        ("--sharding.zero=gradients", "sharding.zero", "gradients"),
        ("--train.profile_steps=3:5", "train.profile_steps", "3:5"),
        ("--run_dir=runs/other", "run_dir", "runs/other"),
    ],
)
def test_an_override_changes_its_key_and_no_other(override: str, key: str, value: Any) -> None:
    found = command(*TINY, override)
    before, after = serialize.flatten(found.file_config), serialize.flatten(found.config)
    assert after == {**before, key: value}
    assert after != before


def test_without_overrides_the_file_is_the_config() -> None:
    found = command(*TINY)
    assert found.config == found.file_config == load_config(TINY[1])
    assert not found.print_config


def test_a_value_may_be_a_word_of_its_own_and_the_last_one_counts() -> None:
    assert command(*TINY, "--train.steps", "7", "--train.steps", "9").config.train.steps == 9


def test_print_config_marks_what_the_file_says_otherwise() -> None:
    found = command("--print_config", *TINY, "--train.steps=7")
    assert found.print_config
    lines = describe_config(found.config, found.file_config).splitlines()
    assert [line for line in lines if "#" in line] == ["train.steps = 7    # the file says 880"]
    assert len(lines) == len(serialize.flatten(found.config))


# Mistakes


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("--train.stps=7", "--train.steps?"),
        ("--train.step=7", "--train.steps?"),
        ("--train-steps=7", "--train.steps?"),
        ("--optimiser.learning_rate=1", "--optimizer.learning_rate?"),
        ("--model.blocks.0.attention.n_headz=8", "--model.blocks.0.attention.n_heads?"),
        ("--model.n_heads=8", "--model.blocks.0.attention.n_heads?"),
        ("--n_layers=8", "--model.n_layers?"),
    ],
)
def test_a_mistyped_key_names_the_nearest(override: str, nearest: str) -> None:
    message = complaint(*TINY, override)
    assert override.partition("=")[0] in message
    assert f"did you mean {nearest}" in message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--zzz=1"], ["unknown key --zzz", "--help lists all keys"]),
        (["stray"], ["stray", "--key=value"]),
        (["--optimizer=adafactor"], ["--optimizer is a group", "--optimizer.learning_rate", "config file"]),
        (["--model.adapter", "Lora"], ["--model.adapter: model.adapter has no keys", "chosen in the config file"]),
        (["--model.adapter.kind.rank=4"], ["--model.adapter.kind.rank: model.adapter has no keys"]),
        (["--train.steps=many"], ["--train.steps", "'many'"]),
        (["--train.steps=1.5"], ["--train.steps", "'1.5' is not a whole number"]),
        (["--train.steps=1e400"], ["--train.steps", "'1e400' is not a whole number"]),
        (["--train.steps=1e10"], ["train.steps = 10000000000", "at most 2147483647"]),
        (["--optimizer.clip_norm=x"], ["--optimizer.clip_norm", "'x' is not a number or None"]),
        (["--optimizer.learning_rate=nan"], ["optimizer.learning_rate = nan", "must be positive"]),
        (["--optimizer.learning_rate=inf"], ["optimizer.learning_rate = inf", "must be finite"]),
        (
            ["--data.datasets.1.path=x"],
            ["--data.datasets.1.path", "has 1 entry, number 0; add more in"],
        ),
        (["--model.blocks.2.mlp.d_ff=8"], ["--model.blocks.2.mlp.d_ff", "has 1 entry"]),
        (["--run_dir=~/runs"], ["run_dir = '~/runs'", f"use {Path.home()}/runs"]),
        (["--run_dir="], ["run_dir = ''", "must not be empty"]),
        (["--train.steps"], ["--train.steps", "Missing value"]),
        (["--train.steps=0"], ["train.steps = 0", "must be positive"]),
        (["--optimizer.learning_rate=fast"], ["--optimizer.learning_rate", "'fast'"]),
        (["--optimizer.b2=1"], ["optimizer.b2 = 1", "[0, 1)"]),
        (["--data.verify=maybe"], ["--data.verify", "'maybe'", "'True', 'False'"]),
        (["--execution.remat=all"], ["--execution.remat", "'all'", "'none'", "'full'"]),
        (["--model.n_layers=-1"], ["model.n_layers = -1", "must be positive"]),
        (["--model.blocks.0.attention.n_kv_heads=3"], ["n_kv_heads = 3", "n_heads = 4", "[1, 2, 4]"]),
        (["--model.blocks.0.attention.head_dim=7"], ["head_dim = 7", "use 8"]),
        (["--data.datasets.0.weight=-1"], ["weight = -1", "must be at least 0"]),
        (["--sharding.fsdp=-1", "--sharding.tensor=-1"], ["sharding.fsdp and sharding.tensor", "-1"]),
        (["--sharding.fsdp=0"], ["sharding.fsdp = 0", "at least 1"]),
        (["--train.profile_steps=ten"], ["'ten'", "FIRST:LAST"]),
        (["--train.profile_steps=5:3"], ["5:3", "first < last"]),
    ],
)
def test_a_wrong_value_says_what_is_allowed(argv: list[str], parts: list[str]) -> None:
    message = complaint(*TINY, *argv)
    for part in parts:
        assert part in message


def test_no_config_is_a_mistake() -> None:
    assert "--config is missing" in complaint("--train.steps=7")
    assert "--config: expected one argument" in complaint("--config")


def test_a_missing_file_suggests_the_nearest() -> None:
    message = complaint("--config", str(ROOT / "configs" / "lama7b.py"))
    assert "no such file; did you mean" in message
    assert "llama7b.py" in message
    assert "configs: is a folder; name a file in it" in complaint("--config", str(ROOT / "configs"))


def test_a_config_may_import_its_neighbours_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(str(ROOT / "configs" / "llama13b.py")).run_dir == "runs/llama13b"


def run_train(*argv: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *options, "-m", "maxlm.train", *argv]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_help_needs_no_jax_and_lists_keys_with_defaults() -> None:
    done = run_train("--help", options=("-X", "importtime"))
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "tyro" in imported
    assert not imported & {"jax", "jaxlib", "flax", "numpy"}
    for word in ("--config FILE", "--train.steps", "--optimizer.learning_rate", "--sharding.fsdp"):
        assert word in done.stdout


def test_print_config_needs_no_jax_and_starts_nothing() -> None:
    done = run_train("--print_config", *TINY, "--train.steps=7", options=("-X", "importtime"))
    assert done.returncode == 0
    assert "train.steps = 7    # the file says 880" in done.stdout
    assert not any(line.endswith("| jax") for line in done.stderr.splitlines())


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2() -> None:
    done = run_train(*TINY, "--train.stps=7")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown key --train.stps; did you mean --train.steps?")
    assert done.stderr.count("\n") == 1


# Rules between the parts


def broken(config: RunConfig, n_devices: int = 8) -> list[str]:
    """The lines of its complaints."""
    with pytest.raises(UserError) as caught:
        config.validate(n_devices)
    return str(caught.value).splitlines()


def test_all_broken_rules_are_reported_together() -> None:
    config = dataclasses.replace(
        small_run(batch_size=6, seq_len=65, micro_batches=4),
        sharding=ShardingConfig(fsdp=2, tensor=4, seq=1, sequence_parallel=True),
    )
    lines = broken(config)
    assert lines == [
        "train.batch_size = 6 is not a multiple of 8 (sharding.fsdp 2 x train.micro_batches 4); use 8",
        "train.seq_len = 65 is not a multiple of 4 (with sharding.sequence_parallel sharding.tensor 4); use 64 or 68",
        "sharding.tensor = 4 does not divide model.blocks.0.attention.n_kv_heads = 2; sharding.tensor may be one of "
        "[1, 2]",
        "train.seq_len = 65 is longer than model.max_seq_len = 64; use at most 64 or raise model.max_seq_len",
    ]


@pytest.mark.parametrize(
    ("sharding", "words"),
    [
        (
            ShardingConfig(fsdp=3),
            "sharding: fsdp=3 needs a multiple of 3 devices, there are 8; use sizes whose product is one of "
            "[1, 2, 4, 8]",
        ),
        (ShardingConfig(data=2, fsdp=2), "sharding: data=2 x fsdp=2 needs 4 devices, there are 8; set one axis to -1"),
        (
            ShardingConfig(data=1, tensor=16),
            "sharding: tensor=16 needs 16 devices, there are 8; use sizes whose product is 8",
        ),
        (ShardingConfig(stage=4), "has model.blocks 2 times, which is not a multiple of 4 (sharding.stage 4 x"),
        (ShardingConfig(virtual_stages=2), "virtual_stages = 2 needs a pipeline, but sharding.stage = 1; use 1"),
        (ShardingConfig(expert=2), "sharding.expert = 2 finds no experts in this model"),
        (ShardingConfig(slices=3), "sharding.slices = 3 does not divide sharding.data = 8"),
        (ShardingConfig(data=1, tensor=8), "sharding.tensor = 8 does not divide model.blocks.0.attention.n_heads = 4"),
    ],
)
def test_a_mesh_that_does_not_fit(sharding: ShardingConfig, words: str) -> None:
    assert any(words in line for line in broken(small_run(sharding=sharding)))


@pytest.mark.parametrize("sharding", [ShardingConfig(), ShardingConfig(fsdp=4, tensor=2), ShardingConfig(seq=8)])
def test_a_mesh_that_fits(sharding: ShardingConfig) -> None:
    small_run(sharding=sharding).validate(8)


@given(fixed=st.permutations([1, 1, 1, 2, 3, 4]), free=st.sampled_from(MESH_AXES), rest=st.integers(1, 12))
def test_the_free_axis_takes_what_remains(fixed: list[int], free: str, rest: int) -> None:
    named = {**dict(zip(MESH_AXES, fixed, strict=True)), free: -1}
    n_devices = rest * math.prod(size for size in named.values() if size != -1)
    sizes = ShardingConfig(**named).sizes(n_devices)
    assert tuple(sizes) == MESH_AXES
    assert math.prod(sizes.values()) == n_devices
    assert {**sizes, free: -1} == named
    assert sizes[free] == rest


@given(axis=st.sampled_from(MESH_AXES[1:]), n_devices=st.integers(1, 4096))
def test_data_steps_back_when_another_axis_takes_what_remains(axis: str, n_devices: int) -> None:
    sizes = ShardingConfig(**{axis: -1}).sizes(n_devices)
    assert sizes == {**dict.fromkeys(MESH_AXES, 1), axis: n_devices}


@given(sizes=st.lists(st.integers(1, 4), min_size=6, max_size=6), n_devices=st.integers(1, 64))
def test_fixed_axes_must_make_up_the_devices(sizes: list[int], n_devices: int) -> None:
    config = ShardingConfig(**dict(zip(MESH_AXES, sizes, strict=True)))
    if math.prod(sizes) == n_devices:
        assert list(config.sizes(n_devices).values()) == sizes
    else:
        with pytest.raises(UserError, match=f"there are {n_devices}"):
            config.sizes(n_devices)


@given(first=st.integers(0, 10**6), length=st.integers(1, 10**6))
def test_a_step_range_reads_what_it_writes(first: int, length: int) -> None:
    steps = StepRange(first, first + length)
    assert StepRange.parse(str(steps)) == steps


@pytest.mark.parametrize("text", ["", ":", "3", "3:", ":3", "a:b", "-1:3", "3:3", "5:3", "1:2:3", "1.5:2"])
def test_a_wrong_step_range_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="step range"):
        StepRange.parse(text)


# Saved configs


def test_json_keeps_enums_unions_and_ranges() -> None:
    run = dataclasses.replace(small_run(profile_steps=StepRange(2, 4)), sharding=ShardingConfig(zero=Zero.GRADIENTS))
    saved = json.loads(json.dumps(serialize.to_dict(run)))
    assert saved["optimizer"]["kind"] == "AdamW"
    assert saved["optimizer"]["schedule"]["kind"] == "CosineSchedule"
    assert saved["execution"]["remat"] == Remat.NONE.value
    assert saved["train"]["profile_steps"] == "2:4"
    assert serialize.from_dict(RunConfig, saved) == run


def with_activation(run: RunConfig, activation: Nonlinearity) -> RunConfig:
    (block,) = run.model.blocks
    assert isinstance(block.mlp, GatedMlp)
    block = dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, activation=activation))
    return dataclasses.replace(run, model=dataclasses.replace(run.model, blocks=(block,)))


@pytest.mark.parametrize(
    ("activation", "saved"),
    [
        (Activation.RELU, "relu"),
        (Swish(beta=2.0), {"kind": "Swish", "beta": 2.0}),
        (Swish(), {"kind": "Swish", "beta": None}),
    ],
)
def test_an_activation_is_a_word_or_an_object(activation: Nonlinearity, saved: Any, tmp_path: Path) -> None:
    run = with_activation(small_run(), activation)
    values = json.loads(json.dumps(serialize.to_dict(run)))
    mlp = values["model"]["blocks"][0]["mlp"]
    assert mlp["activation"] == saved and serialize.from_dict(RunConfig, values) == run
    for wrong in ("quick", {"kind": "Mish"}, {"beta": 2.0}, None, 3):
        mlp["activation"] = wrong
        with pytest.raises(
            UserError, match=r"must be one of silu, gelu, .*, or an object of kind Swish @ \$\.model\.bl"
        ):
            serialize.from_dict(RunConfig, values)


def test_words_and_numbers_of_an_activation_are_overrides(tmp_path: Path) -> None:
    serialize.save(with_activation(small_run(), Swish()), tmp_path / "swish.json")
    serialize.save(small_run(), tmp_path / "silu.json")
    key = "model.blocks.0.mlp.activation"
    for name, words, value in (("silu", key, Activation.RELU), ("swish", f"{key}.beta", Swish(beta=0.5))):
        word = "relu" if name == "silu" else "0.5"
        found = parse_run(["--config", str(tmp_path / f"{name}.json"), f"--{words}={word}"], prog="x", description="")
        assert found.config == with_activation(small_run(), value)


@pytest.mark.parametrize("name", ONE_OF_A_FAMILY)
def test_a_saved_config_is_a_config_file(name: str, tmp_path: Path) -> None:
    config, file = load_config(str(ROOT / "configs" / f"{name}.py")), tmp_path / "config.json"
    serialize.save(config, file)
    assert load_config(str(file)) == config
    found = parse_run(["--config", str(file), "--run_dir=elsewhere"], prog="x", description="")
    assert found.file_config == config and found.config == dataclasses.replace(config, run_dir="elsewhere")


def test_a_saved_config_with_odd_values_is_a_config_file(tmp_path: Path) -> None:
    optimizer = AdamW(clip_norm=None, eps=1e-17, learning_rate=1e38)
    config = dataclasses.replace(small_run(), run_dir='a "folder"\n\\ß', optimizer=optimizer)
    file = tmp_path / "config.json"
    serialize.save(config, file)
    assert load_config(str(file)) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "holds list, must be the object of a saved RunConfig"),
        ('{"format": 4}', "required field missing"),
        ("{}", "lacks or misuses 'model'"),
        ('{"format": 4, "train": {"profile_steps": 3}}', "'3' must be FIRST:LAST"),
    ],
)
def test_a_config_file_that_is_no_saved_config_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(str(file))
    assert str(caught.value).startswith(f"--config {file}: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("optimizer", "kind"), "UserError", "'UserError'; must be one of AdamW, Adafactor, Lion, Muon, Sgd"),
        (("optimizer", "kind"), "os.system", "os.system"),
        (("optimizer", "schedule", "kind"), "AdamW", "AdamW"),
        (("optimizer", "momentum"), 0.9, "momentum"),
        (("execution", "remat"), "all", "all"),
        (("train", "profile_steps"), "x", "FIRST:LAST"),
        (("train", "steps"), "many", "many"),
        (("unknown",), 1, "unknown"),
    ],
)
def test_a_saved_config_with_something_else_in_it_is_refused(path: tuple[str, ...], value: Any, words: str) -> None:
    saved = serialize.to_dict(small_run())
    place = saved
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UserError) as caught:
        serialize.from_dict(RunConfig, saved)
    assert "does not fit this version" in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_saved_config_that_lacks_something_is_refused() -> None:
    saved = serialize.to_dict(small_run())
    del saved["train"]["steps"]
    with pytest.raises(UserError, match="steps"):
        serialize.from_dict(RunConfig, saved)


def test_a_file_that_is_no_saved_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        serialize.load(RunConfig, tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        serialize.load(RunConfig, tmp_path / "config.json")


def test_configs_are_frozen_and_named() -> None:
    attention = GroupedQuery(n_heads=2, n_kv_heads=1, head_dim=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        attention.n_heads = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        GroupedQuery(2, 1, 4)  # type: ignore[misc]


@pytest.mark.parametrize("words", [["--data.datasets.0.prepare", "None"], ["--data.datasets.0.prepare=None"]])
def test_a_group_set_to_none_leaves_the_rest_alone(words: list[str]) -> None:
    got = command(*TINY, "--train.steps", "3", *words, "--train.seed", "4").config
    want = command(*TINY, "--train.steps=3", "--train.seed=4").config
    (dataset,) = want.data.datasets
    data = dataclasses.replace(want.data, datasets=(dataclasses.replace(dataset, prepare=None),))
    assert got == dataclasses.replace(want, data=data)
    assert command(*TINY, "--model.embedded_position", "None").config.model.embedded_position is None  # and was before


@pytest.mark.parametrize("group", ["optimizer", "model", "model.norm", "data.datasets", "data.datasets.1.prepare"])
def test_a_group_that_must_be_there_cannot_be_none(group: str) -> None:
    assert f"--{group}" in complaint(*TINY, f"--{group}=None")


def test_a_bool_that_is_on_takes_a_value_in_small_commands() -> None:
    words = ["--run", "x", "--sharding.remat_stages", "False", "--json"]
    options = parse(GenerateOptions, words, prog="x", description="", flags=True)
    assert not options.model.sharding.remat_stages and options.json and not options.debug


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.profile_steps", (2, 4), "train.profile_steps = (2, 4) must be StepRange(...) or None"),
        ("train.steps", [3], "train.steps = (3,) must be a whole number"),
        ("run_dir", b"x", "run_dir = b'x' must be a string"),
    ],
)
def test_an_override_that_no_word_stands_for_is_checked_by_its_type(key: str, value: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("tiny", {key: value})
    assert str(caught.value) == words


def test_a_long_word_is_shown_in_part() -> None:
    for key in ("train.steps", "execution.scan_layers", "execution.dtype", "optimizer.b1"):
        with pytest.raises(UserError) as caught:
            parse_run(["--config", "tiny", f"--{key}={'x' * 100_000}"], prog="x", description="")
        assert key in str(caught.value) and len(str(caught.value)) < 300 and "---" not in str(caught.value)


def test_a_pipe_that_rich_finds_broken_is_one() -> None:
    def main(argv: list[str]) -> None:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 141


def test_an_output_that_is_no_longer_read_ends_a_command_quietly() -> None:
    code = "from maxlm.config.cli import run_command\nrun_command(lambda argv: [print('x' * 80) for _ in range(9999)])"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" | head -1; echo ${{PIPESTATUS[0]}}'],
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["x" * 80, "141"] and not done.stderr


def test_a_command_without_standard_output_runs() -> None:
    code = "import sys; from maxlm.config.cli import run_command\nrun_command(lambda argv: sys.stdout.isatty() and 5)"
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" >&-'], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
