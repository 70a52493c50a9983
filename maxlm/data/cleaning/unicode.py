"""Unicode: normal forms, and damage that encodings did."""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Literal

from maxlm.config.cleaning.text_steps import NormaliseUnicode, RepairUnicode
from maxlm.data.cleaning.findings import Finding, Limit, Page
from maxlm.data.input_files import missing_extra

_CONTROLS = re.compile("[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u206a-\u206f\ufeff\ufff9-\ufffc\ud800-\udfff]+")
_LINE_ENDS = re.compile("[\x0b\x0c\x85\u2028\u2029]")


class UnicodeNormaliser:
    """See `NormaliseUnicode`."""

    limits: tuple[Limit, ...] = ()

    def __init__(self, config: NormaliseUnicode) -> None:
        self._form: Literal["NFC", "NFKC"] = config.form.value

    def __call__(self, page: Page) -> Finding:
        lines = page.text.replace("\r\n", "\n").replace("\r", "\n")
        text = unicodedata.normalize(self._form, lines)
        changes = {"line ends": int(lines != page.text), self._form: int(text != lines)}
        return (
            Finding(text=text, changes={rule: 1 for rule, n in changes.items() if n})
            if any(changes.values())
            else Finding()
        )


class UnicodeRepairer:
    """See `RepairUnicode`."""

    limits: tuple[Limit, ...] = ()

    def __init__(self, config: RepairUnicode) -> None:
        self._controls = config.controls
        self._ftfy: Any = _ftfy() if config.mojibake else None

    def __call__(self, page: Page) -> Finding:
        text, changes = page.text, {}
        if self._ftfy is not None and not text.isascii():
            lines = text.split("\n")
            mended = [line if line.isascii() else self._ftfy.fix_encoding(line) for line in lines]
            if count := sum(new != old for new, old in zip(mended, lines, strict=True)):
                text, changes["mojibake"] = "\n".join(mended), count
        if self._controls:
            text, ends = _LINE_ENDS.subn("\n", text)
            text, gone = _CONTROLS.subn("", text)
            changes |= {"end of page": ends} if ends else {}
            changes |= {"control characters": gone} if gone else {}
        return Finding(text=text, changes=changes) if changes else Finding()


def _ftfy() -> Any:
    try:
        import ftfy
    except ImportError as error:
        raise missing_extra("ftfy", "steps that repair Unicode", extra="clean") from error
    return ftfy
