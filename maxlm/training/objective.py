"""What a run minimises: the one thing that the train step does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypedDict

import jax
import jax.numpy as jnp

from maxlm.config import ModelConfig, RunConfig, TrainConfig
from maxlm.config.prediction_rules import predictions
from maxlm.config.predictions import ENDS, PLACES, arrays_beside
from maxlm.models import Decoder, DecoderOutput, Execution, Tokens, bind, declared, init_parameters
from maxlm.models.moe import balance_biases
from maxlm.sharding import Layout
from maxlm.training.ahead import ahead
from maxlm.training.in_products import in_products
from maxlm.training.losses import LossSums, cross_entropy_sums
from maxlm.training.router_metrics import router_metrics
from maxlm.training.state import of_model

Params = Any
"""Nested dicts of float32 arrays."""
Batch = dict[str, jax.Array]


class BatchArray(NamedTuple):
    """One array of a batch, over all devices."""

    shape: tuple[int, ...]
    dtype: Any
    dims: tuple[str | None, ...]
    """Names as of `Layout.activation`; the first is "batch"."""


class Sums(NamedTuple):
    """Sums over a batch, float32; those of its micro-batches add up to them."""

    objective: jax.Array
    """What is minimised. The only differentiable one."""
    weight: jax.Array
    """What the others are divided by to be means: as a rule, the tokens that count."""
    means: dict[str, jax.Array]
    """Every further figure to log, times its weight. `loss` is that of the console and the report; without it they
    show the objective."""
    router: Any = ()
    """What `Objective.settle` makes something of: sums of which the log wants no mean."""
    largest: dict[str, jax.Array] = {}  # noqa: RUF012 - never changed
    """Figures to log of which the largest is wanted, not a mean: those of micro-batches have the maximum of theirs."""

    @staticmethod
    def of_parts(parts: Sums) -> Sums:
        """Of a batch, from those of its micro-batches, stacked: [parts, ...]."""
        totals = jax.tree.map(lambda x: x.sum(0), parts._replace(largest={}))
        return totals._replace(largest={name: x.max(0) for name, x in parts.largest.items()})


class Objective(Protocol):
    """Derive from it: what has a body here need not be written."""

    arrays: Mapping[str, BatchArray]
    """What a batch holds."""
    declared: Any
    """The `shapes.Array` of every parameter, in the parameters' tree: dims, and whether it decays."""
    frozen: Any = None
    """What `loss` reads and nobody trains, as a tree of ShapeDtypeStructs with shardings."""

    @property
    def dims(self) -> Any:
        """Names of every parameter's dims, in the parameters' tree."""
        return jax.tree.map(lambda array: array.dims, self.declared)

    def init(self, key: jax.Array) -> Params:
        """New parameters."""
        ...

    def loss(self, params: Params, frozen: Any, batch: Batch, counted: Any) -> Sums:
        """The sums of a batch or of some of its rows; `counted`: see below."""
        ...

    def counted(self, params: Params, frozen: Any, batch: Batch) -> Any:
        """What the loss of a few rows must know of the whole batch, as a tree of arrays. No gradient goes through it.

        What runs the model does so a micro-batch at a time, with `in_parts`.
        """
        return jnp.float32(1)

    def draw(self, batch: Batch, key: jax.Array) -> Batch:
        """The batch with all that is random in this step, from a key that is the step's own, and what else it has of
        each row, as arrays [B]."""
        return batch

    def accepts(self, sums: Sums) -> jax.Array | bool:
        """Whether the parameters are to change at all, by the sums of the whole batch."""
        return True

    def settle(self, params: Params, router: Any) -> tuple[Params, dict[str, jax.Array]]:
        """Parameters after an update, and figures to log, as they follow from `Sums.router` of the whole batch."""
        return params, {}

    def look(self, params: Params, batch: Batch, of: Callable[[jax.Array], Any]) -> dict[str, Any]:
        """What `of` makes of each activation of the model on some rows, as `Decoder.look` has them; nothing, for an
        objective without such a model."""
        return {}


def in_parts(objective: Objective, layout: Layout, batch: Batch, parts: int) -> Batch:
    """The micro-batches of a batch, stacked: [B, ...] -> [parts, B / parts, ...].

    Row r goes to micro-batch r % parts, so that each device keeps the rows it has.
    """

    def cut(name: str, x: jax.Array) -> jax.Array:
        # What the step drew has rows alone.
        dims = objective.arrays[name].dims if name in objective.arrays else ["batch"]
        return layout.constrain(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), None, *dims)

    return {name: cut(name, x) for name, x in batch.items()}


class NextToken(Objective):
    """Cross-entropy of the next token, with z-loss and the routers' losses. The one place that calls the model."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self._config, self._layout = config, layout
        self._how = Execution.of(config, layout)
        self.declared = declared(config.model)
        shape, dims = (config.train.batch_size, config.train.seq_len), ("batch", "seq")
        beside = arrays_beside(predictions(config.task, config.data.datasets))
        self.arrays = {
            name: BatchArray(shape, jnp.int32, dims)
            for name in ("inputs", "targets", "segment_ids", "positions", *beside)
        } | {"loss_mask": BatchArray(shape, jnp.float32, dims)}

    def init(self, key: jax.Array) -> Params:
        return init_parameters(self._config.model, key)

    def counted(self, params: Params, frozen: Any, batch: Batch) -> jax.Array:
        """The share of the tokens that the loss counts."""
        return jnp.mean(batch["loss_mask"])

    def draw(self, batch: Batch, key: jax.Array) -> Batch:
        """Seeds, uint32 [B], where the model draws numbers in training."""
        if not self._config.model.draws:
            return batch
        seeds = jax.random.bits(key, batch["inputs"].shape[:1], jnp.uint32)
        return {**batch, "seeds": self._layout.constrain(seeds, "batch")}

    def loss(self, params: Params, frozen: Any, batch: Batch, counted: Any) -> Sums:
        """Of a batch as `arrays` says, with rows left out or seeds added."""
        train, mtp = self._config.train, self._config.model.mtp
        later = {} if mtp is None else {k: ahead(batch, k)._asdict() for k in range(1, mtp.depth + 1)}
        batch = self._how.arrange(batch | {f"{name}_{k}": x for k, one in later.items() for name, x in one.items()})
        model, output = self._read(self._config.model, params, batch)
        with jax.named_scope("loss"):
            sums = self._cross_entropy(model, output.hidden, batch)
            objective = sums.objective
            means = {"loss": sums.cross_entropy, "z_loss": train.z_loss * sums.log_z_squared}
            if sums.top_squared is not None:
                means["max_z_loss"] = train.max_z_loss * sums.top_squared
        if mtp is not None:
            output, further = self._further(model, output, batch, mtp.depth)
            objective += mtp.weight / mtp.depth * sum(one.objective for one in further)
            means["mtp_loss"] = sum((one.cross_entropy for one in further), jnp.float32(0)) / mtp.depth
        return self._sums(objective, jnp.sum(batch["loss_mask"]), means, output, counted)

    def _further(
        self, model: Decoder, output: DecoderOutput, batch: Batch, depth: int
    ) -> tuple[DecoderOutput, list[LossSums]]:
        """The loss of each module of `model.mtp`; and `output` with their routers behind those of the pattern."""
        following = [(batch[f"inputs_{k}"], batch[f"same_{k}"]) for k in range(1, depth + 1)]
        found = model.further(output.hidden, following, self._known(batch), self._how)
        with jax.named_scope("loss"):
            told = lambda k: batch | {"targets": batch[f"targets_{k}"], "loss_mask": batch[f"mask_{k}"]}
            losses = [self._cross_entropy(model, hidden, told(k)) for k, (hidden, _) in enumerate(found, start=1)]
        routers = [stats for _, stats in found if stats is not None]
        stacked = jax.tree.map(lambda *of_modules: jnp.stack(of_modules), *routers) if routers else None
        return output._replace(router=(*output.router, stacked)), losses

    def _read(self, model: ModelConfig, params: Params, batch: Batch) -> tuple[Decoder, DecoderOutput]:
        """The model's states of a batch in the mesh's order."""
        decoder = bind(model, in_products(self._how.config.products, model, params))
        tokens = self._known(batch)
        return decoder, decoder(self._begun(decoder, batch, tokens), tokens, self._how)

    def _known(self, batch: Batch) -> Tokens:
        """What the model knows of the tokens of a batch."""
        places = jnp.stack([batch[name] for name in PLACES], axis=-1) if PLACES[0] in batch else None
        return Tokens(batch["positions"], batch["segment_ids"], batch.get(ENDS), places, batch.get("seeds"))

    def look(self, params: Params, batch: Batch, of: Callable[[jax.Array], Any]) -> dict[str, Any]:
        like, model = batch["inputs"].shape, self._config.model
        batch = self._how.arrange({name: x for name, x in batch.items() if x.ndim == 1 or x.shape == like})
        decoder = bind(model, in_products(self._how.config.products, model, of_model(params)))
        tokens = self._known(batch)
        return decoder.look(self._begun(decoder, batch, tokens), tokens, self._how, of)

    def _begun(self, decoder: Decoder, batch: Batch, tokens: Tokens) -> jax.Array:
        """`_embeddings`, through which `train.embedding_gradient` of the gradient goes: alpha x + (1 - alpha)
        stop_gradient(x) (GLM-130B, arXiv:2210.02414, section 3), written so that x keeps its bits."""
        x, alpha = self._embeddings(decoder, batch, tokens), self._config.train.embedding_gradient
        if alpha == 1:
            return x
        still = jax.lax.stop_gradient(x)
        return still + jnp.asarray(alpha, x.dtype) * (x - still)

    def _read_other(self, model: ModelConfig, params: Params, batch: Batch) -> tuple[Decoder, DecoderOutput]:
        """The same by a model without this one's virtual tokens: a text does not see those of the batch, and begins at
        position 0."""
        if virtual := self._config.model.virtual_tokens:
            of_text = batch["positions"] >= virtual
            batch = batch | {
                "positions": jnp.maximum(batch["positions"] - virtual, 0),
                "segment_ids": 2 * batch["segment_ids"] + of_text,
            }
        return self._read(model, params, batch)

    def _sums(
        self,
        objective: jax.Array,
        weight: jax.Array,
        means: dict[str, jax.Array],
        output: DecoderOutput,
        share: jax.Array,
    ) -> Sums:
        """With the routers' losses. Those are about all tokens, also those that nothing counts; all together weigh what
        the whole batch does: `share` is its weight for each of its tokens."""
        if routers := [stats for stats in output.router if stats is not None]:
            means["auxiliary_loss"] = sum((stats.auxiliary.sum() for stats in routers), jnp.float32(0)) * share
            objective += means["auxiliary_loss"]
        return Sums(objective, weight, means, output.router)

    def _embeddings(self, model: Decoder, batch: Batch, tokens: Tokens) -> jax.Array:
        """What the layers begin with."""
        return model.embeddings(batch["inputs"], tokens, self._how)

    def _cross_entropy(self, model: Decoder, hidden: jax.Array, batch: Batch) -> LossSums:
        """Of the targets, each with the weight that the mask gives it."""
        loss = (model.unembedding, batch["targets"], batch["loss_mask"])
        return cross_entropy_sums(self._layout, hidden, *loss, **loss_options(self._config.train))

    def settle(self, params: Params, router: Any) -> tuple[Params, dict[str, jax.Array]]:
        """Biases of SigmoidRouters that follow the load; how evenly each layer's experts were used."""
        model = self._config.model
        of_pattern, of_modules = router[: len(model.blocks)], router[len(model.blocks) :]
        return balance_biases(model, params, router), router_metrics(of_pattern, of_modules)


class LossOptions(TypedDict):
    """Of `cross_entropy_sums`."""

    z_loss: float
    max_z_loss: float
    chunk: int


def loss_options(train: TrainConfig) -> LossOptions:
    """As a run's config says."""
    return {"z_loss": train.z_loss, "max_z_loss": train.max_z_loss, "chunk": train.loss_chunk}


def make_evaluate(objective: Objective, layout: Layout) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """Parameters and batch -> sum of the loss (`means["loss"]`), and the weight to divide it by; compiled when called.

    For objectives that read nothing frozen.
    """

    def evaluate(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        sums = objective.loss(params, None, batch, objective.counted(params, None, batch))
        return sums.means.get("loss", sums.objective), sums.weight

    return jax.jit(evaluate, out_shardings=layout.sharding())
