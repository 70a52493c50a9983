"""The search against a plain enumeration, its config files, and the advice where nothing fits."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import pytest
from helpers import small_model, small_run

from maxlm.config import (
    Adafactor,
    AdamW,
    Dtype,
    Experts,
    GatedMlp,
    Remat,
    RunConfig,
    ShardingConfig,
    TopKRouter,
    UserError,
    Zero,
    with_experts,
)
from maxlm.config.cli import load_config
from maxlm.hardware import CHIPS
from maxlm.plan import analysis
from maxlm.plan.advice import cheapest_changes
from maxlm.plan.analysis import Forecast
from maxlm.plan.machines import memory_limit, parse_machine
from maxlm.plan.memory import estimate_memory
from maxlm.plan.search import (
    MOST_ROUNDS,
    MeshSpace,
    candidate_json,
    differences,
    fastest,
    layouts,
    optimizers,
    preference,
    search,
    spelled_out,
)
from maxlm.shapes import parameter_count

ROOT = Path(__file__).parent.parent


def limited_to(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A GPU whose programs may have `size` bytes: small runs must squeeze in."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{size / CHIPS['h100'].memory:.20f}")


def leaner(sharding: ShardingConfig) -> ShardingConfig:
    """As the search chooses what is not a size."""
    return dataclasses.replace(sharding, sequence_parallel=sharding.tensor > 1)


def everything(config: RunConfig, n: int) -> list[RunConfig]:
    """Every valid config on n devices, by trying all sizes of all axes."""
    found = []
    sizes = [s for s in itertools.product([1, 2, 4, 8], repeat=5) if n % (s[0] * s[1] * s[2] * s[3] * s[4]) == 0]
    parts = [2**i for i in range(6)]
    policies = [remat for remat in Remat if remat is not Remat.OFFLOAD]
    for (fsdp, stage, tensor, expert, data), micro, remat, zero in itertools.product(sizes, parts, policies, Zero):
        if fsdp * stage * tensor * expert * data != n or (fsdp == 1 and zero is not config.sharding.zero):
            continue
        if stage > 1 and micro > MOST_ROUNDS * stage:
            continue
        sharding = ShardingConfig(data=data, fsdp=fsdp, stage=stage, tensor=tensor, expert=expert, zero=zero)
        one = dataclasses.replace(
            config,
            sharding=leaner(sharding),
            model=dataclasses.replace(config.model, remat=remat),
            train=dataclasses.replace(config.train, micro_batches=micro),
        )
        try:
            one.validate(n)
        except UserError:
            continue
        found.append(one)
    return found


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_it_finds_the_best_of_each_mesh(experts: bool, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device where that share of all configs fits."""
    model = small_model(n_layers=8)
    if experts:
        model = with_experts(model, Experts(n_experts=4, d_ff=24, router=TopKRouter(top_k=2)))
    config, target = small_run(model=model, batch_size=32), parse_machine("gpu:h100:4")
    space = everything(config, 4)
    peaks = sorted(estimate_memory(one, 4, target.platform).peak for one in space)
    limited_to(monkeypatch, peaks[int(share * (len(peaks) - 1))] + 1)
    limit = memory_limit(target)
    best: dict[tuple[int, ...], Forecast] = {}
    for one in space:
        this = Forecast(one, target)
        if limit is not None and this.memory.peak <= limit:
            mesh = tuple(one.sharding.sizes(4).values())
            best[mesh] = min(best.get(mesh, this), this, key=preference)
    found = {
        tuple(one.config.sharding.sizes(4).values()): one
        for one in search(config, target).ranked
        if one.config.optimizer == config.optimizer
    }
    assert set(found) == set(best)
    for mesh, wanted in best.items():  # step and work; margins may differ, where a policy recomputes no products
        assert preference(found[mesh])[:2] == preference(wanted)[:2], (mesh, found[mesh].config, wanted.config)


def test_one_micro_batch_may_be_what_fits() -> None:
    """Where state is large and the batch small, more of them need more: gradients are added up beside a new one."""
    config = load_config(str(ROOT / "configs/llama13b.py"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=32, seq_len=512))
    target = parse_machine("gpu:h100:4")
    own = [one for one in search(config, target).ranked if one.config.optimizer == config.optimizer]
    assert own and all(one.config.train.micro_batches == 1 for one in own)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("configs/llama7b.py", "tpu:v5e:4x4"),
        ("configs/mixtral8x7b.py", "gpu:h100:2x8"),
        ("configs/deepseek_moe16b.py", "tpu:v5p:2x2x4"),
        ("configs/switch_base.py", "tpu:v6e:2x2"),
    ],
)
def test_nothing_that_it_tries_breaks_a_rule(name: str, target: str) -> None:
    config, machine = load_config(str(ROOT / name)), parse_machine(target)
    number = 0
    for sharding in layouts(config, machine):
        space = MeshSpace(config, machine, sharding)
        for zero, parts in itertools.product(space.zeros, space.parts):
            one = space.choose(config.optimizer, zero, parts, Remat.FULL)
            one.validate(machine.devices)
            assert one.train.batch_size == config.train.batch_size
            number += 1
    assert number > 20


def test_the_ranking_is_by_time() -> None:
    config, target = load_config(str(ROOT / "configs/llama7b.py")), parse_machine("tpu:v5e:4x4")
    found = search(config, target)
    order = [one.bound.step_seconds for one in found.ranked]
    assert order == sorted(order) and len(order) > 5
    keys = [preference(one) for one in found.ranked]
    assert keys == sorted(keys)
    assert all(one.margin >= 0 for one in found.ranked)
    assert found.best is not None
    for one in found.ranked:  # what another optimizer is there for
        if one.config.optimizer != config.optimizer:
            mesh = one.config.sharding.sizes(16)
            own = [
                other.bound.step_seconds
                for other in found.ranked
                if other.config.optimizer == config.optimizer and other.config.sharding.sizes(16) == mesh
            ]
            assert all(one.bound.step_seconds < seconds for seconds in own)


def test_tpus_get_no_layout_that_their_compiler_is_bad_at() -> None:
    """docs/plan.md: shards of d_model that are no whole vectors, and fsdp over a whole 3-D torus."""
    config = load_config(str(ROOT / "configs/llama7b.py"))
    torus = [one.fsdp for one in layouts(config, parse_machine("tpu:v5p:4x4x4"))]
    assert max(torus) == 32
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, d_model=1024))
    assert max(one.fsdp for one in layouts(small, parse_machine("tpu:v5p:4x4x4"))) == 8
    assert max(one.fsdp for one in layouts(config, parse_machine("gpu:h200:8x8"))) == 64


def test_tensor_stays_within_a_host() -> None:
    config = load_config(str(ROOT / "configs/llama7b.py"))
    assert max(one.tensor for one in layouts(config, parse_machine("gpu:h200:4x4"))) == 4
    assert max(one.tensor for one in layouts(config, parse_machine("tpu:v5p:4x4x4"))) == 16


def test_other_optimizers_keep_less() -> None:
    own = AdamW(learning_rate=1e-3, weight_decay=0.2)
    less, factored = optimizers(own)[1:]
    assert isinstance(less, AdamW) and less.moment_dtype is Dtype.BFLOAT16 and less.learning_rate == 1e-3
    assert isinstance(factored, Adafactor) and factored.weight_decay == 0.2
    assert optimizers(Adafactor()) == [Adafactor()]


def test_an_unknown_machine_cannot_be_searched_for() -> None:
    with pytest.raises(UserError, match=r"cpu:8.*not known"):
        search(small_run(), parse_machine("cpu:8"))


def test_the_differences_lead_from_one_config_to_the_other() -> None:
    config, target = load_config(str(ROOT / "configs/llama7b.py")), parse_machine("tpu:v5e:4x4")
    original = spelled_out(dataclasses.replace(config, sharding=ShardingConfig(fsdp=16)), target)
    changed = dataclasses.replace(
        original,
        execution=dataclasses.replace(original.execution, remat=Remat.NAMES),
        optimizer=Adafactor(),
        sharding=dataclasses.replace(original.sharding, fsdp=8, tensor=2),
    )
    assert differences(changed, original) == (
        "optimizer = Adafactor", "sharding.fsdp = 8", "sharding.tensor = 2", "execution.remat = names",
    )  # fmt: skip
    assert differences(original, original) == ()


@pytest.mark.parametrize("share", [0.9, 0.7])
def test_advice_fits(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device with that share of the memory that the run needs."""
    config, target = small_run(sharding=ShardingConfig(data=4), batch_size=32), parse_machine("gpu:h100:4")
    limited_to(monkeypatch, int(share * estimate_memory(config, 4, target.platform).peak))
    limit = memory_limit(target)
    assert limit is not None and estimate_memory(config, 4, target.platform).peak > limit
    changes = cheapest_changes(config, target)
    assert 1 <= len(changes) <= 3
    for change in changes:
        one = change.candidate
        one.config.validate(one.target.devices)
        assert estimate_memory(one.config, one.target.devices, one.target.platform).peak <= limit
        told = [what for what in change.what if not what.startswith("target = ")]
        assert tuple(told) == differences(one.config, spelled_out(config, target))
        assert str(one.target) == str(target) or change.what[0] == f"target = {one.target}"
    order = [(one.learns_otherwise, one.candidate.cost) for one in changes]
    assert order == sorted(order)
    assert any(not one.learns_otherwise for one in changes)
    keys = [{what.split(" = ")[0] for what in one.what} for one in changes]
    assert not any(first <= second for first, second in itertools.combinations(keys, 2))


def test_where_nothing_fits_a_larger_machine_is_among_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters alone are too many for four devices, so only more of them help."""
    limited_to(monkeypatch, 4_000_000)
    wide = small_model(blocks=(dataclasses.replace(small_model().blocks[0], mlp=GatedMlp(d_ff=4096)),))
    config, target = small_run(model=wide), parse_machine("gpu:h100:2")
    assert 3 * 4 * parameter_count(config.model).total > 2 * 4_000_000
    assert not search(config, target).ranked
    changes = cheapest_changes(config, target)
    assert changes and all(one.candidate.target.devices > 2 for one in changes)


@pytest.mark.parametrize(
    ("name", "target", "changes", "most"),
    [
        ("llama3_70b", "tpu:v5p:8x8x8", {"data": 512}, 4_500),
        ("deepseek_moe16b", "tpu:v6e:16x16", {"data": 32, "expert": 8}, 5_000),
    ],
)
def test_advice_counts_few_of_all_configs(
    name: str, target: str, changes: dict[str, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search of both machines, this one and the next, would count ten times as many, or more."""
    config, machine = load_config(str(ROOT / f"configs/{name}.py")), parse_machine(target)
    config = dataclasses.replace(config, sharding=ShardingConfig(**changes))
    counted = Counter[str]()
    for counting in ("estimate_memory", "estimate_traffic"):
        whole = getattr(analysis, counting)
        monkeypatch.setattr(
            analysis, counting, lambda *args, counting=counting, whole=whole: counted.update([counting]) or whole(*args)
        )
    assert len(cheapest_changes(config, machine)) > 1
    assert 1_000 < counted.total() < most


@pytest.mark.parametrize(
    ("name", "target", "size", "with_own"),
    [
        ("llama7b", "tpu:v5e:4x4", None, True),
        ("llama13b", "gpu:h100:2x8", 24e9, True),
        ("llama13b", "gpu:h100:4", 40e9, False),
        ("mixtral8x7b", "gpu:h100:2x8", None, False),
        ("deepseek_moe16b", "tpu:v5p:2x2x2", None, True),
        ("qwen3_30b_a3b", "gpu:h100:2x8", 40e9, False),
        ("llama3_70b", "gpu:h100:2", None, None),
    ],
)
def test_the_fastest_is_the_best_of_the_search(
    name: str, target: str, size: float | None, with_own: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`with_own`: with the config's optimizer, with another one, or (None) not at all."""
    config, machine = load_config(str(ROOT / f"configs/{name}.py")), parse_machine(target)
    if size is not None:
        limited_to(monkeypatch, int(size))
    own, *others = optimizers(config.optimizer)
    found = fastest(config, machine, [own]) or fastest(config, machine, others)
    assert found == search(config, machine).best
    assert (None if found is None else found.config.optimizer == own) is with_own


def test_a_candidate_as_plain_values() -> None:
    config, target = small_run(), parse_machine("gpu:h100:4")
    one = search(config, target).ranked[0]
    values = candidate_json(one, config)
    assert values["peak_bytes"] == one.memory.peak
    assert values["margin_bytes"] == memory_limit(target) - one.memory.peak  # type: ignore[operator]
    assert values["step_seconds"] == one.bound.step_seconds
