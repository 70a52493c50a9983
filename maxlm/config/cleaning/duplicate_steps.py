"""Steps that remove what other documents hold already; which is "earlier", and "first", is the order of the input."""

from __future__ import annotations

import enum
from typing import Annotated

from maxlm.config.fields import Fraction, NotEmpty, NotNegative, PathName, Positive, Range, Seed, config


@config("steps[].ignoring.")
class Ignoring:
    """Which differences between two pieces of text do not count (CCNet, arXiv:1911.00359, section 3.1, ignores all)."""

    case: bool = True
    """Upper and lower case."""
    accents: bool = True
    """Marks above and below letters."""
    digits: bool = True
    """Which digits: each counts as 0."""
    punctuation: bool = True
    """Whatever is neither letter, digit, mark of a letter nor blank."""
    spaces: bool = True
    """How many blanks and line ends, and of which kind."""


@config("steps[].")
class ExactDocuments:
    """Drop a document whose text an earlier one has."""

    ignoring: Ignoring | None = None
    """Differences that do not count; None: every character does."""


class SpanUnit(enum.Enum):
    """What a text is cut into."""

    PARAGRAPH = "paragraph"
    """Up to a blank line."""
    LINE = "line"
    """What CCNet calls a paragraph."""
    SENTENCE = "sentence"
    """Up to a full stop, question or exclamation mark and a blank, or to the end of a line."""


@config("steps[].")
class AnyCutting:
    """What becomes of a document of which a step has cut out something; others are not measured."""

    least_share: Fraction = 0.0
    """It is dropped if less than this share of its characters is left."""
    least_words: NotNegative[int] = 1
    """It is dropped if fewer words are left."""


@config("steps[].")
class ExactSpans(AnyCutting):
    """Cut out lines, paragraphs or runs of sentences that stand earlier in the documents; the first of each stays.

    CCNet (arXiv:1911.00359, section 3.1): `unit=SpanUnit.LINE, ignoring=Ignoring()`. C4 (arXiv:1910.10683, section
    2.2): `unit=SpanUnit.SENTENCE, span=3`.
    """

    unit: SpanUnit = SpanUnit.PARAGRAPH
    """Pieces of text; blank ones do not count and are never cut out."""
    span: Positive[int] = 1
    """So many pieces in a row must have stood together earlier."""
    least_characters: Positive[int] = 1
    """Spans of fewer stay; counted without the differences that do not count."""
    ignoring: Ignoring | None = None
    """Differences that do not count; None: all but blanks at both ends do."""


@config("steps[].keep.")
class KeepFirst:
    """The earliest document of a cluster."""


@config("steps[].keep.")
class KeepLongest:
    """The document with most characters; of several the earliest."""


@config("steps[].keep.")
class KeepBest:
    """The document with the highest value of a tag; of several the earliest."""

    tag: NotEmpty[str] = "score"
    """Its name. A document without it, or whose value is no finite number, comes last."""


KeptCopy = KeepFirst | KeepLongest | KeepBest
"""Which document of a cluster stays."""


@config("steps[].")
class NearDuplicates:
    """Keep one document of each cluster of similar ones: MinHash and locality-sensitive hashing (Broder 1997; Leskovec
    et al., Mining of Massive Datasets, section 3.4).

    Similarity is Jaccard's: of the sets of word n-grams of two documents, how many are in both, divided by how many are
    in either. The defaults are FineWeb's (arXiv:2406.17557, section 3.4).
    """

    words: Positive[int] = 5
    """Of an n-gram; a document of fewer words is one n-gram, one of no words is like no other."""
    bands: Positive[int] = 14
    """Parts of a signature, of which one must agree."""
    rows: Positive[int] = 8
    """Hashes of a band, which must all agree."""
    least_similarity: Fraction = 0.0
    """Candidates count if the share of hashes that agree in their whole signatures, which estimates the similarity, is
    at least this; 0: each candidate counts."""
    keep: KeptCopy = KeepFirst()
    """Which document of a cluster stays."""
    seed: Seed = 1
    """Of the hashes."""

    def chance(self, jaccard: float) -> float:
        """Probability that two documents of this similarity are candidates: 1 - (1 - s^rows)^bands."""
        return 1 - (1 - jaccard**self.rows) ** self.bands


@config("steps[].")
class ExactSubstrings(AnyCutting):
    """Cut out stretches of text that stand earlier in the documents, wherever they begin; the first of each stays
    (Lee et al., arXiv:2107.06499, section 4.1)."""

    least_bytes: Annotated[int, Range(ge=16, le=1 << 16)] = 200
    """Shorter ones stay, in bytes of UTF-8. The paper's 50 tokens of English are about 200; bytes need no tokenizer."""


@config("steps[].")
class SemanticDuplicates:
    """Keep one of documents that mean the same: embeddings are clustered, and compared within each cluster, beginning
    with the farthest from its centre, which thus is kept (SemDeDup, arXiv:2303.09540, section 3)."""

    embedder: PathName
    """Folder of the run whose model makes embeddings."""
    epsilon: Fraction = 0.05
    """A document is dropped if its cosine with one that is kept is more than 1 minus this. The share that goes depends
    on the model: try it on a sample."""
    clusters: Positive[int] = 1000
    """Of k-means; documents in different ones are not compared. Work is least at about the square root of the number of
    documents. There are never more clusters than documents."""
    rounds: Positive[int] = 20
    """Of k-means."""
    sample: Positive[int] = 256
    """Documents a cluster from which the centres are learned, drawn by chance."""
    batch: Positive[int] = 64
    """Documents that are given to the model together."""
    seed: Seed = 1
    """Of the sample and the first centres."""
