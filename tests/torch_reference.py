"""Three steps of supervised fine-tuning and of DPO, written by hand in torch, and their text.

`python tests/torch_reference.py` runs them in float64 with torch and stores what they come to in torch_steps.npz. They
share nothing with the code that is tested: LLaMA is written out, every text is read by itself, without packing, and
losses, clipping and AdamW are a few lines each.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from published import values

STEPS_FILE = Path(__file__).with_name("torch_steps.npz")
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
N_STEPS, LEARNING_RATE, B1, B2, EPS, DECAY, CLIP, BETA = 3, 1e-2, 0.9, 0.95, 1e-4, 0.1, 1.0, 0.3
TASKS = ("sft", "dpo")


class Read(NamedTuple):
    """A text."""

    ids: list[int]
    counts: list[bool]
    """Of each token, whether it is learned."""


class Steps(NamedTuple):
    """What a task comes to."""

    losses: np.ndarray
    """float64 [N_STEPS], each before its update."""
    gradients: dict[str, np.ndarray]
    """float32, of the first step, before clipping, by names of tensors."""
    parameters: dict[str, np.ndarray]
    """float32, after all of them."""


def texts(step: int) -> list[tuple[Read, Read]]:
    """Two completions each of prompts, the better one first; turns of two speakers, of which one counts."""
    rng, found = np.random.default_rng([5, step]), []
    for _ in range(5):
        prompt = rng.integers(1, CONFIG["vocab_size"], rng.integers(2, 5)).tolist()
        pair = []
        for _ in range(2):
            first, asked, second = (rng.integers(1, CONFIG["vocab_size"], rng.integers(1, 4)).tolist() for _ in "abc")
            counts = [False] * len(prompt) + [True] * len(first) + [False] * len(asked) + [True] * len(second)
            pair.append(Read(prompt + first + asked + second, counts))
        found.append((pair[0], pair[1]))
    return found


def shapes() -> dict[str, tuple[int, ...]]:
    """Of all tensors."""
    D, F, V = (CONFIG[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = D // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    of_layer = {
        **{f"self_attn.{name}_proj.weight": (rows, D) for name, rows in (("q", D), ("k", kv), ("v", kv), ("o", D))},
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return found


def begin(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What is learned begins near the reference, which `values` has."""
    return values(name, shape) + np.float32(0.2) * (values(f"learned {name}", shape) - values(f"less {name}", shape))


def stored(task: str) -> Steps:
    """What torch says."""
    with np.load(STEPS_FILE, allow_pickle=False) as file:
        of = lambda what: {name: file[f"{task}/{what}/{name}"] for name in shapes()}
        return Steps(file[f"{task}/losses"], of("gradients"), of("parameters"))


def log_probs(weights: Any, ids: list[int]) -> Any:
    """Of each token but the first, given those before it: [T - 1]."""
    import torch

    n, kv, T = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], len(ids)
    H = CONFIG["hidden_size"] // n
    places, turns = torch.arange(T, dtype=torch.float64), 1e4 ** (-torch.arange(0, H, 2, dtype=torch.float64) / H)
    angles = places[:, None] * turns
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    rotated = lambda x: x * cos + torch.cat([-x[..., H // 2 :], x[..., : H // 2]], -1) * sin
    normed = lambda x, name: x / torch.sqrt((x * x).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]) * weights[name]
    x = weights["model.embed_tokens.weight"][torch.tensor(ids)]
    for layer in range(CONFIG["num_hidden_layers"]):
        of = lambda name, layer=layer: f"model.layers.{layer}.{name}.weight"
        h = normed(x, of("input_layernorm"))
        q, k, v = (h @ weights[of(f"self_attn.{name}_proj")].T for name in "qkv")
        q, k, v = rotated(q.view(T, n, H)), rotated(k.view(T, kv, H)), v.view(T, kv, H)
        k, v = (one.repeat_interleave(n // kv, 1) for one in (k, v))
        scores = torch.einsum("tnh,snh->nts", q, k) / H**0.5
        ahead = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
        shares = torch.softmax(scores.masked_fill(ahead, float("-inf")), -1)
        x = x + torch.einsum("nts,snh->tnh", shares, v).reshape(T, -1) @ weights[of("self_attn.o_proj")].T
        h = normed(x, of("post_attention_layernorm"))
        gate = h @ weights[of("mlp.gate_proj")].T
        x = x + (gate * torch.sigmoid(gate) * (h @ weights[of("mlp.up_proj")].T)) @ weights[of("mlp.down_proj")].T
    logits = normed(x, "model.norm.weight")[:-1] @ weights["lm_head.weight"].T
    each = logits - torch.logsumexp(logits, -1, keepdim=True)
    return each[torch.arange(T - 1), torch.tensor(ids[1:])]


def total(weights: Any, text: Read) -> Any:
    """Of what counts in a text, the sum."""
    import torch

    return (log_probs(weights, text.ids) * torch.tensor(text.counts[1:], dtype=torch.float64)).sum()


def loss(task: str, weights: Any, reference: Any, step: int) -> Any:
    """Of a batch: the mean over tokens that count, or over pairs."""
    import torch

    pairs = texts(step)
    if task == "sft":
        every = [text for pair in pairs for text in pair]
        return -sum(total(weights, text) for text in every) / sum(sum(text.counts) for text in every)
    ratio = lambda text: total(weights, text) - total(reference, text).detach()
    margins = [BETA * (ratio(better) - ratio(worse)) for better, worse in pairs]
    return -torch.stack([torch.log(torch.sigmoid(margin)) for margin in margins]).mean()


def steps(task: str) -> Steps:
    """Adam with decoupled weight decay, of all but norms, after clipping by the global norm."""
    import torch

    reference = {name: torch.from_numpy(values(name, shape)).double() for name, shape in shapes().items()}
    weights = {name: torch.from_numpy(begin(name, shape)).double() for name, shape in shapes().items()}
    first, second = ({name: torch.zeros_like(one) for name, one in weights.items()} for _ in range(2))
    losses, gradients = list[float](), dict[str, np.ndarray]()
    for t in range(1, N_STEPS + 1):
        for one in weights.values():
            one.requires_grad_()
        found = loss(task, weights, reference, t)
        slopes = dict(zip(weights, torch.autograd.grad(found, list(weights.values())), strict=True))
        losses.append(float(found.detach()))
        gradients = gradients or {name: one.float().numpy() for name, one in slopes.items()}
        norm = torch.sqrt(sum((one**2).sum() for one in slopes.values()))
        for name, one in slopes.items():
            one = one / torch.clamp(norm / CLIP, min=1)
            first[name] = B1 * first[name] + (1 - B1) * one
            second[name] = B2 * second[name] + (1 - B2) * one**2
            move = first[name] / (1 - B1**t) / (torch.sqrt(second[name] / (1 - B2**t)) + EPS)
            decay = 0.0 if "norm" in name else DECAY
            weights[name] = (weights[name] - LEARNING_RATE * (move + decay * weights[name])).detach()
    return Steps(np.array(losses), gradients, {name: one.float().numpy() for name, one in weights.items()})


def main() -> None:
    found = dict[str, np.ndarray]()
    for task in TASKS:
        said = steps(task)
        print(f"{task}: losses {said.losses}")
        found[f"{task}/losses"] = said.losses
        for what, arrays in (("gradients", said.gradients), ("parameters", said.parameters)):
            found |= {f"{task}/{what}/{name}": one for name, one in arrays.items()}
    np.savez_compressed(STEPS_FILE, **found)


if __name__ == "__main__":
    sys.exit(main())
