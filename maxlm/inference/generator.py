"""Text from prompts: one prefill, then a compiled decoding loop that comes up for air every few tokens."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import ModelConfig, SamplingConfig, UserError, WeightFormat
from maxlm.config.fields import Positive, Seed, require
from maxlm.data.text_ends import TextEnds
from maxlm.inference.held import held
from maxlm.inference.steps import Choice, DecodeState, decode_chunk, prefill_logits, row_keys
from maxlm.inference.text_stream import TextStream
from maxlm.models import Execution, bind
from maxlm.sharding import decoding_layout

if TYPE_CHECKING:
    from maxlm.inference.load import LoadedRun

_SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What one prompt was continued with."""

    text: str
    """The continuation alone, without the prompt."""
    tokens: list[int]
    """Its ids; the last one is one that ends a text if the model ended it itself."""
    tokens_per_s: float | None
    """Tokens of this text for each second of decoding. Reading the prompt, which also gives the first token, and
    compilation do not count. None: there was nothing to decode after the first token."""


@dataclasses.dataclass(frozen=True)
class _Chunk:
    rows: list[list[int]]
    """New ids of each row."""
    seconds: float
    """Time spent decoding; 0 for the prefill's."""


class Generator:
    """Continues prompts. Holds the weights on the mesh of the run that it is given.

    A program is compiled when a new combination of batch size, lengths (rounded up to a power of two) and sampling
    settings first comes, and kept.
    """

    def __init__(self, run: LoadedRun, *, weights: WeightFormat = WeightFormat.DTYPE, chunk: int = 16) -> None:
        """Places the weights.

        Args:
            run: what to continue prompts with.
            weights: the format in which they are held, where the run has plain ones.
            chunk: tokens decoded between two looks from outside. It changes how text streams, never the text.

        Raises:
            UserError: texts have ids that the model does not know, or the model cannot decode.
        """
        self._config, self._tokenizer, self._chunk = run.config.model, run.tokenizer, chunk
        self._ends = run.ends or TextEnds.of_documents(run.tokenizer)
        needed = max([self._tokenizer.text_size, *(i + 1 for i in self._ends.first)])
        if needed > self._config.vocab_size:
            raise UserError(
                f"model.vocab_size = {self._config.vocab_size} is less than the tokenizer's {needed}; use the "
                "tokenizer that the model was trained with"
            )
        if not self._config.decodes:
            raise UserError(
                f"{self._config.looks_ahead}: such a model looks at later tokens and cannot decode; "
                "measure it with python -m maxlm.evaluate"
            )
        self._layout = decoding_layout(run.layout, self._config.d_model)
        self._how = Execution.of(run.config, run.layout).decoding(self._layout)
        self._parameters = held(run.parameters, self._config, self._how, weights)
        if self._layout.on_cpu:
            self._config, self._parameters = layers_apart(self._config, self._parameters)
        self._programs: dict[Any, jax.stages.Compiled] = {}

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig = SamplingConfig(),
        seed: int = 0,
    ) -> list[Generation]:
        """Continue several prompts as one batch, each up to `max_new_tokens` or the end of its document.

        A row's randomness is a function of the seed, the row's place in the batch and the token's position.

        Raises:
            UserError: a prompt is not UTF-8, it and its new tokens do not fit model.max_seq_len, `max_new_tokens` or
                the seed is out of range, or the model's output is not finite.
        """
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        streams = [TextStream(self._tokenizer, row) for row in ids]
        tokens: list[list[int]] = [[] for _ in ids]
        timers = [_Timer() for _ in ids]
        for chunk in self._chunks(ids, max_new_tokens, sampling, seed):
            for row, new in enumerate(chunk.rows):
                tokens[row] += new
                timers[row].add(len(new), chunk.seconds)
        for stream, row_tokens in zip(streams, tokens, strict=True):
            stream.add(row_tokens)
        return [
            Generation(text=stream.text, tokens=row, tokens_per_s=timer.rate)
            for stream, row, timer in zip(streams, tokens, timers, strict=True)
        ]

    def stream(
        self, prompt: str, *, max_new_tokens: int, sampling: SamplingConfig = SamplingConfig(), seed: int = 0
    ) -> collections.abc.Generator[str, None, Generation]:
        """Continue one prompt, yielding its text piece by piece; the generator's return value is the whole.

        The pieces together are the text of `generate([prompt])`, and never end within a character.

        Raises:
            UserError: as `generate`, at the first piece.
        """
        ids = self._prompt_ids(prompt)
        stream, tokens, timer = TextStream(self._tokenizer, ids), list[int](), _Timer()
        for chunk in self._chunks([ids], max_new_tokens, sampling, seed):
            tokens += chunk.rows[0]
            timer.add(len(chunk.rows[0]), chunk.seconds)
            if piece := stream.add(chunk.rows[0]):
                yield piece
        if piece := stream.finish():
            yield piece
        return Generation(text=stream.text, tokens=tokens, tokens_per_s=timer.rate)

    def _chunks(
        self, prompts: list[list[int]], max_new_tokens: int, sampling: SamplingConfig, seed: int
    ) -> collections.abc.Iterator[_Chunk]:
        if not prompts:
            return
        longest = self._check(prompts, max_new_tokens, seed)
        limit, cut = self._config.max_seq_len, self._layout.batch_shards
        B, T = -(-len(prompts) // cut) * cut, _bucket(longest, limit)
        cache_length = _bucket(longest + max_new_tokens, limit)
        choose = Choice(sampling, min(self._tokenizer.vocab_size, self._config.vocab_size), self._ends.last)

        padded, lengths = np.zeros((B, T), np.int32), np.ones(B, np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        tokens, rows_lengths, idle, np_seed = jax.device_put(
            (padded, lengths, np.arange(B) >= len(prompts), np.uint32(seed)), self._layout.sharding()
        )
        prefill = self._program(
            functools.partial(self._prefill, cache_length=cache_length, choose=choose),
            ("prefill", B, T, cache_length, choose),
            (self._parameters, tokens, rows_lengths, idle, np_seed),
        )
        state, finite = prefill(self._parameters, tokens, rows_lengths, idle, np_seed)
        if not finite:
            raise UserError("the model's output is not finite: its parameters are damaged; use an earlier --step")
        rows = [[int(token)] for token in np.asarray(state.token)[: len(prompts)]]
        yield _Chunk(rows, 0.0)

        ended, left = [row[-1] in choose.ends for row in rows], max_new_tokens - 1
        everywhere = self._layout.sharding()
        while left and not all(ended):
            count = jax.device_put(np.int32(left), everywhere)
            decode = self._program(
                functools.partial(self._decode, choose=choose),
                ("decode", B, cache_length, choose),
                (self._parameters, state, np_seed, count),
                donate=1,
                out_shardings=(jax.tree.map(lambda x: x.sharding, state), everywhere, everywhere),
            )
            start = time.perf_counter()
            state, new, n = decode(self._parameters, state, np_seed, count)
            new = np.asarray(new)[:, : int(n)]
            seconds = time.perf_counter() - start
            rows = [[] if end else _until(row, choose.ends) for row, end in zip(new.tolist(), ended, strict=False)]
            yield _Chunk(rows, seconds)
            ended = [end or row[-1] in choose.ends for row, end in zip(rows, ended, strict=True)]
            left -= int(n)

    def _prompt_ids(self, prompt: str) -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # bytes of a command line that are not UTF-8 arrive as half characters
            raise UserError(f"prompt = {prompt[:40]!r}: character {error.start} is not UTF-8; give UTF-8") from error
        return self._ends.prompt_ids(self._tokenizer, prompt)

    def _check(self, prompts: list[list[int]], max_new_tokens: int, seed: int) -> int:
        """The longest prompt's length, if everything fits."""
        longest = max(map(len, prompts))
        require("max_new_tokens", max_new_tokens, Positive[int])
        require("seed", seed, Seed)
        check_lengths(longest, max_new_tokens, self._config.max_seq_len)
        return longest

    def _prefill(
        self,
        parameters: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        idle: jax.Array,
        seed: jax.Array,
        *,
        cache_length: int,
        choose: Choice,
    ) -> tuple[DecodeState, jax.Array]:
        logits, cache = prefill_logits(bind(self._config, parameters), self._how, tokens, lengths, cache_length)
        token = self._replicated(choose(logits, lengths, row_keys(seed, tokens.shape[0])))
        done = self._replicated(idle | choose.ended(token))
        finite = self._replicated(jnp.isfinite(logits).all())
        return DecodeState(cache, token, self._replicated(lengths), done), finite

    def _decode(
        self, parameters: Any, state: DecodeState, seed: jax.Array, limit: jax.Array, *, choose: Choice
    ) -> tuple[DecodeState, jax.Array, jax.Array]:
        model = bind(self._config, parameters)
        keys = row_keys(seed, state.token.shape[0])
        return decode_chunk(model, self._how, state, keys, limit, chunk=self._chunk, choose=choose)

    def _replicated(self, x: jax.Array) -> jax.Array:
        """Every process reads it, so every device has it."""
        return jax.lax.with_sharding_constraint(x, self._layout.sharding())

    def _program(
        self, function: Callable[..., Any], key: Any, arguments: tuple, donate: int | tuple[()] = (), **options: Any
    ) -> jax.stages.Compiled:
        """`function` compiled for these arguments, before it runs: the clock must not count compilation."""
        if key not in self._programs:
            self._programs[key] = jax.jit(function, donate_argnums=donate, **options).lower(*arguments).compile()
        return self._programs[key]


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


class _Timer:
    """Tokens decoded and the time it took."""

    def __init__(self) -> None:
        self._tokens, self._seconds = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        if seconds and tokens:
            self._tokens += tokens
            self._seconds += seconds

    @property
    def rate(self) -> float | None:
        return self._tokens / self._seconds if self._tokens else None


def layers_apart(config: ModelConfig, parameters: Any) -> tuple[ModelConfig, Any]:
    """The same model with all layers in one pattern that occurs once, so that no two share an array.

    A CPU copies a layer's weights out of a stack before it multiplies by them, and does so for each token: three times
    the traffic of memory, which is all the time that decoding takes. On a TPU or GPU the product reads the stack.
    """
    entries = len(config.blocks)

    def apart(parameters: Any) -> Any:
        layer = lambda i: jax.tree.map(
            lambda x: jax.lax.slice_in_dim(x, i // entries, i // entries + 1), parameters["blocks"][str(i % entries)]
        )
        return {**parameters, "blocks": {str(i): layer(i) for i in range(entries * config.repeats)}}

    return dataclasses.replace(config, blocks=config.blocks * config.repeats), jax.jit(apart)(parameters)


def _bucket(length: int, limit: int) -> int:
    """A power of two that holds `length`, so that few lengths need a program of their own; at most `limit`."""
    return min(limit, max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length()))


def _until(row: list[int], ends: tuple[int, ...]) -> list[int]:
    """`row` up to the first token that ends it, which is included."""
    return row[: next((i + 1 for i, token in enumerate(row) if token in ends), None)]
