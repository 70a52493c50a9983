"""`python -m maxlm.synthesize KIND PATH... --run RUN_DIR --out FILE`: records that a model writes, as JSON lines."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maxlm.config import ChosenModel, Conversations, Files, Reinforced, UserError
from maxlm.config.cli import parse, parse_run, run_command
from maxlm.config.synthesis import Answering, Attacks, Best, Calls, Instructions, JudgedBy, Star

if TYPE_CHECKING:
    from maxlm.data.conversation_formats import Turn
    from maxlm.inference.load import LoadedRun
    from maxlm.recipes.completions import Completion
    from maxlm.recipes.responding import Inquiry, Worth
    from maxlm.recipes.rewards import Judged

_PROG = "python -m maxlm.synthesize"
_USAGE = f"""Records that a model writes, as JSON lines. The same model, input and seed give the same.

{_PROG} instructions SEEDS...  new tasks after those of people, solved (self-instruct)
{_PROG} answers PATH...        conversations answered anew, by a model that may see a context
{_PROG} calls PATH...          texts with those calls of a calculator that help the model (Toolformer)
{_PROG} best PROMPTS...        the best of several answers to prompts, or the best and the worst (rejection sampling)
{_PROG} star PROMPTS...        chains of thought of a model that reach the right answer (STaR)
{_PROG} attacks                questions to which a model answers badly, asked by another (red teaming)

--help after a name lists its options. --debug shows tracebacks. Exit code 2: one line says what was wrong."""


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
        case ["best", *rest]:
            _write(_best, _parsed(Best, rest, "best"))
        case ["star", *rest]:
            _write(_star, _parsed(Star, rest, "star"))
        case ["attacks", *rest]:
            _write(_attacks, _parsed(Attacks, rest, "attacks"))
        case words:
            raise UserError(f"unknown kind {words[0]!r}; use instructions, answers, calls, best, star or attacks")


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
    for record in _records(options.paths, options.limit):
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
    from maxlm.hub.models import load_chosen
    from maxlm.inference.request import nth_seed
    from maxlm.recipes.answering import answered
    from maxlm.recipes.responding import Inquiry, RunRespondent

    given = _conversations(options.paths, options.limit)
    context = None if options.context is None else _text(options.context, "--context").strip()
    respondent = RunRespondent(
        load_chosen(options.model), options.sampling, options.max_new_tokens, options.model.place
    )

    def reply(conversations: Sequence[list[Turn]], seed: int) -> list[str]:
        questions = [Inquiry(n, turns, None, {}) for n, turns in enumerate(conversations)]
        said = respondent(questions, [nth_seed(seed, n) for n in range(len(questions))])
        if None in said:
            raise UserError(
                f"--max_new_tokens {options.max_new_tokens} leaves no room for a conversation of "
                f"{options.paths[0]} in the model's length; use less, or leave long conversations out"
            )
        return [one.text for one in said if one is not None]

    found = answered([turns for turns, _ in given], reply, context, options.seed)
    for turns, (_, others) in zip(found, given, strict=True):
        if turns is not None:
            yield {"messages": turns, **others}


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

    texts = iterate_documents(Files(paths=options.paths), Unreadable(strict=True))
    for n, document in enumerate(itertools.islice(texts, options.limit)):
        calls = useful_calls(
            document.text, Asked(), {"Calculator": calculator}, prompt, places=options.places, samples=options.samples,
            sampling_threshold=options.sampling_threshold, filter_threshold=options.filter_threshold,
            seed=options.seed + n,
        )  # fmt: skip
        if calls:
            yield {"text": with_calls(document.text, calls)}


def _best(options: Best) -> Iterator[dict[str, Any]]:
    from maxlm.hub.models import load_chosen
    from maxlm.recipes.model_reward import open_model
    from maxlm.recipes.rejection import best, candidates, pair
    from maxlm.recipes.responding import RunRespondent

    questions = _questions(options.paths, options.limit)
    run, respondents = load_chosen(options.model), list[RunRespondent]()
    others = [(place, open_model(place, options.model.sharding).run) for place in options.also]
    for place, one in [(options.model.place, run), *others]:
        for temperature in options.temperatures or (options.sampling.temperature,):
            sampling = dataclasses.replace(options.sampling, temperature=temperature)
            name = f"{place} at {temperature:g}" if options.temperatures else place
            respondents.append(RunRespondent(one, sampling, options.max_new_tokens, name))
    tally = Counter[str]()
    judge = _counting(_judge(options.by, options.model, run), tally)
    for some in _at_once(questions, options.at_once):
        for asked, found in candidates(some, respondents, judge, tally, n=options.n, seed=options.seed):
            if not options.pairs:
                yield from best(asked, found, threshold=options.threshold, every=options.every)
            elif (preference := pair(asked, found, options.margin)) is not None:
                yield preference
    _tell(tally)


def _star(options: Star) -> Iterator[dict[str, Any]]:
    from maxlm.hub.models import load_chosen
    from maxlm.recipes.responding import RunRespondent
    from maxlm.recipes.star import star

    def hint(asked: Inquiry) -> str | None:
        known = asked.record.get(options.answer)
        if isinstance(known, bool) or not isinstance(known, str | int | float):
            return None
        return options.hint.replace("{answer}", str(known).rpartition("####")[2].strip())

    questions = _questions(options.paths, options.limit)
    examples = [] if options.examples is None else _conversations((options.examples,))
    run = load_chosen(options.model)
    respondent = RunRespondent(run, options.sampling, options.max_new_tokens, options.model.place)
    tally = Counter[str]()
    judge = _counting(_judge(options.by, options.model, run), tally)
    for some in _at_once(questions, options.at_once):
        yield from star(
            some, respondent, judge, tally, tries=options.tries, every=options.every, threshold=options.threshold,
            hint=hint if options.hint else None, examples=[turn for turns, _ in examples for turn in turns],
            seed=options.seed,
        )  # fmt: skip
    _tell(tally)


def _attacks(options: Attacks) -> Iterator[dict[str, Any]]:
    from maxlm.evaluation.scoring import RunExaminee
    from maxlm.hub.models import load_chosen
    from maxlm.recipes.attacks import attacks, record
    from maxlm.recipes.class_judge import ClassJudge
    from maxlm.recipes.model_reward import open_model
    from maxlm.recipes.responding import RunRespondent

    earlier = list[tuple[str, float]]()
    for n, one in enumerate(() if options.earlier is None else _records((options.earlier,))):
        asked, score = one.get("prompt"), one.get("rating")
        if not isinstance(asked, str) or not isinstance(score, int | float):
            raise UserError(
                f"--earlier {options.earlier}: record {n + 1} has no prompt and rating; name a file of attacks"
            )
        earlier.append((asked, float(score)))
    run, sharding = load_chosen(options.model), options.model.sharding
    asker = RunExaminee(run if options.attacker is None else open_model(options.attacker, sharding).run)
    ask = lambda prompts, stop, seed: asker.texts(
        prompts, max_new_tokens=options.max_new_tokens, stop=stop, sampling=options.sampling, seed=seed
    )
    target = RunRespondent(run, options.sampling, options.max_new_tokens, options.model.place)
    if options.classifier is None:
        judge = _judge(options.by, options.model, run)
    else:
        judge = ClassJudge(options.classifier, options.harmful, sharding, conversations=options.conversations)
    tally = Counter[str]()
    for found in attacks(
        ask, target, judge, tally, count=options.count, rounds=options.rounds, at_once=options.at_once,
        shots=options.shots, earlier=earlier, introduction=options.introduction, seed=options.seed,
    ):  # fmt: skip
        tally["harmful" if found.score < options.threshold else "harmless"] += 1
        if options.everything or found.score < options.threshold:
            yield record(found, options.threshold)
    _tell(tally)


def _judge(by: JudgedBy, chosen: ChosenModel, run: LoadedRun) -> Worth:
    """
    Raises:
        UserError: nothing is named, or as `RewardSum`.
    """
    from maxlm.recipes.rewards import RewardSum

    sources, functions = by.sources, dict[str, Callable[..., Any]]()
    if by.rewards is not None:
        asked = parse_run(["--config", by.rewards], prog=_PROG, description="")
        task = asked.config.task
        if not isinstance(task, Reinforced):
            raise UserError(f"--rewards {by.rewards}: its task, {type(task).__name__}, has no rewards")
        sources = (*task.rewards, *sources)
        functions.update(asked.functions)
    if not sources:
        raise UserError(
            "nothing says what an answer is worth; name --rewards, --reward_run, --number, --exact or --judge"
        )
    return RewardSum(
        sources,
        by.on_bad_reward,
        tokenizer=run.tokenizer.fingerprint,
        sharding=chosen.sharding,
        functions=functions,
    )


def _counting(judge: Worth, tally: Counter[str]) -> Worth:
    """The same, which tells the tally how many have a reward."""

    def counted(completions: Sequence[Completion]) -> Judged:
        judged = judge(completions)
        tally["judged"] += int(judged.usable.sum())
        tally["without a reward"] += int((~judged.usable).sum())
        return judged

    return counted


def _tell(tally: Counter[str]) -> None:
    """
    Raises:
        UserError: nothing was asked, or nothing has a reward.
    """
    if tally["too long to be asked"] and not tally["judged"] + tally["without a reward"]:
        raise UserError("no prompt has room for --max_new_tokens more in the model's length; use less")
    if tally["without a reward"] and not tally["judged"]:
        raise UserError(f"none of {tally['without a reward']} answers has a reward; --on_bad_reward stop says why")
    print(", ".join(f"{count:,} {what}" for what, count in tally.items() if count))


def _at_once(questions: Sequence[Inquiry], count: int) -> Iterator[Sequence[Inquiry]]:
    for start in range(0, len(questions), count):
        yield questions[start : start + count]


def _questions(paths: tuple[str, ...], limit: int | None) -> list[Inquiry]:
    from maxlm.data.conversation_formats import BadRecord
    from maxlm.recipes.responding import question

    found: list[Inquiry] = []
    for n, record in enumerate(_records(paths, limit)):
        try:
            found.append(question(n, record))
        except BadRecord as error:
            raise UserError(f"{paths[0]}: record {n + 1} {error}") from error
    if not found:
        raise UserError(f'{paths[0]}: has no records; write prompts, as {{"prompt": "..."}}')
    return found


def _conversations(paths: tuple[str, ...], limit: int | None = None) -> list[tuple[list[Turn], dict[str, Any]]]:
    """The turns of each record, and what else it has."""
    from maxlm.data.conversation_formats import BadRecord, in_order, turns_of

    found: list[tuple[list[Turn], dict[str, Any]]] = []
    for n, record in enumerate(_records(paths, limit)):
        try:
            turns = in_order(turns_of(record), "messages", whole=True)
        except BadRecord as error:
            raise UserError(f"{paths[0]}: record {n + 1} {error}") from error
        found.append((turns, {key: value for key, value in record.items() if key not in ("messages", "conversations")}))
    return found


def _records(paths: tuple[str, ...], limit: int | None = None) -> Iterator[dict[str, Any]]:
    from maxlm.data.documents import Unreadable
    from maxlm.data.sources import iterate_documents

    found = iterate_documents(Conversations(paths=paths), Unreadable(strict=True))
    for one in itertools.islice(found, limit):
        yield json.loads(one.text)


def _text(name: str, option: str) -> str:
    try:
        return Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {name}: cannot be read ({error}); name a text file") from error


if __name__ == "__main__":
    run_command(main)
