"""Runs that answer the same prompts: how many answers are exactly right, and what a reward model thinks of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import numpy.typing as npt

from maxlm.config import LmHead, ModelReward, ShardingConfig, UserError
from maxlm.data.prompts import Prompt
from maxlm.evaluation.marking import exact_match, proportion
from maxlm.evaluation.ratings import by_reward, win_rate
from maxlm.evaluation.side_by_side import Question, Said, answers
from maxlm.hub.models import load_run
from maxlm.observe.comparison import Answered, Compared
from maxlm.recipes.completions import Completion
from maxlm.recipes.model_reward import RewardModel

QuestionFiles = Mapping[str, Sequence[Question]]
"""What is asked of each file."""
_Floats = npt.NDArray[np.float64]


def asked(
    runs: Sequence[Compared],
    files: QuestionFiles,
    *,
    max_new_tokens: int,
    shown: int,
    judge: str | None,
    tell: Callable[[str], None],
) -> list[Compared]:
    """With their answers, those that write text, and what these are worth.

    Args:
        runs: run folders, one of which is in memory at a time.
        files: what they are asked.
        max_new_tokens: of an answer.
        shown: answers to prompts of each file that are kept, from the first.
        judge: a run of `task = Reward`; None: nobody judges.
        tell: gets a line before each model is asked.

    Raises:
        UserError: a run cannot be read, or has no room for a prompt; or the judge gives no numbers.
    """

    @functools.cache
    def judging(tokenizer: str) -> RewardModel:
        assert judge is not None
        return RewardModel(ModelReward(run=judge), tokenizer=tokenizer, sharding=ShardingConfig(data=1))

    questions = [question for some in files.values() for question in some]
    found, rewards = list[Compared](), dict[str, _Floats]()
    for run in runs:
        loaded = load_run(run.folder)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.parameters))
        run = dataclasses.replace(run, figures={**run.figures, "weights, MB": f"{size / 1e6:.2f}"})
        if isinstance(loaded.config.model.head, LmHead):
            tell(f"{run.folder}: answers {len(questions)} prompts")
            try:
                said = answers(loaded, questions, max_new_tokens)
            except UserError as error:
                raise UserError(f"{run.folder}: {error}") from error
            run = dataclasses.replace(_marked(run, files, said, shown), talks=loaded.chat is not None)
            if judge is not None:
                scores = _scores(judging(loaded.tokenizer.fingerprint), questions, said)
                figures = {**run.figures, **_by_reward(run.name, scores, rewards)}
                run, rewards[run.name] = dataclasses.replace(run, figures=figures), scores
        found.append(run)
    return found


def _marked(run: Compared, files: QuestionFiles, said: Sequence[Said], shown: int) -> Compared:
    """With its answers, and the share of each file that is exactly right."""
    figures, given, done = dict(run.figures), list[Answered](), 0
    for path, questions in files.items():
        texts = [one.text for one in said[done : done + len(questions)]]
        done += len(questions)
        marked = [
            Answered(text, bool(exact_match(text, one.answers)) if one.answers else None)
            for one, text in zip(questions, texts, strict=True)
        ]
        if known := [one.right for one in marked if one.right is not None]:
            share = proportion(sum(known), len(known))
            figures[Path(path).stem] = f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"
        given += marked[:shown]
    return dataclasses.replace(run, figures=figures, answers=given)


def _scores(judge: RewardModel, questions: Sequence[Question], said: Sequence[Said]) -> _Floats:
    """Of each answer."""
    prompts = [
        Prompt(n, answer.ids, one.turns, {} if one.tools is None else {"tools": one.tools})
        for n, (one, answer) in enumerate(zip(questions, said, strict=True))
    ]
    found = judge(
        [Completion(prompt, one.text, one.tokens, one.finish) for prompt, one in zip(prompts, said, strict=True)]
    )
    for question, score in zip(questions, found, strict=True):
        if isinstance(score, str):
            raise UserError(f"the judge has no score for an answer to {question.text[:60]!r}: {score}")
    return np.array(found, np.float64)


def _by_reward(name: str, scores: _Floats, others: dict[str, _Floats]) -> dict[str, str]:
    """The mean, and how often the answers are better than those of the first run, a draw as half a win."""
    figures = {"reward": f"{scores.mean():.3f}"}
    for first in list(others)[:1]:
        share = win_rate(by_reward(name, first, scores, others[first]), name, first)
        assert share is not None, "they have met"
        figures[f"wins against {first}"] = f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"
    return figures
