"""Every file in configs/: it fits its hardware, is the size it claims, and changes only on purpose."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import jax
import pytest
from helpers import ONE_OF_A_FAMILY, PRESETS

from maxlm.config import ModelConfig, RunConfig, UserError, gpt, serialize
from maxlm.config.cli import load_config
from maxlm.models import init_parameters
from maxlm.shapes import parameter_count

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
RENEW = "MAXLM_WRITE_GOLDEN=1 pytest tests/test_configs.py"
"""Records the configs as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    devices: int
    """Of the hardware in the file's docstring."""
    parameters: int
    """As published with the weights."""
    active: int | None = None
    """Of these, what one token uses; None: all."""
    tokens: float | None = None
    """Training tokens by the paper; None: not from a paper."""
    batch_tokens: int | None = None
    rounded: float | None = None
    """Parameters as the paper says them, where there is no more exact figure."""


M4, M8 = 1 << 22, 1 << 23

SMALL = 384 * 128 + 2 * (4 * 128**2 + 3 * 128 * 344 + 2 * 128) + 128
"""Of a decoder without a head."""

SFT = 2 * 384 * 128 + 4 * (4 * 128**2 + 3 * 128 * 344 + 2 * 128) + 128

SORT = 2 * 384 * 64 + 2 * (4 * 64**2 + 3 * 64 * 172 + 2 * 64) + 64

EXPECTED = {
    # embed and unembed 2 V D; a block 4 D^2 + 3 D F + 2 D; final norm D
    "tiny": Expected(devices=1, parameters=2 * 4096 * 64 + 4 * (4 * 64**2 + 3 * 64 * 176 + 2 * 64) + 64),
    "llama_5m": Expected(devices=1, parameters=2 * 4096 * 256 + 4 * (4 * 256**2 + 3 * 256 * 688 + 2 * 256) + 256),
    # As llama_5m, with 8 experts of half the d_ff and a router in each layer; two have the dense MLP's parameters
    "tiny_moe": Expected(
        devices=1,
        parameters=2 * 4096 * 256 + 4 * (4 * 256**2 + 8 * 3 * 256 * 344 + 8 * 256 + 2 * 256) + 256,
        active=2 * 4096 * 256 + 4 * (4 * 256**2 + 3 * 256 * 688 + 8 * 256 + 2 * 256) + 256,
    ),
    "tiny_phases": Expected(devices=1, parameters=2 * 384 * 128 + 2 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 128),
    # As llama_5m, with three heads of D^2 + V D
    "tiny_medusa": Expected(
        devices=1,
        parameters=2 * 4096 * 256 + 4 * (4 * 256**2 + 3 * 256 * 688 + 2 * 256) + 256 + 3 * (256**2 + 4096 * 256),
    ),
    # As tiny, with a fifth layer, 2 D^2 and three norms
    "tiny_mtp": Expected(
        devices=1,
        parameters=2 * 4096 * 256 + 5 * (4 * 256**2 + 3 * 256 * 688 + 2 * 256) + 256 + 2 * 256**2 + 3 * 256,
    ),
    "glm_tiny": Expected(devices=1, parameters=SFT),
    # Of other sizes; those below on two such layers, with D, 3 D + V D and 1 for their heads
    "sft_tiny": Expected(devices=1, parameters=SFT),
    "life_pretrain": Expected(devices=1, parameters=SFT),
    "life_sft": Expected(devices=1, parameters=SFT),
    "life_dpo": Expected(devices=1, parameters=SFT),
    "life_grpo": Expected(devices=1, parameters=SFT),
    "rlhf_sft": Expected(devices=1, parameters=SFT),
    "rlhf_reward": Expected(devices=1, parameters=SMALL + 128),
    "rlhf_ppo": Expected(devices=1, parameters=SFT),
    "dpo_tiny": Expected(devices=1, parameters=SFT),
    "context_tiny": Expected(devices=1, parameters=SFT),
    "sort_sft": Expected(devices=1, parameters=SORT),
    "grpo_sort": Expected(devices=1, parameters=SORT),
    "ppo_sort": Expected(devices=1, parameters=SORT),
    "kto_tiny": Expected(devices=1, parameters=SFT),
    "lora_tiny": Expected(devices=1, parameters=SFT + 4 * 8 * (4 * (128 + 128) + 3 * (128 + 344))),
    "reward_tiny": Expected(devices=1, parameters=SMALL + 128),
    "classify_tiny": Expected(devices=1, parameters=SMALL + 3 * 128 + 384 * 128),
    "embed_tiny": Expected(devices=1, parameters=SMALL + 1),
    # Published: Mixtral 46.7B and 12.9B, DeepSeekMoE 16.4B and 2.8B, Qwen3 30.5B and 3.3B; the totals are exact in the
    # released weights. Switch-Base's decoder is half of a model: by hand, six dense layers and six with 128 experts.
    "mixtral8x7b": Expected(devices=128, parameters=46_702_792_704, active=12_879_925_248),
    "deepseek_moe16b": Expected(
        devices=64,
        parameters=16_375_728_128,
        active=2_828_650_496,
        tokens=106_449 * 4608 * 4096,
        batch_tokens=4608 * 4096,
    ),
    "qwen3_30b_a3b": Expected(devices=128, parameters=30_532_122_624, active=3_353_032_704),
    "switch_base": Expected(
        devices=16,
        parameters=2 * 32_128 * 768
        + 12 * (4 * 768**2 + 2 * 768)
        + (6 + 6 * 128) * 3 * 768 * 2048
        + 6 * 128 * 768
        + 768,
        active=2 * 32_128 * 768 + 12 * (4 * 768**2 + 2 * 768 + 3 * 768 * 2048) + 6 * 128 * 768 + 768,
        tokens=550_000 * 2**20,
        batch_tokens=2**20,
    ),
    "llama7b": Expected(devices=64, parameters=6_738_415_616, tokens=1.0e12, batch_tokens=M4),
    "llama13b": Expected(devices=128, parameters=13_015_864_320, tokens=1.0e12, batch_tokens=M4),
    "llama33b": Expected(devices=256, parameters=32_528_943_616, tokens=1.4e12, batch_tokens=M4),
    "llama65b": Expected(devices=512, parameters=65_285_660_672, tokens=1.4e12, batch_tokens=M4),
    "llama2_7b": Expected(devices=64, parameters=6_738_415_616, tokens=2.0e12, batch_tokens=M4),
    "llama2_13b": Expected(devices=128, parameters=13_015_864_320, tokens=2.0e12, batch_tokens=M4),
    "llama2_70b": Expected(devices=512, parameters=68_976_648_192, tokens=2.0e12, batch_tokens=M4),
    "llama3_8b": Expected(devices=64, parameters=8_030_261_248, tokens=15e12, batch_tokens=M8),
    "llama3_8b_grpo": Expected(devices=8, parameters=8_030_261_248),
    "llama3_8b_qlora": Expected(devices=1, parameters=8_030_261_248 + 167_772_160),
    "llama3_70b": Expected(devices=512, parameters=70_553_706_496, tokens=15e12, batch_tokens=M8),
    # To begin with. GPT-2's are those of the released weights, and 47 rows of the table that no id uses
    "gpt2_124m": Expected(devices=1, parameters=124_439_808 + 47 * 768),
    "llama_125m": Expected(devices=1, parameters=123_587_328, rounded=125e6),
    "llama_350m": Expected(devices=8, parameters=359_842_816),
    "llama_1b": Expected(devices=1, parameters=1_235_585_024),
    # By the papers' words; the weights were not released, or (BLOOM, Qwen, Baichuan 2, DeepSeek-V3, Llama 3) are exact
    "gpt3_125m": Expected(devices=8, parameters=125_262_336, rounded=125e6, tokens=300e9, batch_tokens=1 << 19),
    "gpt3_350m": Expected(devices=8, parameters=355_919_872, rounded=350e6, tokens=300e9, batch_tokens=1 << 19),
    "gpt3_760m": Expected(devices=8, parameters=760_372_224, rounded=760e6, tokens=300e9, batch_tokens=1 << 19),
    "gpt3_1_3b": Expected(devices=32, parameters=1_315_819_520, rounded=1.3e9, tokens=300e9, batch_tokens=1 << 20),
    "gpt3_2_7b": Expected(devices=32, parameters=2_651_673_600, rounded=2.7e9, tokens=300e9, batch_tokens=1 << 20),
    "gpt3_6_7b": Expected(devices=64, parameters=6_658_596_864, rounded=6.7e9, tokens=300e9, batch_tokens=1 << 21),
    "gpt3_13b": Expected(devices=128, parameters=12_853_626_880, rounded=13e9, tokens=300e9, batch_tokens=1 << 21),
    "gpt3_175b": Expected(
        devices=512, parameters=174_604_836_864, rounded=175e9, tokens=300e9, batch_tokens=1536 * 2048
    ),
    "palm_8b": Expected(devices=64, parameters=8_632_012_800, rounded=8.63e9, tokens=780e9, batch_tokens=1 << 20),
    "palm_62b": Expected(devices=512, parameters=62_495_662_080, rounded=62.50e9, tokens=780e9, batch_tokens=1 << 21),
    "palm_540b": Expected(
        devices=1152, parameters=540_356_474_880, rounded=540.35e9, tokens=780e9, batch_tokens=2016 * 2048
    ),
    "gopher_280b": Expected(
        devices=1024, parameters=279_702_421_504, rounded=280e9, tokens=300e9, batch_tokens=3072 * 2048
    ),
    "chinchilla_70b": Expected(
        devices=512, parameters=70_057_992_192, rounded=70e9, tokens=1.4e12, batch_tokens=1536 * 2048
    ),
    "opt_175b": Expected(devices=512, parameters=174_604_468_224, rounded=175e9, tokens=180e9, batch_tokens=1 << 21),
    "glm_130b": Expected(
        devices=512, parameters=128_697_794_560, rounded=130e9, tokens=400e9, batch_tokens=4224 * 2048
    ),
    "bloom_176b": Expected(devices=512, parameters=176_247_271_424, tokens=366e9, batch_tokens=M4),
    "qwen_7b": Expected(devices=64, parameters=7_721_324_544, tokens=2.4e12, batch_tokens=M4),
    "qwen_14b": Expected(devices=128, parameters=14_167_290_880, tokens=3.0e12, batch_tokens=M4),
    "baichuan2_7b": Expected(devices=64, parameters=7_505_973_248, tokens=2.6e12, batch_tokens=M4),
    "baichuan2_13b": Expected(devices=128, parameters=13_896_668_160, tokens=2.6e12, batch_tokens=M4),
    "llama3_405b": Expected(devices=2048, parameters=405_853_388_800, tokens=15.6e12, batch_tokens=2 * M8),
    "deepseek_v3": Expected(
        devices=1024,
        parameters=682_636_487_424,  # with the module, of which tests/test_mtp.py tells
        active=38_240_398_080,
        tokens=14.8e12,
        batch_tokens=15_360 * 4096,
    ),
}

each_config = pytest.mark.parametrize("name", sorted(EXPECTED))
from_a_paper = pytest.mark.parametrize("name", sorted(name for name, e in EXPECTED.items() if e.tokens))


def load(name: str) -> RunConfig:
    return load_config(str(ROOT / "configs" / f"{name}.py"))


def test_every_file_is_expected() -> None:
    assert set(PRESETS) == set(EXPECTED)
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} >= set(EXPECTED)


@each_config
def test_it_is_valid_on_its_hardware(name: str) -> None:
    load(name).validate(EXPECTED[name].devices)


@each_config
def test_it_has_the_published_number_of_parameters(name: str) -> None:
    model = load(name).model
    shapes = jax.eval_shape(lambda: init_parameters(model, jax.random.key(0)))
    built = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes, is_leaf=lambda x: hasattr(x, "shape")))
    assert built == EXPECTED[name].parameters
    assert parameter_count(model).total == EXPECTED[name].parameters
    assert parameter_count(model).active == (EXPECTED[name].active or EXPECTED[name].parameters)


@each_config
def test_its_docstring_says_how_big_it_is_and_how_to_run_it(name: str) -> None:
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"python -m maxlm.train --config configs/{name}.py" in text
    assert f"{EXPECTED[name].parameters:,} parameters" in text
    if active := EXPECTED[name].active:
        assert f"{active:,} active" in text
    if EXPECTED[name].devices > 1:
        assert f"({EXPECTED[name].devices} chips)" in text


@pytest.mark.parametrize("name", [name for name, e in EXPECTED.items() if e.rounded])
def test_it_has_about_the_parameters_that_the_paper_says(name: str) -> None:
    assert EXPECTED[name].parameters == pytest.approx(EXPECTED[name].rounded, rel=0.02)


def test_gpt_refuses_heads_that_do_not_cut_the_width() -> None:
    with pytest.raises(UserError, match=r"gpt\(\): d_model = 100 is not a multiple of n_heads = 7; use n_heads = 5"):
        gpt(vocab_size=64, d_model=100, n_layers=1, n_heads=7, max_seq_len=8)


def test_the_parameters_of_deepseek_v3_are_the_papers() -> None:
    """671B, of which a token uses 37B (arXiv:2412.19437, abstract): of the model as it is used."""
    count = parameter_count(load("deepseek_v3").model.main)
    assert count.total == pytest.approx(671e9, rel=1e-3) and count.active == pytest.approx(37e9, rel=0.02)


RATES = {
    # arXiv:2005.14165, table 2.1; 2204.02311, section 5; 2112.11446, table 1; 2203.15556, table 4; 2205.01068, table 1;
    # 2211.05100, table 3; 2210.02414; 2309.16609, table 1; 2309.10305, table 2; 2412.19437, section 4.2; 2407.21783,
    # table 3
    "gpt3_125m": 6e-4,
    "gpt3_350m": 3e-4,
    "gpt3_760m": 2.5e-4,
    "gpt3_1_3b": 2e-4,
    "gpt3_2_7b": 1.6e-4,
    "gpt3_6_7b": 1.2e-4,
    "gpt3_13b": 1e-4,
    "gpt3_175b": 0.6e-4,
    "palm_8b": 1e-2,
    "palm_62b": 1e-2,
    "palm_540b": 1e-2,
    "gopher_280b": 4e-5,
    "chinchilla_70b": 1e-4,
    "opt_175b": 1.2e-4,
    "bloom_176b": 6e-5,
    "glm_130b": 8e-5,
    "qwen_7b": 3e-4,
    "qwen_14b": 3e-4,
    "baichuan2_7b": 2e-4,
    "baichuan2_13b": 1.5e-4,
    "deepseek_v3": 2.2e-4,
    "llama3_405b": 8e-5,
}


@pytest.mark.parametrize("name", RATES)
def test_it_has_the_papers_learning_rate(name: str) -> None:
    assert load(name).optimizer.learning_rate == RATES[name]


@pytest.mark.parametrize("name", [name for name in RATES if name.startswith(("gpt3", "bloom"))])
def test_it_warms_up_over_375_million_tokens(name: str) -> None:
    run = load(name)
    batch, steps = run.train.batch_size * run.train.seq_len, run.optimizer.schedule.warmup_steps
    assert (steps - 1) * batch < 375e6 <= steps * batch


@from_a_paper
def test_it_sees_the_papers_tokens_in_the_papers_batches(name: str) -> None:
    run, expected = load(name), EXPECTED[name]
    assert expected.tokens is not None
    last = run.at(run.train.steps - 1).train
    assert last.batch_size * last.seq_len == expected.batch_tokens
    assert run.tokens(run.train.steps - 1) < expected.tokens <= run.tokens(run.train.steps)


@from_a_paper
def test_fsdp_cuts_d_model_into_whole_vectors(name: str) -> None:
    """A TPU's vectors have 128 lanes; narrower shards make the compiler give up gathering them one by one."""
    config = load(name)
    assert config.model.d_model // config.sharding.fsdp % 128 == 0


@pytest.mark.parametrize("name", ONE_OF_A_FAMILY)
def test_it_survives_json(name: str, tmp_path: Path) -> None:
    config, path = load(name), tmp_path / "config.json"
    serialize.save(config, path)
    assert serialize.load(RunConfig, path) == config


@each_config
def test_it_is_what_it_was(name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    resolved = "".join(f"{key} = {value!r}\n" for key, value in serialize.flatten(load(name)).items())
    if os.environ.get("MAXLM_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(resolved)
    assert path.read_text() == resolved, f"if that is meant: {RENEW}, and read the difference"


def test_the_golden_text_names_every_field() -> None:
    """Of the model at least: a field that flatten forgot could change unseen."""
    text = (GOLDEN / "llama7b.txt").read_text()
    for field in dataclasses.fields(ModelConfig):
        assert f"model.{field.name}" in text
