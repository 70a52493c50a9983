"""The engine: requests come and go while one compiled step runs over the tokens of all of them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import numpy.typing as npt

from maxlm.config import EngineConfig, UserError, WeightFormat
from maxlm.config.fields import Positive, Seed, require
from maxlm.data.text_ends import TextEnds
from maxlm.inference.checks import check_guided, check_lengths, check_model, prompt_ids
from maxlm.inference.drafting import Drafter, drafter_of
from maxlm.inference.engine_stats import EngineStats
from maxlm.inference.mixed_adapters import LoadedAdapter, check_adapter
from maxlm.inference.programs import Programs, pool_sizes
from maxlm.inference.request import TOP_SCORES, BadRequest, Delta, Finish, QueueFull, Request, TokenScore, with_virtual
from maxlm.inference.rows import Read, fill, in_place
from maxlm.inference.scheduler import Scheduler, Sequence, Stage, StepPlan
from maxlm.inference.settings import Settings, settings_row
from maxlm.inference.step import Drawn, StepRows, Texts
from maxlm.inference.structured import Constraint, Constraints
from maxlm.inference.text_stream import TextStream
from maxlm.models import Execution
from maxlm.sharding import decoding_layout

if TYPE_CHECKING:
    from maxlm.inference.load import LoadedRun

_LOG = logging.getLogger(__name__)
_NOT_FINITE = "the model's output is not finite: its parameters are damaged; use an earlier --step"
_NOTHING_LEFT = "no token is left to be drawn: all are banned; ban fewer"


@dataclass(eq=False)
class Ticket:
    """A request that the engine has taken."""

    sequence: Sequence
    shard: int
    stream: TextStream
    deadline: float | None
    constraint: Constraint | None = None
    """Where the text is in its grammar."""
    allowed: npt.NDArray[np.uint32] | None = None
    """What its grammar lets come next."""
    begun: bool = False
    """Something of it was handed out."""
    prompt_scores: list[TokenScore] = field(default_factory=list)


@dataclass(frozen=True)
class _Launched:
    """A step that runs."""

    drawn: Drawn
    reads: list[Read]
    began: float


class Engine:
    """Decodes many texts at once. Not for several threads: `EngineLoop` is.

    The same request gets the same tokens and log-probabilities whatever else runs, whenever it comes, and whatever the
    cache holds: on a CPU to the bit, as docs/generate.md tells; on other devices nobody has tried.
    """

    def __init__(
        self,
        run: LoadedRun,
        config: EngineConfig = EngineConfig(),
        *,
        weights: WeightFormat = WeightFormat.DTYPE,
        draft: LoadedRun | None = None,
        adapters: Mapping[str, LoadedAdapter] = MappingProxyType({}),
    ) -> None:
        """Places the weights, makes room for the cache, and compiles every program that will ever run.

        Args:
            run: the model. Where its layout has several shards of the batch, each has `config`'s slots and blocks.
            config: how much at once.
            weights: the format in which they are held.
            draft: the model that `config.speculation` names, if it is a `DraftModel`.
            adapters: what `Request.adapter` may name, all of this model.

        Raises:
            UserError: texts have ids that the model does not know, the model cannot decode, or has not learned to
                write; the cache has no room, there is no draft model, or it has other tokens; or an adapter does not
                fit.
        """
        model, self.tokenizer = run.config.model, run.tokenizer
        self.ends = run.ends or TextEnds.of_documents(run.tokenizer)
        check_model(run.config, max([self.tokenizer.text_size, *(i + 1 for i in self.ends.first)]))
        for name, adapter in adapters.items():
            check_adapter(name, adapter, model)
        self._adapters: dict[str | None, int] = {None: 0} | {name: n for n, name in enumerate(adapters, start=1)}
        self._virtual = model.virtual_tokens
        self.config, self.max_length, self.vocab_size = config, model.max_seq_len, model.vocab_size
        layout = decoding_layout(run.layout, model.d_model)
        how = Execution.of(run.config, run.layout).decoding(layout)
        most = config.most_tokens(on_cpu=layout.on_cpu)
        pools = pool_sizes(model, config, how, most)
        self._programs = Programs(
            model,
            run.parameters,
            how,
            config,
            weights=weights,
            tokens_per_step=most,
            blocks=pools,
            adapters=tuple(adapters.values()),
        )
        self._shards = [
            Scheduler(
                slots=config.slots,
                tokens_per_step=self._programs.widths[-1],
                rows_per_step=self._programs.scored_rows(self._programs.widths[-1]),
                block_size=config.block_size,
                pools=pools,
                max_length=model.max_seq_len,
                decode_steps=config.most_steps,
            )
            for _ in range(layout.batch_shards)
        ]
        self._drafter = drafter_of(config, model, self.tokenizer, draft, Engine)
        self._tickets: dict[Sequence, Ticket] = {}
        self._constraints: dict[tuple[int, ...], Constraints] = {}
        self._numbers = itertools.count()
        self._flying: _Launched | None = None
        self._updates, self._read_at = 0, 0.0
        self._counts = dict.fromkeys(("prompt", "cached", "generated", "steps", "finished", "drafted", "accepted"), 0)

    def submit(self, request: Request) -> Ticket:
        """Take a request; it waits for its turn.

        Raises:
            QueueFull: as many wait as may.
            BadRequest: an id, a number or a length is out of range.
        """
        if self.full:
            raise QueueFull(f"{self.config.queue} requests wait already, as engine.queue says; try again later")
        self.check(request)
        text, request = request, with_virtual(request, self._virtual)
        sequence = Sequence(request, next(self._numbers), list(request.prompt))
        if (other := request.twin) is not None:
            sequence.twin = Sequence(other, sequence.number, list(other.prompt), leader=sequence)
        shard = min(range(len(self._shards)), key=lambda i: len(self._shards[i].running) + len(self._shards[i].waiting))
        deadline = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        stream = TextStream(self.tokenizer, text.prompt, text.stop)
        constraint = self._constraint(request)
        allowed = None if constraint is None else constraint.mask()
        ticket = Ticket(sequence, shard, stream, deadline, constraint, allowed)
        self._shards[shard].add(sequence)
        self._tickets[sequence] = ticket
        return ticket

    def check(self, request: Request) -> None:
        """
        Raises:
            BadRequest: an id, a number or a length is out of range.
        """
        try:
            require("max_new_tokens", request.max_new_tokens, Positive[int])
            require("seed", request.seed, Seed)
            if not request.prompt:
                raise UserError("prompt has no tokens; must have at least one")
            for key in ("prompt", "negative_prompt"):
                if wrong := [i for i in getattr(request, key) if not 0 <= i < self.vocab_size]:
                    raise UserError(f"{key} holds id {wrong[0]}; must lie in [0, {self.vocab_size})")
            if request.adapter not in self._adapters:
                there = " or ".join(name for name in self._adapters if name) or "none: the engine has no adapters"
                raise UserError(f"adapter = {request.adapter!r} is not here; use {there}")
            virtual = self._virtual
            if "" in request.stop:
                raise UserError("stop: holds an empty string, which stands before every text; leave it out")
            for name in ("logprobs", "prompt_logprobs"):
                n = getattr(request, name)
                if n is not None and not 0 <= n <= TOP_SCORES:
                    raise UserError(f"{name} = {n}; must lie in [0, {TOP_SCORES}]")
            check_lengths(virtual + len(request.prompt), request.max_new_tokens, self.max_length)
            prompts = [virtual + len(request.prompt)]
            if (twin := request.twin) is not None:
                prompts.append(virtual + len(twin.prompt))
                slots = min(self.config.slots, self._programs.widths[-1])
                check_guided(request, twin, self.max_length, slots)
            if not self._shards[0].fits(*(n + request.max_new_tokens for n in prompts)):
                whose = "the prompt's" if twin is None else "the prompts'"
                raise UserError(
                    f"{whose} {sum(prompts)} tokens and max_new_tokens = {request.max_new_tokens} do not "
                    "fit the whole cache; ask for fewer, or start the engine with more engine.cache_tokens"
                )
            self._settings(request)
            self._constraint(request)
        except UserError as error:
            raise BadRequest(str(error)) from error

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """What a continuation of a text starts from, as texts of this model begin.

        Raises:
            BadRequest: it is not UTF-8.
        """
        return prompt_ids(self.ends, self.tokenizer, text)

    @property
    def full(self) -> bool:
        """As many requests wait as may."""
        return sum(len(shard.waiting) for shard in self._shards) >= self.config.queue * len(self._shards)

    @property
    def idle(self) -> bool:
        """Nothing waits, nothing runs."""
        return not self._tickets and self._flying is None

    def step(self) -> list[tuple[Ticket, Delta]]:
        """Launch the next step, and read the one before while it runs: what texts have grown by."""
        found = self._expire()
        launched = self._launch()
        found += self._read()
        self._flying = launched
        if launched is not None and self._looks_at_each_token():
            found += self._read()
        return found

    def cancel(self, ticket: Ticket, finish: Finish = Finish.CANCELLED) -> Delta | None:
        """End a text now; None: it has ended."""
        if ticket.sequence.stage is Stage.ENDED:
            return None
        return self._end(ticket, finish)

    def update_weights(self, parameters: Any) -> list[tuple[Ticket, Delta]]:
        """Go on with other parameters, nested dicts of float32 arrays. Texts keep their tokens; the cache is empty."""
        found = self._read()
        self._programs.update(parameters)
        self._updates += 1
        for shard in self._shards:
            shard.forget(str(self._updates).encode())
        return found

    @property
    def stats(self) -> EngineStats:
        """Now."""
        pools = [pool for shard in self._shards for pool in shard.pools.values()]
        return EngineStats(
            running=sum(len(shard.running) for shard in self._shards),
            waiting=sum(len(shard.waiting) for shard in self._shards),
            blocks=sum(pool.size - 1 for pool in pools),
            free_blocks=sum(pool.n_free for pool in pools),
            kept_blocks=sum(pool.n_kept for pool in pools),
            prompt_tokens=self._counts["prompt"],
            cached_tokens=self._counts["cached"],
            generated_tokens=self._counts["generated"],
            preemptions=sum(shard.preemptions for shard in self._shards),
            steps=self._counts["steps"],
            finished=self._counts["finished"],
            drafted_tokens=self._counts["drafted"],
            accepted_tokens=self._counts["accepted"],
        )

    def _settings(self, request: Request) -> Settings:
        asked = [n for n in (request.logprobs, request.prompt_logprobs) if n is not None]
        return settings_row(
            request.sampling,
            vocab=self.vocab_size,
            tokens=min(self.tokenizer.vocab_size, self.vocab_size),
            seed=request.seed,
            ends=request.ends,
            logit_bias=request.logit_bias,
            banned=request.banned,
            logprobs=max(asked, default=None),
            processed_logprobs=request.processed_logprobs,
            told=request.told,
            guidance=request.guidance_scale,
        )

    def _constraint(self, request: Request) -> Constraint | None:
        """
        Raises:
            UserError: the grammar is not one.
        """
        if request.grammar is None:
            return None
        if not request.ends:
            raise UserError("ends is empty, and a grammar needs an id that ends its text; name one")
        if request.ends not in self._constraints:
            self._constraints[request.ends] = Constraints(self.tokenizer, ends=request.ends, vocab=self.vocab_size)
        return self._constraints[request.ends].start(request.grammar)

    def _expire(self) -> list[tuple[Ticket, Delta]]:
        """End what is beyond its deadline."""
        now = time.monotonic()
        late = [ticket for ticket in self._tickets.values() if ticket.deadline is not None and ticket.deadline < now]
        return [(ticket, self._end(ticket, Finish.DEADLINE)) for ticket in late]

    def _looks_at_each_token(self) -> bool:
        """Whether the next step cannot be launched before this one is read."""
        if self._drafter is not None:
            return True
        return any(one.request.grammar is not None for shard in self._shards for one in shard.running)

    def _launch(self) -> _Launched | None:
        plans = [shard.plan() for shard in self._shards]
        if not any(plans):
            return None
        if self._drafter is not None:
            plans = self._with_drafts(plans, self._drafter)
        n_steps = min(plan.n_steps for plan in plans if plan)
        plans = [plan and dataclasses.replace(plan, n_steps=n_steps) for plan in plans]
        for number, plan in enumerate(plans):
            for chunk in plan.chunks if plan else ():
                if not chunk.sequence.begun:
                    self._begin_text(number, chunk.sequence)
        most = max(plan.n_tokens for plan in plans if plan)
        width = next(width for width in self._programs.widths if width >= most)
        rows, reads = self._rows(plans, width)
        if any(shard.tables_changed for shard in self._shards):
            self._put_tables()
        began = time.perf_counter()
        drawn = self._programs.run(width, rows, n_steps)
        for shard, plan in zip(self._shards, plans, strict=True):
            if plan:
                shard.launched(plan)
        self._counts["steps"] += n_steps
        return _Launched(drawn, reads, began)

    def _begin_text(self, shard: int, sequence: Sequence) -> None:
        """Tell the device about a text that has got a slot."""
        request = sequence.request
        history = np.zeros(self.max_length + 1, np.int32)
        history[: len(sequence.tokens)] = sequence.tokens
        settings = self._settings(request)
        allowed = self._tickets[sequence].allowed if sequence.leader is None else None
        if allowed is not None:
            settings = settings._replace(allowed=allowed)
        adapter = np.int32(self._adapters[request.adapter])
        text = Texts(history, np.int32(len(request.prompt)), np.int32(sequence.end), np.bool_(False), adapter, settings)
        self._programs.begin(self._slot(shard, sequence), text)
        sequence.begun = True
        if not sequence.generated:
            self._counts["prompt"] += len(request.prompt) - self._virtual
            self._counts["cached"] += max(sequence.cached - self._virtual, 0)

    def _with_drafts(self, plans: list[StepPlan | None], drafter: Drafter) -> list[StepPlan | None]:
        """The plans with guesses, of which all texts' are made at once."""
        both = [(shard, plan) for shard, plan in zip(self._shards, plans, strict=True) if plan]
        rooms = [shard.room(plan, self.config.drafts) for shard, plan in both]
        asked = [
            (chunk.sequence, most)
            for (_, plan), room in zip(both, rooms, strict=True)
            for chunk, most in zip(plan.chunks, room, strict=True)
        ]
        found = iter(drafter.propose(asked))
        with_drafts = iter([shard.with_drafts(plan, [next(found) for _ in plan.chunks]) for shard, plan in both])
        return [plan and next(with_drafts) for plan in plans]

    def _rows(self, plans: list[StepPlan | None], width: int) -> tuple[StepRows, list[Read]]:
        """What the device reads of these plans, and what is to be read of what it answers."""
        rows, reads, n_scored = self._programs.no_rows(width), list[Read](), self._programs.scored_rows(width)
        for shard, plan in enumerate(plans):
            if plan is not None:
                place = {"row": shard * width, "scored": shard * n_scored, "slot": shard * self.config.slots}
                reads += fill(rows, plan, **place, parents=self.config.parents)
        return rows, reads

    def _read(self) -> list[tuple[Ticket, Delta]]:
        """Wait for the step that runs, and see what it drew."""
        if (flying := self._flying) is None:
            return []
        self._flying = None
        known: Any = flying.drawn.tokens
        over = not isinstance(known, jax.Array) or known.is_ready()  # type: ignore[attr-defined]
        tokens, broken = np.asarray(known), np.asarray(flying.drawn.broken)
        now = time.perf_counter()
        seconds = now - max(flying.began, self._read_at)
        # First tokens have no time. If they were there before anybody looked, the next step runs since its launch.
        if not over or all(read.sequence.generated for read in flying.reads):
            self._read_at = now
        drawn, asked = flying.drawn, [read.sequence.request for read in flying.reads]
        if any(one.logprobs is not None or one.prompt_logprobs is not None for one in asked):
            drawn = drawn._replace(scores=jax.tree.map(np.asarray, drawn.scores))
        if any(one.states for one in asked):
            drawn = drawn._replace(states=jax.tree.map(lambda x: np.asarray(x, np.float32), drawn.states))
        guesses = None if drawn.guesses is None else np.asarray(drawn.guesses)
        found = []
        for read in flying.reads:
            sequence, places = read.sequence, read.places(tokens)
            for one in sequence.pair:
                one.ahead -= read.steps if read.sample else 0
            if sequence.stage is Stage.ENDED:
                continue
            ticket = self._tickets[sequence]
            if any(broken[place] for place in places):
                found.append((ticket, self._end(ticket, Finish.ERROR, error=_NOT_FINITE)))
            elif not read.sample:
                n = sequence.request.prompt_logprobs or 0
                ticket.prompt_scores.append(_score(drawn, places[0], int(tokens[places[0]]), sequence.request, n))
            else:
                self._counts["drafted"] += len(read.drafts)
                self._counts["accepted"] += len(places) - 1 if read.drafts else 0
                self._shards[ticket.shard].came_true(sequence, in_place(places) if read.drafts else 0)
                if guesses is not None and self._drafter is not None:
                    self._drafter.saw(sequence, guesses[0, self._slot(ticket.shard, sequence)])
                found.append((ticket, self._grown(ticket, [int(tokens[p]) for p in places], places, drawn, seconds)))
        return found

    def _grown(
        self, ticket: Ticket, tokens: list[int], places: list[tuple[int, int]], drawn: Drawn, seconds: float
    ) -> Delta:
        """A text has more tokens, the last of which may end it."""
        sequence, stream = ticket.sequence, ticket.stream
        request = sequence.request
        finish: Finish | None = None
        reason: str | int | None = None
        text = ""
        for n, token in enumerate(tokens, start=1):
            if token < 0:
                return self._end(ticket, Finish.NOTHING_FITS, error=_NOTHING_LEFT)
            if request.stop:  # how many tokens come at a time does not change which of them is the last
                text += stream.add([token])
            if stream.stopped is not None or token in request.ends:
                tokens, finish = tokens[:n], Finish.STOP
                reason = token if stream.stopped is None else stream.stopped
                break
        for one in sequence.pair:
            one.tokens += tokens
        text = text if request.stop else stream.add(tokens)
        if finish is None and len(sequence.tokens) >= sequence.end:
            finish = Finish.LENGTH
        of_tokens: tuple[TokenScore, ...] = ()
        if request.logprobs is not None:
            of_tokens = tuple(
                _score(drawn, place, token, request, request.logprobs)
                for place, token in zip(places, tokens, strict=False)  # the last ones may be cut off
            )
        self._counts["generated"] += len(tokens)
        first = not ticket.begun
        delta = Delta(
            tokens=tuple(tokens),
            text=text,
            scores=of_tokens,
            prompt_scores=tuple(ticket.prompt_scores[self._virtual :]) if first else (),
            cached_tokens=max(sequence.cached - self._virtual, 0) if first else 0,
            seconds=0.0 if first else seconds,
        )
        ticket.begun = True
        if finish is None and ticket.constraint is not None:
            try:
                ticket.constraint.accept(tokens[-1])
                ticket.allowed = ticket.constraint.mask()
            except UserError as error:  # of this text alone
                return self._end(ticket, Finish.NOTHING_FITS, error=str(error))
            if sequence.begun:
                self._programs.allow(self._slot(ticket.shard, sequence), ticket.allowed)
        if finish is None:
            for one in sequence.pair:
                self._shards[ticket.shard].hold(one)
            return delta
        ended = self._end(ticket, finish)
        if finish is Finish.LENGTH and stream.stopped is not None:  # in what waited for more tokens
            finish, reason = Finish.STOP, stream.stopped
        return dataclasses.replace(delta, text=text + ended.text, finish=finish, stop_reason=reason)

    def _end(self, ticket: Ticket, finish: Finish, *, error: str = "") -> Delta:
        self._shards[ticket.shard].end(ticket.sequence)
        del self._tickets[ticket.sequence]
        self._counts["finished"] += 1
        return Delta(text=ticket.stream.finish(), finish=finish, error=error)

    def _slot(self, shard: int, sequence: Sequence) -> int:
        """Counted over all shards, as the device does."""
        return shard * self.config.slots + sequence.slot

    def _put_tables(self) -> None:
        windows = self._shards[0].tables
        self._programs.put_tables(
            {window: np.concatenate([shard.tables[window] for shard in self._shards]) for window in windows}
        )
        for shard in self._shards:
            shard.tables_changed = False


def _score(drawn: Drawn, place: tuple[int, int], token: int, request: Request, n: int) -> TokenScore:
    scores = drawn.scores
    top = zip(scores.top_ids[place][:n].tolist(), scores.top[place][:n].tolist(), strict=True)
    told = scores.told[place][: len(request.told)].tolist()
    state: Any = drawn.states[place] if request.states else None
    return TokenScore(token, float(scores.chosen[place]), tuple(top), tuple(told), state)
