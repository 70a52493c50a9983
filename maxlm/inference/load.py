"""A trained run as something to ask: its config, tokenizer and parameters, on the devices chosen."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, overload

import jax

from maxlm.checkpoint.checkpointer import Checkpointer, Restored
from maxlm.checkpoint.reference import PUBLISHED, run_and_step
from maxlm.checkpoint.store import Record
from maxlm.config import (
    ACTIVATION_DIMS,
    MESH_AXES,
    BeamConfig,
    ExecutionConfig,
    KernelConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    ShardingConfig,
    UserError,
    serialize,
)
from maxlm.config.json_file import no_folder
from maxlm.config.layout_rules import broken_layout_rules
from maxlm.data.chat import ChatTemplate, find_chat_template
from maxlm.data.shards import CHAT
from maxlm.data.text_ends import TextEnds, published_ends
from maxlm.data.tokenizers import Tokenizer, load_tokenizer
from maxlm.inference.bases import Base, OpenBase, RunBase, deferred_base, open_again, read_base, stored_shapes
from maxlm.inference.generator import Generation, Generator
from maxlm.inference.language_model import LanguageModel
from maxlm.inference.mixed_adapters import LoadedAdapter
from maxlm.models import abstract_parameters, declared
from maxlm.models.adapters import learned
from maxlm.models.base import laid, own
from maxlm.models.mtp import without_mtp
from maxlm.shapes import PREFIX
from maxlm.sharding import Layout, all_devices, make_layout

ONE_DEVICE = ShardingConfig(data=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A model with what belongs to it. `load_run` reads one; training makes one of the state that it has."""

    config: RunConfig
    """As in the run folder, except that `sharding` is the one in use. `load_run` also takes `model` and `execution`
    from the checkpoint, as a run may have gone on with others, and sets `execution.kernels` to the default."""
    layout: Layout
    parameters: Any
    """Nested dicts of float32 arrays, like those of `maxlm.models.init_parameters`; of a run that `maxlm.quantize` has
    written, with `Weight`s of other kinds among them."""
    tokenizer: Tokenizer
    step: int
    """Optimizer steps that the parameters have seen."""
    ends: TextEnds | None = None
    """Where texts begin and end; None: where documents do."""
    chat: ChatTemplate | None = None
    """How the model is asked in a conversation; None: it is not."""

    @functools.cached_property
    def model(self) -> LanguageModel:
        """Logits of tokens, or what its head makes of them. Made once, with the programs that it has compiled."""
        return LanguageModel(self.config.model, self.config.execution, self.layout, self.parameters)

    @functools.cached_property
    def generator(self) -> Generator:
        """What `generate` calls. Made once; holds weights of its own, in `execution.dtype`.

        Raises:
            UserError: see `Generator`.
        """
        return Generator(self)

    @overload
    def generate(
        self,
        prompts: str,
        *,
        max_new_tokens: int,
        sampling: SamplingConfig = ...,
        seed: int = ...,
        beams: BeamConfig = ...,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: list[str] | tuple[str, ...],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig = ...,
        seed: int = ...,
        beams: BeamConfig = ...,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: str | list[str] | tuple[str, ...],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig = SamplingConfig(),
        seed: int = 0,
        beams: BeamConfig = BeamConfig(),
    ) -> Generation | list[Generation]:
        """Continue one prompt, or several as one batch; see `Generator.generate`. The same seed gives the same texts.

        Returns:
            A Generation for a string, a list of them for several; its `text` is the continuation alone.

        Raises:
            UserError: as `Generator` and `Generator.generate`.
        """
        many = [prompts] if isinstance(prompts, str) else prompts
        found = self.generator.generate(many, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, beams=beams)
        return found[0] if isinstance(prompts, str) else found


def load_run(
    run_dir: str | Path,
    *,
    step: int | None = None,
    sharding: ShardingConfig = ONE_DEVICE,
    open_base: OpenBase = RunBase,
) -> LoadedRun:
    """Read a run folder and put the parameters on this process's devices. `maxlm.load_run` finds any base.

    Args:
        run_dir: what training wrote: config.json, tokenizer/, checkpoints/.
        step: the checkpoint; None: the newest that is intact.
        sharding: how to lay the model out. It uses as many devices as its sizes multiply to, the first ones, or all
            where a size is -1. The run's own layout does not matter: by default one device is enough for any run.
        open_base: finds the model that the run's adapter is laid on, if it has one; by default runs alone.

    Raises:
        UserError: not a run folder; no finished checkpoint, or not the one asked for; the tokenizer is not the one that
            the model was trained with; the layout does not fit the model or the devices; or the base of its adapter is
            not there, or another.
    """
    return _load_run(Path(run_dir), step, sharding, open_base, deferred=False)


def deferred_run(run_dir: Path, *, step: int | None = None, open_base: OpenBase = RunBase) -> LoadedRun:
    """As `load_run`, with parameters that are `maxlm.checkpoint.store.Deferred`: none is in memory yet."""
    return _load_run(run_dir, step, ONE_DEVICE, open_base, deferred=True)


def _load_run(
    run_dir: Path, step: int | None, sharding: ShardingConfig, open_base: OpenBase, *, deferred: bool
) -> LoadedRun:
    if not (run_dir / "config.json").is_file():
        why = no_folder(run_dir) or "it has no config.json"
        folder, at = run_and_step(str(run_dir))
        remedy = "name the run_dir of a training run" if at is None else f"name {folder} and --step {at}"
        raise UserError(f"{run_dir}: not a run folder ({why}); {remedy}")
    saved = serialize.load(RunConfig, run_dir / "config.json")
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    devices = _devices(sharding)
    rows = _rows(sharding, len(devices))
    train = dataclasses.replace(saved.train, batch_size=rows, micro_batches=1, profile_steps=None)
    if failures := dataclasses.replace(saved, sharding=sharding, train=train).broken_layout_rules(len(devices)):
        raise UserError("\n".join(failures))
    # The kernels that the run was trained with need not exist on this device.
    execution = dataclasses.replace(saved.execution, kernels=KernelConfig())
    config = dataclasses.replace(saved, sharding=sharding, execution=execution)
    layout = make_layout(sharding, devices)
    with Checkpointer(run_dir / "checkpoints", config.checkpoint) as checkpointer:
        wanted = functools.partial(_wanted, config.model, layout)
        restored = checkpointer.restore_params(step, wanted, deferred=deferred)
    config = config.at(restored.step - 1)
    if trained := restored.meta.get("config"):  # of this very step
        then = serialize.from_dict(RunConfig, trained).at(restored.step - 1)
        execution = dataclasses.replace(then.execution, kernels=KernelConfig())
        config = dataclasses.replace(config, model=then.model, execution=execution)
    trained_with = restored.meta.get("tokenizer")
    if trained_with != tokenizer.fingerprint:
        raise UserError(
            f"{run_dir / 'tokenizer'}: fingerprint {tokenizer.fingerprint[:12]}..., but checkpoint {restored.step} was "
            f"trained with {str(trained_with)[:12]}...; restore the tokenizer that the run was started with"
        )
    told, ends = told_in(run_dir), None
    if told is not None:
        ends = published_ends(told, tokenizer)
        if restored.step:  # what it was trained on here ends as documents do
            ends = ends._replace(last=tuple(dict.fromkeys([*ends.last, tokenizer.eos_id])))
    model, parameters = without_mtp(config.model, restored.params)
    config = dataclasses.replace(config, model=model)
    if config.model.adapter is not None:
        parameters = _with_base(run_dir, config.model, layout, restored, open_base, deferred=deferred)
        if not deferred:
            model, parameters = learned(config.model, parameters)
            config = dataclasses.replace(config, model=model)
    return LoadedRun(
        config=config,
        layout=layout,
        parameters=parameters,
        tokenizer=tokenizer,
        step=restored.step,
        ends=ends,
        chat=None if told is None else find_chat_template(told),
    )


def told_in(run_dir: Path) -> Path | None:
    """The folder of a run that says how its model is asked in a conversation: as it was taught, or as it was published;
    None: it is not."""
    return next((run_dir / name for name in (CHAT, PUBLISHED) if (run_dir / name).is_dir()), None)


def load_adapter(run_dir: Path, base: Base) -> LoadedAdapter:
    """What a run with an adapter has trained, to be used on its base where that is in memory.

    Args:
        run_dir: the run folder; its newest intact step is read.
        base: of the model in memory.

    Raises:
        UserError: it is no run with an adapter, or one on another base.
    """
    if not (run_dir / "config.json").is_file():
        raise UserError(f"{run_dir}: not a run folder (it has no config.json); name that of a run with an adapter")
    config, layout = serialize.load(RunConfig, run_dir / "config.json"), make_layout(ONE_DEVICE, all_devices()[:1])
    if config.model.adapter is None:
        raise UserError(f"{run_dir}: the run has no adapter; name one with model.adapter")
    with Checkpointer(run_dir / "checkpoints", config.checkpoint) as checkpointer:
        restored = checkpointer.restore_params(None, functools.partial(_wanted, config.model, layout))
    saved = restored.meta.get("base", {})
    if saved.get("fingerprint") != (found := base.fingerprint()):
        raise UserError(
            f"{run_dir}: its adapter is of the base {saved.get('place')} ({str(saved.get('fingerprint'))[:12]}...), "
            f"the model is {base.place} ({found[:12]}...); serve it on its own base"
        )
    return LoadedAdapter(config.model, restored.params.get(PREFIX, {}))


def _wanted(model: ModelConfig, layout: Layout, record: Record) -> Any:
    """What a step holds: of a model with an adapter what was trained, else everything."""
    if model.adapter is None or record.meta.get("base") is None:
        return stored_shapes(model, layout, record)
    return own(model, abstract_parameters(model, layout))


def _with_base(
    run_dir: Path, model: ModelConfig, layout: Layout, restored: Restored, open_base: OpenBase, *, deferred: bool
) -> Any:
    """The parameters of a run with an adapter.

    Raises:
        UserError: its base is not there, or another.
    """
    if (saved := restored.meta.get("base")) is None:  # it has all arrays
        return restored.params
    try:
        base = open_again(saved, open_base)
        if not deferred:
            return laid(model, read_base(base, model, layout), restored.params)
        found = deferred_base(base, model)
    except UserError as error:
        raise UserError(f"{run_dir}: {error}") from error
    return laid(model, jax.tree.map(lambda array: found.get(array.name), declared(model)), restored.params)


def layout_for(model: ModelConfig, sharding: ShardingConfig) -> Layout:
    """Of a model that is not trained, on the first devices, as many as `sharding` multiplies to.

    Raises:
        UserError: they do not fit each other.
    """
    devices = _devices(sharding)
    failures = broken_layout_rules(
        model,
        sharding,
        ExecutionConfig(),
        n_devices=len(devices),
        batch_size=_rows(sharding, len(devices)),
        seq_len=model.max_seq_len,
        micro_batches=1,
    )
    if failures:
        raise UserError("\n".join(failures))
    return make_layout(sharding, devices)


def _rows(sharding: ShardingConfig, n_devices: int) -> int:
    """The smallest batch that the mesh can cut."""
    sizes = sharding.sizes(n_devices)
    return math.prod(sizes[axis] for axis in ACTIVATION_DIMS["batch"])


def _devices(sharding: ShardingConfig) -> list[jax.Device]:
    sizes = [getattr(sharding, axis) for axis in MESH_AXES]
    devices = all_devices()
    wanted = len(devices) if -1 in sizes else math.prod(sizes)
    if wanted > len(devices):
        raise UserError(f"sharding: {wanted} devices asked for, there are {len(devices)}; use smaller sizes")
    return devices[:wanted]
