"""Rewards of a model that is asked questions about a completion and answers yes or no: one of ours, or a server's."""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from maxlm.config import JudgeReward, LmHead, ShardingConfig, UserError
from maxlm.data.chat import ChatError
from maxlm.data.conversations import NOW
from maxlm.evaluation.marking import log_softmax
from maxlm.evaluation.time_limit import LONGEST_S
from maxlm.recipes.completions import Completion, Score
from maxlm.recipes.model_reward import open_model, outputs_of

_YES, _NO = "yes", "no"
_TOP = 20
"""Tokens whose log-probabilities a server tells, the most that OpenAI's interface has."""
_AT_ONCE = 16
"""Requests on their way to a server."""
_FIRST_WAIT_S, _MOST_WAIT_S = 0.5, 8.0
"""Before a server is asked again; each wait is twice the one before."""
_MAX_BYTES = 1 << 22
"""Of an answer."""


def question(completion: Completion, rule: str) -> str:
    """What the judge is asked: the conversation, and one question about its last answer.

    The answer stands in it as text. It may speak to the judge, and a policy that is trained with one may learn to.
    """
    turns = [*completion.prompt.turns, {"role": "assistant", "content": completion.text}]
    said = "\n\n".join(f"[{turn['role']}]\n{turn.get('content') or ''}" for turn in turns)
    return (
        f"A conversation:\n\n{said}\n\n[end of the conversation]\n\n"
        f"A question about the last answer of the assistant: {rule}\nSay Yes or No, and nothing else."
    )


def means(scores: Sequence[Score], rules: int) -> list[Score]:
    """Of each completion's scores by so many rules in turn; where a rule has none, why."""
    found: list[Score] = []
    for start in range(0, len(scores), rules):
        own = scores[start : start + rules]
        why = next((one for one in own if isinstance(one, str)), None)
        found.append(float(np.mean([float(one) for one in own])) if why is None else why)
    return found


def _share(yes: float, no: float) -> float:
    """p(yes) / (p(yes) + p(no)), of log-probabilities of which one at least is finite."""
    return float(np.exp(yes - np.logaddexp(yes, no)))


class ModelJudge:
    """A run or a published model in memory."""

    def __init__(self, task: JudgeReward, sharding: ShardingConfig) -> None:
        """Reads it.

        Raises:
            UserError: there is none, it has no logits, or its tokenizer begins both answers with the same tokens.
        """
        self._run, self.fingerprint = open_model(task.judge, sharding)
        self._rules = task.rules
        head = self._run.config.model.head
        if not isinstance(head, LmHead):
            raise UserError(f"{task.judge}: its {type(head).__name__} answers nothing; name a model with an LmHead")
        yes, no = (self._begins(word) for word in (_YES, _NO))
        self._yes, self._no = sorted(yes - no), sorted(no - yes)
        if not self._yes or not self._no:
            raise UserError(f"{task.judge}: its tokenizer begins Yes and No with the same tokens; use another judge")

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        asked = [self._ids(question(one, rule)) for one in completions for rule in self._rules]
        outputs = outputs_of(self._run, asked)
        return means([out if isinstance(out, str) else self._likely(out) for out in outputs], len(self._rules))

    def _begins(self, word: str) -> set[int]:
        """The first tokens of all ways to begin an answer with the word."""
        spelt = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
        return {self._run.tokenizer.encode(one)[0] for one in spelt}

    def _ids(self, text: str) -> Sequence[int] | str:
        if self._run.chat is None:
            return self._run.tokenizer.prompt_ids(f"{text}\n")
        try:
            return self._run.chat.encode(self._run.tokenizer, [{"role": "user", "content": text}], now=NOW).ids
        except ChatError as error:
            return str(error)

    def _likely(self, logits: npt.NDArray[np.float32]) -> float:
        log_probs = log_softmax(logits)
        yes, no = (float(np.logaddexp.reduce(log_probs[ids])) for ids in (self._yes, self._no))
        return _share(yes, no)


class ServerJudge:
    """A model that a server answers for."""

    def __init__(self, task: JudgeReward) -> None:
        """Asks it which models it has, if the config names none.

        Raises:
            UserError: it does not answer, or the variable with its key is not set.
        """
        self._task, self._place = task, task.judge.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if task.api_key is not None:
            if not (key := os.environ.get(task.api_key)):
                raise UserError(f"api_key = {task.api_key!r}: this variable is not set; set it to the key")
            self._headers["Authorization"] = f"Bearer {key}"
        self._model = task.model
        if not self._model:
            listed = self._ask("models", None)
            try:
                self._model = str(listed["data"][0]["id"])
            except (KeyError, IndexError, TypeError) as error:
                raise UserError(f"{self._place}/models lists no model; name one: model = ...") from error
        self.fingerprint = hashlib.sha256(f"{self._place} {self._model}".encode()).hexdigest()

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        """
        Raises:
            UserError: the server refuses, does not answer in time, or answers something else.
        """
        asked = [question(one, rule) for one in completions for rule in self._task.rules]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                return means(list(pool.map(self._score, asked)), len(self._task.rules))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _score(self, text: str) -> Score:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": _TOP,
        }
        answer = self._ask("chat/completions", body)
        try:
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            told = [(str(one["token"]).strip().lower(), float(one["logprob"])) for one in top]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._place}: its answer has no choices.0.logprobs.content.0.top_logprobs; use a server that tells "
                "log-probabilities"
            ) from error
        told = [(token, value) for token, value in told if token and value < math.inf]  # nor is NaN a log-probability
        of = lambda word: float(np.logaddexp.reduce([value for token, value in told if word.startswith(token)]))
        yes, no = of(_YES), of(_NO)
        if yes == no == -math.inf:
            return f"the judge finds neither Yes nor No among the {_TOP} likeliest ways to begin its answer"
        return _share(yes, no)

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """What the server answers, as JSON has it.

        Raises:
            UserError: it does not, or refuses.
        """
        where, task = f"{self._place}/{path}", self._task
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(task.retries + 1):
            try:
                request = urllib.request.Request(where, data, self._headers)
                with urllib.request.urlopen(request, timeout=min(task.timeout_s, LONGEST_S)) as answer:
                    return json.loads(answer.read(_MAX_BYTES))
            except urllib.error.HTTPError as error:
                why = f"says {error.code} {' '.join(error.read(300).decode(errors='replace').split())}"
                if error.code != 429 and error.code < 500:
                    raise UserError(f"{where}: the server of the judge {why}") from error
            except (OSError, http.client.HTTPException) as error:  # nobody there, nothing in time, half an answer
                why = f"does not answer ({getattr(error, 'reason', None) or error or type(error).__name__})"
            except ValueError as error:
                raise UserError(f"{where}: the server of the judge does not answer in JSON ({error})") from error
            if attempt < task.retries:
                time.sleep(min(_FIRST_WAIT_S * 2**attempt, _MOST_WAIT_S))
        raise UserError(
            f"{where}: the server of the judge {why}, asked {task.retries + 1} times; start it, or raise timeout_s"
        )
