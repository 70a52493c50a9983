"""From documents to a folder of token shards: the same bytes however many workers, however often interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import Progress, TextColumn, TimeElapsedColumn

from maxlm.config import (
    Conversations,
    DataConfig,
    HuggingFaceTokenizer,
    PrepareConfig,
    SentencePieceTokenizer,
    TrainSentencePiece,
    UserError,
    serialize,
)
from maxlm.data.chat import save_chat_template
from maxlm.data.chat_templates import choose_template
from maxlm.data.claimed import LOCK, claimed, differences, write_json
from maxlm.data.dealing import Reader, Splitter, State
from maxlm.data.documents import Unreadable
from maxlm.data.encoders import ends_of_answers, open_encoder
from maxlm.data.shards import CHAT, RECORD, TOKENIZER, UNFINISHED, DatasetInfo, not_finished, read_info, token_dtype
from maxlm.data.sources import describe_documents, iterate_documents
from maxlm.data.tokenizers import Tokenizer, load_tokenizer, open_tokenizer
from maxlm.data.train_tokenizer import train_sentencepiece
from maxlm.data.workers import tokenise_blocks
from maxlm.surroundings import console, usable_cores

_PROGRESS = "progress.json"
_SECONDS_BETWEEN_RECORDS = 5.0
_BEGINNINGS = {LOCK, UNFINISHED + ".partial"}


def prepare(config: PrepareConfig, out: Path) -> DatasetInfo:
    """Tokenise all documents into shards in `out`; a finished `out` of the same config is returned as it is.

    A document belongs to the validation split if a hash of its text, as a fraction of all 64-bit numbers, is below
    `validation_fraction`. If that takes none, the document with the smallest hash is held out; of one that has nine
    tenths of all tokens, the last part.

    Killed at any moment and called again, it continues; the final bytes depend only on the documents and the config
    without `workers` and `strict`. Memory: a few blocks of a megabyte for each worker and the longest document; while
    a tokenizer is trained, its sample of lines.

    Raises:
        UserError: a source cannot be read, there are no documents, `out` holds something else or cannot be written.
    """
    if (info := _finished(config, out)) is not None:
        return info
    try:
        out.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(out)
        with claimed(out, "prepares"):
            if (info := _finished(config, out)) is not None:  # by the process we waited for
                return info
            _claim(config, out)
            tokenizer = _tokenizer(config, out)
            _put_template(config, out, tokenizer)
            info = _run(config, out, tokenizer)
            write_json(out / RECORD, serialize.to_dict(info))
            for name in (_PROGRESS, UNFINISHED, LOCK):
                (out / name).unlink(missing_ok=True)
            return info
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: cannot be written ({error.strerror}); make room or choose another folder, then "
            "run the same command again to continue"
        ) from error


def ensure_prepared(config: DataConfig) -> None:
    """Prepare the data sets that are not yet there and say how (`Dataset.prepare`).

    Raises:
        UserError: a folder is missing and nothing says how to make it, or it was made with another config.
    """
    for dataset in config.datasets:
        folder = Path(dataset.path)
        finished = (folder / RECORD).exists()
        if dataset.prepare is not None:
            if not finished:
                print(f"preparing {folder} from {describe_documents(dataset.prepare.documents)}", flush=True)
            prepare(dataset.prepare, folder)
        elif not finished:
            raise not_finished(folder)


def _finished(config: PrepareConfig, out: Path) -> DatasetInfo | None:
    info = read_info(out)
    if info is not None:
        _check_same(config, info.prepare, out)
    return info


def _deciding(config: PrepareConfig) -> PrepareConfig:
    """The config without what has no influence on the bytes written, as it is recorded."""
    return dataclasses.replace(config, workers=PrepareConfig.workers, strict=PrepareConfig.strict)


def _check_same(config: PrepareConfig, there: PrepareConfig, out: Path) -> None:
    """Refuse a folder made with another config."""
    if changes := differences(serialize.flatten(there), serialize.flatten(_deciding(config))):
        raise UserError(
            f"{out}: was prepared with {changes}; name another folder, or delete this one to prepare it again; "
            "to train on it as it is, leave out how to prepare it (--data.datasets.0.prepare None)"
        )


def _refuse_foreign(out: Path) -> None:
    """Refuse a folder that holds anything but the beginnings of a data set."""
    if not (out / UNFINISHED).exists() and (foreign := sorted({path.name for path in out.iterdir()} - _BEGINNINGS)):
        raise UserError(
            f"{out}: is not empty (it holds {foreign[0]}) and is no data set; name an empty or a new folder"
        )


def _claim(config: PrepareConfig, out: Path) -> None:
    """Put the config down in `out`. Only an earlier one from which documents have been written stands against it."""
    if (out / _PROGRESS).exists():
        _check_same(config, serialize.load(PrepareConfig, out / UNFINISHED), out)
    else:  # nothing ties a tokenizer that is there to this config and this input
        for name in (TOKENIZER, CHAT):
            shutil.rmtree(out / name, ignore_errors=True)
    write_json(out / UNFINISHED, serialize.to_dict(_deciding(config)))


def _warn(text: str) -> None:
    console(stderr=True).print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _tokenizer(config: PrepareConfig, out: Path) -> Tokenizer:
    """The tokenizer in `out`, put there or trained first if need be."""
    folder = out / TOKENIZER
    if isinstance(config.tokenizer, TrainSentencePiece):
        if folder.exists():
            return load_tokenizer(folder)
        found = iterate_documents(config.documents, Unreadable(config.strict), out)
        of_records = isinstance(config.documents, Conversations)
        texts = (_words(json.loads(one.text)) if of_records else one.text for one in found)
        return train_sentencepiece(config.tokenizer, texts, folder)
    tokenizer = open_tokenizer(config.tokenizer)
    if not folder.exists():
        tokenizer.save(folder)
    elif load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{folder}: the tokenizer that prepare.tokenizer names has changed since; delete {out} to begin again"
        )
    return tokenizer


def _words(value: Any) -> str:
    """All text in a record, line by line."""
    if isinstance(value, str):
        return value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return "\n".join(filter(None, map(_words, inner)))


def _put_template(config: PrepareConfig, out: Path, tokenizer: Tokenizer) -> None:
    """The chat template in `out`, put there if need be."""
    if not isinstance(config.documents, Conversations) or (out / CHAT).exists():
        return
    beside = None
    if isinstance(config.tokenizer, SentencePieceTokenizer | HuggingFaceTokenizer):
        beside = Path(config.tokenizer.path).parent
    template = choose_template(config.documents.template, tokenizer, beside)
    save_chat_template(template, out / CHAT, ends_of_answers(template, tokenizer))


def _run(config: PrepareConfig, out: Path, tokenizer: Tokenizer) -> DatasetInfo:
    state = serialize.load(State, out / _PROGRESS) if (out / _PROGRESS).exists() else State()
    unreadable = Unreadable(config.strict)
    dealing = Splitter(config, out, open_encoder(out), tokenizer.vocab_size, state)
    with contextlib.closing(dealing) as splitter, _progress() as show:
        reader = Reader(config, out, unreadable, state, splitter.take_back_reserve)
        workers = config.workers or usable_cores()
        documents, recorded = state.documents, time.monotonic()
        for block, tokenised in tokenise_blocks(out, reader.blocks(), workers):
            splitter.add(block, tokenised)
            for number, reason in tokenised.refused:
                unreadable.report(*block.places[number], reason)
            documents = block.first + len(block.texts)
            show(documents, splitter.tokens, unreadable.count)
            if time.monotonic() - recorded >= _SECONDS_BETWEEN_RECORDS:
                write_json(out / _PROGRESS, serialize.to_dict(splitter.state(documents, block.digest)))
                recorded = time.monotonic()
        train, validation = splitter.finish()
    if not documents:
        reasons = (
            f"; {unreadable.count} documents cannot be read, first {unreadable.examples[0]}" if unreadable.count else ""
        )
        raise UserError(f"{describe_documents(config.documents)}: holds no text{reasons}")
    if not train and not validation:
        raise UserError(
            f"{describe_documents(config.documents)}: none of {documents} records can be learned from; "
            f"first {unreadable.examples[0]}"
        )
    if not train:
        raise UserError(
            f"prepare.validation_fraction = {config.validation_fraction} leaves none of {documents} documents to "
            "train on; use a smaller one"
        )
    n_train, n_validation = (sum(shard.tokens for shard in shards) for shards in (train, validation))
    if not validation and config.validation_fraction:
        _warn(
            "a single, short document: nothing is held out; prepare more text, use a larger --validation_fraction, or "
            "train with --train.eval_batches 0"
        )
    if n_validation > n_train and config.validation_fraction < 0.5:
        _warn(
            f"few documents: those held out by their hash have {n_validation:,} tokens, more than the {n_train:,} to "
            "train on; cut the documents into more files, or try another --validation_fraction"
        )
    if summary := unreadable.summary():
        _warn(summary)
    return DatasetInfo(
        prepare=_deciding(config),
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size).name,
        text_sha256=reader.digest.hexdigest(),
        unreadable=unreadable.count,
        empty=reader.empty,
        train=train,
        validation=validation,
        cut_document=splitter.cut,
        tokens_in_all=n_train + n_validation,
        documents_in_all=sum(shard.documents for shard in (*train, *validation)),
    )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, int], None]]:
    """A line on the terminal that a call with documents, tokens and unreadable documents brings up to date."""
    terminal = console(stderr=True)
    columns = TextColumn("{task.fields[line]}"), TimeElapsedColumn()
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True) as progress:
        task = progress.add_task("", line="reading")
        began, tokens_before = time.monotonic(), None

        def show(documents: int, tokens: int, unreadable: int) -> None:
            nonlocal tokens_before
            tokens_before = tokens if tokens_before is None else tokens_before
            rate = (tokens - tokens_before) / max(1e-9, time.monotonic() - began)
            passed_over = f", {unreadable:,} unreadable" if unreadable else ""
            progress.update(task, line=f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s{passed_over}")

        yield show
