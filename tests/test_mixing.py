"""Mixtures: weights by the papers' formulas, and what a run reads against its batches counted one by one."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import maxlm
from maxlm.config import (
    ByteTokenizer,
    DataConfig,
    Dataset,
    Files,
    Grpo,
    LengthReward,
    Phase,
    PrepareConfig,
    RunConfig,
    TrainConfig,
    UserError,
    llama,
    serialize,
)
from maxlm.config.weighting import LLAMA, LLAMA3, capped_weights, datasets_of, temperature_weights
from maxlm.data.__main__ import main
from maxlm.data.mixture_table import MixtureStretch, MixtureUse, SourceUse, capped, notes_on, tables_of, use_of
from maxlm.data.orders import drawn_of_each, proportions
from maxlm.data.prepare import prepare
from maxlm.surroundings import console


@pytest.mark.parametrize("shares", [LLAMA, LLAMA3])
def test_published_shares_are_whole(shares: dict[str, float]) -> None:
    assert math.fsum(shares.values()) == pytest.approx(1)
    found = datasets_of(shares, {kind: f"data/{kind}" for kind in shares})
    assert [(one.path, one.weight) for one in found] == [(f"data/{kind}", share) for kind, share in shares.items()]


def test_llamas_table_holds_with_its_shares_as_weights() -> None:
    """Table 1 of arXiv:2302.13971: of 1.4T tokens, share / epochs are a subset's tokens, and its disk size by these is
    what text has: 2.8 bytes a token (LaTeX) to 4 (web pages)."""
    epochs = (1.10, 1.06, 0.64, 2.45, 2.23, 1.06, 1.03)
    disk = (3.3e12, 783e9, 328e9, 83e9, 85e9, 92e9, 78e9)
    windows = 1_000_000
    drawn = drawn_of_each(windows, tuple(LLAMA.values()))
    for count, share, times, size in zip(drawn, LLAMA.values(), epochs, disk, strict=True):
        assert count / windows == pytest.approx(share, rel=0.01)
        assert 2.7 < size / (1.4e12 * count / windows / times) < 4.1


def test_kinds_and_folders_must_match() -> None:
    with pytest.raises(UserError, match="'code' has no folder"):
        datasets_of({"web": 0.9, "code": 0.1}, {"web": "a"})
    with pytest.raises(UserError, match="'books' is no kind of this mixture; use web"):
        datasets_of({"web": 1.0}, {"web": "a", "books": "b"})


def test_temperature() -> None:
    large, small = temperature_weights((1000, 1), 0.3)
    assert large / small == pytest.approx(7.943282, rel=1e-6) and large + small == pytest.approx(1)
    assert temperature_weights((3, 1), 1) == pytest.approx((0.75, 0.25))
    assert temperature_weights((3, 1), 0) == pytest.approx((0.5, 0.5))
    for sizes, alpha, said in (((1, 0), 0.3, "sizes"), ((1, 2), 1.1, "alpha"), ((1, math.inf), 0.3, "sizes")):
        with pytest.raises(UserError, match=said):
            temperature_weights(sizes, alpha)


def test_what_a_small_source_cannot_give_comes_from_the_others() -> None:
    """By hand: 100 tokens, at most four times 10 of them from the first; the rest goes 3 to 1."""
    assert capped_weights((4, 3, 1, 0), (10, 1000, 1000, 1), 100, 4) == pytest.approx((0.4, 0.45, 0.15, 0))
    assert capped_weights((1, 1), (10, 40), 200, 4) == pytest.approx((0.2, 0.8)), "all that there is"
    with pytest.raises(UserError, match=r"use at most 200 tokens, at least 4\.02 epochs"):
        capped_weights((1, 1, 0), (10, 40, 1000), 201, 4)
    with pytest.raises(UserError, match=r"weights = .* one of them above 0"):
        capped_weights((0, 0), (1, 1), 1, 4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(1, 1e6)), min_size=1, max_size=6), st.floats(0.01, 0.99))
def test_capped_weights_are_those_of_a_capped_mixture(sources: list[tuple[float, float]], used: float) -> None:
    weights, sizes = zip(*sources, strict=True)
    budget = 4 * sum(sizes) * used
    found = np.array(capped_weights(weights, sizes, budget, 4))
    epochs = found * budget / np.array(sizes)
    assert found.sum() == pytest.approx(1) and epochs.max() <= 4 * (1 + 1e-9)
    ratios = found / np.array(weights)
    free = epochs < 4 * (1 - 1e-9)
    assert np.ptp(ratios[free]) <= 1e-6 * ratios.max() if free.any() else used > 0.98
    assert all(ratio <= min(ratios[free], default=math.inf) * (1 + 1e-9) for ratio in ratios), "the capped ones lose"


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([0.0, 0.3, 0.1, 0.7, 1.0, 1.999, 2.5, 0.045]), min_size=2, max_size=5).filter(any))
def test_a_round_is_as_grain_deals_it(weights: list[float]) -> None:
    counts = proportions(weights)
    assert drawn_of_each(sum(counts), weights) == counts


# ---- what a run reads ----

TEXT = {"letters": b"abcdefgh", "digits": b"01234567"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two sets of which a window's bytes tell which one it is of."""
    folder, found = tmp_path_factory.mktemp("mixture"), {}
    for name, alphabet in TEXT.items():
        file = folder / f"{name}.txt"
        size = 2000 if name == "letters" else 700
        file.write_bytes(np.random.default_rng(1).choice(np.frombuffer(alphabet, np.uint8), size).tobytes())
        found[name] = folder / name
        documents = Files(paths=(str(file),))
        prepare(
            PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.1, workers=1),
            found[name],
        )
    return found


def run_of(folders: dict[str, Path], weights: tuple[float, float], *phases: Phase, **train: int) -> RunConfig:
    datasets = tuple(Dataset(path=str(path), weight=w) for path, w in zip(folders.values(), weights, strict=True))
    return RunConfig(
        model=llama(vocab_size=258, d_model=16, n_layers=1, n_heads=1, d_ff=16, max_seq_len=32),
        data=DataConfig(datasets=datasets),
        train=TrainConfig(**{"steps": 20, "batch_size": 4, "seq_len": 16, **train}, phases=phases),
    )


def counted(config: RunConfig, first: int, last: int) -> list[int]:
    """Windows of each set in the batches of some steps of one phase, read one by one."""
    kinds, batches = Counter[str](), maxlm.batches(config.at(first))
    for step in range(first, last):
        for row in batches[step]["inputs"]:
            (kind,) = [name for name, alphabet in TEXT.items() if set(row.tolist()) & set(alphabet)]
            kinds[kind] += 1
    return [kinds[name] for name in TEXT]


def tokens_of(folder: Path) -> int:
    return sum(file.stat().st_size // 2 for file in folder.glob("train-*.tokens"))


def test_windows_are_those_of_the_batches(folders: dict[str, Path]) -> None:
    phases = (Phase(start=7, batch_size=6), Phase(start=11, seq_len=32, batch_size=2), Phase(start=15, weights=(1, 3)))
    config = run_of(folders, (2.0, 1.0), *phases)
    use = use_of(config)
    assert [(one.first, one.last, one.weights) for one in use.stretches] == [(0, 15, (2, 1)), (15, 20, (1, 3))]
    ends = [(0, 7, 16), (7, 11, 16), (11, 15, 32), (15, 20, 32)]
    found = [counted(config, first, last) for first, last, _ in ends]
    assert use.stretches[0].windows == tuple(np.sum(found[:3], axis=0)) and use.stretches[1].windows == tuple(found[3])
    assert use.budget == config.tokens(20)
    for i, (source, folder) in enumerate(zip(use.sources, folders.values(), strict=True)):
        assert source.tokens == tokens_of(folder)
        assert source.drawn == sum(windows[i] * T for windows, (_, _, T) in zip(found, ends, strict=True))
        epochs = [windows[i] / ((source.tokens - 1) // T) for windows, (_, _, T) in zip(found, ends, strict=True)]
        assert source.epochs == pytest.approx(sum(epochs)) and source.before == 0
    later = dataclasses.replace(config, data=config.at(15).data, train=dataclasses.replace(config.train, phases=()))
    assert use_of(later).sources[1].before == pytest.approx(use.stretches[0].epochs[1], rel=0.05), "of data.past"


def figures(*values: tuple[float, float, float], tokens: int = 1000) -> MixtureUse:
    """Of sources with a weight, tokens drawn, and epochs that are behind."""
    weights, drawn, before = zip(*values, strict=True)
    whole = tuple(int(one) for one in drawn)
    stretch = MixtureStretch(0, 10, weights, whole, whole, tuple(one / tokens for one in whole))
    sources = [
        SourceUse(f"s{i}", tokens, tokens, tokens, one, behind, one / tokens)
        for i, (one, behind) in enumerate(zip(whole, before, strict=True))
    ]
    return MixtureUse(tuple(sources), (stretch,))


def test_notes_begin_at_their_thresholds() -> None:
    def told(use: MixtureUse) -> list[str]:
        return [line.split(": ")[0] for line in notes_on(use, most_epochs=4, least_epochs=0.05)]

    assert told(figures((1, 50, 0), (1, 1950, 0))) == [], "as much as there is, a twentieth of a source"
    assert told(figures((1, 49, 0), (1, 1950, 0))) == ["s0"]
    assert told(figures((1, 51, 0), (1, 1950, 0))) == ["the run reads 2,001 tokens, its data sets have 2,000"]
    assert told(figures((1, 1000, 3), (1, 1000, 0))) == []
    assert told(figures((1, 1000, 3.01), (1, 1000, 0))) == ["s0"]
    assert told(figures((1, 1000, 0), (0, 0, 0))) == ["s1"]
    assert told(figures((1, 400, 0), (10.005, 600, 0))) == [], "a share within a thousandth of itself"
    line, _ = notes_on(figures((1, 400, 0), (1.009, 600, 0)), most_epochs=4, least_epochs=0.05)
    assert line.startswith("s0: 49.776% of the windows are asked for, 50.000% are dealt from step 0 on")


def test_a_cap_on_a_run(folders: dict[str, Path]) -> None:
    config = run_of(folders, (1.0, 1.0), steps=60)
    use = use_of(config)
    assert use.sources[1].epochs > 2
    weights = capped(use, 2)
    mended = use_of(run_of(folders, (weights[0], weights[1]), steps=60))
    assert mended.sources[1].epochs == pytest.approx(2, rel=0.02) and mended.budget == use.budget
    with pytest.raises(UserError, match="at most"):
        capped(use, 1)
    with pytest.raises(UserError, match="--cap is of a run whose weights stay"):
        capped(use_of(run_of(folders, (1.0, 0.0), Phase(start=5, weights=(0, 1)))), 4)


def test_tables_have_a_row_for_each_stretch(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    use = use_of(run_of(folders, (1.0, 0.0), Phase(start=5, weights=(1, 1))))
    for table in tables_of(use):
        console(width=200, highlight=False).print(table)
    text = capsys.readouterr().out
    assert text.count(str(folders["digits"])) == 3 and "0 to 5" in text and "5 to 20" in text and "37.50%" in text


def test_the_command(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    serialize.save(run_of(folders, (3.0, 1.0)), file)
    assert main(["mix", "--config", str(file), "--train.steps=16", "--cap", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tokens"] == 16 * 4 * 16 and [one["share"] for one in said["sources"]] == [0.75, 0.25]
    assert said["capped_weights"] == pytest.approx([0.75, 0.25])
    assert main(["mix", "--config", str(file), "--cap", "4"]) == 0
    text = capsys.readouterr().out
    assert "1,280 tokens in 20 steps\n" in text and "weights with at most 4 epochs of each: (0.75, 0.25)\n" in text
    sizes = [tokens_of(path) for path in folders.values()]
    names = [*map(str, folders.values())]
    assert main(["weights", *names, "--alpha", "0.3", "--tokens", "4e3", "--cap", "2", "--json"]) == 0
    weights = json.loads(capsys.readouterr().out)["weights"]
    assert weights[1] == pytest.approx(2 * sizes[1] / 4e3) and sum(weights) == pytest.approx(1)
    assert main(["weights", *names, "--alpha", "1"]) == 0
    assert f"{sizes[0] / sum(sizes):.6g}" in capsys.readouterr().out


def test_mistakes_of_the_command(folders: dict[str, Path], tmp_path: Path) -> None:
    config, file = run_of(folders, (1.0, 1.0)), tmp_path / "config.json"
    unprepared = Dataset(
        path=str(tmp_path / "none"), prepare=PrepareConfig(documents=Files(paths=("x",)), tokenizer=ByteTokenizer())
    )
    serialize.save(dataclasses.replace(config, data=DataConfig(datasets=(unprepared,))), file)
    with pytest.raises(UserError, match=r"is not prepared yet; python -m maxlm\.data prepare --config FILE does it"):
        main(["mix", "--config", str(file)])
    with pytest.raises(UserError, match=r"train.phases.0.start = 99 is not before train.steps = 20"):
        use_of(run_of(folders, (1.0, 1.0), Phase(start=99)))
    with pytest.raises(UserError, match="--cap 3 needs a budget"):
        main(["weights", "x", "--alpha", "1", "--cap", "3"])
    with pytest.raises(UserError, match=r"--alpha = 1.5 must be in \[0, 1\]"):
        main(["weights", "x", "--alpha", "1.5"])
    with pytest.raises(UserError, match="task = Grpo reads prompts"):
        use_of(dataclasses.replace(config, task=Grpo(rewards=(LengthReward(at_most=8, buffer=2),))))
