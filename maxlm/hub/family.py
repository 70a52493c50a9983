"""What a family of published models is: how its config.json reads and what its tensors are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maxlm.config import ModelConfig
from maxlm.hub.names import Names
from maxlm.hub.published import Published


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """One `model_type` of config.json."""

    model_type: str
    """As config.json has it."""
    architecture: str
    """The class that reads it, for `architectures` in config.json; what `write` says goes before."""
    read: Callable[[Published], ModelConfig]
    """The model that a config.json describes."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """The other way: keys of config.json without model_type and architectures. It need not look whether the family can
    say all of the model: what it wrote is read again and compared."""
    names: Names | Callable[[ModelConfig], Names]
    """A table, or one for each kind of model."""
    needs_code: bool = False
    """transformers has no such class: it reads the family with code that comes with a model (`auto_map`), which is
    never run here."""

    def names_of(self, model: ModelConfig) -> Names:
        return self.names if isinstance(self.names, Names) else self.names(model)
