"""What a request may hold: OpenAI's fields, with the ranges that hold here, and a few of vLLM's.

Types are exact: "1" is no number. What another server would use and this one has no use for (`_IGNORED`) is passed
over, as is null; any other unknown field is refused, so that a misspelt one does not go unseen.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from maxlm.inference.request import TOP_SCORES

MAX_CHOICES = 128
MAX_RANKED = 4
_MAX_PROMPTS = 2048
_MAX_MESSAGES = 10_000
_MAX_STOPS, _MAX_STOP = 16, 256
_BIAS = 100.0
_IGNORED = (
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "reasoning_effort", "verbosity",
)  # fmt: skip

Probability = Annotated[float, Field(gt=0, le=1)]
Ids = list[int]


class Exact(BaseModel):
    """Exact types, no infinite numbers, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Lenient(Exact):
    """What clients send back as they got it: fields without a use here are passed over."""

    model_config = ConfigDict(extra="ignore")


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise ValueError("must be a string or a list of strings, none of them empty")
    if len(stops) > _MAX_STOPS or any(len(one) > _MAX_STOP for one in stops):
        raise ValueError(f"must be at most {_MAX_STOPS} strings of at most {_MAX_STOP} characters")
    return stops


def _biases(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object: token ids to numbers")
    found = {}
    for key, bias in value.items():
        if not str(key).isascii() or not str(key).isdecimal() or len(str(key)) > 9:
            raise ValueError(f"has the key {str(key)[:20]!r}, which is no token id")
        if type(bias) not in (int, float) or not -_BIAS <= bias <= _BIAS:
            raise ValueError(f"gives {str(bias)[:20]} to {key}, must be a number in [-{_BIAS:g}, {_BIAS:g}]")
        found[int(key)] = float(bias)
    return found


def _prompts(value: Any) -> Any:
    """Texts or lists of ids."""
    ids = lambda one: isinstance(one, list) and bool(one) and all(type(i) is int for i in one)
    if isinstance(value, str) or ids(value):
        return [value]
    if not isinstance(value, list) or not value or not all(isinstance(one, str) or ids(one) for one in value):
        raise ValueError("must be a string, a list of token ids, or a list of either, none of them an empty list")
    if len(value) > _MAX_PROMPTS:
        raise ValueError(f"holds {len(value):,} texts, must hold at most {_MAX_PROMPTS:,}")
    return value


def _content(value: Any) -> Any:
    """One string; parts are joined, as templates take no lists."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"has a part of type {str(kind)[:20]!r}, must have parts {{'type': 'text', 'text': ...}}")
        texts.append(part["text"])
    return "\n".join(texts)


class NamedFunction(Lenient):
    name: str


class NamedTool(Lenient):
    type: Literal["function"]
    function: NamedFunction


def _tool_choice(value: Any) -> Any:
    if value is None or value in ("none", "auto", "required"):
        return value
    function = value.get("function") if isinstance(value, dict) else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return {"type": value.get("type"), "function": {"name": function["name"]}}
    raise ValueError("must be 'none', 'auto', 'required', or {'type': 'function', 'function': {'name': ...}}")


def _variables(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(one, str | int | float | None) for one in value.values()):
        raise ValueError("must be an object of strings, numbers and true or false")
    return value


ToolChoice = Annotated[str | NamedTool | None, BeforeValidator(_tool_choice)]
Variables = Annotated[dict[str, Any], BeforeValidator(_variables)]
Stops = Annotated[list[str], BeforeValidator(_stops)]
Biases = Annotated[dict[int, float], BeforeValidator(_biases)]
PromptList = Annotated[list[str | Ids], BeforeValidator(_prompts)]
Content = Annotated[str | None, BeforeValidator(_content)]


class StreamOptions(Lenient):
    include_usage: bool = False


class NamedSchema(Lenient):
    name: str = ""
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Exact):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be there with type 'json_schema', and only then")
        return self


class Function(Lenient):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Exact):
    type: Literal["function"]
    function: Function


class CalledFunction(Lenient):
    name: str
    arguments: str


class ToolCall(Lenient):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"content must be there in a message of role {self.role!r}")
        return self


class Generating(Exact):
    """What all that generate text take."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Biases = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stops = Field(default_factory=list)
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    response_format: ResponseFormat | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    negative_prompt: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_ignored(cls, value: Any) -> Any:
        """Nor what is null, as some clients send every field that there is."""
        if not isinstance(value, dict):
            return value
        wanted = lambda key, one: key not in _IGNORED and (one is not None or key in cls.model_fields)
        return {key: one for key, one in value.items() if wanted(key, one)}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options must be left out where stream is not true")
        if self.negative_prompt is not None and self.guidance_scale in (None, 1):
            raise ValueError("negative_prompt must be left out where guidance_scale is not there or is 1")
        return self


class CompletionRequest(Generating):
    """Of /v1/completions."""

    prompt: PromptList
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP_SCORES)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        n, best_of = self.n or 1, self.best_of or self.n or 1
        if best_of < n:
            raise ValueError(f"best_of = {best_of} must be at least n = {n}")
        if len(self.prompt) * best_of > _MAX_PROMPTS:
            words = f"{len(self.prompt):,} prompts with {best_of} texts each"
            raise ValueError(f"{words} must be at most {_MAX_PROMPTS:,} texts; send several requests")
        if best_of > n and self.stream:
            raise ValueError(
                f"best_of = {best_of} must be n = {n} where stream is true, as all must end before one is best"
            )
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 must be at least 1 where echo is not true")
        return self


class ChatRequest(Generating):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_SCORES)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice = None
    chat_template_kwargs: Variables = Field(default_factory=dict)
    documents: bool | None = None
    """Whether to answer from the server's documents; None: if it has some."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs must be left out where logprobs is not true")
        if self.max_tokens == 0:
            raise ValueError("max_tokens = 0 must be at least 1")
        names = [tool.function.name for tool in self.tools or ()]
        if self.tool_choice not in (None, "none") and not names:
            raise ValueError("tool_choice must be left out where there are no tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice must name one of the tools: {', '.join(names)}")
        forced = self.tool_choice not in (None, "none", "auto")
        if forced and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("tool_choice that asks for a call and response_format must not be there together")
        return self


class EmbeddingRequest(Exact):
    """Of /v1/embeddings."""

    model: str
    input: PromptList
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    pooling: Literal["mean", "last"] | None = None
    user: Any = None


class TokenizeRequest(Exact):
    """Of /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages must be there")
        return self


class PreferenceRequest(Exact):
    """Of /preferences: answers of one conversation, the best one first."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MAX_MESSAGES)]
    ranking: Annotated[list[str], Field(min_length=2, max_length=MAX_RANKED)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.messages[-1].role == "assistant":
            raise ValueError("messages must end before the answers that are ranked")
        if len(set(self.ranking)) != len(self.ranking):
            raise ValueError("ranking must hold each answer once")
        return self


class DetokenizeRequest(Exact):
    """Of /detokenize."""

    model: str | None = None
    tokens: Ids
