"""The model that a policy is held to: read beside it, or asked once before the first step."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from maxlm.checkpoint.reference import Reference, read_reference, run_and_step
from maxlm.config import UserError
from maxlm.data.loader import Batches
from maxlm.data.tokenizers import load_tokenizer
from maxlm.hub.models import files_fingerprint
from maxlm.processes.joining import on_rank_0
from maxlm.recipes.starting import open_source
from maxlm.sharding import Layout
from maxlm.training.preference_objective import Referenced


class ReferenceModel:
    """A run (RUN_DIR, RUN_DIR/checkpoints/STEP, either after `run:`) or a published model (hf:DIR, gguf:FILE)."""

    def __init__(self, place: str, tokenizer: str) -> None:
        """`tokenizer`: fingerprint of the policy's, which must be the reference's.

        Raises:
            UserError: there is no such model, or it has another tokenizer.
        """
        kind, _, path = place.partition(":")
        self._run = None if kind in ("hf", "gguf") else path if kind == "run" else place
        self._place, self._tokenizer, self._source = place, tokenizer, open_source(place)
        self.model = self._source.model
        if self._run is not None:
            self._compare(load_tokenizer(run_and_step(self._run)[0] / "tokenizer").fingerprint)

    def read(self, shapes: Any, saved: dict[str, Any] | None) -> tuple[Any, Reference]:
        """As of `Recipe.frozen`.

        Raises:
            UserError: it is damaged, or not what the run began with.
        """
        if self._run is not None:
            return read_reference(self._run, shapes, saved)
        kind, _, path = self._place.partition(":")
        found = Reference(folder=f"{kind}:{Path(path).absolute()}", step=0, fingerprint=files_fingerprint(Path(path)))
        if saved is not None and found.fingerprint != saved["fingerprint"]:
            raise UserError(
                f"{self._place}: its files have SHA-256 {found.fingerprint[:12]}..., this run began with "
                f"{saved['fingerprint'][:12]}... of {saved['folder']}; bring those back, or set another run_dir"
            )
        origin = self._source.read(shapes)
        self._compare(origin.tokenizer)
        return origin.parameters, found

    def _compare(self, tokenizer: str | None) -> None:
        if tokenizer is not None and tokenizer != self._tokenizer:
            raise UserError(
                f"{self._place}: the reference was trained with tokenizer {tokenizer[:12]}..., the data has "
                f"{self._tokenizer[:12]}...; prepare the data with the reference's tokenizer"
            )


def log_probs_ahead(
    parameters: Any,
    found: Reference,
    objective: Referenced,
    layout: Layout,
    batches: Batches,
    folder: Path,
    choice: str,
) -> npt.NDArray[np.float32]:
    """What the reference says of each text of `batches`, by the text's number: float32 [texts]. Read from
    `reference-HASH.npy` in `folder`, if a run before has computed it.

    Args:
        parameters, found: of `ReferenceModel.read`.
        objective: with these parameters as `frozen`.
        layout: of the run.
        batches: of one split.
        folder: of the data.
        choice: what else decides the numbers.

    Raises:
        UserError: the file is damaged, or cannot be written.
    """
    decides = f"{found.fingerprint} {batches.contents} {choice}"
    file = folder / f"reference-{hashlib.sha256(decides.encode()).hexdigest()[:16]}.npy"
    if on_rank_0("look for the reference's log-probabilities", file.is_file):
        return _read_ahead(file, batches.n_texts)
    values = np.zeros(batches.n_texts, np.float32)
    program = jax.jit(objective.reference_log_probs, out_shardings=layout.sharding())
    for batch in batches.once():
        put = {
            name: jax.device_put(batch[name], layout.sharding(layout.activation(*array.dims)))
            for name, array in objective.arrays.items()
        }
        numbers, of_texts = (np.asarray(x) for x in program(parameters, put))
        values[numbers[numbers >= 0]] = of_texts[numbers >= 0]

    def write() -> None:
        part = file.with_suffix(f".{secrets.token_hex(4)}.part")  # other runs may be writing the same
        try:
            with part.open("wb") as opened:
                np.save(opened, values)
                opened.flush()
                os.fsync(opened.fileno())
            part.replace(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise UserError(
                f"{file}: cannot be written ({error.strerror}); make the folder writable, or use "
                "task.reference_ahead = False"
            ) from error

    on_rank_0("keep the reference's log-probabilities", write)
    return values


def _read_ahead(file: Path, n_texts: int) -> npt.NDArray[np.float32]:
    try:
        values: npt.NDArray[np.float32] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: is no array of NumPy ({error}); remove it, it is computed again") from error
    if values.shape != (n_texts,) or values.dtype != np.float32 or not np.isfinite(values).all():
        raise UserError(
            f"{file}: has {values.dtype} {list(values.shape)}, must have float32 [{n_texts}], all finite; remove it, "
            "it is computed again"
        )
    return values
