"""The chunked cross-entropy against its formula in float64 numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import hlo_shapes, one_device

from maxlm.config import ShardingConfig
from maxlm.models import Unembedding
from maxlm.sharding import make_layout
from maxlm.training.losses import cross_entropy_sums, divergence_sum, token_log_probs, token_scores

B, T, D, V = 2, 15, 8, 37  # 30 tokens: chunks of 7 and 16 leave a rest, chunks of 10 and 30 do not


def formula(hidden, table, targets, mask, z_loss=0.0, max_z_loss=0.0):
    """Objective, cross-entropy, log(Z)^2, with max-z its sum of squares, and the objective's gradients for hidden and
    table, all logits at once."""
    hidden, table, mask = (np.asarray(x, np.float64) for x in (hidden, table, mask))
    x, target, weight = hidden.reshape(-1, hidden.shape[-1]), np.asarray(targets).ravel(), mask.ravel()
    logits = x @ table.T
    top = logits.max(1)
    log_z = top + np.log(np.exp(logits - top[:, None]).sum(1))
    softmax = np.exp(logits - log_z[:, None])
    cross_entropy = (weight * (log_z - logits[np.arange(len(target)), target])).sum()
    log_z_squared = (weight * log_z**2).sum()
    d_logits = softmax * (1 + 2 * z_loss * log_z)[:, None]
    d_logits[np.arange(len(target)), target] -= 1
    d_logits[np.arange(len(target)), logits.argmax(1)] += 2 * max_z_loss * top
    d_logits *= weight[:, None]
    sums = [cross_entropy + z_loss * log_z_squared, cross_entropy, log_z_squared]
    if max_z_loss:
        sums.append((weight * top**2).sum())
        sums[0] += max_z_loss * sums[3]
    return sums, (d_logits @ table).reshape(hidden.shape), d_logits.T @ x


@functools.partial(jax.jit, static_argnames=("layout", "z_loss", "max_z_loss", "chunk"))
def sums_and_gradients(hidden, table, targets, mask, *, layout=None, z_loss=0.0, max_z_loss=0.0, chunk=1024):
    weights = {"z_loss": z_loss, "max_z_loss": max_z_loss}

    def objective(hidden, table):
        on = layout or one_device()
        sums = cross_entropy_sums(on, hidden, Unembedding(table), targets, mask, **weights, chunk=chunk)
        return sums.objective, sums

    (_, sums), gradients = jax.value_and_grad(objective, (0, 1), has_aux=True)(hidden, table)
    return tuple(x for x in sums if x is not None), *gradients


def arguments(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    hidden, table = rng.normal(size=(B, T, D)), scale * rng.normal(size=(V, D))
    mask = rng.uniform(0.1, 2, (B, T)) * (rng.random((B, T)) < 0.7)  # weights, some of them zero
    targets = rng.integers(0, V, (B, T))
    targets[0, :2] = 0, V - 1
    mask[0, :2] = 1.0
    return (
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(table, jnp.float32),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(mask, jnp.float32),
    )


@pytest.mark.parametrize("chunk", [1, 7, 10, 16, 30, 1024])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_sums_and_gradients_equal_the_formula(chunk, z_loss):
    got = sums_and_gradients(*arguments(), z_loss=z_loss, chunk=chunk)
    want = formula(*arguments(), z_loss=z_loss)
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)
    np.testing.assert_allclose(got[1], want[1], atol=5e-6, rtol=2e-5)
    np.testing.assert_allclose(got[2], want[2], atol=5e-6, rtol=2e-5)


@pytest.mark.parametrize("mesh", [None, ShardingConfig(data=2, tensor=4)])
def test_the_square_of_the_largest_logit_equals_the_formula(mesh):
    """On a mesh the largest logit is in the part of one of four devices."""
    hidden, table, targets, mask = arguments()
    table = jnp.concatenate([table, -table[:3]])  # 40 rows
    layout = None if mesh is None else make_layout(mesh)
    weights = {"z_loss": 0.1, "max_z_loss": 0.2}
    got = sums_and_gradients(hidden, table, targets, mask, layout=layout, **weights, chunk=7)
    want = formula(hidden, table, targets, mask, **weights)
    tops = np.asarray(hidden).reshape(-1, D) @ np.asarray(table).T
    assert len(set(tops.argmax(1) // 10)) == 4, "every device has some"
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5, rtol=2e-5)
    np.testing.assert_allclose(got[2], want[2], atol=1e-5, rtol=2e-5)


def test_sums_are_the_same_without_a_gradient():
    """The forward pass alone runs other code than the one that also forms the gradient."""
    options = {"z_loss": 0.1, "max_z_loss": 0.2, "chunk": 7}
    sums = jax.jit(lambda h, w, *a: cross_entropy_sums(one_device(), h, Unembedding(w), *a, **options))(*arguments())
    np.testing.assert_array_equal(sums, sums_and_gradients(*arguments(), **options)[0])


@pytest.mark.parametrize("scale", [300.0, 1e4])
def test_large_logits(scale):
    """exp(logit) alone would overflow float32 above 88."""
    got, want = sums_and_gradients(*arguments(scale), chunk=16), formula(*arguments(scale))
    assert want[0][1] > 1000
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    # A logit of 10^4 is known to 10^-3 in float32, and the softmax to as much.
    np.testing.assert_allclose(got[1], want[1], atol=2e-6 * scale, rtol=1e-3)
    assert np.isfinite(got[2]).all()


def test_equal_logits_give_log_vocabulary():
    _, _, targets, mask = arguments()
    (objective, _, log_z_squared), d_hidden, _ = sums_and_gradients(
        jnp.ones((B, T, D)), jnp.full((V, D), 100.0), targets, mask
    )
    np.testing.assert_allclose(objective, mask.sum() * np.log(V), rtol=1e-4)
    np.testing.assert_allclose(log_z_squared, mask.sum() * (100 * D + np.log(V)) ** 2, rtol=1e-5)
    np.testing.assert_allclose(d_hidden, 0, atol=1e-3)  # all rows are equal: no direction helps


def test_masked_tokens_count_for_nothing():
    hidden, table, targets, mask = arguments()
    hidden_mask = np.asarray(mask == 0)
    assert 3 < hidden_mask.sum() < B * T
    want = sums_and_gradients(hidden, table, targets, mask, z_loss=0.1, chunk=7)
    assert (np.asarray(want[1])[hidden_mask] == 0).all() and (np.asarray(want[1])[~hidden_mask] != 0).any(-1).all()
    other = jnp.where(hidden_mask[..., None], 3.0, hidden), table, jnp.where(hidden_mask, -100, targets), mask
    jax.tree.map(np.testing.assert_array_equal, sums_and_gradients(*other, z_loss=0.1, chunk=7), want)


def test_gradient_scales_with_the_cotangent_and_reaches_a_tied_table():
    """One table as embedding and as output: its gradient is the sum of both uses."""
    hidden, table, targets, mask = arguments()
    ids = jnp.asarray(np.random.default_rng(3).integers(0, V, (B, T)))

    def tied(table):
        sums = cross_entropy_sums(one_device(), hidden * table[ids], Unembedding(table), targets, mask, chunk=7)
        return 3.0 * sums.objective

    got = jax.jit(jax.grad(tied))(table)
    _, d_input, d_output = formula(hidden * table[ids], table, targets, mask)
    want = d_output.copy()
    np.add.at(want, np.asarray(ids).ravel(), (d_input * np.asarray(hidden, np.float64)).reshape(-1, D))
    assert np.abs(want - d_output).max() > 0.1
    np.testing.assert_allclose(got, 3 * want, atol=5e-5, rtol=5e-5)


def test_bfloat16():
    hidden, table, targets, mask = arguments()
    hidden, table = hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16).astype(jnp.float32)
    got, want = sums_and_gradients(hidden, table, targets, mask, chunk=16), formula(hidden, table, targets, mask)
    # Products of bfloat16 numbers are exact in float32, so the loss has float32's precision; gradients are rounded.
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)
    assert got[1].dtype == jnp.bfloat16 and got[2].dtype == jnp.float32
    for g, w in zip(got[1:], want[1:], strict=True):
        assert np.linalg.norm(np.asarray(g, np.float64) - w) < 2**-7 * np.linalg.norm(w)


def test_no_array_of_all_tokens_by_the_vocabulary():
    tokens, vocabulary, chunk = 1024, 3000, 64
    shapes = (
        jax.ShapeDtypeStruct((2, tokens // 2, D), jnp.bfloat16),
        jax.ShapeDtypeStruct((vocabulary, D), jnp.float32),
        jax.ShapeDtypeStruct((2, tokens // 2), jnp.int32),
        jax.ShapeDtypeStruct((2, tokens // 2), jnp.float32),
    )
    logits = lambda text: max(np.prod(shape) for _, shape in hlo_shapes(text) if vocabulary in shape and D not in shape)
    ours = sums_and_gradients.lower(*shapes, z_loss=0.1, chunk=chunk).compile().as_text()
    assert logits(ours) == chunk * vocabulary

    def dense(hidden, table, targets, mask):
        log_p = jax.nn.log_softmax(hidden.astype(jnp.float32) @ table.T)
        return -(jnp.take_along_axis(log_p, targets[..., None], 2)[..., 0] * mask).sum()

    assert logits(jax.jit(jax.grad(dense, (0, 1))).lower(*shapes).compile().as_text()) == tokens * vocabulary


# Heads with more than a table


HEADS = {
    "bias": (True, None, None),
    "scale": (False, 0.3, None),
    "soft_cap": (False, None, 2.0),
    "all": (True, 1.5, 3.0),
}


def head_arguments(bias, scale, soft_cap, rows=B, columns=T, vocabulary=V):
    rng = np.random.default_rng(6)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocabulary, (rows, columns)), jnp.int32)
    head = Unembedding(draw(vocabulary, D), draw(vocabulary) if bias else None, scale, soft_cap)
    return draw(rows, columns, D), head, targets, draw(rows, columns), draw(rows, columns)


def head_formula(hidden, head, targets, d_log_probs, d_entropy, d_z_squared):
    """Of each token log-probability, entropy and log(Z)^2; of their weighted sum gradients for hidden, table, bias."""
    exact = lambda x: np.asarray(x, np.float64)
    scale, cap = head.scale or 1.0, head.soft_cap
    product = scale * exact(hidden) @ exact(head.table).T + (0 if head.bias is None else exact(head.bias))
    logits = product if cap is None else cap * np.tanh(product / cap)
    log_z = np.log(np.exp(logits).sum(-1))
    log_p = logits - log_z[..., None]
    p, onehot = np.exp(log_p), np.eye(logits.shape[-1])[np.asarray(targets)]
    entropy = -(p * log_p).sum(-1)
    weight = lambda x: exact(x)[..., None]
    d_logits = weight(d_log_probs) * (onehot - p) - weight(d_entropy) * p * (log_p + entropy[..., None])
    d_logits += weight(d_z_squared) * 2 * log_z[..., None] * p
    d = d_logits if cap is None else d_logits / np.cosh(product / cap) ** 2
    gradients = scale * d @ exact(head.table), scale * np.einsum("btv,btd->vd", d, exact(hidden)), d.sum((0, 1))
    return ((log_p * onehot).sum(-1), entropy, log_z**2), gradients


def assert_head_gradients(got, want, head):
    d_hidden, d_head = got
    assert d_head.bias is None or head.bias is not None
    np.testing.assert_allclose(d_hidden, want[0], atol=1e-5, rtol=2e-5)
    np.testing.assert_allclose(d_head.table, want[1], atol=1e-5, rtol=2e-5)
    if head.bias is not None:
        np.testing.assert_allclose(d_head.bias, want[2], atol=1e-5, rtol=2e-5)


ON = {"one device": None, "vocabulary cut": ShardingConfig(fsdp=2, tensor=2, seq=2)}


@pytest.mark.parametrize("mesh", ON)
@pytest.mark.parametrize("name", HEADS)
def test_every_head_equals_the_formula(name, mesh):
    """The objective with z-loss, and scores of tokens; both with their gradients."""
    layout = one_device() if ON[mesh] is None else make_layout(ON[mesh])
    hidden, head, targets, *weights = head_arguments(*HEADS[name], rows=4, columns=6, vocabulary=40)
    mask, zero = jnp.abs(weights[0]), np.zeros(targets.shape)

    def objective(hidden, head):
        return cross_entropy_sums(layout, hidden, head, targets, mask, z_loss=0.1, chunk=5).objective

    got, gradients = jax.jit(jax.value_and_grad(objective, (0, 1)))(hidden, head)
    (log_p, _, z_squared), want = head_formula(hidden, head, targets, -mask, zero, 0.1 * mask)
    np.testing.assert_allclose(got, (mask * (0.1 * z_squared - log_p)).sum(), rtol=2e-6)
    assert_head_gradients(gradients, want, head)
    alone = jax.jit(objective)(hidden, head)  # without a gradient it is another program
    np.testing.assert_allclose(alone, got, rtol=1e-6)

    def weighted(hidden, head):
        scores = token_scores(layout, hidden, head, targets, chunk=5)
        return (scores.log_probs * weights[0] + scores.entropy * weights[1]).sum(), scores

    gradients, scores = jax.jit(jax.grad(weighted, (0, 1), has_aux=True))(hidden, head)
    (log_p, entropy, _), want = head_formula(hidden, head, targets, *weights, zero)
    np.testing.assert_allclose(scores.log_probs, log_p, atol=1e-5, rtol=2e-5)
    np.testing.assert_allclose(scores.entropy, entropy, atol=1e-5, rtol=2e-5)
    assert_head_gradients(gradients, want, head)


# Log-probabilities of single tokens


def token_formula(hidden, table, targets, d_log_probs, d_entropy):
    """Log-probabilities, entropies, and gradients of their weighted sums, in float64 and all at once."""
    hidden, table = (np.asarray(x, np.float64) for x in (hidden, table))
    logits = hidden @ table.T
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(-1)
    onehot = np.eye(table.shape[0])[np.asarray(targets)]
    d_logits = np.asarray(d_log_probs)[..., None] * (onehot - p)
    d_logits -= np.asarray(d_entropy)[..., None] * p * (log_p + entropy[..., None])
    d_table = np.einsum("btv,btd->vd", d_logits, hidden)
    return (log_p * onehot).sum(-1), entropy, d_logits @ table, d_table


def scores_and_gradients(layout, hidden, table, targets, d_log_probs, d_entropy, chunk):
    def weighted(hidden, table):
        scores = token_scores(layout, hidden, Unembedding(table), targets, chunk=chunk)
        return (scores.log_probs * d_log_probs + scores.entropy * d_entropy).sum(), scores

    gradients, scores = jax.jit(jax.grad(weighted, (0, 1), has_aux=True))(hidden, table)
    return (*scores, *gradients)


def token_arguments(rows=B, columns=T, vocabulary=V):
    rng = np.random.default_rng(5)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    targets = rng.integers(0, vocabulary, (rows, columns)).astype(np.int32)
    targets[0, :2] = 0, vocabulary - 1
    return (
        normal(rows, columns, D), normal(vocabulary, D), jnp.asarray(targets), normal(rows, columns),
        normal(rows, columns),
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [7, 10, 1024])
def test_token_scores_and_gradients_equal_the_formula(chunk):
    got, want = scores_and_gradients(one_device(), *token_arguments(), chunk), token_formula(*token_arguments())
    for g, w in zip(got, want, strict=True):
        assert g.dtype == jnp.float32
        np.testing.assert_allclose(g, w, atol=1e-5, rtol=2e-5)


@pytest.mark.parametrize("sharding", [ShardingConfig(fsdp=2, tensor=2, seq=2), ShardingConfig(data=2, tensor=4)])
def test_token_scores_over_a_cut_vocabulary(sharding):
    values = token_arguments(rows=4, columns=6, vocabulary=40)
    got = scores_and_gradients(make_layout(sharding), *values, 5)
    for g, w in zip(got, token_formula(*values), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5, rtol=2e-5)


def test_large_logits_have_finite_scores():
    hidden, table, targets, *weights = token_arguments()
    got = scores_and_gradients(one_device(), hidden, 300 * table, targets, *weights, 16)
    want = token_formula(hidden, 300 * table, targets, *weights)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-3)
    assert all(np.isfinite(g).all() for g in got)


def test_token_log_probs_never_hold_the_logits_of_all_tokens():
    """Temporary memory of the compiled program, forward and backward: that of a few chunks and the table."""
    tokens, vocabulary, chunk = 4096, 4096, 128
    shapes = (
        jax.ShapeDtypeStruct((2, tokens // 2, D), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, D), jnp.float32),
        jax.ShapeDtypeStruct((2, tokens // 2), jnp.int32),
    )
    summed = lambda h, w, ids: token_log_probs(one_device(), h, Unembedding(w), ids, chunk=chunk).sum()
    for program in (summed, jax.grad(summed, (0, 1))):
        compiled = jax.jit(program).lower(*shapes).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 0.15 * 4 * tokens * vocabulary
        found = hlo_shapes(compiled.as_text())
        logits = max(np.prod(shape) for _, shape in found if vocabulary in shape and D not in shape)
        assert logits == chunk * vocabulary


# Divergence of a teacher


def softmax_of(hidden, head):
    """float64 logits and log-probabilities of a whole batch."""
    product = np.asarray(hidden, np.float64) @ np.asarray(head.table, np.float64).T
    logits = product if head.scale is None else head.scale * product
    logits = logits if head.bias is None else logits + np.asarray(head.bias, np.float64)
    if head.soft_cap is not None:
        logits = head.soft_cap * np.tanh(logits / head.soft_cap)
    top = logits.max(-1, keepdims=True)
    return logits, logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def divergence_arguments(rows=4, columns=6, vocabulary=40):
    """A teacher twice as wide, with a bias and a cap of its own."""
    rng = np.random.default_rng(7)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    head = Unembedding(normal(vocabulary, D), bias=normal(vocabulary), scale=0.7, soft_cap=3.0)
    teacher = Unembedding(normal(vocabulary, 2 * D), bias=normal(vocabulary), soft_cap=5.0)
    mask = normal(rows, columns) * (rng.random((rows, columns)) < 0.7)
    return normal(rows, columns, D), head, normal(rows, columns, 2 * D), teacher, mask


@pytest.mark.parametrize("mesh", ON)
def test_a_divergence_and_its_gradient_equal_the_formula(mesh):
    layout = one_device() if ON[mesh] is None else make_layout(ON[mesh])
    hidden, head, told, teacher, mask = divergence_arguments()
    asked = lambda *own: divergence_sum(layout, *own, told, teacher, mask, chunk=5)
    got, (d_hidden, d_head) = jax.jit(jax.value_and_grad(asked, (0, 1)))(hidden, head)
    logits, log_q = softmax_of(hidden, head)
    _, log_p = softmax_of(told, teacher)
    weight = np.asarray(mask, np.float64)
    want = (weight * (np.exp(log_p) * (log_p - log_q)).sum(-1)).sum()
    d_finish = 1 - (logits / head.soft_cap) ** 2  # of the cap
    d_logits = weight[..., None] * (np.exp(log_q) - np.exp(log_p)) * d_finish
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(asked)(hidden, head), got, rtol=1e-6)  # without a gradient: another program
    table = np.asarray(head.table, np.float64)
    np.testing.assert_allclose(d_hidden, head.scale * d_logits @ table, atol=1e-5, rtol=2e-5)
    d_table = head.scale * np.einsum("btv,btd->vd", d_logits, np.asarray(hidden, np.float64))
    np.testing.assert_allclose(d_head.table, d_table, atol=1e-5, rtol=2e-5)
    np.testing.assert_allclose(d_head.bias, d_logits.sum((0, 1)), atol=1e-5, rtol=2e-5)


def test_a_model_is_not_apart_from_itself():
    hidden, head, _, _, mask = divergence_arguments()
    asked = lambda hidden: divergence_sum(one_device(), hidden, head, hidden, head, mask, chunk=5)
    found, gradient = jax.jit(jax.value_and_grad(asked))(hidden)
    assert found == 0 and np.abs(gradient).max() < 1e-7


def test_a_divergence_never_holds_the_logits_of_all_tokens():
    hidden, table = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 256, D), (4096, D)))

    def loss(hidden, table, told, other):
        mask = jnp.ones(hidden.shape[:2])
        return divergence_sum(one_device(), hidden, Unembedding(table), told, Unembedding(other), mask, chunk=16)

    program = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table, hidden, table).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * 256 * 4096
