"""What a run learns: one class a task. `maxlm/recipes/` has one function for each."""

from __future__ import annotations

from maxlm.config.fields import Changes, Positive, config


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


Task = Pretrain | TrainMedusa
"""The union of the tasks."""
