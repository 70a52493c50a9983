"""What the files of a published model say of where its texts begin and end, beside its tokenizer's own."""

from __future__ import annotations

from pathlib import Path

from maxlm.config import UserError
from maxlm.config.json_file import read_object


def names_beside(path: Path) -> tuple[list[str], list[str]]:
    """The names of the end and the beginning of a text that a `tokenizer_config.json` in the same folder gives."""
    try:
        values = read_object(path.with_name("tokenizer_config.json"))
    except UserError:  # it is not ours, and may be missing
        return [], []
    found = []
    for key in ("eos_token", "bos_token"):
        value = values.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        found.append([name] if isinstance(name, str) else [])
    return found[0], found[1]


def eos_ids_beside(folder: Path) -> list[int]:
    """All `eos_token_id` of the generation_config.json of a published model; if it says none, of its config.json.

    Raises:
        UserError: the file is damaged, or they are no whole numbers.
    """
    for file in (folder / "generation_config.json", folder / "config.json"):
        said = read_object(file, "an object, as the model came with it") if file.is_file() else {}
        if (value := said.get("eos_token_id")) is not None:
            ids: list[int] = value if isinstance(value, list) else [value]
            if not all(type(i) is int for i in ids):
                raise UserError(
                    f"{file}: eos_token_id = {value!r} must be a whole number or a list of them; restore the file"
                )
            return ids
    return []
