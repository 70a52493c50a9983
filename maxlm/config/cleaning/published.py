"""Pipelines of papers: their rules for one document. Duplicates, personal data and models are steps to add behind."""

from __future__ import annotations

import difflib
import enum
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

from maxlm.config.cleaning.cleaning_pipeline import CleaningPipeline, CleaningStep
from maxlm.config.cleaning.rule_steps import (
    ChineseQuality,
    CodeQuality,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    Languages,
    Licences,
)
from maxlm.config.cleaning.source_steps import AnswersByScore, CodeHeader, GutenbergText, LatexToText, WikiText
from maxlm.config.cleaning.text_steps import C4Lines, HtmlToText, NormaliseUnicode, RepairUnicode
from maxlm.config.errors import UserError

_PAGE = (HtmlToText(), RepairUnicode(), NormaliseUnicode())
"""What stands before any rule: text as its author saw it."""
_PLAIN = (RepairUnicode(), NormaliseUnicode())


class LlamaSource(enum.Enum):
    """Kinds of sources in LLaMA's table 1; CommonCrawl is cleaned by models and duplicates alone (CCNet)."""

    C4 = "c4"
    GITHUB = "github"
    WIKIPEDIA = "wikipedia"
    BOOKS = "books"
    ARXIV = "arxiv"
    STACK_EXCHANGE = "stackexchange"


def gopher() -> CleaningPipeline:
    """MassiveText's web pages (arXiv:2112.11446, appendix A.1.1): quality, then repetition."""
    return CleaningPipeline(steps=(*_PAGE, Languages(), GopherQuality(), GopherRepetition()))


def c4() -> CleaningPipeline:
    """arXiv:1910.10683, section 2.2, where langdetect must be 0.99 sure of English. Its list of bad words is no part of
    this package: `WordList(file=...)` comes first among the rules."""
    return CleaningPipeline(steps=(*_PAGE, Languages(least=0.99), C4Lines(terminal_punctuation=True)))


def fineweb() -> CleaningPipeline:
    """arXiv:2406.17557, section 3, in the order of the code that made it. Its list of addresses is no part of this
    package: `UrlList(file=...)` comes first."""
    return CleaningPipeline(
        steps=(*_PAGE, Languages(), GopherRepetition(), GopherQuality(), C4Lines(), FineWebQuality())
    )


def llama(source: LlamaSource) -> CleaningPipeline:
    """arXiv:2302.13971, section 2.1, for one of its sources."""
    steps: Mapping[LlamaSource, tuple[CleaningStep, ...]] = {
        LlamaSource.C4: (Languages(), C4Lines(terminal_punctuation=True)),
        LlamaSource.GITHUB: (Licences(), CodeHeader(), CodeQuality()),
        LlamaSource.WIKIPEDIA: (WikiText(),),
        LlamaSource.BOOKS: (GutenbergText(),),
        LlamaSource.ARXIV: (LatexToText(),),
        LlamaSource.STACK_EXCHANGE: (AnswersByScore(),),
    }
    return CleaningPipeline(steps=(*_PLAIN, *steps[source]))


def code() -> CleaningPipeline:
    """Source files as in The Stack and StarCoder 2 (see `CodeQuality`). A licence that is known must ask for little."""
    return CleaningPipeline(steps=(*_PLAIN, Licences(unknown=True), CodeQuality()))


def zh() -> CleaningPipeline:
    """Chinese web pages (see `ChineseQuality`). Gopher's rules for lines and paragraphs, but not for n-grams: a run of
    5 characters is but two or three words. Baichuan 2 (arXiv:2309.10305, section 2.1) adds duplicates of sentences."""
    of_lines = GopherRepetition(
        **dict.fromkeys((f"most_top_{n}gram" for n in range(2, 5)), 1.0),
        **dict.fromkeys((f"most_duplicate_{n}grams" for n in range(5, 11)), 1.0),
    )
    return CleaningPipeline(steps=(*_PAGE, Languages(languages=("zh",)), ChineseQuality(), of_lines))


RECIPES: Mapping[str, Callable[[], CleaningPipeline]] = MappingProxyType(
    {"fineweb": fineweb, "gopher": gopher, "c4": c4, "code": code, "zh": zh}
    | {f"llama_{source.value}": functools.partial(llama, source) for source in LlamaSource}
)
"""By the name that the command line takes."""


def cleaning_recipe(name: str) -> CleaningPipeline:
    """The pipeline of that name.

    Raises:
        UserError: there is none.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"--recipe {name}: must be one of {', '.join(RECIPES)}{hint}")
    return RECIPES[name]()
