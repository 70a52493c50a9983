"""Learning from rewards: what the policy writes, and what is made of it."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from maxlm.config.engine import EngineConfig
from maxlm.config.errors import UserError
from maxlm.config.fields import (
    BelowOne,
    Changes,
    Filled,
    Fraction,
    NotNegative,
    PathName,
    Positive,
    Range,
    config,
    shown,
)
from maxlm.config.kl import FixedKl, KlController, KlEstimator
from maxlm.config.policy import Advantage, Aggregation, GroupMean
from maxlm.config.rewards import BadReward, RewardSource
from maxlm.config.tools import RolloutTool


@config("task.rollouts.", changes=Changes.IDENTITY)
class Rollouts:
    """What the policy writes before it learns: `prompts * samples` completions, which are then gone through in batches
    of `train.batch_size`."""

    prompts: Positive[int] = 32
    """Prompts of a rollout."""
    samples: Positive[int] = 8
    """Completions of each."""
    max_new_tokens: Positive[int] = 256
    """Tokens of a completion that the policy draws, at most."""
    tools: tuple[RolloutTool, ...] = ()
    """What the policy may call while it writes; the template tells it of them, in place of the tools of records. What
    they answer is read and not learned, and needs room in `train.seq_len`."""
    tool_turns: Positive[int] = 4
    """Times that a completion goes on after calls, at most."""
    epochs: Positive[int] = 1
    """Times that the completions of a rollout are gone through."""
    temperature: Positive[float] = 1.0
    """Divides the logits, here and in the loss: the policy is what is drawn from."""
    top_k: NotNegative[int] = 0
    """Draw from this many likeliest tokens; 0: from all. The loss knows nothing of it: see `importance_cap`."""
    top_p: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Draw from the fewest likeliest tokens with this much probability; 1: from all. As of `top_k`."""
    importance_cap: Positive[float] | None = None
    """Weigh each token by min(p_trainer / p_sampler, cap), as the two differ in their last bits, or more where tokens
    are left out or the engine's numbers are coarser (truncated importance sampling); None: count all alike, and only
    tell how far apart they are."""
    learn_cut: bool = True
    """Learn from completions that were cut at `max_new_tokens`, too (DAPO's overlong filtering leaves them out)."""
    slots: Annotated[Positive[int], Changes.NOTHING] = 32
    """Texts that the engine writes at once, as of `engine.slots`. It changes no token."""
    eval_prompts: Annotated[NotNegative[int], Changes.NOTHING] = 64
    """Held-out prompts whose completions are judged every `train.eval_every` steps, once drawn and once the likeliest;
    0: none."""

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"task.rollouts.tools has {shown(twice[0])} twice; give one of them another name")

    @property
    def completions(self) -> int:
        """Of a rollout."""
        return self.prompts * self.samples

    def steps(self, batch_size: int) -> int:
        """Optimizer steps that a rollout is for."""
        return self.completions * self.epochs // batch_size

    def engine(self, length: int) -> EngineConfig:
        """That writes, with room for a text of so many tokens in every slot."""
        return EngineConfig(slots=self.slots, cache_tokens=self.slots * length)


@config("task.", changes=Changes.IDENTITY)
class Reinforced:
    """What all tasks with rewards have."""

    rewards: Annotated[tuple[RewardSource, ...], Filled(note="name at least one reward")]
    """What a completion is worth: the weighted sum of these."""
    rollouts: Rollouts = field(default_factory=Rollouts)
    """What the policy writes."""
    on_bad_reward: BadReward = BadReward.STOP
    """What to do about a reward that is no number, or that cannot be had."""
    reference: PathName | None = None
    """Run, RUN_DIR/checkpoints/STEP, hf:DIR or gguf:FILE of the model that the policy is held to, if it is; None: what
    `checkpoint.init_from` names."""
    entropy_weight: NotNegative[float] = 0.0
    """Of the entropy of the policy at each token, which keeps it from settling early."""


@config("task.", changes=Changes.IDENTITY)
class Grpo(Reinforced):
    """Policy gradient without a critic: what completions of the same prompts are worth tells how good each is. With
    `GroupMean` GRPO (arXiv:2402.03300) and its relatives, with `LeaveOneOut` RLOO, with `BatchMean` REINFORCE."""

    advantage: Advantage = field(default_factory=GroupMean)
    """What a completion's reward is compared with."""
    clip_low: BelowOne = 0.2
    """The ratio of new and old probabilities counts down to 1 minus this."""
    clip_high: Positive[float] = 0.2
    """And up to 1 plus this (DAPO: 0.28)."""
    aggregation: Aggregation = Aggregation.TOKEN_MEAN
    """How the tokens' losses become one."""
    kl_weight: NotNegative[float] = 0.0
    """Of the distance to the reference, in the loss; 0: there is no reference."""
    kl_estimator: KlEstimator = KlEstimator.K2
    """How that is estimated at each token."""
    redraws: NotNegative[int] = 0
    """Prompts whose completions are all worth the same teach nothing; they are replaced by others, so many times (DAPO,
    dynamic sampling)."""


@config("task.", changes=Changes.IDENTITY)
class Ppo(Reinforced):
    """Proximal policy optimisation with a critic, as InstructGPT has it (arXiv:2203.02155, section 3.5; PPO,
    arXiv:1707.06347): the reward of a token is how much it strays from the reference, and at the end what the text is
    worth."""

    critic: PathName | None = None
    """Run, RUN_DIR/checkpoints/STEP, of a reward model that the critic begins as; it may be of another size. None: what
    `checkpoint.init_from` names, with a head that says 0."""
    kl: KlController = field(default_factory=FixedKl)
    """How dear it is to leave the reference, per nat."""
    kl_estimator: KlEstimator = KlEstimator.K1
    """How that is estimated at each token."""
    gamma: Fraction = 1.0
    """Discount of later rewards."""
    gae_lambda: Fraction = 0.95
    """How far an advantage looks ahead: 0 to the next value, 1 to the end (arXiv:1506.02438)."""
    whiten: bool = True
    """Advantages of a rollout have mean 0 and variance 1, over all its tokens."""
    clip: Positive[float] = 0.2
    """The ratio of new and old probabilities counts within 1 plus and minus this."""
    value_clip: Positive[float] = 0.2
    """A value counts within this of what it was when the text was written."""
    value_weight: Positive[float] = 0.1
    """Of the critic's loss."""
    largest_kl: Positive[float] | None = None
    """A batch is discarded whose mean of log p_old - log p_new is above this: 1.5 times a target, for example; None:
    none is."""
    text_weight: NotNegative[float] = 0.0
    """Of the loss of running text among the data sets, beside (PPO-ptx, InstructGPT's equation 2: 27.8); 0: there is
    none."""
