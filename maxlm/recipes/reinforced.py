"""What tasks with rewards share: prompts, the policy that answers them, what judges its answers, what it is held to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from maxlm.config import Reinforced, RunConfig, UserError
from maxlm.config.model import padded_vocabulary
from maxlm.config.task_rules import under_adapter
from maxlm.data.prepare import ensure_prepared
from maxlm.data.prompts import Prompts, open_prompts
from maxlm.data.shards import Split
from maxlm.inference.load import LoadedRun
from maxlm.processes.joining import on_rank_0
from maxlm.recipes.held_to import ReferenceModel
from maxlm.recipes.pretrain import Sample, check_sample
from maxlm.recipes.rewards import RewardFunction, RewardSum
from maxlm.recipes.rollouts import Learn, PromptScores, RolloutFeed, RolloutFigures, RowArrays, check_lengths
from maxlm.recipes.starting import starting
from maxlm.recipes.taught import Taught, taught
from maxlm.recipes.tools import Toolbox, definitions
from maxlm.recipes.writing import PolicyWriter
from maxlm.sharding import Layout
from maxlm.training.loop import Measure, Recipe
from maxlm.training.policy_objective import PolicyGradient
from maxlm.training.state import TrainState, of_model
from maxlm.training.warm_start import Start


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardedRun:
    """Of a run that is made."""

    config: RunConfig
    task: Reinforced
    layout: Layout
    prompts: Prompts
    held_out: Prompts | None
    taught: Taught
    rewards: RewardSum
    reference: ReferenceModel | None
    under: bool
    tools: Toolbox | None

    @property
    def held_to(self) -> dict[str, Any]:
        """Arguments of a `PolicyGradient`."""
        drawn = {"tokens": self.taught.tokenizer.vocab_size}
        if self.reference is not None:
            return drawn | {"reference": self.reference.model}
        return drawn | {"under": self.under}

    @property
    def start(self) -> Start | None:
        """As of `Recipe`."""
        return starting(self.config, self.layout, self.taught.fingerprint, self.taught)

    def recipe(
        self,
        objective: PolicyGradient,
        learn: Learn,
        *,
        start: Start | None,
        redraws: int = 0,
        beside: Callable[[int], RowArrays] | None = None,
    ) -> Recipe[LoadedRun]:
        """Of an objective, and of what makes its batches; the rest as of `RolloutFeed`."""
        config, task, told = self.config, self.task, self.taught

        def loaded(step: int, state: TrainState) -> LoadedRun:
            return self._loaded(of_model(state.parameters), step)

        writer = PolicyWriter(self._loaded, task.rollouts, config.train.seq_len + 1, self.tools)
        feed = RolloutFeed(
            config, task, self.layout, objective, writer, self.prompts, self.rewards, learn,
            redraws=redraws, beside=beside,
        )  # fmt: skip
        measures: list[Measure] = [RolloutFigures(feed)]
        if self.held_out is not None and task.rollouts.eval_prompts:
            measures.append(PromptScores(config, task, writer, self.held_out, self.rewards))
        if config.observe.sample_tokens:
            check_sample(config, told.tokenizer, told.chat)
            measures.append(Sample(observe=config.observe, loaded=loaded))
        return Recipe(
            objective=objective,
            feed=feed,
            measures=tuple(measures),
            stride=feed.stride,
            start=start,
            frozen=None if self.reference is None else self.reference.read,
            tokenizer=told,
            outcome=loaded,
        )

    def _loaded(self, parameters: Any, step: int = 0) -> LoadedRun:
        return LoadedRun(
            config=self.config,
            layout=self.layout,
            parameters=parameters,
            tokenizer=self.taught.tokenizer,
            step=step,
            ends=self.taught.ends,
            chat=self.taught.chat,
        )


def rewarded(
    config: RunConfig, task: Reinforced, layout: Layout, functions: Mapping[str, RewardFunction], *, held: bool
) -> RewardedRun:
    """Prepares the data first, if the config says how and nobody has.

    Args:
        config, task, layout: of the run.
        functions: that rewards may name.
        held: whether the policy is held to a reference.

    Raises:
        UserError: the prompts, a reward or the reference is not there, is damaged, or does not fit the model.
    """
    on_rank_0("prepare the data", lambda: ensure_prepared(config.data))
    known = definitions(task.rollouts.tools)
    prompts, held_out = (open_prompts(config.data, split, known) for split in (Split.TRAIN, Split.VALIDATION))
    if prompts is None:
        raise UserError(f"{config.data.datasets[0].path}: holds no prompt to train on; add some")
    tokenizer, model = prompts.tokenizer, config.model
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"model.vocab_size = {model.vocab_size} is smaller than the {tokenizer.vocab_size} ids of the prompts' "
            f"tokenizer ({config.data.datasets[0].path}); use at least {tokenizer.vocab_size}, best "
            f"{padded_vocabulary(tokenizer.vocab_size)}: a multiple of 128, whose last rows no id uses"
        )
    told, tools = taught(config.data, tokenizer), None
    if task.rollouts.tools:
        assert told.chat is not None, "`taught` finds one"
        tools = Toolbox(task.rollouts.tools, told.chat, tokenizer)
    most = min(config.train.seq_len + 1, model.max_seq_len) - task.rollouts.max_new_tokens - model.virtual_tokens
    key = f"train.seq_len = {config.train.seq_len} and task.rollouts.max_new_tokens = {task.rollouts.max_new_tokens}"
    for split in (prompts, held_out):
        if split is not None:
            check_lengths(split, most, key)
    place = task.reference or config.checkpoint.init_from
    under, reference = held and under_adapter(task, model), None
    if held and not under:
        assert place is not None, "RunConfig.validate asks for one"
        try:
            reference = ReferenceModel(place, tokenizer.fingerprint)
        except UserError as error:
            raise UserError(f"the reference {place}: {error}") from error
    rewards = RewardSum(
        task.rewards,
        task.on_bad_reward,
        tokenizer=tokenizer.fingerprint,
        sharding=config.sharding,
        functions=functions,
    )
    return RewardedRun(
        config=config,
        task=task,
        layout=layout,
        prompts=prompts,
        held_out=held_out,
        taught=told,
        rewards=rewards,
        reference=reference,
        under=under,
        tools=tools,
    )
