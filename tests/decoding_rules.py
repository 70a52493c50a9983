"""Cases of decoding rules that transformers has, and what its logits processors make of them, in its own order.

`python tests/decoding_rules.py` asks transformers (extra `parity`), and stores its answers in decoding_rules.npz.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxlm.config import SamplingConfig

ANSWERS = Path(__file__).with_name("decoding_rules.npz")
V, PROMPT, LENGTH = 48, 9, 24
END = 5


class Case(NamedTuple):
    """What a request asks for."""

    sampling: SamplingConfig
    bias: tuple[tuple[int, float], ...] = ()
    banned: tuple[tuple[int, ...], ...] = ()


CASES = {
    "temperature": Case(SamplingConfig(temperature=0.7)),
    "top_k": Case(SamplingConfig(top_k=7)),
    "top_p": Case(SamplingConfig(top_p=0.8)),
    "min_p": Case(SamplingConfig(min_p=0.1)),
    "typical_p": Case(SamplingConfig(typical_p=0.5)),
    "repetition": Case(SamplingConfig(repetition_penalty=1.3)),
    "reward": Case(SamplingConfig(repetition_penalty=0.7)),
    "unigrams": Case(SamplingConfig(no_repeat_ngram=1)),
    "bigrams": Case(SamplingConfig(no_repeat_ngram=2)),
    "trigrams": Case(SamplingConfig(no_repeat_ngram=3)),
    "minimum": Case(SamplingConfig(min_new_tokens=16)),
    "minimum reached": Case(SamplingConfig(min_new_tokens=15)),
    "bias": Case(SamplingConfig(), bias=((3, 2.5), (40, -4.0))),
    "banned": Case(SamplingConfig(), banned=((7,), (0, 1), (1, 0, 1, 2), (2, 2, 2, 2, 2))),
    "hot": Case(SamplingConfig(temperature=1.6, top_k=30, top_p=0.9, min_p=0.02, typical_p=0.9)),
    "cold": Case(SamplingConfig(temperature=0.6, top_k=20, top_p=0.95, min_p=0.001, typical_p=0.7)),
    "everything": Case(
        SamplingConfig(
            temperature=1.3, top_k=25, top_p=0.97, min_p=0.01, typical_p=0.95, repetition_penalty=1.2,
            no_repeat_ngram=3, min_new_tokens=20,
        ),
        bias=((0, 1.0), (1, -1.0), (17, 3.0)),
        banned=((9,), (1, 2)),
    ),
}  # fmt: skip


def logits_and_history(name: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 [V] and int32 [LENGTH] of few ids, so that they come often."""
    rng = np.random.default_rng(list(CASES).index(name))
    history = rng.integers(0, 3, LENGTH, dtype=np.int32)
    if name == "banned":
        history[-3:] = 1, 0, 1
    return rng.normal(0, 2, V).astype(np.float32), history


def answer_of_transformers(name: str, case: Case) -> np.ndarray:
    """float32 [V] after its processors."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes))
    sampling = case.sampling
    asked = GenerationConfig(
        do_sample=True, num_beams=1, eos_token_id=END, pad_token_id=0, temperature=sampling.temperature,
        top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p or None, typical_p=sampling.typical_p,
        repetition_penalty=sampling.repetition_penalty, no_repeat_ngram_size=sampling.no_repeat_ngram,
        min_new_tokens=sampling.min_new_tokens or None, sequence_bias={(i,): b for i, b in case.bias} or None,
        bad_words_ids=[list(word) for word in case.banned] or None,
    )  # fmt: skip
    model._prepare_special_tokens(asked)
    processors = model._get_logits_processor(asked, input_ids_seq_length=PROMPT, device="cpu")
    logits, history = logits_and_history(name)
    return processors(torch.from_numpy(history)[None].long(), torch.from_numpy(logits)[None])[0].numpy()


def main() -> None:
    found = {name: answer_of_transformers(name, case) for name, case in CASES.items()}
    for name, answer in found.items():
        print(f"{name}: {np.isfinite(answer).sum()} of {V} left")
    np.savez_compressed(ANSWERS, **found)


if __name__ == "__main__":
    sys.exit(main())
