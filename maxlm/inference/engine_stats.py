"""What an engine tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine began, and what it holds now."""

    running: int
    waiting: int
    blocks: int
    """Of the cache, on all shards."""
    free_blocks: int
    kept_blocks: int
    """Free ones that hold a beginning which another text may have."""
    prompt_tokens: int
    cached_tokens: int
    """Of the prompts, found in the cache."""
    generated_tokens: int
    preemptions: int
    steps: int
    finished: int
    drafted_tokens: int
    """Guesses that a step read."""
    accepted_tokens: int
    """Those that came true."""
