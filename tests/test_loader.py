"""Packing and the loader: against naive loops, and the order whatever the number of hosts."""

import dataclasses
import json
import shutil
import threading
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxlm.config import ByteTokenizer, DataConfig, Dataset, Files, HuggingFaceTokenizer, PrepareConfig, UserError
from maxlm.data.loader import Batches, global_batches, open_batches
from maxlm.data.packing import pack
from maxlm.data.prepare import prepare
from maxlm.data.shards import Split, open_prepared

T = 16


def make(folder: Path, name: str, n_documents: int, seed: int, **changes: object) -> Dataset:
    draw = np.random.default_rng(seed)
    (folder / name).mkdir()
    for i in range(n_documents):
        letters = draw.integers(97, 123, int(draw.integers(1, 60))).astype(np.uint8)
        (folder / name / f"{i:04d}.txt").write_bytes(bytes(letters))
    values: dict[str, object] = {"validation_fraction": 0.2, "shard_tokens": 500, "workers": 1, **changes}
    documents = Files(paths=(str(folder / name),))
    prepare(PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), **values), folder / f"{name}-out")  # type: ignore[arg-type]
    return Dataset(path=str(folder / f"{name}-out"))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    folder = tmp_path_factory.mktemp("data")
    return make(folder, "a", 150, 1), make(folder, "b", 60, 2)


def open_train(*datasets: Dataset, batch_size: int = 8, seed: int = 0) -> Batches:
    config = DataConfig(datasets=datasets, seed=seed)
    return open_batches(config, batch_size=batch_size, seq_len=T, split=Split.TRAIN)


def whole_stream(dataset: Dataset, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of a split, and the number of the document that each belongs to, read with numpy alone."""
    files = sorted(Path(dataset.path).glob(f"{split.value}-*.tokens"))
    tokens = np.concatenate([np.fromfile(file, "<u2") for file in files])
    starts = [np.fromfile(file.with_suffix(".offsets"), "<i8") for file in files]
    before = np.cumsum([0] + [np.fromfile(file, "<u2").size for file in files])
    all_starts = np.concatenate([start + first for start, first in zip(starts, before[:-1], strict=True)])
    return tokens, np.searchsorted(all_starts, np.arange(len(tokens)), side="right")


def naive_window(tokens: np.ndarray, documents: np.ndarray) -> dict[str, list[float]]:
    """Packing as one would say it in words, for one window of T + 1 tokens."""
    out: dict[str, list[float]] = {key: [] for key in ("inputs", "targets", "segment_ids", "positions", "loss_mask")}
    segment, position = 1, 0
    for t in range(len(tokens) - 1):
        if t and documents[t] != documents[t - 1]:
            segment, position = segment + 1, 0
        out["inputs"].append(tokens[t])
        out["targets"].append(tokens[t + 1])
        out["segment_ids"].append(segment)
        out["positions"].append(position)
        out["loss_mask"].append(float(documents[t] == documents[t + 1]))
        position += 1
    return out


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_packing_is_what_a_plain_loop_gives(begins: list[list[bool]]) -> None:
    marks = np.array(begins)
    tokens = np.arange(marks.size, dtype=np.int32).reshape(marks.shape)
    packed = pack(tokens, marks, np.ones(marks.shape, np.bool_))
    for row in range(len(marks)):
        for key, expected in naive_window(tokens[row], np.cumsum(marks[row])).items():
            np.testing.assert_array_equal(packed[key][row], expected, err_msg=key)
    for key, values in packed.items():
        assert values.shape == (len(marks), 5)
        assert values.dtype == (np.float32 if key == "loss_mask" else np.int32)


def test_windows_are_the_stream_over_the_borders_of_shards(datasets: tuple[Dataset, Dataset]) -> None:
    batches = open_batches(DataConfig(datasets=datasets[:1]), batch_size=4, seq_len=T, split=Split.VALIDATION)
    tokens, documents = whole_stream(datasets[0], Split.VALIDATION)
    assert len(open_prepared(Path(datasets[0].path), verify=True).info.validation) > 1
    assert batches.n_batches == (len(tokens) - 1) // T // 4
    assert batches.tokens == len(tokens)
    for step in range(batches.n_batches):
        batch = batches.rows(step, slice(None))
        for row in range(4):
            first = (step * 4 + row) * T
            expected = naive_window(tokens[first : first + T + 1], documents[first : first + T + 1])
            for key, values in expected.items():
                np.testing.assert_array_equal(batch[key][row], values, err_msg=key)
    with pytest.raises(IndexError):
        batches.rows(batches.n_batches, slice(None))


def window_numbers(batches: Batches, tokens: np.ndarray, count: int) -> list[int]:
    """Which windows of the stream the first `count` rows of training are, found by their tokens."""
    by_content = {tokens[i * T : i * T + T + 1].tobytes(): i for i in range((len(tokens) - 1) // T)}
    assert len(by_content) == (len(tokens) - 1) // T  # all windows differ
    found = []
    for step in range(-(-count // batches.batch_size)):
        batch = batches.rows(step, slice(None))
        for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
            found.append(by_content[np.append(inputs, targets[-1]).astype("<u2").tobytes()])
    return found[:count]


def test_every_epoch_has_each_window_once_in_another_order(datasets: tuple[Dataset, Dataset]) -> None:
    tokens, _ = whole_stream(datasets[0], Split.TRAIN)
    n = (len(tokens) - 1) // T
    found = window_numbers(open_train(datasets[0]), tokens, 3 * n)
    epochs = [found[i * n : (i + 1) * n] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other_seed = window_numbers(open_train(datasets[0], seed=1), tokens, n)
    assert other_seed not in epochs


def test_mixtures_draw_by_weight(datasets: tuple[Dataset, Dataset]) -> None:
    heavy, light = (dataclasses.replace(d, weight=w) for d, w in zip(datasets, (3.0, 1.0), strict=True))
    batches = open_train(heavy, light)
    tokens = whole_stream(light, Split.TRAIN)[0]
    windows = {tokens[i * T : i * T + T].tobytes() for i in range((len(tokens) - 1) // T)}
    drawn = Counter(
        row.astype("<u2").tobytes() in windows
        for step in range(250)
        for row in batches.rows(step, slice(None))["inputs"]
    )
    assert abs(drawn[True] / 2000 - 0.25) < 0.005
    ratio = [open_train(d).bytes_per_token for d in (heavy, light)]
    assert batches.bytes_per_token == pytest.approx(0.75 * ratio[0] + 0.25 * ratio[1])


def test_bytes_per_token_counts_predicted_tokens(datasets: tuple[Dataset, Dataset]) -> None:
    batches = open_train(datasets[0])
    tokens, documents = whole_stream(datasets[0], Split.TRAIN)
    predicted = np.count_nonzero(documents[1:] == documents[:-1])
    assert batches.bytes_per_token == pytest.approx(np.count_nonzero(tokens < 256) / predicted)


@settings(max_examples=60, deadline=None)
@given(step=st.integers(0, 10**6), rows=st.lists(st.integers(0, 7), max_size=8))
def test_any_rows_of_any_batch_are_slices_of_the_whole(
    datasets: tuple[Dataset, Dataset], step: int, rows: list[int]
) -> None:
    batches = open_train(*datasets)
    whole, some = batches.rows(step, slice(None)), batches.rows(step, rows)
    for key in whole:
        np.testing.assert_array_equal(some[key], whole[key][rows])


def test_the_fingerprint_knows_what_decides_the_order(datasets: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    a, b = datasets
    base = open_train(a, b).fingerprint
    assert base == open_train(a, b).fingerprint
    others = [
        open_train(a, b, seed=1),
        open_train(a, b, batch_size=4),
        open_train(b, a),
        open_train(a),
        open_train(a, dataclasses.replace(b, weight=2.0)),
        open_batches(DataConfig(datasets=(a, b)), batch_size=8, seq_len=T + 1, split=Split.TRAIN),
        open_batches(DataConfig(datasets=(a, b)), batch_size=8, seq_len=T, split=Split.VALIDATION),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == len(others) + 1
    shutil.copytree(a.path, tmp_path / "moved")
    moved = open_train(Dataset(path=str(tmp_path / "moved")), b)
    assert moved.fingerprint == base
    np.testing.assert_array_equal(moved.rows(7, [3])["inputs"], open_train(a, b).rows(7, [3])["inputs"])


def test_held_out_text_of_less_than_a_batch_is_measured_all(datasets: tuple[Dataset, Dataset]) -> None:
    config = DataConfig(datasets=datasets[:1])
    single = open_batches(config, batch_size=1, seq_len=T, split=Split.VALIDATION)
    padded = open_batches(config, batch_size=5000, seq_len=T, split=Split.VALIDATION)
    assert padded.n_batches == 1
    assert padded.n_windows == single.n_batches
    batch = padded[0]
    for key in batch:
        singles = np.concatenate([single[i][key] for i in range(single.n_batches or 0)])
        np.testing.assert_array_equal(batch[key][: len(singles)], singles, err_msg=key)
    assert not batch["loss_mask"][single.n_batches :].any()
    assert padded.rows(0, [4999])["loss_mask"].sum() == 0


def test_data_that_does_not_fit(datasets: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    a = datasets[0]
    config = DataConfig(datasets=(a,))
    with pytest.raises(UserError, match=r"less than one window of train\.seq_len = 100000"):
        open_batches(config, batch_size=1, seq_len=100_000, split=Split.TRAIN)
    with pytest.raises(UserError, match=r"tokens held out are .* use train.seq_len <= \d+, or set train.eval_batches"):
        open_batches(config, batch_size=1, seq_len=100_000, split=Split.VALIDATION)
    nothing_held_out = make(tmp_path, "c", 50, 3, validation_fraction=0.0)
    with pytest.raises(UserError, match=r"the 0 tokens held out are .* prepare\.validation_fraction > 0, or"):
        open_batches(DataConfig(datasets=(nothing_held_out,)), batch_size=1, seq_len=T, split=Split.VALIDATION)
    both = open_batches(DataConfig(datasets=(a, nothing_held_out)), batch_size=1, seq_len=T, split=Split.VALIDATION)
    assert both.tokens == open_batches(config, batch_size=1, seq_len=T, split=Split.VALIDATION).tokens
    tokenizer = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "u": 1}, "unk_token": "u"}
    tokenizer.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    documents = Files(paths=(str(tmp_path / "c"),))
    other = PrepareConfig(documents=documents, tokenizer=HuggingFaceTokenizer(path=str(tokenizer)), workers=1)
    prepare(other, tmp_path / "other")
    with pytest.raises(UserError, match="prepare both with the same tokenizer"):
        open_train(a, Dataset(path=str(tmp_path / "other")))


class Recorder(Batches):
    """A view of batches that records which rows were asked for."""

    def __init__(self, batches: Batches) -> None:
        self.__dict__.update(batches.__dict__)
        self.asked: list[tuple[int, list[int]]] = []

    def rows(self, step, rows):  # type: ignore[no-untyped-def]
        self.asked.append((step, list(rows)))
        if step == 1 + 10**6:
            raise RuntimeError("disk gone")
        return super().rows(step, rows)


@pytest.mark.parametrize(
    "spec", [("data", None), ("data", "seq"), (None, "seq"), (("data", "seq"), None), (None, None)]
)
def test_global_batches_hold_the_same_tokens_for_any_sharding(datasets: tuple[Dataset, Dataset], spec: tuple) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    batches = open_train(*datasets)
    stream = global_batches(batches, sharding, first_step=5)
    for step in range(5, 9):
        batch, expected = next(stream), batches.rows(step, slice(None))
        for key, values in expected.items():
            assert batch[key].sharding == sharding
            assert batch[key].dtype == values.dtype
            np.testing.assert_array_equal(batch[key], values)
    stream.close()  # type: ignore[attr-defined]


def test_hosts_read_only_their_rows(datasets: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts of four devices each, emulated by the devices that each one says it has."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    index_map = sharding.addressable_devices_indices_map((8, T))
    batches = Recorder(open_train(*datasets))
    whole = batches.rows(2, range(8))["inputs"]
    for host in range(2):
        mine = dict(list(index_map.items())[4 * host : 4 * host + 4])
        read: dict[int, np.ndarray] = {}

        def make_array(shape, sharding, part, dtype, mine=mine, read=read):  # type: ignore[no-untyped-def]
            if dtype == np.int32 and not read:
                read.update({index[0].start: part(index) for index in mine.values()})
            return None

        monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda *_, mine=mine: mine)
        monkeypatch.setattr(jax, "make_array_from_callback", make_array)
        stream = global_batches(batches, sharding, first_step=2)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert sorted(read) == list(range(4 * host, 4 * host + 4))
        for row, values in read.items():
            np.testing.assert_array_equal(values, whole[row : row + 1])
        assert all(rows == list(range(4 * host, 4 * host + 4)) for step, rows in batches.asked[1:])
        batches.asked[1:] = []


def test_the_thread_ends_and_its_errors_arrive(datasets: tuple[Dataset, Dataset]) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batches = Recorder(open_train(datasets[0]))
    stream = global_batches(batches, sharding, first_step=10**6)
    next(stream)
    with pytest.raises(RuntimeError, match="disk gone"):
        next(stream)
    stream = global_batches(batches, sharding, first_step=0)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
    held_out = open_batches(DataConfig(datasets=datasets[:1]), batch_size=8, seq_len=T, split=Split.VALIDATION)
    assert len(list(global_batches(held_out, sharding, 0))) == held_out.n_batches
