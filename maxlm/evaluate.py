"""`python -m maxlm.evaluate --run RUN_DIR [--tasks ...]`: held-out loss, or marks in exams, of a trained model."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import contextlib
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from maxlm.config import (
    ChosenModel,
    Classify,
    Dataset,
    DistillContext,
    Embed,
    NoiseScale,
    Preference,
    Pretrain,
    Purpose,
    Reinforced,
    Reward,
    RunConfig,
    UserError,
    WeightFormat,
)
from maxlm.config.cli import parse, run_command
from maxlm.config.fields import NotEmpty, NotNegative, PathName, Positive, Seed, config
from maxlm.config.prediction_rules import default_prediction

if TYPE_CHECKING:
    from maxlm.evaluation.examining import Asking
    from maxlm.evaluation.exams import Exam
    from maxlm.inference.load import LoadedRun

_DESCRIPTION = """How good a trained model is.

Without --tasks: held-out loss, perplexity and bits per byte of a run. It reads the validation split of the data sets
that the run's config names (relative paths start from the folder you are in), or that of --data, in windows of its
train.seq_len, or of --seq_len.
With --tasks: marks in exams, each with a 95 % interval and what guessing gives; see docs/evaluate.md. Exit code 2: one
line says what was wrong."""


@config("--")
class EvaluateOptions:
    """What to measure, and on how much."""

    model: Annotated[ChosenModel, tyro.conf.arg(name="")]
    """Which model."""
    batches: Positive[int] | None = None
    """Of the held-out loss: batches to measure, from the first; None: as many as training measured, see
    train.eval_batches."""
    data: Annotated[PathName | None, tyro.conf.arg(metavar="DIR")] = None
    """Of the held-out loss: prepared data whose validation split is measured, the whole of it, in place of the run's
    own; a published model needs it."""
    whole: bool = False
    """Of the held-out loss: measure the whole split, as far as it fills batches."""
    batch_size: Positive[int] | None = None
    """Of the held-out loss: windows in a batch; None: train.batch_size of the run. With 1, --whole measures every
    window."""
    seq_len: Positive[int] | None = None
    """Of the held-out loss: tokens of a window, such as those of an earlier phase; None: train.seq_len of the run, at
    this step."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK ...")] = ()
    """Exams: suite (all that come with maxlm), suite:NAME, a .jsonl file, humaneval, or lm_eval:NAME."""
    limit: Positive[int] | None = None
    """Questions of each exam, from the first; None: all."""
    few_shot: NotNegative[int] = 0
    """Solved questions of the same exam before each question, drawn at random."""
    prompting: PathName | None = None
    """JSON file of how questions are put: demonstrations, reasoning, votes; see docs/evaluate.md."""
    seed: Seed = 0
    """Of the suite's questions, demonstrations, samples and intervals."""
    samples: Positive[int] = 1
    """Programs written for each question that wants one; a single one is the likeliest, several are drawn."""
    pass_at: NotEmpty[tuple[Positive[int], ...]] = (1,)
    """Each k of pass@k; at most --samples."""
    allow_code: bool = False
    """Run the programs that the model writes, each alone in a sandbox without network."""
    include_path: PathName | None = None
    """Folder with task files (YAML) of lm-eval."""
    chat: bool = False
    """Put lm-eval's questions through the model's chat template."""
    out: PathName | None = None
    """Folder for results.json, results.svg and every answer; None: nothing is written."""
    json: bool = False
    """Print one JSON object: run, step, loss, perplexity, bits_per_byte, tokens; or of exams: model, what was asked and
    how, results."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if self.batches is not None and self.whole:
            raise UserError(f"--batches = {self.batches} and --whole exclude each other; leave out one of them")
        if self.model.weights is not WeightFormat.DTYPE:
            raise UserError(
                f"--weights {self.model.weights.value}: scores are of the weights as they are; leave it out"
            )
        if not self.tasks and self.model.run is None and self.data is None:
            raise UserError(
                "a published model has no held-out data; name prepared data with --data DIR, or exams, such as "
                "--tasks suite"
            )
        of_exams = ("limit", "few_shot", "prompting", "allow_code", "include_path", "chat", "out")
        if not self.tasks and (said := [name for name in of_exams if getattr(self, name)]):
            raise UserError(f"--{said[0]} is of exams; name some, such as --tasks suite, or leave it out")
        if self.few_shot and self.prompting:
            raise UserError("--few_shot and --prompting both choose demonstrations; leave out one of them")
        if self.tasks and (self.batches or self.whole or self.batch_size or self.seq_len or self.data):
            raise UserError(
                "--data, --batches, --whole, --batch_size and --seq_len are of the held-out loss; leave them out with "
                "--tasks"
            )


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: the model, the data, an exam or an option does not fit.
    """
    options = parse(EvaluateOptions, argv, prog="python -m maxlm.evaluate", description=_DESCRIPTION, flags=True)

    from maxlm.compile_cache import enable_compilation_cache  # these import jax: --help stays instant
    from maxlm.evaluation.examining import check
    from maxlm.evaluation.results import make_folder
    from maxlm.hub.models import load_chosen

    enable_compilation_cache()
    if not options.tasks:
        return _measure(options, load_chosen(options.model))
    exams, asking = _exams(options), _asking(options)
    for exam in exams.values():  # mistakes come before the model is read, and before the first exam is over
        if exam is not None:
            check(exam, asking)
    if options.out is not None:
        make_folder(Path(options.out))
    _examine(options, load_chosen(options.model), exams, asking)


def _measure(options: EvaluateOptions, run: LoadedRun) -> None:
    """The held-out loss."""
    from maxlm.data.loader import global_batches, open_batches
    from maxlm.data.shards import Split
    from maxlm.evaluation.perplexity import held_out
    from maxlm.training.step import make_trainer

    name = options.model.place
    as_trained = run.config.train
    train = dataclasses.replace(
        as_trained,
        batch_size=options.batch_size or as_trained.batch_size,
        seq_len=options.seq_len or as_trained.seq_len,
        micro_batches=1,
        profile_steps=None,
        noise_scale=NoiseScale(),
    )
    data = run.config.data
    if options.data is not None:
        data = dataclasses.replace(data, datasets=(Dataset(path=options.data),), past=())
    config = dataclasses.replace(run.config, train=train, data=data)
    if isinstance(config.task, Reinforced):
        if options.data is None:
            raise UserError(
                f"{name}: was trained on rewards of its own texts, evals.jsonl has those of held-out prompts; name "
                "text to measure its loss on with --data DIR, or use --tasks, or python -m maxlm.compare --prompts FILE"
            )
        config = dataclasses.replace(config, task=Pretrain())
    config.validate(run.layout.mesh.size)
    if isinstance(config.task, DistillContext | Preference | Reward | Classify | Embed):
        return _measure_texts(options, config, run)
    try:
        batches = open_batches(
            config.data,
            batch_size=train.batch_size,
            seq_len=train.seq_len,
            split=Split.VALIDATION,
            virtual=config.model.virtual_tokens,
            predict=default_prediction(config.task),
        )
    except UserError as error:
        raise error if options.data else UserError(f"{error}; or name other data with --data DIR") from error
    if batches.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise UserError(
            f"{config.data.datasets[0].path}: prepared with tokenizer {batches.tokenizer.fingerprint[:12]}..., "
            f"{name} uses {run.tokenizer.fingerprint[:12]}...; prepare the data with its tokenizer"
        )
    assert batches.n_batches is not None and batches.n_windows is not None, "a validation split has an end"
    # As many tokens as training measured, in batches of any size; all of them, where it measured none.
    in_all = batches.n_windows * train.seq_len // as_trained.seq_len // as_trained.batch_size
    windows = as_trained.batch_size * as_trained.held_out_batches(in_all) * as_trained.seq_len // train.seq_len
    n_batches = options.batches or max(1, windows // train.batch_size)
    if options.whole or (options.data and not options.batches) or not (options.batches or windows):
        n_batches = batches.n_batches
    trainer = make_trainer(config, run.layout)
    sharding = run.layout.sharding(run.layout.activation("batch", "seq"))
    with contextlib.closing(global_batches(batches, sharding, 0)) as feed:
        result = held_out(
            trainer.evaluate,
            run.parameters,
            itertools.islice(feed, n_batches),
            bytes_per_token=batches.bytes_per_token,
        )
    if not math.isfinite(result.loss):
        raise UserError(f"{name}: the held-out loss of step {run.step} is {result.loss}; use an earlier --step")
    if options.json:
        print(json.dumps({"run": name, "step": run.step, **dataclasses.asdict(result)}))
    else:
        bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits/byte"
        print(
            f"step {run.step}: held-out loss {result.loss:.4f} nats/token, perplexity {result.perplexity:.3f}{bits} "
            f"({result.tokens} tokens)"
        )


def _measure_texts(options: EvaluateOptions, config: RunConfig, run: LoadedRun) -> None:
    """Held-out figures of a run about whole texts, as its training measures them."""
    from maxlm.checkpoint.store import Store
    from maxlm.recipes import recipe
    from maxlm.recipes.embed import probe
    from maxlm.recipes.of_texts import measure_held_out, purposes

    # Enough for any split where the whole of it is asked for.
    batches = options.batches or (2**31 - 1 if options.whole or options.data else config.train.eval_batches)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batches=batches or None))
    if isinstance(config.task, Embed) and purposes(config.data) == {Purpose.CLASSIFY}:
        found = probe(config, run.layout, run.parameters)
        said = f"step {run.step:,}  linear probe right of {found['held_out']} texts: {found['linear_probe']:.4g}"
        return print(json.dumps({"run": options.model.place, "step": run.step, **found}) if options.json else said)
    made = recipe(config, run.layout)
    if made.tokenizer is not None and made.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise UserError(
            f"{config.data.datasets[0].path}: prepared with tokenizer {made.tokenizer.fingerprint[:12]}..., "
            f"{options.model.place} uses {run.tokenizer.fingerprint[:12]}...; prepare the data with its tokenizer"
        )
    trained = Store().record((Path(options.model.place) / "checkpoints" / str(run.step)).absolute())
    row, line = measure_held_out(made, run.parameters, run.step, trained.meta.get("frozen"))
    print(json.dumps({"run": options.model.place, "step": run.step, **row}) if options.json else line)


def _exams(options: EvaluateOptions) -> dict[str, Exam | None]:
    """The exam of each task; None: lm-eval has it."""
    from maxlm.evaluation.exams import first_questions, human_eval, human_eval_file, read_exam
    from maxlm.evaluation.suite import suite

    own = suite(options.seed)
    found: list[tuple[str, Exam | None]] = []
    for task in options.tasks:
        match task.partition(":"):
            case ("suite", "", _):
                found += own.items()
            case ("suite", _, name) if name in own:
                found.append((name, own[name]))
            case ("suite", _, name):
                raise UserError(f"--tasks {task}: the suite has {', '.join(own)}, not {name!r}")
            case ("humaneval", "", _):
                found.append((task, human_eval(human_eval_file())))
            case _ if task.endswith((".jsonl", ".jsonl.gz")):
                exam = read_exam(Path(task))
                found.append((exam.name, exam))
            case _:
                found.append((task.removeprefix("lm_eval:"), None))
    exams = {name: exam and first_questions(exam, options.limit) for name, exam in found}
    if len(exams) < len(found):
        raise UserError(f"--tasks {' '.join(options.tasks)}: two exams have one name; ask them one after the other")
    return exams


def _asking(options: EvaluateOptions) -> Asking:
    """How questions are put, and where demonstrations come from."""
    from maxlm.config import serialize
    from maxlm.evaluation.examining import Asking
    from maxlm.evaluation.exams import read_exam
    from maxlm.evaluation.prompting import Prompting, RandomDemonstrations
    from maxlm.evaluation.sandbox import Sandbox

    prompting = Prompting(demonstrations=RandomDemonstrations(count=options.few_shot) if options.few_shot else None)
    if options.prompting is not None:
        prompting = serialize.load(Prompting, Path(options.prompting))
    return Asking(
        prompting=prompting,
        pool=None if prompting.pool is None else read_exam(Path(prompting.pool)),
        samples=options.samples,
        ks=options.pass_at,
        seed=options.seed,
        judge=Sandbox() if options.allow_code else None,
    )


def _examine(options: EvaluateOptions, run: LoadedRun, exams: dict[str, Exam | None], asking: Asking) -> None:
    from maxlm.config import serialize
    from maxlm.evaluation.examining import Examined, examine
    from maxlm.evaluation.results import as_json, print_results, write_results
    from maxlm.evaluation.scoring import RunExaminee

    examinee = RunExaminee(run)
    results: dict[str, Examined] = {}
    if elsewhere := [name for name, exam in exams.items() if exam is None]:
        from maxlm.evaluation.harness import run_tasks  # lm-eval takes seconds to import

        results |= run_tasks(
            examinee,
            elsewhere,
            limit=options.limit,
            few_shot=options.few_shot or None,
            seed=options.seed,
            chat=options.chat,
            include_path=None if options.include_path is None else Path(options.include_path),
        )
    about = {"model": options.model.place, "step": run.step, "few_shot": options.few_shot, "seed": options.seed}
    about |= {"tasks": options.tasks, "limit": options.limit, "prompting": serialize.to_dict(asking.prompting)}
    for name, exam in exams.items():
        if exam is not None:
            results[name] = examine(examinee, exam, asking)
            if options.out is not None:  # the next one may go wrong; what a full disk says is said at the end
                with contextlib.suppress(OSError):
                    write_results(about, results, Path(options.out))
    measures = [one for result in results.values() for one in result.measures]
    if options.json:
        print(as_json(about, measures))
    else:
        print_results(measures)
    if options.out is not None:
        write_results(about, results, Path(options.out))


if __name__ == "__main__":
    run_command(main)
