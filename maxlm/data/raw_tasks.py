"""Tasks out of raw text, by its own connectives: what follows "because" answers a question (after arXiv:2309.09530).

No model is asked. Answers are words of the text itself.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

_SENTENCE = re.compile(r"(?<=[.!?])[ ]+(?=[A-Z\"'(])")
_LONG = 40
"""Letters of a sentence that says something."""
_TITLE = re.compile(r"\A\s*(?:#+ )?([^\n]{3,100}[^\n.!?:;,])\n\s*\n(.*)\Z", re.DOTALL)


class _Connective(NamedTuple):
    """Of a sentence with the one before it."""

    words: re.Pattern[str]
    asked: tuple[str, ...]


_CONNECTIVES = (
    _Connective(
        re.compile(r"(?:Therefore|Thus|Hence|Consequently|As a result),? (.+)"),
        ("{before}\n\nWhat follows from this?", "What can be concluded?\n\n{before}"),
    ),
    _Connective(
        re.compile(r"(?:However|Nevertheless|On the other hand),? (.+)"),
        ("{before}\n\nWhat speaks against this?", "Name what limits this statement: {before}"),
    ),
    _Connective(
        re.compile(r"(?:In other words|That is to say|To put it differently),? (.+)"),
        ("Say this in other words: {before}", "{before}\n\nHow else can this be said?"),
    ),
    _Connective(
        re.compile(r"(?:For example|For instance),? (.+)"),
        ("{before}\n\nGive an example.", "Give an example: {before}"),
    ),
)
_BECAUSE = re.compile(r"([A-Z].{15,}?),? because (.{15,})[.]")
_WHY = ("{before}.\n\nWhy?", "Why is this so? {before}.")
_GO_ON = ("Go on with this text:\n\n{before}", "{before}\n\nWhat comes next in this text?")
_NAME = ("Give this text a title.\n\n{before}", "{before}\n\nWhat is a good title for this?")
_WRITE = ("Write a text with the title {before}.", "{before}\n\nWrite the text that this is the title of.")


def tasks(text: str, seed: int | str = 0) -> Iterator[dict[str, str]]:
    """Prompts and completions that a text holds, at most one of each kind; none for a text without such places.

    Kinds: what follows a conclusion's, an objection's, a restatement's or an example's word; the reason after
    "because"; the rest of the text after about its half; its title from the text, and the text from its title.

    Args:
        text: of a document.
        seed: of the wording.
    """
    draw = random.Random(seed)
    asked = lambda wordings, before: draw.choice(wordings).replace("{before}", before)
    if titled := _TITLE.match(text):
        title, text = titled[1].strip(), titled[2].strip()
        if len(text) >= _LONG:
            yield {"prompt": asked(_NAME, text), "completion": title}
            yield {"prompt": asked(_WRITE, title), "completion": text}
    paragraphs = [_SENTENCE.split(" ".join(paragraph.split())) for paragraph in re.split(r"\n\s*\n", text)]
    pairs = [pair for sentences in paragraphs for pair in itertools.pairwise(sentences)]
    for words, wordings in _CONNECTIVES:
        for before, sentence in pairs:
            found = words.fullmatch(sentence)
            if found and len(before) >= _LONG and len(sentence) >= _LONG:
                yield {"prompt": asked(wordings, before), "completion": found[1][0].upper() + found[1][1:]}
                break
    for sentence in (sentence for sentences in paragraphs for sentence in sentences):
        if found := _BECAUSE.fullmatch(sentence):
            yield {"prompt": asked(_WHY, found[1]), "completion": f"Because {found[2]}."}
            break
    half = len(text) // 2
    if (end := re.compile(r"[.!?](?=\s)").search(text, half)) and len(rest := text[end.end() :].strip()) >= _LONG:
        yield {"prompt": asked(_GO_ON, text[: end.end()].strip()), "completion": rest}
