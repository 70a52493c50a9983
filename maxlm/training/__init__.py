"""Losses, optimizers and the train step.

step.py: loss, gradient, optimizer: one step
router_metrics.py: load and drops of each mixture
warm_start.py: parameters of another run
losses.py: cross-entropy without the logits of a whole batch
optimizers.py: optax transformations from configs
schedules.py: learning rates
state.py: the train state and where its arrays live
"""

from maxlm.training.step import Batch, StepMetrics, Trainer, make_trainer

__all__ = ["Batch", "StepMetrics", "Trainer", "make_trainer"]
