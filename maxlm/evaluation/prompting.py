"""How questions are put: demonstrations and their order, chains of thought, votes. Read from a JSON file."""

from __future__ import annotations

import enum
from typing import Annotated

from maxlm.config import SamplingConfig
from maxlm.config.fields import Fraction, NotEmpty, PathName, Positive, Range, config


@config("demonstrations.")
class RandomDemonstrations:
    """Drawn once: all questions have the same, but for a question that is one of them itself."""

    count: Positive[int] = 4
    """Solved questions."""


@config("demonstrations.")
class NearestDemonstrations:
    """The nearest to the question, by the cosine of the means of the model's hidden states (after arXiv:2101.06804)."""

    count: Positive[int] = 4
    """Solved questions."""


@config("demonstrations.")
class DiverseDemonstrations:
    """One after the other, near to the question and far from those chosen before: maximal marginal relevance
    (Carbonell and Goldstein 1998)."""

    count: Positive[int] = 4
    """Solved questions."""
    relevance: Fraction = 0.5
    """VoteWeight of being near to the question; 1 gives the nearest."""


@config("demonstrations.")
class UsefulDemonstrations:
    """Those that helped the model most with the answers of similar solved questions: the labels of EPR
    (arXiv:2112.08633), looked up at the nearest questions in place of a trained retriever."""

    count: Positive[int] = 4
    """Solved questions."""
    neighbours: Positive[int] = 4
    """Similar solved questions whose gains are averaged."""
    candidates: Positive[int] = 16
    """Solved questions that are tried before each of them, the nearest ones."""


@config("demonstrations.")
class OwnDemonstrations:
    """Written by the model: for each choice in turn, a question that has it as its answer (SG-ICL, arXiv:2206.08082).
    All questions must have the same choices."""

    count: Positive[int] = 4
    """Written questions."""
    ask: NotEmpty[str] = "Example: {prompt}\nAnother example, with the answer{answer}:"
    """What the model goes on with, around the question that is asked, without its answer, and the wanted answer."""
    max_new_tokens: Positive[int] = 64
    """Of a written question, which ends with its line."""
    temperature: Annotated[float, Range(gt=0)] = 0.5
    """At which it is drawn."""


Selection = (
    RandomDemonstrations | NearestDemonstrations | DiverseDemonstrations | UsefulDemonstrations | OwnDemonstrations
)


@config("order.")
class BestLast:
    """The first choice stands nearest to the question."""


class EntropyKind(enum.Enum):
    """Whose entropy decides."""

    GLOBAL = "global"
    """Of which choices are predicted, over all probes."""
    LOCAL = "local"
    """Of the probabilities at each probe, on average."""


@config("order.")
class EntropyOrder:
    """The order whose predictions at questions that the model writes itself have the highest entropy
    (arXiv:2104.08786). All questions must have the same choices."""

    entropy: EntropyKind = EntropyKind.GLOBAL
    """Whose entropy."""
    orders: Positive[int] = 24
    """That are tried, at most; drawn where there are more."""
    probes: Positive[int] = 1
    """Questions that are written after each order; all are used with each order."""
    max_new_tokens: Positive[int] = 64
    """Of a written question."""


@config("order.")
class CodeLengthOrder:
    """For each question the order that leaves the least entropy over its choices: the shortest expected code
    (arXiv:2212.10375)."""

    orders: Positive[int] = 24
    """That are tried, at most; drawn where there are more."""


Order = BestLast | EntropyOrder | CodeLengthOrder


@config("reasoning.")
class Direct:
    """The answer comes at once."""


@config("reasoning.")
class ChainOfThought:
    """Demonstrations show their `reasoning` before the answer, and the model does as they do (arXiv:2201.11903)."""

    trigger: NotEmpty[str] = "The answer is"
    """Stands before the answer."""
    max_new_tokens: Positive[int] = 256
    """Of reasoning and answer."""
    complex: bool = False
    """Take the demonstrations with the most steps (lines), whatever is chosen otherwise (arXiv:2210.00720)."""


@config("reasoning.")
class ZeroShotChain:
    """Two rounds: the model reasons after a phrase, then says its answer after another (arXiv:2205.11916)."""

    phrase: NotEmpty[str] = "Let's think step by step."
    """Before the reasoning."""
    trigger: NotEmpty[str] = "Therefore, the answer is"
    """Before the answer, in the second round."""
    max_new_tokens: Positive[int] = 256
    """Of the reasoning."""


@config("reasoning.")
class AutoChain:
    """Chains of thought that the model wrote itself, for one question of each cluster, as demonstrations
    (arXiv:2210.03493)."""

    clusters: Positive[int] = 4
    """Of questions, by k-means of their embeddings; one demonstration from each."""
    zero_shot: ZeroShotChain = ZeroShotChain()
    """How the chains are written."""
    most_steps: Positive[int] = 5
    """Lines of a chain that is taken, if there is one."""


@config("reasoning.")
class LeastToMost:
    """The model first splits a question into simpler ones, then answers them one after the other, the question itself
    last (arXiv:2205.10625)."""

    split: NotEmpty[str] = "To answer this, first answer these simpler questions:\n1."
    """After which it writes the simpler questions, one a line."""
    most: Positive[int] = 4
    """Simpler questions that are used."""
    max_new_tokens: Positive[int] = 128
    """Of the simpler questions, and of each answer."""


Reasoning = Direct | ChainOfThought | ZeroShotChain | AutoChain | LeastToMost


class VoteWeight(enum.Enum):
    """What a vote counts."""

    ONE = "one"
    """All the same."""
    PROBABILITY = "probability"
    """The model's own probability of what it wrote, as the geometric mean over its tokens (arXiv:2203.11171)."""


@config("voting.")
class Voting:
    """Several answers to a question, of which the one with the most votes counts (arXiv:2203.11171)."""

    samples: Positive[int] = 1
    """Drawn for each prompt; one alone is the likeliest."""
    prompts: Positive[int] = 1
    """With other demonstrations each: an ensemble (arXiv:2206.02336, section 3.2). Of choices, the probabilities are
    averaged."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.7)
    """How several are drawn."""
    weight: VoteWeight = VoteWeight.ONE
    """What a vote counts."""
    most_complex: Positive[int] | None = None
    """Only so many answers vote, those with the most steps (arXiv:2210.00720); None: all."""


@config("confidence.")
class Confidence:
    """What is said of how sure the model is of its choices."""

    temperature: Annotated[float, Range(gt=0)] = 1.0
    """Divides the log-probabilities of choices (ODIN, arXiv:1706.02690)."""
    bins: Positive[int] = 15
    """Of the expected calibration error."""
    kept: Annotated[float, Range(gt=0, le=1)] = 0.95
    """Share of right choices that the threshold for answering keeps."""


@config("")
class Prompting:
    """How the questions of an exam are put."""

    demonstrations: Selection | None = None
    """Which solved questions stand before a question; None: none."""
    order: Order = BestLast()
    """In which order."""
    pool: PathName | None = None
    """Exam file of the same kind from which demonstrations are taken; None: the other questions of the exam."""
    reasoning: Reasoning = Direct()
    """How the model comes to an answer that it writes."""
    voting: Voting = Voting()
    """How several answers become one."""
    calibrate: bool = False
    """Divide the probabilities of choices by those after the exam's `content_free` prompts (arXiv:2102.09690)."""
    confidence: Confidence | None = None
    """Also say how sure the model is of its choices; None: no."""
