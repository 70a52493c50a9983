"""Pipeline parallelism: stages that each hold a part of the layers, and micro-batches that flow through them.

One scan over ticks inside `shard_map` over the stage axis. In each tick every stage runs one group of its layers on one
micro-batch and hands the result to the next stage. With V groups on each of S stages (`sharding.virtual_stages`) a
micro-batch goes round V times, and S micro-batches go round together, so no stage ever waits with one in hand: V = 1 is
GPipe (Huang et al. 2018, arXiv:1811.06965), more is the circular or interleaved schedule (Narayanan et al. 2021,
arXiv:2104.04473). Differentiating the scan runs the same schedule backwards.

Outside, the stage axis cuts the batch like a data axis, so that embedding, head and loss are shared out evenly. Each
stage is the home of its share of the micro-batches. They travel to the first stage, and from the last one home, along
the chain of stages, one stop a tick: three small permutes a tick, and no stage ever holds the whole batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from maxlm.config import pipeline_ticks
from maxlm.sharding import Layout

Run = Callable[[Any, Any], tuple[Any, Any]]
"""Layers stacked [l, ...] and item -> item, and sums over the item's tokens, one for each layer [l, ...]."""


def pipelined(layout: Layout, run: Run, layers: Any, items: Any, *, micro_batches: int) -> tuple[Any, Any]:
    """Run stacked layers over a batch, cut into micro-batches and over the stages.

    Args:
        layout: the mesh.
        run: applies some of the layers, in order.
        layers: arrays [L, ...], cut over the stage axis; L is a multiple of stages * virtual_stages.
        items: arrays [B, T, D] or [B, T] or [B]: what flows through. B is a multiple of micro_batches * the parts that
            the other axes cut a batch into.
        micro_batches: their number. If it is no multiple of the stages, empty ones fill the last round.

    Returns:
        The items after all layers, and the sums [L, ...] over all micro-batches.
    """
    S, V, M = layout.mesh.shape["stage"], layout.config.virtual_stages, micro_batches
    G = -(-M // S)  # rounds: groups of S micro-batches
    shards = layout.batch_shards // S

    def to_stages(x: jax.Array) -> jax.Array:
        """[B, ...] -> [S, G, rows, ...]: micro-batch j * G + g is number g of stage j."""
        x = x.reshape(shards, M, x.shape[0] // (shards * M), *x.shape[1:])
        x = jnp.pad(x, [(0, 0), (0, S * G - M)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(shards, S, G, *x.shape[2:]), 0, 2)
        return constrain(x.reshape(S, G, -1, *x.shape[4:]), "stages", None, "stage_batch")

    def from_stages(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(S, G, shards, -1, *x.shape[3:]), 2, 0)
        x = x.reshape(shards, S * G, *x.shape[3:])[:, :M]
        return constrain(x.reshape(-1, *x.shape[3:]), "batch")

    def constrain(x: jax.Array, *leading: str | None) -> jax.Array:
        rest = ("residual_seq", "embed")[: x.ndim - len(leading)]
        return layout.constrain(x, *leading, *rest)

    # Layer (v * S + s) * l + i is layer i of group v on stage s. The parameters' own order is that of the layers, so
    # that checkpoints know nothing of stages; with V > 1 this moves them between stages, once a step.
    grouped = jax.tree.map(lambda x: x.reshape(V, S, -1, *x.shape[1:]), layers)

    @functools.partial(
        jax.shard_map,
        mesh=layout.mesh,
        in_specs=(PartitionSpec(None, "stage"), PartitionSpec("stage")),
        out_specs=(PartitionSpec("stage"), PartitionSpec(None, "stage")),
        axis_names={"stage"},
        check_vma=False,  # the layers' own shard_maps inside cannot have it
    )
    def on_stages(groups: Any, home: Any) -> tuple[Any, Any]:
        groups, home = jax.tree.map(lambda x: x[:, 0], groups), jax.tree.map(lambda x: x[0], home)
        stage = jax.lax.axis_index("stage")
        up = functools.partial(jax.lax.ppermute, axis_name="stage", perm=[(s, (s + 1) % S) for s in range(S)])
        down = functools.partial(jax.lax.ppermute, axis_name="stage", perm=[(s, (s - 1) % S) for s in range(S)])

        def one_group(v: jax.Array, item: Any) -> tuple[Any, Any]:
            return run(jax.tree.map(lambda x: x[v] if V > 1 else x[0], groups), item)

        if layout.config.remat_stages:
            one_group = jax.checkpoint(one_group, prevent_cse=False)

        def tick(carry: tuple, t: jax.Array) -> tuple[tuple, None]:
            item, arriving, leaving, home_out, sums = carry
            # This stage is `stage` ticks behind the first. Group v of micro-batch j of round g is its work now.
            now = jnp.maximum(t - stage, 0)
            g, v, j = now // (V * S), now // S % V, now % S
            # At the start of a round each stage sends off its next micro-batch towards the first stage.
            fetch = t % (V * S) == 0
            arriving = _choose(fetch, _at(home, t // (V * S)), arriving)
            item = _choose((stage == 0) & (v == 0), arriving, item)
            item, of_layers = one_group(v, item)
            works = (t >= stage) & (j * G + g < M) & (g < G)
            sums = jax.tree.map(lambda total, x: total.at[v].add(jnp.where(works, x, 0)), sums, of_layers)
            leaving = _choose(stage == S - 1, item, leaving)
            # When the last stage ends a round, each micro-batch of it stands at its home.
            done = t - (S - 1)
            ends = (done >= 0) & (done % (V * S) == V * S - 1)
            home_out = jax.tree.map(
                lambda all, x: jnp.where(ends, all.at[jnp.maximum(done, 0) // (V * S)].set(x), all), home_out, leaving
            )
            return (up(item), down(arriving), down(leaving), home_out, sums), None

        first = _at(home, jnp.int32(0))
        empty = jax.tree.map(jnp.zeros_like, (first, first, first, home))
        shapes = jax.eval_shape(one_group, jnp.int32(0), first)[1]
        zero_sums = jax.tree.map(lambda x: jnp.zeros((V, *x.shape), x.dtype), shapes)
        ticks = pipeline_ticks(S, V, M)
        (*_, home_out, sums), _ = jax.lax.scan(tick, (*empty, zero_sums), jnp.arange(ticks))
        return jax.tree.map(lambda x: x[None], home_out), jax.tree.map(lambda x: x[:, None], sums)

    items, sums = on_stages(grouped, jax.tree.map(to_stages, items))
    return jax.tree.map(from_stages, items), jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), sums)


def in_pipeline_order(
    layout: Layout, batch: dict[str, jax.Array], micro_batches: int, *, columns: str | None = "seq"
) -> dict[str, jax.Array]:
    """The batch with its rows in the order in which a pipeline on this mesh cuts them; as it is without one.

    Row r then is in micro-batch r % micro_batches on every mesh, which matters where a loss is about a micro-batch.
    """
    stages = layout.mesh.shape["stage"]
    if stages == 1:
        return batch
    shards = layout.batch_shards // stages

    def reorder(x: jax.Array) -> jax.Array:
        order = np.arange(x.shape[0]).reshape(shards, -1, micro_batches).swapaxes(1, 2).reshape(-1)
        if np.array_equal(order, np.arange(x.shape[0])):
            return x
        dims = ("batch", columns)[: x.ndim]
        whole = layout.constrain(x, None, *dims[1:])  # 4 bytes a token
        return layout.constrain(whole[order], *dims)

    return {name: reorder(x) for name, x in batch.items()}


def _at(stacked: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[jnp.minimum(i, x.shape[0] - 1)], stacked)


def _choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(functools.partial(jnp.where, condition), yes, no)
