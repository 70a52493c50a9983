"""A model as a function of token ids: logits of every position, without a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from maxlm.config import (
    BlockConfig,
    ClassHead,
    Dropless,
    EmbedHead,
    ExecutionConfig,
    ExpertChoiceRouter,
    Experts,
    GlmRope,
    LmHead,
    ModelConfig,
    ScalarHead,
    UserError,
)
from maxlm.models import Execution, Tokens, bind, ops
from maxlm.models.weights.holding import shardings
from maxlm.sharding import Layout, decoding_layout


class LanguageModel:
    """A model with its parameters, in float32; it computes in `execution.dtype`."""

    def __init__(self, model: ModelConfig, execution: ExecutionConfig, layout: Layout, parameters: Any) -> None:
        """Compiles nothing yet.

        Args:
            model: what it is.
            execution: its dtype counts.
            layout: where the parameters lie.
            parameters: nested dicts of float32 arrays, as `maxlm.models.init_parameters` makes them, or of `Weight`s.
        """
        self.config = _dropless(model)
        # As for decoding: rows of any length, which a mesh with a seq or stage axis could not cut.
        self._layout = decoding_layout(layout, self.config.d_model)
        self._how = Execution(layout, execution).decoding(self._layout)
        self.parameters = jax.device_put(parameters, shardings(self._layout, self.config, parameters))
        self._compiled = jax.jit(self._compute)
        self._compiled_hidden = jax.jit(self._hidden)
        # Few numbers, which every process has whole.
        self._compiled_last = jax.jit(self._last, out_shardings=self._layout.sharding())

    def logits(
        self,
        tokens: npt.ArrayLike,
        segment_ids: npt.ArrayLike | None = None,
        positions: npt.ArrayLike | None = None,
    ) -> jax.Array:
        """Unnormalised log-probabilities of the token that follows each token, given it and those before it.

        A program is compiled for each shape, and kept. The arguments are looked at on the host, so this is not to be
        called under `jax.jit` or `jax.grad`; `maxlm.models` has the functions that can be.

        Args:
            tokens: integers [B, T] or, for a single row, [T]; ids from 0 to V - 1. Rows that are shorter are padded at
                the end with any id: no token sees a later one, but through an
                ExpertChoiceRouter. All other choices of experts are computed, as in decoding.
            segment_ids: integers of the same shape, not negative; tokens of different segments do not see each other.
                None: a row is one document.
            positions: integers of the same shape, from 0 to model.max_seq_len - 1: where each token stands in its
                document. None: 0, 1, ..., T - 1. Of a model with `GlmRope` they may be [B, T, 2], or [T, 2]: the
                position in the context, and the place in the block, which is 0 for all tokens of a context; a
                document's context sees itself whole.

        Returns:
            float32 [B, T, V], or [T, V] for a single row, on the run's devices, rows over those that share the batch
            out. V is model.vocab_size, which may have more ids than the tokenizer.

        Raises:
            UserError: not integers, not of such a shape, longer than model.max_seq_len, or out of range; or the model
                has no LmHead.
        """
        if not isinstance(self.config.head, LmHead):
            raise self._no_logits()
        return self._run(self._compiled, tokens, segment_ids, positions)

    __call__ = logits

    def hidden(
        self,
        tokens: npt.ArrayLike,
        segment_ids: npt.ArrayLike | None = None,
        positions: npt.ArrayLike | None = None,
    ) -> jax.Array:
        """What the logits are made of: the last layer's states after the last norm.

        Args and Raises: as `logits`.

        Returns:
            [B, T, D], or [T, D] for a single row, in `execution.dtype`; where they lie as of `logits`.
        """
        return self._run(self._compiled_hidden, tokens, segment_ids, positions)

    def last(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """What the head makes of each text's last token: logits of the next one, with a ScalarHead a number, with a
        ClassHead logits of its classes.

        Args:
            tokens: integers [B, T], as of `logits`, each row with a text and then any ids.
            lengths: integers [B], tokens of each text.

        Returns:
            float32 [B, V], [B], or [B, C], on the host.

        Raises:
            UserError: as `logits`; or the model has an EmbedHead.
        """
        if isinstance(self.config.head, EmbedHead):
            raise self._no_logits()
        hidden = self.hidden(tokens)
        ends = _integers("lengths", lengths, hidden.shape[1] + 1, "the number of columns") - 1
        return np.asarray(self._compiled_last(self.parameters, hidden, ends))

    def _no_logits(self) -> UserError:
        return UserError(f"model.head = {type(self.config.head).__name__} gives no logits; use a run with an LmHead")

    def _run(
        self,
        program: Any,
        tokens: npt.ArrayLike,
        segment_ids: npt.ArrayLike | None,
        positions: npt.ArrayLike | None,
    ) -> jax.Array:
        limit = self.config.max_seq_len
        virtual = self.config.virtual_tokens
        if virtual and (segment_ids is not None or positions is not None):
            raise UserError(
                f"segment_ids and positions do not go with the {virtual} virtual tokens that stand before a text; give "
                "texts in rows of their own"
            )
        ids = _integers("tokens", tokens, self.config.vocab_size, "model.vocab_size")
        if ids.ndim not in (1, 2) or not ids.size:
            raise UserError(f"tokens have the shape {list(ids.shape)}; must be [B, T], or [T] for one row, not empty")
        ids = np.pad(ids, [*[(0, 0)] * (ids.ndim - 1), (virtual, 0)])
        if ids.shape[-1] > limit:
            raise UserError(
                f"tokens have {ids.shape[-1]} columns, more than model.max_seq_len = {limit}; use at most {limit}"
            )
        if positions is None:
            positions = np.broadcast_to(np.arange(ids.shape[-1]), ids.shape)
        where = _integers("positions", positions, limit, "model.max_seq_len")
        segments = places = visible_to = None
        if segment_ids is not None:
            segments = _like("segment_ids", _integers("segment_ids", segment_ids, 2**31, "int32"), ids)
        if where.shape == (*ids.shape, 2) and self._counts_in_two:
            places, where = where, np.broadcast_to(np.arange(ids.shape[-1], dtype=np.int32), ids.shape)
            visible_to = _ends(places, segments)
        asked: Any = ids, (_like("positions", where, ids), segments, visible_to, places)
        rows = 1 if ids.ndim == 1 else len(ids)
        if ids.ndim == 1:
            asked = jax.tree.map(lambda x: x[None], asked)
        arguments = jax.device_put(
            jax.tree.map(self._whole_shards, asked),
            self._layout.sharding(self._layout.activation("batch", None)),
        )
        found: jax.Array = program(self.parameters, *arguments)
        found = found if len(found) == rows else found[:rows]
        found = found[:, virtual:] if virtual else found
        return found[0] if ids.ndim == 1 else found

    @property
    def _counts_in_two(self) -> bool:
        return any(isinstance(block.attention.position, GlmRope) for block in self.config.layers)

    def _whole_shards(self, values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """[B, T, ...], with rows of zeros added until the mesh can cut them."""
        return np.pad(values, ((0, -len(values) % self._layout.batch_shards), *[(0, 0)] * (values.ndim - 1)))

    def _compute(self, parameters: Any, ids: jax.Array, known: tuple[jax.Array | None, ...]) -> jax.Array:
        hidden = self._hidden(parameters, ids, known)
        logits = ops.logits(hidden, bind(self.config, parameters).unembedding)
        return self._layout.constrain(logits, "batch", None, None)

    def _last(self, parameters: Any, hidden: jax.Array, ends: jax.Array) -> jax.Array:
        states, model = jnp.take_along_axis(hidden, ends[:, None, None], 1), bind(self.config, parameters)
        if isinstance(self.config.head, ScalarHead):
            return model.scalars(states)[:, 0]
        if isinstance(self.config.head, ClassHead):
            return model.class_logits(states)[:, 0]
        return ops.logits(states, model.unembedding)[:, 0]

    def _hidden(self, parameters: Any, ids: jax.Array, known: tuple[jax.Array | None, ...]) -> jax.Array:
        positions, segment_ids, visible_to, places = known
        assert positions is not None
        model, tokens = bind(self.config, parameters), Tokens(positions, segment_ids, visible_to, places)
        return model(model.embeddings(ids, tokens, self._how), tokens, self._how).hidden


def _dropless(model: ModelConfig) -> ModelConfig:
    """The same model, whose tokens do not compete for room: what becomes of one depends on no later one."""

    def one(block: BlockConfig) -> BlockConfig:
        if not isinstance(block.mlp, Experts) or isinstance(block.mlp.router, ExpertChoiceRouter):
            return block
        return dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, dispatch=Dropless()))

    first, blocks = (tuple(map(one, blocks)) for blocks in (model.first_blocks, model.blocks))
    return dataclasses.replace(model, first_blocks=first, blocks=blocks)


def _ends(places: npt.NDArray[np.int32], segments: npt.NDArray[np.int32] | None) -> npt.NDArray[np.int32]:
    """Where the columns end that each token sees: those of a context at its end, others at themselves."""
    T = places.shape[-2]
    own = np.zeros(places.shape[:-1], np.int32) if segments is None else segments
    context = places[..., 1] == 0
    of_context = (own[..., :, None] == own[..., None, :]) & context[..., None, :]
    ends = np.where(of_context, np.arange(1, T + 1), 0).max(-1)
    return np.where(context, ends, np.arange(1, T + 1)).astype(np.int32)


def _integers(name: str, values: npt.ArrayLike, end: int, reason: str) -> npt.NDArray[np.int32]:
    """The values as int32, if they are integers and 0 <= value < end."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise UserError(f"{name} are rows of different lengths; pad the shorter ones at the end") from error
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{name} are {array.dtype}; must be integers, such as int32")
    wrong = array[(array < 0) | (array >= end)] if array.size else array
    if wrong.size:
        raise UserError(f"{name} hold {wrong.flat[0]}; must lie in [0, {end}), as {reason} says")
    return array.astype(np.int32)


def _like(name: str, array: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    if array.shape != ids.shape:
        raise UserError(f"{name} have the shape {list(array.shape)}; must be that of the tokens, {list(ids.shape)}")
    return array
