"""Which tokens the next step reads: texts come and go, blocks are found for them, and taken away again.

The rules. Who came first is served first. A text that has begun gets at least one token in every step; where a step has
fewer rows than there are texts, they take turns. If blocks run
out, the youngest text gives all of its own back and waits at the head of the queue; what it had is computed again, or
found again in blocks that nobody has needed since. The oldest text can always go on: a request that does not fit the
whole cache is refused when it comes. Blocks are found first, and tokens counted afterwards.

A text that is guided has a twin in a slot of its own. They come, go and lose their blocks together, and read their
newest tokens in the same steps; who counts texts counts such a pair once.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from maxlm.inference.blocks import NOWHERE, BlockPool, OutOfBlocks, Prefix, prefixes
from maxlm.inference.request import Request


class Stage(enum.Enum):
    """Of a text."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


@dataclass(eq=False)
class Sequence:
    """A text on its way."""

    request: Request
    number: int
    """In order of arrival."""
    tokens: list[int]
    """All that are known here: the prompt, and what has been read from the device."""
    stage: Stage = Stage.WAITING
    slot: int = -1
    computed: int = 0
    """Tokens whose keys are in the cache, or will be when the steps that were launched have run."""
    ahead: int = 0
    """Tokens that these steps add to those that are known here; fewer, if it ends in one of them."""
    cached: int = 0
    """Of the prompt, found in the cache when it was read first."""
    blocks: dict[int, list[int]] = field(default_factory=dict)
    """window -> its blocks in order; NOWHERE for those that the window has left behind."""
    prefixes: list[Prefix] = field(default_factory=list)
    """Of its full blocks, as far as they were asked for."""
    held: int = 0
    """Full blocks whose content the pools know."""
    served: int = 0
    """The last step that it had a row in, where texts take turns."""
    begun: bool = False
    """The device knows the text in the slot."""
    twin: Sequence | None = None
    """The same new tokens after another prompt."""
    leader: Sequence | None = None
    """Of a twin: the text whose tokens it has."""

    @property
    def length(self) -> int:
        """Tokens, with those that are still on the device."""
        return len(self.tokens) + self.ahead

    @property
    def end(self) -> int:
        """Tokens that it has at most."""
        return len(self.request.prompt) + self.request.max_new_tokens

    @property
    def pair(self) -> tuple[Sequence, ...]:
        """Itself, and its twin if it has one."""
        return (self,) if self.twin is None else (self, self.twin)

    @property
    def to_read(self) -> int:
        """Tokens whose keys are missing; the newest is one of them."""
        return self.length - self.computed

    @property
    def generated(self) -> int:
        """New tokens that are known here."""
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True)
class Chunk:
    """Tokens of one text that a step reads."""

    sequence: Sequence
    first: int
    count: int
    samples: bool
    """The last of them is the text's newest, so that the next one is drawn."""
    drafts: tuple[int, ...] = ()
    """Guesses at the tokens after it, which the step reads as well. They count for nothing before they came true."""


@dataclass(frozen=True)
class StepPlan:
    """One step."""

    chunks: list[Chunk]
    n_steps: int
    """More than 1: each chunk is one token, and as many are drawn one after the other."""

    @property
    def n_tokens(self) -> int:
        return sum(chunk.count + len(chunk.drafts) for chunk in self.chunks)


class Scheduler:
    """The texts of one shard of the batch, its slots and its blocks."""

    def __init__(
        self,
        *,
        slots: int,
        tokens_per_step: int,
        rows_per_step: int,
        block_size: int,
        pools: Mapping[int, int],
        max_length: int,
        decode_steps: int,
    ) -> None:
        """
        Args:
            slots: texts at once.
            tokens_per_step: of all texts.
            rows_per_step: tokens of a step whose logits are computed.
            block_size: C.
            pools: window -> blocks, of which the first is nobody's.
            max_length: tokens of a text.
            decode_steps: tokens that are drawn one after the other when nobody waits.
        """
        self._tokens_per_step, self._rows, self._block_size = tokens_per_step, rows_per_step, block_size
        self._decode_steps, self._takes_turns = decode_steps, tokens_per_step < slots
        self.pools = {window: BlockPool(size) for window, size in pools.items()}
        width = -(-max_length // block_size)
        self.tables: dict[int, npt.NDArray[np.int32]] = {window: np.zeros((slots, width), np.int32) for window in pools}
        self.tables_changed = True
        self.salt = b""
        """Another one where the model is another."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of arrival."""
        self._slots = list(range(slots))[::-1]
        self._steps_launched = self.preemptions = 0

    def fits(self, *lengths: int) -> bool:
        """Whether a text, or a pair, of so many tokens can be decoded when it is alone."""
        return all(
            sum(self._needed(window, length) for length in lengths) < pool.size for window, pool in self.pools.items()
        )

    def add(self, sequence: Sequence) -> None:
        """To those who wait."""
        self.waiting.append(sequence)

    def end(self, sequence: Sequence) -> None:
        """Wherever it is; its blocks are free."""
        match sequence.stage:
            case Stage.WAITING:
                self.waiting.remove(sequence)
            case Stage.RUNNING:
                self._release(sequence)
            case Stage.ENDED:
                return
        for one in sequence.pair:
            one.stage = Stage.ENDED

    def plan(self) -> StepPlan | None:
        """The next step; None: there is nothing to do. Nothing counts as computed before `launched`."""
        chunks: list[Chunk] = []
        budget, rows, preemptions = self._tokens_per_step, self._rows, self.preemptions
        ready = sorted((one for one in self.running if one.length < one.end), key=lambda one: (one.served, one.number))
        others = sum(len(one.pair) for one in ready)
        for sequence in ready:
            others -= len(sequence.pair)
            if sequence.stage is Stage.RUNNING and min(budget, rows) >= len(sequence.pair):
                for chunk in self._chunks(sequence, budget - others, rows - others):
                    chunks.append(chunk)
                    budget, rows = budget - chunk.count, rows - self._n_rows(chunk)
        chunks = [chunk for chunk in chunks if chunk.sequence.stage is Stage.RUNNING]
        # Nobody comes in where blocks ran out: who lost them may have tokens on the device that nobody has seen.
        while self.waiting and self.preemptions == preemptions:
            sequence = self.waiting[0]
            if min(budget, rows, len(self._slots)) < len(sequence.pair) or not self._admit(sequence):
                break
            for chunk in self._chunks(sequence, budget, rows):
                chunks.append(chunk)
                budget, rows = budget - chunk.count, rows - self._n_rows(chunk)
        chunks = [chunk for chunk in chunks if chunk.sequence.stage is Stage.RUNNING]
        return StepPlan(chunks, self._steps(chunks)) if chunks else None

    def room(self, plan: StepPlan, most: int) -> list[int]:
        """How many drafts each chunk of a plan may have where the others have none, `most` at the most.

        A text under a grammar has none: what may come after each draft would have to be told to the device too. Nor has
        one that is guided, whose twin would have to read them as well.
        """
        left = self._left(plan)
        return [
            min(most, left, chunk.sequence.end - chunk.sequence.length - 1)
            if chunk.samples and not chunk.sequence.ahead and self._guessable(chunk.sequence)
            else 0
            for chunk in plan.chunks
        ]

    def _guessable(self, sequence: Sequence) -> bool:
        return sequence.request.grammar is None and sequence.twin is None and sequence.leader is None

    def with_drafts(self, plan: StepPlan, drafts: list[list[int]]) -> StepPlan:
        """The plan with guesses for its chunks, as far as there are rows and blocks that nobody else needs: the first
        ones of all before the second ones."""
        left, counts = self._left(plan), [0] * len(drafts)
        for depth in range(max(map(len, drafts))):
            for number, ids in enumerate(drafts):
                if left and depth < len(ids):
                    left, counts[number] = left - 1, depth + 1
        chunks = []
        for chunk, ids, count in zip(plan.chunks, drafts, counts, strict=True):
            count = self._placed(chunk, count) if count else 0
            chunks.append(dataclasses.replace(chunk, drafts=tuple(ids[:count])) if count else chunk)
        return StepPlan(chunks, 1)

    def came_true(self, sequence: Sequence, n: int) -> None:
        """So many drafts of the step that was just read: their keys are the text's."""
        if sequence.stage is Stage.RUNNING:
            sequence.computed += n

    def launched(self, plan: StepPlan) -> None:
        """The step runs: what it computes may be counted on by all that come later."""
        self._steps_launched += 1
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.served = self._steps_launched if self._takes_turns else 0
            n_steps = min(plan.n_steps, sequence.end - sequence.length)
            sequence.computed += chunk.count + n_steps - 1 if chunk.samples else chunk.count
            sequence.ahead += n_steps if chunk.samples else 0
            self.hold(sequence)
            self._leave_behind(sequence)

    def hold(self, sequence: Sequence) -> None:
        """Tell the pools what its full blocks hold."""
        n_full = min(len(sequence.tokens), sequence.computed) // self._block_size
        for number in range(sequence.held, n_full):
            prefix = self._prefix(sequence, number)
            for window, pool in self.pools.items():
                if (block := sequence.blocks[window][number]) != NOWHERE:
                    pool.hold(block, prefix)
        sequence.held = max(sequence.held, n_full)

    def forget(self, salt: bytes) -> None:
        """The model is another: every text that runs is read again."""
        for sequence in reversed(self.running[:]):
            self._preempt(sequence)
        for sequence in self.waiting:
            for one in sequence.pair:
                one.prefixes.clear()
        for pool in self.pools.values():
            pool.forget()
        self.salt = salt

    def _chunks(self, sequence: Sequence, budget: int, rows: int) -> list[Chunk]:
        """What a text and its twin read next, in about so many tokens and rows of logits; none if it lost its blocks.

        None of a pair reads its newest token before both do.
        """
        counts = list[int]()
        for one in sequence.pair:
            later = len(sequence.pair) - len(counts) - 1
            counts.append(min(one.to_read, max(budget - later, 1), self._scored(one, rows - later)))
            budget -= counts[-1]
        if any(count < one.to_read for one, count in zip(sequence.pair, counts, strict=True)):
            counts = [min(count, one.to_read - 1) for one, count in zip(sequence.pair, counts, strict=True)]
        for one, count in zip(sequence.pair, counts, strict=True):
            self._grow(one, one.computed + count)
        if sequence.stage is not Stage.RUNNING:
            return []
        return [self._chunk(one, count) for one, count in zip(sequence.pair, counts, strict=True) if count]

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        return Chunk(sequence, sequence.computed, count, sequence.computed + count == sequence.length)

    def _scored(self, sequence: Sequence, rows: int) -> int:
        """The most tokens of a text whose logits fit so many rows."""
        if sequence.request.prompt_logprobs is None or sequence.computed >= len(sequence.request.prompt):
            return sequence.to_read
        return max(rows, 1)

    def _n_rows(self, chunk: Chunk) -> int:
        """Rows of logits that a chunk needs."""
        request = chunk.sequence.request
        if request.prompt_logprobs is None:
            return int(chunk.samples)
        return max(min(chunk.first + chunk.count, len(request.prompt)) - chunk.first, int(chunk.samples))

    def _left(self, plan: StepPlan) -> int:
        """Rows for drafts, which are all scored."""
        return min(self._tokens_per_step - plan.n_tokens, self._rows - sum(map(self._n_rows, plan.chunks)))

    def _placed(self, chunk: Chunk, count: int) -> int:
        """Find blocks for so many drafts, or for the first ones of them."""
        start = chunk.first + chunk.count
        try:
            self._take(chunk.sequence, start + count)
        except OutOfBlocks:
            count = min(len(blocks) for blocks in chunk.sequence.blocks.values()) * self._block_size - start
        return count

    def _steps(self, chunks: list[Chunk]) -> int:
        """How many tokens each text draws in this step."""
        sequences = [chunk.sequence for chunk in chunks]
        decoding = all(chunk.samples and chunk.count == 1 for chunk in chunks)
        if self.waiting or not decoding or any(sequence.request.grammar is not None for sequence in sequences):
            return 1
        n_steps = min(self._decode_steps, max(sequence.end - sequence.length for sequence in sequences))
        try:
            for sequence in sequences:
                self._take(sequence, min(sequence.computed + n_steps, sequence.end - 1))
        except OutOfBlocks:
            return 1
        return n_steps

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting text a slot, and the blocks that hold its beginning already; its twin too."""
        found = [self._share(one) for one in sequence.pair]
        room = all(
            pool.n_free
            > sum(self._needed(window, one.length + 1) - n for one, n in zip(sequence.pair, found, strict=True))
            for window, pool in self.pools.items()
        )
        if self.running and not room:
            for one in sequence.pair:
                self._give_back(one)
            return False
        self.waiting.popleft()
        for one, n in zip(sequence.pair, found, strict=True):
            one.stage, one.slot = Stage.RUNNING, self._slots.pop()
            one.computed = n * self._block_size
            one.held = n
            if not one.generated:
                one.cached = one.computed
            for window, blocks in one.blocks.items():
                self.tables[window][one.slot, : len(blocks)] = blocks
        self.tables_changed = True
        # Who was preempted is older than those who run, and goes before them again.
        self.running.append(sequence)
        self.running.sort(key=lambda one: one.number)
        return True

    def _share(self, sequence: Sequence) -> int:
        """Take the blocks that hold its beginning; how many these are."""
        found = self._find(sequence)
        for window, pool in self.pools.items():
            first = self._first_block(window, found * self._block_size)
            shared = [pool.find(self._prefix(sequence, number)) for number in range(first, found)]
            blocks = [NOWHERE] * first + [block for block in shared if block is not None]
            assert len(blocks) == found
            for block in blocks[first:]:
                pool.share(block)
            sequence.blocks[window] = blocks
        return found

    def _find(self, sequence: Sequence) -> int:
        """How many of its first blocks the cache holds. At least its newest token is left to be read."""
        if sequence.request.prompt_logprobs is not None and not sequence.generated:
            return 0
        most = (sequence.length - 1) // self._block_size
        has = lambda window, number: self.pools[window].find(self._prefix(sequence, number)) is not None
        whole = [window for window in self.pools if not window]
        found = most
        for window in whole:
            found = next((number for number in range(found) if not has(window, number)), found)
        while found:
            seen = {window: range(self._first_block(window, found * self._block_size), found) for window in self.pools}
            if all(has(window, number) for window, numbers in seen.items() for number in numbers):
                return found
            found -= 1
        return 0

    def _prefix(self, sequence: Sequence, number: int) -> Prefix:
        """Of a full block."""
        known = sequence.prefixes
        if number >= len(known):
            start = len(known) * self._block_size
            key = known[-1].key if known else self._salt_of(sequence)
            known.extend(prefixes(sequence.tokens[start:], self._block_size, key))
        return known[number]

    def _salt_of(self, sequence: Sequence) -> bytes:
        """With another adapter the same tokens have other keys."""
        name = sequence.request.adapter
        return self.salt if name is None else self.salt + b"\0" + name.encode()

    def _first_block(self, window: int, position: int) -> int:
        """The first block that a query at this position sees."""
        return max(position - window, 0) // self._block_size if window else 0

    def _needed(self, window: int, length: int) -> int:
        """Blocks that a text of this length uses at once, with all tokens of a step in them."""
        whole = -(-length // self._block_size)
        return min(whole, -(-(window + self._tokens_per_step) // self._block_size) + 2) if window else whole

    def _grow(self, sequence: Sequence, length: int) -> None:
        """Blocks for its first `length` tokens; from others if need be, or from itself if it is the youngest."""
        while sequence.stage is Stage.RUNNING:
            try:
                return self._take(sequence, length)
            except OutOfBlocks:
                self._preempt(self.running[-1])

    def _take(self, sequence: Sequence, length: int) -> None:
        """
        Raises:
            OutOfBlocks: there are not enough.
        """
        for window, pool in self.pools.items():
            blocks = sequence.blocks[window]
            while len(blocks) * self._block_size < length:
                block = pool.take()
                self.tables[window][sequence.slot, len(blocks)] = block
                blocks.append(block)
                self.tables_changed = True

    def _leave_behind(self, sequence: Sequence) -> None:
        """Give back what no later query sees."""
        for window, pool in self.pools.items():
            blocks = sequence.blocks[window]
            for number in range(self._first_block(window, sequence.computed) - 1, -1, -1):
                if blocks[number] == NOWHERE:
                    break
                pool.give_back(blocks[number])
                blocks[number] = self.tables[window][sequence.slot, number] = NOWHERE
                self.tables_changed = True

    def _preempt(self, sequence: Sequence) -> None:
        """Tokens that are still on the device come all the same, before the next plan."""
        self._release(sequence)
        for one in sequence.pair:
            one.stage = Stage.WAITING
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        for one in sequence.pair:
            for table in self.tables.values():
                table[one.slot] = NOWHERE
            self._give_back(one)
            self._slots.append(one.slot)
            one.slot, one.computed, one.held, one.begun = -1, 0, 0, False
        self.tables_changed = True

    def _give_back(self, sequence: Sequence) -> None:
        """The last blocks are the first that others may take: the beginning is what another text may have too."""
        for window, blocks in sequence.blocks.items():
            for block in reversed(blocks):
                if block != NOWHERE:
                    self.pools[window].give_back(block)
        sequence.blocks = {}
