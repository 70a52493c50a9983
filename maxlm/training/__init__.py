"""Losses, optimizers and the train step."""

from maxlm.training.step import Batch, StepMetrics, Trainer, make_trainer

__all__ = ["Batch", "StepMetrics", "Trainer", "make_trainer"]
