"""The `config.json` of a published model, read key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never, get_args

from maxlm.config import (
    Activation,
    BlockConfig,
    DynamicNtkScaling,
    LinearScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    Nonlinearity,
    NtkScaling,
    Rope,
    RopeScaling,
    Swish,
    UserError,
    YarnScaling,
)
from maxlm.config.fields import NotNegative, Positive, require
from maxlm.config.json_file import no_folder, read_object

_REQUIRED: Any = object()
_MOST = 10_000
"""Layers, heads or experts."""


class Published:
    """Values of a published config. A key that is not there, or null, has the default that its family gives it."""

    def __init__(
        self, values: Mapping[str, Any], place: str, better: str = "the config.json that the model came with"
    ) -> None:
        """`place`: the file; `better`: what to take where it lacks something. Both for messages."""
        self.values, self.place, self._better = values, place, better

    @staticmethod
    def read(folder: Path) -> Published:
        """Raises UserError where there is none, or one of a run."""
        file = folder / "config.json"
        if not file.is_file():
            why = no_folder(folder) or "has no config.json"
            remedy = "name it by --gguf or gguf:" if folder.suffix == ".gguf" else "name that of a downloaded model"
            raise UserError(f"{folder}: {why}; {remedy} (docs/hub.md)")
        values = read_object(file, "the config.json of a published model")
        if "run_dir" in values and "model_type" not in values:
            raise UserError(f"{folder}: is a run folder, must be a published model; name it by --run or run:")
        return Published(values, str(file))

    def get(self, key: str, kind: Any, default: Any = _REQUIRED) -> Any:
        """A value of a kind of `maxlm.config.fields`, such as Positive[int].

        Raises:
            UserError: it is missing and has no default, or is of another kind.
        """
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.place}: has no {key}; take {self._better}")
            return default
        require(f"{self.place}: {key}", value, kind)
        return float(value) if float in (kind, *get_args(kind)) else value

    def count(self, key: str, default: Any = _REQUIRED) -> Any:
        """As `get`, of layers, heads or experts: of each of them there are tensors or rows, all of which are listed.

        Raises:
            UserError: as `get`; or no model has as many.
        """
        found = self.get(key, Positive[int], default)
        if found is not None and found > _MOST:
            raise UserError(f"{self.place}: {key} = {found} must be at most {_MOST:,}; take {self._better}")
        return found

    def refuse(self, key: str, *allowed: Any, why: str) -> None:
        """Refuse a value that changes the model in a way that is not supported; absent and null are allowed.

        Raises:
            UserError: it has another value than these.
        """
        value = self.values.get(key)
        if value is not None and value not in allowed:
            must = repr(allowed[0]) if allowed else "absent"
            raise UserError(f"{self.place}: {key} = {value!r} is not supported ({why}); must be {must}")


ACTIVATIONS: dict[str, Nonlinearity] = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "quick_gelu": Swish(beta=1.702),
}
"""Words of a published config; the first of a kind is written."""


def read_activation(
    config: Published, key: str, default: str, words: Mapping[str, Nonlinearity] = ACTIVATIONS
) -> Nonlinearity:
    """Raises UserError where a word is not known."""
    word = config.get(key, str, default)
    if word not in words:
        raise UserError(f"{config.place}: {key} = {word!r} is not supported; it may be {', '.join(sorted(words))}")
    return words[word]


def write_activation(activation: Nonlinearity, words: Mapping[str, Nonlinearity] = ACTIVATIONS) -> str | None:
    """None: there is no word for it."""
    return next((word for word, known in words.items() if known == activation), None)


def read_rope(
    config: Published, head_dim: int, *, theta: float = 10_000.0, share: float | None = None, interleaved: bool = False
) -> Rope:
    """From either spelling: `rope_parameters`, or `rope_theta`, `rope_scaling` and `partial_rotary_factor`.

    Args:
        config: of the model.
        head_dim: of its heads.
        theta: where nothing says it.
        share: of the dims that are rotated, where nothing says it; None: this family rotates all.
        interleaved: as `Rope.interleaved`.

    Raises:
        UserError: a type of scaling that is not supported.
    """
    values = {key: config.values.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    for key in ("rope_scaling", "rope_parameters"):
        values |= config.get(key, dict, {})
    if nested := [key for key, value in values.items() if isinstance(value, dict)]:
        raise UserError(
            f"{config.place}: rope_parameters.{nested[0]} = {values[nested[0]]!r} is not supported (this family has "
            "one RoPE in all layers); must be absent"
        )
    said = Published(values, f"{config.place}: rope_parameters")
    if share is None:
        said.refuse("partial_rotary_factor", 1.0, why="this family rotates all dims")
    dims = int(head_dim * said.get("partial_rotary_factor", Positive[float], share or 1.0))
    return Rope(
        theta=said.get("rope_theta", Positive[float], theta),
        scaling=_read_scaling(said, config),
        dims=None if dims == head_dim else dims,
        interleaved=interleaved,
    )


def _read_scaling(said: Published, config: Published) -> RopeScaling | None:
    kind = said.get("rope_type", str, said.get("type", str, None if "factor" in said.values else "default"))
    longest = config.get("max_position_embeddings", Positive[int], None)
    original = said.get(
        "original_max_position_embeddings",
        Positive[int],
        config.get("original_max_position_embeddings", Positive[int], longest),
    )
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=said.get("factor", Positive[float]))
        case "dynamic":
            return DynamicNtkScaling(factor=said.get("factor", Positive[float]), original_max_len=original)
        case "llama3":
            return Llama3RopeScaling(
                factor=said.get("factor", Positive[float]),
                low_freq_factor=said.get("low_freq_factor", Positive[float]),
                high_freq_factor=said.get("high_freq_factor", Positive[float]),
                original_max_len=original,
            )
        case "yarn":
            mscale, of_all = (said.get(key, NotNegative[float], 0.0) for key in ("mscale", "mscale_all_dim"))
            both = bool(mscale and of_all)  # transformers passes over one alone
            return YarnScaling(
                factor=said.get("factor", Positive[float]),
                original_max_len=original,
                beta_fast=said.get("beta_fast", Positive[float], 32.0),
                beta_slow=said.get("beta_slow", Positive[float], 1.0),
                truncate=said.get("truncate", bool, True),
                attention_factor=said.get("attention_factor", Positive[float], None),
                mscale=mscale if both else 1.0,
                mscale_all_dim=of_all if both else 0.0,
            )
        case "longrope" | "su":
            short, long = (tuple(said.get(key, list)) for key in ("short_factor", "long_factor"))
            return LongRopeScaling(
                short_factors=short,
                long_factors=long,
                original_max_len=original,
                attention_factor=said.get("attention_factor", Positive[float], None),
            )
        case None:
            raise UserError(f"{said.place}: has a factor and no rope_type, which says what it is of; add rope_type")
        case _:
            raise UserError(
                f"{said.place}.rope_type = {kind!r} is not supported; it may be default, dynamic, linear, llama3, "
                "longrope, yarn"
            )


def write_rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    """The published spelling, which every version of transformers reads."""
    values: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.dims is not None:
        values["partial_rotary_factor"] = rope.dims / head_dim
    if rope.scaling is not None:
        values["rope_scaling"] = _write_scaling(rope.scaling)
    return values


def _write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    match scaling:
        case LinearScaling(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case DynamicNtkScaling(factor=factor, original_max_len=original):
            return {"rope_type": "dynamic", "factor": factor, "original_max_position_embeddings": original}
        case Llama3RopeScaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_len,
            }
        case YarnScaling():
            both = scaling.mscale_all_dim > 0
            values = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_len,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
                "attention_factor": scaling.attention_factor,
                "mscale": scaling.mscale if both else None,
                "mscale_all_dim": scaling.mscale_all_dim if both else None,
            }
            return {key: value for key, value in values.items() if value is not None}
        case LongRopeScaling():
            values = {
                "rope_type": "longrope",
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
                "original_max_position_embeddings": scaling.original_max_len,
                "attention_factor": scaling.attention_factor,
            }
            return {key: value for key, value in values.items() if value is not None}
        case NtkScaling():
            return {"rope_type": "ntk"}  # they have no word for it: what reads it again refuses it
        case _:
            assert_never(scaling)


def pattern(layers: Sequence[BlockConfig]) -> tuple[BlockConfig, ...]:
    """The shortest row of blocks whose repetition is all of `layers`."""
    lengths = (n for n in range(1, len(layers) + 1) if len(layers) % n == 0)
    return tuple(layers[: next(n for n in lengths if list(layers) == list(layers[:n]) * (len(layers) // n))])
