"""`.tiktoken` files, which have a token and its rank in each line, as the JSON of a tokenizer of `tokenizers`.

Such a file does not say how a text is cut before bytes are merged, nor which special tokens there are. Both stand in
the code that comes with a model, and here for each name of a file.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.config import UserError


class _Rules(NamedTuple):
    """What a file does not say."""

    pieces: str
    """Regular expression of what is merged by itself."""
    form: str
    """In which Unicode form texts are brought before."""
    special: tuple[str, ...]
    """Tokens after those of the file, in the order of their ids."""


_RULES = {
    "qwen.tiktoken": _Rules(
        pieces=(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ),
        form="NFC",
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
    )
}


def to_json(path: Path, content: bytes) -> bytes:
    """A tokenizer.json that gives a text the ids that tiktoken gives it.

    tiktoken merges, of all neighbours that make a token together, those of the lowest rank, and of equal ones the
    first; a piece that is a token is not merged at all. `tokenizers` merges pairs that are listed, in the order of the
    list. One pair for a token is enough, that of the last merge of its own bytes: what happens inside a token until it
    is made is what happens to it alone, as a merge across its ends would keep it from being made.

    Args:
        path: of the file, by whose name the rest is known.
        content: its bytes.

    Raises:
        UserError: no such file is known, or a line is not a token in base64 and its rank.
    """
    rules = _RULES.get(path.name)
    if rules is None:
        raise UserError(
            f"{path}: how it cuts texts is not in the file, and known of {' and '.join(_RULES)} alone; use the "
            "tokenizer.json of the model"
        )
    ranks = _read_ranks(path, content)
    # Ranks are ids as well.
    merges = [_last_merge(token, ranks) for token in ranks if len(token) > 1]
    special = [
        {"id": len(ranks) + number, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, name in enumerate(rules.special)
    ]
    bytes_alone: dict[str, Any] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    pieces = {"type": "Split", "pattern": {"Regex": rules.pieces}, "behavior": "Isolated", "invert": False}
    definition = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": rules.form},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pieces, bytes_alone]},
        "decoder": bytes_alone,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {_spelt(token): rank for token, rank in ranks.items()},
            "merges": [[_spelt(one) for one in pair] for pair in merges if pair is not None],
        },
    }
    return json.dumps(definition, ensure_ascii=False).encode()


def _read_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """Tokens in the order of their ranks, which are 0, 1, 2, ..."""
    found: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            found_token = base64.b64decode(token, validate=True)
            if not found_token or not rank.isdigit() or len(rank) > 9:
                raise ValueError
        except (ValueError, binascii.Error):
            shown = line[:40].decode(errors="replace")
            raise UserError(
                f"{path}: line {number} = {shown!r} must be a token in base64 and its rank, as 'aGk= 7'; download the "
                "file again"
            ) from None
        if int(rank) in found:
            raise UserError(f"{path}: line {number} has the rank {int(rank)} again; download the file again")
        found[int(rank)] = found_token
    ranks = {found[rank]: rank for rank in sorted(found)}
    if gaps := sorted(set(range(len(found))) - found.keys()):
        raise UserError(f"{path}: has no token of rank {gaps[0]}, but higher ones; download the file again")
    if len(ranks) < len(found):
        raise UserError(f"{path}: has a token twice; download the file again")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise UserError(f"{path}: has no token for the byte 0x{byte:02x} alone; download the file again")
    return ranks


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """What the two last parts of a token are when its bytes are merged; None: merging them does not make it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        lowest = min(pairs)
        if lowest == len(ranks):
            return None
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _spelt(token: bytes) -> str:
    """The characters that byte-level tokenizers write bytes as (GPT-2's): printable ones as themselves, others as those
    from U+0100 on."""
    return "".join(_CHARACTERS[byte] for byte in token)


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(0x100 + i) for i, byte in enumerate(_OTHERS)}
