"""What answers are worth by a classifier: how likely they are in none of the classes that do harm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maxlm.config import ClassHead, ShardingConfig, UserError
from maxlm.evaluation.marking import log_softmax
from maxlm.recipes.completions import Completion
from maxlm.recipes.model_reward import conversation_ids, open_model, outputs_of
from maxlm.recipes.rewards import Judged


class ClassJudge:
    """A run of `task = Classify`, in memory."""

    def __init__(
        self, place: str, harmful: Sequence[int], sharding: ShardingConfig, *, conversations: bool = False
    ) -> None:
        """Reads it.

        Args:
            place: the run.
            harmful: numbers of the classes.
            sharding: how to lay it out.
            conversations: whether it was taught with conversations, and reads the prompt with the answer; else with
                texts, and reads the answer alone.

        Raises:
            UserError: there is none, or it has not these classes or, for conversations, no chat template.
        """
        self._run, self._conversations, self._harmful = open_model(place, sharding).run, conversations, [*harmful]
        head = self._run.config.model.head
        if not isinstance(head, ClassHead):
            raise UserError(f"{place}: its {type(head).__name__} tells no classes; name a run of task = Classify")
        if wrong := [one for one in harmful if one >= head.n_classes]:
            raise UserError(f"{place}: has classes from 0 to {head.n_classes - 1}, and no {wrong[0]}")
        if not harmful:
            raise UserError(f"{place}: none of its classes is harmful; name at least one")
        if conversations and self._run.chat is None:
            raise UserError(f"{place}: has no chat template, by which it could read conversations")

    def __call__(self, completions: Sequence[Completion]) -> Judged:
        """`usable` is False of texts that do not fit."""
        outputs = outputs_of(self._run, [self._ids(one) for one in completions])
        harm = [np.nan if isinstance(out, str) else np.exp(log_softmax(out))[self._harmful].sum() for out in outputs]
        total = 1 - np.asarray(harm, np.float64)
        return Judged(total, {"classes": total}, ~np.isnan(total))

    def _ids(self, completion: Completion) -> Sequence[int] | str:
        if self._conversations:
            return conversation_ids(self._run, completion)
        tokenizer = self._run.tokenizer
        return tokenizer.document_ids(tokenizer.encode(completion.text))
