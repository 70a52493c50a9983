"""What becomes of records of conversations, for people: tokens with their mask, counts, what is refused and why."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text as Line

from maxlm.config import Conversations
from maxlm.data.chat import ChatTemplate
from maxlm.data.conversation_formats import BadRecord, Example, read
from maxlm.data.conversations import encode
from maxlm.data.documents import Document
from maxlm.data.texts import Text
from maxlm.data.tokenizers import Tokenizer
from maxlm.surroundings import printable

_LISTED = 8
"""Kinds of refusals, and keys of prompts, that are listed, the most frequent first."""
_COUNTED, _CONTROL = ("bold green", "green"), "cyan"
"""Neighbours of the tokens that count have the two shades in turn."""
_MARK = {True: "+ ", False: "  "}
"""Before lines of what counts, and of what does not, where there are no colours."""


@dataclasses.dataclass
class Survey:
    """Of records that were read and encoded."""

    shown: list[tuple[str, list[Text]]] = dataclasses.field(default_factory=list)
    """The first records: where each stands, and its texts."""
    records: int = 0
    """Without those that were refused."""
    lengths: list[int] = dataclasses.field(default_factory=list)
    """Tokens of each text."""
    counted: int = 0
    """Tokens that count."""
    turns: Counter[str] = dataclasses.field(default_factory=Counter)
    """By role; a prompt's once, however many answers follow it."""
    keys: Counter[str] = dataclasses.field(default_factory=Counter)
    """Of the records; all of them, as those that judge answers may read any."""
    refused: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Reasons, without their numbers, and what was said of each record."""

    def add(self, place: str, record: Mapping[str, Any], found: Any, texts: list[Text], show: int) -> None:
        self.records += 1
        self.keys.update(record.keys())
        if len(self.shown) < show:
            self.shown.append((place, texts))
        self.lengths += [len(text.ids) for text in texts]
        self.counted += sum(sum(text.counts) for text in texts)
        if isinstance(found, Example):
            turns = [*found.prompt, *(turn for answer in found.answers for turn in answer.messages)]
            self.turns.update(turn["role"] for turn in turns)

    def refuse(self, place: str, reason: str) -> None:
        self.refused.setdefault(re.sub(r"\d+", "n", reason), []).append(f"{place}: {reason}")


def survey(
    documents: Iterable[Document],
    config: Conversations,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    show: int,
) -> Survey:
    """Read and encode every record, as `prepare` would.

    Args:
        documents: each a record in JSON.
        config: what the records are for.
        template: of their conversations.
        tokenizer: of the model.
        show: how many records to keep whole.
    """
    found, before = Survey(), None
    for document in documents:
        place = f"{document.file}:{document.row}"
        record: Mapping[str, Any] = json.loads(document.text)
        try:
            texts = encode(
                record, template, tokenizer, purpose=config.purpose, counted=config.counted, classes=config.classes,
                before=record if before is None else before, max_tokens=config.max_tokens,
            )  # fmt: skip
        except BadRecord as error:
            found.refuse(place, str(error))
            continue
        before = record
        found.add(place, record, read(record, config.purpose, config.classes), texts, show)
    return found


def report(console: Console, found: Survey, tokenizer: Tokenizer) -> None:
    """Print the records that were kept, then figures, then what was refused."""
    for place, texts in found.shown:
        for n, text in enumerate(texts):
            which = f", text {n + 1} of {len(texts)}" if len(texts) > 1 else ""
            about = f"{len(text.ids)} tokens"
            if any(text.counts):
                about += f", {sum(text.counts)} count, value {text.value:g}"
            console.print(Line(f"{place}{which}: {about}", style="bold"))
            console.print(painted(text, tokenizer) if console.is_terminal else Line(marked(text, tokenizer)))
            console.print()
    for line in figures(found):
        console.print(Line(line))


def figures(found: Survey) -> Iterator[str]:
    """Lines of counts and of refusals."""
    lengths, tokens = sorted(found.lengths), sum(found.lengths)
    yield f"{found.records:,} records, {len(lengths):,} texts, {tokens:,} tokens"
    if lengths:
        at = lambda share: f"{lengths[round(share * (len(lengths) - 1))]:,}"
        if found.counted:
            yield f"  {found.counted:,} count, {found.counted / tokens:.1%}"
        else:  # prompts
            yield "  keys: " + ", ".join(f"{printable(key[:40])} {count:,}" for key, count in found.keys.most_common(8))
        yield f"  tokens of a text: at least {at(0)}, median {at(0.5)}, 90% up to {at(0.9)}, at most {at(1)}"
    if found.turns:
        yield "  turns: " + ", ".join(f"{role} {count:,}" for role, count in sorted(found.turns.items()))
    if found.refused:
        kinds = sorted(found.refused.values(), key=lambda said: -len(said))
        yield f"{sum(map(len, kinds)):,} records refused:"
        yield from (f"  {len(said):,}: {printable(said[0])}" for said in kinds[:_LISTED])
        if left := sum(map(len, kinds[_LISTED:])):
            yield f"  {left:,}: for other reasons"


def marked(text: Text, tokenizer: Tokenizer) -> str:
    """The text in lines, those that count after a +."""
    lines, run = [], list[int]()
    for i, (token, counts) in enumerate(zip(text.ids, text.counts, strict=True)):
        run.append(token)
        if i + 1 == len(text.ids) or text.counts[i + 1] != counts:
            said = "".join(piece for _, piece in pieces(run, tokenizer)).removesuffix("\n")
            lines += [_MARK[counts] + line for line in said.split("\n")]
            run = []
    return "\n".join(lines)


def painted(text: Text, tokenizer: Tokenizer) -> Line:
    """The text in colours: each token that counts is green in its own shade, control tokens are cyan."""
    found, at, shade = Line(), 0, 0
    for ids, piece in pieces(text.ids, tokenizer):
        control = len(ids) == 1 and ids[0] in tokenizer.specials.values()
        if text.counts[at]:
            found.append(piece, style=f"{_COUNTED[shade % 2]}{' reverse' if control else ''}")
            shade += 1
        else:
            found.append(piece, style=_CONTROL if control else "dim")
        at += len(ids)
    return found


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[tuple[list[int], str]]:
    """Tokens with their text; those that only together spell a character are together. Control tokens have names."""
    names = {i: name for name, i in tokenizer.specials.items()}
    before, run = list[int](), list[int]()
    for n, i in enumerate(ids):
        if i in names:
            yield [i], names[i]
            before = []
            continue
        run.append(i)
        # After what is before it, as a tokenizer may leave out the space before a word that stands alone.
        said = tokenizer.decode([*before, *run])[len(tokenizer.decode(before)) :]
        if "\ufffd" in said and len(run) < 4 and n + 1 < len(ids) and ids[n + 1] not in names:
            continue
        yield run, printable(said)
        before, run = run, []
