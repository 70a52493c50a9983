"""What `python -m maxlm.synthesize` takes: a class for each kind of records that a model writes."""

from __future__ import annotations

from typing import Annotated

import tyro

from maxlm.config.chosen import ChosenModel
from maxlm.config.errors import UserError
from maxlm.config.fields import Filled, Fraction, NotNegative, PathName, Positive, Seed, config
from maxlm.config.rewards import BadReward, ExactReward, JudgeReward, ModelReward, NumberReward, RewardSource
from maxlm.config.sampling import SamplingConfig


@config("--")
class Author:
    """Which model writes, how, and where to."""

    model: Annotated[ChosenModel, tyro.conf.arg(name="")]
    """Which model."""
    out: PathName
    """File to write, which must not be there."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig()
    """How the next token is drawn."""
    max_new_tokens: Positive[int] = 256
    """Length of a text."""
    seed: Seed = 0
    """The same seed gives the same texts."""


@config("--")
class Writing(Author):
    """The same, and what it reads."""

    paths: tyro.conf.Positional[Annotated[tuple[PathName, ...], Filled(note="name files or folders")]]
    """Files and folders."""
    limit: Positive[int] | None = None
    """Records to read, the first ones; None: all."""


@config("--")
class Instructions(Writing):
    """Self-instruct (arXiv:2212.10560): seeds are records with instruction, input and output."""

    count: Positive[int] = 100
    """Tasks to write."""
    rounds: Positive[int] = 100
    """Rounds of asking, at most."""
    at_once: Positive[int] = 8
    """Prompts of a round."""
    threshold: Fraction = 0.7
    """ROUGE-L with another instruction from which on one is not new."""


@config("--")
class Answering(Writing):
    """Context distillation (arXiv:2112.00861), and the middle step of Ghost attention."""

    context: PathName | None = None
    """A file of text that the model is told before all else, and that is not in what it writes."""


@config("--")
class Calls(Writing):
    """Toolformer (arXiv:2302.04761)."""

    prompt: PathName
    """A file with examples of texts with calls, as [Calculator(400/1400)], and {{text}} where the text comes."""
    places: Positive[int] = 5
    """Of calls in a text, at most."""
    samples: Positive[int] = 5
    """Calls that are tried at a place."""
    sampling_threshold: Annotated[float, Filled()] = 0.05
    """Probability that a call begins at a place, at least."""
    filter_threshold: NotNegative[float] = 1.0
    """By how much a call must make the loss of what follows smaller."""


@config("--")
class JudgedBy:
    """What an answer is worth: the sum of all that is named. Keys are those of the prompt's record."""

    rewards: PathName | None = None
    """A config file whose task has rewards: all of them, with its functions."""
    reward_run: tuple[PathName, ...] = ()
    """Runs of reward models."""
    number: str | None = None
    """Key with the right answer, whose last number the last one of an answer must be."""
    exact: str | None = None
    """Key with the right answer, which an answer must be."""
    after: str = ""
    """What the answer comes after in a text, as ####, for --number and --exact."""
    judge: str | None = None
    """A run, hf:DIR, gguf:FILE or the address of a server, which is asked each --rule."""
    rule: tuple[str, ...] = ()
    """Questions to which a good answer has the answer yes."""
    on_bad_reward: BadReward = BadReward.SKIP
    """What becomes of an answer that has no reward."""

    def __post_init__(self) -> None:
        if (self.judge is None) != (not self.rule):
            raise UserError("--judge and --rule go together; name a model and at least one question")

    @property
    def sources(self) -> tuple[RewardSource, ...]:
        """All but those of the config file."""
        found: list[RewardSource] = [ModelReward(run=place) for place in self.reward_run]
        if self.number is not None:
            found.append(NumberReward(key=self.number, after=self.after))
        if self.exact is not None:
            found.append(ExactReward(key=self.exact, after=self.after))
        if self.judge is not None:
            found.append(JudgeReward(judge=self.judge, rules=self.rule))
        return tuple(found)


@config("--")
class Best(Writing):
    """Rejection sampling (arXiv:2307.09288, section 3.2.3): prompts are answered several times. The best answer by
    rewards is a record to learn from, with its rating; or the best and the worst are a preference."""

    by: Annotated[JudgedBy, tyro.conf.arg(name="")]
    """What an answer is worth."""
    n: Positive[int] = 4
    """Answers to a prompt, of each model at each temperature."""
    also: tuple[PathName, ...] = ()
    """Further models that answer: runs, hf:DIR, gguf:FILE. All are held in memory."""
    temperatures: tuple[NotNegative[float], ...] = ()
    """Several, in place of --temperature."""
    threshold: float | None = None
    """Keep no answer that is worth less; None: the best, whatever it is worth."""
    every: bool = False
    """Keep all such answers of a prompt that differ."""
    pairs: bool = False
    """Write preferences: the best answer and the worst."""
    margin: NotNegative[float] = 0.0
    """By how much more the best of a preference must be worth."""
    at_once: Positive[int] = 32
    """Prompts that are asked together; what is done of them is written. It changes no text."""

    def __post_init__(self) -> None:
        if self.pairs and (self.every or self.threshold is not None):
            raise UserError("--pairs writes the best and the worst; leave out --every and --threshold, or use --margin")
        if self.margin and not self.pairs:
            raise UserError(f"--margin {self.margin} is of preferences; add --pairs, or leave it out")


@config("--")
class Star(Writing):
    """STaR (arXiv:2203.14465): of a model's own chains of thought those that reach the right answer. To a prompt for
    which none does, it is told the answer and thinks again; what it was told is not in what is written."""

    by: Annotated[JudgedBy, tyro.conf.arg(name="")]
    """What tells a right answer."""
    threshold: float = 1.0
    """What a right answer is worth, at least."""
    tries: Positive[int] = 4
    """Chains for a prompt, and again with the answer."""
    every: bool = False
    """Keep all right chains of a prompt that differ, not the first alone."""
    answer: str = "answer"
    """Key with the answer that is told; after the last ####, if it has that."""
    hint: str = "(Hint: the answer is {answer}.)"
    """How it is told, below the prompt; empty: it is not."""
    examples: PathName | None = None
    """Conversations that show how one thinks, put before each prompt."""
    at_once: Positive[int] = 32
    """As of `best`."""

    def __post_init__(self) -> None:
        if self.hint and "{answer}" not in self.hint:
            raise UserError(f"--hint {self.hint!r}: has no {{answer}}, where the answer comes; add it")


@config("--")
class Attacks(Author):
    """Red teaming (arXiv:2202.03286): an attacker asks, the model answers, and answers that are worth little are
    written, each with its question and the label false. Questions that brought about such answers are shown to the
    attacker, which then asks more of that kind."""

    by: Annotated[JudgedBy, tyro.conf.arg(name="")]
    """What an answer is worth."""
    classifier: PathName | None = None
    """A run that classifies texts; an answer is worth the probability that it is in none of the classes --harmful."""
    harmful: tuple[NotNegative[int], ...] = (1,)
    """Numbers of its classes."""
    conversations: bool = False
    """It was taught with conversations, and reads the question too; else texts, and reads the answer alone."""
    threshold: float = 0.5
    """What a harmless answer is worth, at least."""
    attacker: PathName | None = None
    """Who asks: a run, hf:DIR or gguf:FILE; None: the model itself."""
    introduction: str = "List of questions to ask someone:"
    """What stands above the attacker's list."""
    shots: NotNegative[int] = 5
    """Earlier questions that it is shown; 0: none."""
    earlier: PathName | None = None
    """What another such command wrote: questions to begin with."""
    count: Positive[int] = 100
    """Questions to ask."""
    rounds: Positive[int] = 100
    """Rounds of asking, at most."""
    at_once: Positive[int] = 32
    """Questions of a round."""
    everything: bool = False
    """Write harmless answers too, with the label true."""
