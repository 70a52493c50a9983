"""What records of conversations are for, and which of their tokens the loss counts."""

from __future__ import annotations

import enum


class Purpose(enum.Enum):
    """Which texts a record becomes, and with which values."""

    SFT = "sft"
    """One text: the conversation, value 1; of rated completions the best."""
    CONTEXT = "context"
    """Two texts: the conversation, value 1; and, value 0, the same with the record's `context` at its beginning. What
    counts is the same tokens in both."""
    PREFERENCE = "preference"
    """Two or more completions of one prompt, each text with the prompt; of the larger value is what is preferred."""
    KTO = "kto"
    """Two texts: prompt and completion, value 1 or -1 (good or bad); the same prompt and the completion of the record
    before it, value 0 (arXiv:2402.01306, section 4.2: what the KL estimate is of)."""
    BINARY = "binary"
    """One text: prompt and completion, value 1 or 0 (good or bad)."""
    CLASSIFY = "classify"
    """One text, its value the number of its class."""
    EMBED = "embed"
    """A query, value 1; what it should find, value 0; what it should not find, value -1 each."""
    PROMPTS = "prompts"
    """One text of which nothing counts, value 0: a prompt, up to where the answer begins. The whole record is kept with
    it, for those that judge answers."""


class Counted(enum.Enum):
    """Which tokens of a conversation the loss counts."""

    ANSWERS = "answers"
    """All that the assistant wrote, with the token that ends each turn; of a completion, in the completion alone."""
    LAST = "last"
    """The same of its last turn alone."""
    ALL = "all"
    """Every token, prompts too."""
