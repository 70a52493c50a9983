"""One optimizer step, as a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maxlm.config import Experts, ModelConfig, NoisyTopKRouter, RunConfig, StatePart
from maxlm.models import Execution, Tokens, bind, declared, parameter_dims
from maxlm.models.moe import RouterStats, balance_biases
from maxlm.models.ops.ring import in_ring_order
from maxlm.models.pipeline import in_pipeline_order
from maxlm.sharding import Layout
from maxlm.training.losses import cross_entropy_sums
from maxlm.training.optimizers import make_optimizer
from maxlm.training.router_metrics import RouterMetrics, router_metrics
from maxlm.training.schedules import learning_rate_schedule
from maxlm.training.state import TrainState, init_state, state_shardings

Batch = dict[str, jax.Array]
"""inputs, targets, segment_ids, positions: int32 [B, T]; loss_mask: float32 [B, T]; where routers are to be noisy also
seeds: uint32 [B]."""


_CPU_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""XLA for CPUs otherwise drops the barriers that put off each block's second forward pass until its gradient needs it,
and then holds what all blocks of a pattern computed at once."""


class BatchSums(NamedTuple):
    """Sums over the tokens of a batch, float32; those of its micro-batches add up to them."""

    objective: jax.Array
    """What is minimised: cross_entropy + z_loss * log_z_squared + auxiliary. The only differentiable one."""
    cross_entropy: jax.Array
    """Nats."""
    log_z_squared: jax.Array
    auxiliary: jax.Array
    """The routers' losses, summed over the layers: their mean over all tokens times the tokens that count."""
    router: tuple[RouterStats | None, ...]
    """As in DecoderOutput."""


class StepMetrics(NamedTuple):
    """Figures of one step, on the device; scalars but for `router`."""

    loss: jax.Array
    """Mean cross-entropy of the batch's tokens, nats."""
    log_z_squared: jax.Array
    """Mean of log(Z)^2."""
    grad_norm: jax.Array
    """Global L2 norm of the gradient before clipping."""
    learning_rate: jax.Array
    tokens: jax.Array
    """Tokens that counted in the loss, float32."""
    skipped: jax.Array
    """Steps skipped since the start, this one included."""
    skipped_in_row: jax.Array
    auxiliary_loss: jax.Array
    """The routers' losses, weights included, as they are in the objective: summed over the layers, mean over tokens."""
    router: RouterMetrics | None
    """None in a model without experts."""


class Trainer(NamedTuple):
    """The compiled programs of a run, and the shapes and shardings of its state."""

    init: Callable[[], TrainState]
    """A new state, each array born on the devices it belongs to."""
    step: jax.stages.Wrapped
    """TrainState and Batch -> TrainState and StepMetrics. One optimizer step; the old state's memory is used again, so
    do not touch it afterwards."""
    evaluate: Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
    """Parameters and batch -> sum of the cross-entropy in nats, and number of tokens."""
    state: TrainState
    """Shapes and shardings of a state, as ShapeDtypeStruct."""
    batch: dict[str, jax.ShapeDtypeStruct]
    """Shapes and shardings of a batch."""
    batch_sharding: jax.sharding.NamedSharding
    """The sharding of each array of a batch."""

    def start(self, state: TrainState | None = None) -> tuple[jax.stages.Compiled, TrainState]:
        """The compiled step, and `state` or a new one, which is made while the step compiles."""
        with ThreadPoolExecutor(1, thread_name_prefix="compile") as thread:
            compiling = thread.submit(lambda: self.step.lower(self.state, self.batch).compile())
            state = self.init() if state is None else state
            return compiling.result(), jax.block_until_ready(state)


def loss_function(config: RunConfig, layout: Layout) -> Callable[..., BatchSums]:
    """The loss of next-token prediction: parameters and batch -> sums over the batch's tokens.

    Of a part of a batch also: `counted`, the share of the whole batch's tokens that its mask counts.
    """
    how = Execution.of(config, layout)

    def loss(parameters: Any, batch: Batch, counted: jax.Array | None = None) -> BatchSums:
        model = bind(config.model, parameters)
        batch = in_ring_order(layout, in_pipeline_order(layout, batch, config.train.micro_batches))
        tokens = Tokens(batch["positions"], batch["segment_ids"], seeds=batch.get("seeds"))
        output = model(model.embeddings(batch["inputs"], tokens, how), tokens, how)
        with jax.named_scope("loss"):
            sums = cross_entropy_sums(
                layout,
                output.hidden,
                model.output_table,
                batch["targets"],
                batch["loss_mask"],
                z_loss=config.train.z_loss,
                chunk=config.train.loss_chunk,
            )
            # A router's loss is about all tokens, also those that the mask leaves out; all together weigh what the
            # counted ones do.
            auxiliary = sum((stats.auxiliary.sum() for stats in output.router if stats is not None), jnp.float32(0))
            auxiliary *= jnp.mean(batch["loss_mask"]) if counted is None else counted
            return BatchSums(
                sums.objective + auxiliary, sums.cross_entropy, sums.log_z_squared, auxiliary, output.router
            )

    return loss


def gradient_function(
    config: RunConfig, layout: Layout, loss: Callable[..., BatchSums]
) -> Callable[[Any, Batch], tuple[BatchSums, Any]]:
    """Parameters and batch -> the loss's sums and the gradient of their objective, summed over micro-batches."""
    dims = parameter_dims(config.model)
    shardings = layout.shardings(dims, StatePart.GRADIENTS)

    def of_part(parameters: Any, batch: Batch, counted: jax.Array | None = None) -> tuple[BatchSums, Any]:
        def objective(parameters: Any) -> tuple[jax.Array, BatchSums]:
            sums = loss(parameters, batch, counted)
            return sums.objective, sums

        gradients, sums = jax.grad(objective, has_aux=True)(parameters)
        return sums, jax.lax.with_sharding_constraint(gradients, shardings)

    parts = config.train.micro_batches
    if parts == 1 or layout.mesh.shape["stage"] > 1:  # a pipeline cuts the batch itself
        return of_part

    def cut(x: jax.Array) -> jax.Array:
        # Row r goes to micro-batch r % parts: each device keeps the rows it has.
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return layout.constrain(x, None, "batch", *["seq"] * (x.ndim - 2))

    def accumulate(parameters: Any, batch: Batch) -> tuple[BatchSums, Any]:
        def add(total: Any, part: Batch) -> tuple[Any, BatchSums]:
            sums, gradients = of_part(parameters, part, counted)
            return jax.tree.map(jnp.add, total, gradients), sums

        counted = jnp.mean(batch["loss_mask"])
        zeros = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, parameters), shardings)
        gradients, sums = jax.lax.scan(add, zeros, jax.tree.map(cut, batch))
        return jax.tree.map(lambda x: x.sum(0), sums), gradients

    return accumulate


def make_trainer(config: RunConfig, layout: Layout) -> Trainer:
    """Everything compiled that training needs. Nothing is compiled before its first call."""
    dims = parameter_dims(config.model)
    learning_rate = learning_rate_schedule(
        config.optimizer.schedule, config.optimizer.learning_rate, config.train.steps
    )
    optimizer = make_optimizer(config.optimizer, learning_rate, declared(config.model), layers=config.model.repeats)
    loss = loss_function(config, layout)
    gradient = gradient_function(config, layout, loss)
    noisy = _has_noise(config.model)

    def init() -> TrainState:
        return init_state(config.model, optimizer, jax.random.key(config.train.seed))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        if noisy:
            key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
            seeds = jax.random.bits(key, (config.train.batch_size,), jnp.uint32)
            batch = {**batch, "seeds": layout.constrain(seeds, "batch")}
        sums, gradients = gradient(state.parameters, batch)
        # One division by the tokens of the whole batch: every token weighs the same, whatever micro-batch or device
        # it came on.
        tokens = jnp.sum(batch["loss_mask"])
        per_token = 1.0 / jnp.maximum(tokens, 1.0)
        gradients = jax.tree.map(lambda g: g * per_token, gradients)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(gradients)
            updates, new_optimizer = optimizer.update(gradients, state.optimizer, state.parameters)
            new_parameters = optax.apply_updates(state.parameters, updates)
            new_parameters = balance_biases(config.model, new_parameters, sums.router)
        # A bad step leaves no trace but its count.
        good = jnp.isfinite(sums.objective) & jnp.isfinite(grad_norm)
        keep = lambda new, old: jnp.where(good, new, old)
        new_state = TrainState(
            step=state.step + 1,
            parameters=jax.tree.map(keep, new_parameters, state.parameters),
            optimizer=jax.tree.map(keep, new_optimizer, state.optimizer),
            skipped=state.skipped + ~good,
            skipped_in_row=jnp.where(good, 0, state.skipped_in_row + 1),
        )
        metrics = StepMetrics(
            loss=sums.cross_entropy * per_token,
            log_z_squared=sums.log_z_squared * per_token,
            grad_norm=grad_norm,
            learning_rate=jnp.asarray(learning_rate(_count(state)), jnp.float32),
            tokens=tokens,
            skipped=new_state.skipped,
            skipped_in_row=new_state.skipped_in_row,
            auxiliary_loss=sums.auxiliary * per_token,
            router=router_metrics(sums.router),
        )
        return new_state, metrics

    def evaluate(parameters: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return loss(parameters, batch).cross_entropy, jnp.sum(batch["loss_mask"])

    abstract = jax.eval_shape(init)
    shardings = state_shardings(abstract, dims, layout, optimizer)
    everywhere, batch_sharding = layout.sharding(), layout.sharding(layout.activation("batch", "seq"))
    # For what runs once, and is mostly random numbers: not worth the compiler's best effort.
    in_haste = {"xla_backend_optimization_level": 1}
    if layout.on_cpu:
        in_haste["xla_cpu_use_fusion_emitters"] = False
    return Trainer(
        init=jax.jit(init, out_shardings=shardings, compiler_options=in_haste),
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings, everywhere),
            compiler_options=_CPU_OPTIONS if layout.mesh.devices.flat[0].platform == "cpu" else None,
        ),
        evaluate=jax.jit(evaluate, out_shardings=everywhere),
        state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
        ),
        batch={
            name: jax.ShapeDtypeStruct(
                (config.train.batch_size, config.train.seq_len),
                jnp.float32 if name == "loss_mask" else jnp.int32,
                sharding=batch_sharding,
            )
            for name in ("inputs", "targets", "segment_ids", "positions", "loss_mask")
        },
        batch_sharding=batch_sharding,
    )


def _count(state: TrainState) -> jax.Array:
    """Updates made so far: the count that the learning-rate schedule sees."""
    return state.step - state.skipped


def _has_noise(model: ModelConfig) -> bool:
    """Whether a router draws random numbers in training."""
    return any(
        isinstance(block.mlp, Experts) and isinstance(block.mlp.router, NoisyTopKRouter) for block in model.blocks
    )
