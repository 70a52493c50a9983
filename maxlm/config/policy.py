"""What a policy gradient is made of: what a reward is held against, and how tokens and texts are weighed."""

from __future__ import annotations

import enum

from maxlm.config.fields import Changes, Positive, config


@config("task.advantage.", changes=Changes.IDENTITY)
class GroupMean:
    """Each reward against the mean of all samples of its prompt (GRPO, arXiv:2402.03300, section 4.1.2)."""

    divide_by_std: bool = True
    """Divide by the standard deviation of the same samples. Without it prompts that are nearly always or nearly never
    solved weigh less (Dr. GRPO, arXiv:2503.20783)."""
    eps: Positive[float] = 1e-6
    """Added to the standard deviation."""


@config("task.advantage.", changes=Changes.IDENTITY)
class LeaveOneOut:
    """Each reward against the mean of the other samples of its prompt (RLOO, arXiv:2402.14740)."""


@config("task.advantage.", changes=Changes.IDENTITY)
class BatchMean:
    """Each reward against the mean of the whole rollout (REINFORCE with a baseline, Williams 1992)."""


Advantage = GroupMean | LeaveOneOut | BatchMean


class Aggregation(enum.Enum):
    """What a token weighs beside those of other texts."""

    TOKEN_MEAN = "token_mean"
    """Each the same: long texts weigh more (DAPO, arXiv:2503.14476, section 3.3)."""
    SEQUENCE_MEAN = "sequence_mean"
    """Each text the same: a token of a long one weighs less (GRPO, arXiv:2402.03300, equation 3)."""
    CONSTANT = "constant"
    """Each the same, and texts of a batch are not weighed by how long the others are: 1 / max_new_tokens (Dr. GRPO,
    arXiv:2503.20783)."""
