"""Tools that a policy calls while it writes (Toolformer, arXiv:2302.04761; WebGPT, arXiv:2112.09332): what templates
tell of them, calls out of what the policy says, and what they answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, assert_never

from maxlm.config import Calculator, DocsSearch, RolloutTool
from maxlm.data.chat import ChatTemplate
from maxlm.data.conversation_formats import BadRecord, Turn
from maxlm.data.conversations import between_turns
from maxlm.data.passages import passages_of
from maxlm.data.tokenizers import Tokenizer
from maxlm.data.tool_calls import ToolReader, seems_call
from maxlm.inference.embedding import Embedder
from maxlm.inference.load import ONE_DEVICE
from maxlm.inference.retrieval import Index, numbered
from maxlm.recipes.model_reward import open_model
from maxlm.recipes.toolformer import calculator


class ToolCalls(NamedTuple):
    """Of a turn of the policy."""

    turn: Turn
    """As a message."""
    made: list[tuple[str, Mapping[str, Any]]]
    """Names and arguments; of what looks like a call and is none, "" and nothing."""


class ToolReply(NamedTuple):
    """What comes before the policy's next turn."""

    turns: list[Turn]
    """The result of each call."""
    ids: list[int]
    """All that the template writes there."""
    failed: int
    """ToolCalls that were wrong."""


class Toolbox:
    """The tools of a run."""

    def __init__(self, tools: Sequence[RolloutTool], template: ChatTemplate, tokenizer: Tokenizer) -> None:
        """
        Args:
            tools: which.
            template: of the policy.
            tokenizer: of the policy.

        Raises:
            UserError: documents, or the model that searches them, are not there or damaged.
        """
        self._template, self._tokenizer, self._definitions = template, tokenizer, definitions(tools)
        self._tools = {tool.name: (*_words(tool)[1:], *_open(tool)) for tool in tools}
        decides = [self._definitions, [fingerprint for *_, fingerprint in self._tools.values()]]
        self.fingerprint = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
        """SHA-256 in hex of all that decides what they answer."""

    def calls(self, text: str) -> ToolCalls | None:
        """Those of a turn's text; None: it has none."""
        reader = ToolReader(list(self._tools))
        (shown, first), (rest, last) = reader.add(text), reader.finish()
        turn: Turn = {"role": "assistant", "content": (shown + rest).strip()}
        made = [(one.name, json.loads(one.arguments)) for one in [*first, *last]]
        if not made:
            return ToolCalls(turn, [("", {})]) if seems_call(text) else None
        functions = [{"name": name, "arguments": arguments} for name, arguments in made]
        named = [{"id": _id(n), "type": "function", "function": one} for n, one in enumerate(functions)]
        return ToolCalls({**turn, "tool_calls": named}, made)

    def reply(self, said: Sequence[Turn], calls: ToolCalls) -> ToolReply | None:
        """What the tools answer after `said` and the turn with the calls; None: the template does not take it."""
        results = [self._result(name, arguments) for name, arguments in calls.made]
        turns: list[Turn] = [
            {"role": "tool", "name": name, "tool_call_id": _id(n), "content": result}
            for n, ((name, _), (result, _)) in enumerate(zip(calls.made, results, strict=True))
        ]
        whole = [*said, calls.turn, *turns]
        try:
            ids = between_turns(whole, len(said), self._template, self._tokenizer, self._definitions)
        except BadRecord:
            return None
        return ToolReply(turns, ids, sum(not right for _, right in results))

    def _result(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """For the model, and whether the call was right."""
        if name not in self._tools:
            return f"Error: a call is JSON with arguments and the name {' or '.join(self._tools)}", False
        key, wanted, answer, _ = self._tools[name]
        argument = arguments.get(key)
        result = answer(argument) if isinstance(argument, str) and argument.strip() else None
        return (f"Error: {key} must be a text: {wanted}", False) if result is None else (result, True)


def definitions(tools: Sequence[RolloutTool]) -> list[dict[str, Any]]:
    """As JSON schemas of functions, for templates."""
    found = []
    for tool in tools:
        about, key, wanted = _words(tool)
        values = {"type": "object", "properties": {key: {"type": "string", "description": wanted}}, "required": [key]}
        function = {"name": tool.name, "description": about, "parameters": values}
        found.append({"type": "function", "function": function})
    return found


def _words(tool: RolloutTool) -> tuple[str, str, str]:
    """What it does, the name of its argument, and what that is."""
    match tool:
        case Calculator():
            return "Computes, and rounds to two places.", "expression", "numbers with + - * / and brackets"
        case DocsSearch():
            return "Finds passages of documents.", "query", "what they should be about"
        case _:
            assert_never(tool)


def _open(tool: RolloutTool) -> tuple[Callable[[str], str | None], str]:
    """What it says of its argument, or None, and a fingerprint of what decides that."""
    match tool:
        case Calculator():
            return calculator, ""
        case DocsSearch():
            run, fingerprint = open_model(tool.run, ONE_DEVICE)
            passages = passages_of(Path(tool.docs), run.tokenizer)
            index = Index(
                passages, Embedder(run.model), run.tokenizer, top=tool.top, longest=run.config.model.max_seq_len
            )
            decides = f"{fingerprint} {tool.top} {numbered(passages)}"
            return lambda query: numbered(index.find(query)), hashlib.sha256(decides.encode()).hexdigest()
        case _:
            assert_never(tool)


def _id(n: int) -> str:
    """Of the n-th call of a turn: some templates want nine letters or digits."""
    return f"{n:09}"
