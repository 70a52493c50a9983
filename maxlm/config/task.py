"""What a run learns: one class a task. `maxlm/recipes/` has one function for each."""

from __future__ import annotations

from maxlm.config.fields import Changes, config


@config("task.", changes=Changes.IDENTITY)
class Pretrain:
    """Predict the next token of running text."""


Task = Pretrain
"""The union of the tasks."""
