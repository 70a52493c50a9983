"""Steps for documents of one kind of source, as LLaMA takes them (arXiv:2302.13971, section 2.1)."""

from __future__ import annotations

from maxlm.config.fields import NotEmpty, NotNegative, Positive, config


@config("steps[].")
class LatexToText:
    """Of a paper's LaTeX keep what a reader reads (after Lewkowycz et al. 2022, arXiv:2206.14858): no comments, nothing
    before the first section, no bibliography, the authors' own macros written out."""

    macros: bool = True
    """Write out what `\\newcommand`, `\\renewcommand`, `\\providecommand` and `\\def` define."""
    most_growth: Positive[float] = 4.0
    """Times that the text may become longer by it; papers with macros that grow beyond it are dropped."""


@config("steps[].")
class AnswersByScore:
    """Put answers below their question, the best first, without HTML; needs the extra `clean`."""

    tag: NotEmpty[str] = "answers"
    """A list of objects, each with `text` and `score`, or JSON of one; documents without it stay as they are."""
    least_score: int | None = None
    """Leave out answers with a lower score; None: none."""


@config("steps[].")
class GutenbergText:
    """Of a book of Project Gutenberg keep what stands between its marks of start and end."""


@config("steps[].")
class WikiText:
    """Of an article's wiki markup keep the text: no comments, references, templates, tables and files; links become
    their words."""


@config("steps[].")
class CodeHeader:
    """Remove the comment at a source file's beginning if it is about copyright or a licence."""

    most_lines: NotNegative[int] = 200
    """Of such a comment; longer ones stay."""
