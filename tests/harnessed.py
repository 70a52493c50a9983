"""A tiny published model with words, and what lm-eval's own adapter for Hugging Face models says of it.

`python tests/harnessed.py` asks that adapter (it needs torch and transformers, of the extra `parity`), and stores its
answers in harnessed.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import published
import tokenizers
from published import V

ANSWERS = Path(__file__).with_name("harnessed.json")
SPECIAL = ["<bos>", "<eos>"]
LETTERS = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz0123456789 .,:?\nABCDEFGHIJKL"]
MERGES = [("t", "h"), (" ", "t"), (" t", "h"), ("h", "e"), ("i", "n"), (" ", "a"), ("e", "r"), ("a", "n")]

LONG = "the inner man has ten other things in hand, and there are no more of them here. "
"""Of more tokens than the model takes."""

LIKELIHOODS: list[tuple[str, str]] = [
    ("the", " man"),
    ("the ", "man"),  # the blank goes to the continuation
    ("2 and 2:", " 4"),
    ("", "an inner thing"),
    ("", "a"),
    ("is it? ", "yes\n"),
    (LONG, "the"),  # the context loses its beginning
    (LONG[:33], " there in the"),
    (LONG[:20], LONG[20:45]),
    ("a  ", " the"),
    ("the man", "am9"),  # what the model without a beginning of texts finds likeliest
]
ROLLING = ["the man", "a", LONG[:36], LONG, LONG + LONG, "", "2"]
GENERATION: list[tuple[str, dict[str, Any]]] = [
    ("the man", {"until": ["\n"], "max_gen_toks": 12}),
    ("the man", {"until": ["e", "q"], "max_gen_toks": 12}),
    (LONG, {"until": [], "max_gen_toks": 9}),  # the prompt loses its beginning
    ("2 and 2:", {"until": "0", "max_new_tokens": 6, "do_sample": False}),
    ("a", {"until": ["."], "max_gen_toks": 12, "temperature": 0.0}),
]


def write_folder(folder: Path, *, bos: bool) -> None:
    """The model, with a tokenizer that writes `<bos>` before a text, or does not."""
    published.write_model(published.MODELS["llama"], folder)
    merged = ["".join(pair) for pair in MERGES]
    vocabulary = {token: i for i, token in enumerate([*LETTERS, *merged])}
    assert len(vocabulary) == V  # so that no id is without a text
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, MERGES))
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(SPECIAL)
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
        )
    made.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))


def requests(cases: Any) -> list[Any]:
    """As lm-eval hands them over."""
    from lm_eval.api.instance import Instance

    kind: Any = "loglikelihood"
    return [Instance(request_type=kind, doc={}, arguments=case, idx=i) for i, case in enumerate(cases)]


def answers(model: Any) -> dict[str, Any]:
    """Of an adapter."""
    return {
        "loglikelihood": model.loglikelihood(requests(LIKELIHOODS)),
        "rolling": model.loglikelihood_rolling(requests([(text,) for text in ROLLING])),
        "generate": model.generate_until(requests(GENERATION)),
    }


def main() -> None:
    import transformers
    from lm_eval.models.huggingface import HFLM

    found = {}
    for name, bos in (("plain", False), ("bos", True)):
        with tempfile.TemporaryDirectory() as place:
            write_folder(Path(place), bos=bos)
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
            model = published.open_in_transformers(Path(place))
            found[name] = answers(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3))
    ANSWERS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
