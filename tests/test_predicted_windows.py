"""Windows of exercises: full, in documents, decided by seed and number alone; and what a model learns of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT32, initial_parameters, loss_function, one_device, small_model, small_run
from test_loader import make
from test_pipeline import assert_close

import maxlm
from maxlm import evaluate
from maxlm.config import (
    AdamW,
    BlankInfilling,
    ByteTokenizer,
    CausalLm,
    CheckpointConfig,
    ConstantSchedule,
    Context,
    Conversations,
    DataConfig,
    Dataset,
    Files,
    FillInMiddle,
    GapPositions,
    GlmRope,
    MaskedLm,
    MiddleLevel,
    Mixed,
    ModelConfig,
    ObserveConfig,
    Prediction,
    PrefixLm,
    PrepareConfig,
    Pretrain,
    RunConfig,
    Sft,
    ShardingConfig,
    Share,
    SpanCorruption,
    SuffixInfilling,
    TrainSentencePiece,
    UserError,
    special_tokens,
    ul2,
)
from maxlm.data.loader import Batches, open_batches
from maxlm.data.prepare import prepare
from maxlm.data.shards import Split
from maxlm.models import Tokens, bind
from maxlm.models.execution import Execution
from maxlm.sharding import make_layout
from maxlm.training import NextToken

T = 48
PREDICTIONS: dict[str, Prediction] = {
    "prefix": PrefixLm(mode="[S]"),
    "spans": SpanCorruption(density=0.5, mean_span=1.0, n_sentinels=25),
    "blanks": BlankInfilling(),
    "suffix": SuffixInfilling(),
    "middle": FillInMiddle(),
    "middle of documents": FillInMiddle(level=MiddleLevel.DOCUMENT),
    "masked": MaskedLm(),
    "mixed": Mixed(
        shares=tuple(
            Share(prediction=one)
            for one in (CausalLm(), BlankInfilling(), SuffixInfilling(), SpanCorruption(n_sentinels=30), MaskedLm())
        )
    ),
}
TOKENIZER = ByteTokenizer(special_tokens=special_tokens(*PREDICTIONS.values()))
GLM = Mixed(shares=(Share(weight=0.3, prediction=BlankInfilling()), Share(weight=0.7, prediction=SuffixInfilling())))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Documents of 40 to 200 bytes: digits, and one letter that no other document has."""
    folder = tmp_path_factory.mktemp("predicted")
    draw = np.random.default_rng(0)
    (folder / "in").mkdir()
    for i in range(60):
        size = int(draw.integers(40, 200))
        letters = np.where(draw.random(size) < 0.4, 58 + i, draw.integers(48, 58, size)).astype(np.uint8)
        (folder / "in" / f"{i:03d}.txt").write_bytes(bytes(letters))
    documents = Files(paths=(str(folder / "in"),))
    asked = PrepareConfig(documents=documents, tokenizer=TOKENIZER, validation_fraction=0.2, workers=1)
    prepare(asked, folder / "out")
    return Dataset(path=str(folder / "out"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("questions")
    records = [{"prompt": "ab" * (1 + i % 5), "completion": "xyz" * (1 + i % 3)} for i in range(40)]
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    documents = Conversations(paths=(str(folder / "in.jsonl"),), template="plain")
    prepare(PrepareConfig(documents=documents, tokenizer=TOKENIZER, validation_fraction=0.2, workers=1), folder / "out")
    return Dataset(path=str(folder / "out"))


def opened(predict: Prediction, *datasets: Dataset, split: Split = Split.TRAIN, **changes: Any) -> Batches:
    values: dict[str, Any] = {"batch_size": 8, "seq_len": T, "split": split, "predict": predict} | changes
    return open_batches(DataConfig(datasets=datasets, seed=values.pop("seed", 0)), **values)


def segments(row: dict[str, np.ndarray]) -> list[slice]:
    starts = np.flatnonzero(np.diff(row["segment_ids"], prepend=0))
    return [slice(int(a), int(b)) for a, b in itertools.pairwise([*starts, T])]


def whole(batches: Batches, count: int) -> dict[str, np.ndarray]:
    found = [batches[i] for i in range(count)]
    return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}


# ---- the next token is as it was ----


def test_the_next_token_has_the_batches_that_it_had(tmp_path: Path) -> None:
    """The fingerprint is that of a version that knew nothing else."""
    dataset = make(tmp_path, "a", 40, 1)
    usual = open_batches(DataConfig(datasets=(dataset,)), batch_size=4, seq_len=16, split=Split.TRAIN)
    assert usual.fingerprint == "7aa88d920c1c0f8bea618cf7ee28e69c3fc5a96c3e0aeffd918434f819799f3d"
    said = dataclasses.replace(dataset, predict=CausalLm())
    same = open_batches(DataConfig(datasets=(said,)), batch_size=4, seq_len=16, split=Split.TRAIN, predict=MaskedLm())
    assert same.fingerprint == usual.fingerprint and same.bytes_per_token == usual.bytes_per_token
    assert set(usual[0]) == {"inputs", "targets", "segment_ids", "positions", "loss_mask"}


def arrays(task: Pretrain, model: ModelConfig | None = None) -> set[str]:
    return set(NextToken(dataclasses.replace(small_run(model), task=task), one_device()).arrays)


def test_a_step_has_more_arrays_only_where_they_are_needed() -> None:
    usual = {"inputs", "targets", "segment_ids", "positions", "loss_mask"}
    assert arrays(Pretrain()) == arrays(Pretrain(predict=FillInMiddle())) == usual
    assert arrays(Pretrain(predict=PrefixLm())) == usual | {"visible_to"}
    assert arrays(Pretrain(predict=GLM)) == usual | {"visible_to", "context_places", "block_places"}


# ---- windows ----


@pytest.mark.parametrize("name", PREDICTIONS)
def test_windows_are_full_and_keep_documents_apart(text: Dataset, name: str) -> None:
    batches = opened(PREDICTIONS[name], text)
    rows, padding = whole(batches, 12), 0
    for i in range(96):
        row = {key: values[i] for key, values in rows.items()}
        *_, last = found = segments(row)
        for piece in found:
            ends = row.get("visible_to", np.arange(1, T + 1))[piece]
            assert ends.max() <= piece.stop and (ends > np.arange(piece.start, piece.stop)).all()
            assert row["positions"][piece].tolist() == list(range(piece.stop - piece.start))
            learned = row["loss_mask"][piece] > 0
            if learned.any():  # of one document
                there = {*row["targets"][piece][learned].tolist()}
                there |= {*row["inputs"][piece].tolist()} if name not in ("masked", "mixed") else set()
                assert len({letter for letter in there if 58 <= letter < 118}) <= 1
            else:
                assert piece == last
                padding += piece.stop - piece.start
    assert padding / rows["inputs"].size < 0.02
    assert rows["inputs"].dtype == np.int32 and rows["loss_mask"].dtype == np.float32


def test_windows_have_every_token_and_few_twice(text: Dataset) -> None:
    """The letters of each window are found in the stream; where one ends, the next has begun."""
    batches = opened(PrefixLm(), text, split=Split.VALIDATION, batch_size=1)
    stream = np.fromfile(Path(text.path) / "validation-00000.tokens", "<u2").astype(np.int32)
    assert batches.n_batches is not None
    at, taken = 0, 0
    for i in range(batches.n_batches):
        row = {key: values[0] for key, values in batches[i].items()}
        tokens = np.concatenate(
            [
                np.append(row["inputs"][piece], row["targets"][piece][-1])
                for piece in segments(row)
                if row["loss_mask"][piece].any()
            ]
        )
        starts = [s for s in range(at + 2) if np.array_equal(stream[s : s + len(tokens)], tokens)]
        assert starts, "the window is no part of the stream, or leaves a gap"
        assert starts[-1] <= at or stream[at] == 257  # the end of a document, from which nothing follows
        at, taken = starts[-1] + len(tokens), taken + len(tokens)
    assert len(stream) - at < 2 * T and taken < 1.05 * at


def test_documents_are_turned_whole_and_then_cut(text: Dataset) -> None:
    """Of each document all windows together are the document with its middle at the end, or as it was, and no window is
    longer for it; documents of 42 to 202 tokens are in 1 to 6 of them."""
    batches = opened(FillInMiddle(level=MiddleLevel.DOCUMENT), text, batch_size=1)
    stream = np.fromfile(Path(text.path) / "train-00000.tokens", "<u2").astype(np.int32)
    documents = np.split(stream, np.flatnonzero(stream == 257)[:-1] + 1)
    pieces: list[np.ndarray] = []
    for batch in batches.once():
        row = {key: values[0] for key, values in batch.items()}
        for piece in segments(row):
            if row["loss_mask"][piece].any():
                pieces.append(np.append(row["inputs"][piece], row["targets"][piece][-1]))
    marks = [batches.tokenizer.specials[name] for name in ("<PRE>", "<SUF>", "<MID>")]

    def joined(parts: list[list[int]]) -> list[list[int]]:
        """Each part begins where the last one ended, or a little before: all that they can have been cut from."""
        found = [parts[0]]
        for part in parts[1:]:
            found = [
                one + part[common:]
                for one in found
                for common in range(min(len(one), len(part)) + 1)
                if one[len(one) - common :] == part[:common]
            ]
        return found

    def as_it_was(found: list[int]) -> list[int]:
        if not set(marks) & set(found):
            return found
        assert found[0] == 256 and found[1] == marks[0] and found[-1] == 257
        suffix, middle = (found.index(mark) for mark in marks[1:])
        if suffix == 2:  # prefix and middle together
            return [256, *found[middle + 1 : -1], *found[3:middle], 257]
        return [256, *found[2:suffix], *found[middle + 1 : -1], *found[suffix + 1 : middle], 257]

    whole, turned = 0, 0
    for document in documents:
        letter = document[(document >= 58) & (document < 256)][0]
        mine = [piece.tolist() for piece in pieces if letter in piece]
        if mine[0][0] != 256 or mine[-1][-1] != 257:
            continue  # a piece has no letter; or the end of the split, which fills no window
        whole, turned = whole + 1, turned + any(marks[0] in piece for piece in mine)
        assert document.tolist() in map(as_it_was, joined(mine))
    assert whole > 0.8 * len(documents) > 30 and 0.3 < turned / whole < 0.7


def test_predictions_of_earlier_versions_have_their_fingerprints(text: Dataset) -> None:
    """What a version without levels of middles and positions of gaps wrote of the same."""
    earlier = (FillInMiddle(), GLM, PrefixLm(), SpanCorruption(n_sentinels=8))
    fingerprints = [opened(one, text).fingerprint[:16] for one in earlier]
    assert fingerprints == ["870139f2d5dc2229", "e10aca3301e9598e", "c10b09408be63c1a", "f3eb93f233e1fe7b"]


@pytest.mark.parametrize("name", ["mixed", "middle", "middle of documents"])
def test_a_row_depends_on_seed_and_number_alone(text: Dataset, name: str) -> None:
    batches, again = opened(PREDICTIONS[name], text), opened(PREDICTIONS[name], text)
    all_rows, some = batches[7], again.rows(7, [5, 2])
    for key, values in all_rows.items():
        np.testing.assert_array_equal(some[key], values[[5, 2]])
    other = opened(PREDICTIONS[name], text, seed=1)
    assert batches.fingerprint == again.fingerprint != other.fingerprint
    assert batches.fingerprint != opened(CausalLm(), text).fingerprint
    assert any((other[7][key] != values).any() for key, values in all_rows.items())


def test_an_epoch_asks_of_the_same_window_something_else(text: Dataset) -> None:
    batches = opened(MaskedLm(), text, batch_size=1)
    first = batches[0]
    again = [batches[i] for i in range(1, 400) if (batches[i]["targets"] == first["targets"]).all()]
    assert again and all((one["loss_mask"] != first["loss_mask"]).any() for one in again)


def test_rows_of_the_next_token_stand_among_others(text: Dataset, questions: Dataset) -> None:
    """GLM-130B's share of instructions, as records; a causal row knows the places that GlmRope takes without any."""
    data = (
        dataclasses.replace(questions, weight=0.5, predict=SuffixInfilling()),
        dataclasses.replace(text, weight=0.5, predict=CausalLm()),
    )
    rows, causal = whole(opened(GLM, *data), 4), opened(CausalLm(), *data[1:], batch_size=1)
    answers = [row for row in range(32) if (rows["inputs"][row] == causal.tokenizer.specials["[gMASK]"]).any()]
    assert len(answers) == 16
    for row in set(range(32)) - set(answers):
        assert (rows["visible_to"][row] == np.arange(1, T + 1)).all()
        assert (rows["context_places"][row] == 0).all()
        assert (rows["block_places"][row] == rows["positions"][row] + 1).all()


def spelled(batches: Batches, values: np.ndarray) -> str:
    names = {i: name for name, i in batches.tokenizer.specials.items()}
    return "".join(names.get(int(i), chr(int(i))) for i in values)


@pytest.mark.parametrize("predict", [PrefixLm(mode="[S]"), SuffixInfilling()], ids=["prefix", "suffix"])
def test_of_records_the_answer_is_asked(questions: Dataset, predict: Prediction) -> None:
    batches = opened(predict, questions)
    for row in range(8):
        one = {key: values[row] for key, values in batches[0].items()}
        for piece in segments(one):
            learned = one["loss_mask"][piece] > 0
            if not learned.any():
                continue
            answer = spelled(batches, one["targets"][piece][learned])
            before = spelled(batches, one["inputs"][piece])
            assert answer.startswith(("xyz", " xyz")), answer
            assert set(answer.replace("<|eos|>", "").replace("<eop>", "").strip()) == set("xyz")
            assert answer.endswith("<eop>") == (predict == SuffixInfilling())
            assert before.startswith("[S]") == (predict != SuffixInfilling())
            first = piece.start + int(learned.argmax())
            given = one["visible_to"][piece.start]
            assert given == first + (predict != SuffixInfilling()), (before, answer)


def test_records_are_not_asked_for_gaps(questions: Dataset) -> None:
    with pytest.raises(UserError, match=r"predict = SpanCorruption is of running text, and the data set is of records"):
        opened(SpanCorruption(n_sentinels=30), questions)


# ---- what a model learns ----

MODEL = small_model(vocab_size=320, d_model=16, n_layers=1)


def glm_model(**changes: Any) -> ModelConfig:
    model = small_model(vocab_size=320, d_model=16, **changes)
    block = model.blocks[0]
    attention = dataclasses.replace(block.attention, position=GlmRope())
    return dataclasses.replace(model, blocks=(dataclasses.replace(block, attention=attention),))


def run_of(predict: Prediction, model: ModelConfig, **changes: Any) -> RunConfig:
    run = small_run(model, seq_len=T, batch_size=8, loss_chunk=64, **changes)
    return dataclasses.replace(run, task=Pretrain(predict=predict))


def test_a_model_sees_what_is_visible_and_nothing_else(text: Dataset) -> None:
    """The derivative of each column's state by each column's embedding, of one layer, is 0 but where the arrays say
    that it is seen."""
    model, batch = glm_model(n_layers=1), opened(PREDICTIONS["mixed"], text)[0]
    row = {key: jnp.asarray(values[:1]) for key, values in batch.items()}
    parameters, how = initial_parameters(model), Execution(one_device(), FLOAT32)

    @jax.jit
    def influence(parameters: Any, row: Any) -> jax.Array:
        decoder = bind(model, parameters)
        places = jnp.stack([row["context_places"], row["block_places"]], -1)
        tokens = Tokens(row["positions"], row["segment_ids"], row["visible_to"], places)
        x = decoder.embeddings(row["inputs"], tokens, how)
        states = lambda x: decoder(x, tokens, how).hidden[0].sum(-1)
        return jnp.abs(jax.jacrev(states)(x)[:, 0]).sum(-1)

    found = np.asarray(influence(parameters, row)) > 0
    columns, segment, ends = np.arange(T), batch["segment_ids"][0], batch["visible_to"][0]
    np.testing.assert_array_equal(found, (segment[:, None] == segment) & (columns < ends[:, None]))


def test_packed_exercises_have_the_loss_that_they_have_alone(text: Dataset) -> None:
    model = glm_model(n_layers=1)
    rows = opened(PREDICTIONS["mixed"], text)[0]
    loss = jax.jit(loss_function(run_of(PREDICTIONS["mixed"], model), one_device()))
    parameters = initial_parameters(model)
    together = loss(parameters, rows)
    pieces = [(row, piece) for row in range(8) for piece in segments({k: v[row] for k, v in rows.items()})]
    alone = []
    for some in (pieces[first : first + 8] for first in range(0, len(pieces), 8)):
        batch = {key: np.zeros_like(values) for key, values in rows.items()}
        batch["visible_to"] += np.arange(1, T + 1, dtype=np.int32)
        for i, (row, piece) in enumerate(some):
            length = piece.stop - piece.start
            for key, values in rows.items():
                batch[key][i, :length] = values[row, piece] - (piece.start if key == "visible_to" else 0)
            batch["segment_ids"][i, length:] = 99
        alone.append(loss(parameters, batch))
    assert sum(float(one.weight) for one in alone) == float(together.weight)
    assert sum(float(one.objective) for one in alone) == pytest.approx(float(together.objective), rel=1e-5)


SHARDINGS = {
    "ring": ShardingConfig(data=2, seq=4),
    "ulysses": ShardingConfig(data=4, seq=2, context=Context.ULYSSES),
    "stages": ShardingConfig(data=2, stage=2, tensor=2),
    "fsdp": ShardingConfig(data=1, fsdp=4, tensor=2, sequence_parallel=True),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", SHARDINGS)
def test_layouts_equal_one_device(text: Dataset, name: str) -> None:
    model, batch = glm_model(), opened(PREDICTIONS["mixed"], text)[0]

    def gradients(sharding: ShardingConfig) -> Any:
        config = run_of(PREDICTIONS["mixed"], model, micro_batches=2)
        config = dataclasses.replace(config, sharding=sharding)
        layout = make_layout(sharding) if sharding != ShardingConfig() else one_device()
        loss = loss_function(config, layout)
        placed = jax.device_put(batch, layout.sharding(layout.activation("batch", "seq")))
        found = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b).objective / 100))(initial_parameters(model), placed)
        return jax.device_get(found)

    assert_close(gradients(SHARDINGS[name]), gradients(ShardingConfig()), 2e-5)


# ---- rules ----


def broken(predict: Prediction, model: ModelConfig = MODEL, **changes: Any) -> str:
    run = dataclasses.replace(run_of(predict, model), **changes)
    run = dataclasses.replace(run, observe=dataclasses.replace(run.observe, sample_tokens=0)) if not changes else run
    with pytest.raises(UserError) as caught:
        run.validate(1)
    return str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    assert broken(SpanCorruption(mean_span=64.0)) == (
        "task.predict.mean_span = 64 must be at most 7.2, the tokens that density = 0.15 hides of train.seq_len = 48; "
        "use a smaller one, or longer windows"
    )
    assert broken(SpanCorruption(density=0.5, mean_span=1.0, n_sentinels=24)) == (
        "task.predict.n_sentinels = 24 must be at least 25, for the gaps of train.seq_len = 48 and the end; use 25, or "
        "a larger mean_span"
    )
    assert broken(MaskedLm(density=0.01)).startswith(
        "task.predict.density = 0.01 leaves no token to find in train.seq_"
    )
    assert "shares.0.prediction.positions = two tells gaps apart by what model.blocks[].attention.pos" in broken(GLM)
    assert "use GlmRope() there, another of positions, or SpanCorruption, whose gaps have names" in broken(GLM)
    assert "positions = one tells gaps" in broken(BlankInfilling(positions=GapPositions.ONE), glm_model())
    run_of(BlankInfilling(positions=GapPositions.ONE), MODEL).validate(1)
    assert "a model that learns MaskedLm alone cannot write; use 0" in broken(MaskedLm(), run_dir="elsewhere")
    asked = DataConfig(datasets=(Dataset(path="unused", predict=PrefixLm()),))
    assert "data.datasets.0.predict = PrefixLm is for task = Pretrain; with Sft leave it out" in broken(
        CausalLm(), data=asked, task=Sft()
    )
    run_of(GLM, glm_model()).validate(1)
    run_of(SpanCorruption(density=0.5, mean_span=1.0, n_sentinels=25), MODEL).validate(1)


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: SpanCorruption(sentinel="<x>"), "task.predict.sentinel = '<x>' must have one {} for the number"),
        (lambda: SuffixInfilling(least=0.9, most=0.5), "task.predict.least = 0.9 must be at most most = 0.5"),
        (
            lambda: MaskedLm(masked=0.9, swapped=0.2),
            "task.predict.swapped = 0.2 must be at most 0.1, what masked = 0.9",
        ),
        (lambda: ByteTokenizer(special_tokens=("a", "a")), "special_tokens: 'a' is there twice; name each token once"),
        (lambda: TrainSentencePiece(special_tokens=("</s>",)), "special_tokens: '</s>' is there twice"),
    ],
)
def test_values_that_contradict_each_other(make_one: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_one()
    assert message in str(caught.value) and "; " in str(caught.value)


@pytest.mark.nightly
def test_a_run_goes_on_where_it_was_and_is_measured_as_it_was(
    text: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(folder: str, steps: int) -> tuple[list[dict[str, Any]], Any]:
        config = dataclasses.replace(
            run_of(PREDICTIONS["mixed"], glm_model(), steps=steps, eval_every=2),
            data=DataConfig(datasets=(text,)),
            optimizer=AdamW(schedule=ConstantSchedule(warmup_steps=0)),
            checkpoint=CheckpointConfig(every=2),
            observe=ObserveConfig(sample_tokens=0),
            run_dir=str(tmp_path / folder),
        )
        parameters = jax.device_get(maxlm.run(config).run.parameters)
        return [json.loads(line) for line in (tmp_path / folder / "evals.jsonl").open()], parameters

    rows, straight = ended("straight", 4)
    ended("halves", 2)
    again, resumed = ended("halves", 4)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    assert [row["eval_loss"] for row in again] == [row["eval_loss"] for row in rows]
    assert "eval_bits_per_byte" not in rows[-1] and rows[-1]["eval_tokens"] > 0
    capsys.readouterr()
    evaluate.main(["--run", str(tmp_path / "straight"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_byte"] is None and found["tokens"] == rows[-1]["eval_tokens"]
    assert found["loss"] == pytest.approx(rows[-1]["eval_loss"], rel=1e-5)


def test_ul2_has_the_denoisers_of_table_1() -> None:
    found = [share.prediction for share in ul2().shares]
    assert found[0] == PrefixLm(fraction=0.75, mode="[S]")
    spans = {(one.mode, one.density, one.mean_span) for one in found if isinstance(one, SpanCorruption)}
    few, many = {("[R]", 0.15, 3.0), ("[R]", 0.15, 8.0)}, {("[X]", 0.5, 3.0), ("[X]", 0.5, 8.0), ("[X]", 0.15, 64.0)}
    assert len(found) == 7 and spans == few | many | {("[X]", 0.5, 64.0)}
