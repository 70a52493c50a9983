"""Steps that change the text of a document."""

from __future__ import annotations

import enum

from maxlm.config.fields import config


class UnicodeForm(enum.Enum):
    """Normal forms of Unicode (UAX #15)."""

    NFC = "NFC"
    NFKC = "NFKC"


@config("steps[].")
class NormaliseUnicode:
    """Write each character in one way, and lines with one kind of end."""

    form: UnicodeForm = UnicodeForm.NFC
    """NFC keeps how a text looks; NFKC also turns ligatures, wide letters and raised figures into plain ones."""
