"""`python -m maxlm.data build`: records of conversations from records, texts, threads and rules. JSON in, JSON lines
out; the same input and options give the same bytes."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, assert_never

import tyro

from maxlm.config import Conversations, Files, UserError
from maxlm.config.cli import parse
from maxlm.config.fields import Filled, Fraction, NotEmpty, NotNegative, PathName, Positive, Range, Seed, config
from maxlm.data import ghost, mixing, raw_tasks, reply_trees, sharegpt, wordings
from maxlm.data.conversation_formats import BadRecord, in_order, turns_of
from maxlm.data.documents import Document, Unreadable
from maxlm.data.named_tokenizer import named_tokenizer
from maxlm.data.problems import MadeProblem, ProblemKind, problems
from maxlm.data.sources import iterate_documents
from maxlm.data.tagging import TagPlace, TagWords, tagged
from maxlm.data.tokenizers import open_tokenizer

PROG = "python -m maxlm.data build"
_SHOWN = 5
USAGE = f"""Records of conversations from other data, as JSON lines.

{PROG} mix SET[=WEIGHT]... --out FILE   several sets in given shares
{PROG} tasks PATH... --out FILE         records of a task in several wordings
{PROG} texts PATH... --out FILE         questions out of raw text
{PROG} clean PATH... --out FILE         conversations shared from web pages
{PROG} threads PATH... --out FILE       trees of replies (OpenAssistant, Reddit)
{PROG} ghost PATH... --out FILE         an instruction that holds for a conversation (Llama 2)
{PROG} unpair PATH... --out FILE        preferences as single answers with labels (for kto)
{PROG} tags PATH... --out FILE          good and bad answers as conversations that say which they are
{PROG} problems KIND --out FILE         problems with one right answer each (sort, addition)

--help after a name lists its options."""


@config("--")
class Given:
    """What is read and written."""

    paths: tyro.conf.Positional[Annotated[tuple[PathName, ...], Filled(note="name files or folders")]]
    """Files and folders."""
    out: PathName
    """File to write, which must not be there."""
    pattern: NotEmpty[str] = Conversations.pattern
    """Names taken from folders, as in the shell."""


@config("--")
class Mix:
    """Which sets, and how much of each."""

    sets: tyro.conf.Positional[Annotated[tuple[NotEmpty[str], ...], Filled(note="name files")]]
    """Files, each perhaps with =WEIGHT after it."""
    out: PathName
    """File to write, which must not be there."""
    count: Positive[int] | None = None
    """Records to write; None: as many as there are."""
    cap: Positive[int] | None = None
    """Records of a set that are used at all, drawn from it; None: all. FLAN has 30,000."""
    rate_cap: Positive[int] | None = None
    """A set's share grows with its records up to so many; None: without end. FLAN has 3,000."""
    seed: Seed = 0
    """Of what is drawn, and of the order."""


@config("--")
class Tasks:
    """Which records, and in which words."""

    input: tyro.conf.OmitArgPrefixes[Given]
    """Records."""
    wordings: PathName
    """File of wordings: JSON as docs/posttrain.md says."""
    every: bool = False
    """Each record in every wording, and not in one that is drawn."""
    thoughts: Fraction = 0.0
    """Share of the records that are answered with a chain of thought."""
    inverted: Fraction = 0.0
    """Share of the records that are asked the other way round."""
    shots: NotNegative[int] = 0
    """Other records that are shown before each."""
    seed: Seed = 0
    """Of what is drawn."""

    def __post_init__(self) -> None:
        if self.thoughts + self.inverted > 1:
            raise UserError(f"--thoughts {self.thoughts:g} and --inverted {self.inverted:g} are more than 1 together")


@config("--")
class RawTexts:
    """Which texts."""

    input: tyro.conf.OmitArgPrefixes[Given]
    """Documents."""
    text_key: NotEmpty[str] = Files.text_key
    """Key or column of the text in files of records."""
    seed: Seed = 0
    """Of the wordings."""


@config("--")
class Clean:
    """Which conversations, and how long they may be."""

    input: tyro.conf.OmitArgPrefixes[Given]
    """Conversations."""
    limit: Positive[int] | None = None
    """Longer ones are split between turns; None: none is."""
    tokenizer: PathName | None = None
    """What `limit` counts the tokens of: a tokenizer as `chat` takes; None: it counts characters."""


@config("--")
class Threads:
    """Which trees, and what of them."""

    input: tyro.conf.OmitArgPrefixes[Given]
    """Messages or trees."""
    best: bool = False
    """Only the best reply of the assistant to each message."""
    rankings: bool = False
    """Instead of conversations, the ranked replies to each message."""
    again: bool = False
    """Learn an answer in every conversation that it is part of, and not only in the first."""


@config("--")
class Ghost:
    """Which conversations, and which instructions."""

    input: tyro.conf.OmitArgPrefixes[Given]
    """Conversations; with `learn` those that a model answered anew."""
    instructions: PathName | None = None
    """A file with one a line: put them before every turn of the user. None: make of conversations that have them what
    is to be learned."""
    at_most: Positive[int] = 1
    """Instructions that are put together."""
    seed: Seed = 0
    """Of what is drawn."""


@config("--")
class Unpair:
    """Which preferences."""

    input: tyro.conf.OmitArgPrefixes[Given]
    """Preferences: prompt, chosen and rejected, as text or messages."""


class ProblemForm(enum.Enum):
    """What a line of the file is."""

    RECORDS = "records"
    """A record with prompt, completion and answer: for SFT, and as a prompt for tasks that judge answers."""
    TEXT = "text"
    """A document, prompt and answer as running text: for pre-training."""


@config("--")
class Problems:
    """Which problems, and how many."""

    kind: tyro.conf.Positional[ProblemKind]
    """What is to be done."""
    out: PathName
    """File to write, which must not be there."""
    count: Positive[int] = 1000
    """Problems to write, all different."""
    seed: Seed = 0
    """Which ones."""
    held_out: bool = False
    """Those that no file without this word has, whatever its seed."""
    form: Annotated[ProblemForm, tyro.conf.arg(name="as")] = ProblemForm.RECORDS
    """What a line of the file is."""
    digits: Annotated[int, Range(ge=1, le=9)] | None = None
    """Of each number, at most; None: six to sort, two to add."""


@config("--")
class Tags:
    """Which answers, and what is said of them."""

    input: tyro.conf.OmitArgPrefixes[Given]
    """Answers with label (good or not), rating or ratings, or chosen and rejected."""
    good: NotEmpty[str] = "CORRECT SOLUTION"
    """Of answers that are good, or chosen."""
    bad: NotEmpty[str] = "INCORRECT SOLUTION"
    """Of others."""
    rating: NotEmpty[str] = "RATING:"
    """Before a number."""
    place: TagPlace = TagPlace.PROMPT
    """The first line of the question, or of what the system says."""


class _Made(NamedTuple):
    """What became of a record."""

    place: str
    records: list[dict[str, Any]] | BadRecord


def main(argv: list[str]) -> int:
    """Build what the words ask for, and say how many records could not be read or used."""
    match argv:
        case [] | ["-h" | "--help"]:
            print(USAGE)
            return 0
        case [name, *rest] if name in _BUILDERS:
            options, build = _BUILDERS[name]
            found = parse(options, rest, prog=f"{PROG} {name}", description=str(options.__doc__), flags=True)
            return int(build(found))
        case _:
            raise UserError(f"unknown build {argv[0]!r}; use one of {', '.join(_BUILDERS)}")


def _mix(command: Mix) -> int:
    names, weights = list[str](), list[float]()
    for word in command.sets:
        name, equals, weight = word.rpartition("=")
        try:
            weights.append(float(weight) if equals else 1.0)
        except ValueError as error:
            raise UserError(f"{word}: the weight {weight!r} is no number; write SET=2 or SET") from error
        names.append(name if equals else word)
    unreadable = Unreadable()
    sets = [_records(Conversations(paths=(name,)), unreadable) for name in names]
    used = [mixing.sampled(found, command.cap, f"{command.seed}/{n}") for n, found in enumerate(sets)]
    sizes = [len(found) for found in used]
    parts = mixing.shares(sizes, weights, command.rate_cap)
    count = sum(sizes) if command.count is None else command.count
    for name, size, part in zip(names, sizes, parts, strict=True):
        print(f"{name}: {size:,} records, {part:.1%}, {part * count / max(1, size):.2f} times each")
    chosen = (used[n][i] for n, i in mixing.mixed(sizes, parts, count, command.seed))
    return _write(command.out, (_Made(one.file, [json.loads(one.text)]) for one in chosen), unreadable)


def _tasks(command: Tasks) -> int:
    unreadable = Unreadable()
    found = _records(_input(command.input), unreadable)
    made = wordings.worded(
        [json.loads(one.text) for one in found], wordings.read_wordings(Path(command.wordings)), every=command.every,
        thoughts=command.thoughts, inverted=command.inverted, shots=command.shots, seed=command.seed,
    )  # fmt: skip
    pairs = zip(found, made, strict=True)
    return _write(command.input.out, (_Made(_place(one), result) for one, result in pairs), unreadable)


def _texts(command: RawTexts) -> int:
    unreadable = Unreadable()
    files = Files(paths=command.input.paths, pattern=command.input.pattern, text_key=command.text_key)
    made = (
        _Made(_place(one), list(raw_tasks.tasks(one.text, f"{command.seed}/{n}")))
        for n, one in enumerate(iterate_documents(files, unreadable))
    )
    return _write(command.input.out, made, unreadable)


def _clean(command: Clean) -> int:
    size: Callable[[str], int] = len
    if command.tokenizer is not None:
        tokenizer = open_tokenizer(named_tokenizer(command.tokenizer))
        size = lambda text: len(tokenizer.encode(text))
    return _each(command.input, lambda n, record: sharegpt.cleaned(record, command.limit, size))


def _threads(command: Threads) -> int:
    unreadable = Unreadable()
    found = [json.loads(one.text) for one in _records(_input(command.input), unreadable)]
    name = command.input.paths[0]
    try:
        trees = list(reply_trees.roots(found))
    except BadRecord as error:
        raise UserError(f"{name}: {error}") from error
    give = lambda root: (
        reply_trees.rankings(root)
        if command.rankings
        else reply_trees.conversations(root, best=command.best, once=not command.again)
    )
    made = (_Made(f"{name}, tree {n + 1}", list(give(root))) for n, root in enumerate(trees))
    return _write(command.input.out, made, unreadable)


def _ghost(command: Ghost) -> int:
    if command.instructions is None:
        learned = lambda n, record: [ghost.learned({**record, "messages": _in_order(record)})]
        return _each(command.input, learned)
    try:
        lines = Path(command.instructions).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--instructions {command.instructions}: cannot be read ({error})") from error
    instructions = [line.strip() for line in lines if line.strip()]
    if not instructions:
        raise UserError(f"--instructions {command.instructions}: is empty; write one a line")
    return _each(
        command.input,
        lambda n, record: [ghost.asked(_in_order(record), instructions, f"{command.seed}/{n}", command.at_most)],
    )


def _unpair(command: Unpair) -> int:
    def labelled(n: int, record: dict[str, Any]) -> list[dict[str, Any]]:
        if missing := [key for key in ("prompt", "chosen", "rejected") if key not in record]:
            raise BadRecord(f"has no {' and no '.join(missing)}")
        rest = {key: value for key, value in record.items() if key in ("prompt", "system", "tools")}
        return [{**rest, "completion": record[key], "label": key == "chosen"} for key in ("chosen", "rejected")]

    return _each(command.input, labelled)


def _problems(command: Problems) -> int:
    found = problems(
        command.kind, command.count, command.seed, held_out=command.held_out, digits=command.digits
    )  # fmt: skip
    made = (_Made(command.kind.value, [_problem(one, command.form)]) for one in found)
    return _write(command.out, made, Unreadable())


def _problem(one: MadeProblem, form: ProblemForm) -> dict[str, Any]:
    match form:
        case ProblemForm.RECORDS:
            return {"prompt": one.prompt, "completion": one.answer, "answer": one.answer}
        case ProblemForm.TEXT:
            return {"text": f"{one.prompt} {one.answer}"}
        case _:
            assert_never(form)


def _tags(command: Tags) -> int:
    wording = TagWords(command.good, command.bad, command.rating)
    return _each(command.input, lambda n, record: tagged(record, wording, command.place))


_BUILDERS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "mix": (Mix, _mix),
    "tasks": (Tasks, _tasks),
    "texts": (RawTexts, _texts),
    "clean": (Clean, _clean),
    "threads": (Threads, _threads),
    "ghost": (Ghost, _ghost),
    "unpair": (Unpair, _unpair),
    "tags": (Tags, _tags),
    "problems": (Problems, _problems),
}


def _in_order(record: dict[str, Any]) -> list[dict[str, Any]]:
    return in_order(turns_of(record), "messages", whole=True)


def _input(given: Given) -> Conversations:
    return Conversations(paths=given.paths, pattern=given.pattern)


def _records(source: Conversations, unreadable: Unreadable) -> list[Document]:
    return list(iterate_documents(source, unreadable))


def _each(given: Given, make: Callable[[int, dict[str, Any]], list[dict[str, Any]]]) -> int:
    """Write what each record becomes by itself."""
    unreadable = Unreadable()

    def made() -> Iterator[_Made]:
        for n, one in enumerate(iterate_documents(_input(given), unreadable)):
            try:
                yield _Made(_place(one), make(n, json.loads(one.text)))
            except BadRecord as error:
                yield _Made(_place(one), error)

    return _write(given.out, made(), unreadable)


def _write(out: str, made: Iterable[_Made], unreadable: Unreadable) -> int:
    """Write the records, and say how many records were used, made and refused. The file appears when it is whole.

    Raises:
        UserError: it is there already, or cannot be written.
    """
    file = Path(out)
    if file.exists():
        raise UserError(f"--out {file}: is there already; name a new file")
    partial = file.with_name(file.name + ".partial")
    used = written = 0
    refused = list[str]()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w") as stream:
            for place, records in made:
                if isinstance(records, BadRecord):
                    refused.append(f"{place}: {records}")
                    continue
                used += 1
                for record in records:
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                    written += 1
        os.replace(partial, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(
                f"--out {file}: cannot be written ({error.strerror}); make room, or name a file elsewhere"
            ) from error
        raise
    print(f"{file}: {written:,} records from {used:,}")
    if refused:
        print(f"{len(refused):,} refused:", *refused[:_SHOWN], sep="\n  ")
    if summary := unreadable.summary():
        print(summary, file=sys.stderr)
    return unreadable.count + len(refused)


def _place(one: Document) -> str:
    return one.file if one.row is None else f"{one.file}:{one.row}"
