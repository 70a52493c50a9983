"""What fields of configs take: nonsense is refused in one line that names the key, and --help tells of every field."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pytest

from maxlm.chat import ChatOptions
from maxlm.config import (
    AdamW,
    CosineSchedule,
    DataConfig,
    Dataset,
    Files,
    Rope,
    RunConfig,
    SamplingConfig,
    ShardingConfig,
    StepRange,
    TrainConfig,
    UserError,
    llama,
    serialize,
)
from maxlm.config.cleaning.cleaning_pipeline import CleaningPipeline
from maxlm.config.cleaning.score_steps import ClassifierTraining, NgramTraining
from maxlm.config.cli import load_config, parse, parse_run
from maxlm.config.fields import Filled, NotEmpty, PathName, Positive, Range, config, help_of, require, text_of
from maxlm.config.synthesis import Answering, Attacks, Best, Calls, Instructions, Star
from maxlm.data.__main__ import Prepare
from maxlm.data.clean import CleanCommand
from maxlm.data.command_options import ExtendTokenizer, MixOptions, RegmixOptions, TokenizerReport, Train, WeighOptions
from maxlm.evaluate import EvaluateOptions
from maxlm.evaluation.prompting import Prompting
from maxlm.generate import GenerateOptions
from maxlm.inspect import InspectOptions
from maxlm.launching.destinations import DESTINATIONS
from maxlm.scaling.__main__ import DownstreamOptions, FitOptions, OptimalOptions, SweepOptions
from maxlm.serve import ServeOptions

ROOT = Path(__file__).parent.parent
COMMANDS = (
    GenerateOptions,
    ServeOptions,
    ChatOptions,
    EvaluateOptions,
    InspectOptions,
    Prepare,
    Train,
    TokenizerReport,
    ExtendTokenizer,
    MixOptions,
    RegmixOptions,
    WeighOptions,
    CleanCommand,
    NgramTraining,
    Instructions,
    Answering,
    Calls,
    Best,
    Star,
    Attacks,
    FitOptions,
    OptimalOptions,
    SweepOptions,
    DownstreamOptions,
    *DESTINATIONS.values(),
)


# The classes, found by their plain types: what the checker reads beside these is under test.


def alternatives(hint: Any) -> list[Any]:
    """The members of a union."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if union else [hint]


def classes(cls: type, path: str = "") -> Iterator[tuple[type, str]]:
    """The class and all classes below it, with the dotted key of each."""
    yield cls, path
    hints = typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        for kind in alternatives(hints[one.name]):
            item = typing.get_origin(kind) is tuple
            inner = typing.get_args(kind)[0] if item else kind
            for member in alternatives(inner):
                if dataclasses.is_dataclass(member):
                    yield from classes(member, f"{path}{one.name}{'[]' if item else ''}.")


PATHS: dict[type, set[str]] = {}
for _cls, _path in classes(RunConfig):
    PATHS.setdefault(_cls, set()).add(_path)


def sample(hint: Any) -> Any:
    """Some value that fits."""
    kind = alternatives(hint)[0]
    if typing.get_origin(kind) is tuple:
        return (sample(typing.get_args(kind)[0]),)
    if kind is StepRange:
        return StepRange(0, 2)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        required = [one.name for one in dataclasses.fields(kind) if one.default is one.default_factory]  # both missing
        return kind(**{name: sample(hints[name]) for name in required})
    return {int: 2, float: 0.5, str: "x", bool: True}[kind]


class Number(NamedTuple):
    cls: type
    name: str
    kind: type
    optional: bool

    @property
    def key(self) -> str:
        return f"{self.cls.__name__}.{self.name}"


def numbers() -> list[Number]:
    found = []
    for cls in PATHS:
        for name, hint in typing.get_type_hints(cls).items():
            kinds = alternatives(hint)
            for kind in {int, float} & set(kinds):
                found.append(Number(cls, name, kind, types.NoneType in kinds))
    return found


NONE_IS_A_CHOICE = {
    "Experts.clamp",
    "LatentAttention.query_rank",
    "LatentAttention.scale",
    "Swish.beta",
    "GroupedQuery.window",
    "GroupedQuery.soft_cap",
    "GroupedQuery.scale",
    "GroupedQuery.log_length",
    "Rope.dims",
    "Rope.decay",
    "YarnScaling.attention_factor",
    "LongRopeScaling.attention_factor",
    "DeepNorm.alpha",
    "DeepNorm.beta",
    "LmHead.scale",
    "LmHead.soft_cap",
    "ModelConfig.embedding_scale",
    "ModelConfig.mup_base_width",
    "PrefixTuning.hidden",
    "Conversations.max_tokens",
    "Dropless.buffer",
    "Capacity.group_size",
    "AdamW.clip_norm",
    "Adafactor.clip_norm",
    "Adafactor.update_clip",
    "Lion.clip_norm",
    "Muon.clip_norm",
    "Sgd.clip_norm",
    "ParameterGroup.weight_decay",
    "TrainConfig.eval_batches",
    "Phase.batch_size",
    "Phase.micro_batches",
    "Phase.seq_len",
    "LimitsConfig.join_s",
    "LimitsConfig.silent_s",
    "LimitsConfig.step_s",
    "Rollouts.importance_cap",
    "Ppo.largest_kl",
    "PrefixLm.fraction",
}
MINUS_ONE_IS_WHAT_REMAINS = {f"ShardingConfig.{axis}" for axis in ("data", "fsdp", "stage", "seq", "tensor", "expert")}
ANY_SIGN = {"ModelReward.mean"}
BELOW_ANOTHER = {"Llama3RopeScaling.low_freq_factor", "YarnScaling.beta_slow", "LossScale.initial"}
"""Below high_freq_factor and beta_fast, whose names a message begins with where these are too large; and below 2^24."""
AT_MOST_ONE = {
    "TrainConfig.embedding_gradient",
    "NoiseScale.decay",
    "PrepareConfig.validation_fraction",
    "AdamW.b1",
    "AdamW.b2",
    "Adafactor.b1",
    "Lion.b1",
    "Lion.b2",
    "Muon.momentum",
    "Muon.b1",
    "Muon.b2",
    "Sgd.momentum",
    "Ema.decay",
    "Drop.at",
    "Drop.fraction",
    "CosineSchedule.final_fraction",
    "LinearSchedule.final_fraction",
    "WsdSchedule.final_fraction",
    "Lora.dropout",
    "AdaLora.beta1",
    "AdaLora.beta2",
    "Gold.beta",
    "Dpo.label_smoothing",
    "Grpo.clip_low",
    "Ppo.gamma",
    "Ppo.gae_lambda",
    "Rollouts.top_p",
    "SuffixInfilling.least",
    "SuffixInfilling.most",
    "FillInMiddle.rate",
    "FillInMiddle.spm",
    "MaskedLm.masked",
    "MaskedLm.swapped",
}
BETWEEN = {"PrefixLm.fraction", "SpanCorruption.density", "BlankInfilling.density", "MaskedLm.density"}
"""More than 0 and less than 1."""


def accepted(number: Number, value: Any) -> bool:
    """What the field should take of the values below, by the meaning of its name."""
    match value:
        case None:
            return number.key in NONE_IS_A_CHOICE
        case -1:
            return number.key in MINUS_ONE_IS_WHAT_REMAINS | ANY_SIGN
        case -0.5:
            return number.key in ANY_SIGN
        case int() if value == 10**30:  # float32 holds it, and how large is too large only an experiment knows
            return number.kind is float and number.key not in AT_MOST_ONE | BELOW_ANOTHER | BETWEEN
        case _:
            return False


def change(cls: type, name: str, value: Any) -> Any:
    """An object of the class with this value."""
    if cls is StepRange:
        return StepRange(**{"first": 0, "last": 2, name: value})
    return dataclasses.replace(sample(cls), **{name: value})


NUMBERS = (math.nan, math.inf, -math.inf, -1, -0.5, 10**30, 10**400, 10**5000, 1e300)

NONSENSE = (*NUMBERS, "abc", "3", True, [], (), {}, None, int)


def test_there_are_many_numbers() -> None:
    """Guards the next test."""
    assert len(numbers()) >= 75
    assert {number.key for number in numbers()} > NONE_IS_A_CHOICE | MINUS_ONE_IS_WHAT_REMAINS | AT_MOST_ONE | BETWEEN
    assert {number.key for number in numbers() if number.optional} == NONE_IS_A_CHOICE


@pytest.mark.parametrize("number", numbers(), ids=lambda number: number.key)
def test_nonsense_is_refused_in_one_line_that_names_the_key(number: Number) -> None:
    for value in NONSENSE:
        if accepted(number, value):
            assert getattr(change(number.cls, number.name, value), number.name) == value
            continue
        with pytest.raises(UserError) as caught:
            change(number.cls, number.name, value)
        message = str(caught.value)
        keys = {f"{path}{number.name} = " for path in PATHS[number.cls]}
        between = number.key in BELOW_ANOTHER and value == 10**30
        assert number.cls is StepRange or between or any(message.startswith(key) for key in keys), message
        assert number.name in message and " must " in message
        assert "\n" not in message and len(message) < 200


FLOATS = [number for number in numbers() if number.kind is float and number.key not in BETWEEN]


@pytest.mark.parametrize("number", FLOATS, ids=lambda number: number.key)
def test_a_float_may_be_written_as_an_int(number: Number) -> None:
    value = (
        1
        if number.key in ("Gold.beta", "Rollouts.top_p", "SuffixInfilling.most")
        else 0
        if number.key in AT_MOST_ONE
        else 2
    )
    for written in (value, float(value)):
        assert getattr(change(number.cls, number.name, written), number.name) == value


@pytest.mark.parametrize("cls", PATHS, ids=lambda cls: cls.__name__)
def test_messages_begin_with_the_key_as_it_is_reached(cls: type) -> None:
    if cls is not StepRange:
        assert vars(cls)["__config_prefix__"] in PATHS[cls]


@pytest.mark.parametrize(
    "cls",
    [*PATHS, SamplingConfig, Prompting, CleaningPipeline, ClassifierTraining, *COMMANDS],
    ids=lambda cls: cls.__name__,
)
def test_every_class_is_checked_and_every_field_has_a_text(cls: type) -> None:
    for one, _ in classes(cls):
        assert "__config_prefix__" in vars(one), f"{one.__name__} is a bare dataclass; use maxlm.config.fields.config"
        for field in dataclasses.fields(one):
            text = text_of(one, field.name)
            assert text, f"{one.__name__}.{field.name} has no text below it, which --help would show"
            assert text.endswith("."), f"{one.__name__}.{field.name}: {text}"


@config("odd.")
class Odd:
    """Of no use but here."""

    bare: int = 1
    told: Annotated[int, Range(gt=-3, le=5, also=(9,), note="9 is odd")] = 1
    """Half
    a dozen."""
    words: NotEmpty[tuple[NotEmpty[str], ...]] = ("a",)
    """Words."""


def test_a_field_without_a_text_is_found() -> None:
    assert text_of(Odd, "bare") == ""
    assert text_of(Odd, "told") == "Half a dozen."
    assert help_of(Odd, "told") == "Half a dozen. (in (-3, 5], or 9)"


@pytest.mark.parametrize("value", [-2, 0, 5, 9])
def test_a_range_has_its_bounds_and_extra_values(value: int) -> None:
    assert Odd(told=value).told == value


@pytest.mark.parametrize("value", [-3, 6, 8, 10])
def test_outside_a_range_the_note_is_told(value: int) -> None:
    with pytest.raises(UserError) as caught:
        Odd(told=value)
    assert str(caught.value) == f"odd.told = {value} must be in (-3, 5], or 9; 9 is odd"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(steps=1000.0, batch_size=1, seq_len=1), "steps = 1000.0 must be a whole number; use 1000"),
        (
            lambda: TrainConfig(steps="9", batch_size=1, seq_len=1),
            "'9' must be a whole number; write it without quotes",
        ),
        (
            lambda: TrainConfig(steps=1, batch_size=1, seq_len=1, seed=2**32),
            "train.seed = 4294967296 must be in [0, 4",
        ),
        (lambda: TrainConfig(steps=np.int64(9), batch_size=1, seq_len=1), "a whole number; write int(...) around it"),
        (lambda: AdamW(moment_dtype="bfloat16"), "or Dtype.FLOAT16; use Dtype.BFLOAT16"),
        (lambda: AdamW(schedule=CosineSchedule), "or ConstantSchedule(...); write CosineSchedule(...)"),
        (lambda: AdamW(schedule=Rope()), "optimizer.schedule = Rope(...) must be CosineSchedule(...), "),
        (lambda: AdamW(b1=1.0), "optimizer.b1 = 1.0 must be in [0, 1); use for example 0.9"),
        (lambda: DataConfig(datasets=[Dataset(path="a")]), "must be a tuple; write (a, b) or (a,) instead of [a, b]"),
        (lambda: DataConfig(datasets=Dataset(path="a")), "= Dataset(...) must be a tuple; write (Dataset(...),)"),
        (lambda: DataConfig(datasets=()), "data.datasets = () must not be empty; name at least one prepared folder"),
        (lambda: DataConfig(datasets=("a",)), "data.datasets.0 = 'a' must be Dataset(...)"),
        (lambda: DataConfig(datasets=(Dataset(path="a"),), verify=1), "data.verify = 1 must be True or False"),
        (lambda: Dataset(path=Path("a")), "path = PosixPath('a') must be a string; use 'a'"),
        (lambda: Dataset(path="~/a"), f"must be a path without ~, which only a shell knows; use {Path.home()}/a"),
        (lambda: Files(paths=("a", "")), "documents.paths.1 = '' must not be empty"),
        (lambda: Odd(words=("a", 3)), "odd.words.1 = 3 must be a string"),
        (lambda: ShardingConfig(fsdp=-2), "sharding.fsdp = -2 must be at least 1, or -1; -1 takes what remains"),
        (lambda: RunConfig(model=None, data=None, train=None), "model = None must be ModelConfig(...)"),
    ],
)
def test_a_wrong_value_says_what_is_meant(make: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_value_is_checked_like_a_field() -> None:
    require("size", 3, Positive[int] | None)
    require("size", None, Positive[int] | None)
    require("place", "a", PathName)
    with pytest.raises(UserError, match="size = 0 must be positive"):
        require("size", 0, Positive[int] | None)
    with pytest.raises(UserError, match="words = '' must not be empty; say one"):
        require("words", "", Annotated[str, Filled(note="say one")])


@pytest.mark.parametrize(
    ("key", "value"), [("steps", 1.5), ("steps", True), ("steps", "3"), ("z_loss", "0.5"), ("z_loss", True)]
)
def test_a_saved_value_is_not_bent_to_its_type(key: str, value: Any) -> None:
    saved = serialize.to_dict(sample(RunConfig))
    saved["train"][key] = value
    with pytest.raises(UserError, match=f"train.{key} = {value!r} must be a"):
        serialize.from_dict(RunConfig, saved)


def test_a_saved_whole_number_will_do_for_a_float() -> None:
    saved = serialize.to_dict(sample(RunConfig))
    saved["optimizer"]["weight_decay"] = 1
    weight_decay = serialize.from_dict(RunConfig, saved).optimizer.weight_decay
    assert weight_decay == 1 and isinstance(weight_decay, float)


# llama()


def small_llama(d_model: Any, n_heads: Any) -> Any:
    return llama(vocab_size=8, d_model=d_model, n_layers=1, n_heads=n_heads, d_ff=8, max_seq_len=8)


@pytest.mark.parametrize(
    ("d_model", "n_heads", "words"),
    [
        (100, 8, "d_model = 100 is not n_heads = 8 times an even head_dim"),
        (64, 3, "d_model = 64 is not n_heads = 3 times an even head_dim"),
        (24, 8, "d_model = 24 is not n_heads = 8"),
        (64, 128, "d_model = 64 is not n_heads = 128"),
        (7, 1, "use d_model = 8"),
    ],
)
def test_d_model_and_heads_that_do_not_fit_say_what_would(d_model: int, n_heads: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        small_llama(d_model, n_heads)
    message = str(caught.value)
    assert words in message and "\n" not in message
    for remedy in message.partition("; use ")[2].split(" or "):
        key, _, size = remedy.partition(" = ")
        fixed = {"d_model": d_model, "n_heads": n_heads, key: int(size)}
        assert small_llama(**fixed).blocks[0].attention.head_dim * fixed["n_heads"] == fixed["d_model"]


@pytest.mark.parametrize(("d_model", "n_heads"), [("64", 2), (64, 0), (-64, 2), (64.0, 2), (64, None)])
def test_llama_checks_its_own_sizes(d_model: Any, n_heads: Any) -> None:
    with pytest.raises(UserError, match=r"llama\(\): (d_model|n_heads) = .* must be"):
        small_llama(d_model, n_heads)


# Help


def helped(call: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """What `--help` prints, in one line without frames."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize("name", ["llama_5m", "tiny_moe"])
def test_help_tells_every_key_with_its_text_and_range(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / f"configs/{name}.py")
    shown = helped(lambda: parse_run(["--config", file, "--help"], prog="x", description=""), capsys)
    for key, value in serialize.flatten(load_config(file)).items():
        owner: Any = load_config(file)
        *parents, last = key.split(".")
        for part in parents:
            owner = owner[int(part)] if part.isdecimal() else getattr(owner, part)
        if isinstance(owner, tuple) or dataclasses.is_dataclass(getattr(owner, last)) or value in (None, ()):
            continue
        assert f"--{key} " in shown
        assert help_of(type(owner), last) in shown, key
    for words in (
        "Optimizer steps in all. (positive) (default: 200)",
        "(at least 1, or -1) (default: -1)",
        "(in [0, 1)) (default: 0.95)",
        "optimizer = AdamW, or Adafactor, Lion, Muon, Sgd",
        "model.blocks.0.residual = PreNorm, or PostNorm, OutputNorm, DeepNorm, Sandwich, Parallel",
        "model.embedded_position = None, or Learned, Sinusoidal",
        "What is trained. ModelConfig: A decoder-only language model.",
    ):
        assert words in shown


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: cls.__name__)
def test_help_of_small_commands_tells_every_key(cls: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shown = helped(lambda: parse(cls, ["--help"], prog="x", description="", flags=True), capsys)
    for one in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(typing.get_type_hints(cls)[one.name]):
            assert help_of(cls, one.name) in shown
