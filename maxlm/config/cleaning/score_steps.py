"""Steps that judge documents by models, and how the models of this room are trained."""

from __future__ import annotations

import enum
from typing import Annotated

from maxlm.config.fields import BelowOne, Fraction, NotEmpty, NotNegative, PathName, Positive, Range, Seed, config


@config("--")
class NgramTraining:
    """An n-gram language model over words, by interpolated modified Kneser-Ney smoothing."""

    order: Annotated[int, Range(ge=2, le=6)] = 4
    """Words in the longest n-grams; CCNet has 5, over shorter pieces (arXiv:1911.00359, LM filtering)."""
    least_count: Positive[int] = 1
    """N-grams of three words and more that are seen less often are left out; their share goes to shorter ones."""
    max_words: Positive[int] = 20_000_000
    """Words of text that are read at most; training takes about 150 bytes of memory for each."""
    held_out: BelowOne = 0.05
    """Share of the documents, chosen by a hash of their text, that is not trained on: their perplexities set the thirds
    until `measure_thirds` is given documents of the kind that is to be cleaned."""


class PerplexityThird(enum.Enum):
    """CCNet's thirds of a language's documents, by their perplexity (arXiv:1911.00359, LM filtering)."""

    HEAD = "head"
    """The lowest: most like what the model was trained on."""
    MIDDLE = "middle"
    """The next."""
    TAIL = "tail"
    """The highest."""


@config("steps[].")
class PerplexityFilter:
    """Tag documents with their `perplexity` and `perplexity_third` under an n-gram model, and drop the unlikely."""

    model: PathName
    """Folder of a model that `train_ngram_model` wrote."""
    worst: PerplexityThird = PerplexityThird.TAIL
    """The third beyond which documents are dropped; TAIL: none is. CCNet leaves the choice to the user of its tags."""
    most: Positive[float] | None = None
    """Perplexity a word above which documents are dropped, too; None: there is no such number."""


@config("steps[].")
class BitsPerByteFilter:
    """Tag documents with their `bits_per_byte` under a trained model, and drop those that it foretells too well (lists,
    boilerplate) or too badly (noise)."""

    run: PathName
    """Folder of the run."""
    least: NotNegative[float] = 0.0
    """Bits per byte below which documents are dropped."""
    most: Positive[float] | None = None
    """Bits per byte above which documents are dropped; None: there is no such number."""
    batch: Positive[int] = 64
    """Documents that the model is given at a time."""


@config("features.")
class HashedWords:
    """Which words and runs of words a text has, as shares of all it has, each in the bucket of its hash: fastText's
    input (Joulin et al. 2016, arXiv:1607.01759)."""

    longest: Annotated[int, Range(ge=1, le=5)] = 2
    """Words in the longest runs."""
    bucket_bits: Annotated[int, Range(ge=8, le=26)] = 20
    """There are 2^bits buckets: a weight of 4 bytes each for every class."""


@config("features.")
class RunEmbeddings:
    """The vector that a trained model has for a text."""

    run: PathName
    """Folder of the run."""
    batch: Positive[int] = 64
    """Documents that the model is given at a time."""


@config("--")
class ClassifierTraining:
    """Logistic regression of two or more classes, by L-BFGS from zeros: the same documents make the same weights."""

    features: HashedWords | RunEmbeddings = HashedWords()
    """What is known of a text."""
    l2: NotNegative[float] = 1e-6
    """Half of this times the sum of squared weights is added to the mean loss."""
    max_iterations: Positive[int] = 200
    """Of L-BFGS, unless it has converged before."""
    held_out: Annotated[float, Range(gt=0, lt=1)] = 0.1
    """Share of the documents, chosen by a hash of their text, that measures the classifier."""


@config("steps[].selection.")
class LeastScore:
    """Documents of at least this score stay."""

    least: Fraction = 0.5
    """Of the score, which is a probability."""


@config("steps[].selection.")
class ParetoDraw:
    """Documents stay by chance, good ones mostly: if a number drawn from a Pareto distribution is more than 1 - score
    (GPT-3, arXiv:2005.14165, appendix A). It is drawn by a hash of the document's id."""

    alpha: Positive[float] = 9.0
    """Of the distribution; with more, fewer documents of low score stay."""
    seed: Seed = 0
    """Another seed draws other numbers."""


@config("steps[].")
class QualityFilter:
    """Tag documents with their `quality`, the probability of the good class, and keep the better ones."""

    model: PathName
    """Folder of a classifier that `train_classifier` wrote."""
    good: NotEmpty[str] = "good"
    """The class that is wanted."""
    selection: LeastScore | ParetoDraw = LeastScore()
    """Which scores stay."""


@config("steps[].")
class DomainTagger:
    """Tag documents with the class that they most probably are of: `domain`, by which sources are mixed."""

    model: PathName
    """Folder of a classifier that `train_classifier` wrote."""
    least: Fraction = 0.0
    """Of the class's probability; documents below it have the domain `other`."""
