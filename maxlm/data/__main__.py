"""`python -m maxlm.data`: prepare data sets, weigh their mixture, train and compare tokenizers."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from maxlm.config import (
    Conversations,
    Counted,
    Documents,
    Files,
    PrepareConfig,
    Purpose,
    TokenizerSource,
    TrainSentencePiece,
    UserError,
)
from maxlm.config.cli import load_config, parse, parse_known, parse_run, run_command
from maxlm.config.fields import BelowOne, Filled, NotEmpty, NotNegative, PathName, Positive, Range, config
from maxlm.data.command_options import (
    ExtendTokenizer,
    Input,
    MixOptions,
    RegmixOptions,
    TokenizerReport,
    Train,
    WeighOptions,
)

if TYPE_CHECKING:
    from rich.table import Table

    from maxlm.data.cleaning.models_for_cleaning import Scorer, TextEmbedder
    from maxlm.evaluation.cleaning_models import RunModel

_PROG = "python -m maxlm.data"
EXIT_UNREADABLE = 3
"""What was asked for is done, but some documents could not be read and were passed over."""
_WIDTH = 160
"""Of tables where nobody looks at a terminal."""
_USAGE = f"""From documents to prepared folders of tokens.

{_PROG} clean PATH... --out DIR --recipe fineweb    drop and mend documents (docs/data_cleaning.md)
{_PROG} judge                            models by which `clean` judges documents
{_PROG} prepare PATH... --out DIR        tokenise files and folders (--help lists all keys)
{_PROG} prepare PATH... --out DIR --purpose sft    of conversations, preferences, classes (docs/posttrain.md)
{_PROG} prepare --config configs/x.py    prepare what a run's config names
{_PROG} mix --config configs/x.py        what a run reads of each data set, and how often (docs/mixing.md)
{_PROG} regmix --config configs/x.py --out FILE.jsonl    weights by small runs on random mixtures
{_PROG} weights DIR... --alpha 0.3       weights of prepared folders by their sizes
{_PROG} tokenizer train PATH... --out DIR --vocab_size 32000
{_PROG} tokenizer report PATH... --tokenizer DIR...
{_PROG} tokenizer extend --tokenizer DIR --from DIR... --out DIR
{_PROG} chat PATH... --tokenizer DIR     show conversations as tokens, and which of them count
{_PROG} build                            records of conversations from other data

Without PATH the documents are the Python standard library's own sources. --debug shows tracebacks.
Exit code: 0 all was read, {EXIT_UNREADABLE} done without the documents that cannot be read, 2 a mistake to mend, 1 a
failure."""
_TRAIN = "train"


@config("--")
class Records:
    """How records become texts."""

    template: NotEmpty[str] | None = Conversations.template
    """A built-in chat template (chatml, llama2, llama3, mistral, qwen, zephyr, plain, raw), or a file of Jinja2; None:
    that beside the tokenizer, or plain."""
    counted: Counted = Conversations.counted
    """Which tokens of a conversation are learned."""
    classes: tuple[str, ...] = Conversations.classes
    """Names of the classes, in the order of their numbers, where labels are names."""
    max_tokens: Positive[int] | None = Conversations.max_tokens
    """Longer conversations lose their oldest turns; None: none does. A prompt that is still too long is refused."""

    def conversations(self, paths: tuple[str, ...], pattern: str, purpose: Purpose) -> Conversations:
        return Conversations(
            paths=paths,
            pattern=pattern,
            purpose=purpose,
            template=self.template,
            counted=self.counted,
            classes=self.classes,
            max_tokens=self.max_tokens,
        )


@config("--")
class Prepare:
    """Where documents, tokenizer and shards are, and how they are cut."""

    input: tyro.conf.OmitArgPrefixes[Input] = field(default_factory=Input)
    """Which documents."""
    purpose: Purpose | None = None
    """The files have records (conversations and others, see docs/posttrain.md) that are read for this; None: texts."""
    records: tyro.conf.OmitArgPrefixes[Records] = field(default_factory=Records)
    """How records become texts."""
    out: PathName | None = None
    """Folder to write."""
    config: PathName | None = None
    """Prepare the data sets of this run's config instead; no other key goes with it."""
    tokenizer: PathName = _TRAIN
    """`train`, `bytes`, a .model file, a tokenizer.json, qwen.tiktoken, or a folder that `tokenizer train` wrote."""
    eos: NotEmpty[str] | None = None
    """The token of a tokenizer.json that ends a document; None: found by its name."""
    bos: str | None = None
    """The token of a tokenizer.json that begins a document; empty: none; None: found by its name."""
    train: TrainSentencePiece = field(default_factory=TrainSentencePiece)
    """How the tokenizer is trained."""
    validation_fraction: BelowOne = PrepareConfig.validation_fraction
    """Share of the documents held out; chosen by a hash of the text. Of a single document: of its text, at the end."""
    shard_tokens: Positive[int] = PrepareConfig.shard_tokens
    """Tokens in one shard file, about."""
    workers: Annotated[int, Range(ge=0, note="0 means one for each core")] = PrepareConfig.workers
    """Tokenising processes; 0: one for each core."""
    strict: bool = False
    """Stop at the first document that cannot be read, instead of counting it."""


@config("--")
class ShowChats:
    """Which conversations are shown, and what they are for."""

    paths: tyro.conf.Positional[Annotated[tuple[PathName, ...], Filled(note="name files or folders")]]
    """Files and folders."""
    tokenizer: PathName
    """`bytes`, a .model file, a tokenizer.json, a folder of a published model, or one that `tokenizer train` wrote."""
    show: NotNegative[int] = 3
    """Records whose tokens are shown."""
    purpose: Purpose = Conversations.purpose
    """What they are read for."""
    records: tyro.conf.OmitArgPrefixes[Records] = field(default_factory=Records)
    """How records become texts."""
    pattern: NotEmpty[str] = Conversations.pattern
    """Names taken from folders, as in the shell."""
    eos: NotEmpty[str] | None = None
    """The token of a tokenizer.json that ends a document; None: found by its name."""
    bos: str | None = None
    """The token of a tokenizer.json that begins a document; empty: none; None: found by its name."""


def main(argv: list[str]) -> int:
    arguments = [argument for argument in argv if argument != "--debug"]
    match arguments:
        case [] | ["-h" | "--help"] | ["tokenizer"] | ["tokenizer", "-h" | "--help"]:
            print(_USAGE)
            return 0
        case ["prepare", *rest]:
            unreadable = _prepare(rest)
        case ["tokenizer", "train", *rest]:
            description = "Train a tokenizer."
            unreadable = _train(
                parse(Train, rest, prog=f"{_PROG} tokenizer train", description=description, flags=True)
            )
        case ["tokenizer", "report", *rest]:
            description = "Measure how tokenizers compress, side by side."
            prog = f"{_PROG} tokenizer report"
            unreadable = _report(parse(TokenizerReport, rest, prog=prog, description=description, flags=True))
        case ["tokenizer", "extend", *rest]:
            description = "Add the tokens of other tokenizers to one, whose ids stay."
            prog = f"{_PROG} tokenizer extend"
            unreadable = _extend(parse(ExtendTokenizer, rest, prog=prog, description=description, flags=True))
        case ["mix", *rest]:
            unreadable = _mix(rest)
        case ["regmix", *rest]:
            unreadable = _regmix(rest)
        case ["weights", *rest]:
            description = "Weights of prepared folders, by their sizes to a power."
            unreadable = _weights(
                parse(WeighOptions, rest, prog=f"{_PROG} weights", description=description, flags=True)
            )
        case ["clean", *rest]:
            from maxlm.data.clean import main as clean

            unreadable = clean(rest, _Models())
        case ["judge", *rest]:
            from maxlm.data.text_judges import main as judge

            unreadable = judge(rest, _Models())
        case ["build", *rest]:
            from maxlm.data.build import main as build

            unreadable = build(rest)
        case ["chat", *rest]:
            description = "Show conversations as tokens, and which of them count."
            unreadable = _chat(parse(ShowChats, rest, prog=f"{_PROG} chat", description=description, flags=True))
        case _:
            words = " ".join(arguments[:2])
            raise UserError(
                f"unknown command {words!r}; use clean, judge, prepare, mix, regmix, weights, chat, build, or "
                "tokenizer train, report or extend"
            )
    return EXIT_UNREADABLE if unreadable else 0


class _Models:
    """Of runs, for steps of cleaning that ask a model."""

    def scorer(self, run: str) -> Scorer:
        return lambda texts: _model(run).score(texts)  # it is opened when it is asked, by the process that asks

    def embedder(self, run: str, fingerprint: str | None = None) -> TextEmbedder:
        return lambda texts: _model(run, fingerprint).embed(texts)

    def exact(self, run: str) -> tuple[str, str]:
        from maxlm.evaluation.cleaning_models import exact_run

        return exact_run(run)


@functools.cache
def _model(run: str, fingerprint: str | None = None) -> RunModel:
    from maxlm.evaluation.cleaning_models import RunModel  # here, so that cleaning without a model needs no jax

    return RunModel(run, fingerprint)


def _prepare(argv: list[str]) -> int:
    """Prepare, and say how many documents could not be read."""
    command = parse(Prepare, argv, prog=f"{_PROG} prepare", description="Tokenise documents.", flags=True)
    from maxlm.data.prepare import ensure_prepared, prepare  # here, so that --help is instant

    if command.config is not None:
        if command != Prepare(config=command.config):
            raise UserError(f"--config {command.config} says how to prepare the data; leave out all other keys")
        data = load_config(command.config).data
        ensure_prepared(data)
        return sum(_show(Path(dataset.path)) for dataset in data.datasets)
    if command.out is None:
        raise UserError("--out is missing; name the folder to write, for example --out data/mine")
    config = PrepareConfig(
        documents=_documents_of(command),
        tokenizer=_tokenizer_of(command),
        validation_fraction=command.validation_fraction,
        shard_tokens=command.shard_tokens,
        workers=command.workers,
        strict=command.strict,
    )
    prepare(config, Path(command.out))
    return _show(Path(command.out))


def _show(folder: Path) -> int:
    """Print the figures of a finished folder, and return how many documents could not be read."""
    from maxlm.data.shards import Split, open_prepared

    info = open_prepared(folder, verify=False).info
    print(f"{folder}: vocabulary {info.vocab_size:,}, tokenizer {info.tokenizer_fingerprint[:12]}, {info.dtype}")
    for split in Split:
        tokens, documents, size = info.tokens(split), info.documents(split), info.text_bytes(split)
        if info.purpose is Purpose.PROMPTS:
            print(f"  {split.value:<11}{documents:>12,} prompts {tokens:>16,} tokens")
            continue
        if info.of_records:
            print(f"  {split.value:<11}{documents:>12,} texts {tokens:>16,} tokens {size:>16,} bytes that count")
            continue
        ratio = f", {size / tokens:.3f} bytes/token" if tokens else ""
        print(f"  {split.value:<11}{documents:>12,} documents {tokens:>16,} tokens {size:>16,} bytes of text{ratio}")
    if info.cut_document is not None:
        print("  one document has most of the text: its end is what is held out")
    if info.unreadable or info.empty:
        print(f"  left out: {info.unreadable:,} unreadable and {info.empty:,} empty documents")
    return info.unreadable


def _train(command: Train) -> int:
    from maxlm.data.documents import Unreadable
    from maxlm.data.sources import iterate_documents
    from maxlm.data.train_tokenizer import sample_mixture, train_sentencepiece

    out, unreadable = _new(command.out), Unreadable()

    def texts(documents: Documents) -> Iterator[str]:
        return (document.text for document in iterate_documents(documents, unreadable, out))

    if command.weights:
        sets = [texts(replace(command.input, paths=(path,)).documents()) for path in command.input.paths]
        sampled = sample_mixture(sets, command.weights, command.sample_bytes, command.train.seed)
        sizes = [sum(len(line.encode()) for line in lines) for lines in sampled]
        for path, size in zip(command.input.paths, sizes, strict=True):
            print(f"{path}: {size:,} bytes, {size / max(1, sum(sizes)):.2%} of the sample")
        train_sentencepiece(command.train, (line for lines in sampled for line in lines), out)
    else:
        train_sentencepiece(command.train, texts(command.input.documents()), out)
    print(f"wrote {out}")
    report = TokenizerReport(input=command.input, tokenizer=(command.out,), max_bytes=command.max_bytes)
    _report(report, except_for=out)
    return unreadable.count


def _report(command: TokenizerReport, except_for: Path | None = None) -> int:
    from maxlm.data.documents import Unreadable
    from maxlm.data.named_tokenizer import named_tokenizer
    from maxlm.data.sources import first_bytes, iterate_documents
    from maxlm.data.tokenizer_report import as_json, first_of_each, lines_of, measure, short_names, table_of, tagged
    from maxlm.data.tokenizers import open_tokenizer

    tokenizers = [open_tokenizer(named_tokenizer(name, command.eos, command.bos)) for name in command.tokenizer]
    unreadable, documents = Unreadable(), command.input.documents()
    if command.by is not None:
        assert isinstance(documents, Files), "the options say so"
        chosen = first_of_each(tagged(documents, command.by, unreadable), command.max_bytes)
    else:
        chosen = first_bytes(iterate_documents(documents, unreadable, except_for), command.max_bytes)
    names, measured = short_names(command.tokenizer), measure(tokenizers, chosen)
    if command.json:
        print(json.dumps(as_json(names, tokenizers, measured)))
    else:
        _print(table_of(names, measured))
        print("\n".join(lines_of(names, tokenizers)))
    if summary := unreadable.summary():
        print(summary, file=sys.stderr)
    return unreadable.count


def _extend(command: ExtendTokenizer) -> int:
    """Write a tokenizer with the tokens of others, and say how many they are."""
    from maxlm.data.named_tokenizer import named_tokenizer
    from maxlm.data.tokenizers import open_tokenizer
    from maxlm.hub.token_sets import TokenSet

    out = _new(command.out)
    tokenizer = open_tokenizer(named_tokenizer(command.tokenizer, command.eos, command.bos))
    tokens = TokenSet.read(Path(command.tokenizer))
    for name in command.more:
        tokens = replace(tokens, definition=tokens.extended(TokenSet.read(Path(name))).definition)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, tokens.file.name)
        file.write_bytes(tokens.definition)
        ends: tuple[str | None, str | None] = (None, None)
        if tokens.is_json:
            bos = "" if tokenizer.bos_id is None else tokenizer.name_of(tokenizer.bos_id)
            ends = (tokenizer.name_of(tokenizer.eos_id), bos)
        extended = open_tokenizer(named_tokenizer(str(file), *ends))
    extended.save(out)
    new = extended.vocab_size - tokenizer.vocab_size
    print(f"{out}: {tokenizer.vocab_size:,} ids stay, {new:,} are new, fingerprint {extended.fingerprint}")
    return 0


def _mix(argv: list[str]) -> int:
    """Say what a run reads of its data sets."""
    prog, description = f"{_PROG} mix", "What a run reads of each of its data sets, and how often."
    options, rest = parse_known(MixOptions, argv, prog=prog, description=description)
    asked = parse_run(rest, prog=prog, description=description)
    from maxlm.data.mixture_table import as_json, capped, notes_on, tables_of, use_of
    from maxlm.data.shards import read_info

    for dataset in asked.config.data.datasets:
        if dataset.prepare is not None and read_info(Path(dataset.path)) is None:
            raise UserError(f"{dataset.path}: is not prepared yet; {_PROG} prepare --config FILE does it")
    use = use_of(asked.config)
    notes = notes_on(use, most_epochs=options.most_epochs, least_epochs=options.least_epochs)
    weights = None if options.cap is None else capped(use, options.cap)
    if options.json:
        print(json.dumps(as_json(use, notes) | ({} if weights is None else {"capped_weights": weights})))
        return 0
    for table in tables_of(use):
        _print(table)
    print(f"{use.budget:,} tokens in {asked.config.train.steps:,} steps")
    print("".join(f"note: {line}\n" for line in notes), end="")
    if weights is not None:
        print(f"weights with at most {options.cap:g} epochs of each: ({', '.join(f'{one:.6g}' for one in weights)})")
    return 0


def _regmix(argv: list[str]) -> int:
    """Try mixtures in small runs, and say which weights a law of them likes best."""
    prog = f"{_PROG} regmix"
    description = (
        "Small runs of a config on random mixtures of its data sets, and the weights that a law of them likes."
    )
    options, rest = parse_known(RegmixOptions, argv, prog=prog, description=description)
    asked = parse_run(rest, prog=prog, description=description)
    from maxlm.compile_cache import enable_compilation_cache
    from maxlm.recipes.mixture_search import as_json, lines_of, search, table_of

    enable_compilation_cache()
    found = search(
        asked.config,
        runs=options.runs,
        rounds=options.rounds,
        file=Path(options.out),
        targets=options.targets,
        seed=options.seed,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if options.json:
        print(json.dumps(as_json(found)))
        return 0
    _print(table_of(found))
    print("\n".join(lines_of(found)))
    return 0


def _weights(command: WeighOptions) -> int:
    """Say how folders are weighed by their sizes."""
    from maxlm.data.size_weights import table_of, weigh

    found = weigh(command.folders, command.alpha, command.tokens, command.cap)
    if command.json:
        print(json.dumps(asdict(found)))
    else:
        _print(table_of(found))
    return 0


def _new(name: str) -> Path:
    out = Path(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already and not empty; name a new folder")
    return out


def _print(table: Table) -> None:
    from maxlm import surroundings

    surroundings.console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH).print(table)


def _chat(command: ShowChats) -> int:
    """Show conversations, and say how many records could not be read or are refused."""
    from maxlm import surroundings
    from maxlm.data.chat_report import report, survey
    from maxlm.data.chat_templates import choose_template
    from maxlm.data.documents import Unreadable
    from maxlm.data.named_tokenizer import named_tokenizer
    from maxlm.data.sources import iterate_documents
    from maxlm.data.tokenizers import open_tokenizer

    path, unreadable = Path(command.tokenizer), Unreadable()
    folder = path if path.is_dir() else path.parent
    tokenizer = open_tokenizer(named_tokenizer(command.tokenizer, command.eos, command.bos))
    config = command.records.conversations(command.paths, command.pattern, command.purpose)
    template = choose_template(config.template, tokenizer, folder)
    found = survey(iterate_documents(config, unreadable), config, template, tokenizer, command.show)
    report(surroundings.console(highlight=False, soft_wrap=True), found, tokenizer)
    if summary := unreadable.summary():
        print(summary, file=sys.stderr)
    return unreadable.count + sum(map(len, found.refused.values()))


def _documents_of(command: Prepare) -> Documents:
    if command.purpose is None:
        if command.records != Records():
            raise UserError("--template, --counted, --classes and --max_tokens are of records; say --purpose sft, too")
        return command.input.documents()
    if not command.input.paths or command.input != Input(paths=command.input.paths, pattern=command.input.pattern):
        raise UserError(f"--purpose {command.purpose.value}: records come from files; name them, and nothing else")
    return command.records.conversations(command.input.paths, command.input.pattern, command.purpose)


def _tokenizer_of(command: Prepare) -> TokenizerSource:
    if command.tokenizer != _TRAIN:
        from maxlm.data.named_tokenizer import named_tokenizer

        return named_tokenizer(command.tokenizer, command.eos, command.bos)
    if command.eos is not None or command.bos is not None:
        raise UserError("--eos and --bos name tokens of a tokenizer.json; name it by --tokenizer, or leave them out")
    return command.train


if __name__ == "__main__":
    run_command(main)
