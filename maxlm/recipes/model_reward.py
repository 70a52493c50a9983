"""Rewards of a reward model, which is held in memory and asked in its own form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from maxlm.checkpoint.reference import run_and_step
from maxlm.checkpoint.state_hash import state_hash
from maxlm.config import ModelReward, ScalarHead, ShardingConfig, UserError
from maxlm.data.chat import ChatError
from maxlm.data.conversations import NOW
from maxlm.evaluation.ratings import RewardScale
from maxlm.evaluation.scoring import batches_of
from maxlm.hub.models import KINDS, files_fingerprint, load_published, load_run
from maxlm.inference.load import LoadedRun
from maxlm.recipes.completions import Completion, Score

_TOKENS = 1 << 15
"""Of one batch."""
_MOST_ROWS = 64


class AskedModel(NamedTuple):
    """A model that says something of texts."""

    run: LoadedRun
    fingerprint: str
    """Of its parameters."""


def open_model(place: str, sharding: ShardingConfig) -> AskedModel:
    """A run (RUN_DIR, RUN_DIR/checkpoints/STEP, either after `run:`) or a published model (hf:DIR, gguf:FILE).

    Raises:
        UserError: there is none, it is damaged, or does not fit the layout.
    """
    kind, _, path = place.partition(":")
    try:
        if kind in KINDS:
            published = load_published(KINDS[kind](Path(path)), sharding=sharding)
            return AskedModel(published, files_fingerprint(Path(path)))
        folder, step = run_and_step(path if kind == "run" else place)
        run = load_run(folder, step=step, sharding=sharding)
        return AskedModel(run, state_hash(folder / "checkpoints", run.step, items=("params",)))
    except UserError as error:
        raise UserError(str(error) if place in str(error) else f"{place}: {error}") from error


def outputs_of(run: LoadedRun, texts: Sequence[Sequence[int] | str]) -> list[npt.NDArray[np.float32] | str]:
    """`LanguageModel.last` of texts of any lengths, a number or logits [V] each. A program is compiled for each power
    of two that lengths have.

    Args:
        run: the model.
        texts: ids, at least one each; or why there are none.

    Returns:
        Of each text; or why there is nothing: what `texts` says, the text is too long, or the output is not finite.
    """
    limit = run.config.model.max_seq_len - run.config.model.virtual_tokens
    found: list[npt.NDArray[np.float32] | str] = [
        text
        if isinstance(text, str)
        else f"{len(text):,} tokens do not fit the model that judges, which takes {limit:,}"
        for text in texts
    ]
    fitting = [(i, text) for i, text in enumerate(texts) if not isinstance(text, str) and len(text) <= limit]
    rows_of = lambda length: min(_MOST_ROWS, 1 << max(0, (_TOKENS // length).bit_length() - 1))
    for batch in batches_of([len(text) for _, text in fitting], rows_of, limit):
        tokens, lengths = np.zeros((batch.rows, batch.length), np.int32), np.ones(batch.rows, np.int32)
        for row, member in enumerate(batch.members):
            _, text = fitting[member]
            tokens[row, : len(text)], lengths[row] = text, len(text)
        outputs = run.model.last(tokens, lengths)
        for row, member in enumerate(batch.members):
            finite = np.isfinite(outputs[row]).all()
            found[fitting[member][0]] = outputs[row] if finite else f"the output of step {run.step} is not finite"
    return found


class RewardModel:
    """Numbers of a reward model, one a conversation, at its last token."""

    def __init__(self, task: ModelReward, *, tokenizer: str, sharding: ShardingConfig) -> None:
        """Reads it.

        Args:
            task: which one.
            tokenizer: fingerprint of the policy's.
            sharding: how to lay it out.

        Raises:
            UserError: there is none, it gives no numbers, or it cannot be asked: it has neither a chat template nor the
                policy's tokenizer.
        """
        self._run, self.fingerprint = open_model(task.run, sharding)
        self._scale = RewardScale(task.mean, task.std)
        head = self._run.config.model.head
        if not isinstance(head, ScalarHead):
            raise UserError(f"{task.run}: its {type(head).__name__} gives no reward; name a run of task = Reward")
        if self._run.chat is None and self._run.tokenizer.fingerprint != tokenizer:
            raise UserError(
                f"{task.run}: has tokenizer {self._run.tokenizer.fingerprint[:12]}..., the policy {tokenizer[:12]}..., "
                "and no chat template by which its texts could be written anew; train it on data of conversations"
            )

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        outputs = outputs_of(self._run, [self._ids(one) for one in completions])
        return [out if isinstance(out, str) else float(self._scale.normalised(out)) for out in outputs]

    def _ids(self, completion: Completion) -> Sequence[int] | str:
        """Ids of the policy, which may spell the same in other tokens, are taken where there is no template."""
        if self._run.chat is None:
            return (*completion.prompt.ids, *completion.tokens)
        return conversation_ids(self._run, completion)


def conversation_ids(run: LoadedRun, completion: Completion) -> Sequence[int] | str:
    """The conversation as in data that a model with a chat template was trained on, with the end of the answer's turn;
    or why there is none."""
    assert run.chat is not None, "looked at when it was read"
    prompt = completion.prompt
    said = [*prompt.turns, {"role": "assistant", "content": completion.text}]
    try:
        return run.chat.encode(
            run.tokenizer, said, tools=prompt.record.get("tools"), add_generation_prompt=False, now=NOW
        ).ids
    except ChatError as error:
        return str(error)
