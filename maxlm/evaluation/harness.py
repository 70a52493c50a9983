"""A model for lm-eval (0.4.13, the extra `eval`): its tasks, and any YAML file in its format, asked of ours.

Where lm-eval's own adapter for Hugging Face models is right, figures are the same; the test compares them. What is
otherwise here: a beginning of texts that the tokenizer writes is given once and never scored, also in `rolling`, and
prompts that are too long keep it; an empty continuation has the log-probability 0; where a token joins a context and
its continuation, it is scored; a continuation that is longer than the model takes is scored in windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maxlm.config import SamplingConfig, UserError
from maxlm.config.errors import pip_install
from maxlm.evaluation.examining import Examined, Measured
from maxlm.evaluation.scoring import GREEDY, RunExaminee

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(
        f"such tasks need lm-eval, which is not installed ({error}); {pip_install('maxlm[eval]')}"
    ) from error

_NEW_TOKENS = 256
"""Where a task does not say how many."""
_TAKEN = {"do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks"}
"""Of what a task says of generation."""


class HarnessModel(LM):
    """A `RunExaminee` as lm-eval asks it."""

    def __init__(self, examinee: RunExaminee, *, seed: int = 0) -> None:
        """`seed` is of texts that are drawn."""
        super().__init__()
        self.examinee, self._seed = examinee, seed

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the log-probability of the continuation, and whether it is greedy."""
        asked = [request.args for request in requests]
        scores = self.examinee.scores([self.examinee.split(*args) for args in asked])
        found = [(one.total, one.greedy) for one in scores]
        for args, answer in zip(asked, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", args, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each text: the log-probability of all its tokens, each once, with a full window for the last ones."""
        texts = [request.args[0] for request in requests]
        found = [one.total for one in self.examinee.scores([self.examinee.split("", text) for text in texts])]
        for text, answer in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to the first of the strings in `until`, which it does not have.

        Raises:
            UserError: a task asks for a way of drawing that there is not.
        """
        found: dict[int, str] = {}
        kind = lambda i: repr(sorted(requests[i].args[1].items(), key=repr))
        for _, group in itertools.groupby(sorted(range(len(requests)), key=kind), kind):
            members = list(group)
            said = normalize_gen_kwargs(requests[members[0]].args[1], _NEW_TOKENS)
            if strange := said.keys() - _TAKEN:
                raise UserError(f"generation_kwargs: {', '.join(sorted(strange))} of the task cannot be followed")
            texts = self.examinee.texts(
                [requests[i].args[0] for i in members],
                max_new_tokens=said["max_gen_toks"],
                stop=said["until"],
                sampling=_sampling(said),
                seed=self._seed,
            )
            found |= dict(zip(members, texts, strict=True))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[i])
        return [found[i] for i in range(len(requests))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """
        Raises:
            UserError: an answer is begun for the model, or its template does not take the conversation.
        """
        if not add_generation_prompt:
            raise UserError("--chat: a task that begins the model's answer cannot be asked; leave out --chat")
        return self.examinee.rendered(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """For lm-eval's records."""
        return "" if self.examinee.run.chat is None else self.examinee.run.chat.sources.get("default", "")

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return self.examinee.tokenizer.fingerprint


def _sampling(said: Mapping[str, Any]) -> SamplingConfig:
    """transformers ignores the other settings where it does not draw, and knows `top_k` of 0 and None as all."""
    if not said["do_sample"] or not said.get("temperature", 1.0):
        return GREEDY
    return SamplingConfig(
        temperature=float(said.get("temperature", 1.0)),
        top_k=int(said.get("top_k") or 0),
        top_p=float(said.get("top_p") or 1.0),
    )


def run_tasks(
    examinee: RunExaminee,
    names: Sequence[str],
    *,
    limit: int | None,
    few_shot: int | None,
    seed: int,
    include_path: Path | None,
    chat: bool = False,
) -> dict[str, Examined]:
    """What lm-eval finds for each of its tasks.

    Args:
        examinee: the model.
        names: tasks, groups or tags, of lm-eval itself or of `include_path`.
        limit: questions of each task; None: all.
        few_shot: demonstrations; None: as the task says.
        seed: of demonstrations, texts and intervals.
        include_path: a folder with task files.
        chat: whether questions go through the model's chat template.

    Raises:
        UserError: lm-eval does not know a task, or fails at it, for example as its data is not on this machine.
    """
    place = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=place, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # its own are thousands, and take seconds to list
        manager = TaskManager(include_path=place)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise UserError(
            f"--tasks {unknown[0]}: no .jsonl file, not of the suite, and lm-eval knows no such task; its own are "
            "listed by lm-eval ls tasks, yours need --include_path"
        )
    try:
        found = simple_evaluate(
            HarnessModel(RunExaminee(examinee.run, chat=chat), seed=seed),
            tasks=list(names),
            num_fewshot=few_shot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            apply_chat_template=chat,
            random_seed=seed,
            numpy_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--tasks {' '.join(names)}: lm-eval fails with {' '.join(str(error).split())[:300]}"
        ) from error
    assert found is not None, "this is the first process"
    samples = found.get("samples", {})
    return {
        task: Examined(
            measures=tuple(_measures(task, dict(row), len(samples.get(task, ())))),
            records=tuple(samples.get(task, ())),
        )
        for task, row in found["results"].items()
    }


def _measures(task: str, row: Mapping[str, Any], questions: int) -> list[Measured]:
    """lm-eval's figures, which have a standard error in place of an interval."""
    found = []
    for key, value in row.items():
        measure, _, rule = key.partition(",")
        if isinstance(value, int | float) and rule and not measure.endswith("_stderr"):
            said = row.get(f"{measure}_stderr,{rule}")
            half = 1.96 * said if isinstance(said, int | float) else 0.0
            name = measure if rule == "none" else f"{measure} ({rule})"
            found.append(
                Measured(
                    exam=task,
                    measure=name,
                    value=float(value),
                    low=value - half,
                    high=value + half,
                    chance=None,
                    questions=questions,
                )
            )
    return found
