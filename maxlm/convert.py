"""`python -m maxlm.convert --from hf:DIR --to run:DIR`: published models to run folders, and back."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import enum
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from maxlm.config import Files, UserError
from maxlm.config.cli import parse, run_command
from maxlm.config.fields import PathName, Positive, config
from maxlm.surroundings import give_back_freed_arrays

if TYPE_CHECKING:
    from maxlm.hub.converting import Opened

_DESCRIPTION = """Convert a model between a published folder (config.json and safetensors) and a run folder, or from a
GGUF file to either.

It ends with what it wrote: the number of parameters, a checksum of all of them and, where the package transformers is
installed, the largest difference of its logits to ours. On the way the vocabulary may grow or shrink."""


_TARGETS = {
    "hf": "hf:DIR (a published model)",
    "run": "run:DIR (a run folder)",
    "peft": "peft:DIR (an adapter, as the package peft has it)",
}
_SOURCES = _TARGETS | {"gguf": "gguf:FILE (a published model in one file)"}
_HAVE_MODELS = ("hf", "gguf", "run")


class FileDtype(enum.Enum):
    """Number formats of published weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class NewRows(enum.Enum):
    """What the rows of new tokens begin as."""

    SUBWORDS = "subwords"
    """The mean of the rows that spelled the token before (Gee et al. 2022, arXiv:2402.09977)."""
    MEAN = "mean"
    """The mean of all rows (Hewitt 2021)."""


@config("--")
class ConvertOptions:
    """From where, to where, and in which number format."""

    source: Annotated[str, tyro.conf.arg(name="from", metavar="hf:DIR|gguf:FILE|run:DIR|peft:DIR")]
    """The model: hf: and the folder of a published one, gguf: and a file of one, or run: and a run folder, or one of
    its checkpoints, run:RUN_DIR/checkpoints/STEP; or peft: and the folder of an adapter, with --base."""
    target: Annotated[str, tyro.conf.arg(name="to", metavar="hf:DIR|run:DIR|peft:DIR")]
    """A new folder. A run's parameters are float32, and can be asked, exported and started from. An adapter that the
    model has is merged with its base, but for peft:DIR, which has it alone."""
    base: Annotated[PathName | None, tyro.conf.arg(metavar="hf:DIR|gguf:FILE|run:DIR")] = None
    """The model that the adapter of --from peft:DIR was trained on. To run:DIR goes the adapter alone, which reads its
    base where that is."""
    dtype: FileDtype | None = None
    """Number format of the files of hf:DIR; None: that of the source, where float32 loses nothing of a run
    or of quantised weights."""
    add_tokens_of: PathName | None = None
    """Add the tokens that another tokenizer has and the model's has not, after those that are there: a tokenizer.json,
    a sentencepiece .model, or a folder with one."""
    new_rows: NewRows = NewRows.SUBWORDS
    """What their rows begin as."""
    keep_tokens_of: tyro.conf.UseAppendAction[tuple[PathName, ...]] = ()
    """Keep the tokens of these texts alone, beside special ones and single bytes: a file or folder, as maxlm.data reads
    it. Give it once for each."""
    drop_tokens: PathName | None = None
    """Or keep all tokens but those of this file, one a line, as the tokenizer's file spells them."""
    vocab_multiple: Positive[int] = 1
    """Where tokens change, fill the tables up to a multiple of it with rows that no id uses."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        given = [name for name in ("add_tokens_of", "keep_tokens_of", "drop_tokens") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]} change the vocabulary both; do one after the other")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a folder or an option does not fit.
    """
    options = parse(ConvertOptions, argv, prog="python -m maxlm.convert", description=_DESCRIPTION, flags=True)
    source_kind, source = _place("--from", options.source, _SOURCES)
    target_kind, target = _place("--to", options.target, _TARGETS)

    if target_kind != "hf" and options.dtype is not None:
        raise UserError("--dtype is of files of hf:DIR; all others have float32: leave it out")
    if (source_kind == "peft") != (options.base is not None):
        raise UserError("--base names the model under the adapter of --from peft:DIR; give both or neither")

    from maxlm.hub import adapted, converting  # imports jax: --help stays instant
    from maxlm.hub.folder import VOCABULARIES, require_new
    from maxlm.hub.models import KINDS

    require_new(target)
    give_back_freed_arrays()
    lines: list[str] = []
    if source_kind == "peft":
        _place("--base", options.base or "", {kind: _SOURCES[kind] for kind in _HAVE_MODELS})
        model, lines = adapted.open_on_base(source, options.base or "")
    elif source_kind == "run":
        model = converting.open_run(source)
    else:
        model = converting.open_published(KINDS[source_kind](source))
    if target_kind == "peft" or (source_kind, target_kind) == ("peft", "run"):
        if target_kind == "peft":
            lines = list(adapted.write_adapter(model, target))
        else:
            adapted.write_adapter_run(model, target)
        print("\n".join([f"{options.target} is written, the adapter alone", *lines]))
        return
    if model.model.adapter is not None:
        model = adapted.merge(model)
        print("\n".join([*lines, "the adapter is merged with its base"]))
    with tempfile.TemporaryDirectory() as scratch:
        model = _with_tokens(options, model, Path(scratch))
        if target_kind == "hf":
            converting.write_published(model, target, None if options.dtype is None else options.dtype.value)
        else:
            converting.write_run(model, target)
        print(f"{options.target} is written")
        if target_kind == "hf" and not any((target / name).is_file() for name in VOCABULARIES):
            print("it has no tokenizer, as there is no file of one to copy (the byte tokenizer has none)")
        if (source_kind, target_kind) != ("run", "run"):
            folder = target if target_kind == "hf" else source if source_kind == "hf" else None
            for line in converting.report(model, folder):
                print(line)


def _with_tokens(options: ConvertOptions, model: Opened, scratch: Path) -> Opened:
    """The model with the vocabulary that is asked for."""
    if not (options.add_tokens_of or options.keep_tokens_of or options.drop_tokens):
        return model

    from maxlm.data.documents import Unreadable
    from maxlm.data.sources import iterate_documents
    from maxlm.hub.resizing import Resizing

    resizing = Resizing(model, scratch, multiple=options.vocab_multiple)
    if options.add_tokens_of is not None:
        changed = resizing.extended(Path(options.add_tokens_of), mean_rows=options.new_rows is NewRows.MEAN)
    elif options.drop_tokens is not None:
        changed = resizing.pruned(resizing.all_but(Path(options.drop_tokens)))
    else:
        unreadable = Unreadable()
        documents = iterate_documents(Files(paths=options.keep_tokens_of), unreadable)
        changed = resizing.pruned(resizing.used_in(document.text for document in documents))
        if said := unreadable.summary():
            print(said)
    assert changed.tokenizer is not None
    print(
        f"{resizing.tokenizer.vocab_size:,} tokens before, {changed.tokenizer.vocab_size:,} now; "
        f"{changed.model.vocab_size:,} rows"
    )
    return changed


def _place(option: str, text: str, kinds: dict[str, str]) -> tuple[str, Path]:
    kind, colon, path = text.partition(":")
    if not colon or kind not in kinds or not path:
        raise UserError(f"{option} {text} must be {' or '.join(kinds.values())}")
    return kind, Path(path)


if __name__ == "__main__":
    run_command(main)
