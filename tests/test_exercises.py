"""What is made of a piece of text, against the examples of the papers, written out by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import (
    BlankInfilling,
    CausalLm,
    FillInMiddle,
    GapPositions,
    MaskedLm,
    MiddleLevel,
    Mixed,
    Prediction,
    PrefixLm,
    Share,
    SpanCorruption,
    SuffixInfilling,
    UserError,
    special_tokens,
    ul2,
)
from maxlm.data.exercises import (
    Exercise,
    blank_spans,
    corrupt,
    infill,
    left_to_right,
    maker,
    noise_mask,
    turn,
    unmask,
)
from maxlm.data.tokenizers import Bytes

NAMES = {"<X>": 100, "<Y>": 101, "<Z>": 102, "[MASK]": 103, "[S]": 104, "[E]": 105, "<PRE>": 106, "<SUF>": 107}
NAMES |= {"<MID>": 108, "[gMASK]": 109}


def ids(words: str) -> np.ndarray:
    """Each word an id: x1 is 1, x2 is 2; names have theirs."""
    return np.array([NAMES.get(word) or int(word[1:]) for word in words.split()], np.int32)


def words(values: Any) -> str:
    names = {i: name for name, i in NAMES.items()}
    return " ".join(names.get(int(i), f"x{int(i)}") for i in values)


def asked(exercise: Exercise) -> str:
    """The targets that count, `.` for others."""
    found = words(exercise.targets).split()
    return " ".join(word if counts else "." for word, counts in zip(found, exercise.counts, strict=True))


def test_a_prefix_is_seen_whole_and_not_learned() -> None:
    made = left_to_right(ids("x1 x2 x3 x4 x5"), 2)
    assert words(made.inputs) == "x1 x2 x3 x4"
    assert asked(made) == ". x3 x4 x5"
    assert made.ends.tolist() == [2, 2, 3, 4]


def test_the_next_token_of_all() -> None:
    made = left_to_right(ids("x1 x2 x3 x4"), 0)
    assert (words(made.inputs), asked(made), made.ends.tolist()) == ("x1 x2 x3", "x2 x3 x4", [1, 2, 3])
    assert (made.context.tolist(), made.block.tolist()) == ([0, 0, 0], [1, 2, 3])  # as GlmRope has it without places


def test_corrupted_spans_are_those_of_figure_2() -> None:
    """arXiv:1910.10683: Thank you <for inviting> me to your party <last> week: x1 ... x9, <.> is x10."""
    hidden = np.zeros(10, np.bool_)
    hidden[[2, 3, 8]] = True
    text = ids("x1 x2 x3 x4 x5 x6 x7 x8 x9 x10")
    given_, wanted = corrupt(text, hidden, ids("<X> <Y> <Z>"))
    assert words(given_) == "x1 x2 <X> x5 x6 x7 x8 <Y> x10"
    assert words(wanted) == "<X> x3 x4 <Y> x9 <Z>"


def test_blanks_are_those_of_figure_2() -> None:
    """arXiv:2103.10360: of x1 ... x6 the spans x3 and x5 x6, the second one first; the paper counts from 1."""
    made = infill(ids("x1 x2 x3 x4 x5 x6"), np.array([[4, 6], [2, 3]]), *ids("[MASK] [S] [E]").tolist())
    assert words(made.inputs) == "x1 x2 [MASK] x4 [MASK] [S] x5 x6 [S] x3"
    assert asked(made) == ". . . . . x5 x6 [E] x3 [E]"
    assert (made.context + 1).tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 3, 3]
    assert made.block.tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]
    assert made.ends.tolist() == [5, 5, 5, 5, 5, 6, 7, 8, 9, 10]


def test_a_suffix_is_one_blank_at_the_end() -> None:
    made = infill(ids("x1 x2 x3 x4"), np.array([[1, 4]]), *ids("[gMASK] [S] [E]").tolist())
    assert (words(made.inputs), asked(made)) == ("x1 [gMASK] [S] x2 x3 x4", ". . x2 x3 x4 [E]")
    assert (made.context.tolist(), made.block.tolist()) == ([0, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4])
    assert made.ends.tolist() == [2, 2, 3, 4, 5, 6]


def test_a_middle_goes_to_the_end() -> None:
    """arXiv:2207.14255, sections 3 and 3.1."""
    cut = ids("x1 x2"), ids("x3"), ids("x4 x5")
    marks = NAMES["<PRE>"], NAMES["<SUF>"], NAMES["<MID>"]
    assert words(np.hstack(turn(*cut, marks, False))) == "<PRE> x1 x2 <SUF> x4 x5 <MID> x3"
    assert words(np.hstack(turn(*cut, marks, True))) == "<PRE> <SUF> x4 x5 <MID> x1 x2 x3"


def test_masked_tokens_are_found_in_their_own_place() -> None:
    """arXiv:1810.04805: my dog is [MASK]."""
    made = unmask(ids("x1 x2 x3 [MASK]"), ids("x1 x2 x3 x4"), np.array([3]))
    assert (words(made.inputs), asked(made), made.ends.tolist()) == ("x1 x2 x3 [MASK]", ". . . x4", [4, 4, 4, 4])


# ---- what is drawn ----


def test_every_segmentation_is_as_likely() -> None:
    """Of 7 tokens 3 are hidden in 2 gaps: 3 ways to cut 4 that stay, 2 ways to cut 3 that do not."""
    draw = np.random.default_rng(0)
    found = Counter(noise_mask(7, 0.43, 1.5, draw).tobytes() for _ in range(3000))
    assert len(found) == 6
    assert all(abs(n - 500) < 5 * (3000 * 1 / 6 * 5 / 6) ** 0.5 for n in found.values())


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 300), st.floats(0.01, 0.99), st.floats(1, 40), st.integers(0, 2**32))
def test_as_much_is_hidden_as_is_said(n: int, density: float, mean_span: float, seed: int) -> None:
    hidden = min(max(round(n * density), 1), n - 1)
    mask = noise_mask(n, density, mean_span, np.random.default_rng(seed))
    assert len(mask) == n and mask.sum() == hidden and not mask[0] and mask[-1]
    starts = np.count_nonzero(mask[1:] & ~mask[:-1])
    assert starts == min(max(round(hidden / mean_span), 1), n - hidden)
    spans = blank_spans(n, density, mean_span, np.random.default_rng(seed))
    inside = np.zeros(n + 1, int)
    for start, stop in spans:
        inside[start : stop + 1] += 1  # with a token between, so that none touch
    assert inside.max() == 1 and inside.sum() - len(spans) == hidden and (spans >= 0).all() and (spans <= n).all()


def test_lengths_are_those_of_poisson_and_places_are_even() -> None:
    draw, lengths, firsts, rising = np.random.default_rng(0), list[int](), list[int](), 0
    for _ in range(1500):
        spans = blank_spans(100, 0.15, 3.0, draw)
        order = spans[np.argsort(spans[:, 0])]
        rising += int(spans[0, 0] == order[0, 0])
        lengths += np.diff(spans).ravel().tolist()
        firsts += spans[:, 0].tolist()
    # Poisson without 0 has the mean 3 / (1 - e^-3) = 3.157; the last of about five is cut short.
    assert 2.7 < np.mean(lengths) < 3.157 and np.bincount(lengths)[1] / len(lengths) < 0.3
    assert abs(np.mean(firsts) - 49) < 1.5
    assert 0.15 < rising / 1500 < 0.3  # of some five, the first one is as often first as any


PREDICTIONS: dict[str, Prediction] = {
    "causal": CausalLm(),
    "prefix": PrefixLm(),
    "prefix of a share": PrefixLm(fraction=0.3, mode="[S]"),
    "spans": SpanCorruption(n_sentinels=40),
    "many spans": SpanCorruption(n_sentinels=90, density=0.5, mode="[R]"),
    "blanks": BlankInfilling(),
    "many blanks": BlankInfilling(density=0.6, mean_span=1.5),
    "suffix": SuffixInfilling(),
    "middle": FillInMiddle(),
    "masked": MaskedLm(),
    "ul2": ul2(n_sentinels=90),
}
TOKENIZER = Bytes(special_tokens(*PREDICTIONS.values()))
IDS, SENTINELS = TOKENIZER.specials, [TOKENIZER.specials[f"<extra_id_{i}>"] for i in range(90)]


def recovered(made: Exercise) -> list[int]:
    """The text, from what is given and what is asked, by the special tokens in it."""
    inputs, targets = made.inputs.tolist(), [t for t, counts in zip(made.targets, made.counts, strict=True) if counts]
    masks = (IDS["[MASK]"], IDS["[gMASK]"])
    if inputs[0] in (IDS["[S]"], IDS["[R]"], IDS["[X]"]):
        inputs = inputs[1:]
    if IDS["<sop>"] in inputs:  # written into the blanks, by the positions that tell which is which
        found = {place: [token] for place, token in enumerate(inputs[: inputs.index(IDS["<sop>"])])}
        for place in {place for place, token in found.items() if token[0] in masks}:
            of_blank = made.targets[(made.block > 0) & (made.context == place)].tolist()
            assert of_blank[-1] == IDS["<eop>"]
            found[place] = of_blank[:-1]
        return [token for place in sorted(found) for token in found[place]]
    if SENTINELS[0] in inputs:
        parts, text = {}, list[int]()
        for token in targets:
            if token in SENTINELS:
                parts[token] = current = list[int]()
            else:
                current.append(token)
        assert not current
        for token in inputs[: len(inputs) - len(targets) + 1]:
            text += parts[token] if token in SENTINELS else [token]
        return text
    whole = [*inputs[: len(inputs) - len(targets) + 1], *targets]
    if IDS["<PRE>"] in whole:
        first, suffix, middle = (whole.index(IDS[name]) for name in ("<PRE>", "<SUF>", "<MID>"))
        *text, end = whole[middle + 1 :]
        assert end == TOKENIZER.eos_id and len(text) == len(whole) - middle - 2
        if suffix == first + 1:  # prefix and middle together
            return [*whole[:first], *text, *whole[suffix + 1 : middle], end]
        return [*whole[:first], *whole[first + 1 : suffix], *text, *whole[suffix + 1 : middle], end]
    return whole


@settings(max_examples=120, deadline=None)
@given(st.sampled_from([name for name in PREDICTIONS if name != "masked"]), st.integers(2, 150), st.integers(0, 2**32))
def test_what_is_given_and_what_is_asked_are_the_text(name: str, n: int, seed: int) -> None:
    text = [256, *np.random.default_rng(seed).integers(0, 256, n - 2).tolist(), 257]
    made = maker(PREDICTIONS[name], TOKENIZER, "predict")(np.array(text, np.int32), np.random.default_rng(seed))
    assert made is not None and made.counts.any()
    assert recovered(made) == text
    length = len(made.inputs)
    assert all(len(array) == length for array in made)
    assert (made.ends > np.arange(length)).all() and (made.ends <= length).all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([name for name in PREDICTIONS if name != "masked"]), st.integers(2, 90), st.integers(0, 2**32))
def test_no_token_is_seen_by_who_is_asked_for_it(name: str, n: int, seed: int) -> None:
    """Every token of the text is there once, so that where it is given is known."""
    text = np.random.default_rng(seed).permutation(256)[:n].astype(np.int32)
    made = maker(PREDICTIONS[name], TOKENIZER, "predict")(text, np.random.default_rng(seed))
    assert made is not None
    place = {int(token): i for i, token in enumerate(made.inputs) if token < 256}
    for target, counts, end in zip(made.targets, made.counts, made.ends, strict=True):
        if counts and target < 256:
            assert place.get(int(target), len(made.inputs)) >= end


def test_masked_tokens_have_the_shares_of_bert() -> None:
    text = np.array([256, *[7] * 998, 257], np.int32)
    find, draw = maker(MaskedLm(), TOKENIZER, "predict"), np.random.default_rng(0)
    kinds = Counter[str]()
    for _ in range(40):
        made = find(text, draw)
        assert made is not None and made.counts.sum() == 150 and not made.counts[[0, -1]].any()
        assert (made.inputs == text)[~made.counts].all() and (made.targets == text).all()
        there = made.inputs[made.counts]
        kinds["masked"] += int((there == IDS["[MASK]"]).sum())
        kinds["same"] += int((there == 7).sum())
    total = 40 * 150
    assert abs(kinds["masked"] / total - 0.8) < 0.03
    assert abs(kinds["same"] / total - 0.1) < 0.03


def test_a_mixture_asks_by_weight() -> None:
    mixed = Mixed(shares=(Share(weight=3, prediction=MaskedLm()), Share(weight=1, prediction=SuffixInfilling())))
    make, draw = maker(mixed, TOKENIZER, "predict"), np.random.default_rng(0)
    found = [make(np.arange(20, dtype=np.int32), draw) for _ in range(800)]
    whole = sum(made is not None and len(made.inputs) == 20 for made in found)
    assert abs(whole / 800 - 0.75) < 0.06


def test_middles_are_as_frequent_as_is_said() -> None:
    make, draw = maker(FillInMiddle(rate=0.7, spm=0.2), TOKENIZER, "predict"), np.random.default_rng(0)
    found = [make(np.array([256, *range(60), 257], np.int32), draw) for _ in range(800)]
    turned = [made.inputs.tolist() for made in found if made is not None and IDS["<MID>"] in made.inputs]
    together = [one for one in turned if one[2] == IDS["<SUF>"]]  # or an empty prefix: 1 in 31
    assert abs(len(turned) / 800 - 0.7) < 0.06
    assert abs(len(together) / len(turned) - (0.2 + 0.8 * 2 / 61)) < 0.06


def test_written_tokens_have_the_place_of_their_gap_where_positions_are_one() -> None:
    """GLM-130B: RoPE has the first of GLM's two positions."""
    text = np.arange(40, dtype=np.int32)
    one, two = (
        maker(BlankInfilling(positions=kind), TOKENIZER, "predict")(text, np.random.default_rng(5))
        for kind in (GapPositions.ONE, GapPositions.TWO)
    )
    assert one is not None and two is not None
    given = int((two.block == 0).sum())
    masks = np.flatnonzero(one.inputs[:given] == IDS["[MASK]"])
    assert len(masks) > 1 and one.positions[:given].tolist() == list(range(given))
    written = one.positions[given:]
    starts = one.inputs[given:] == IDS["<sop>"]
    assert sorted(written[starts].tolist()) == masks.tolist()  # each gap is written once, at its own place
    np.testing.assert_array_equal(written, written[starts][np.cumsum(starts) - 1])  # all of it
    assert two.positions.tolist() == list(range(len(two.inputs)))
    for name in ("inputs", "targets", "counts", "ends"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_a_mixture_has_no_document_turned_whole() -> None:
    with pytest.raises(UserError) as caught:
        Mixed(shares=(Share(prediction=CausalLm()), Share(prediction=FillInMiddle(level=MiddleLevel.DOCUMENT))))
    assert "shares.1.prediction.level = document turns documents before windows" in str(caught.value)


def test_a_lacking_token_is_named_with_what_to_do() -> None:
    with pytest.raises(UserError) as caught:
        maker(ul2(), Bytes(("[S]", "[R]")), "task.predict")
    assert str(caught.value).startswith(
        "task.predict.shares.1.prediction = SpanCorruption(...) needs the special token '<extra_id_0>', which the "
        "data's tokenizer lacks; prepare the data in another folder with special_tokens = ('[R]', '<extra_id_0>', "
    )
