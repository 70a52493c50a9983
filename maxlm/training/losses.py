"""Cross-entropy over a large vocabulary without the logits of the whole batch in memory.

The loss is linear in each token's own loss, so its gradient with respect to the hidden states and the output table can
be formed while a chunk's logits are there: logits are computed once, used, and dropped. Plain differentiation would
either keep all of them ([B, T, V] float32) or compute them twice.
"""

from __future__ import annotations

import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from maxlm.models import Unembedding
from maxlm.sharding import Layout
from maxlm.training.chunk_scores import (
    TOKEN_AXES,
    at_top,
    chunk_scores,
    cut,
    is_target_of,
    local_ids,
    narrow,
    of_gradients,
    sum_over_tokens,
    uncut,
    whole,
    with_arrays,
    zeros,
)


class LossSums(NamedTuple):
    """Sums over the tokens of a batch, float32 scalars."""

    objective: jax.Array
    """What is minimised: cross_entropy + z_loss * log_z_squared + max_z_loss * top_squared. The only differentiable
    one."""
    cross_entropy: jax.Array
    """Nats."""
    log_z_squared: jax.Array
    top_squared: jax.Array | None = None
    """Of each token's largest logit; None where it has no weight."""


class _Options(NamedTuple):
    layout: Layout
    z_loss: float
    chunk: int
    max_z_loss: float = 0.0


def cross_entropy_sums(
    layout: Layout,
    hidden: jax.Array,
    unembedding: Unembedding,
    targets: jax.Array,
    mask: jax.Array,
    *,
    z_loss: float = 0.0,
    max_z_loss: float = 0.0,
    chunk: int = 1024,
) -> LossSums:
    """Sum over tokens of mask * (logsumexp(logits) - logits[target]), with logits in float32.

    The z-loss term, mask * logsumexp(logits)^2, is that of PaLM (arXiv:2204.02311, section 5); the max-z term,
    mask * max(logits)^2, that of Baichuan 2 (arXiv:2309.10305, "Max-z loss").

    Args:
        layout: the mesh; the vocabulary may be cut over the tensor axis.
        hidden: [B, T, D] in the compute dtype.
        unembedding: what makes logits of them; float32, where it is trained.
        targets: int32 [B, T].
        mask: float [B, T], weight of each token.
        z_loss: weight of the z-loss in the objective.
        max_z_loss: weight of the max-z loss.
        chunk: tokens on each device whose logits exist at one time.
    """
    options = _Options(layout, z_loss, chunk, max_z_loss)
    return _sums(options, hidden, unembedding, targets, mask.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    options: _Options, hidden: jax.Array, unembedding: Unembedding, targets: jax.Array, mask: jax.Array
) -> LossSums:
    return _on_mesh(options, hidden, unembedding, targets, mask, _Wanted.SUMS)[0]


def _sums_fwd(options: _Options, *asked: Any) -> tuple[LossSums, tuple[jax.Array, Unembedding | None]]:
    (hidden, unembedding, targets, mask), wanted = _asked(asked)
    sums, d_hidden, d_unembedding = _on_mesh(options, hidden, unembedding, targets, mask, wanted)
    return sums, (d_hidden, _like(unembedding, d_unembedding))


def _sums_bwd(options: _Options, gradients: tuple[jax.Array, Unembedding | None], d_sums: LossSums) -> tuple:
    return *_scaled(gradients, _there(d_sums.objective)), None, None


_sums.defvjp(_sums_fwd, _sums_bwd, symbolic_zeros=True)


class _Wanted(enum.Enum):
    """What is to be computed, each with what stands before it."""

    SUMS = enum.auto()
    HIDDEN = enum.auto()
    """The gradient of the hidden states."""
    ALL = enum.auto()
    """That of the unembedding."""


def _asked(asked: Any) -> tuple[Any, _Wanted]:
    """The arguments of a function, second of which is an unembedding, and what is wanted where nobody asks for the
    gradient of one that is not trained."""
    leaf = lambda x: isinstance(x, CustomVJPPrimal)
    changes = any(one.perturbed for one in jax.tree.leaves(asked[1], is_leaf=leaf))
    values = jax.tree.map(lambda one: one.value, asked, is_leaf=leaf)
    return values, _Wanted.ALL if changes else _Wanted.HIDDEN


def _like(unembedding: Unembedding, gradient: Unembedding | None) -> Unembedding | None:
    """The gradient in the dtype of what it is of; nothing for a table that is no plain array, as nobody trains it."""
    if gradient is None:
        return None
    table, found = unembedding.table, gradient.table
    of_table = found.astype(table.dtype) if isinstance(table, jax.Array) and isinstance(found, jax.Array) else None
    return with_arrays(unembedding, of_table, gradient.bias)


def _scaled(gradients: Any, scale: jax.Array) -> Any:
    """A tree of gradients times a float32 scalar, in their own dtypes. The scale of a float16 loss may be a number that
    float16 does not hold: there the product alone is rounded."""
    wide = lambda d: (d.astype(jnp.float32) * scale).astype(d.dtype)
    return jax.tree.map(lambda d: wide(d) if d.dtype == jnp.float16 else d * scale.astype(d.dtype), gradients)


def _there(x: Any) -> jax.Array:
    """A gradient that may be a zero that nobody has made."""
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x


def _on_mesh(
    options: _Options,
    hidden: jax.Array,
    unembedding: Unembedding,
    targets: jax.Array,
    mask: jax.Array,
    wanted: _Wanted,
) -> tuple:
    """LossSums, d_hidden in hidden's dtype and d_unembedding in float32; None for what is not wanted."""
    layout = options.layout
    tokens = layout.activation("batch", "seq")

    @functools.partial(
        layout.shard_map,
        in_specs=(layout.activation("batch", "seq", None), whole(layout, unembedding), tokens, tokens),
        out_specs=(
            layout.activation(),
            None if wanted is _Wanted.SUMS else layout.activation("batch", "seq", None),
            of_gradients(layout, unembedding) if wanted is _Wanted.ALL else None,
        ),
        check_vma=False,
    )
    def local(hidden: jax.Array, unembedding: Unembedding, targets: jax.Array, mask: jax.Array) -> tuple:
        sums, d_hidden, d_unembedding = _in_chunks(options, hidden, unembedding, targets, mask, wanted)
        sums = LossSums(*jax.lax.psum(tuple(sums), TOKEN_AXES))
        if d_unembedding is not None:
            d_unembedding = sum_over_tokens(layout, d_unembedding, hidden.dtype)
        return sums, d_hidden, d_unembedding

    return local(hidden, narrow(unembedding, hidden.dtype), targets, mask)


def _in_chunks(
    options: _Options,
    hidden: jax.Array,
    unembedding: Unembedding,
    targets: jax.Array,
    mask: jax.Array,
    wanted: _Wanted,
) -> tuple:
    """One device's share: all its tokens, and its part of the vocabulary."""
    chunks = cut(options.chunk, hidden, local_ids(unembedding, targets), mask)

    def one_chunk(carry: tuple, tokens: tuple) -> tuple:
        objective, cross_entropy, log_z_squared, top_squared, d_unembedding = carry
        x, target, weight = tokens
        logits, exp, total, log_z, top, pull = chunk_scores(x, unembedding)
        is_target = is_target_of(unembedding, target)
        target_logit = jax.lax.psum(jnp.where(is_target, logits, 0).sum(-1), "tensor")
        nll = weight @ (log_z - target_logit)
        z_squared = weight @ (log_z * log_z)
        d_x = None
        if wanted is not _Wanted.SUMS:
            # d(objective)/d(logits) = weight * (softmax * (1 + 2 * z_loss * log_z) - onehot)
            d_softmax = weight * (1 + 2 * options.z_loss * log_z) / total
            d_logits = exp * d_softmax[:, None] - jnp.where(is_target, weight[:, None], 0)
            if options.max_z_loss:
                d_logits += at_top(exp, top, 2 * options.max_z_loss * weight * top)
            d_x, d_unembedding = pull(d_logits, d_unembedding)
        objective += nll + options.z_loss * z_squared
        if options.max_z_loss:
            squared = weight @ (top * top)
            objective, top_squared = objective + options.max_z_loss * squared, top_squared + squared
        return (objective, cross_entropy + nll, log_z_squared + z_squared, top_squared, d_unembedding), d_x

    zero = jnp.float32(0)
    of_top = zero if options.max_z_loss else None
    start = zero, zero, zero, of_top, zeros(unembedding) if wanted is _Wanted.ALL else None
    scanned: tuple = jax.lax.scan(one_chunk, start, chunks)
    (*sums, d_unembedding), d_hidden = scanned
    return LossSums(*sums), None if d_hidden is None else uncut(d_hidden, hidden.shape), d_unembedding


class TokenScores(NamedTuple):
    """Of each token's distribution over the vocabulary, float32 [B, T]."""

    log_probs: jax.Array
    """log p(target), nats."""
    entropy: jax.Array
    """-sum over the vocabulary of p log p, nats."""


def token_log_probs(
    layout: Layout, hidden: jax.Array, unembedding: Unembedding, targets: jax.Array, *, chunk: int = 1024
) -> jax.Array:
    """log softmax(logits)[targets], float32 [B, T]: arguments, memory and gradient as of `token_scores`."""
    return token_scores(layout, hidden, unembedding, targets, chunk=chunk).log_probs


def token_scores(
    layout: Layout, hidden: jax.Array, unembedding: Unembedding, targets: jax.Array, *, chunk: int = 1024
) -> TokenScores:
    """Log-probability of each target and entropy of each distribution, both differentiable for hidden and unembedding.

    Unlike `cross_entropy_sums`, nobody knows the gradient's weights yet when the logits are there; the backward pass
    computes them again, `chunk` tokens at a time, as the forward pass does.

    Args:
        layout: the mesh; the vocabulary may be cut over the tensor axis.
        hidden: [B, T, D] in the compute dtype.
        unembedding: what makes logits of them; float32, where it is trained.
        targets: int32 [B, T].
        chunk: tokens on each device whose logits exist at one time.
    """
    return _token_scores(_Options(layout, 0.0, chunk), hidden, unembedding, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_scores(options: _Options, hidden: jax.Array, unembedding: Unembedding, targets: jax.Array) -> TokenScores:
    layout = options.layout
    tokens = layout.activation("batch", "seq")

    @functools.partial(
        layout.shard_map,
        in_specs=(layout.activation("batch", "seq", None), whole(layout, unembedding), tokens),
        out_specs=(tokens, tokens),
        check_vma=False,
    )
    def local(hidden: jax.Array, unembedding: Unembedding, targets: jax.Array) -> tuple[jax.Array, ...]:
        def one_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits, exp, total, log_z, *_ = chunk_scores(chunk[0], unembedding)
            target_logit = jax.lax.psum(jnp.where(is_target_of(unembedding, chunk[1]), logits, 0).sum(-1), "tensor")
            log_probs = logits - log_z[:, None]
            entropy = -jax.lax.psum((exp * log_probs).sum(-1), "tensor") / total
            return target_logit - log_z, entropy

        scores = jax.lax.map(one_chunk, cut(options.chunk, hidden, local_ids(unembedding, targets)))
        return tuple(uncut(x, targets.shape) for x in scores)

    return TokenScores(*local(hidden, narrow(unembedding, hidden.dtype), targets))


def _token_scores_fwd(options: _Options, *asked: Any) -> tuple[TokenScores, tuple]:
    (hidden, unembedding, targets), wanted = _asked(asked)
    scores = _token_scores(options, hidden, unembedding, targets)
    return scores, (hidden, unembedding, targets, scores.entropy, () if wanted is _Wanted.ALL else None)


def _token_scores_bwd(options: _Options, saved: tuple, d_scores: TokenScores) -> tuple:
    layout = options.layout
    hidden, unembedding, targets, entropy, all_wanted = saved
    wide, tokens = layout.activation("batch", "seq", None), layout.activation("batch", "seq")

    @functools.partial(
        layout.shard_map,
        in_specs=(wide, whole(layout, unembedding), *[tokens] * 4),
        out_specs=(wide, None if all_wanted is None else of_gradients(layout, unembedding)),
        check_vma=False,
    )
    def local(hidden: jax.Array, unembedding: Unembedding, targets: jax.Array, *weights: jax.Array) -> tuple:
        def one_chunk(
            d_unembedding: Unembedding | None, chunk: tuple[jax.Array, ...]
        ) -> tuple[Unembedding | None, jax.Array]:
            x, target, entropy, d_log_prob, d_entropy = chunk
            logits, exp, total, log_z, _, pull = chunk_scores(x, unembedding)
            # d log p(target) / d logit = onehot - p;  d entropy / d logit = -p (log p + entropy)
            log_probs = logits - log_z[:, None]
            per_p = d_log_prob[:, None] + d_entropy[:, None] * (log_probs + entropy[:, None])
            d_target = jnp.where(is_target_of(unembedding, target), d_log_prob[:, None], 0)
            d_logits = d_target - exp / total[:, None] * per_p
            d_x, d_unembedding = pull(d_logits, d_unembedding)
            return d_unembedding, d_x

        chunks = cut(options.chunk, hidden, local_ids(unembedding, targets), *weights)
        start = None if all_wanted is None else zeros(unembedding)
        d_unembedding, d_hidden = jax.lax.scan(one_chunk, start, chunks)
        if d_unembedding is not None:
            d_unembedding = sum_over_tokens(layout, d_unembedding, hidden.dtype)
        return uncut(d_hidden, hidden.shape), d_unembedding

    weights = map(_there, d_scores)
    d_hidden, d_unembedding = local(hidden, narrow(unembedding, hidden.dtype), targets, entropy, *weights)
    return d_hidden, _like(unembedding, d_unembedding), None


_token_scores.defvjp(_token_scores_fwd, _token_scores_bwd, symbolic_zeros=True)


def divergence_sum(
    layout: Layout,
    hidden: jax.Array,
    unembedding: Unembedding,
    teacher_hidden: jax.Array,
    teacher: Unembedding,
    mask: jax.Array,
    *,
    chunk: int = 1024,
) -> jax.Array:
    """Sum over tokens of mask * KL(p || q), a scalar in nats: p is what a teacher says comes next, q what the model
    says, KL(p || q) the sum over the vocabulary of p (log p - log q), with logits of both in float32.

    Nothing is learned through p. As `cross_entropy_sums`, it forms the gradient while a chunk's logits are there, those
    of both models.

    Args:
        layout: the mesh; the vocabulary may be cut over the tensor axis.
        hidden: [B, T, D] in the compute dtype.
        unembedding: what makes logits of them; float32, where it is trained.
        teacher_hidden: [B, T, any D] in the compute dtype.
        teacher: what makes logits of those, over the same vocabulary.
        mask: float [B, T], weight of each token.
        chunk: tokens on each device whose logits exist at one time, of both models.
    """
    return _divergence(_Options(layout, 0.0, chunk), hidden, unembedding, teacher_hidden, teacher, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(options: _Options, hidden: jax.Array, unembedding: Unembedding, *told: Any) -> jax.Array:
    found: jax.Array = _divergence_on_mesh(options, hidden, unembedding, *told, wanted=_Wanted.SUMS)[0]
    return found


def _divergence_fwd(options: _Options, *asked: Any) -> tuple[jax.Array, tuple[jax.Array, Unembedding | None]]:
    (hidden, unembedding, *told), wanted = _asked(asked)
    found, d_hidden, d_unembedding = _divergence_on_mesh(options, hidden, unembedding, *told, wanted=wanted)
    return found, (d_hidden, _like(unembedding, d_unembedding))


def _divergence_bwd(options: _Options, gradients: tuple[jax.Array, Unembedding | None], d_sum: Any) -> tuple:
    return *_scaled(gradients, _there(d_sum)), None, None, None


_divergence.defvjp(_divergence_fwd, _divergence_bwd, symbolic_zeros=True)


def _divergence_on_mesh(
    options: _Options,
    hidden: jax.Array,
    unembedding: Unembedding,
    teacher_hidden: jax.Array,
    teacher: Unembedding,
    mask: jax.Array,
    *,
    wanted: _Wanted,
) -> tuple:
    """The sum, and gradients as of `_on_mesh`."""
    layout = options.layout
    wide, tokens = layout.activation("batch", "seq", None), layout.activation("batch", "seq")

    @functools.partial(
        layout.shard_map,
        in_specs=(wide, whole(layout, unembedding), wide, whole(layout, teacher), tokens),
        out_specs=(
            layout.activation(),
            None if wanted is _Wanted.SUMS else wide,
            of_gradients(layout, unembedding) if wanted is _Wanted.ALL else None,
        ),
        check_vma=False,
    )
    def local(hidden: jax.Array, unembedding: Unembedding, other: jax.Array, teacher: Unembedding, mask: Any) -> tuple:
        def one_chunk(carry: tuple, chunk: tuple[jax.Array, ...]) -> tuple:
            found, d_unembedding = carry
            x, y, weight = chunk
            own, told = chunk_scores(x, unembedding), chunk_scores(y, teacher)
            q, p = (scores.exp / scores.total[:, None] for scores in (own, told))
            apart = (told.logits - told.log_z[:, None]) - (own.logits - own.log_z[:, None])
            found += weight @ jax.lax.psum((p * apart).sum(-1), "tensor")
            if wanted is _Wanted.SUMS:
                return (found, d_unembedding), None
            d_x, d_unembedding = own.pull(weight[:, None] * (q - p), d_unembedding)
            return (found, d_unembedding), d_x

        start = jnp.float32(0), zeros(unembedding) if wanted is _Wanted.ALL else None
        scanned: tuple = jax.lax.scan(one_chunk, start, cut(options.chunk, hidden, other, mask))
        (found, d_unembedding), d_hidden = scanned
        if d_unembedding is not None:
            d_unembedding = sum_over_tokens(layout, d_unembedding, hidden.dtype)
        d_hidden = None if d_hidden is None else uncut(d_hidden, hidden.shape)
        return jax.lax.psum(found, TOKEN_AXES), d_hidden, d_unembedding

    tables = narrow(unembedding, hidden.dtype), teacher_hidden, narrow(teacher, teacher_hidden.dtype)
    return local(hidden, *tables, mask.astype(jnp.float32))
