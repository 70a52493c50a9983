"""Method after method on one model and one text."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import jax

from maxlm.config import DataConfig, Dataset, QuantMethod, UserError
from maxlm.data.loader import open_batches
from maxlm.data.packing import Batch
from maxlm.data.shards import Split
from maxlm.hub.converting import Opened
from maxlm.inference.load import ONE_DEVICE, LoadedRun, layout_for
from maxlm.models import Execution
from maxlm.models.weights.holding import kinds_of
from maxlm.quantization.comparing import bytes_of, fidelity, measure
from maxlm.quantization.methods import Quantisation, quantise
from maxlm.quantization.table import MethodRow
from maxlm.sharding import decoding_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialText:
    """Windows of prepared data, one a batch."""

    calibration: list[Batch]
    """Of the training split, from the first on."""
    held_out: list[Batch]
    """Of the validation split, likewise."""


def read_text(
    folder: Path, opened: Opened, *, seq_len: int, calibration_tokens: int, evaluation_tokens: int
) -> TrialText:
    """
    Args:
        folder: prepared data.
        opened: the model that it is for.
        seq_len: tokens of a window, at most the model's max_seq_len.
        calibration_tokens, evaluation_tokens: as many windows as hold them, of the two splits.

    Raises:
        UserError: no such data, or it was prepared with another tokenizer than the model's.
    """
    length = min(seq_len, opened.model.max_seq_len)

    def windows(split: Split, tokens: int) -> list[Batch]:
        data = DataConfig(datasets=(Dataset(path=str(folder)),))
        batches = open_batches(data, batch_size=1, seq_len=length, split=split)
        if opened.tokenizer is not None and batches.tokenizer.fingerprint != opened.tokenizer.fingerprint:
            raise UserError(
                f"{folder}: prepared with tokenizer {batches.tokenizer.fingerprint[:12]}..., {opened.place} has "
                f"{opened.tokenizer.fingerprint[:12]}...; prepare the data with the model's tokenizer"
            )
        if batches.tokenizer.text_size > opened.model.vocab_size:
            raise UserError(
                f"{folder}: its tokenizer has ids up to {batches.tokenizer.text_size - 1}, {opened.place} knows "
                f"{opened.model.vocab_size}; prepare the data with the model's tokenizer"
            )
        return list(itertools.islice(batches, -(-tokens // length)))

    return TrialText(
        calibration=windows(Split.TRAIN, calibration_tokens), held_out=windows(Split.VALIDATION, evaluation_tokens)
    )


class Trials:
    """A model and what it is measured on."""

    def __init__(self, opened: Opened, text: TrialText | None, *, group: int, speed_tokens: int) -> None:
        """Reads the parameters.

        Args:
            opened: the model.
            text: None: no fidelity, and no method that is calibrated.
            group: numbers of 4 bits that share a scale, at most.
            speed_tokens: decoded to see how fast it is; 0: not.

        Raises:
            UserError: it is quantised already, or has no logits.
        """
        self._opened, self._text, self._group, self._speed_tokens = opened, text, group, speed_tokens
        self.full = opened.parameters()
        if kinds_of(opened.model, self.full):
            raise UserError(f"{opened.place}: its weights are quantised already; name the run that it was made of")
        self._layout = layout_for(opened.model, ONE_DEVICE)
        here = decoding_layout(self._layout, opened.model.d_model)
        self._how = Execution.of(opened.config, self._layout).decoding(here)

    def as_it_was(self) -> MethodRow:
        """The row of the full model."""
        return self._row("full", Quantisation(self.full, {}), of_products=False, seconds=0.0)

    def trial(self, method: QuantMethod) -> tuple[MethodRow, Any]:
        """Its row, and its parameters.

        Raises:
            UserError: it looks at text, and there is none.
        """
        if method.calibrated and self._text is None:
            raise UserError(f"method {method.value} looks at text; give some")
        batches = [] if self._text is None else self._text.calibration
        begin = time.perf_counter()
        made = quantise(self._opened.model, self._how, self.full, method, group=self._group, batches=batches)
        jax.block_until_ready(made.parameters)
        seconds = time.perf_counter() - begin
        return self._row(method.value, made, of_products=method.calibrated, seconds=seconds), made.parameters

    def _row(self, method: str, made: Quantisation, *, of_products: bool, seconds: float) -> MethodRow:
        n_bytes, bits = bytes_of(self._opened.model, made.parameters, self._how.dtype)
        known = None
        if self._text is not None:
            known = fidelity(measure(self._opened.model, self._how, self.full, made.parameters, self._text.held_out))
        return MethodRow(
            method=method,
            bytes=n_bytes,
            bits=bits,
            errors=made.errors,
            of_products=of_products,
            fidelity=known,
            tokens_per_s=self._speed(made.parameters),
            seconds=seconds,
        )

    def _speed(self, parameters: Any) -> float | None:
        """Of one text, as `generate` decodes it."""
        tokenizer = self._opened.tokenizer
        if tokenizer is None or not self._speed_tokens or not self._opened.model.decodes:
            return None
        config = dataclasses.replace(self._opened.config, sharding=ONE_DEVICE)
        run = LoadedRun(config=config, layout=self._layout, parameters=parameters, tokenizer=tokenizer, step=0)
        rates = (run.generate("The", max_new_tokens=self._speed_tokens, seed=seed).tokens_per_s for seed in range(3))
        return max((rate for rate in rates if rate is not None), default=None)


def methods_for(text: TrialText | None, *, blocks: bool) -> list[QuantMethod]:
    """All that can be tried. `blocks`: whether the numbers may be those of a GGUF file."""
    without = [QuantMethod.ALL, *([] if blocks else [QuantMethod.GGUF])]
    return [method for method in QuantMethod if method not in without and not (method.calibrated and text is None)]
