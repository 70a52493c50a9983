"""Laws of mixtures against laws that the losses are made by, and a search with runs of some steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from maxlm.config import (
    AdamW,
    ByteTokenizer,
    DataConfig,
    Dataset,
    Dtype,
    ExecutionConfig,
    Files,
    Phase,
    PrepareConfig,
    RunConfig,
    TrainConfig,
    UserError,
    llama,
)
from maxlm.data.mixing_laws import best_mixture, draw_mixtures, fit, rank_correlation, target_loss
from maxlm.data.prepare import prepare
from maxlm.recipes import mixture_search
from maxlm.recipes.mixture_runs import MixtureRuns
from maxlm.recipes.mixture_search import as_json, lines_of, search, table_of
from maxlm.surroundings import console

OFFSET = np.array([1.5, 1.0, 2.0])
SLOPE = np.array([[-2.0, 0.3, 0.1], [0.2, -1.5, 0.1], [0.0, -0.5, -1.0]])


def made(weights: np.ndarray) -> np.ndarray:
    """Ye et al. 2024, arXiv:2403.16952: c_i + k_i exp(sum_j t_ij r_j), with k = 2."""
    return np.stack([c + 2 * np.exp(weights @ t) for c, t in zip(OFFSET, SLOPE, strict=True)], axis=-1)


def test_mixtures_lie_around_the_shares() -> None:
    drawn = draw_mixtures((6.0, 3.0, 0.0, 1.0), 4000, seed=1)
    np.testing.assert_allclose(drawn.sum(1), 1)
    assert not drawn[:, 2].any() and (drawn >= 0).all()
    halfway = (np.array([0.6, 0.3, 0.1]) + 1 / 3) / 2
    np.testing.assert_allclose(drawn[:, [0, 1, 3]].mean(0), halfway, atol=0.02)
    np.testing.assert_array_equal(drawn, draw_mixtures((6.0, 3.0, 0.0, 1.0), 4000, seed=1))
    assert (drawn != draw_mixtures((6.0, 3.0, 0.0, 1.0), 4000, seed=2)).any()


def test_a_law_is_found_again() -> None:
    runs = draw_mixtures((1.0, 1.0, 1.0), 30, seed=0)
    law = fit(runs, made(runs))
    others = draw_mixtures((1.0, 1.0, 1.0), 50, seed=5)
    np.testing.assert_allclose(law(others), made(others), rtol=0.01)
    assert (law.slope.argmin(1) == SLOPE.argmin(1)).all()
    with pytest.raises(UserError, match="4 runs cannot tell how 3 weights change a loss; make at least 5"):
        fit(runs[:4], made(runs[:4]))


def test_what_is_left_out_is_foretold_by_the_others() -> None:
    """The closed form, against fits without each run and with the middle and the offset of all."""
    runs = draw_mixtures((1.0, 1.0, 1.0), 8, seed=3)
    losses = made(runs) + np.random.default_rng(0).normal(0, 0.05, (8, 3))
    law = fit(runs, losses)
    for left in range(8):
        rest = np.arange(8) != left
        x = np.concatenate([np.ones((7, 1)), runs[rest] - law.middle], axis=1)
        y = np.log(losses[rest] - law.offset)
        found = np.linalg.solve(x.T @ x + 1e-3 * np.diag([0, 1, 1, 1]), x.T @ y)
        foretold = law.offset + np.exp(np.concatenate([[1.0], runs[left] - law.middle]) @ found)
        np.testing.assert_allclose(law.left_out[left], foretold, rtol=1e-9)


def test_the_best_mixture_is_near_the_least_loss() -> None:
    runs = draw_mixtures((1.0, 1.0, 1.0), 30, seed=0)
    targets = (1.0, 2.0, 1.0)
    best = best_mixture(fit(runs, made(runs)), (1.0, 1.0, 1.0), targets, seed=0)
    grid = np.array([(a, b, 1 - a - b) for a in np.linspace(0, 1, 101) for b in np.linspace(0, 1 - a, 101)])
    losses = made(grid) @ np.array(targets) / 4
    assert best.sum() == pytest.approx(1)
    assert float(made(best) @ np.array(targets) / 4) < losses.min() + 0.01 * np.ptp(losses)
    assert target_loss([2.0, 4.0, 6.0], targets) == pytest.approx(4.0)


def test_rank_correlation() -> None:
    """By hand: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)."""
    assert rank_correlation([1.0, 2.0, 3.0, 9.0], [10.0, 30.0, 20.0, 40.0]) == pytest.approx(0.8)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)


# ---- runs ----


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two sets with nothing in common, of which a model learns what it reads."""
    folder, datasets = tmp_path_factory.mktemp("search"), []
    for name, word in (("a", "abcdefg "), ("b", "0123456789\n")):
        (folder / f"{name}.txt").write_text(word * 200)
        documents = Files(paths=(str(folder / f"{name}.txt"),))
        prepared = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.2, workers=1)
        prepare(prepared, folder / name)
        datasets.append(Dataset(path=str(folder / name)))
    return RunConfig(
        model=llama(vocab_size=258, d_model=16, n_layers=1, n_heads=1, d_ff=16, max_seq_len=16),
        data=DataConfig(datasets=tuple(datasets)),
        train=TrainConfig(steps=30, batch_size=8, seq_len=16, eval_batches=2),
        optimizer=AdamW(learning_rate=2e-2),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32),
        run_dir="unused",
    )


def test_runs_learn_what_they_read(config: RunConfig) -> None:
    runs = MixtureRuns(config)
    only_a, only_b, again = (runs.losses(weights) for weights in ((1, 0), (0, 1), (1, 0)))
    assert only_a[0] < only_a[1] - 1 and only_b[1] < only_b[0] - 1
    assert again == only_a, "nothing is left of the run between"
    with pytest.raises(UserError, match=r"without train\.phases"):
        train = dataclasses.replace(config.train, phases=(Phase(start=2, batch_size=2),))
        MixtureRuns(dataclasses.replace(config, train=train))


def test_a_search(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of a law in place of runs: what is kept, what is run again, what is refused."""
    asked = list[tuple[float, ...]]()

    class ByLaw:
        def __init__(self, _: RunConfig) -> None: ...

        def losses(self, weights: tuple[float, ...]) -> tuple[float, ...]:
            asked.append(weights)
            return float(1 + np.exp(-weights[0])), float(2 + np.exp(-2 * weights[1]))

    monkeypatch.setattr(mixture_search, "MixtureRuns", ByLaw)
    file, lines = tmp_path / "rows.jsonl", list[str]()
    go = lambda runs, config=config, targets=(), rounds=1: search(
        config, runs=runs, rounds=rounds, file=file, targets=targets, seed=0, tell=lines.append
    )
    found = go(12)
    assert found.tried[0][0] == (0.5, 0.5) == found.targets and len(found.tried) == 12
    assert len(asked) == len(set(asked)) == len(file.read_text().splitlines()) == len(lines)
    assert found.rank_correlation > 0.95 and found.error < 0.01
    a = np.linspace(0, 1, 1001)  # of the target
    least = a[np.argmin(np.exp(-a) + np.exp(-2 * (1 - a)))]
    assert found.best[0] == pytest.approx(least, abs=0.05)
    assert found.foretold == pytest.approx(found.measured, rel=0.01)
    count = len(asked)
    assert as_json(go(12)) == as_json(found) and len(asked) == count, "all from the file"
    assert go(12, targets=(0.0, 1.0)).best[1] > 0.95
    again = go(12, rounds=3)
    assert again.tried[:12] == found.tried and again.tried[12] == (found.best, found.measured)
    more = go(14)
    assert more.tried[0] == found.tried[0] and len(more.tried) == 14
    console(width=160, highlight=False).print(table_of(found))
    assert any(line.startswith("weights: (") for line in lines_of(found))
    for words, said in (((3,), "--runs 3 for 2 data.datasets"), ((9, config, (1.0,)), "--targets has 1 numbers")):
        with pytest.raises(UserError, match=said):
            go(*words)
    with pytest.raises(UserError, match="has runs of another config"):
        go(12, dataclasses.replace(config, train=dataclasses.replace(config.train, steps=31)))
    heavier = dataclasses.replace(config.data.datasets[0], weight=3.0)
    data = dataclasses.replace(config.data, datasets=(heavier, config.data.datasets[1]))
    other = dataclasses.replace(config, data=data)
    assert go(12, other).tried[0][0] == (0.75, 0.25), "other weights are no other config"
    file.write_text(json.dumps({"step": 3}) + "\n")
    with pytest.raises(UserError, match="is not what regmix wrote"):
        go(12)
