"""Texts as clients read them: whole, or piece by piece."""

from __future__ import annotations

import abc
import codecs
import time
import uuid
from collections.abc import Sequence
from typing import Any

from maxlm.data.tool_calls import Called, ToolReader
from maxlm.inference.request import Delta, Finish, TokenScore
from maxlm.serving.jobs import Job, TextSoFar, best, scores_of, usage
from maxlm.serving.token_names import TokenNames

_LOWEST = -9999.0
"""Of a token that cannot come: JSON has no infinity."""


_Row = tuple[int, TokenScore | None]
"""A token, and how likely it was."""


class _Places:
    """Where each token begins in the text of all, in characters. One that ends a character begins where that does."""

    def __init__(self, names: TokenNames) -> None:
        self._names, self._at = names, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: int) -> int:
        at = self._at
        self._at += len(self._decoder.decode(self._names.shown(token)))
        return at


class Reply(abc.ABC):
    """What becomes of a job's texts. One for each request of a client."""

    prefix: str
    kind: str

    def __init__(self, job: Job, model: str) -> None:
        self.job = job
        self.texts = [TextSoFar() for _ in job.requests]
        self._same = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def opening(self) -> list[dict[str, Any]]:
        """Before all pieces."""
        return []

    def pieces(self, i: int, delta: Delta) -> list[dict[str, Any]]:
        """What text i has grown by; nothing if a client would see nothing of it."""
        self.texts[i].add(delta)
        return [self._chunk([choice]) for choice in self._grown(i, delta)]

    def closing(self) -> dict[str, Any]:
        """The tokens that it took."""
        return {**self._chunk([]), "usage": usage(self.job, self.texts)}

    def whole(self, texts: Sequence[TextSoFar]) -> dict[str, Any]:
        """All in one."""
        chosen = best(self.job, texts)
        choices = [self._choice(i, text) for i, text in enumerate(chosen)]
        return {**self._same, "object": self.kind, "choices": choices, "usage": usage(self.job, texts)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._same, "object": self.kind, "choices": choices}

    @abc.abstractmethod
    def _grown(self, i: int, delta: Delta) -> list[dict[str, Any]]: ...

    @abc.abstractmethod
    def _choice(self, i: int, text: TextSoFar) -> dict[str, Any]: ...


class CompletionReply(Reply):
    """Of /v1/completions."""

    prefix, kind = "cmpl", "text_completion"

    def __init__(self, job: Job, model: str) -> None:
        super().__init__(job, model)
        self._places = [_Places(job.served.names) for _ in job.requests]
        self._begun = [False] * len(job.requests)

    def _grown(self, i: int, delta: Delta) -> list[dict[str, Any]]:
        text, scores = (delta.text, scores_of(delta)) if not self.job.prompt_only else ("", ())
        of_prompt = self._of_prompt(i, delta.prompt_scores) if not self._begun[i] else []
        before = self._prompt(i) if not self._begun[i] else ""
        if not (before or text or scores or of_prompt or delta.finish):
            return []
        self._begun[i] = True
        logprobs = self._logprobs(i, self._places[i], of_prompt, scores) if self.job.scores else None
        reason = self._reason(delta.finish)
        return [{"index": i, "text": before + text, "logprobs": logprobs, "finish_reason": reason}]

    def _choice(self, i: int, text: TextSoFar) -> dict[str, Any]:
        kept = "" if self.job.prompt_only else text.text
        asked = i // self.job.n * self.job.per_prompt
        scores = () if self.job.prompt_only else scores_of(text)
        of_prompt, places = self._of_prompt(asked, text.prompt_scores), _Places(self.job.served.names)
        logprobs = self._logprobs(asked, places, of_prompt, scores) if self.job.scores else None
        reason = self._reason(text.finish)
        return {"index": i, "text": self._prompt(asked) + kept, "logprobs": logprobs, "finish_reason": reason}

    def _reason(self, finish: Finish | None) -> str | None:
        return "length" if finish is not None and self.job.prompt_only else finish and finish.value

    def _prompt(self, i: int) -> str:
        """That of request i, if the answer repeats it."""
        return self.job.prompts[i // self.job.per_prompt] if self.job.prompts else ""

    def _of_prompt(self, i: int, scores: Sequence[TokenScore]) -> list[_Row]:
        """If they are wanted. A prompt's first token has no probability."""
        request = self.job.requests[i]
        if request.prompt_logprobs is None:
            return []
        return [(request.prompt[0], None), *((score.token, score) for score in scores)]

    def _logprobs(self, i: int, places: _Places, of_prompt: list[_Row], scores: Sequence[TokenScore]) -> dict[str, Any]:
        """OpenAI's four lists."""
        names, request = self.job.served.names, self.job.requests[i]
        rows = [*of_prompt, *((score.token, score) for score in scores)]
        return {
            "tokens": [names.name(token) for token, _ in rows],
            "token_logprobs": [None if score is None else _finite(score.logprob) for _, score in rows],
            "top_logprobs": [
                None if score is None else {names.name(j): _finite(value) for j, value in score.top}
                for _, score in rows
            ]
            if request.logprobs
            else None,
            "text_offset": [places.next(token) for token, _ in rows],
        }


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"

    def __init__(self, job: Job, model: str, tools: Sequence[str], *, stream: bool) -> None:
        self.kind = "chat.completion.chunk" if stream else "chat.completion"
        super().__init__(job, model)
        self._tools = tools
        self._readers = [ToolReader(tools) for _ in job.requests]
        self._called = [0] * len(job.requests)

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        chunks = [self._chunk([self._part(i, delta, None, None)]) for i in range(len(self.job.requests))]
        return [{**chunks[0], **self._sources()}, *chunks[1:]]

    def whole(self, texts: Sequence[TextSoFar]) -> dict[str, Any]:
        return {**super().whole(texts), **self._sources()}

    def _sources(self) -> dict[str, Any]:
        """What [1], [2], ... in the answer mean, where documents were looked at."""
        if self.job.sources is None:
            return {}
        return {"sources": [{"place": one.place, **one._asdict()} for one in self.job.sources]}

    def _grown(self, i: int, delta: Delta) -> list[dict[str, Any]]:
        text, calls = (delta.text, list[Called]()) if not self._tools else self._readers[i].add(delta.text)
        if delta.finish is not None and self._tools:
            rest, more = self._readers[i].finish()
            text, calls = text + rest, calls + more
        logprobs = self._logprobs(scores_of(delta)) if self.job.scores and delta.scores else None
        found = []
        if text or logprobs:
            found.append(self._part(i, {"content": text}, logprobs, None))
        for call in calls:
            found.append(self._part(i, {"tool_calls": [call.as_json(self._called[i])]}, None, None))
            self._called[i] += 1
        if delta.finish is not None:
            found.append(self._part(i, {}, None, _reason(delta.finish, self._called[i] > 0)))
        return found

    def _choice(self, i: int, text: TextSoFar) -> dict[str, Any]:
        content, calls = text.text, list[Called]()
        if self._tools:
            reader = ToolReader(self._tools)
            (first, some), (last, more) = reader.add(text.text), reader.finish()
            content, calls = first + last, some + more
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content.strip() or None, "tool_calls": [call.as_json() for call in calls]}
        return {
            "index": i,
            "message": message,
            "logprobs": self._logprobs(scores_of(text)) if self.job.scores else None,
            "finish_reason": _reason(text.finish, bool(calls)),
        }

    def _part(self, i: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        one = lambda score: {
            **self._named(score.token, score.logprob),
            "top_logprobs": [self._named(token, value) for token, value in score.top],
        }
        return {"content": [one(score) for score in scores], "refusal": None}

    def _named(self, token: int, value: float) -> dict[str, Any]:
        names = self.job.served.names
        return {"token": names.name(token), "logprob": _finite(value), "bytes": list(names.raw(token))}


def _reason(finish: Finish | None, called: bool) -> str | None:
    return "tool_calls" if called and finish is Finish.STOP else finish and finish.value


def _finite(value: float) -> float:
    return max(value, _LOWEST)
