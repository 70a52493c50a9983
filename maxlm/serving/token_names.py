"""Single tokens for people: their text, or their bytes where they are no text of their own."""

from __future__ import annotations

import contextlib

from maxlm.config import UserError
from maxlm.data.tokenizers import Tokenizer


class TokenNames:
    """Of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special = {i: name.encode() for name, i in tokenizer.specials.items()}
        self._decode = tokenizer.decode
        self._shown: list[bytes | None] | None = None
        with contextlib.suppress(UserError):  # it depends on a token's neighbours: then what it is alone
            self._shown = tokenizer.token_bytes()

    def shown(self, i: int) -> bytes:
        """What a token adds to a text; a special one adds nothing."""
        if self._shown is None:
            return self._decode([i]).encode()
        return (self._shown[i] if 0 <= i < len(self._shown) else None) or b""

    def raw(self, i: int) -> bytes:
        """The same, but of a special token its name."""
        return self._special.get(i) or self.shown(i)

    def name(self, i: int) -> str:
        """As OpenAI writes a token; `bytes:` begins one that is part of a character."""
        found = self.raw(i)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)
