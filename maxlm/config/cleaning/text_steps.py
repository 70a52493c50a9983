"""Steps that change the text of a document."""

from __future__ import annotations

import enum

from maxlm.config.fields import Fraction, NotNegative, Positive, config


class UnicodeForm(enum.Enum):
    """Normal forms of Unicode (UAX #15)."""

    NFC = "NFC"
    NFKC = "NFKC"


@config("steps[].")
class NormaliseUnicode:
    """Write each character in one way, and lines with one kind of end."""

    form: UnicodeForm = UnicodeForm.NFC
    """NFC keeps how a text looks; NFKC also turns ligatures, wide letters and raised figures into plain ones."""


@config("steps[].")
class RepairUnicode:
    """Undo damage that encodings did; needs the extra `clean`."""

    mojibake: bool = True
    """Text that was read in the wrong encoding is read again in the right one, line by line (ftfy)."""
    controls: bool = True
    """Control characters, byte order marks and halves of pairs go; ends of pages become ends of lines."""


@config("steps[].")
class HtmlToText:
    """Keep the text of pages in HTML, of which paragraphs and list marks remain; needs the extra `clean`."""

    tag: str = "content_type"
    """A document is HTML if this tag says so; if it is missing, by how the document begins."""
    main_content: bool = True
    """Leave out menus, headers and footers."""
    most_characters: Positive[int] = 10_000_000
    """Of the HTML; longer pages are dropped."""
    most_depth: Positive[int] = 512
    """Elements inside one another, as in browsers; deeper pages, whose time is quadratic, are dropped."""


@config("steps[].")
class C4Lines:
    """Keep the lines that are sentences (Raffel et al. 2020, arXiv:1910.10683, section 2.2). The longest word, policies
    and citations are in the published code alone. Words and sentences are FineWeb's (datatrove has 3 and 5); C4's code
    has 5 words a line and 3 sentences."""

    terminal_punctuation: bool = False
    """Keep only lines that end in a mark of punctuation, as the paper does, and FineWeb (arXiv:2406.17557) does not."""
    least_words: NotNegative[int] = 3
    """Of a line, by white space; shorter lines go."""
    longest_word: Positive[int] = 1000
    """In characters; lines with a longer word go."""
    javascript: bool = True
    """Lines that name JavaScript go."""
    policies: bool = True
    """Lines about cookies, privacy and terms of use go."""
    citations: bool = True
    """`[3]`, `[edit]` and `[citation needed]` are cut out of lines."""
    least_sentences: NotNegative[int] = 5
    """Of a document, in the lines that are kept; documents with fewer are dropped."""
    lorem_ipsum: bool = True
    """Drop documents with this filler."""
    curly_bracket: bool = True
    """Drop documents with a `{`, which are mostly programs."""


@config("steps[].")
class WebLines:
    """Remove lines that are not of the text, for languages with spaces (RefinedWeb: Penedo et al. 2023,
    arXiv:2306.01116, appendix G.2)."""

    most_uppercase: Fraction = 0.5
    """Of a line's letters; lines with more capitals go. The paper says "mainly"."""
    short_line: NotNegative[int] = 10
    """In words; phrases such as "read more" are cut out of lines of at most so many."""
    most_removed: Fraction = 0.05
    """Of the document's words, those in lines that were removed or cut; documents with more are dropped."""
