"""The `config.json` of a published model, read key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from maxlm.config import Activation, BlockConfig, Llama3RopeScaling, Rope, UserError
from maxlm.config.fields import Positive, require
from maxlm.config.json_file import read_object

_REQUIRED: Any = object()


class Published:
    """Values of a published config. A key that is not there, or null, has the default that its family gives it."""

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        """`place`: the file, for messages."""
        self.values, self.place = values, place

    @staticmethod
    def read(folder: Path) -> Published:
        """Raises UserError where there is none."""
        file = folder / "config.json"
        if not file.is_file():
            raise UserError(f"{folder}: has no config.json; name the folder of a downloaded model")
        return Published(read_object(file, "the config.json of a published model"), str(file))

    def get(self, key: str, kind: Any, default: Any = _REQUIRED) -> Any:
        """A value of a kind of `maxlm.config.fields`, such as Positive[int].

        Raises:
            UserError: it is missing and has no default, or is of another kind.
        """
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.place}: has no {key}; take the config.json that the model came with")
            return default
        require(f"{self.place}: {key}", value, kind)
        return float(value) if float in (kind, *get_args(kind)) else value

    def refuse(self, key: str, *allowed: Any, why: str) -> None:
        """Refuse a value that changes the model in a way that is not supported; absent and null are allowed.

        Raises:
            UserError: it has another value than these.
        """
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise UserError(f"{self.place}: {key} = {value!r} is not supported ({why}); must be {allowed[0]!r}")


ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "relu": Activation.RELU,
}
"""Words of a published config; the first of a kind is written."""


def read_activation(
    config: Published, key: str, default: str, words: Mapping[str, Activation] = ACTIVATIONS
) -> Activation:
    """Raises UserError where a word is not known."""
    word = config.get(key, str, default)
    if word not in words:
        raise UserError(f"{config.place}: {key} = {word!r} is not supported; it may be {', '.join(sorted(words))}")
    return words[word]


def write_activation(activation: Activation, words: Mapping[str, Activation] = ACTIVATIONS) -> str | None:
    """None: there is no word for it."""
    return next((word for word, known in words.items() if known is activation), None)


def read_rope(config: Published, theta: float = 10_000.0) -> Rope:
    """From either spelling: `rope_parameters`, or `rope_theta` and `rope_scaling`.

    Raises:
        UserError: a type of scaling that is not supported.
    """
    values: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        values |= config.get(key, dict, {})
    said = Published({"rope_theta": config.values.get("rope_theta")} | values, f"{config.place}: rope_parameters")
    theta = said.get("rope_theta", Positive[float], theta)
    kind = said.get("rope_type", str, said.get("type", str, "default"))
    match kind:
        case "default":
            return Rope(theta=theta)
        case "llama3":
            scaling = Llama3RopeScaling(
                factor=said.get("factor", Positive[float]),
                low_freq_factor=said.get("low_freq_factor", Positive[float]),
                high_freq_factor=said.get("high_freq_factor", Positive[float]),
                original_max_len=said.get("original_max_position_embeddings", Positive[int]),
            )
            return Rope(theta=theta, scaling=scaling)
        case _:
            raise UserError(f"{said.place}.rope_type = {kind!r} is not supported; it may be default, llama3")


def write_rope(rope: Rope) -> dict[str, Any]:
    """The published spelling, which every version of transformers reads."""
    match rope.scaling:
        case None:
            return {"rope_theta": rope.theta}
        case Llama3RopeScaling() as scaling:
            values = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_len,
            }
            return {"rope_theta": rope.theta, "rope_scaling": values}


def pattern(layers: Sequence[BlockConfig]) -> tuple[BlockConfig, ...]:
    """The shortest row of blocks whose repetition is all of `layers`."""
    lengths = (n for n in range(1, len(layers) + 1) if len(layers) % n == 0)
    return tuple(layers[: next(n for n in lengths if list(layers) == list(layers[:n]) * (len(layers) // n))])
