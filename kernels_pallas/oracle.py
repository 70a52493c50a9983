"""What the operations mean: naive float64 numpy, written from the formulas, to test kernels against.

Nothing is shared with any kernel, not even the masks: a mask here is a boolean matrix made from words. Every gradient
is the analytic formula. Sizes are those of tests: each function holds the full [B, N, T, S] matrix of scores.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

_Array = np.ndarray
Words = str | tuple
"""A mask in words: "full", "causal", ("local", left, right) with None for no limit, ("prefix", n), ("chunked", size),
("strided", step), ("summaries", size, last), ("and", words, words) or ("or", words, words)."""


def mask_matrix(words: Words, q_positions: _Array, k_positions: _Array, above: bool = True) -> _Array:
    """Which key each query sees: boolean [T, S] for positions [T] and [S].

    Args:
        above: also hide what the mask hides for standing too far above; without, only what it hides from below.

    Raises:
        ValueError: a word that is unknown.
    """
    word, *arguments = (words,) if isinstance(words, str) else words
    q, k = q_positions[:, None], k_positions[None, :]
    if word == "full":
        return np.ones((len(q_positions), len(k_positions)), bool)
    if word == "causal":
        return (k <= q) | (not above)
    if word == "local":
        left, right = arguments
        near = np.ones((len(q_positions), len(k_positions)), bool)
        if left is not None:
            near &= q - k <= left
        if right is not None and above:
            near &= k - q <= right
        return near
    if word == "prefix":
        return np.broadcast_to((k < arguments[0]) | (not above), (len(q_positions), len(k_positions)))
    if word == "chunked":
        of_q, of_k = np.floor_divide(q, arguments[0]), np.floor_divide(k, arguments[0])
        return of_q == of_k if above else of_q <= of_k
    if word == "strided":
        return (k - q) % arguments[0] == 0
    if word == "summaries":
        size, last = arguments
        return np.broadcast_to(k % size >= size - last, (len(q_positions), len(k_positions)))
    if word in ("and", "or"):
        one, other = (mask_matrix(part, q_positions, k_positions, above) for part in arguments)
        return one & other if word == "and" else one | other
    raise ValueError(
        f"mask: {word!r} is unknown; use full, causal, local, prefix, chunked, strided, summaries, and, or"
    )


def t5_bucket(distance: int, n: int, max_distance: int, bidirectional: bool) -> int:
    """The bucket of key position - query position (Raffel et al. 2020, arXiv:1910.10683).

    The logarithmic half in whole numbers: the bucket is the largest exact + m for which
    log(apart / exact) / log(max_distance / exact) * (n - exact) >= m, both sides exponentiated.
    """
    first = 0
    if bidirectional:
        n //= 2
        first = n if distance > 0 else 0
        apart = abs(distance)
    else:
        apart = max(-distance, 0)
    exact = n // 2
    if apart < exact:
        return first + apart
    rest = n - exact
    reached = [m for m in range(rest) if apart**rest * exact**m >= max_distance**m * exact**rest]
    return first + exact + max(reached)


class AttentionAnswer(NamedTuple):
    """Output, logsumexp, and the gradients for the cotangents d_out and d_lse."""

    out: _Array  # [B, T, N, Hv]
    lse: _Array  # [B, N, T]
    dq: _Array
    dk: _Array
    dv: _Array
    d_bias_table: _Array | None  # [N, n]
    d_sinks: _Array | None  # [N]


def attention(
    q: Any,
    k: Any,
    v: Any,
    d_out: Any,
    d_lse: Any = 0.0,
    *,
    mask: Words = "causal",
    segment_ids: Any = None,
    kv_segment_ids: Any = None,
    visible_to: Any = None,
    q_offset: Any = 0,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Any = None,
    bias_table: Any = None,
    bucket_rule: tuple[int, bool] = (128, False),
    sinks: Any = None,
) -> AttentionAnswer:
    """softmax(scores) v, where scores = cap(scale * q k^T) - slope * |distance| + table[bucket(distance)].

    The gradients are those of sum(out * d_out) + sum(lse * d_lse). With P the weights, they follow from
    dS = P * (dP - rowsum(P * dP) + d_lse), dP = d_out v^T.

    Args:
        q, k, v, d_out: [B, T, N, H], [B, S, K, H], [B, S, K, Hv], [B, T, N, Hv].
        d_lse: [B, N, T].
        mask: in words.
        segment_ids, kv_segment_ids: [B, T] and [B, S]; the latter defaults to the former.
        visible_to: [B, T]: query t sees keys s < visible_to[t] only, and the mask hides from below alone.
        q_offset: position of the first query, one or [B].
        scale: defaults to H ** -0.5.
        soft_cap: cap(s) = soft_cap * tanh(s / soft_cap) (Gemma 2, arXiv:2408.00118).
        alibi_slopes: [N] (Press et al. 2021, arXiv:2108.12409).
        bias_table: [N, n], T5's relative bias; bucket_rule is (max_distance, bidirectional).
        sinks: [N]: the score of one more key whose value is 0, visible to every query (gpt-oss, arXiv:2508.10925).

    Returns:
        A query that sees no key has out 0, lse -inf (with sinks: the sink) and no gradient.
    """
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    scale = 1 / math.sqrt(H) if scale is None else scale
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    q_positions = np.broadcast_to(np.asarray(q_offset), (B,))[:, None] + np.arange(T)
    k_positions = np.arange(S)
    above = visible_to is None
    seen = np.stack([mask_matrix(mask, positions, k_positions, above) for positions in q_positions])
    if visible_to is not None:
        seen = seen & (k_positions < np.asarray(visible_to)[:, :, None])
    if segment_ids is not None:
        seen = seen & (np.asarray(segment_ids)[:, :, None] == np.asarray(kv_segment_ids)[:, None, :])

    kn, vn = np.repeat(k, G, axis=2), np.repeat(v, G, axis=2)  # one key head for each query head
    scores = scale * np.einsum("btnh,bsnh->bnts", q, kn)
    cap_slope = np.ones_like(scores)
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
        cap_slope = 1 - (scores / soft_cap) ** 2
    distance = k_positions[None, None, :] - q_positions[:, :, None]  # [B, T, S]
    if alibi_slopes is not None:
        scores = scores - np.asarray(alibi_slopes, np.float64)[None, :, None, None] * np.abs(distance)[:, None]
    if bias_table is not None:
        table = np.asarray(bias_table, np.float64)
        distances, where = np.unique(distance, return_inverse=True)
        rule = np.array([t5_bucket(int(d), table.shape[1], *bucket_rule) for d in distances])
        buckets = rule[where].reshape(distance.shape)
        scores = scores + table[:, buckets].transpose(1, 0, 2, 3)

    scores = np.where(seen[:, None], scores, -np.inf)
    top = scores.max(-1)
    if sinks is not None:
        sink = np.asarray(sinks, np.float64)[None, :, None]
        top = np.maximum(top, sink)
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(scores - top[..., None])
    total = weights.sum(-1)
    if sinks is not None:
        total = total + np.exp(sink - top)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    p = weights / np.where(total == 0, 1.0, total)[..., None]
    out = np.einsum("bnts,bsnh->btnh", p, vn)

    d_lse = np.broadcast_to(np.asarray(d_lse, np.float64), (B, N, T))
    dp = np.einsum("btnh,bsnh->bnts", d_out, vn)
    inner = (p * dp).sum(-1) - d_lse
    ds = p * (dp - inner[..., None])
    d_raw = scale * cap_slope * ds
    dq = np.einsum("bnts,bsnh->btnh", d_raw, kn)
    dk = np.einsum("bnts,btnh->bsnh", d_raw, q).reshape(B, S, K, G, H).sum(3)
    dv = np.einsum("bnts,btnh->bsnh", p, d_out).reshape(B, S, K, G, -1).sum(3)
    d_table = d_sinks = None
    if bias_table is not None:
        d_table = np.stack([np.where(buckets[:, None] == z, ds, 0).sum((0, 2, 3)) for z in range(table.shape[1])], 1)
    if sinks is not None:
        d_sinks = -(np.exp(sink - lse) * inner).sum((0, 2))  # the sink's value is 0, and so is its dP
    return AttentionAnswer(out, lse, dq, dk, dv, d_table, d_sinks)


def paged_attention(
    q: Any,
    k: Any,
    v: Any,
    layer: int,
    tables: Any,
    slots: Any,
    positions: Any,
    *,
    tree: tuple[Any, Any, Any] | None = None,
    **shaping: Any,
) -> _Array:
    """Attention of one row after the other, to keys that are first laid out in the order of their positions.

    Args:
        q: [T, N, H].
        k, v: [L, P, K, C, H] and [L, P, K, C, Hv]: layers, blocks, key heads, positions in a block.
        tables: [S, M], the blocks of each text.
        slots, positions: [T], each row's text and place in it; at -1 there is no query.
        tree: [T] each: where rows are, the first places of their trees, and the places of these that they see, as
            bits. What a row sees is then laid out as the text that it would be if no other path had been tried.
        **shaping: of `attention`, but for segments, visible_to and q_offset.

    Returns:
        [T, N, Hv]; 0 where there is no query.
    """
    (T, N, _), C = np.shape(q), np.shape(k)[3]
    out = np.zeros((T, N, np.shape(v)[4]))
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        if position < 0:
            continue
        seen = list(range(position + 1))
        if tree is not None:
            place, first, path = (int(x[row]) for x in tree)
            seen = [*range(first), *(first + j for j in range(32) if path >> j & 1)]
            assert seen[-1] == place and len(seen) == position + 1, f"row {row}: the path is not that of its position"
        places = [(tables[slot][p // C], p % C) for p in seen]
        keys, values = (np.stack([np.asarray(x[layer][block])[:, c] for block, c in places]) for x in (k, v))
        query = np.asarray(q[row])[None, None]
        no_cotangent = np.zeros((1, 1, *out.shape[1:]))
        out[row] = attention(query, keys[None], values[None], no_cotangent, q_offset=position, **shaping).out[0, 0]
    return out


_erf = np.vectorize(math.erf, otypes=[float])


def _sigmoid(x: _Array) -> _Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


def activation(act: str, x: _Array, beta: float = 1.0) -> tuple[_Array, _Array]:
    """The activation of x and its slope; `beta` is that of "swish", 1 for the others.

    Raises:
        ValueError: unknown activation.
    """
    if act in ("silu", "swish"):
        s = _sigmoid(beta * x)
        return x * s, s + beta * x * s * (1 - s)
    if act == "sigmoid":
        s = _sigmoid(x)
        return s, s * (1 - s)
    if act == "gelu":
        below = 0.5 * (1 + _erf(x / math.sqrt(2)))  # the normal distribution, and its density
        return x * below, below + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if act == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        t = np.tanh(c * (x + 0.044715 * x**3))
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)
    if act == "relu":
        return np.maximum(x, 0), (x > 0).astype(float)
    if act == "relu2":
        return np.where(x > 0, x**2, 0), np.where(x > 0, 2 * x, 0)
    if act == "identity":
        return x, np.ones_like(x)
    raise ValueError(f"act = {act!r} is unknown; use silu, swish, sigmoid, gelu, gelu_tanh, relu, relu2 or identity")


class Glu(NamedTuple):
    """h = act(a) * g and the gradients for the cotangent dh."""

    h: _Array  # [..., F]
    a: _Array
    g: _Array
    da: _Array
    dg: _Array
    dx: _Array
    dw_gate: _Array
    dw_up: _Array
    db_gate: _Array
    db_up: _Array


def glu(
    x: Any, w_gate: Any, w_up: Any, dh: Any, b_gate: Any = 0.0, b_up: Any = 0.0, *, act: str = "silu", beta: float = 1.0
) -> Glu:
    """act(x w_gate + b_gate) * (x w_up + b_up) and its gradients.

    Args:
        x, dh: [..., D] and the cotangent [..., F].
        w_gate, w_up: [D, F].
        b_gate, b_up: [F].
        act, beta: as of `activation`.

    Raises:
        ValueError: unknown activation.
    """
    x, w_gate, w_up, dh, b_gate, b_up = (np.asarray(y, np.float64) for y in (x, w_gate, w_up, dh, b_gate, b_up))
    a, g = x @ w_gate + b_gate, x @ w_up + b_up
    value, slope = activation(act, a, beta)
    da, dg = dh * g * slope, dh * value
    rows = lambda y: y.reshape(-1, y.shape[-1])
    return Glu(
        h=value * g,
        a=a,
        g=g,
        da=da,
        dg=dg,
        dx=da @ w_gate.T + dg @ w_up.T,
        dw_gate=rows(x).T @ rows(da),
        dw_up=rows(x).T @ rows(dg),
        db_gate=rows(da).sum(0),
        db_up=rows(dg).sum(0),
    )


class Grouped(NamedTuple):
    """Products of rows with their group's matrix, and the gradients for the cotangent dy."""

    out: _Array  # [M, F]
    dx: _Array  # [M, D]
    dw: _Array  # [E, D, F]


def grouped_matmul(x: Any, w: Any, group_sizes: Any, dy: Any) -> Grouped:
    """One row after the other; those after the last group are 0.

    Args:
        x: [M, D].
        w: [E, D, F].
        group_sizes: [E].
        dy: [M, F].
    """
    x, w, dy = (np.asarray(y, np.float64) for y in (x, w, dy))
    result = Grouped(np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w))
    for row, e in enumerate(np.repeat(np.arange(len(w)), np.asarray(group_sizes))):
        result.out[row] = x[row] @ w[e]
        result.dx[row] = w[e] @ dy[row]
        result.dw[e] += np.outer(x[row], dy[row])
    return result
