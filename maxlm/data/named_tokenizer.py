"""The tokenizer that a word on a command line means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from maxlm.config import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, TokenizerConfig, UserError
from maxlm.data.tokenizers import saved_tokenizer

_BYTES = "bytes"


def named_tokenizer(name: str, eos: str | None = None, bos: str | None = None) -> TokenizerConfig:
    """The tokenizer that a word means: `bytes`, a file, a folder that `Tokenizer.save` wrote, or a published model's.

    Args:
        name: the word.
        eos: the token that ends a document, of a tokenizer.json alone; None: found by its name.
        bos: the token that begins one; empty: none; None: found by its name.

    Raises:
        UserError: it means none, or eos and bos are those of the tokenizer itself.
    """
    path = Path(name)
    if name == _BYTES:
        tokenizer: TokenizerConfig = ByteTokenizer()
    elif (path / "tokenizer_config.json").is_file():
        tokenizer = HuggingFaceTokenizer(path=str(path / "tokenizer.json"))
    elif path.is_dir():
        tokenizer = saved_tokenizer(path)
    elif path.suffix in (".json", ".tiktoken"):
        tokenizer = HuggingFaceTokenizer(path=name)
    elif path.suffix == ".model":
        tokenizer = SentencePieceTokenizer(path=name)
    else:
        missing = "" if path.exists() else "is neither a file nor a folder; "
        raise UserError(
            f"--tokenizer {name}: {missing}must be train, bytes, a .model file, a .json file, qwen.tiktoken or a "
            "folder with a tokenizer"
        )
    changes = {key: token for key, token in (("eos", eos), ("bos", bos)) if token is not None}
    if not changes:
        return tokenizer
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise UserError(f"--tokenizer {name}: has its own end of a document; leave out --eos and --bos")
    return replace(tokenizer, **changes)
