"""Figures of held-out texts and ratings, against what can be counted by hand and known answers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from helpers import initial_parameters, one_device, small_model, small_run

from maxlm.config import (
    ByteTokenizer,
    ClassHead,
    Classify,
    Dpo,
    Embed,
    EmbedHead,
    EngineConfig,
    LmHead,
    ObserveConfig,
    Pooling,
    Preference,
    Pretrain,
    Reward,
    RunConfig,
    ScalarHead,
    SimPo,
    Task,
    UserError,
    WeightFormat,
)
from maxlm.evaluation import judgements, ratings
from maxlm.evaluation.ratings import Comparison

RNG = np.random.default_rng(0)


def texts(record: Any, value: Any, **more: Any) -> dict[str, np.ndarray]:
    found = {"text_record": np.array(record), "text_value": np.array(value, np.float32)}
    return found | {name: np.array(x, np.float32) for name, x in more.items()}


def test_rewards_by_margin_and_rating() -> None:
    """Two pairs a point apart, one right; one two points apart, right; an empty place."""
    given = texts([[0, 0, 1, 1], [0, 0, -1, -1]], [[1, 0, 0, 1], [2, 0, 9, 9]], reward=[[3, 1, 2, 1], [5, 0, 99, 99]])
    found = judgements.judge_rewards(given)
    assert found["reward_mean"] == pytest.approx(np.mean([3, 1, 2, 1, 5, 0]))
    assert found["accuracy_by_rating"] == [[1.0, 0.5], [2.0, 1.0]]
    sure = [1 / (1 + math.exp(-margin)) for margin in (1, 2, 5)]  # wrong, right, right
    assert found["calibration"] == [[pytest.approx(p), right] for p, right in zip(sure, (0, 1, 1), strict=True)]


def test_sure_as_it_is_right() -> None:
    logits = np.log([[[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2]]])
    found = judgements.judge_classes(texts([[0, 1, 2, 3, 4]], [[0, 0, 0, 0, 1]], logits=logits))
    assert found["calibration_error"] == pytest.approx(0, abs=1e-6)
    assert found["balanced_accuracy"] == 0.5
    labels = judgements.judge_labels(texts([[0, 1, 2]], [[1, 0, 1]], reward=[[2, -1, -3]]))
    assert labels["auroc"] == 0.5  # one of two good ones is above the bad one


def test_retrieval_counts_places() -> None:
    """Four pairs in two rows, and a passage that nobody asked for; the third query finds another's passage first."""
    axes = np.eye(5)
    first = [axes[0], axes[0], axes[1], 2 * axes[1], axes[4]]
    vectors = [first, [axes[2], axes[2] + 2 * axes[3], axes[3], axes[3], axes[0]]]
    given = texts([[0, 0, 1, 1, 1], [0, 0, 1, 1, -1]], [[1, 0, 1, 0, -1], [1, 0, 0, 1, 0]], vectors=vectors)
    given["vectors"][1, 3] = axes[3] + axes[2]  # nearer to the other passage than to its own
    found = judgements.judge_retrieval(given)
    assert found["passages"] == 5
    assert found["recall_1"] == 0.75 and found["mrr"] == pytest.approx((3 + 1 / 2) / 4)


def test_a_linear_probe_reads_what_is_linear() -> None:
    x = RNG.normal(size=(300, 8))
    classes = (x @ RNG.normal(size=(8, 3))).argmax(1)
    assert judgements.linear_probe(x[:200], classes[:200], x[200:], classes[200:]) > 0.85
    shuffled = RNG.permutation(classes[:200])
    assert judgements.linear_probe(x[:200], shuffled, x[200:], classes[200:]) < 0.6


def test_elo_finds_the_ratings_that_made_the_games() -> None:
    strengths = {"a": 1200.0, "b": 1000.0, "c": 800.0}
    games = []
    for one, other in itertools.combinations(strengths, 2):
        chance = 1 / (1 + 10 ** ((strengths[other] - strengths[one]) / 400))
        games += [Comparison(one, other, chance)] * 2000  # the expectation itself
    found = ratings.elo(games)
    assert found == {name: pytest.approx(value, abs=0.1) for name, value in strengths.items()}
    assert ratings.elo(games[::-1]) == {name: pytest.approx(value) for name, value in found.items()}
    # 10 to 1 is 400 points; who never lost is not infinitely good.
    [ten, one] = ratings.elo([Comparison("x", "y", 10 / 11)] * 1000).values()
    assert ten - one == pytest.approx(400, abs=0.1)
    [best, worst] = ratings.elo([Comparison("x", "y", 1.0)] * 5).values()
    assert 1000 < best - worst < 3000
    with pytest.raises(UserError, match=r"score = 2 of x against y must be in \[0, 1\]"):
        ratings.elo([Comparison("x", "y", 2)])


def test_win_rates_count_a_draw_as_half() -> None:
    games = [Comparison("a", "b", 1.0), Comparison("b", "a", 1.0), Comparison("a", "b", 0.5), Comparison("a", "c", 0)]
    found = ratings.win_rate(games, "a", "b")
    assert found is not None and found.value == 0.5 and found.low < 0.5 < found.high
    assert ratings.win_rate(games, "b", "c") is None
    by_reward = ratings.by_reward("a", "b", np.array([1.0, 0.0, 2.0]), np.array([0.0, 0.0, 3.0]))
    assert [one.score for one in by_reward] == [1.0, 0.5, 0.0]


def test_rewards_on_one_scale_and_two_models_as_one() -> None:
    scores = RNG.normal(3, 2, 50)
    scaled = ratings.RewardScale.of(scores).normalised(scores)
    assert scaled.mean() == pytest.approx(0, abs=1e-12) and scaled.std() == pytest.approx(1)
    # Helpful and safe; helpful and unsafe; a risky prompt, which safety alone judges.
    helpful, safe, risky = [2.0, 2.0, 5.0], [3.0, -4.0, 1.0], [False, False, True]
    chosen = np.array([2.0, -4.0, 1.0])
    np.testing.assert_allclose(ratings.gated(helpful, safe, risky), (chosen - chosen.mean()) / chosen.std(), rtol=1e-9)
    with pytest.raises(UserError, match="have no scale"):
        ratings.RewardScale.of([1.0, 1.0])


def broken(task: Task, head: Any = LmHead(), sample_tokens: int = 0, init_from: str | None = None) -> RunConfig:
    config = small_run(small_model(head=head))
    return dataclasses.replace(
        config,
        task=task,
        observe=ObserveConfig(sample_tokens=sample_tokens),
        checkpoint=dataclasses.replace(config.checkpoint, init_from=init_from),
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (broken(Pretrain(), ScalarHead()), r"ScalarHead gives no logits, which task = Pretrain learns; use LmHead"),
        (
            broken(Preference(), ScalarHead(), init_from="x"),
            r"gives no logits, which task = Preference learns",
        ),
        (broken(Reward()), r"model\.head = LmHead is not what Reward trains; use ScalarHead"),
        (broken(Classify(), ScalarHead()), r"is not what Classify trains; use ClassHead"),
        (broken(Embed(), ScalarHead()), r"is not what Embed trains; use EmbedHead"),
        (
            broken(Reward(lm_weight=0.5), ScalarHead()),
            r"task\.lm_weight = 0\.5 .* model\.head\.lm is None; use an LmHead",
        ),
        (broken(Classify(), ClassHead(n_classes=2, lm=LmHead())), r"task\.lm_weight = 0 never looks at; use None"),
        (broken(Reward(), ScalarHead(), sample_tokens=8), r"sample_tokens = 8 needs a model that writes.*; use 0"),
        (broken(Preference(loss=Dpo())), r"task\.loss = Dpo holds the model to a reference.*name a run"),
        (broken(Preference(loss=SimPo(), reference="x")), r"task\.reference = x: task\.loss = SimPo has no reference"),
        (broken(Preference(loss=SimPo(), reference_ahead=True)), r"task\.reference_ahead = True: .*has no reference"),
    ],
)
def test_what_does_not_fit_a_task(config: RunConfig, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        config.validate(8)
    assert "\n" not in str(caught.value)


def test_vectors_are_served_as_they_were_trained(tmp_path: Any) -> None:
    """Of the last token, which is eos, as in training; and nothing is written."""
    import httpx
    from fake_engine import running_server

    from maxlm.data.tokenizers import open_tokenizer
    from maxlm.inference.load import LoadedRun
    from maxlm.serving.app import Service
    from maxlm.serving.loading import serve_model

    model = small_model(vocab_size=384, n_layers=1, head=EmbedHead(pooling=Pooling.LAST))
    tokenizer = open_tokenizer(ByteTokenizer())
    run = LoadedRun(
        config=dataclasses.replace(small_run(model), task=Embed()),
        layout=one_device(),
        parameters=initial_parameters(model),
        tokenizer=tokenizer,
        step=0,
    )
    models = serve_model(run, "vectors", EngineConfig(), WeightFormat.DTYPE)
    with running_server(Service(models=models)) as (url, _):
        post = lambda path, **body: httpx.post(f"{url}/v1/{path}", json={"model": "vectors"} | body)
        [found] = post("embeddings", input="abc").json()["data"]
        state = np.asarray(run.model.hidden(tokenizer.document_ids(tokenizer.encode("abc"))))[-1]
        np.testing.assert_allclose(found["embedding"], state / np.linalg.norm(state), rtol=1e-4, atol=1e-6)
        other = post("embeddings", input="abc", pooling="mean")
        assert other.status_code == 400 and "was trained with last" in other.text
        text = post("completions", prompt="abc")
        assert text.status_code == 400 and "vectors and no text" in text.text
    with pytest.raises(UserError, match="EmbedHead gives no logits"):
        run.model.logits([1])
