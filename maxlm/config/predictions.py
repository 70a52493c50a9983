"""What running text is turned into before the loss: which tokens are given, which are to be found, and who sees whom.

`CausalLm` is the next token. The others give a part of a text and ask for the rest; docs/objectives.md shows what each
makes of the same ten tokens.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import Annotated, assert_never

from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, Filled, Fraction, NotEmpty, Positive, Range, config, shown

InnerShare = Annotated[float, Range(gt=0, lt=1)]
"""A share that leaves something on both sides."""


@config("task.predict.", changes=Changes.IDENTITY)
class CausalLm:
    """Each token from those before it."""


@config("task.predict.", changes=Changes.IDENTITY)
class PrefixLm:
    """The rest of a text from its first part, which sees itself whole and is not learned (arXiv:1910.10683, section
    3.2.1). Of a record the first part is all before the first token that counts."""

    fraction: InnerShare | None = None
    """Of a text, what its first part is; None: drawn anew for each text, every length as likely."""
    mode: NotEmpty[str] | None = None
    """Special token that stands before the text and tells what is asked (UL2: [S]); None: none."""


@config("task.predict.", changes=Changes.IDENTITY)
class SpanCorruption:
    """What was in the gaps of a text: each gap is one sentinel, and after the text, which sees itself whole, each
    sentinel is followed by what it stands for, and a last one ends it (T5, arXiv:1910.10683, section 3.1.4; here for a
    decoder, in one sequence)."""

    density: InnerShare = 0.15
    """Of the tokens, how many are hidden."""
    mean_span: Annotated[float, Range(ge=1)] = 3.0
    """Mean length of a gap, in tokens."""
    sentinel: NotEmpty[str] = "<extra_id_{}>"
    """Special token of a gap, {} being its number, from 0."""
    n_sentinels: Annotated[int, Range(ge=2)] = 100
    """Sentinels that the tokenizer has."""
    mode: NotEmpty[str] | None = None
    """Special token that stands before the text and tells what is asked (UL2: [R], [X]); None: none."""

    def __post_init__(self) -> None:
        if self.sentinel.count("{}") != 1:
            raise UserError(
                f"task.predict.sentinel = {shown(self.sentinel)} must have one {{}} for the number; use for example "
                "'<extra_id_{}>'"
            )


class GapPositions(enum.Enum):
    """What tells a token that is written into a gap where it stands."""

    TWO = "two"
    """The gap's place in the text, and the token's own in the gap (GLM, arXiv:2103.10360, section 2.2): `GlmRope`."""
    ONE = "one"
    """The first of these alone, the same for all tokens of a gap, of which each sees those before it (GLM-130B,
    arXiv:2210.02414, section 2.2): `Rope`."""


@config("task.predict.", changes=Changes.IDENTITY)
class BlankInfilling:
    """What was in the gaps of a text, gap by gap in random order: each gap is the same special token, and the token
    that is written knows by its positions in which gap it is (GLM, arXiv:2103.10360, sections 2.1 and 2.3)."""

    density: InnerShare = 0.15
    """Of the tokens, how many are hidden."""
    mean_span: Annotated[float, Range(ge=1)] = 3.0
    """Mean of the Poisson distribution of a gap's length, of which 0 is drawn again."""
    mask: NotEmpty[str] = "[MASK]"
    """Special token of a gap."""
    start: NotEmpty[str] = "<sop>"
    """Special token that what is written into a gap begins with."""
    end: NotEmpty[str] = "<eop>"
    """Special token that what is written into a gap ends with."""
    positions: GapPositions = GapPositions.TWO
    """What tells a token where it stands."""


@config("task.predict.", changes=Changes.IDENTITY)
class SuffixInfilling:
    """The end of a text, of random length, as the one gap in it, from the beginning, which sees itself whole (GLM,
    arXiv:2103.10360, section 2.1.1, "document-level"; GLM-130B, arXiv:2210.02414, section 2.1). Of a record the gap is
    all from the first token that counts."""

    least: Fraction = 0.5
    """Of a text, how long its end is at least."""
    most: Fraction = 1.0
    """Of a text, how long its end is at most; all lengths between are as likely."""
    mask: NotEmpty[str] = "[gMASK]"
    """Special token of the gap."""
    start: NotEmpty[str] = "<sop>"
    """Special token that what is written begins with."""
    end: NotEmpty[str] = "<eop>"
    """Special token that what is written ends with."""

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise UserError(
                f"task.predict.least = {self.least} must be at most most = {self.most}; use for example {self.most / 2}"
            )


class MiddleLevel(enum.Enum):
    """What has a middle (arXiv:2207.14255, section 3)."""

    CONTEXT = "context"
    """What of a document is in a window: prefix, suffix and middle always stand together there."""
    DOCUMENT = "document"
    """The whole document, before it is cut into windows: of one longer than a window each has a part of what it has
    become, with or without prefix and suffix."""


@config("task.predict.", changes=Changes.IDENTITY)
class FillInMiddle:
    """The next token, but that of some texts the middle stands at the end (arXiv:2207.14255). A text is cut into three
    at two random places between tokens (the paper's are between characters). The token that ends a document ends the
    middle too."""

    rate: Fraction = 0.5
    """Of the texts, how many are turned so; the others stay as they are."""
    spm: Fraction = 0.5
    """Of those, how many have the suffix before the prefix ("SPM", section 3.1: prefix and middle then stand
    together); the others have prefix, suffix, middle ("PSM")."""
    prefix: NotEmpty[str] = "<PRE>"
    """Special token before the prefix."""
    suffix: NotEmpty[str] = "<SUF>"
    """Special token before the suffix."""
    middle: NotEmpty[str] = "<MID>"
    """Special token before the middle."""
    level: MiddleLevel = MiddleLevel.CONTEXT
    """What is a text."""


@config("task.predict.", changes=Changes.IDENTITY)
class MaskedLm:
    """Some tokens from all others: of those chosen, most are masked, some are another token, some stay (BERT,
    arXiv:1810.04805, section 3.1, task 1). A model of it does not write."""

    density: InnerShare = 0.15
    """Of the tokens, how many are to be found."""
    masked: Fraction = 0.8
    """Of these, how many become `mask`."""
    swapped: Fraction = 0.1
    """Of these, how many become any token of the vocabulary; the rest stay."""
    mask: NotEmpty[str] = "[MASK]"
    """Special token of what is masked."""

    def __post_init__(self) -> None:
        if self.masked + self.swapped > 1:
            raise UserError(
                f"task.predict.swapped = {self.swapped} must be at most {1 - self.masked:.4g}, what masked = "
                f"{self.masked} leaves; use for example {(1 - self.masked) / 2:.4g}"
            )


SinglePrediction = CausalLm | PrefixLm | SpanCorruption | BlankInfilling | SuffixInfilling | FillInMiddle | MaskedLm
"""One thing that is asked of a text."""


@config("task.predict.shares[].", changes=Changes.IDENTITY)
class Share:
    """One prediction of a mixture."""

    weight: Positive[float] = 1.0
    """How many texts it is asked of, relative to the others."""
    prediction: SinglePrediction
    """What is asked."""


@config("task.predict.", changes=Changes.IDENTITY)
class Mixed:
    """Of each text one of several things, drawn by weight."""

    shares: Annotated[tuple[Share, ...], Filled(note="give at least one Share(prediction=...)")]
    """Which, and how often; more are added in the config file."""

    def __post_init__(self) -> None:
        for i, share in enumerate(self.shares):
            if isinstance(share.prediction, FillInMiddle) and share.prediction.level is MiddleLevel.DOCUMENT:
                raise UserError(
                    f"task.predict.shares.{i}.prediction.level = document turns documents before windows are drawn for "
                    "a mixture; use FillInMiddle by itself, of which `rate` says how many texts are turned, or context"
                )


Prediction = SinglePrediction | Mixed
"""What is asked of texts."""


def ul2(sentinel: str = SpanCorruption.sentinel, n_sentinels: int = SpanCorruption.n_sentinels) -> Mixed:
    """UL2's mixture of denoisers, each as often (arXiv:2205.05131, section 3.1 and table 1): ordinary gaps [R], few and
    short; extreme ones [X], many or long; and the end of a text [S], a quarter of it."""
    gaps = [("[R]", 0.15, 3.0), ("[R]", 0.15, 8.0)]
    gaps += [("[X]", 0.5, 3.0), ("[X]", 0.5, 8.0), ("[X]", 0.15, 64.0), ("[X]", 0.5, 64.0)]
    denoisers: list[SinglePrediction] = [PrefixLm(fraction=0.75, mode="[S]")]
    denoisers += [
        SpanCorruption(density=density, mean_span=mean_span, mode=mode, sentinel=sentinel, n_sentinels=n_sentinels)
        for mode, density, mean_span in gaps
    ]
    return Mixed(shares=tuple(Share(prediction=one) for one in denoisers))


def parts(prediction: Prediction, key: str = "task.predict") -> Iterator[tuple[str, SinglePrediction]]:
    """What a prediction is made of, each with its key."""
    if isinstance(prediction, Mixed):
        for i, share in enumerate(prediction.shares):
            yield f"{key}.shares.{i}.prediction", share.prediction
    else:
        yield key, prediction


def special_tokens(*predictions: Prediction) -> tuple[str, ...]:
    """The special tokens that predictions need, each once: for `TrainSentencePiece(special_tokens=...)` or
    `ByteTokenizer(special_tokens=...)`."""
    found = [name for prediction in predictions for _, one in parts(prediction) for name in _tokens(one)]
    return tuple(dict.fromkeys(found))


def _tokens(prediction: SinglePrediction) -> list[str]:
    match prediction:
        case CausalLm():
            return []
        case PrefixLm(mode=mode):
            return [mode] if mode else []
        case SpanCorruption(mode=mode) as spans:
            sentinels = [spans.sentinel.replace("{}", str(i)) for i in range(spans.n_sentinels)]
            return ([mode] if mode else []) + sentinels
        case BlankInfilling(mask=mask, start=start, end=end) | SuffixInfilling(mask=mask, start=start, end=end):
            return [mask, start, end]
        case FillInMiddle(prefix=prefix, suffix=suffix, middle=middle):
            return [prefix, suffix, middle]
        case MaskedLm(mask=mask):
            return [mask]
        case _:
            assert_never(prediction)


ENDS = "visible_to"
"""Array of a batch: where the columns end that a token sees."""
PLACES = ("context_places", "block_places")
"""Arrays of a batch: the two numbers of `Tokens.places`."""


def arrays_beside(predictions: Iterable[Prediction]) -> tuple[str, ...]:
    """Names of the int32 arrays that batches have for these, beside those of `CausalLm`."""
    asked = [one for prediction in predictions for _, one in parts(prediction)]
    looks_on = any(not isinstance(one, CausalLm | FillInMiddle) for one in asked)
    in_two = any(isinstance(one, SuffixInfilling) or _of_two_positions(one) for one in asked)
    return ((ENDS,) if looks_on else ()) + (PLACES if in_two else ())


def _of_two_positions(prediction: SinglePrediction) -> bool:
    return isinstance(prediction, BlankInfilling) and prediction.positions is GapPositions.TWO
