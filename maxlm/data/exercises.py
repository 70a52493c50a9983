"""A piece of a document as one exercise: what a model is given of it, what it is to find, and how far each token sees.

Everything here is a function of ids and of random numbers: it knows neither windows nor files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, assert_never

import numpy as np
import numpy.typing as npt

from maxlm.config import (
    BlankInfilling,
    CausalLm,
    FillInMiddle,
    GapPositions,
    MaskedLm,
    Mixed,
    Prediction,
    PrefixLm,
    SinglePrediction,
    SpanCorruption,
    SuffixInfilling,
    UserError,
)
from maxlm.config.prediction_rules import gaps
from maxlm.config.predictions import parts, special_tokens
from maxlm.data.tokenizers import Tokenizer

P = TypeVar("P")
M = TypeVar("M")
TokenIds = npt.NDArray[np.int32]
Spans = npt.NDArray[np.int64]
"""[spans, 2]: where each starts and stops."""


class Exercise(NamedTuple):
    """One exercise of n columns, int32 [n] each but `counts`."""

    inputs: TokenIds
    targets: TokenIds
    counts: npt.NDArray[np.bool_]
    """Which targets the loss counts."""
    ends: TokenIds
    """Where the columns of this exercise end that each one sees."""
    positions: TokenIds
    """As `Tokens.positions`."""
    context: TokenIds
    """Position in the context, and place in the block that is written, as of `GlmRope`."""
    block: TokenIds


MakeExercise = Callable[[TokenIds, np.random.Generator], Exercise | None]
"""The exercise of a piece of a document; None: the piece is too short for one."""


def maker(prediction: Prediction, tokenizer: Tokenizer, key: str) -> MakeExercise:
    """
    Args:
        prediction: what is asked.
        tokenizer: of the ids.
        key: of the prediction, for messages.

    Raises:
        UserError: the tokenizer lacks a special token.
    """
    if isinstance(prediction, Mixed):
        bounds = np.cumsum([share.weight for share in prediction.shares])
        made = [_single(one, tokenizer, where) for where, one in parts(prediction, key)]

        def one_of_them(ids: TokenIds, draw: np.random.Generator) -> Exercise | None:
            return made[int(np.searchsorted(bounds, draw.random() * bounds[-1], side="right"))](ids, draw)

        return one_of_them
    return _single(prediction, tokenizer, key)


TurnText = Callable[[int, int, int, np.random.Generator], list[range | int]]
"""Of the number of tokens of a text, and its first and last one, the order in which its tokens stand, and special
tokens among them."""

MakeAnswer = Callable[[TokenIds, npt.NDArray[np.bool_]], Exercise]
"""The exercise of a text of a record, and of which of its tokens count: one must, and the first must not."""


def answer_maker(prediction: Prediction, tokenizer: Tokenizer, key: str) -> tuple[int, MakeAnswer]:
    """Of texts of records, in which the first token that counts begins the answer.

    Returns:
        How many columns an exercise has more than its text, at most; and what makes it.

    Raises:
        UserError: the prediction knows no answers; or the tokenizer lacks a special token.
    """
    find = functools.partial(_id, tokenizer, prediction, key)
    match prediction:
        case PrefixLm(mode=mode):
            before = [] if mode is None else [find(mode)]

            def continued(ids: TokenIds, counts: npt.NDArray[np.bool_]) -> Exercise:
                known = np.concatenate([np.zeros(len(before), np.bool_), counts])
                return left_to_right(_joined(before, ids), len(before) + int(counts.argmax()), known)

            return len(before), continued
        case SuffixInfilling(mask=mask, start=start, end=end):
            marks = find(mask), find(start), find(end)
            hidden = lambda ids, counts: _last(len(ids) - int(counts.argmax()), ids)
            return 2, lambda ids, counts: infill(ids, hidden(ids, counts), *marks, counts=counts)
        case _:
            raise UserError(
                f"{key} = {type(prediction).__name__} is of running text, and the data set is of records; give it a "
                "predict of its own, which is CausalLm(), PrefixLm() or SuffixInfilling()"
            )


def _single(prediction: SinglePrediction, tokenizer: Tokenizer, key: str) -> MakeExercise:
    find = functools.partial(_id, tokenizer, prediction, key)
    match prediction:
        case CausalLm():
            return lambda ids, draw: left_to_right(ids, 0) if len(ids) > 1 else None
        case PrefixLm(fraction=fraction, mode=mode):
            before = [] if mode is None else [find(mode)]

            def prefix(ids: TokenIds, draw: np.random.Generator) -> Exercise | None:
                if len(ids) < 2:
                    return None
                given = int(draw.integers(1, len(ids))) if fraction is None else round(fraction * len(ids))
                return left_to_right(_joined(before, ids), len(before) + min(max(given, 1), len(ids) - 1))

            return prefix
        case SpanCorruption(density=density, mean_span=mean_span, mode=mode):
            before = [] if mode is None else [find(mode)]
            names = [prediction.sentinel.replace("{}", str(i)) for i in range(prediction.n_sentinels)]
            sentinels = np.array([find(name) for name in names], np.int32)

            def spans(ids: TokenIds, draw: np.random.Generator) -> Exercise | None:
                if len(ids) < 2:
                    return None
                given, wanted = corrupt(ids, noise_mask(len(ids), density, mean_span, draw), sentinels)
                return left_to_right(_joined(before, given, wanted), len(before) + len(given))

            return spans
        case BlankInfilling(density=density, mean_span=mean_span, mask=mask, start=start, end=end):
            marks, in_one = (find(mask), find(start), find(end)), prediction.positions is GapPositions.ONE

            def blanks(ids: TokenIds, draw: np.random.Generator) -> Exercise | None:
                if len(ids) < 2:
                    return None
                made = infill(ids, blank_spans(len(ids), density, mean_span, draw), *marks)
                return made._replace(positions=made.context) if in_one else made

            return blanks
        case SuffixInfilling(least=least, most=most, mask=mask, start=start, end=end):
            marks = find(mask), find(start), find(end)

            def suffix(ids: TokenIds, draw: np.random.Generator) -> Exercise | None:
                share = least + (most - least) * draw.random()
                hidden = min(max(round(share * len(ids)), 1), len(ids))
                return infill(ids, _last(hidden, ids), *marks) if len(ids) > 1 else None

            return suffix
        case FillInMiddle():
            pieces_of = turner(prediction, tokenizer, key)

            def middle(ids: TokenIds, draw: np.random.Generator) -> Exercise | None:
                if len(ids) < 2:
                    return None
                pieces = pieces_of(len(ids), int(ids[0]), int(ids[-1]), draw)
                if len(pieces) > 1 and ids[-1] != tokenizer.eos_id:  # a window's end ends the middle, too
                    pieces.append(tokenizer.eos_id)
                parts = [ids[piece.start : piece.stop] if isinstance(piece, range) else [piece] for piece in pieces]
                return left_to_right(_joined(*parts), 0)

            return middle
        case MaskedLm(density=density, masked=masked, swapped=swapped, mask=mask):
            blank, ends = find(mask), [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]

            def some(ids: TokenIds, draw: np.random.Generator) -> Exercise | None:
                usable = np.flatnonzero(~np.isin(ids, ends))
                if not len(usable):
                    return None
                chosen = draw.permutation(usable)[: max(1, round(density * len(usable)))]
                fate = draw.random(len(chosen))
                other = draw.integers(0, tokenizer.vocab_size, len(chosen))
                given = ids.copy()
                given[chosen] = np.where(fate < masked, blank, np.where(fate < masked + swapped, other, ids[chosen]))
                return unmask(given, ids, chosen)

            return some
        case _:
            assert_never(prediction)


def turner(prediction: FillInMiddle, tokenizer: Tokenizer, key: str) -> TurnText:
    """What turns texts so that the middle stands at the end, as often as the prediction says.

    Raises:
        UserError: the tokenizer lacks a special token.
    """
    names = prediction.prefix, prediction.suffix, prediction.middle
    before_prefix, before_suffix, before_middle = (_id(tokenizer, prediction, key, name) for name in names)

    def turned(n: int, head: int, tail: int, draw: np.random.Generator) -> list[range | int]:
        turned, suffix_first = draw.random() < prediction.rate, draw.random() < prediction.spm
        if not turned:
            return [range(n)]
        first = int(head == tokenizer.bos_id)
        last = n - int(n > first and tail == tokenizer.eos_id)
        one, two = np.sort(draw.integers(first, last + 1, 2)).tolist()
        marks = before_prefix, before_suffix, before_middle
        inner = turn(range(first, one), range(one, two), range(two, last), marks, suffix_first)
        return [range(first), *inner, range(last, n)]

    return turned


def left_to_right(ids: TokenIds, prefix: int, counts: npt.NDArray[np.bool_] | None = None) -> Exercise:
    """Each token from those before it, where the first `prefix` tokens see each other and are not learned.

    Args:
        ids: n + 1 tokens.
        prefix: how many are given, at most n.
        counts: which tokens the loss counts; None: all but the prefix and the first.
    """
    n = len(ids) - 1
    columns = np.arange(n, dtype=np.int32)
    given = columns < prefix
    return Exercise(
        inputs=ids[:-1],
        targets=ids[1:],
        counts=columns >= prefix - 1 if counts is None else counts[1:],
        ends=np.where(given, np.int32(prefix), columns + 1),
        positions=columns,
        context=np.where(given, columns, np.int32(prefix)),
        block=np.where(given, 0, columns - np.int32(prefix - 1)),
    )


def noise_mask(n: int, density: float, mean_span: float, draw: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which of n >= 2 tokens are hidden: as many gaps as runs that stay, one after the other, beginning with one that
    stays; every way of cutting each kind into so many is as likely (arXiv:1910.10683, section 3.1.4)."""
    hidden, spans = gaps(n, density, mean_span)

    def cut(total: int) -> npt.NDArray[np.int64]:
        inner = np.sort(draw.permutation(total - 1)[: spans - 1]) + 1
        return np.diff(inner, prepend=0, append=total)

    lengths = np.stack([cut(n - hidden), cut(hidden)], axis=1).reshape(-1)
    return np.repeat(np.tile([False, True], spans), lengths)


def corrupt(ids: TokenIds, hidden: npt.NDArray[np.bool_], sentinels: TokenIds) -> tuple[TokenIds, TokenIds]:
    """What is given and what is wanted (arXiv:1910.10683, figure 2): the text, a sentinel in place of each gap; and of
    each gap its sentinel and what was in it, and one more sentinel."""
    first = hidden & ~np.append(False, hidden[:-1])
    marks = sentinels[: np.count_nonzero(first) + 1]
    given = ids.copy()
    given[first] = marks[:-1]
    wanted = np.insert(ids[hidden], np.flatnonzero(first[hidden]), marks[:-1])
    return given[first | ~hidden], np.append(wanted, marks[-1])


def blank_spans(n: int, density: float, mean_span: float, draw: np.random.Generator) -> Spans:
    """Gaps among n >= 2 tokens, in random order: lengths of a Poisson distribution until so many tokens are hidden, of
    which the last is cut; no two touch (arXiv:2103.10360, section 2.1)."""
    hidden = gaps(n, density, mean_span)[0]
    drawn = draw.poisson(mean_span, 2 * hidden + 8)
    ends = np.minimum(np.cumsum(np.append(drawn[drawn > 0], hidden)), hidden)
    lengths = np.diff(ends[: np.searchsorted(ends, hidden) + 1], prepend=0)
    seen = n - hidden
    if len(lengths) > seen + 1:  # no room between so many
        lengths = np.append(lengths[:seen], lengths[seen:].sum())
    # A gap stands before one of the tokens that stay, or behind all, and no two before the same.
    before = np.sort(draw.permutation(seen + 1)[: len(lengths)])
    stops = before + np.cumsum(lengths)
    return draw.permutation(np.stack([stops - lengths, stops], axis=1))


def infill(
    ids: TokenIds, spans: Spans, mask: int, start: int, end: int, counts: npt.NDArray[np.bool_] | None = None
) -> Exercise:
    """The text with a mask in place of each span, which sees itself whole, and behind it what was in them, one after
    the other in the order given, each between start and end (arXiv:2103.10360, figure 2; positions count from 0).

    Args:
        ids: the text.
        spans: those that are hidden; no two touch.
        mask, start, end: the special tokens.
        counts: which tokens of the text the loss counts, where they are hidden; None: all.
    """
    n, (firsts, stops) = len(ids), spans.T
    edges = np.zeros(n + 1, np.int64)
    edges[firsts], edges[stops] = 1, -1
    kept = ~np.cumsum(edges[:-1]).astype(np.bool_)
    kept[firsts] = True
    given = ids.copy()
    given[firsts] = mask
    given, place_of = given[kept], np.cumsum(kept) - 1
    sizes = stops - firsts + 1
    block = 1 + np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    last = block == np.repeat(sizes, sizes)
    before = np.repeat(firsts, sizes) + block - 2  # in the text, of the token before the one that is to be found
    found = np.minimum(before + 1, n - 1)
    nothing, length = np.zeros(len(given), np.int32), len(given)
    known = True if counts is None else counts[found]
    return Exercise(
        inputs=_joined(given, np.where(block == 1, start, ids[before])),
        targets=_joined(nothing, np.where(last, end, ids[found])),
        counts=np.concatenate([nothing.astype(np.bool_), last | known]),
        ends=np.maximum(np.arange(1, length + len(block) + 1, dtype=np.int32), length),
        positions=np.arange(length + len(block), dtype=np.int32),
        context=_joined(np.arange(length), np.repeat(place_of[firsts], sizes)),
        block=_joined(nothing, block),
    )


def turn(prefix: P, middle: P, suffix: P, marks: tuple[M, M, M], suffix_first: bool) -> list[P | M]:
    """The middle at the end (arXiv:2207.14255, section 3), by the special tokens of prefix, suffix and middle."""
    of_prefix, of_suffix, of_middle = marks
    if suffix_first:
        return [of_prefix, of_suffix, suffix, of_middle, prefix, middle]
    return [of_prefix, prefix, of_suffix, suffix, of_middle, middle]


def unmask(given: TokenIds, ids: TokenIds, chosen: npt.NDArray[np.int64]) -> Exercise:
    """Tokens in their own place, where every token sees all."""
    n = len(ids)
    counts, columns = np.zeros(n, np.bool_), np.arange(n, dtype=np.int32)
    counts[chosen] = True
    return Exercise(given, ids, counts, np.full(n, n, np.int32), columns, columns, np.zeros(n, np.int32))


def _id(tokenizer: Tokenizer, prediction: Prediction, key: str, name: str) -> int:
    found = tokenizer.specials.get(name)
    if found is None:
        needed = special_tokens(prediction)
        words = ", ".join(map(repr, needed[:4])) + ("," if len(needed) == 1 else ", ..." if len(needed) > 4 else "")
        raise UserError(
            f"{key} = {type(prediction).__name__}(...) needs the special token {name!r}, which the data's tokenizer "
            f"lacks; prepare the data in another folder with special_tokens = ({words}) of its tokenizer, as "
            "maxlm.config.special_tokens(prediction) gives them, or name tokens that it has"
        )
    return found


def _last(n: int, ids: TokenIds) -> Spans:
    """The span of the last n."""
    return np.array([[len(ids) - n, len(ids)]])


def _joined(*pieces: Any) -> TokenIds:
    return np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
