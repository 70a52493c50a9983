"""The engine: requests come and go while one compiled step runs over the tokens of all of them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from maxlm.config import EngineConfig, LmHead, ModelConfig, UserError, WeightFormat
from maxlm.config.fields import Positive, Seed, require
from maxlm.data.text_ends import TextEnds
from maxlm.data.tokenizers import Tokenizer
from maxlm.inference.programs import Programs, pool_sizes
from maxlm.inference.request import TOP_SCORES, BadRequest, Delta, Finish, QueueFull, Request, TokenScore
from maxlm.inference.sampling import LogProbs
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


@dataclass(eq=False)
class Ticket:
    """A request that the engine has taken."""

    sequence: Sequence
    shard: int
    stream: TextStream
    deadline: float | None
    constraint: Constraint | None = None
    """Where the text is in its grammar."""
    begun: bool = False
    """Something of it was handed out."""
    prompt_scores: list[TokenScore] = field(default_factory=list)


@dataclass(frozen=True)
class _Read:
    """One scored row of a step."""

    ticket: Ticket
    row: int
    sample: bool
    """Tokens were drawn; else one of the prompt was scored."""
    steps: int
    """Tokens drawn at most."""


@dataclass(frozen=True)
class _Launched:
    """A step that runs."""

    drawn: Drawn
    reads: list[_Read]
    began: float


class Engine:
    """Decodes many texts at once. Not for several threads: `EngineLoop` is.

    The same request gets the same tokens and log-probabilities whatever else runs, whenever it comes, and whatever the
    cache holds: on a CPU to the bit, as docs/generate.md tells; on other devices nobody has tried.
    """

    def __init__(
        self, run: LoadedRun, config: EngineConfig = EngineConfig(), *, weights: WeightFormat = WeightFormat.DTYPE
    ) -> None:
        """Places the weights, makes room for the cache, and compiles every program that will ever run.

        Args:
            run: the model. Where its layout has several shards of the batch, each has `config`'s slots and blocks.
            config: how much at once.
            weights: the format in which they are held.

        Raises:
            UserError: texts have ids that the model does not know, the model cannot decode, or the cache has no room.
        """
        model, self.tokenizer = run.config.model, run.tokenizer
        self.ends = run.ends or TextEnds.of_documents(run.tokenizer)
        _check(model, max([self.tokenizer.text_size, *(i + 1 for i in self.ends.first)]))
        self.config, self.max_length, self.vocab_size = config, model.max_seq_len, model.vocab_size
        layout = decoding_layout(run.layout, model.d_model)
        how = Execution.of(run.config, run.layout).decoding(layout)
        most = config.most_tokens(on_cpu=layout.on_cpu)
        pools = pool_sizes(model, config, how, most)
        self._programs = Programs(
            model, run.parameters, how, config, weights=weights, tokens_per_step=most, blocks=pools
        )
        self._shards = [
            Scheduler(
                slots=config.slots,
                tokens_per_step=self._programs.widths[-1],
                rows_per_step=self._programs.scored_rows(self._programs.widths[-1]),
                block_size=config.block_size,
                pools=pools,
                max_length=model.max_seq_len,
                decode_steps=config.decode_steps,
            )
            for _ in range(layout.batch_shards)
        ]
        self._tickets: dict[Sequence, Ticket] = {}
        self._constraints: dict[tuple[int, ...], Constraints] = {}
        self._numbers = itertools.count()
        self._flying: _Launched | None = None
        self._updates, self._read_at = 0, 0.0
        self._counts = dict.fromkeys(("prompt", "cached", "generated", "steps", "finished"), 0)

    def submit(self, request: Request) -> Ticket:
        """Take a request; it waits for its turn.

        Raises:
            QueueFull: as many wait as may.
            BadRequest: an id, a number or a length is out of range.
        """
        if self.full:
            raise QueueFull(f"{self.config.queue} requests wait already, as engine.queue says; try again later")
        self.check(request)
        sequence = Sequence(request, next(self._numbers), list(request.prompt))
        shard = min(range(len(self._shards)), key=lambda i: len(self._shards[i].running) + len(self._shards[i].waiting))
        deadline = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        stream = TextStream(self.tokenizer, request.prompt, request.stop)
        ticket = Ticket(sequence, shard, stream, deadline, self._constraint(request))
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
            if wrong := [i for i in request.prompt if not 0 <= i < self.vocab_size]:
                raise UserError(f"prompt holds id {wrong[0]}; must lie in [0, {self.vocab_size})")
            for name in ("logprobs", "prompt_logprobs"):
                n = getattr(request, name)
                if n is not None and not 0 <= n <= TOP_SCORES:
                    raise UserError(f"{name} = {n}; must lie in [0, {TOP_SCORES}]")
            check_lengths(len(request.prompt), request.max_new_tokens, self.max_length)
            if not self._shards[0].fits(len(request.prompt) + request.max_new_tokens):
                raise UserError(
                    f"the prompt's {len(request.prompt)} tokens and max_new_tokens = {request.max_new_tokens} do not "
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
        return _prompt_ids(self.ends, self.tokenizer, text)

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
        return any(one.request.grammar is not None for shard in self._shards for one in shard.running)

    def _launch(self) -> _Launched | None:
        plans = [shard.plan() for shard in self._shards]
        if not any(plans):
            return None
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
        if (constraint := self._tickets[sequence].constraint) is not None:
            settings = settings._replace(allowed=constraint.mask())
        text = Texts(history, np.int32(len(request.prompt)), np.int32(sequence.end), np.bool_(False), settings)
        self._programs.begin(self._slot(shard, sequence), text)
        sequence.begun = True
        if not sequence.generated:
            self._counts["prompt"] += len(request.prompt)
            self._counts["cached"] += sequence.cached

    def _rows(self, plans: list[StepPlan | None], width: int) -> tuple[StepRows, list[_Read]]:
        """What the device reads of these plans, and what is to be read of what it answers."""
        rows, reads = self._programs.no_rows(width), []
        for shard, plan in enumerate(plans):
            if plan is None:
                continue
            row, scored = shard * width, shard * self._programs.scored_rows(width)
            for chunk in plan.chunks:
                sequence, end = chunk.sequence, row + chunk.count
                rows.slots[row:end] = self._slot(shard, sequence)
                rows.positions[row:end] = range(chunk.first, chunk.first + chunk.count)
                wanted = []
                if sequence.request.prompt_logprobs is not None:  # of the token after each that is read
                    last = min(chunk.first + chunk.count, len(sequence.request.prompt) - 1)
                    wanted = [(place - chunk.first, False) for place in range(chunk.first, last)]
                if chunk.samples:
                    wanted.append((chunk.count - 1, True))
                for offset, sample in wanted:
                    rows.scored[scored], rows.samples[scored] = row + offset, sample
                    steps = min(plan.n_steps, sequence.end - sequence.length) if sample else 1
                    reads.append(_Read(self._tickets[sequence], scored, sample, steps))
                    scored += 1
                row = end
        return rows, reads

    def _read(self) -> list[tuple[Ticket, Delta]]:
        """Wait for the step that runs, and see what it drew."""
        if (flying := self._flying) is None:
            return []
        self._flying = None
        tokens, broken = np.asarray(flying.drawn.tokens), np.asarray(flying.drawn.broken)
        seconds = time.perf_counter() - max(flying.began, self._read_at)
        self._read_at = time.perf_counter()
        scored = any(read.ticket.sequence.request.logprobs is not None or not read.sample for read in flying.reads)
        scores = jax.tree.map(np.asarray, flying.drawn.scores) if scored else None
        found = []
        for read in flying.reads:
            ticket, sequence = read.ticket, read.ticket.sequence
            sequence.ahead -= read.steps if read.sample else 0
            if sequence.stage is Stage.ENDED:
                continue
            if broken[: read.steps, read.row].any():
                found.append((ticket, self._end(ticket, Finish.ERROR, error=_NOT_FINITE)))
            elif not read.sample:
                assert scores is not None
                n = sequence.request.prompt_logprobs or 0
                ticket.prompt_scores.append(_score(scores, 0, read.row, int(tokens[0, read.row]), n))
            else:
                found.append((ticket, self._grown(read, tokens[: read.steps, read.row].tolist(), scores, seconds)))
        return found

    def _grown(self, read: _Read, tokens: list[int], scores: LogProbs | None, seconds: float) -> Delta:
        """A text has more tokens, the last of which may end it."""
        ticket, sequence = read.ticket, read.ticket.sequence
        request, stream = sequence.request, ticket.stream
        finish: Finish | None = None
        reason: str | int | None = None
        for n, token in enumerate(tokens, start=1):
            if token < 0:
                return self._end(ticket, Finish.ERROR, error=_NOTHING_LEFT)
            if token in request.ends:
                tokens, finish, reason = tokens[:n], Finish.STOP, token
                break
        sequence.tokens += tokens
        text = stream.add(tokens)
        if stream.stopped is not None:
            finish, reason = Finish.STOP, stream.stopped
        elif finish is None and len(sequence.tokens) >= sequence.end:
            finish = Finish.LENGTH
        of_tokens: tuple[TokenScore, ...] = ()
        if request.logprobs is not None and scores is not None:
            of_tokens = tuple(
                _score(scores, step, read.row, token, request.logprobs) for step, token in enumerate(tokens)
            )
        self._counts["generated"] += len(tokens)
        first = not ticket.begun
        delta = Delta(
            tokens=tuple(tokens),
            text=text,
            scores=of_tokens,
            prompt_scores=tuple(ticket.prompt_scores) if first else (),
            cached_tokens=sequence.cached if first else 0,
            seconds=0.0 if first else seconds,
        )
        ticket.begun = True
        if finish is None and ticket.constraint is not None:
            ticket.constraint.accept(tokens[-1])
            if sequence.begun:
                self._programs.allow(self._slot(ticket.shard, sequence), ticket.constraint.mask())
        if finish is None:
            self._shards[ticket.shard].hold(sequence)
            return delta
        ended = self._end(ticket, finish)
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


def check_prompt(run: LoadedRun, prompt: str, max_new_tokens: int) -> None:
    """What needs no engine to be known, which takes time to make.

    Raises:
        UserError: the prompt is not UTF-8, or it and what is to follow are more than the model is meant for.
    """
    ids = _prompt_ids(run.ends or TextEnds.of_documents(run.tokenizer), run.tokenizer, prompt)
    check_lengths(len(ids), max_new_tokens, run.config.model.max_seq_len)


def _prompt_ids(ends: TextEnds, tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are not UTF-8 arrive as half characters
        raise BadRequest(f"prompt = {text[:40]!r}: character {error.start} is not UTF-8; give UTF-8") from error
    return tuple(ends.prompt_ids(tokenizer, text))


def check_lengths(
    prompt: int, new: int, limit: int, *, key: str = "max_new_tokens", prompt_key: str = "the prompt"
) -> None:
    """
    Raises:
        UserError: so many tokens of a prompt and so many new ones are more than the model is meant for.
    """
    if prompt + new <= limit:
        return
    remedies = [f"use {key} <= {limit - prompt}"] if prompt < limit else []
    if new < limit:
        remedies.append(f"shorten {prompt_key} to at most {limit - new} tokens")
    remedy = " or ".join(remedies) or "shorten both"
    raise UserError(
        f"{prompt_key}'s {prompt} tokens and {key} = {new} make {prompt + new}, more than model.max_seq_len = {limit}; "
        f"{remedy}"
    )


def _check(model: ModelConfig, needed: int) -> None:
    """
    Raises:
        UserError: the model cannot go on with texts, or knows fewer ids than these have.
    """
    if not isinstance(model.head, LmHead):
        raise UserError(f"model.head = {type(model.head).__name__} gives no logits; use a run with an LmHead")
    if needed > model.vocab_size:
        raise UserError(
            f"model.vocab_size = {model.vocab_size} is less than the tokenizer's {needed}; use the "
            "tokenizer that the model was trained with"
        )
    if not model.decodes:
        raise UserError(
            f"{model.looks_ahead}: such a model looks at later tokens and cannot decode; "
            "measure it with python -m maxlm.evaluate"
        )


def _score(scores: LogProbs, step: int, row: int, token: int, n: int) -> TokenScore:
    top = zip(scores.top_ids[step, row, :n].tolist(), scores.top[step, row, :n].tolist(), strict=True)
    return TokenScore(token, float(scores.chosen[step, row]), tuple(top))
