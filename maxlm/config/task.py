"""What a run learns: one class a task. `maxlm/recipes/` has one function for each."""

from __future__ import annotations

from typing import Annotated

from maxlm.config.fields import Changes, NotNegative, Positive, Range, config


@config("task.", changes=Changes.IDENTITY)
class Pretrain:
    """Predict the next token of running text."""


@config("task.", changes=Changes.IDENTITY)
class TrainMedusa:
    """Train the heads of `model.medusa` on running text, with everything else as the run that `checkpoint.init_from`
    names has it ("Medusa-1", arXiv:2401.10774, section 2.2.1): the sum over heads k of weight^k times the cross-entropy
    of the token k places after the next."""

    weight: Positive[float] = 0.8
    """Of each head beside the one before it."""


@config("task.gold.", changes=Changes.IDENTITY)
class Gold:
    """Each token weighs max(p^alpha, beta), where p is what the model gives it: what it finds absurd hardly counts
    (GOLD, arXiv:2009.07839, as AlphaCode has it, arXiv:2203.07814, appendix C.3). Nothing is learned through the
    weights."""

    alpha: Positive[float] = 0.5
    """Power of the probability."""
    beta: Annotated[float, Range(gt=0, le=1)] = 0.05
    """The least weight."""


@config("task.", changes=Changes.IDENTITY)
class Sft:
    """Supervised fine-tuning: predict what the assistant wrote, in data that is prepared from `Conversations`. Running
    text among the data sets is learned whole, in proportion to its weight."""

    neftune_alpha: NotNegative[float] = 0.0
    """Noise on the embeddings of a text of L tokens: uniform within alpha / sqrt(L d_model) (NEFTune,
    arXiv:2310.05914, algorithm 1: 5 to 15); 0: none."""
    gold: Gold | None = None
    """Weights of tokens by how likely they are; None: each weighs the same."""


Task = Pretrain | Sft | TrainMedusa
"""The union of the tasks."""
