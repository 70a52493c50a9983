"""The text of pages in HTML."""

from __future__ import annotations

import re
from typing import Any

from maxlm.config.cleaning.text_steps import HtmlToText
from maxlm.data.cleaning.findings import Finding, Limit, Page, measured
from maxlm.data.input_files import missing_extra

_BEGINNING = re.compile(
    r"\ufeff?\s*+(?:<\?xml[^>]{0,200}>\s*+)?(?:<!--(?:(?!-->).){0,1000}-->\s*+)?<(?:!doctype\s+html|html)\b",
    re.IGNORECASE | re.DOTALL,
)
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
_NO_END = (
    *("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr"),
    *("p", "li", "dt", "dd", "tr", "td", "th", "thead", "tbody", "tfoot", "option", "optgroup", "colgroup"),
    *("head", "body", "html"),
)
"""Elements that have no end, or may go without."""


class HtmlReader:
    """See `HtmlToText`."""

    def __init__(self, config: HtmlToText) -> None:
        self._config = config
        self._extract = extractor()
        self.limits = (
            Limit("characters of HTML", most=config.most_characters, unit="characters"),
            Limit("elements inside one another", most=config.most_depth, unit="elements"),
        )

    def __call__(self, page: Page) -> Finding:
        kind = page.tags.get(self._config.tag)
        if not (_BEGINNING.match(page.text) if kind is None else "html" in str(kind).lower()):
            return Finding()
        values = measured(self.limits, (size(page.text) for size in (len, depth)))
        if not self.limits[len(values) - 1].allows(values[-1]):
            return Finding(values)
        text = self._extract(page.text, main_content=self._config.main_content)
        return Finding(values, text=text, changes={"HTML": 1})


def depth(html: str) -> int:
    """How many elements are open at once at most, by the tags alone; of elements whose end may be missing, none."""
    now = deepest = 0
    for end, name in _TAG.findall(html):
        if name.lower() not in _NO_END:
            now = max(0, now - 1) if end else now + 1
            deepest = max(deepest, now)
    return deepest


def extractor() -> Any:
    """A function from HTML to text, with paragraphs; of `main_content`, without menus.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError as error:
        raise missing_extra("resiliparse", "steps that read HTML", extra="clean") from error

    def extract(html: str, *, main_content: bool) -> str:
        html = html.encode(errors="replace").decode()  # the parser refuses halves of pairs
        return extract_plain_text(html, main_content=main_content, preserve_formatting=True, alt_texts=False)

    return extract
