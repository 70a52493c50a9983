"""One optimizer step, as a pure function of state and batch, for any objective."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maxlm.checkpoint.store import named_leaves
from maxlm.config import Dtype, ModelConfig, RunConfig, StatePart, UserError
from maxlm.observe.devices import multiplies
from maxlm.sharding import Layout, all_devices, make_layout
from maxlm.training import stability
from maxlm.training.in_products import SCALES
from maxlm.training.objective import Batch, NextToken, Objective, Params, Sums, in_parts, make_evaluate
from maxlm.training.optimizers import make_optimizer
from maxlm.training.rank_budget import RankBudget
from maxlm.training.rounding import stored, widened
from maxlm.training.schedules import learning_rate_schedule
from maxlm.training.stability import PartNorms, StepFacts
from maxlm.training.state import TrainState, init_state, state_shardings
from maxlm.training.watch import Seen, activation_size, first_not_finite, sizes_of

_CPU_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""XLA for CPUs otherwise drops the barriers that put off each block's second forward pass until its gradient needs it,
and then holds what all blocks of a pattern computed at once."""


_ROUNDING = 0x726F756E
"""Sets the chance by which parameters are rounded apart from what else a step draws, as no step has this number."""


class StepOutput(NamedTuple):
    """What a step tells, on the device."""

    figures: dict[str, jax.Array]
    """Everything to log: scalars, or one figure for each layer that has it. Always `loss`, `grad_norm` (the global L2
    norm before clipping), `update_norm` (of what is added to the parameters), `learning_rate` and `skipped_steps`
    (since the start, this one included); each entry of `Sums.means`, divided by the weight of the batch, and of
    `Sums.largest`."""
    weight: jax.Array
    """`Sums.weight` of the batch."""
    skipped_in_row: jax.Array


class Gradient(NamedTuple):
    """Of a batch."""

    sums: Sums
    of_sum: Any
    """Of the sums' objective, times what was asked for: a tree like the parameters', with None for those that are not
    trained."""
    parts: PartNorms | None
    """Of the micro-batches' sums' objectives, times the same; where train.noise_scale asks for them."""
    largest: dict[str, jax.Array]
    """What stands for the gradient of the scales: see `narrow_einsum`."""


class Trainer(NamedTuple):
    """The compiled programs of a run, and the shapes and shardings of its state."""

    layout: Layout
    """Where all of it lives."""
    init: Callable[[], TrainState]
    """A new state, each array born on the devices it belongs to; nothing in `frozen`."""
    begin: Callable[[Params], TrainState]
    """A new state of these parameters."""
    step: jax.stages.Wrapped
    """TrainState and Batch -> TrainState and StepOutput. One optimizer step; the old state's memory is used again, so
    do not touch it afterwards, `frozen` included."""
    evaluate: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
    """See `make_evaluate`."""
    look: Callable[[TrainState, Batch], Seen]
    """What a step on this batch is made of, layer by layer; it changes nothing. Compiled when it is called."""
    model: ModelConfig
    state: TrainState
    """Shapes and shardings of a state, as ShapeDtypeStruct."""
    batch: dict[str, jax.ShapeDtypeStruct]
    """Shapes and shardings of a batch."""

    def place(self, batch: Mapping[str, Any]) -> Batch:
        """A batch on the host, the same on every process, on the devices where a step wants it.

        `maxlm.data.loader.global_batches` is for runs: each process reads its own rows, ahead of time.
        """
        return {name: jax.device_put(values, self.batch[name].sharding) for name, values in batch.items()}

    def first_not_finite(self, state: TrainState, batch: Batch) -> str | None:
        """What in a step on this batch is the first that is not finite, such as "output of block 3's mlp (forward)" or
        "gradient of attention/q_proj of block 2", with blocks counted from 0; None: nothing. Every rank calls it."""
        return first_not_finite(self.model, self.look(state, batch))

    def start(self, state: TrainState | None = None, frozen: Any = None) -> tuple[jax.stages.Compiled, TrainState]:
        """The compiled step, and `state` or a new one, which is made while the step compiles, with `frozen` in it."""
        with ThreadPoolExecutor(1, thread_name_prefix="compile") as thread:
            compiling = thread.submit(lambda: self.step.lower(self.state, self.batch).compile())
            state = dataclasses.replace(self.init() if state is None else state, frozen=frozen)
            return compiling.result(), jax.block_until_ready(state)


def gradient_function(
    config: RunConfig, layout: Layout, objective: Objective
) -> Callable[[Params, Any, Batch], tuple[Sums, Any]]:
    """Parameters, frozen arrays and batch -> the sums and the gradient of their objective, over all micro-batches.

    The gradient is a tree like the parameters', with None for those that are not trained.
    """
    found = _gradient_function(config, layout, objective)
    return lambda params, frozen, batch: found(params, frozen, batch, None, {})[:2]


def _gradient_function(
    config: RunConfig, layout: Layout, objective: Objective
) -> Callable[[Params, Any, Batch, jax.Array | None, dict[str, jax.Array]], Gradient]:
    """The same, and what the objective is multiplied by before its gradient is formed, and `product_scales` -> the
    gradient of that."""
    part = functools.partial(trained, objective.declared)
    shardings = part(layout.shardings(objective.dims, StatePart.GRADIENTS))

    def of_part(
        params: Params, frozen: Any, batch: Batch, counted: Any, scale: jax.Array | None, scales: dict[str, jax.Array]
    ) -> tuple[Sums, Any, dict[str, jax.Array]]:
        def loss(changing: Params, scales: dict[str, jax.Array]) -> tuple[jax.Array, Sums]:
            read = joined(changing, params) | ({SCALES: scales} if scales else {})
            sums = objective.loss(read, frozen, batch, counted)
            return sums.objective if scale is None else scale * sums.objective, sums

        (gradients, largest), sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(part(params), scales)
        return sums, jax.lax.with_sharding_constraint(widened(gradients), shardings), largest

    parts = config.train.micro_batches
    if parts == 1 or layout.mesh.shape["stage"] > 1:  # a pipeline cuts the batch itself

        def whole(
            params: Params, frozen: Any, batch: Batch, scale: jax.Array | None, scales: dict[str, jax.Array]
        ) -> Gradient:
            counted = objective.counted(params, frozen, batch)
            sums, gradients, largest = of_part(params, frozen, batch, counted, scale, scales)
            return Gradient(sums, gradients, None, largest)

        return whole

    def accumulate(
        params: Params, frozen: Any, batch: Batch, scale: jax.Array | None, scales: dict[str, jax.Array]
    ) -> Gradient:
        def add(total: Any, part: Batch) -> tuple[Any, tuple[Sums, jax.Array | None, dict[str, jax.Array]]]:
            sums, gradients, largest = of_part(params, frozen, part, counted, scale, scales)
            norm = optax.tree.norm(gradients) if config.train.noise_scale.measure else None
            return jax.tree.map(jnp.add, total, gradients), (sums, norm, largest)

        counted = objective.counted(params, frozen, batch)
        zeros = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, widened(part(params))), shardings)
        gradients, (sums, norms, largest) = jax.lax.scan(add, zeros, in_parts(objective, layout, batch, parts))
        of_parts = None if norms is None else PartNorms(norms, sums.weight)
        return Gradient(Sums.of_parts(sums), gradients, of_parts, jax.tree.map(lambda x: x.max(0), largest))

    return accumulate


def trained(declared: Any, tree: Any) -> Any:
    """Of a tree like the parameters', what is about those that are trained; None for the others."""
    return jax.tree.map(lambda array, leaf: leaf if array.trained else None, declared, tree)


def joined(some: Any, whole: Any) -> Any:
    """`whole` with what `trained` left of another tree in its places."""
    return jax.tree.map(lambda one, other: other if one is None else one, some, whole, is_leaf=lambda x: x is None)


def make_trainer(config: RunConfig, layout: Layout | None = None, objective: Objective | None = None) -> Trainer:
    """Everything compiled that training needs; nothing is compiled before its first call. Also `maxlm.make_trainer`.

    Args:
        config: its model, train, optimizer and execution; its sharding, where no layout is given.
        layout: None: as config.sharding says, over all devices.
        objective: None: to predict the next token, whatever config.task is.

    Raises:
        UserError: the objective makes other parameters than it declares; the devices do not compute in float16, if that
            is asked for; without a layout: the config does not fit the devices, or its parts each other.
    """
    if layout is None:
        config.validate(len(all_devices()))
        layout = make_layout(config.sharding)
    _check_float16(config, layout)
    objective = objective or NextToken(config, layout)
    learning_rate = learning_rate_schedule(
        config.optimizer.schedule, config.optimizer.learning_rate, config.train.steps
    )
    part, adapts = functools.partial(trained, objective.declared), config.model.adapter is not None
    optimizer = make_optimizer(config.optimizer, learning_rate, part(objective.declared), layers=config.model.repeats)
    gradient, budget = _gradient_function(config, layout, objective), RankBudget.of(config)
    held = functools.partial(stored, config.optimizer.parameter_format, objective.declared)

    def init() -> TrainState:
        parameters = held(objective.init(jax.random.key(config.train.seed)))
        return init_state(parameters, optimizer.init(widened(part(parameters))), stability.begin(config))

    def drawn(state: TrainState, batch: Batch) -> Batch:
        return objective.draw(batch, jax.random.fold_in(jax.random.key(config.train.seed), state.step))

    def mean_gradient(state: TrainState, batch: Batch) -> tuple[Gradient, jax.Array]:
        """Of the mean loss; and what makes a mean of a sum."""
        scale = None
        if state.stability.loss_scale is not None:  # of a sum over so many tokens
            scale = state.stability.loss_scale.scale / (config.train.batch_size * config.train.seq_len)
        scales = stability.product_scales(config.execution.products, state.stability)
        sums, gradients, parts, largest = gradient(state.parameters, state.frozen, batch, scale, scales)
        # One division by the weight of the whole batch: every token weighs the same, whatever micro-batch or device
        # it came on.
        per_token = 1.0 / jnp.maximum(sums.weight, 1.0)
        factor = per_token if scale is None else per_token / scale
        if parts is not None:
            each = parts.weights if scale is None else parts.weights * scale
            parts = parts._replace(norms=parts.norms / jnp.where(each > 0, each, 1))
        return Gradient(sums, jax.tree.map(lambda g: g * factor, gradients), parts, largest), per_token

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepOutput]:
        (sums, gradients, parts, largest), per_token = mean_gradient(state, drawn(state, batch))
        mean_norm = None if parts is None else optax.tree.norm(gradients)
        updates_made = state.step - state.skipped  # what the schedule counts
        more: dict[str, jax.Array] = {}
        if budget is not None:
            gradients, more = budget.penalise(state.parameters, gradients)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(gradients)
            old = widened(part(state.parameters))
            updates, new_optimizer = optimizer.update(gradients, state.optimizer, old)
            new_parameters = joined(optax.apply_updates(old, updates), state.parameters)
            new_parameters, figures = objective.settle(new_parameters, sums.router)
            if budget is not None:
                ranks = budget.settle(state.parameters, gradients, new_parameters, updates_made)
                new_parameters, more = ranks[0], more | ranks[1]
            if adapts:  # of the base nothing changes, whatever settles
                new_parameters = joined(part(new_parameters), state.parameters)
            rounds = jax.random.fold_in(jax.random.key(config.train.seed), _ROUNDING)
            new_parameters = held(new_parameters, jax.random.fold_in(rounds, state.step))
            update_norm = optax.tree.norm(updates)
        # A bad step leaves no trace but its count.
        good = jnp.isfinite(sums.objective) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        for of_products in jax.tree.leaves(largest):  # clipped to their largest number, infinities would not be seen
            good &= jnp.isfinite(of_products).all()
        loss = sums.means.get("loss", sums.objective) * per_token
        done, spike = good & objective.accepts(sums), None
        if (before := state.stability.spikes) is not None:
            spike = done & stability.is_spike(config.train.spikes, before, loss, grad_norm)
            done &= ~spike
        facts = StepFacts(loss, grad_norm, good, spike, done, sums.weight, mean_norm, parts, largest)
        steady, of_stability = stability.settle(config, state.stability, facts)
        keep = lambda new, old: jnp.where(done, new, old)
        new_state = TrainState(
            step=state.step + 1,
            parameters=jax.tree.map(keep, new_parameters, state.parameters),
            optimizer=jax.tree.map(keep, new_optimizer, state.optimizer),
            skipped=state.skipped + ~done,
            skipped_in_row=jnp.where(
                good, 0, state.skipped_in_row + stability.counts_as_bad(state.stability.loss_scale)
            ),
            stability=steady,
            frozen=state.frozen,
        )
        means = {name: total * per_token for name, total in {"loss": sums.objective, **sums.means}.items()}
        figures = means | sums.largest | figures | more | of_stability | {
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "learning_rate": jnp.asarray(learning_rate(updates_made), jnp.float32),
            "skipped_steps": new_state.skipped,
        }  # fmt: skip
        return new_state, StepOutput(figures, sums.weight, new_state.skipped_in_row)

    def look(state: TrainState, batch: Batch) -> Seen:
        batch = drawn(state, batch)
        (sums, gradients, *_), per_token = mean_gradient(state, batch)
        if budget is not None:
            gradients, _ = budget.penalise(state.parameters, gradients)
        old = widened(part(state.parameters))
        updates, _ = optimizer.update(gradients, state.optimizer, old)
        parts = 1 if layout.mesh.shape["stage"] > 1 else config.train.micro_batches
        some = {name: x[0] for name, x in in_parts(objective, layout, batch, parts).items()}
        sizes = functools.partial(sizes_of, part(objective.declared))
        return Seen(
            loss=sums.means.get("loss", sums.objective) * per_token,
            activations=objective.look(state.parameters, some, activation_size),
            gradients=sizes(gradients),
            parameters=sizes(old),
            updates=sizes(updates),
        )

    abstract = jax.eval_shape(init)
    _check_counted(objective.declared, abstract.parameters)
    shardings = dataclasses.replace(
        state_shardings(abstract, objective.declared, layout, part),
        frozen=jax.tree.map(lambda leaf: leaf.sharding, objective.frozen),
    )
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        dataclasses.replace(abstract, frozen=objective.frozen),
        shardings,
    )
    begin_optimizer = jax.jit(
        lambda some: init_state(None, optimizer.init(widened(some)), stability.begin(config)),
        out_shardings=dataclasses.replace(shardings, parameters=None, frozen=None),
    )

    def begin(parameters: Params) -> TrainState:
        parameters = held(parameters)
        return dataclasses.replace(begin_optimizer(part(parameters)), parameters=parameters)

    # For what runs once, and is mostly random numbers: not worth the compiler's best effort.
    in_haste = {"xla_backend_optimization_level": 1}
    if layout.on_cpu and jax.__version_info__ < (0, 12):  # later ones have no other emitter of loops
        in_haste["xla_cpu_use_fusion_emitters"] = False
    return Trainer(
        layout=layout,
        init=jax.jit(init, out_shardings=dataclasses.replace(shardings, frozen=None), compiler_options=in_haste),
        begin=begin,
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings, layout.sharding()),
            compiler_options=_CPU_OPTIONS if layout.on_cpu else None,
        ),
        evaluate=make_evaluate(objective, layout),
        look=jax.jit(look, out_shardings=layout.sharding()),
        model=config.model,
        state=shapes,
        batch={
            name: jax.ShapeDtypeStruct(
                array.shape, array.dtype, sharding=layout.sharding(layout.activation(*array.dims))
            )
            for name, array in objective.arrays.items()
        },
    )


def _check_float16(config: RunConfig, layout: Layout) -> None:
    kind = layout.mesh.devices.flat[0].device_kind
    if config.execution.dtype is Dtype.FLOAT16 and not multiplies(kind, Dtype.FLOAT16):
        raise UserError(
            f"execution.dtype = float16 needs devices that multiply in it, and {kind} does not; use bfloat16"
        )


def _check_counted(declared: Any, built: Params) -> None:
    """What is counted, planned and cut over devices must be what is trained."""
    whole = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
    built = jax.tree.map(whole, built, is_leaf=lambda node: hasattr(node, "shape"))  # as a Weight has
    counted, made = ({name: leaf.shape for name, leaf in named_leaves(tree).items()} for tree in (declared, built))
    different = [name for name in {**counted, **made} if counted.get(name) != made.get(name)]
    if different:
        name, size = different[0], lambda shapes: sum(map(math.prod, shapes.values()))
        raise UserError(
            f"model: {size(counted):,} parameters are declared and {size(made):,} were built; {name} is declared as "
            f"{counted.get(name)} and built as {made.get(name)}; mend its declaration in maxlm/shapes/arrays.py"
        )
