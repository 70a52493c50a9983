"""`python -m maxlm.synthesize KIND PATH... --run RUN_DIR --out FILE`: records that a model writes, as JSON lines."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from maxlm.config import ChosenModel, Conversations, Files, SamplingConfig, UserError
from maxlm.config.cli import parse, run_command
from maxlm.config.fields import Filled, Fraction, NotNegative, PathName, Positive, Seed, config

_PROG = "python -m maxlm.synthesize"
_USAGE = f"""Records that a model writes, as JSON lines. The same model, input and seed give the same.

{_PROG} instructions SEEDS...  new tasks after those of people, solved (self-instruct)
{_PROG} answers PATH...        conversations answered anew, by a model that may see a context
{_PROG} calls PATH...          texts with those calls of a calculator that help the model (Toolformer)

--help after a name lists its options. --debug shows tracebacks. Exit code 2: one line says what was wrong."""


@config("--")
class Writing:
    """Which model, what it reads and writes."""

    paths: tyro.conf.Positional[Annotated[tuple[PathName, ...], Filled(note="name files or folders")]]
    """Files and folders."""
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


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: the model, the input or an option does not fit.
    """
    match [word for word in argv if word != "--debug"]:
        case [] | ["-h" | "--help"]:
            print(_USAGE)
        case ["instructions", *rest]:
            _write(_instructions, _parsed(Instructions, rest, "instructions"))
        case ["answers", *rest]:
            _write(_answers, _parsed(Answering, rest, "answers"))
        case ["calls", *rest]:
            _write(_calls, _parsed(Calls, rest, "calls"))
        case words:
            raise UserError(f"unknown kind {words[0]!r}; use instructions, answers or calls")


def _parsed(options: type[Any], words: Sequence[str], name: str) -> Any:
    return parse(options, words, prog=f"{_PROG} {name}", description=str(options.__doc__), flags=True)


def _write(make: Any, options: Any) -> None:
    """Each record as it comes, so that what is done is there when it is stopped."""
    from maxlm.compile_cache import enable_compilation_cache  # these import jax: --help stays instant

    out, written = Path(options.out), 0
    if out.exists():
        raise UserError(f"--out {out}: is there already; name a new file")
    enable_compilation_cache()
    records: Iterator[dict[str, Any]] = make(options)
    first = list(itertools.islice(records, 1))  # so that a mistake leaves no file
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as stream:
        for record in itertools.chain(first, records):
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            stream.flush()
            written += 1
    print(f"{out}: {written:,} records")


def _instructions(options: Instructions) -> Iterator[dict[str, Any]]:
    from maxlm.evaluation.scoring import RunExaminee
    from maxlm.hub.models import load_chosen
    from maxlm.recipes.self_instruct import WrittenTask, self_instruct

    seeds = list[WrittenTask]()
    for record in _records(options):
        said = [record.get(key, "") for key in WrittenTask._fields]
        if not all(isinstance(one, str) for one in said) or not said[0].strip() or not said[2].strip():
            raise UserError(f"{options.paths[0]}: record {len(seeds) + 1} has no instruction and output; add them")
        seeds.append(WrittenTask(*said))
    if not seeds:
        raise UserError(f"{options.paths[0]}: has no records; write a few tasks with instruction, input and output")
    model = RunExaminee(load_chosen(options.model))
    ask = lambda prompts, stop, seed: model.texts(
        prompts, max_new_tokens=options.max_new_tokens, stop=stop, sampling=options.sampling, seed=seed
    )
    for task in self_instruct(
        seeds, ask, count=options.count, rounds=options.rounds, at_once=options.at_once,
        threshold=options.threshold, seed=options.seed,
    ):  # fmt: skip
        yield task._asdict()


def _answers(options: Answering) -> Iterator[dict[str, Any]]:
    from maxlm.data.conversation_formats import BadRecord, Turn, in_order, turns_of
    from maxlm.data.text_ends import TextEnds
    from maxlm.hub.models import load_chosen
    from maxlm.inference.request import Request, nth_seed
    from maxlm.recipes.answering import answered

    talks, others = list[list[Turn]](), list[dict[str, Any]]()
    for n, record in enumerate(_records(options)):
        try:
            talks.append(in_order(turns_of(record), "messages", whole=True))
        except BadRecord as error:
            raise UserError(f"{options.paths[0]}: record {n + 1} {error}") from error
        others.append({key: value for key, value in record.items() if key not in ("messages", "conversations")})
    context = None if options.context is None else _text(options.context, "--context").strip()
    run = load_chosen(options.model)
    if run.chat is None:
        raise UserError("the model has no chat template; choose one that was taught with conversations")
    template, ends = run.chat, run.ends or TextEnds.of_documents(run.tokenizer)

    def reply(conversations: Sequence[list[Turn]], seed: int) -> list[str]:
        asked = [
            Request(
                prompt=tuple(template.encode(run.tokenizer, turns).ids),
                max_new_tokens=options.max_new_tokens,
                sampling=options.sampling,
                seed=nth_seed(seed, n),
                ends=ends.last,
            )
            for n, turns in enumerate(conversations)
        ]
        return [one.text for one in run.generator.answer(asked)]

    for other, turns in zip(others, answered(talks, reply, context, options.seed), strict=True):
        if turns is not None:
            yield {"messages": turns, **other}


def _calls(options: Calls) -> Iterator[dict[str, Any]]:
    from maxlm.data.documents import Unreadable
    from maxlm.data.sources import iterate_documents
    from maxlm.evaluation.scoring import RunExaminee
    from maxlm.hub.models import load_chosen
    from maxlm.recipes.toolformer import calculator, useful_calls, with_calls

    prompt = _text(options.prompt, "--prompt")
    if "{text}" not in prompt:
        raise UserError(f"--prompt {options.prompt}: has no {{text}}, where the text comes; add it")
    examinee = RunExaminee(load_chosen(options.model))

    class Asked:
        def log_probs(self, pairs: Sequence[tuple[str, str]]) -> list[Sequence[float]]:
            found = examinee.scores([examinee.split(*pair) for pair in pairs])
            return [one.log_probs.tolist() for one in found]

        def texts(self, prompts: Sequence[str], stop: Sequence[str], seed: int) -> list[str]:
            return examinee.texts(
                prompts, max_new_tokens=options.max_new_tokens, stop=stop, sampling=options.sampling, seed=seed
            )

    for n, document in enumerate(iterate_documents(Files(paths=options.paths), Unreadable(strict=True))):
        calls = useful_calls(
            document.text, Asked(), {"Calculator": calculator}, prompt, places=options.places, samples=options.samples,
            sampling_threshold=options.sampling_threshold, filter_threshold=options.filter_threshold,
            seed=options.seed + n,
        )  # fmt: skip
        if calls:
            yield {"text": with_calls(document.text, calls)}


def _records(options: Writing) -> Iterator[dict[str, Any]]:
    from maxlm.data.documents import Unreadable
    from maxlm.data.sources import iterate_documents

    for one in iterate_documents(Conversations(paths=options.paths), Unreadable(strict=True)):
        yield json.loads(one.text)


def _text(name: str, option: str) -> str:
    try:
        return Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {name}: cannot be read ({error}); name a text file") from error


if __name__ == "__main__":
    run_command(main)
