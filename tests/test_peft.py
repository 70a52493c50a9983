"""Adapters in peft's format: what peft says of them, and what is refused. `peft_reference.py` asks peft."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft_reference
import published
import pytest
import safetensors.numpy
from helpers import one_device
from published import MODELS, ids
from run_folder import BYTE_MODEL, make_run

import maxlm
from maxlm import convert
from maxlm.checkpoint.store import named_leaves
from maxlm.config import (
    Adapter,
    Bottleneck,
    ChosenModel,
    Dtype,
    ExecutionConfig,
    LlamaAdapter,
    Lora,
    MlpEncoder,
    ModelConfig,
    PrefixTuning,
    PromptTuning,
    UserError,
)
from maxlm.hub.adapted import load_adapters, write_adapter
from maxlm.hub.converting import open_run
from maxlm.hub.families import FAMILIES
from maxlm.hub.folder import family_of, open_folder
from maxlm.hub.models import pieces_of
from maxlm.hub.names import Names
from maxlm.hub.peft import over, read_peft, write_peft
from maxlm.hub.peft_files import FILE, PeftAdapter
from maxlm.hub.peft_settings import CONFIG
from maxlm.inference.language_model import LanguageModel
from maxlm.models import abstract_parameters, declared
from maxlm.models.adapters import learned
from maxlm.shapes import PREFIX

FAST = ("dora", "fused", "patterns", "ia3", "adalora_pattern", "prompt_scaled", "prefix", "llama_adapter")
"""Of each kind one, which the others are near to."""


def opened(name: str, folder: Path) -> tuple[ModelConfig, Any, Names, PeftAdapter]:
    """The base of an adapter, its parameters, its family's names, and the adapter."""
    base = peft_reference.ADAPTERS[name][0]
    peft_reference.write_model(MODELS[base], folder / "base")
    peft_reference.write_adapter(name, folder / "adapter")
    weights = open_folder(folder / "base")
    parameters = weights.parameters(abstract_parameters(weights.model, one_device()))
    names = FAMILIES[MODELS[base]["model_type"]].names_of(weights.model)
    return weights.model, parameters, names, read_peft(folder / "adapter", weights.model, names)


def drawn(model: ModelConfig) -> Any:
    """Random parameters."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda array: rng.standard_normal(array.shape, np.float32), declared(model))


def logits(model: ModelConfig, parameters: Any) -> np.ndarray:
    return np.asarray(LanguageModel(model, ExecutionConfig(dtype=Dtype.FLOAT32), one_device(), parameters)(ids()))


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.nightly) for name in peft_reference.ADAPTERS],
)
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    base, parameters, names, read = opened(name, tmp_path)
    model, parameters = over(base, parameters, read)
    found, theirs = logits(model, parameters), peft_reference.reference(name)
    np.testing.assert_allclose(found, theirs, atol=2e-4 * np.abs(theirs).max())
    assert np.abs(published.logits(peft_reference.ADAPTERS[name][0]) - theirs).max() > 0.1
    assert all(norm > 0 for norm in read.norms.values())
    write_peft(tmp_path / "again", model, pieces_of(parameters), names, base=None)
    again = read_peft(tmp_path / "again", base, names)
    assert {key: norm for key, norm in again.norms.items() if norm} == pytest.approx(read.norms, rel=1e-5)
    old, new = (safetensors.numpy.load_file(tmp_path / one / FILE) for one in ("adapter", "again"))
    if name not in ("patterns", "adalora_pattern"):  # there layers without an adapter, triplets that went, get zeros
        assert old.keys() == new.keys()
        assert all(np.allclose(old[key], new[key], rtol=1e-6) for key in old)


def test_what_does_not_fit_the_base_is_refused(tmp_path: Path) -> None:
    model, _, names, _ = opened("lora", tmp_path)
    said = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / FILE)
    first, *others = sorted(tensors)

    def refused(match: str, tensors: dict[str, np.ndarray] = tensors, base: ModelConfig = model, **more: Any) -> None:
        (tmp_path / "adapter" / CONFIG).write_text(json.dumps(said | more))
        safetensors.numpy.save_file(tensors, tmp_path / "adapter" / FILE, {"format": "pt"})
        with pytest.raises(UserError, match=match):
            read_peft(tmp_path / "adapter", base, names)

    refused(rf"tensors are not those .*{first} is missing$", {name: tensors[name] for name in others})
    refused(r"v_proj.lora_A.default.weight is not expected", tensors | {"v_proj.lora_A.default.weight": tensors[first]})
    refused(r"lora_A.weight is not expected", target_modules=["v_proj"])
    refused(r"layers.0.* is missing.*\.\.\. and \d+ more", {first: tensors[first]})
    refused(r"has the shape \[3, 32\], for this base it must be \[3, 16\]", base=dataclasses.replace(model, d_model=16))
    refused(r"is missing", base=dataclasses.replace(model, n_layers=4))
    refused(r"peft_type = 'LOHA' must be one of LORA", peft_type="LOHA")
    refused(r"bias = \"all\" is not understood", bias="all")
    refused(r"init_lora_weights = 'pissa' has changed the base", init_lora_weights="pissa")
    refused(r"must be lists of names", target_modules=".*_proj")
    refused(r"lora_alpha = \"5\" is not as peft writes it", lora_alpha="5")
    refused(r"lora_alpha = NaN is not as peft writes it", lora_alpha=float("nan"))
    refused(r"alpha_pattern = .*Infinity.* is not as peft writes it", alpha_pattern={"q_proj": float("inf")})
    refused(r"r = 0 is not as peft writes it", r=0)
    refused(r"r = true is not as peft writes it", r=True)
    refused(r"rank_pattern = \[3\] is not as peft writes it", rank_pattern=[3])
    refused(r"says rank 1000000000 of .*_proj, whose tensors in adapter_model.safetensors have 3", r=10**9)
    refused(r"says rank 2 of .*q_proj, whose tensors", rank_pattern={"q_proj": 2})
    refused(r"modules_to_save has nope, which this base has not", modules_to_save=["nope"])
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(said))
    (tmp_path / "adapter" / FILE).rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin: is a pickle, which may run code and is not read"):
        read_peft(tmp_path / "adapter", model, names)


def test_learned_vectors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def refused(name: str, match: str, drop: str | None = None, more: Any = None, **said: Any) -> None:
        folder, (_, _, names, _) = tmp_path / name / "adapter", opened(name, tmp_path / name)
        model = open_folder(tmp_path / name / "base").model
        tensors = safetensors.numpy.load_file(folder / FILE)
        tensors = {key: one for key, one in tensors.items() if drop is None or drop not in key} | (more or {})
        safetensors.numpy.save_file(tensors, folder / FILE, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | said))
        with pytest.raises(UserError, match=match):
            read_peft(folder, model, names)

    extra = {"base_model.prompt": np.zeros(1, np.float32)}
    refused("prompt", r"base_model\.prompt is not expected", more=extra)
    refused("prompt", r"prompt_embeddings is missing", "prompt_embeddings", extra)
    refused("prompt", r"has the shape \[3, 32\], for this base it must be \[4, 32\]", num_virtual_tokens=4)
    refused("prompt", r"num_virtual_tokens = None is not as peft writes it", num_virtual_tokens=None)
    refused("prompt", r"num_transformer_submodules must be 1", num_transformer_submodules=2)
    refused("prompt", r"modules_to_save does not go with peft_type = PROMPT_TUNING", modules_to_save=["lm_head"])
    refused("prefix", r"num_attention_heads = 4 .* keys of this base have 2 heads of 16", num_attention_heads=4)
    refused("llama_adapter", r"layers\.1\.self_attn\.adaption_gate is missing", "1.self_attn.adaption_gate")
    refused("llama_adapter", r"layers\.0\.self_attn\.adaption_gate is missing", adapter_layers=3)
    refused("llama_adapter", r"adapter_layers = 4, but this base has 3 layers", adapter_layers=4)
    refused("adalora_pattern", r"rank_pattern has 3 choices for .*, but init_r = 4", init_r=4)
    refused("adalora_pattern", r"\.lora_A has the shape \[2, 32\], for this base it must be \[3, 32\]", rank_pattern={})


def test_what_peft_has_no_words_for_is_not_written(tmp_path: Path) -> None:
    def refused(base: str, adapter: Adapter, match: str) -> None:
        peft_reference.write_model(MODELS[base], tmp_path / base)
        weights = open_folder(tmp_path / base)
        model = dataclasses.replace(weights.model, adapter=adapter)
        names = FAMILIES[MODELS[base]["model_type"]].names_of(weights.model)
        with pytest.raises(UserError, match=match):
            write_peft(tmp_path / "none", model, pieces_of(drawn(model)), names, base=None)
        assert not (tmp_path / "none").exists()

    one_gate = LlamaAdapter(length=2, one_gate=True)
    refused("llama", Adapter(kind=LlamaAdapter(length=2)), "one_gate = False: peft has one gate for all heads")
    refused("llama", Adapter(kind=one_gate, full=("unembed",)), r"full = .* has no place beside LlamaAdapter")
    refused("gpt2", Adapter(kind=one_gate), "without a bias behind attention")
    refused("mistral", Adapter(kind=one_gate), "4 heads of 16 are not the width 32")
    refused("llama", Adapter(kind=Bottleneck()), "Bottleneck is not written in peft's format")


@pytest.mark.parametrize("kind", [PromptTuning(length=3, encoder=MlpEncoder(hidden=4)), PrefixTuning(length=3)])
def test_what_made_the_vectors_stays_behind(kind: PromptTuning | PrefixTuning, tmp_path: Path) -> None:
    """As a run's files have it still, and its parameters not."""
    (tmp_path / "base").mkdir()
    base = make_run(tmp_path / "base", model=BYTE_MODEL)
    made = dataclasses.replace(base.model, adapter=Adapter(kind=kind))
    without, kept = learned(made, drawn(made))
    held = dataclasses.replace(open_run(Path(base.run_dir)), model=made, parameters=lambda: kept)
    assert any("norms of what the adapter adds" in line for line in write_adapter(held, tmp_path / "peft"))
    read = read_peft(tmp_path / "peft", base.model, family_of(base.model)[0].names_of(base.model))
    assert read.adapter == without.adapter
    wanted = {name: leaf for name, leaf in named_leaves(kept).items() if name.startswith(PREFIX)}
    assert read.arrays.keys() == wanted.keys()
    assert all(np.array_equal(read.arrays[name], leaf) for name, leaf in wanted.items())


def test_the_command_converts_both_ways_and_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base").mkdir()
    base = make_run(tmp_path / "base", model=BYTE_MODEL)
    run = maxlm.load_run(base.run_dir)
    made = dataclasses.replace(base.model, adapter=Adapter(kind=Lora(rank=2, alpha=3.0)))
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(lambda array: rng.standard_normal(array.shape, np.float32), declared(made)[PREFIX])
    own = arrays["blocks"]["0"]["attention"]["v_proj"]
    change = 1.5 * np.einsum("ldr,lrkh->ldkh", own["a"], own["b"])
    names = family_of(base.model)[0].names_of(base.model)
    write_peft(tmp_path / "peft", made, pieces_of({**run.parameters, PREFIX: arrays}), names, base=None)

    go = lambda *arguments: convert.main([word.format(at=tmp_path) for word in arguments])
    go("--from", "peft:{at}/peft", "--base", "run:{at}/base/run", "--to", "run:{at}/adapted")
    assert "modules, norms of what the adapter adds from" in capsys.readouterr().out
    adapted = maxlm.load_run(tmp_path / "adapted")
    assert adapted.config.model.adapter is not None
    jax.tree.map(np.testing.assert_array_equal, adapted.parameters, {**run.parameters, PREFIX: arrays})
    sizes = lambda name: sum(file.stat().st_size for file in (tmp_path / name / "checkpoints").rglob("*"))
    assert sizes("adapted") < sizes("base/run") / 3
    go("--from", "run:{at}/adapted", "--to", "peft:{at}/again")
    old, new = (safetensors.numpy.load_file(tmp_path / one / FILE) for one in ("peft", "again"))
    assert old.keys() == new.keys() and all(np.array_equal(old[key], new[key]) for key in old)
    go("--from", "run:{at}/adapted", "--to", "run:{at}/merged")
    assert "the adapter is merged with its base" in capsys.readouterr().out
    whole = maxlm.load_run(tmp_path / "merged")
    assert whole.config.model.adapter is None
    matrix = lambda parameters: np.asarray(parameters["blocks"]["0"]["attention"]["v_proj"])
    np.testing.assert_allclose(matrix(whole.parameters), matrix(run.parameters) + change, atol=1e-5)
    with pytest.raises(UserError, match="has no adapter"):
        go("--from", "run:{at}/base/run", "--to", "peft:{at}/none")

    asked = ["peft={at}/peft", "sum=0.25*{at}/peft+0.5*{at}/adapted"]
    found = load_adapters(ChosenModel(run=base.run_dir), [one.format(at=tmp_path) for one in asked])
    jax.tree.map(np.testing.assert_array_equal, found["peft"].parameters, arrays)
    own = found["sum"].parameters["blocks"]["0"]["attention"]["v_proj"]
    np.testing.assert_allclose(np.einsum("ldr,lrkh->ldkh", own["a"], own["b"]), 0.75 * change, atol=1e-5)
