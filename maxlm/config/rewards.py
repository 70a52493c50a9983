"""What is good in a completion: one class a source of rewards, of which a task has several with weights."""

from __future__ import annotations

import enum
import re
from typing import Annotated

from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, NotEmpty, NotNegative, PathName, Positive, Range, config, shown

_Seconds = Annotated[Positive[float], Changes.NOTHING]


class BadReward(enum.Enum):
    """What becomes of a completion for which a source has no number: it raised, hung, or gave none that is finite."""

    STOP = "stop"
    """The run ends, with the name of the source, the prompt and the completion."""
    SKIP = "skip"
    """The completion is left out, and counted."""


@config("task.rewards[].", changes=Changes.IDENTITY)
class ModelReward:
    """The number that a reward model gives the conversation, at its last token (InstructGPT, arXiv:2203.02155, section
    3.5). It is asked in its own template; without one, in the policy's ids, if both have one tokenizer."""

    run: PathName
    """A run of `task = Reward`: RUN_DIR or RUN_DIR/checkpoints/STEP."""
    weight: NotNegative[float] = 1.0
    """In the sum of all; 0: it is measured only."""
    mean: float = 0.0
    """Of its scores on texts that everybody knows, which becomes 0: a loss of differences says nothing of it."""
    std: Positive[float] = 1.0
    """Of the same scores, which becomes 1."""


@config("task.rewards[].", changes=Changes.IDENTITY)
class NumberReward:
    """1 where the last number of the completion is that of the record, else 0. Both may have commas, a decimal point, a
    currency sign or an exponent, or be a fraction; they are compared as fractions, exactly."""

    key: NotEmpty[str] = "answer"
    """Of the record: a number, or a text whose last number is the answer (GSM8K's `#### 72`)."""
    after: str = ""
    """What the number must come after, such as `####`, the last time that it stands there; "": nothing."""
    tolerance: NotNegative[float] = 0.0
    """How far apart both may be."""
    weight: NotNegative[float] = 1.0
    """In the sum of all; 0: it is measured only."""


@config("task.rewards[].", changes=Changes.IDENTITY)
class ExactReward:
    """1 where the completion is the text of the record, or one of its texts, without blanks around it; else 0."""

    key: NotEmpty[str] = "answer"
    """Of the record: a text, or a list of them."""
    after: str = ""
    """What the answer must come after, the last time that it stands there; "": the whole completion is the answer."""
    normalized: bool = False
    """Compare in small letters, without punctuation and articles (SQuAD, arXiv:1606.05250)."""
    weight: NotNegative[float] = 1.0
    """In the sum of all; 0: it is measured only."""


@config("task.rewards[].", changes=Changes.IDENTITY)
class PatternReward:
    """1 where a regular expression of Python matches the whole completion, without blanks around it; else 0."""

    pattern: str | None = None
    """The expression; None: each record has its own. `(?s).*` around it finds it anywhere."""
    key: NotEmpty[str] = "pattern"
    """Of the record, where it has its own."""
    timeout_s: _Seconds = 1.0
    """Seconds that one match may take: some expressions try for ever."""
    weight: NotNegative[float] = 1.0
    """In the sum of all; 0: it is measured only."""

    def __post_init__(self) -> None:
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise UserError(
                    f"task.rewards[].pattern = {shown(self.pattern)} is no regular expression of Python ({error})"
                ) from error


@config("task.rewards[].", changes=Changes.IDENTITY)
class SchemaReward:
    """1 where the completion is one value in JSON that a JSON schema allows, with nothing around it; else 0."""

    path: PathName | None = None
    """File of the schema; None: each record has its own."""
    key: NotEmpty[str] = "schema"
    """Of the record, where it has its own: an object, or an object in JSON."""
    after: str = ""
    """What the value must come after, such as `</think>`, the last time that it stands there; "": nothing."""
    timeout_s: _Seconds = 1.0
    """Seconds that one comparison may take: a schema may hold regular expressions."""
    weight: NotNegative[float] = 1.0
    """In the sum of all; 0: it is measured only."""


@config("task.rewards[].", changes=Changes.IDENTITY)
class ProgramReward:
    """1 where the Python functions of the completion pass the record's tests, in the sandbox of the evaluation; else 0.
    The program is the last block between ``` of the completion, or all of it.

    The tests run in a process of their own. They give the functions data and get data back (numbers, texts, None,
    lists, tuples, sets, dicts), so that a program can neither read them, nor leave early, nor say what is equal."""

    key: NotEmpty[str] = "tests"
    """Of the record: lines of Python that raise where the program is wrong, as a text or a list of texts."""
    timeout_s: _Seconds = 5.0
    """Seconds for the program and its tests together, by the clock."""
    memory_mb: Annotated[Positive[int], Changes.NOTHING] = 1024
    """MiB of address space of each process."""
    weight: NotNegative[float] = 1.0
    """In the sum of all; 0: it is measured only."""


@config("task.rewards[].", changes=Changes.IDENTITY)
class LengthReward:
    """0 up to `at_most - buffer` tokens, then falling to -1 at `at_most` (DAPO, arXiv:2503.14476, equation 13)."""

    at_most: Positive[int]
    """Tokens of a completion, from which on it is -1."""
    buffer: Positive[int]
    """Tokens over which it falls."""
    weight: NotNegative[float] = 1.0
    """In the sum of all; 0: it is measured only."""

    def __post_init__(self) -> None:
        if self.buffer > self.at_most:
            raise UserError(
                f"task.rewards[].buffer = {self.buffer} must be at most at_most = {self.at_most}; use for example "
                f"{max(1, self.at_most // 5)}"
            )


@config("task.rewards[].", changes=Changes.IDENTITY)
class FormatReward:
    """1 where the completion is `<tag>...</tag>` for each tag in turn and then an answer, nothing of it blank and no
    tag twice; else 0 (DeepSeek-R1, arXiv:2501.12948, section 2.2.2)."""

    tags: NotEmpty[tuple[str, ...]] = ("think",)
    """The names, in order."""
    rest: bool = True
    """Whether an answer follows the last of them; else nothing does."""
    begun: bool = False
    """The prompt ends with the first tag, as some templates write it: completions begin behind it."""
    weight: NotNegative[float] = 1.0
    """In the sum of all; 0: it is measured only."""

    def __post_init__(self) -> None:
        wrong = [tag for tag in self.tags if not tag or set(tag) & set("<>/")]
        if wrong or len(set(self.tags)) < len(self.tags):
            why = f"holds {shown(wrong[0])}; names have no <, > or /" if wrong else "names a tag twice; use each once"
            raise UserError(f"task.rewards[].tags = {shown(self.tags)} {why}")


@config("task.rewards[].", changes=Changes.IDENTITY)
class JudgeReward:
    """How likely a model says yes to questions about the completion: p(yes) / (p(yes) + p(no)) of its next token, and
    of several questions the mean (after Sparrow's rules, arXiv:2209.14375, section 2.3)."""

    judge: NotEmpty[str]
    """A run, hf:DIR or gguf:FILE; or http://HOST:PORT/v1 of a server that speaks OpenAI's chat completions and tells
    log-probabilities, as `maxlm.serve` does."""
    rules: NotEmpty[tuple[str, ...]]
    """Questions to which a good answer has the answer yes."""
    model: str = ""
    """What the server calls the model; "": the first that it lists."""
    api_key: Annotated[str | None, Changes.NOTHING] = None
    """Variable of the environment with the key that the server wants; None: it wants none."""
    timeout_s: _Seconds = 60.0
    """Seconds that a server may take for one answer."""
    retries: Annotated[int, Range(ge=0, le=10), Changes.NOTHING] = 2
    """How often a server is asked again that does not answer, or is too busy."""
    weight: NotNegative[float] = 1.0
    """In the sum of all; 0: it is measured only."""

    def __post_init__(self) -> None:
        if blank := [rule for rule in self.rules if not rule.strip()]:
            raise UserError(f"task.rewards[].rules holds {shown(blank[0])}; write questions, such as 'Is it polite?'")
        if not self.judge.startswith(SERVERS) and (self.model or self.api_key):
            said = "model" if self.model else "api_key"
            raise UserError(
                f"task.rewards[].{said} = {shown(getattr(self, said))} is of a server, and judge = {shown(self.judge)} "
                "is none; leave it out, or use judge = 'http://HOST:PORT/v1'"
            )


SERVERS = ("http://", "https://")
"""What an address begins with."""


@config("task.rewards[].", changes=Changes.IDENTITY)
class FunctionReward:
    """What a function of the config file says: `def NAME(prompt: str, completion: str, record: Mapping[str, Any]) ->
    float`, called once a completion."""

    name: NotEmpty[str]
    """Of the function."""
    timeout_s: _Seconds = 10.0
    """Seconds that one call may take."""
    weight: NotNegative[float] = 1.0
    """In the sum of all; 0: it is measured only."""


RewardSource = (
    ModelReward
    | NumberReward
    | ExactReward
    | PatternReward
    | SchemaReward
    | ProgramReward
    | LengthReward
    | FormatReward
    | JudgeReward
    | FunctionReward
)
