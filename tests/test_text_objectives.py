"""Tasks about whole texts: their losses against formulas of the model's own outputs, and one result however the batch
is cut: packed or not, in micro-batches or not, on one device or eight."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import initial_parameters, one_device, plainly, run_decoder, small_model
from helpers import small_run as plain_run

from maxlm.config import (
    Adapter,
    BinaryReward,
    BradleyTerry,
    ClassHead,
    Classify,
    DistillContext,
    Dpo,
    Embed,
    EmbedHead,
    Ipo,
    Kto,
    LmHead,
    Lora,
    ModelConfig,
    Orpo,
    Preference,
    PromptTuning,
    Reward,
    RunConfig,
    ScalarHead,
    ShardingConfig,
    SimPo,
    Task,
)
from maxlm.models import Tokens, bind, ops
from maxlm.sharding import Layout, make_layout
from maxlm.training.context_objective import UntoldTexts
from maxlm.training.judging import Classes, Rewards
from maxlm.training.nearness import Vectors
from maxlm.training.preference_objective import DIVERGENCE, LabelledTexts, PairedTexts
from maxlm.training.step import gradient_function, make_trainer
from maxlm.training.text_objective import TextObjective

T, TEXTS = 32, 6


class Text(NamedTuple):
    ids: list[int]
    counts: list[bool]
    value: float


Record = list[Text]


def text_batch(records: Sequence[Record], rows: int, texts: int = TEXTS) -> dict[str, np.ndarray]:
    """The records, each whole in the first row that has room for it, and rows of nothing at the end."""
    batch = {name: np.zeros((rows, T), np.int32) for name in ("inputs", "targets", "segment_ids", "positions")}
    batch |= {name: np.zeros((rows, T), np.float32) for name in ("loss_mask", "text_ends")}
    batch |= {name: np.full((rows, texts), -1, np.int32) for name in ("text_record", "text_number")}
    batch["text_value"] = np.zeros((rows, texts), np.float32)
    room, used, n_records, numbers = [T] * rows, [0] * rows, [0] * rows, itertools.count()
    for record in records:
        length = sum(len(text.ids) for text in record)
        row = next(r for r in range(rows) if room[r] >= length and used[r] + len(record) <= texts)
        for text in record:
            start, n, s = T - room[row], len(text.ids), used[row]
            span = slice(start, start + n)
            batch["inputs"][row, span], batch["positions"][row, span] = text.ids, range(n)
            batch["targets"][row, span] = [*text.ids[1:], 0]
            batch["loss_mask"][row, span] = [*text.counts[1:], False]
            batch["segment_ids"][row, span] = s + 1
            batch["text_ends"][row, start + n - 1] = 1
            batch["text_record"][row, s], batch["text_value"][row, s] = n_records[row], text.value
            batch["text_number"][row, s] = next(numbers)
            room[row], used[row] = room[row] - n, s + 1
        n_records[row] += 1
    for row, free in enumerate(room):  # what is left is a segment that nothing counts
        batch["segment_ids"][row, T - free :] = used[row] + 1
        batch["positions"][row, T - free :] = range(free)
    return batch


def records(values: Sequence[Sequence[float]], seed: int = 0, vocab: int = 64) -> list[Record]:
    """Random prompts with a completion for each value; what completes them counts."""
    rng = np.random.default_rng(seed)
    found = []
    for of_record in values:
        prompt = rng.integers(1, vocab, rng.integers(1, 4)).tolist()
        record = []
        for value in of_record:
            ids = rng.integers(1, vocab, rng.integers(1, 5)).tolist()
            record.append(Text(prompt + ids, [False] * len(prompt) + [True] * len(ids), value))
        found.append(record)
    return found


class Case(NamedTuple):
    task: Task
    records: list[Record]
    head: Any = LmHead()
    formula: Callable[..., float] | None = None
    cut: ShardingConfig = ShardingConfig(data=2, fsdp=2, tensor=2)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def pairs_of(record: Record):
    better = [(i, j) for i, a in enumerate(record) for j, b in enumerate(record) if a.value > b.value]
    return [(i, j, 1 / len(better)) for i, j in better]


def over_pairs(loss: Callable[[Any, Any], float]) -> Callable[..., float]:
    """Mean over records of the mean over pairs, of what is known of the two texts."""

    def mean(records: list[Record], known: list[list[Any]]) -> float:
        of_records = [
            sum(weight * loss(of[i], of[j]) for i, j, weight in pairs_of(record))
            for record, of in zip(records, known, strict=True)
        ]
        return float(np.mean(of_records))

    return mean


class Known(NamedTuple):
    """Of one text, float64."""

    log_prob: float
    tokens: int
    ratio: float
    head: np.ndarray  # what the head says at its end
    mean: np.ndarray  # of all states
    value: float
    says: np.ndarray  # log-probabilities of all ids in place of each counted one
    reference_says: np.ndarray
    apart: np.ndarray  # log-ratios of the counted ones

    @property
    def each(self):
        return self.log_prob / self.tokens


def told(records, known):
    """The mean over tokens of the KL between what the reference says after the context and the model without it."""
    pairs = [(with_context.reference_says, alone.says) for alone, with_context in known]
    return float(np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in pairs]).mean())


def kto(records, known):
    ratios = [[of.ratio for of in record] for record in known]
    z0 = max(0, np.mean([other for _, other in ratios]))
    losses = [
        1.3 * (1 - sigmoid(0.2 * (own - z0))) if of[0].value > 0 else 0.8 * (1 - sigmoid(0.2 * (z0 - own)))
        for (own, _), of in zip(ratios, known, strict=True)
    ]
    return float(np.mean(losses))


def classes(records, known):
    texts = [of for record in known for of in record]
    own = [np.log(np.exp(of.head).sum()) - of.head[int(of.value)] - 0.5 * of.each for of in texts]
    return float(np.mean(own))


def nce(records, known):
    unit = lambda x: x / np.sqrt((x**2).sum(-1, keepdims=True))
    queries, passages = (unit(np.array([record[i].mean for record in known])) for i in (0, 1))
    hard = unit(np.array([other.mean for record in known for other in record[2:]]))
    near = lambda x, y: np.exp(x @ y.T / 0.07)
    own = np.diag(near(queries, passages))
    among = near(queries, passages).sum(1) + near(queries, hard).sum(1), near(queries, passages).sum(0)
    return float(np.mean([-np.log(own / total) for total in among]))


RANKINGS = records([(1, 0), (1, 0), (3, 1, 2), (0, 1), (1, 0), (2, 2, 1), (1, 0)])
PAIRS = records([(1, 0)] * 7)
LABELS = records([(1, 0), (-1, 0), (1, 0), (-1, 0), (-1, 0), (1, 0), (1, 0)])


def contexts(n: int, longest: int = 5, seed: int = 0) -> list[Record]:
    """Conversations alone, and after a context; several turns count."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(n):
        ids = rng.integers(1, 64, rng.integers(3, 7)).tolist()
        counts = [False, *(rng.random(len(ids) - 2) < 0.5).tolist(), True]
        context = rng.integers(1, 64, rng.integers(0, longest + 1)).tolist()
        found.append([Text(ids, counts, 1.0), Text(context + ids, [False] * len(context) + counts, 0.0)])
    return found


CASES = {
    "dpo": Case(
        Preference(loss=Dpo(beta=0.2, label_smoothing=0.1, nll_weight=0.3)),
        RANKINGS,
        formula=over_pairs(
            lambda c, r: (
                -0.9 * np.log(sigmoid(0.2 * (c.ratio - r.ratio)))
                - 0.1 * np.log(sigmoid(0.2 * (r.ratio - c.ratio)))
                - 0.3 * c.each
            )
        ),
    ),
    "ipo": Case(Preference(loss=Ipo(tau=0.5)), RANKINGS, formula=over_pairs(lambda c, r: (c.ratio - r.ratio - 1) ** 2)),
    "kto": Case(Preference(loss=Kto(beta=0.2, desired_weight=1.3, undesired_weight=0.8)), LABELS, formula=kto),
    "context": Case(DistillContext(), contexts(8), formula=told, cut=ShardingConfig(data=2, tensor=2, seq=2)),
    "orpo": Case(
        Preference(loss=Orpo(weight=0.5)),
        PAIRS,
        formula=over_pairs(
            lambda c, r: (
                -0.5 * np.log(sigmoid(c.each - np.log(1 - np.exp(c.each)) - r.each + np.log(1 - np.exp(r.each))))
                - c.each
            )
        ),
    ),
    "simpo": Case(
        Preference(loss=SimPo(beta=2.0, gamma=0.5)),
        PAIRS,
        formula=over_pairs(lambda c, r: -np.log(sigmoid(2 * (c.each - r.each) - 0.5))),
    ),
    "reward": Case(
        Reward(loss=BradleyTerry(margin=0.3), lm_weight=0.5),
        RANKINGS,
        ScalarHead(lm=LmHead()),
        over_pairs(lambda c, r: -np.log(sigmoid(c.head - r.head - 0.3 * (c.value - r.value))) - 0.5 * c.each),
    ),
    "binary": Case(
        Reward(loss=BinaryReward()),
        records([(1,), (0,), (1,), (0,), (1,), (1,), (0,), (1,)]),
        ScalarHead(),
        lambda records, known: float(
            np.mean([-np.log(sigmoid(of.head if of.value else -of.head)) for record in known for of in record])
        ),
    ),
    "classify": Case(
        Classify(lm_weight=0.5),
        records([(0,), (2,), (1,), (2,), (1,), (0,), (2,)]),
        ClassHead(n_classes=3, lm=LmHead(tied=True)),
        classes,
    ),
    "embed": Case(Embed(), records([(1, 0), (1, 0, -1), (1, 0), (1, 0), (1, 0, -1, -1), (1, 0)]), EmbedHead(), nce),
}
NIGHTLY = ("dpo", "reward", "ipo", "orpo", "simpo", "binary", "classify")
EACH = [pytest.param(name, marks=pytest.mark.nightly if name in NIGHTLY else ()) for name in CASES]


def config_of(case: Case, rows: int, parts: int = 1, sharding: ShardingConfig | None = None) -> RunConfig:
    config = plain_run(
        small_model(head=case.head, n_layers=1),
        sharding,
        batch_size=rows,
        seq_len=T,
        micro_batches=parts,
        loss_chunk=16,
    )
    return dataclasses.replace(
        config, task=case.task, checkpoint=dataclasses.replace(config.checkpoint, init_from="unused")
    )


def objective_of(config: RunConfig, layout: Layout, texts: int = TEXTS, **reference: Any) -> TextObjective:
    task = config.task
    match task:
        case Preference(loss=Kto() as loss):
            return LabelledTexts(config, layout, texts, loss, **({"reference": config.model} | reference))
        case Preference(loss=Orpo() | SimPo() as loss):
            return PairedTexts(config, layout, texts, loss)
        case Preference(loss=loss):
            return PairedTexts(config, layout, texts, loss, **({"reference": config.model} | reference))
        case DistillContext():
            return UntoldTexts(config, layout, texts, **({"reference": config.model} | reference))
        case Reward():
            return Rewards(config, layout, texts, task)
        case Classify():
            return Classes(config, layout, texts, task)
        case _:
            return Vectors(config, layout, texts)


def of_batch(
    config: RunConfig, layout: Layout, batch: dict[str, np.ndarray], parameters: Any, frozen: Any, texts: int = TEXTS
):
    objective = objective_of(config, layout, texts)
    program = gradient_function(config, layout, objective)
    put = {
        name: jax.device_put(batch[name], layout.sharding(layout.activation(*array.dims)))
        for name, array in objective.arrays.items()
    }
    parameters, frozen = (jax.device_put(x, layout.shardings(objective.dims)) for x in (parameters, frozen))

    @jax.jit
    def run(parameters, frozen, batch):
        sums, gradient = program(parameters, frozen, objective.draw(batch, jax.random.key(0)))
        _, figures = objective.settle(parameters, sums.router)
        return sums, gradient, figures

    return jax.device_get(run(parameters, frozen, put))


def known_of(model: ModelConfig, parameters: Any, frozen: Any, some: list[Record]) -> list[list[Known]]:
    """Each text read alone, in float64 from the states on."""
    texts = [text for record in some for text in record]
    ids = np.zeros((len(texts), max(len(text.ids) for text in texts)), np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text.ids)] = text.ids

    @jax.jit
    def forward(parameters: Any) -> Any:
        tokens = Tokens(np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape))
        hidden = run_decoder(model, parameters, plainly(), ids, tokens).hidden
        return hidden, ops.logits(hidden, bind(model, parameters).unembedding) if model.lm_head else hidden

    def log_probs(found) -> list[tuple[np.ndarray, np.ndarray]]:
        if model.lm_head is None:
            return [(np.zeros(1), np.zeros(1))] * len(texts)
        logits = np.float64(found[1])
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        which = [[i for i in range(1, len(text.ids)) if text.counts[i]] for text in texts]
        return [
            (row[[i - 1 for i in places], [text.ids[i] for i in places]], row[[i - 1 for i in places]])
            for row, text, places in zip(logits, texts, which, strict=True)
        ]

    ours, theirs = forward(parameters), forward(frozen)
    found = []
    head = next((parameters[name] for name in ("score", "classes") if name in parameters), np.zeros(model.d_model))
    for row, text, (own, says), (other, reference_says) in zip(
        np.float64(ours[0]), texts, log_probs(ours), log_probs(theirs), strict=True
    ):
        n = len(text.ids)
        at_end = np.float64(head) @ row[n - 1]
        rest = at_end, row[:n].mean(0), text.value, says, reference_says, own - other
        found.append(Known(own.sum(), len(own), (own - other).sum(), *rest))
    left = iter(found)
    return [[next(left) for _ in record] for record in some]


def other_parameters(model: ModelConfig) -> Any:
    """Those of a model that is not far."""
    nudged = lambda x: x * (1 + 0.2 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape))
    return jax.tree.map(nudged, initial_parameters(model))


@pytest.mark.parametrize("name", EACH)
def test_a_task_is_its_formula_and_the_same_however_the_batch_is_cut(name: str) -> None:
    case = CASES[name]
    alone = config_of(case, rows=8)
    model = alone.model
    parameters, frozen = initial_parameters(model), other_parameters(model)
    # A record a row, one device, all at once.
    unpacked = text_batch(case.records, rows=8)
    sums, gradient, figures = of_batch(alone, one_device(), unpacked, parameters, frozen)
    assert case.formula is not None
    known = known_of(model, parameters, frozen, case.records)
    wanted = case.formula(case.records, known)
    assert sums.means.get("loss", sums.objective) / sums.weight == pytest.approx(wanted, rel=2e-5)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-3
    if name in ("dpo", "ipo", "kto"):
        estimate = lambda of: (of.apart**2).mean() / 2
        wanted = over_pairs(lambda c, r: (estimate(c) + estimate(r)) / 2)(case.records, known)
        if name == "kto":
            wanted = np.mean([estimate(own) for own, _ in known])
        assert sums.means[DIVERGENCE] / sums.weight == pytest.approx(wanted, rel=2e-5)
    # Several in a row, some rows of nothing; 4 micro-batches, over 8 devices.
    cut = config_of(case, rows=16, parts=4, sharding=case.cut)
    packed = text_batch(case.records, rows=16)
    assert (packed["text_record"].max(1) > 0).any() and (packed["text_record"].max(1) < 0).any()
    again = of_batch(cut, make_layout(cut.sharding), packed, parameters, frozen)
    np.testing.assert_allclose(again[0].weight, sums.weight)
    for mean, value in sums.means.items():
        np.testing.assert_allclose(again[0].means[mean], value, rtol=1e-4, atol=1e-5, err_msg=mean)
    for figure, value in figures.items():
        np.testing.assert_allclose(again[2][figure], value, rtol=1e-4, atol=1e-5, err_msg=figure)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), again[1], gradient)


def test_dpo_begins_at_log_2_with_half_of_the_pairs_right() -> None:
    """The policy is its reference; a step moves it, and not the reference. Eight pairs, whose mean is not rounded."""
    config = config_of(CASES["dpo"]._replace(task=Preference(loss=Dpo(beta=0.2))), rows=8, parts=2)
    layout, batch = one_device(), text_batch(records([(1, 0)] * 8), rows=8)
    trainer = make_trainer(config, layout, objective_of(config, layout))
    state = trainer.init()
    frozen = jax.tree.map(jnp.copy, state.parameters)
    before = jax.device_get(frozen)
    state, output = trainer.step(dataclasses.replace(state, frozen=frozen), trainer.place(batch))
    figures = jax.device_get(output.figures)
    assert figures["reward_margin"] == figures["reward_chosen"] == figures[DIVERGENCE] == 0
    assert figures["loss"] == np.float32(math.log(2))
    assert figures["reward_accuracy"] == 0.5
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.frozen))
    again = trainer.step(state, trainer.place(batch))[1].figures
    assert float(again["loss"]) < math.log(2) and float(again["reward_accuracy"]) > 0.5
    assert float(again[DIVERGENCE]) > 0


def test_a_reference_reads_texts_without_the_virtual_tokens_before_them() -> None:
    """They are the policy's; to the reference they would be so many tokens of id 0."""
    some = records([[1, 0]] * 3)
    with_virtual = [[Text([0] * 3 + ids, [False] * 3 + counts, value) for ids, counts, value in one] for one in some]
    config, layout = config_of(Case(Preference(), some), 3), one_device()
    frozen = initial_parameters(config.model)
    found = []
    for adapter, texts in ((None, some), (Adapter(kind=PromptTuning(length=3)), with_virtual)):
        tuned = dataclasses.replace(config, model=dataclasses.replace(config.model, adapter=adapter))
        objective = PairedTexts(tuned, layout, TEXTS, Dpo(), reference=config.model)
        numbers, values = map(np.asarray, jax.jit(objective.reference_log_probs)(frozen, text_batch(texts, 3)))
        found.append(values[numbers >= 0][np.argsort(numbers[numbers >= 0])])
    assert len(found[0]) == 6 and (found[0] < 0).all()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_nothing_is_to_be_learned_of_an_empty_context() -> None:
    """And under an adapter, of which nothing is learned yet, the reference is the base that it is laid on."""
    some = contexts(6, longest=0)
    config = config_of(CASES["context"], rows=6)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, adapter=Adapter(kind=Lora(rank=2))), task=DistillContext()
    )
    parameters = initial_parameters(config.model)
    for records, least, most in ((some, 0, 1e-6), (contexts(6), 1e-4, 10)):
        objective = UntoldTexts(config, one_device(), TEXTS, under=True)
        batch = text_batch(records, 6)
        found = jax.jit(lambda batch, of=objective: of.loss(parameters, None, batch, jnp.float32(1)))(batch)
        assert least <= abs(found.objective) / found.weight <= most
        assert found.weight == sum(sum(text.counts) for text, _ in records)
