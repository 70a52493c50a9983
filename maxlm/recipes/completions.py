"""What a policy wrote, and what a source of rewards says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from maxlm.data.prompts import Prompt
from maxlm.inference.request import Finish


class Completion(NamedTuple):
    """One of a prompt."""

    prompt: Prompt
    text: str
    """Without the token that ended it; where tools were called, of the last turn alone."""
    tokens: tuple[int, ...]
    """All, with it, and with what tools said."""
    finish: Finish
    """Why it ended."""
    heard: int = 0
    """Of the tokens, those that tools said."""


Score = float | str
"""A finite number; or in words why there is none."""
Scoring = Callable[[Sequence[Completion]], Sequence[Score]]
"""What a source of rewards says of several completions, one score each."""


def asked(completion: Completion) -> str:
    """What was said last before it."""
    return str(completion.prompt.turns[-1].get("content") or "") if completion.prompt.turns else ""
