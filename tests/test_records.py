"""Records of conversations in prepared folders, packed whole into windows."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import ByteTokenizer, Conversations, DataConfig, Dataset, Files, PrepareConfig, Purpose, UserError
from maxlm.data.chat import find_chat_template
from maxlm.data.conversations import encode
from maxlm.data.loader import Batches, open_batches
from maxlm.data.prepare import prepare
from maxlm.data.record_windows import NO_TEXT, _packed
from maxlm.data.shards import CHAT, Split
from maxlm.data.text_ends import published_ends
from maxlm.data.tokenizers import Bytes

T = 160


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    word = lambda most: "".join(chr(c) for c in draw.integers(97, 123, int(draw.integers(1, most))))
    return [{"prompt": word(20), "chosen": word(15) + "A", "rejected": word(15) + "B"} for _ in range(count)]


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def prepared(folder: Path, file: Path, purpose: Purpose, **changes: Any) -> Dataset:
    values: dict[str, Any] = {"validation_fraction": 0.2, "shard_tokens": 400, "workers": 1} | changes
    documents = Conversations(paths=(str(file),), purpose=purpose)
    prepare(PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), **values), folder)
    return Dataset(path=str(folder))


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return pairs(60)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]) -> Dataset:
    folder = tmp_path_factory.mktemp("records")
    return prepared(folder / "out", write(folder / "in", records), Purpose.PREFERENCE)


def opened(dataset: Dataset, split: Split = Split.TRAIN, seq_len: int = T, virtual: int = 0) -> Batches:
    data, purpose = DataConfig(datasets=(dataset,)), Purpose.PREFERENCE
    return open_batches(data, batch_size=4, seq_len=seq_len, split=split, purpose=purpose, virtual=virtual)


def test_more_answers_than_fit_are_refused_at_once(tmp_path: Path) -> None:
    """Not by the batch that comes to them."""
    ranking = {"prompt": "a", "completions": [f"{n}" for n in range(20)], "ranks": list(range(20))}
    dataset = prepared(tmp_path / "out", write(tmp_path / "in", [ranking, *pairs(3)]), Purpose.PREFERENCE,
                       validation_fraction=0.0)  # fmt: skip
    least = 20 * 3  # of each text bos, an id of the prompt and one of the answer
    with pytest.raises(UserError, match=f"train.seq_len = {least - 1} is too short for the 20 texts of a record; use"):
        opened(dataset, seq_len=least - 1)
    batches = opened(dataset, seq_len=least)
    assert max((batches[n]["text_number"] >= 0).sum(1).max() for n in range(2)) == 20


def texts_in(batch: dict[str, np.ndarray], row: int) -> list[tuple[list[int], list[float], float, int, int]]:
    """Each text of a row by its segment: inputs, mask, value, record, number."""
    found = []
    for s, record in enumerate(batch["text_record"][row]):
        if record == NO_TEXT:
            assert batch["text_number"][row, s] == NO_TEXT
            continue
        at = np.flatnonzero(batch["segment_ids"][row] == s + 1)
        assert (np.diff(at) == 1).all()
        ends = batch["text_ends"][row, at]
        assert ends[-1] == 1 and ends.sum() == 1
        assert batch["positions"][row, at].tolist() == list(range(len(at)))
        whole = batch["inputs"][row, at].tolist()
        assert batch["targets"][row, at[:-1]].tolist() == whole[1:]
        mask, value = batch["loss_mask"][row, at].tolist(), float(batch["text_value"][row, s])
        found.append((whole, mask, value, int(record), int(batch["text_number"][row, s])))
    return found


def test_records_are_as_whole_with_virtual_tokens_before_each_text(preferences: Dataset) -> None:
    """Which no loss counts, nor the token behind them; and all else is as without."""

    def every(virtual: int) -> dict[int, tuple[list[int], list[float], float]]:
        batches, found = opened(preferences, virtual=virtual), {}
        rows = len(batches._windows[0])
        for number in range(rows):  # of an epoch, whatever the order
            batch = batches.rows(number // 4, [number % 4])
            for whole, mask, value, _, text in texts_in(batch, 0):
                found[text] = whole, mask, value
        return found

    plain, shifted = every(0), every(5)
    assert plain.keys() == shifted.keys() and len(plain) == len(shifted)
    for text, (whole, mask, value) in plain.items():
        assert shifted[text] == ([0] * 5 + whole, [0.0] * 5 + mask, value)


def test_every_epoch_has_each_record_once_and_whole(preferences: Dataset, records: list[dict[str, Any]]) -> None:
    """Against the records themselves, encoded one by one."""
    template = find_chat_template(Path(preferences.path) / CHAT)
    want = Counter[Any]()
    for record in records:
        texts = encode(record, template, Bytes(), purpose=Purpose.PREFERENCE)
        want[tuple((tuple(t.ids), tuple(map(float, [*t.counts[1:], False])), t.value) for t in texts)] += 1
    found, numbers = Counter[Any](), []
    for split in Split:
        batches = opened(preferences, split)
        rows = len(batches._windows[0])
        seen = 0
        steps = -(-rows // 4) if split is Split.TRAIN else batches.n_batches or 0
        for batch in map(batches.__getitem__, range(steps)):
            for row in range(min(4, rows - seen)):
                by_record: dict[int, list[Any]] = {}
                for whole, mask, value, record, number in texts_in(batch, row):
                    by_record.setdefault(record, []).append((tuple(whole), tuple(mask), value))
                    numbers.append((split, number))
                found.update(tuple(texts) for texts in by_record.values())
                assert batch["loss_mask"][row].sum() == sum(sum(t[1]) for r in by_record.values() for t in r)
            seen += 4
    # Validation leaves out the windows that fill no batch.
    assert not found - want
    held_out = opened(preferences, Split.VALIDATION)
    left_out = held_out._windows[0]._windows[4 * (held_out.n_batches or 0) :]
    assert (want - found).total() == sum(map(len, left_out))
    assert max(Counter(numbers).values()) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_windows_hold_all_records_and_no_more_than_fits(lengths: list[int]) -> None:
    windows = _packed(np.array(lengths), 50)
    assert sorted(record for window in windows for record in window) == list(range(len(lengths)))
    rooms = [sum(lengths[record] for record in window) for window in windows]
    assert max(rooms) <= 50
    # Best fit decreasing needs at most 11/9 OPT + 4 (Johnson 1974; Garey et al.), and OPT is at least this.
    assert len(windows) <= 11 / 9 * max(-(-sum(lengths) // 50), sum(n > 25 for n in lengths)) + 4


def test_the_folder_is_the_same_however_it_is_made(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    file = write(tmp_path / "in", records)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, workers in zip(folders, (1, 2), strict=True):
        prepared(folder, file, Purpose.PREFERENCE, workers=workers)
    names = sorted(path.name for path in folders[0].iterdir() if path.is_file())
    assert {Path(name).suffix for name in names} == {".json", ".tokens", ".offsets", ".counts", ".texts"}
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_a_flipped_mask_is_noticed(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    dataset = prepared(tmp_path / "out", write(tmp_path / "in", records), Purpose.PREFERENCE)
    file = tmp_path / "out" / "train-00000.counts"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000\.counts: has changed"):
        opened(dataset)


def test_a_record_longer_than_a_window_keeps_its_answers(preferences: Dataset) -> None:
    batches = opened(preferences, seq_len=100)
    assert batches.shortened > 0
    for step in range(5):
        batch = batches[step]
        for row in range(4):
            texts = texts_in(batch, row)
            assert sum(len(whole) for whole, *_ in texts) <= 100
            assert all(sum(mask) > 0 for _, mask, *_ in texts)
            assert {len([t for t in texts if t[3] == record]) for _, _, _, record, _ in texts} == {2}


def test_bad_records_are_told_by_their_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    bad = {"messages": [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}]}
    file = write(tmp_path / "in", [*good, bad])
    prepared(tmp_path / "out", file, Purpose.SFT)
    assert f"{file}:10: " in capsys.readouterr().err.replace("\n", "")
    with pytest.raises(UserError, match=r"records\.jsonl:10: "):
        prepared(tmp_path / "strict", file, Purpose.SFT, strict=True)
    only_bad = write(tmp_path / "bad", [bad])
    with pytest.raises(UserError, match=r"none of 1 records can be learned from; first .*:1: "):
        prepared(tmp_path / "nothing", only_bad, Purpose.SFT)


def test_a_folder_is_read_for_what_it_was_made_for(tmp_path: Path, preferences: Dataset) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some words " * 50)
    prepare(
        PrepareConfig(documents=Files(paths=(str(tmp_path / "text"),)), tokenizer=ByteTokenizer()), tmp_path / "out"
    )
    ask: dict[str, Any] = {"batch_size": 4, "seq_len": T, "split": Split.TRAIN}
    with pytest.raises(UserError, match=r"prepared as running text, the task reads records with purpose = preference"):
        open_batches(DataConfig(datasets=(Dataset(path=str(tmp_path / "out")),)), purpose=Purpose.PREFERENCE, **ask)
    with pytest.raises(UserError, match=r"purpose = preference, the task reads records with purpose = kto"):
        open_batches(DataConfig(datasets=(preferences,)), purpose=Purpose.KTO, **ask)
    mixed = DataConfig(datasets=(preferences, Dataset(path=str(tmp_path / "out"), weight=0.5)))
    batch = open_batches(mixed, **ask)[0]
    share = batch["loss_mask"].mean(1)
    assert (share > 0.9).any() and (share < 0.9).any()  # text counts whole, of conversations the answers


def test_the_template_says_where_answers_end(preferences: Dataset) -> None:
    ends = published_ends(Path(preferences.path) / CHAT, Bytes())
    assert ends.last == (Bytes.eos_id,)
    said = encode({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
                  find_chat_template(Path(preferences.path) / CHAT), Bytes())  # fmt: skip
    assert [i for i, counts in zip(said[0].ids, said[0].counts, strict=True) if counts][-1] in ends.last


def test_equal_seeds_and_data_give_equal_batches(preferences: Dataset) -> None:
    first, again = opened(preferences), opened(preferences)
    assert first.fingerprint == again.fingerprint
    for key, values in first[3].items():
        np.testing.assert_array_equal(values, again[3][key])
    other = dataclasses.replace(preferences)
    assert opened(other, seq_len=T - 1).fingerprint != first.fingerprint
