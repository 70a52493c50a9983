"""Blocks of the cache: who uses which, and which of them hold a beginning that another text has too."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

NOWHERE = 0
"""The block that is nobody's: what is written there is never read."""


@dataclass(frozen=True)
class Prefix:
    """The tokens of one full block after all those before it."""

    key: bytes
    """Digest of the block's tokens and of the key before: it stands for the whole text up to the block's end."""
    tokens: tuple[int, ...]
    """Those of the block alone. They are compared too: a digest is no proof."""


def prefixes(tokens: Sequence[int], block_size: int, salt: bytes = b"") -> Iterator[Prefix]:
    """One for each full block of a text. With another salt (other weights) no key is the same."""
    key = salt
    for end in range(block_size, len(tokens) + 1, block_size):
        block = tuple(tokens[end - block_size : end])
        key = hashlib.blake2b(key + np.asarray(block, np.int32).tobytes(), digest_size=16).digest()
        yield Prefix(key, block)


class OutOfBlocks(Exception):
    """Every block is in use."""


@dataclass
class BlockPool:
    """The blocks 1 .. size - 1 of the layers that share a table, counted by reference.

    A block that nobody uses keeps what it holds until it is needed for something else, the longest unused first.
    """

    size: int
    _users: dict[int, int] = field(default_factory=dict)
    """Block -> how many texts use it; 1 or more."""
    _free: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """In the order in which they are taken."""
    _held: dict[int, Prefix] = field(default_factory=dict)
    """Block -> what it holds, if that may serve another text."""
    _found: dict[bytes, int] = field(default_factory=dict)
    """The same the other way round."""
    n_kept: int = 0
    """Unused blocks that hold a prefix."""

    def __post_init__(self) -> None:
        self._free.update(dict.fromkeys(range(1, self.size)))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def find(self, prefix: Prefix) -> int | None:
        """A block that holds it."""
        block = self._found.get(prefix.key)
        return block if block is not None and self._held[block] == prefix else None

    def take(self) -> int:
        """A block for new content.

        Raises:
            OutOfBlocks: there is none.
        """
        if not self._free:
            raise OutOfBlocks
        block, _ = self._free.popitem(last=False)
        if (prefix := self._held.pop(block, None)) is not None:
            del self._found[prefix.key]
            self.n_kept -= 1
        self._users[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more user of a block that `find` found."""
        if block in self._free:
            del self._free[block]
            self.n_kept -= 1
        self._users[block] = self._users.get(block, 0) + 1

    def give_back(self, block: int) -> None:
        """One user less."""
        self._users[block] -= 1
        if not self._users[block]:
            del self._users[block]
            self._free[block] = None
            if block in self._held:
                self.n_kept += 1
            else:  # of no use to anybody: the first to be taken
                self._free.move_to_end(block, last=False)

    def hold(self, block: int, prefix: Prefix) -> None:
        """Say what a full block holds. The first block with a content keeps its name; a second one is no harm."""
        if prefix.key not in self._found and block not in self._held:
            self._held[block], self._found[prefix.key] = prefix, block

    def forget(self) -> None:
        """What blocks hold is worth nothing any more: the weights are others."""
        self._held.clear()
        self._found.clear()
        self.n_kept = 0
