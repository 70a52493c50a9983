"""Pipelines of papers: rules, duplicates, personal data. Models that judge documents are steps to add."""

from __future__ import annotations

import difflib
import enum
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

from maxlm.config.cleaning.cleaning_pipeline import CleaningPipeline, CleaningStep
from maxlm.config.cleaning.duplicate_steps import ExactDocuments, ExactSpans, Ignoring, NearDuplicates, SpanUnit
from maxlm.config.cleaning.private_steps import Masks, PersonalData, Treatment
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
_C4_LINES = C4Lines(terminal_punctuation=True, least_words=5, least_sentences=3)
"""The numbers of C4's own code (tensorflow_datasets/text/c4_utils.py); datatrove has 3 words and 5 sentences."""


class LlamaSource(enum.Enum):
    """Kinds of sources in LLaMA's table 1."""

    COMMON_CRAWL = "commoncrawl"
    C4 = "c4"
    GITHUB = "github"
    WIKIPEDIA = "wikipedia"
    BOOKS = "books"
    ARXIV = "arxiv"
    STACK_EXCHANGE = "stackexchange"


def gopher() -> CleaningPipeline:
    """MassiveText's web pages (arXiv:2112.11446, appendix A.1.1): quality, repetition, then documents that are equal,
    or have a Jaccard similarity of 0.8 and more in 13-grams. The bands that find these are FineWeb's."""
    return CleaningPipeline(
        steps=(
            *(*_PAGE, Languages(), GopherQuality(), GopherRepetition()),
            *(ExactDocuments(), NearDuplicates(words=13, least_similarity=0.8)),
        )
    )


def c4() -> CleaningPipeline:
    """arXiv:1910.10683, section 2.2, where langdetect must be 0.99 sure of English; fastText, which is never so sure,
    must be as sure as in FineWeb. Its list of bad words is no part of this package: `WordList(file=...)` comes first
    among the rules."""
    return CleaningPipeline(
        steps=(
            *(*_PAGE, Languages(), _C4_LINES),
            ExactSpans(unit=SpanUnit.SENTENCE, span=3),
        )
    )


def fineweb() -> CleaningPipeline:
    """arXiv:2406.17557, section 3, in the order of the code that made it. Its list of addresses is no part of this
    package: `UrlList(file=...)` comes first. Near duplicates are those of all that is cleaned together; FineWeb took
    each crawl by itself (section 3.4)."""
    keep = Treatment.KEEP
    return CleaningPipeline(
        steps=(
            *(*_PAGE, Languages(), GopherRepetition(), GopherQuality(), C4Lines(), FineWebQuality()),
            NearDuplicates(),
            PersonalData(phone=keep, card=keep, iban=keep, id_number=keep, secret=keep, masks=Masks.FINEWEB),
        )
    )


def llama(source: LlamaSource) -> CleaningPipeline:
    """arXiv:2302.13971, section 2.1, for one of its sources. Of CommonCrawl, cleaned by CCNet, the two models are to be
    added: perplexity, and whether Wikipedia's references have such pages."""
    steps: Mapping[LlamaSource, tuple[CleaningStep, ...]] = {
        LlamaSource.COMMON_CRAWL: (ExactSpans(unit=SpanUnit.LINE, ignoring=Ignoring()), Languages(least=0.5)),
        LlamaSource.C4: (Languages(), _C4_LINES),
        LlamaSource.GITHUB: (Licences(), CodeHeader(), CodeQuality(), ExactDocuments()),
        LlamaSource.WIKIPEDIA: (WikiText(),),
        LlamaSource.BOOKS: (GutenbergText(), NearDuplicates(least_similarity=0.9)),
        LlamaSource.ARXIV: (LatexToText(),),
        LlamaSource.STACK_EXCHANGE: (AnswersByScore(),),
    }
    return CleaningPipeline(steps=(*_PLAIN, *steps[source]))


def code() -> CleaningPipeline:
    """Source files as in The Stack and StarCoder 2 (see `CodeQuality`), which keep one of files with a similarity of
    0.7 and more in 5-grams. A licence that is known must ask for little. Keys and addresses are masked."""
    return CleaningPipeline(
        steps=(
            *(*_PLAIN, Licences(unknown=True), CodeQuality()),
            *(NearDuplicates(bands=20, rows=5, least_similarity=0.7), PersonalData()),
        )
    )


def zh() -> CleaningPipeline:
    """Chinese web pages (see `ChineseQuality`). Gopher's rules for lines and paragraphs, but not for n-grams: a run of
    5 characters is but two or three words. Baichuan 2 (arXiv:2309.10305, section 2.1) takes out duplicates of sentences
    and of documents."""
    of_lines = GopherRepetition(
        **dict.fromkeys((f"most_top_{n}gram" for n in range(2, 5)), 1.0),
        **dict.fromkeys((f"most_duplicate_{n}grams" for n in range(5, 11)), 1.0),
    )
    return CleaningPipeline(
        steps=(
            *(*_PAGE, Languages(languages=("zh",)), ChineseQuality(), of_lines),
            *(ExactSpans(unit=SpanUnit.SENTENCE, least_characters=20), NearDuplicates(), PersonalData()),
        )
    )


RECIPES: Mapping[str, Callable[[], CleaningPipeline]] = MappingProxyType(
    {"fineweb": fineweb, "gopher": gopher, "c4": c4, "code": code, "zh": zh}
    | {"llama": functools.partial(llama, LlamaSource.COMMON_CRAWL)}
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
