"""The device's side of the engine: parameters, cache, texts, and the programs that change them."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from maxlm import shapes
from maxlm.config import EngineConfig, ModelConfig, SamplingConfig, WeightFormat
from maxlm.inference.held import by_layer, held
from maxlm.inference.mixed_adapters import LoadedAdapter, with_adapters
from maxlm.inference.request import TOP_SCORES
from maxlm.inference.settings import settings_row
from maxlm.inference.step import (
    Branches,
    Drawn,
    StepRows,
    Texts,
    allow,
    begin,
    compiler_chooses,
    empty_texts,
    jitted_step,
)
from maxlm.models import Execution
from maxlm.models.kv_cache import empty_cache
from maxlm.models.ops import TokenTree
from maxlm.observe.devices import memory_in_use
from maxlm.sharding import Layout

_LOG = logging.getLogger(__name__)

_PROBE = 3
"""Tokens of the texts that programs are compared with."""


class Programs:
    """Everything that runs, compiled before the first request comes. Nothing is compiled later."""

    def __init__(
        self,
        model: ModelConfig,
        parameters: Any,
        how: Execution,
        config: EngineConfig,
        *,
        weights: WeightFormat,
        tokens_per_step: int,
        blocks: Mapping[int, int],
        adapters: Sequence[LoadedAdapter] = (),
    ) -> None:
        """
        Args:
            model: what it is.
            parameters: nested dicts of float32 arrays.
            how: it runs, as for decoding.
            config: how much at once.
            weights: the format in which parameters are held.
            tokens_per_step: the most, of each shard of the batch.
            blocks: as `pool_sizes` gives them.
            adapters: what requests may ask for, by their numbers from 1.
        """
        self._adapters = adapters
        self._model, self._how, self._weights, self._config = model, how, weights, config
        self._n_shards, self._vocab_size = how.layout.batch_shards, model.vocab_size
        self._formats: Any = None
        """Of the parameters, where the compiler chose them."""
        self._parameters = self._placed(parameters)
        everywhere = how.layout.sharding()
        self._cut = how.layout.sharding(how.layout.activation("batch", None))
        empty = functools.partial(empty_cache, model, dict(blocks), config.block_size, how, config.kv_cache)
        self._cache = jax.jit(empty)()
        make = lambda: empty_texts(model, config.slots * self._n_shards)
        self._texts = jax.jit(make, out_shardings=everywhere)()
        width = -(-model.max_seq_len // config.block_size)
        self.put_tables({window: np.zeros((config.slots * self._n_shards, width), np.int32) for window in blocks})
        one = jax.tree.map(lambda x: np.asarray(x)[0], self._texts)
        change = functools.partial(jax.jit, donate_argnums=0, in_shardings=everywhere, out_shardings=everywhere)
        self._begin = change(begin).lower(self._texts, np.int32(0), one).compile()
        self._allow = change(allow).lower(self._texts, np.int32(0), one.settings.allowed).compile()
        self._steps = self._compiled(tokens_per_step, min(2, *(size - 1 for size in blocks.values())))

    @property
    def widths(self) -> list[int]:
        """Rows that a shard of a step may have, smallest first."""
        return list(self._steps)

    def scored_rows(self, width: int) -> int:
        """Rows of such a step whose logits are computed."""
        return min(width, self._config.slots * (1 + self._config.drafts))

    def begin(self, slot: int, text: Texts) -> None:
        """Put a text into a slot, counted over all shards."""
        self._texts = self._begin(self._texts, np.int32(slot), text)

    def allow(self, slot: int, mask: npt.NDArray[np.uint32]) -> None:
        """Which ids may come next in a slot, for the steps that are launched from now on."""
        self._texts = self._allow(self._texts, np.int32(slot), mask)

    def put_tables(self, tables: Mapping[int, npt.NDArray[np.int32]]) -> None:
        """Blocks of all texts, of every shard: window -> int32 [S, M]."""
        self._tables = jax.device_put(dict(tables), self._cut)

    def run(self, width: int, rows: StepRows, n_steps: int) -> Drawn:
        """Launch a step, and do not wait for it."""
        return self._run(self._steps[width], rows, n_steps)

    def update(self, parameters: Any) -> None:
        """Take other parameters for all steps from now on."""
        self._parameters = None  # for both there may be no room
        self._parameters = self._placed(parameters)
        if self._formats is not None:
            self._lay_out()

    def no_rows(self, width: int) -> StepRows:
        """Rows of all shards that read nothing, to be filled: numpy arrays."""
        n, scored = width * self._n_shards, self.scored_rows(width) * self._n_shards
        nothing = np.full(n, -1, np.int32)
        drafts, none = nothing.copy() if self._config.drafts else None, np.full(scored, -1, np.int32)
        branches = None
        if self._config.parents is not None:
            nodes = TokenTree(nothing.copy(), nothing.copy(), np.zeros(n, np.int32))
            branches = Branches(np.arange(scored, dtype=np.int32), nodes)
        slots, samples = np.zeros(n, np.int32), np.zeros(scored, bool)
        return StepRows(slots, nothing, none, samples, none.copy(), drafts, branches)

    def _placed(self, parameters: Any) -> Any:
        """The parameters as the step takes them."""
        parameters = held(parameters, self._model, self._how, self._weights)
        if self._adapters:
            parameters = with_adapters(self._model, parameters, self._adapters, self._how)
        return by_layer(self._model, parameters) if self._how.layout.on_cpu else parameters

    def _lay_out(self) -> None:
        """Bring the parameters into their formats, one by one: for all of them twice there is no room."""
        leaves, tree = jax.tree.flatten(self._parameters)
        self._parameters = None
        for n, one in enumerate(jax.tree.leaves(self._formats)):
            leaves[n] = jax.device_put(leaves[n], one)
        self._parameters = jax.tree.unflatten(tree, leaves)

    def _run(self, program: jax.stages.Compiled, rows: StepRows, n_steps: int) -> Drawn:
        self._cache, self._texts, drawn = program(
            self._parameters, self._cache, self._texts, self._tables, rows, np.int32(n_steps)
        )
        return drawn

    def _compiled(self, most: int, n_probes: int) -> dict[int, jax.stages.Compiled]:
        """The step for a few numbers of rows, smallest first, whose rows are the same to the bit.

        How a product or a sum is rounded depends on how many rows it has. Of the numbers that are tried only one class
        is used: that of `most`, if the config names it; else, but on a CPU, where a row costs what it computes, one
        with a row for every slot; then the one with the most members, and of equal ones that with a row for as many
        slots as any has, but with no more rows than that, so that a lone text does not pay for the room that many
        prompts need.
        """
        began = time.perf_counter()
        widths = sorted({max(most // n, min(2, most)) for n in (1, 4, 16)})
        programs: dict[int, jax.stages.Compiled] = {}
        if not self._how.layout.on_cpu:  # those of the step that reads the fewest rows, and so the most for each
            chosen_by = self._lowered(widths[0], compiler_chooses(self._parameters))
            programs[widths[0]] = chosen_by.compile()
            self._formats = programs[widths[0]].input_formats[0][0]
            self._lay_out()
        with concurrent.futures.ThreadPoolExecutor() as pool:  # compilers do not hold Python's lock
            left = [width for width in widths if width not in programs]
            compiling = {width: pool.submit(self._lowered(width, self._formats).compile) for width in left}
            programs |= {width: future.result() for width, future in compiling.items()}
        classes: list[tuple[list[Drawn], list[int]]] = []
        for width in widths:
            answer = self._probed(programs[width], width, n_probes)
            home = next((members for known, members in classes if _same(known, answer)), None)
            classes.append((answer, [width])) if home is None else home.append(width)
        chosen = max((members for _, members in classes), key=lambda members: self._worth(members, most))
        seconds = time.perf_counter() - began
        _LOG.info("engine: compiled in %.1f s; a step has %s tokens", seconds, " or ".join(map(str, chosen)))
        return {width: programs[width] for width in chosen}

    def _worth(self, widths: list[int], most: int) -> tuple[bool, bool, int, int]:
        """Of a class: the greatest is used, of equal ones the first."""
        slots, named = self._config.slots, self._config.tokens_per_step is not None
        every_slot = not self._how.layout.on_cpu and widths[-1] >= slots
        return named and most in widths, every_slot, len(widths), min(widths[-1], slots)

    def _lowered(self, width: int, formats: Any) -> jax.stages.Lowered:
        steps, guesses = self._config.most_steps, self._config.guesses
        jitted = jitted_step(
            self._model, self._how, self._cache, self._texts, formats, most_steps=steps, guesses=guesses
        )
        parameters = self._parameters
        if formats is not None:
            parameters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parameters)
        found: jax.stages.Lowered = jitted.lower(
            parameters, self._cache, self._texts, self._tables, self.no_rows(width), np.int32(1)
        )
        return found

    def _probed(self, program: jax.stages.Compiled, width: int, n: int) -> list[Drawn]:
        """What a step of this width makes of n short texts, each in a block of its own."""
        rng, n = np.random.default_rng(0), min(n, self.scored_rows(width), self._config.slots)
        settings = settings_row(SamplingConfig(), vocab=self._vocab_size, logprobs=TOP_SCORES)
        length = min(_PROBE, self._config.block_size)
        before = self._tables
        self.put_tables({window: _numbered(table, n) for window, table in before.items()})
        for slot in range(n):
            history = np.zeros(self._model.max_seq_len + 1, np.int32)
            history[:_PROBE] = rng.integers(0, self._vocab_size, _PROBE)
            self.begin(slot, Texts(history, np.int32(_PROBE), np.int32(_PROBE), np.bool_(False), np.int32(0), settings))
        found = []
        for position in range(length):
            rows = self.no_rows(width)
            rows.slots[:n], rows.positions[:n], rows.scored[:n] = range(n), position, range(n)
            if rows.branches is not None:
                nodes = rows.branches.nodes
                nodes.places[:n], nodes.first[:n], nodes.path[:n] = position, position, 1
            found.append(jax.tree.map(lambda x: np.asarray(x)[0, :n], self._run(program, rows, 1)))
        self._tables = before
        return found


def _numbered(table: jax.Array, n: int) -> npt.NDArray[np.int32]:
    """The table with block i + 1 as the first of slot i, for the first n."""
    blocks = np.zeros(table.shape, np.int32)
    blocks[:n, 0] = range(1, n + 1)
    return blocks


def pool_sizes(model: ModelConfig, config: EngineConfig, how: Execution, most: int) -> dict[int, int]:
    """window -> blocks of a shard, with the one that is nobody's; a step reads `most` tokens at the most."""
    C, layout = config.block_size, how.layout
    positions = config.cache_tokens
    if positions is None:
        positions = max(config.slots * model.max_seq_len // 2, model.max_seq_len)
    blocks = shapes.cache_blocks(model, positions=positions, slots=config.slots, tokens_per_step=most, block_size=C)
    if config.cache_tokens is None and jax.process_count() == 1:  # several would not have the same to spare
        room, tensor = _free_bytes(layout), layout.mesh.shape["tensor"]
        total = shapes.pools_bytes(model, blocks, C, dtype=how.config.dtype, tensor=tensor, kept_in=config.kv_cache)
        if total > room:
            blocks = {window: max(int(n * room / total), 2) for window, n in blocks.items()}
    return blocks


def _free_bytes(layout: Layout) -> int:
    """Of a device's memory, what the cache may take if nobody says how much."""
    use = memory_in_use(list(layout.mesh.local_devices))
    if not layout.on_cpu and use.limit is not None:
        return int(shapes.CACHE_SHARE * (use.limit - use.in_use))
    available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    return int(available.group(1)) * 1024 // 4 if available else 2**30


def _same(one: Any, other: Any) -> bool:
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True))
