"""Losses, objectives, optimizers, the train step, and the loop that runs a recipe."""

from maxlm.training.objective import Batch, NextToken, Objective, Sums
from maxlm.training.step import StepOutput, Trainer, make_trainer

__all__ = ["Batch", "NextToken", "Objective", "StepOutput", "Sums", "Trainer", "make_trainer"]
