"""Cross-entropy over a large vocabulary without the logits of the whole batch in memory.

The loss is linear in each token's own loss, so its gradient with respect to the hidden states and the output table can
be formed while a chunk's logits are there: logits are computed once, used, and dropped. Plain differentiation would
either keep all of them ([B, T, V] float32) or compute them twice.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from maxlm.config import ACTIVATION_DIMS, StatePart
from maxlm.models import Unembedding
from maxlm.sharding import Layout

_TOKEN_AXES = (*ACTIVATION_DIMS["batch"], *ACTIVATION_DIMS["seq"])  # the mesh axes that share out a batch's tokens


class LossSums(NamedTuple):
    """Sums over the tokens of a batch, float32 scalars."""

    objective: jax.Array
    """What is minimised: cross_entropy + z_loss * log_z_squared. The only differentiable one."""
    cross_entropy: jax.Array
    """Nats."""
    log_z_squared: jax.Array


class _Options(NamedTuple):
    layout: Layout
    z_loss: float
    chunk: int


def cross_entropy_sums(
    layout: Layout,
    hidden: jax.Array,
    unembedding: Unembedding,
    targets: jax.Array,
    mask: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk: int = 1024,
) -> LossSums:
    """Sum over tokens of mask * (logsumexp(logits) - logits[target]), with logits in float32.

    The z-loss term, mask * logsumexp(logits)^2, is that of PaLM (arXiv:2204.02311, section 5).

    Args:
        layout: the mesh; the vocabulary may be cut over the tensor axis.
        hidden: [B, T, D] in the compute dtype.
        unembedding: what makes logits of them; float32, where it is trained.
        targets: int32 [B, T].
        mask: float [B, T], weight of each token.
        z_loss: weight of the z-loss in the objective.
        chunk: tokens on each device whose logits exist at one time.
    """
    return _sums(_Options(layout, z_loss, chunk), hidden, unembedding, targets, mask.astype(jnp.float32))


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
    scale = _there(d_sums.objective)
    return *jax.tree.map(lambda d: d * scale.astype(d.dtype), gradients), None, None


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
    return _with(unembedding, of_table, gradient.bias)


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
        in_specs=(layout.activation("batch", "seq", None), _whole(layout, unembedding), tokens, tokens),
        out_specs=(
            layout.activation(),
            None if wanted is _Wanted.SUMS else layout.activation("batch", "seq", None),
            _of_gradients(layout, unembedding) if wanted is _Wanted.ALL else None,
        ),
        check_vma=False,
    )
    def local(hidden: jax.Array, unembedding: Unembedding, targets: jax.Array, mask: jax.Array) -> tuple:
        sums, d_hidden, d_unembedding = _in_chunks(options, hidden, unembedding, targets, mask, wanted)
        sums = LossSums(*jax.lax.psum(tuple(sums), _TOKEN_AXES))
        if d_unembedding is not None:
            d_unembedding = _sum_over_tokens(layout, d_unembedding, hidden.dtype)
        return sums, d_hidden, d_unembedding

    return local(hidden, _narrow(unembedding, hidden.dtype), targets, mask)


def _in_chunks(
    options: _Options,
    hidden: jax.Array,
    unembedding: Unembedding,
    targets: jax.Array,
    mask: jax.Array,
    wanted: _Wanted,
) -> tuple:
    """One device's share: all its tokens, and its part of the vocabulary."""
    chunks = _cut(options.chunk, hidden, _local_ids(unembedding, targets), mask)

    def one_chunk(carry: tuple, tokens: tuple) -> tuple:
        objective, cross_entropy, log_z_squared, d_unembedding = carry
        x, target, weight = tokens
        logits, exp, total, log_z, pull = _scores(x, unembedding)
        is_target = _is_target(unembedding, target)
        target_logit = jax.lax.psum(jnp.where(is_target, logits, 0).sum(-1), "tensor")
        nll = weight @ (log_z - target_logit)
        z_squared = weight @ (log_z * log_z)
        d_x = None
        if wanted is not _Wanted.SUMS:
            # d(objective)/d(logits) = weight * (softmax * (1 + 2 * z_loss * log_z) - onehot)
            d_softmax = weight * (1 + 2 * options.z_loss * log_z) / total
            d_logits = exp * d_softmax[:, None] - jnp.where(is_target, weight[:, None], 0)
            d_x, d_unembedding = pull(d_logits, d_unembedding)
        objective += nll + options.z_loss * z_squared
        return (objective, cross_entropy + nll, log_z_squared + z_squared, d_unembedding), d_x

    zero = jnp.float32(0)
    start = zero, zero, zero, _zeros(unembedding) if wanted is _Wanted.ALL else None
    scanned: tuple = jax.lax.scan(one_chunk, start, chunks)
    (*sums, d_unembedding), d_hidden = scanned
    return LossSums(*sums), None if d_hidden is None else _uncut(d_hidden, hidden.shape), d_unembedding


def _with(unembedding: Unembedding, table: Any, bias: Any) -> Unembedding:
    """The same with other arrays, or with what is to be said of each of its arrays."""
    return dataclasses.replace(unembedding, table=table, bias=None if unembedding.bias is None else bias)


def _whole(layout: Layout, unembedding: Unembedding) -> Unembedding:
    """How the loss has them: cut along the vocabulary alone."""
    return _with(unembedding, layout.activation("vocab", None), layout.activation("vocab"))


def _of_gradients(layout: Layout, unembedding: Unembedding) -> Unembedding:
    """How their gradients are kept."""
    spec = lambda *dims: layout.parameter(dims, StatePart.GRADIENTS)
    return _with(unembedding, spec("vocab", "embed"), spec("vocab"))


def _narrow(unembedding: Unembedding, dtype: jnp.dtype) -> Unembedding:
    """With its table as a plain array in the compute dtype."""
    table = unembedding.table
    return dataclasses.replace(
        unembedding, table=table.astype(dtype) if isinstance(table, jax.Array) else table.dense(dtype)
    )


def _zeros(unembedding: Unembedding) -> Unembedding:
    """What gradients are added to."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), unembedding)


def _local_ids(unembedding: Unembedding, targets: jax.Array) -> jax.Array:
    """Rows of this device's part of the table; others lie outside of it."""
    return targets - jax.lax.axis_index("tensor") * unembedding.table.shape[0]


def _cut(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each [B, T, ...] as [chunks, tokens of a chunk, ...], zeros at the end."""
    n_tokens = arrays[0].shape[0] * arrays[0].shape[1]
    chunk = min(chunk, n_tokens)
    flat = [x.reshape(n_tokens, *x.shape[2:]) for x in arrays]
    pad = lambda x: jnp.pad(x, [(0, -n_tokens % chunk)] + [(0, 0)] * (x.ndim - 1))
    return tuple(pad(x).reshape(-1, chunk, *x.shape[1:]) for x in flat)


def _uncut(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What `_cut` made of an array of this shape."""
    return x.reshape(-1, *shape[2:])[: shape[0] * shape[1]].reshape(shape)


class _Scores(NamedTuple):
    """Of a chunk, float32."""

    logits: jax.Array
    exp: jax.Array  # of logit - top
    total: jax.Array  # their sum over the whole vocabulary
    log_z: jax.Array  # over the whole vocabulary
    pull: Callable[[jax.Array, Unembedding | None], tuple[jax.Array, Unembedding | None]]
    """d_logits and d_unembedding of earlier chunks, None: not wanted -> d_x, and d_unembedding with that of this chunk
    added."""


def _scores(x: jax.Array, unembedding: Unembedding) -> _Scores:
    table = unembedding.table
    product = jnp.einsum("td,vd->tv", x, table, preferred_element_type=jnp.float32)
    finish = lambda product, bias: _with(unembedding, table, bias).finish(product)
    logits, d_finish = jax.vjp(finish, product, unembedding.bias)

    def pull(d_logits: jax.Array, before: Unembedding | None) -> tuple[jax.Array, Unembedding | None]:
        d_product, d_bias = d_finish(d_logits)
        d_product = d_product.astype(x.dtype)
        d_x = jax.lax.psum(jnp.einsum("tv,vd->td", d_product, table), "tensor")
        if before is None:
            return d_x, None
        d_table = jnp.einsum("tv,td->vd", d_product, x, preferred_element_type=jnp.float32)
        return d_x, jax.tree.map(jnp.add, before, _with(unembedding, d_table, d_bias))

    top = jax.lax.pmax(logits.max(-1), "tensor")
    exp = jnp.exp(logits - top[:, None])
    total = jax.lax.psum(exp.sum(-1), "tensor")
    return _Scores(logits, exp, total, top + jnp.log(total), pull)


def _is_target(unembedding: Unembedding, target: jax.Array) -> jax.Array:
    """bool [tokens, this device's part of the vocabulary], from `_local_ids`."""
    return jnp.arange(unembedding.table.shape[0]) == target[:, None]


def _sum_over_tokens(layout: Layout, d_unembedding: Unembedding, dtype: jnp.dtype) -> Unembedding:
    """The gradient of this device's part of the vocabulary from the tokens of all devices, in float32 and in the layout
    of gradients; on the way in `dtype`, unless the config says float32."""
    cast = lambda x: x if layout.config.float32_gradients else x.astype(dtype)
    d_table, d_bias = jax.tree.map(cast, (d_unembedding.table, d_unembedding.bias))
    if layout.parameter(("vocab", "embed"), StatePart.GRADIENTS)[1] == "fsdp":
        d_table = jax.lax.psum(d_table, tuple(axis for axis in _TOKEN_AXES if axis != "fsdp"))
        d_table = jax.lax.psum_scatter(d_table, "fsdp", scatter_dimension=1, tiled=True)
    else:
        d_table = jax.lax.psum(d_table, _TOKEN_AXES)
    d_bias = jax.lax.psum(d_bias, _TOKEN_AXES)
    return jax.tree.map(lambda x: x.astype(jnp.float32), _with(d_unembedding, d_table, d_bias))


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
        in_specs=(layout.activation("batch", "seq", None), _whole(layout, unembedding), tokens),
        out_specs=(tokens, tokens),
        check_vma=False,
    )
    def local(hidden: jax.Array, unembedding: Unembedding, targets: jax.Array) -> tuple[jax.Array, ...]:
        def one_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits, exp, total, log_z, _ = _scores(chunk[0], unembedding)
            target_logit = jax.lax.psum(jnp.where(_is_target(unembedding, chunk[1]), logits, 0).sum(-1), "tensor")
            log_probs = logits - log_z[:, None]
            entropy = -jax.lax.psum((exp * log_probs).sum(-1), "tensor") / total
            return target_logit - log_z, entropy

        scores = jax.lax.map(one_chunk, _cut(options.chunk, hidden, _local_ids(unembedding, targets)))
        return tuple(_uncut(x, targets.shape) for x in scores)

    return TokenScores(*local(hidden, _narrow(unembedding, hidden.dtype), targets))


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
        in_specs=(wide, _whole(layout, unembedding), *[tokens] * 4),
        out_specs=(wide, None if all_wanted is None else _of_gradients(layout, unembedding)),
        check_vma=False,
    )
    def local(hidden: jax.Array, unembedding: Unembedding, targets: jax.Array, *weights: jax.Array) -> tuple:
        def one_chunk(
            d_unembedding: Unembedding | None, chunk: tuple[jax.Array, ...]
        ) -> tuple[Unembedding | None, jax.Array]:
            x, target, entropy, d_log_prob, d_entropy = chunk
            logits, exp, total, log_z, pull = _scores(x, unembedding)
            # d log p(target) / d logit = onehot - p;  d entropy / d logit = -p (log p + entropy)
            log_probs = logits - log_z[:, None]
            per_p = d_log_prob[:, None] + d_entropy[:, None] * (log_probs + entropy[:, None])
            d_target = jnp.where(_is_target(unembedding, target), d_log_prob[:, None], 0)
            d_logits = d_target - exp / total[:, None] * per_p
            d_x, d_unembedding = pull(d_logits, d_unembedding)
            return d_unembedding, d_x

        chunks = _cut(options.chunk, hidden, _local_ids(unembedding, targets), *weights)
        start = None if all_wanted is None else _zeros(unembedding)
        d_unembedding, d_hidden = jax.lax.scan(one_chunk, start, chunks)
        if d_unembedding is not None:
            d_unembedding = _sum_over_tokens(layout, d_unembedding, hidden.dtype)
        return _uncut(d_hidden, hidden.shape), d_unembedding

    weights = map(_there, d_scores)
    d_hidden, d_unembedding = local(hidden, _narrow(unembedding, hidden.dtype), targets, entropy, *weights)
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
    scale = _there(d_sum)
    return *jax.tree.map(lambda d: d * scale.astype(d.dtype), gradients), None, None, None


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
        in_specs=(wide, _whole(layout, unembedding), wide, _whole(layout, teacher), tokens),
        out_specs=(
            layout.activation(),
            None if wanted is _Wanted.SUMS else wide,
            _of_gradients(layout, unembedding) if wanted is _Wanted.ALL else None,
        ),
        check_vma=False,
    )
    def local(hidden: jax.Array, unembedding: Unembedding, other: jax.Array, teacher: Unembedding, mask: Any) -> tuple:
        def one_chunk(carry: tuple, chunk: tuple[jax.Array, ...]) -> tuple:
            found, d_unembedding = carry
            x, y, weight = chunk
            own, told = _scores(x, unembedding), _scores(y, teacher)
            q, p = (scores.exp / scores.total[:, None] for scores in (own, told))
            apart = (told.logits - told.log_z[:, None]) - (own.logits - own.log_z[:, None])
            found += weight @ jax.lax.psum((p * apart).sum(-1), "tensor")
            if wanted is _Wanted.SUMS:
                return (found, d_unembedding), None
            d_x, d_unembedding = own.pull(weight[:, None] * (q - p), d_unembedding)
            return (found, d_unembedding), d_x

        start = jnp.float32(0), _zeros(unembedding) if wanted is _Wanted.ALL else None
        scanned: tuple = jax.lax.scan(one_chunk, start, _cut(options.chunk, hidden, other, mask))
        (found, d_unembedding), d_hidden = scanned
        if d_unembedding is not None:
            d_unembedding = _sum_over_tokens(layout, d_unembedding, hidden.dtype)
        d_hidden = None if d_hidden is None else _uncut(d_hidden, hidden.shape)
        return jax.lax.psum(found, _TOKEN_AXES), d_hidden, d_unembedding

    narrow = _narrow(unembedding, hidden.dtype), teacher_hidden, _narrow(teacher, teacher_hidden.dtype)
    return local(hidden, *narrow, mask.astype(jnp.float32))
