"""Adapters with learned vectors, in peft's format: prompts, prefixes, and LLaMA-Adapter's.

Prompt tuning, P-tuning and prefix tuning have one tensor, `prompt_embeddings`: [P, D]; of prefixes [P, layers * 2 * K *
H], layer by layer the keys and then the values. What made them while they were learned is not in it. LLaMA-Adapter has
at each attention that it changes `adaption_prompt` [1, P, D] and `adaption_gate` [1], one for all heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxlm import shapes
from maxlm.config import (
    Adapter,
    GroupedQuery,
    LlamaAdapter,
    ModelConfig,
    PrefixTuning,
    PromptTuning,
    UserError,
)
from maxlm.hub.folder import Pieces
from maxlm.hub.names import Names, Piece, tensors
from maxlm.hub.peft_files import BASE_MODEL, PeftAdapter, Values, exactly, require_shape, write_files
from maxlm.hub.peft_settings import CONFIG
from maxlm.models.adapters import base_of

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT")
"""Values of peft_type of these kinds."""
_TENSOR = "prompt_embeddings"


def read_prompts(folder: Path, said: Mapping[str, Any], base: ModelConfig, names: Names) -> PeftAdapter:
    """As `read_peft`.

    Args:
        folder: with CONFIG and FILE.
        said: what the first says, with a peft_type of `PROMPTS`.
        base: the model that it is for.
        names: what the family of that calls its tensors.

    Raises:
        UserError: a tensor is missing, not expected or of another shape, or the settings are not those of the base.
    """
    for key in ("modules_to_save", "exclude_modules"):
        if said.get(key):
            raise UserError(f"{folder / CONFIG}: {key} does not go with peft_type = {said['peft_type']}; leave it out")
    if said["peft_type"] == "ADAPTION_PROMPT":
        return _read_attended(folder, said, base, names)
    length = _count(folder, said, "num_virtual_tokens")
    if said.get("num_transformer_submodules") not in (None, 1):
        raise UserError(f"{folder / CONFIG}: num_transformer_submodules must be 1, for a decoder; is of another model")
    with exactly(folder, [_TENSOR]) as files:
        rows = np.asarray(files.read(_TENSOR), np.float32)
    if said["peft_type"] == "PREFIX_TUNING":
        kind: PrefixTuning | PromptTuning = PrefixTuning(length=length, hidden=None)
        made = _with(base, kind)
        heads, head_dim = _widths(base)
        said_heads, said_width = (said.get(key) for key in ("num_attention_heads", "token_dim"))
        if said_heads not in (None, heads) or said_width not in (None, heads * head_dim):
            raise UserError(
                f"{folder / CONFIG}: num_attention_heads = {said_heads} and token_dim = {said_width}, but keys of this "
                f"base have {heads} heads of {head_dim}; use the model that the adapter was trained on"
            )
        layers = _keys_and_values(made, names)
        require_shape(folder, _TENSOR, rows, (length, len(layers) * 2 * heads * head_dim))
        parts = rows.reshape(length, len(layers), 2, heads, head_dim)
        placed = [(piece, parts[:, i, j]) for i, both in enumerate(layers) for j, piece in enumerate(both)]
        norms = {f"{i}.self_attn": float(np.linalg.norm(parts[:, i])) for i in range(len(layers))}
    else:
        kind = PromptTuning(length=length)
        made = _with(base, kind)
        require_shape(folder, _TENSOR, rows, (length, base.d_model))
        placed = [(Piece(_own(made, "embed", "rows"), ()), rows / np.float32(base.embedding_scale or 1))]
        norms = {_TENSOR: float(np.linalg.norm(rows))}
    return PeftAdapter(adapter=Adapter(kind=kind), arrays=_arrays(made, placed), norms=norms)


def write_prompts(
    folder: Path, config: ModelConfig, pieces: Pieces, names: Names, base: str | None
) -> dict[str, float]:
    """As `write_peft`.

    Args:
        folder: new.
        config: the model, with an adapter whose vectors nothing makes any longer (`maxlm.models.adapters.learned`).
        pieces: parts of the arrays of its parameters.
        names: what the family of its base calls the tensors.
        base: where that is, for other programs; None: they are told.

    Raises:
        UserError: peft computes something else of it.
    """
    adapter = config.adapter
    assert adapter is not None
    if adapter.full:
        raise UserError(
            f"model.adapter.full = {adapter.full} has no place beside {type(adapter.kind).__name__} in peft's files; "
            "use the run folder"
        )
    read = lambda wanted: [np.asarray(one, np.float32) for one in pieces(wanted)]
    of_decoder = {"num_transformer_submodules": 1, "num_layers": config.n_layers}
    match adapter.kind:
        case PromptTuning(length=length):
            (rows,) = read([Piece(_own(config, "embed", "rows"), ())])
            rows = rows * np.float32(config.embedding_scale or 1)
            heads = config.layers[0].attention.n_heads
            shape = {"num_virtual_tokens": length, "token_dim": config.d_model, "num_attention_heads": heads}
            write_files(folder, base, {"peft_type": "PROMPT_TUNING", **of_decoder, **shape}, {_TENSOR: rows})
            return {_TENSOR: float(np.linalg.norm(rows))}
        case PrefixTuning(length=length):
            heads, head_dim = _widths(config)
            layers = _keys_and_values(config, names)
            parts = np.stack([np.stack(read(both), 1) for both in layers], 1)  # [P, layers, 2, K, H]
            shape = {"num_virtual_tokens": length, "token_dim": heads * head_dim, "num_attention_heads": heads}
            said = {"peft_type": "PREFIX_TUNING", "prefix_projection": False, **of_decoder, **shape}
            write_files(folder, base, said, {_TENSOR: parts.reshape(length, -1)})
            return {f"{i}.self_attn": float(np.linalg.norm(parts[:, i])) for i in range(len(layers))}
        case LlamaAdapter() as kind:
            return _write_attended(folder, config, kind, read, names, base)
        case other:
            raise AssertionError(f"{type(other).__name__} has no learned vectors")


class _Attended(NamedTuple):
    """What LLaMA-Adapter has in one layer."""

    module: str
    """The attention's name in peft's files, with a dot behind it."""
    rows: Piece
    """[P, D]."""
    gate: Piece
    """[1]."""


def _read_attended(folder: Path, said: Mapping[str, Any], base: ModelConfig, names: Names) -> PeftAdapter:
    kind = LlamaAdapter(length=_count(folder, said, "adapter_len"), one_gate=True)
    made, n = _with(base, kind), _count(folder, said, "adapter_layers")
    if n > base.n_layers:
        raise UserError(f"{folder / CONFIG}: adapter_layers = {n}, but this base has {base.n_layers} layers")
    if said.get("target_modules") not in (None, "self_attn"):
        raise UserError(f'{folder / CONFIG}: target_modules = {said["target_modules"]!r} must be "self_attn"')
    topmost = _attended(made, names)[-n:]
    wanted = [one.module + name for one in topmost for name in ("adaption_prompt", "adaption_gate")]
    placed, norms = list[tuple[Piece, Values]](), dict[str, float]()
    with exactly(folder, wanted) as files:
        for one in topmost:
            rows, gate = (
                np.asarray(files.read(one.module + name), np.float32) for name in ("adaption_prompt", "adaption_gate")
            )
            require_shape(folder, f"{one.module}adaption_prompt", rows, (1, kind.length, base.d_model))
            require_shape(folder, f"{one.module}adaption_gate", gate, (1,))
            placed += [(one.rows, rows[0]), (one.gate, gate)]
            norms[_short(one)] = float(np.linalg.norm(rows) * abs(gate[0]))
    return PeftAdapter(adapter=Adapter(kind=kind), arrays=_arrays(made, placed), norms=norms)


def _write_attended(
    folder: Path, config: ModelConfig, kind: LlamaAdapter, read: Any, names: Names, base: str | None
) -> dict[str, float]:
    """Layers at the bottom that have nothing are left out: those that came so, and learn nothing."""
    if not kind.one_gate:
        raise UserError(
            "model.adapter.kind.one_gate = False: peft has one gate for all heads of a layer; train with one_gate=True "
            "or use the run folder"
        )
    found = [(one, *read([one.rows, one.gate])) for one in _attended(config, names)]
    while len(found) > 1 and not (found[0][1].any() or found[0][2].any()):
        found = found[1:]
    out = dict[str, Values]()
    for one, rows, gate in found:
        out |= {f"{one.module}adaption_prompt": rows[None], f"{one.module}adaption_gate": gate}
    shape = {"adapter_len": kind.length, "adapter_layers": len(found)}
    write_files(folder, base, {"peft_type": "ADAPTION_PROMPT", "target_modules": "self_attn", **shape}, out)
    return {_short(one): float(np.linalg.norm(rows) * abs(gate[0])) for one, rows, gate in found}


def _attended(config: ModelConfig, names: Names) -> list[_Attended]:
    """Of all layers, from the first to the last.

    Raises:
        UserError: peft computes something else of this base.
    """
    for block in config.layers:
        attention = block.attention
        assert isinstance(attention, GroupedQuery)
        if attention.n_heads * attention.head_dim != config.d_model:
            raise UserError(
                f"model: {attention.n_heads} heads of {attention.head_dim} are not the width {config.d_model}, which "
                "peft's adaption prompts take them to be; use the run folder"
            )
        if attention.out_bias or attention.qk_norm is not None or attention.scale is not None:
            raise UserError(
                "model: peft's adaption prompts are those of LLaMA and Mistral, without a bias behind attention, norms "
                "of queries and keys, or a scale of its own; use the run folder"
            )
    found = []
    for tensor in tensors(base_of(config), names):
        if tensor.name.endswith("self_attn.q_proj.weight"):
            (part,) = tensor.parts
            module = BASE_MODEL + tensor.name.removesuffix("q_proj.weight")
            rows, gate = (Piece(_own(config, part.array.name, name), part.at) for name in ("rows", "gate"))
            found.append(_Attended(module, rows, gate))
    if len(found) != config.n_layers:
        raise UserError(
            "model: peft's adaption prompts are those of LLaMA and Mistral, with self_attn.q_proj; use LoRA"
        )
    return found


def _keys_and_values(config: ModelConfig, names: Names) -> list[tuple[Piece, Piece]]:
    """The vectors of each layer, from the first to the last: [P, K, H] each."""
    parts = [part for tensor in tensors(base_of(config), names) for part in tensor.parts]
    of = lambda end: [
        Piece(_own(config, part.array.name, "rows"), part.at) for part in parts if part.array.name.endswith(end)
    ]
    return list(zip(of("attention/k_proj"), of("attention/v_proj"), strict=True))


def _widths(config: ModelConfig) -> tuple[int, int]:
    """Heads of the keys, and their width, of which peft knows one for all layers."""
    found = {(block.attention.n_kv_heads, block.attention.value_head_dim) for block in config.layers}
    if len(found) > 1:
        raise UserError(
            f"model: keys of layers have different shapes, {sorted(found)}, and peft has one; use the run folder"
        )
    return found.pop()


def _with(base: ModelConfig, kind: PromptTuning | PrefixTuning | LlamaAdapter) -> ModelConfig:
    return dataclasses.replace(base, adapter=Adapter(kind=kind))


def _own(config: ModelConfig, of: str, name: str) -> shapes.Array:
    """What the adapter has beside an array of the base."""
    wanted = f"{shapes.PREFIX}/{of}/{name}"
    return next(array for array in shapes.arrays(config) if array.name == wanted)


def _arrays(made: ModelConfig, placed: Sequence[tuple[Piece, Values]]) -> dict[str, Values]:
    """All arrays of the adapter; zeros where it has nothing."""
    found = {
        array.name: np.zeros(array.shape, np.float32)
        for array in shapes.arrays(made)
        if array.name.startswith(f"{shapes.PREFIX}/")
    }
    for piece, values in placed:
        found[piece.array.name][piece.at] = values
    return found


def _short(one: _Attended) -> str:
    return one.module.removeprefix(BASE_MODEL).removesuffix(".")


def _count(folder: Path, said: Mapping[str, Any], key: str) -> int:
    value = said.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{folder / CONFIG}: {key} = {value!r} is not as peft writes it; must be a number from 1 on")
    return value
