"""Adapters in peft's format: what peft says of them, and what is refused. `peft_reference.py` asks peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft_reference
import pytest
import safetensors.numpy
from helpers import one_device
from published import MODELS, ids

from maxlm.config import Dtype, ExecutionConfig, ModelConfig
from maxlm.hub.families import FAMILIES
from maxlm.hub.folder import open_folder
from maxlm.hub.models import pieces_of
from maxlm.hub.names import Names
from maxlm.hub.peft import FILE, PeftAdapter, over, read_peft, write_peft
from maxlm.inference.language_model import LanguageModel
from maxlm.models import abstract_parameters


def opened(name: str, folder: Path) -> tuple[ModelConfig, Any, Names, PeftAdapter]:
    """The base of an adapter, its parameters, its family's names, and the adapter."""
    base = peft_reference.ADAPTERS[name][0]
    peft_reference.write_model(MODELS[base], folder / "base")
    peft_reference.write_adapter(name, folder / "adapter")
    weights = open_folder(folder / "base")
    parameters = weights.parameters(abstract_parameters(weights.model, one_device()))
    names = FAMILIES[MODELS[base]["model_type"]].names_of(weights.model)
    return weights.model, parameters, names, read_peft(folder / "adapter", weights.model, names)


def logits(model: ModelConfig, parameters: Any) -> np.ndarray:
    return np.asarray(LanguageModel(model, ExecutionConfig(dtype=Dtype.FLOAT32), one_device(), parameters)(ids()))


@pytest.mark.parametrize("name", peft_reference.ADAPTERS)
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    base, parameters, names, read = opened(name, tmp_path)
    model, parameters = over(base, parameters, read)
    found, theirs = logits(model, parameters), peft_reference.reference(name)
    np.testing.assert_allclose(found, theirs, atol=2e-4 * np.abs(theirs).max())
    assert np.abs(logits(base, {k: v for k, v in parameters.items() if k != "adapter"}) - theirs).max() > 0.1
    assert all(norm > 0 for norm in read.norms.values())
    write_peft(tmp_path / "again", model, pieces_of(parameters), names, base=None)
    again = read_peft(tmp_path / "again", base, names)
    assert {key: norm for key, norm in again.norms.items() if norm} == pytest.approx(read.norms, rel=1e-5)
    if name != "adalora":  # that is written as plain LoRA
        old, new = (safetensors.numpy.load_file(tmp_path / one / FILE) for one in ("adapter", "again"))
        if name != "patterns":  # there layers without an adapter get one of zeros
            assert old.keys() == new.keys()
            assert all(np.allclose(old[key], new[key], rtol=1e-6) for key in old)
