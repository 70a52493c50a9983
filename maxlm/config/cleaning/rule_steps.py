"""Steps that drop a document by what is measured of it. A value at a limit is kept."""

from __future__ import annotations

import enum
import re
from typing import Annotated

from maxlm.config.errors import UserError
from maxlm.config.fields import Filled, Fraction, NotEmpty, NotNegative, PathName, Positive, config, shown


@config("steps[].")
class GopherQuality:
    """Rules of MassiveText (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1)."""

    least_words: NotNegative[int] = 50
    """Of a document."""
    most_words: Positive[int] = 100_000
    """Of a document."""
    shortest_mean_word: NotNegative[float] = 3
    """Mean length of words, in characters."""
    longest_mean_word: Positive[float] = 10
    """Mean length of words, in characters."""
    most_symbols: NotNegative[float] = 0.1
    """Marks `#` to words, and ellipses to words."""
    most_bullet_lines: Fraction = 0.9
    """Lines that begin with a bullet."""
    most_ellipsis_lines: Fraction = 0.3
    """Lines that end in an ellipsis."""
    least_alphabetic_words: Fraction = 0.8
    """Words that have a letter."""
    least_stop_words: NotNegative[int] = 2
    """Different words of `stop_words` that the document has."""
    stop_words: tuple[NotEmpty[str], ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """Capitals or not; with those of another language the rules serve that one."""

    def __post_init__(self) -> None:
        for least, most in (("least_words", "most_words"), ("shortest_mean_word", "longest_mean_word")):
            if getattr(self, least) > getattr(self, most):
                raise UserError(
                    f"steps[].{least} = {getattr(self, least)} must be at most {most} = {getattr(self, most)}, or no "
                    f"document is kept; use for example {getattr(GopherQuality, least)}"
                )


@config("steps[].")
class GopherRepetition:
    """Repetition inside a document (Rae et al. 2021, arXiv:2112.11446, table A1)."""

    most_duplicate_lines: Fraction = 0.30
    """Lines that stood before."""
    most_duplicate_paragraphs: Fraction = 0.30
    """Paragraphs that stood before."""
    most_duplicate_line_characters: Fraction = 0.20
    """Characters in such lines."""
    most_duplicate_paragraph_characters: Fraction = 0.20
    """Characters in such paragraphs."""
    most_top_2gram: Fraction = 0.20
    """Characters of words in the most frequent pair of words."""
    most_top_3gram: Fraction = 0.18
    """Characters of words in the most frequent run of 3 words."""
    most_top_4gram: Fraction = 0.16
    """Characters of words in the most frequent run of 4 words."""
    most_duplicate_5grams: Fraction = 0.15
    """Characters of words in runs of 5 words that stood before."""
    most_duplicate_6grams: Fraction = 0.14
    """Characters of words in runs of 6 words that stood before."""
    most_duplicate_7grams: Fraction = 0.13
    """Characters of words in runs of 7 words that stood before."""
    most_duplicate_8grams: Fraction = 0.12
    """Characters of words in runs of 8 words that stood before."""
    most_duplicate_9grams: Fraction = 0.11
    """Characters of words in runs of 9 words that stood before."""
    most_duplicate_10grams: Fraction = 0.10
    """Characters of words in runs of 10 words that stood before."""


@config("steps[].")
class FineWebQuality:
    """FineWeb's own rules (Penedo et al. 2024, arXiv:2406.17557, section 3.6)."""

    least_punctuated_lines: Fraction = 0.12
    """Lines that end in a mark of punctuation."""
    short_line: NotNegative[int] = 30
    """In characters: a line of at most so many is short."""
    most_short_lines: Fraction = 0.67
    """Lines that are short."""
    most_duplicate_line_characters: Fraction = 0.01
    """Characters in lines that stood before: 0.01 in the code that made FineWeb, 0.1 in its paper."""
    most_newlines: NotNegative[float] = 0.3
    """Line ends to words; in the code alone."""


@config("steps[].")
class ChineseQuality:
    """Rules for Chinese, by characters, as no spaces part its words."""

    least_characters: NotNegative[int] = 10
    """Chinese ones (WuDaoCorpora: Yuan et al. 2021, AI Open 2, section 3)."""
    least_share: Fraction = 0.3
    """Chinese characters among all but white space (ChineseWebText: Chen et al. 2023, arXiv:2311.01149, section 3)."""
    shortest_mean_line: NotNegative[float] = 10
    """Characters of a line (ChineseWebText)."""
    least_punctuated_lines: Fraction = 0.12
    """Lines that end in a mark of punctuation; CLUECorpus2020 (Xu et al. 2020, arXiv:2003.01355) keeps no others. The
    limit is FineWeb's."""
    most_duplicate_13grams: Fraction = 0.5
    """Characters in runs of 13 that stood before (ChineseWebText)."""


@config("steps[].")
class CodeQuality:
    """Rules for source code: LLaMA (arXiv:2302.13971, section 2.1) names line length and alphanumeric characters
    without figures, The Stack (Kocetkov et al. 2022, arXiv:2211.15533) has these, StarCoder 2 (Lozhkov et al. 2024,
    arXiv:2402.19173, section 2.1) the number of lines, generated files and encoded data."""

    most_lines: Positive[int] = 100_000
    """Of a file."""
    longest_mean_line: Positive[float] = 100
    """In characters."""
    longest_line: Positive[int] = 1000
    """In characters."""
    least_alphanumeric: Fraction = 0.25
    """Letters and figures among all characters."""
    generated: bool = False
    """Keep files whose first five lines say that a program wrote them."""
    longest_encoded: Positive[int] = 1024
    """Characters of one run of base64, of hexadecimal bytes or of `\\u` escapes."""
    most_encoded: Fraction = 0.5
    """Characters in such runs."""


@config("steps[].")
class Licences:
    """Keep documents whose licence is one of a list."""

    allowed: Annotated[tuple[NotEmpty[str], ...], Filled(note="name at least one")] = (
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "MIT",
    )
    """Names as SPDX has them, capitals or not; LLaMA's (arXiv:2302.13971, section 2.1) are the default."""
    tag: NotEmpty[str] = "license"
    """Where a document's licence stands."""
    unknown: bool = False
    """Keep documents without the tag."""


@config("steps[].")
class Languages:
    """Tell each document's language, as the tags `language` and `language_score`, with fastText's lid.176.ftz (Joulin
    et al. 2016, arXiv:1612.03651), which the extra `clean` brings; nothing is downloaded."""

    languages: tuple[NotEmpty[str], ...] = ("en",)
    """Codes of ISO 639; documents in others are dropped. Empty: only tell."""
    least: Fraction = 0.65
    """How sure it must be (FineWeb: arXiv:2406.17557, section 3.3)."""
    characters: Positive[int] = 10_000
    """Looked at, from the beginning."""

    def __post_init__(self) -> None:
        for language in self.languages:
            if not re.fullmatch("[a-z]{2,3}", language):
                raise UserError(f"steps[].languages = {shown(language)} must be a code of ISO 639, such as en or ceb")


class UrlPart(enum.Enum):
    """What an entry of a list is compared with."""

    DOMAIN = "domain"
    WORD = "word"
    SUBSTRING = "substring"


@config("steps[].")
class UrlList:
    """Drop documents by their address and a list (RefinedWeb: Penedo et al. 2023, arXiv:2306.01116, appendix G.1)."""

    file: PathName
    """An entry a line, UTF-8; empty lines and those that begin with `#` are passed over."""
    part: UrlPart = UrlPart.DOMAIN
    """A domain (with all that end in it), a word between marks, or any piece of the address."""
    most: NotNegative[int] = 0
    """Different entries that an address may have; RefinedWeb allows one of its weaker words."""
    tag: NotEmpty[str] = "url"
    """Where a document's address stands; those without one are kept."""


@config("steps[].")
class WordList:
    """Drop documents by the words of a list, capitals or not."""

    file: PathName
    """A word or phrase a line, UTF-8; empty lines and those that begin with `#` are passed over."""
    most: Fraction = 0.0
    """Words of the document that are in the list; 0 as C4 (arXiv:1910.10683, section 2.2) has it: none may be."""
