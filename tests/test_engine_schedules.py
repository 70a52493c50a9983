"""The engine's host side against a device that checks what it is told: any schedule gives every request its own text.

The device here is a dict. Each block's place holds the whole text up to it, so that a row that would see a key of
another text, or one that was never computed, is found at once; the next token is a hash of the text and the seed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import small_run, with_attention
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from run_folder import BYTE_MODEL

from maxlm.config import EngineConfig, ModelConfig, PromptLookup, ShardingConfig
from maxlm.data.tokenizers import Bytes
from maxlm.inference import engine as engines
from maxlm.inference.engine import Engine, Ticket
from maxlm.inference.load import LoadedRun
from maxlm.inference.request import BadRequest, Delta, Finish, Request
from maxlm.inference.sampling import LogProbs
from maxlm.inference.scheduler import Scheduler, Sequence
from maxlm.inference.step import Drawn, StepRows, Texts
from maxlm.sharding import make_layout

VOCAB, END = 50, 7


def next_token(text: tuple[int, ...], seed: int, other: tuple[int, ...] = ()) -> int:
    """`other`: the text that it is guided away from."""
    return hash((text, seed, other)) % VOCAB


def alone(request: Request) -> tuple[list[int], Finish]:
    """What the request's text must be."""
    tokens: list[int] = []
    other = request.twin.prompt if request.twin else ()
    for _ in range(request.max_new_tokens):
        unlike = (*other, *tokens) if other else ()
        tokens.append(next_token((*request.prompt, *tokens), request.seed, unlike))
        if tokens[-1] in request.ends:
            return tokens, Finish.STOP
    return tokens, Finish.LENGTH


class CheckedDevice:
    """In place of `Programs`."""

    def __init__(self, model: ModelConfig, *_: Any, blocks: dict[int, int], tokens_per_step: int, **__: Any) -> None:
        config: EngineConfig = _[2]
        self.widths = sorted({2, tokens_per_step})
        self.config, self.C, self.blocks, self.salt = config, config.block_size, blocks, 0
        self.memory: dict[int, dict[tuple[int, int], Any]] = {window: {} for window in blocks}
        self.texts: dict[int, list[int]] = {}
        self.about: dict[int, Texts] = {}
        self.done: set[int] = set()

    def scored_rows(self, width: int) -> int:
        return min(width, self.config.slots * (1 + self.config.drafts))

    def no_rows(self, width: int) -> StepRows:
        n, drafts = self.scored_rows(width), np.full(width, -1) if self.config.drafts else None
        nothing = np.full(n, -1)
        return StepRows(np.zeros(width, int), np.full(width, -1), nothing, np.zeros(n, bool), nothing.copy(), drafts)

    def begin(self, slot: int, text: Texts) -> None:
        self.texts[slot] = text.history.tolist()
        self.about[slot] = text
        self.done.discard(slot)

    def put_tables(self, tables: dict[int, np.ndarray]) -> None:
        self.tables = {window: table.copy() for window, table in tables.items()}

    def update(self, parameters: Any) -> None:
        self.salt = parameters

    def run(self, width: int, rows: StepRows, n_steps: int) -> Drawn:
        assert sum(rows.positions >= 0) <= width
        R, n = self.scored_rows(width), self.config.most_steps
        drafts = np.full(width, -1) if rows.drafts is None else rows.drafts
        for slot, p, draft in zip(rows.slots, rows.positions, drafts, strict=True):
            if draft >= 0:
                self.texts[slot][p] = int(draft)
        tokens = np.zeros((n, R), int)
        positions = [-1 if slot in self.done else p for slot, p in zip(rows.slots, rows.positions, strict=True)]
        assert n_steps == 1 or all(p < 0 or i in rows.scored for i, p in enumerate(positions))
        for step in range(n_steps):
            live = [(int(slot), int(p)) for slot, p in zip(rows.slots, positions, strict=True) if p >= 0]
            for slot, p in live:
                self.write(slot, p)
            for slot, p in live:
                self.look(slot, p)
            after, drawn = [-1] * width, -1
            for r, (row, sample) in enumerate(zip(rows.scored, rows.samples, strict=True)):
                if row < 0 or positions[row] < 0:
                    continue
                slot, p = int(rows.slots[row]), positions[row]
                text, about = self.texts[slot], self.about[slot]
                if drafts[row] >= 0 and drafts[row] != drawn:  # no more of these rows counts, whatever they draw
                    tokens[step, r], drawn = drafts[row], -1
                    continue
                if sample:
                    text[p + 1] = drawn = self.drawn(rows, r, positions, tokens[step])
                    if text[p + 1] in about.settings.ends.tolist() or p + 2 >= about.end:
                        self.done.add(slot)
                    else:
                        after[row] = p + 1
                tokens[step, r] = text[p + 1]
            positions = after
        zeros = np.zeros((n, R, 20))
        return Drawn(tokens, LogProbs(zeros[..., 0], zeros.astype(int), zeros, zeros), np.zeros((n, R), bool), zeros)

    def drawn(self, rows: StepRows, r: int, positions: list[int], others: np.ndarray) -> int:
        """Of a scored row; `others`: what the rows before it drew."""
        if rows.follows[r] >= 0:
            return int(others[rows.follows[r]])
        known = lambda row: tuple(self.texts[int(rows.slots[row])][: positions[row] + 1])
        row, other = rows.scored[r], ()
        slot = int(rows.slots[row])
        if (follower := [i for i, to in enumerate(rows.follows) if to == r]) != []:
            other = known(rows.scored[follower[0]])
        assert (self.about[slot].settings.guidance != 1) == bool(other), "a text that is guided is without its twin"
        text = (*known(row), self.salt) if self.salt else known(row)
        return next_token(text, int(self.about[slot].settings.seed), other)

    def write(self, slot: int, p: int) -> None:
        for window, memory in self.memory.items():
            block = int(self.tables[window][slot, p // self.C])
            assert 0 < block < self.blocks[window], "a token is written nowhere"
            memory[block, p % self.C] = (self.salt, *self.texts[slot][: p + 1])

    def look(self, slot: int, p: int) -> None:
        for window, memory in self.memory.items():
            for seen in range(max(p - window + 1, 0) if window else 0, p + 1):
                block = int(self.tables[window][slot, seen // self.C])
                assert memory[block, seen % self.C] == (self.salt, *self.texts[slot][: seen + 1])


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(engines, "Programs", CheckedDevice)
    yield


MODELS = {
    "whole": BYTE_MODEL,
    "window": with_attention(BYTE_MODEL, window=5),
    "both": dataclasses.replace(
        BYTE_MODEL, n_layers=2, blocks=(*with_attention(BYTE_MODEL, window=5).blocks, *BYTE_MODEL.blocks)
    ),
}


def make(model: str = "whole", **config: Any) -> Engine:
    run = small_run(model=MODELS[model], sharding=ShardingConfig(data=1))
    layout = make_layout(ShardingConfig(data=1), jax_devices())
    return Engine(
        LoadedRun(config=run, layout=layout, parameters=None, tokenizer=Bytes(), step=0),
        EngineConfig(**{"slots": 3, "tokens_per_step": 6, "block_size": 4, "queue": 50, **config}),
    )


def jax_devices() -> Any:
    import jax

    return jax.devices()[:1]


def answer(engine: Engine, found: dict[Ticket, list[Delta]], steps: int | None = None) -> None:
    n = 0
    while not engine.idle and (steps is None or n < steps):
        for ticket, delta in engine.step():
            found[ticket].append(delta)
        n += 1
        assert n < 5000, "it goes nowhere"


def check(request: Request, deltas: list[Delta]) -> None:
    tokens = [token for delta in deltas for token in delta.tokens]
    assert (tokens, deltas[-1].finish) == alone(request)
    assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


shared = tuple(range(10, 30))
requests = st.builds(
    lambda common, own, new, seed, ends, scale, negative: Request(
        prompt=shared[:common] + tuple(own) or (1,),
        max_new_tokens=new,
        seed=seed,
        ends=ends,
        guidance_scale=scale,
        negative_prompt=shared[:negative],
    ),
    st.sampled_from([0, 3, 4, 8, 15, 16, 20]),
    st.lists(st.integers(0, VOCAB - 1), max_size=7),
    st.integers(1, 14),
    st.integers(0, 2),
    st.sampled_from([(), (END,), (END, 8, 9)]),
    st.sampled_from([1.0, 1.0, 1.5]),
    st.sampled_from([0, 3, 9, 16]),
)


class Guesses:
    """Drafts, each of which is right with a probability."""

    def __init__(self, right: float) -> None:
        self.right, self.rng, self.n = right, np.random.default_rng(0), 0

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        found = []
        for sequence, most in asked:
            assert not most or not sequence.ahead
            truth = alone(sequence.request)[0][sequence.generated :][:most]
            wrong = self.rng.random(len(truth)) >= self.right
            found.append([(token + bad) % VOCAB for token, bad in zip(truth, wrong, strict=True)])
            self.n += len(found[-1])
        return found


class Schedules(RuleBasedStateMachine):
    """Requests come, steps run, some are cancelled; in the end every text is what it is alone."""

    def __init__(self) -> None:
        super().__init__()
        self.engine: Engine | None = None
        self.found: dict[Ticket, list[Delta]] = {}
        self.asked: dict[Ticket, Request] = {}
        self.cancelled: set[Ticket] = set()

    @precondition(lambda self: self.engine is None)
    @rule(
        model=st.sampled_from(list(MODELS)),
        blocks=st.integers(9, 30),
        decode_steps=st.sampled_from([1, 2, 5]),
        tokens=st.sampled_from([3, 4, 9]),
        drafts=st.sampled_from([None, 1, 3, 8]),
        right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    )
    def start(self, model: str, blocks: int, decode_steps: int, tokens: int, drafts: int | None, right: float) -> None:
        speculation = None if drafts is None else PromptLookup(drafts=drafts)
        self.engine = make(
            model,
            cache_tokens=4 * blocks,
            decode_steps=decode_steps,
            tokens_per_step=tokens,
            speculation=speculation,
        )
        if speculation is not None:
            self.engine._drafter = Guesses(right)

    @precondition(lambda self: self.engine is not None)
    @rule(request=requests)
    def ask(self, request: Request) -> None:
        assert self.engine is not None
        try:
            ticket = self.engine.submit(request)
        except BadRequest as error:
            assert "do not fit" in str(error)
            return
        self.found[ticket], self.asked[ticket] = [], request

    @precondition(lambda self: self.engine is not None)
    @rule(n=st.integers(1, 6))
    def run_some(self, n: int) -> None:
        assert self.engine is not None
        answer(self.engine, self.found, n)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        assert self.engine is not None
        ticket = data.draw(st.sampled_from(list(self.asked)))
        if (delta := self.engine.cancel(ticket)) is not None:
            self.found[ticket].append(delta)
            self.cancelled.add(ticket)

    @invariant()
    def blocks_add_up(self) -> None:
        if self.engine is None:
            return
        for shard in self.engine._shards:
            for window, pool in shard.pools.items():
                used = [b for one in shard.running for two in one.pair for b in two.blocks[window] if b]
                assert len(set(used)) + pool.n_free == pool.size - 1
                assert pool.n_kept == len(pool._held.keys() & pool._free.keys())
                assert pool._users == {block: used.count(block) for block in set(used)}
            assert len(shard._slots) + sum(len(one.pair) for one in shard.running) == self.engine.config.slots

    def teardown(self) -> None:
        if self.engine is None:
            return
        answer(self.engine, self.found)
        for ticket, request in self.asked.items():
            if ticket in self.cancelled:
                assert self.found[ticket][-1].finish is Finish.CANCELLED
                tokens = [token for delta in self.found[ticket] for token in delta.tokens]
                assert tokens == alone(request)[0][: len(tokens)]
            else:
                check(request, self.found[ticket])
        stats = self.engine.stats
        assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.blocks)
        if isinstance(guesses := self.engine._drafter, Guesses):
            assert stats.accepted_tokens <= stats.drafted_tokens <= guesses.n
            assert guesses.right < 1 or stats.accepted_tokens == stats.drafted_tokens


TestSchedules = pytest.mark.usefixtures("_checked")(Schedules.TestCase)
TestSchedules.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_who_lost_its_blocks_comes_back_when_its_tokens_are_read() -> None:
    """Not before: they are still on the device, and a text that begins again begins with what is known of it."""
    scheduler = Scheduler(
        slots=2, tokens_per_step=8, rows_per_step=2, block_size=4, pools={0: 8}, max_length=40, decode_steps=1
    )
    old, young = (Sequence(Request(prompt=(i,) * 9, max_new_tokens=15), i, [i] * 9) for i in range(2))
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.preemptions:
        plan = scheduler.plan()
        assert plan is not None
        scheduler.launched(plan)
    assert young.ahead and [chunk.sequence for chunk in plan.chunks] == [old]


def test_blocks_run_out_and_every_text_is_whole() -> None:
    engine = make(cache_tokens=4 * 9)
    asked = [Request(prompt=(i, i + 1, i + 2), max_new_tokens=30, seed=i) for i in range(6)]
    found: dict[Ticket, list[Delta]] = {}
    for request in asked:
        found[engine.submit(request)] = []
    answer(engine, found)
    for request, deltas in zip(asked, found.values(), strict=True):
        check(request, deltas)
    assert engine.stats.preemptions > 3


def test_what_ran_while_nobody_looked_took_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CheckedDevice.run

    def slow(*words: Any) -> Drawn:
        time.sleep(0.02)
        return run(*words)

    monkeypatch.setattr(CheckedDevice, "run", slow)
    engine = make(decode_steps=5)
    for new, deltas in ((6, 2), (11, 3)):
        found: dict[Ticket, list[Delta]] = {engine.submit(Request(prompt=(1, 2), max_new_tokens=new)): []}
        answer(engine, found)
        (said,) = found.values()
        assert len(said) == deltas and said[0].seconds == 0
        assert sum(delta.seconds for delta in said) >= 0.02 * (deltas - 1)


def test_a_beginning_is_read_once() -> None:
    engine = make(cache_tokens=400)
    first = Request(prompt=tuple(range(16)), max_new_tokens=1)
    for prompt, cached in ((first.prompt, 0), (first.prompt, 12), ((*first.prompt, 3), 16), ((3, *first.prompt), 0)):
        found = {engine.submit(dataclasses.replace(first, prompt=prompt)): []}
        answer(engine, found)  # type: ignore[arg-type]
        assert next(iter(found.values()))[0].cached_tokens == cached  # type: ignore[attr-defined]
