"""`python -m maxlm.chat --hf DIR`: talk with a model in the terminal."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import contextlib
import json
import queue
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from maxlm.config import ChosenModel, DocumentsConfig, EngineConfig, SamplingConfig, Speculation, UserError
from maxlm.config.cli import parse, run_command
from maxlm.config.fields import Positive, Seed, config
from maxlm.surroundings import printable

if TYPE_CHECKING:
    from maxlm.data.passages import Passage
    from maxlm.inference.request import Delta
    from maxlm.serving.served import Served

_DESCRIPTION = """Talk with a model in the terminal.

/reset begins anew, /system TEXT tells the model what it is, /save FILE writes the conversation as JSON, /help lists
these, /exit or Ctrl-D ends. Ctrl-C stops an answer. Exit code 2: one line says what was wrong."""
_HELP = "/reset  /system TEXT  /save FILE  /help  /exit"


@config("--")
class ChatOptions:
    """With which model, and how it answers."""

    model: Annotated[ChosenModel, tyro.conf.arg(name="")]
    """Which model; a run must have been made from a published model."""
    system: str = ""
    """What the model is told before all."""
    max_new_tokens: Positive[int] = 512
    """Length of an answer at most."""
    documents: Annotated[DocumentsConfig, tyro.conf.arg(name="")] = DocumentsConfig()
    """What questions are answered from."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig(temperature=0.7, top_p=0.95)
    """How the next token is drawn."""
    seed: Seed | None = None
    """The same seed gives the same answers; None: another one each time."""
    speculation: Speculation | None = None
    """Where drafts come from, which make it faster and change no answer: lookup, or draft:run=DIR."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: the model or an option does not fit, or the model has no chat template.
    """
    options = parse(ChatOptions, argv, prog="python -m maxlm.chat", description=_DESCRIPTION, flags=True)

    from maxlm.compile_cache import enable_compilation_cache  # these import jax: --help stays instant
    from maxlm.hub.models import load_chosen, load_draft
    from maxlm.serving.loading import serve_model

    enable_compilation_cache()
    run = load_chosen(options.model)
    if run.chat is None:
        raise UserError("this model has no chat template; continue texts with python -m maxlm.generate")
    engine = EngineConfig(slots=1, speculation=options.speculation)
    [served] = serve_model(
        run,
        "model",
        engine,
        options.model.weights,
        draft=load_draft(options.speculation),
        documents=options.documents,
    ).values()
    talk(served, options, _typed)


def talk(served: Served, options: ChatOptions, read: Callable[[], str]) -> None:
    """Ask and answer until there is nothing more to read."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    system, turns = options.system, list[dict[str, str]]()
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        word, _, rest = line.partition(" ")
        match word:
            case "":
                continue
            case "/exit":
                return
            case "/help":
                console.print(_HELP, markup=False)
            case "/reset":
                turns = []
            case "/system":
                system, turns = rest.strip(), []
            case "/save":
                _save(console, Path(rest.strip()), _messages(system, turns))
            case _ if word.startswith("/") and "/" not in word[1:] and word[1:].isalpha():
                console.print(f"{word} is no command; there are {_HELP}", markup=False)
            case _:
                asked = [*turns, {"role": "user", "content": line}]
                deltas: queue.SimpleQueue[Delta | None] = queue.SimpleQueue()
                try:
                    with _interrupts(deltas):
                        answer = _answer(console, served, options, _messages(system, asked), deltas)
                except UserError as error:
                    console.print(f"error: {error}", markup=False, style="red")
                    continue
                turns = [*asked, {"role": "assistant", "content": answer}]


def _typed() -> str:
    try:
        return input("> ")
    except KeyboardInterrupt:  # meant for an answer that has just ended
        print()
        return ""


def _messages(system: str, turns: list[dict[str, str]]) -> list[dict[str, str]]:
    return [*([{"role": "system", "content": system}] if system else []), *turns]


def _answer(
    console: Any,
    served: Served,
    options: ChatOptions,
    messages: list[dict[str, str]],
    deltas: queue.SimpleQueue[Delta | None],
) -> str:
    """`deltas`: a None in it ends the answer."""
    from maxlm.inference.request import Finish, Request

    assert served.chat is not None
    messages, sources = _with_documents(served, messages)
    ids = served.chat.encode(served.tokenizer, messages).ids
    left = served.max_length - len(ids)
    if left < 1:
        limit = served.max_length
        raise UserError(f"the conversation has {len(ids)} tokens, the model is meant for {limit}; use /reset")
    request = Request(
        prompt=tuple(ids),
        max_new_tokens=min(options.max_new_tokens, left),
        sampling=options.sampling,
        seed=secrets.randbits(32) if options.seed is None else options.seed,
        ends=served.ends.last,
    )
    text, n, first, last = "", 0, 0.0, 0.0
    ticket = served.loop.submit(request, deltas.put)
    while True:
        if (delta := deltas.get()) is None:
            served.loop.cancel(ticket)
            continue
        now = time.monotonic()
        if delta.tokens and not n:
            first = now
        n, last, text = n + len(delta.tokens), now, text + delta.text
        console.print(printable(delta.text), end="", markup=False)
        if delta.finish in (Finish.ERROR, Finish.NOTHING_FITS):
            raise UserError(delta.error or "the engine failed")
        if delta.finish is not None:
            break
    speed = f", {(n - 1) / (last - first):.1f} tokens/s" if n > 1 and last > first else ""
    console.print(f"\n[{n} tokens{speed}, {len(ids)} before them]", markup=False, style="dim")
    for n, source in enumerate(sources, start=1):
        console.print(printable(f"[{n}] {source.place}"), markup=False, style="dim")
    return text


@contextlib.contextmanager
def _interrupts(deltas: queue.SimpleQueue[Delta | None]) -> Iterator[None]:
    """Ctrl-C is a None in the queue, and breaks nothing off, wherever the block is."""
    before = signal.signal(signal.SIGINT, lambda *_: deltas.put(None))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _with_documents(served: Served, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], Sequence[Passage]]:
    """With sources before the question, which is the last message; none of earlier questions."""
    if served.documents is None:
        return messages, ()
    from maxlm.inference.retrieval import with_sources

    text, found = with_sources(served.documents, messages[-1]["content"], room=served.max_length // 2)
    return [*messages[:-1], {**messages[-1], "content": text}], found


def _save(console: Any, path: Path, messages: list[dict[str, str]]) -> None:
    try:
        path.write_text(json.dumps({"messages": messages}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        console.print(f"error: {path}: cannot be written ({error.strerror})", markup=False, style="red")
    else:
        console.print(f"{len(messages)} messages in {path}", markup=False)


if __name__ == "__main__":
    run_command(main)
