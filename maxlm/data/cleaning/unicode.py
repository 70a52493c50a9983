"""Unicode: normal forms."""

from __future__ import annotations

import unicodedata
from typing import Literal

from maxlm.config.cleaning.text_steps import NormaliseUnicode
from maxlm.data.cleaning.page import Finding, Limit, Page


class UnicodeNormaliser:
    """See `NormaliseUnicode`."""

    limits: tuple[Limit, ...] = ()

    def __init__(self, config: NormaliseUnicode) -> None:
        self._form: Literal["NFC", "NFKC"] = config.form.value

    def __call__(self, page: Page) -> Finding:
        text = unicodedata.normalize(self._form, page.text.replace("\r\n", "\n").replace("\r", "\n"))
        return Finding() if text == page.text else Finding(text=text, changes={self._form: 1})
