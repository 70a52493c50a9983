"""Pre-training: the next token of prepared text, measured on held-out text, and a sample at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxlm.config import (
    Conversations,
    DataConfig,
    EngineConfig,
    ObserveConfig,
    Pretrain,
    Purpose,
    RunConfig,
    SamplingConfig,
    UserError,
)
from maxlm.config.fields import shown
from maxlm.config.model import padded_vocabulary
from maxlm.config.prediction_rules import default_prediction
from maxlm.data.chat import ChatTemplate
from maxlm.data.loader import Batches, global_batches, open_batches
from maxlm.data.prepare import ensure_prepared
from maxlm.data.shards import Split, open_prepared
from maxlm.data.text_ends import TextEnds
from maxlm.data.tokenizers import Tokenizer
from maxlm.evaluation.perplexity import HeldOut, held_out
from maxlm.inference import generator
from maxlm.inference.checks import check_lengths
from maxlm.inference.load import LoadedRun
from maxlm.inference.request import Request
from maxlm.models.mtp import without_mtp
from maxlm.observe.text import short
from maxlm.processes.joining import on_rank_0
from maxlm.recipes.starting import starting
from maxlm.recipes.taught import Taught
from maxlm.sharding import Layout
from maxlm.training.ema import averaged
from maxlm.training.loop import Measure, Recipe
from maxlm.training.objective import Batch, NextToken, Objective, Params, make_evaluate
from maxlm.training.state import TrainState
from maxlm.training.step import joined


def recipe(config: RunConfig, task: Pretrain, layout: Layout) -> Recipe[LoadedRun]:
    """Prepares the data first, if the config says how and nobody has.

    Raises:
        UserError: the data is not there, is damaged, too small, or has more ids than the model; or the model cannot
            draw the sample that is asked for at the end.
    """
    data = batches(config)
    refuse_bad_answers(config.data)
    return recipe_on(config, layout, NextToken(config, layout), data)


AVERAGE = "eval_average_loss"
"""Of a row: the held-out loss of the parameters that `optimizer.average` keeps."""
_NOT_TO_LEARN = dict.fromkeys((Purpose.PREFERENCE, Purpose.KTO, Purpose.BINARY), "bad answers")
_NOT_TO_LEARN |= {Purpose.CONTEXT: "the answers that were told a context"}


def refuse_bad_answers(data: DataConfig) -> None:
    """
    Raises:
        UserError: a data set has answers that are there to be told from better ones, or to teach others, and would be
            learned like those.
    """
    for one in data.datasets:
        documents = open_prepared(Path(one.path), verify=False).info.prepare.documents
        purpose = documents.purpose if isinstance(documents, Conversations) else Purpose.SFT
        if purpose in _NOT_TO_LEARN:
            raise UserError(
                f"{one.path}: was prepared with purpose = {purpose.value}, and the task would learn "
                f"{_NOT_TO_LEARN[purpose]} too; prepare it in another folder with purpose = sft, which takes the best "
                "answer of each record"
            )


def recipe_on(
    config: RunConfig, layout: Layout, objective: NextToken, data: Batches, taught: Taught | None = None
) -> Recipe[LoadedRun]:
    """Of an objective on prepared text. `taught`: how the model is asked, if that is in conversations.

    Raises:
        UserError: as `recipe`.
    """
    train = config.train
    tokenizer = data.tokenizer
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the {tokenizer.vocab_size} ids of the "
            f"data's tokenizer ({config.data.datasets[0].path}); use at least {tokenizer.vocab_size}, best "
            f"{padded_vocabulary(tokenizer.vocab_size)}: a multiple of 128, whose last rows no id uses"
        )

    def loaded(step: int, state: TrainState) -> LoadedRun:
        model, parameters = without_mtp(config.model, state.parameters)
        used = dataclasses.replace(config, model=model)
        run = LoadedRun(config=used, layout=layout, parameters=parameters, tokenizer=tokenizer, step=step)
        return run if taught is None else dataclasses.replace(run, chat=taught.chat, ends=taught.ends)

    measures: list[Measure] = []
    if train.eval_batches != 0:
        measures.append(HeldOutText(config, layout, objective))
    if config.observe.sample_tokens:
        check_sample(config, tokenizer, None if taught is None else taught.chat)
        measures.append(Sample(observe=config.observe, loaded=loaded))
    return Recipe(
        objective=objective,
        feed=FileFeed(data, layout),
        measures=tuple(measures),
        start=starting(config, layout, tokenizer.fingerprint, taught),
        tokenizer=tokenizer if taught is None else taught,
        outcome=loaded,
    )


def check_sample(config: RunConfig, tokenizer: Tokenizer, chat: ChatTemplate | None) -> None:
    """Before the first step, not after the last.

    Raises:
        UserError: the prompt is no text, or too long together with the sample.
    """
    prompt = config.observe.sample_prompt
    try:
        ids = tokenizer.prompt_ids(prompt) if chat is None else _question(chat, tokenizer, prompt)
    except UserError:
        raise
    except Exception as error:  # whatever the tokenizer's package raises
        why = type(error).__name__
        raise UserError(f"observe.sample_prompt = {shown(prompt)} cannot be tokenised ({why}); use text") from error
    check_lengths(
        len(ids),
        config.observe.sample_tokens,
        config.model.max_seq_len,
        key="observe.sample_tokens",
        prompt_key="observe.sample_prompt",
    )


def batches(config: RunConfig, split: Split | str = Split.TRAIN) -> Batches:
    """The batches that a run of `config` reads, by number; also `maxlm.batches`.

    Prepares the data first, if the config says how and nobody has. Nothing need be closed.

    Args:
        config: its data, train.batch_size and train.seq_len decide the batches.
        split: "train", without end, or "validation", `n_batches` of them.

    Returns:
        `batches[i]`, a dict of NumPy arrays [batch_size, seq_len]: `inputs`, `targets`, `segment_ids`, `positions`
        int32, `loss_mask` float32, as `maxlm.data.packing.pack` says; and what `task.predict` needs beside.

    Raises:
        UserError: no such split; the data is not there, is damaged, or is too small for a batch.
    """
    if split not in (*Split, *(known.value for known in Split)):
        raise UserError(f"split = {split!r} must be {' or '.join(repr(known.value) for known in Split)}")
    on_rank_0("prepare the data", lambda: ensure_prepared(config.data))
    train = config.train
    return open_batches(
        config.data,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        split=Split(split),
        virtual=config.model.virtual_tokens,
        predict=default_prediction(config.task),
    )


class FileFeed:
    """Batches of prepared files, made ahead in a thread."""

    def __init__(self, batches: Batches, layout: Layout) -> None:
        self._batches, self._sharding = batches, layout.sharding(layout.activation("batch", "seq"))
        self._ahead: Generator[Batch, None, None] | None = None
        self.fingerprint = batches.fingerprint
        self.memory: dict[str, Any] = {}

    def next(self, step: int, state: TrainState) -> Batch:
        if self._ahead is None:
            self._ahead = global_batches(self._batches, self._sharding, step)
        return next(self._ahead)

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()


class HeldOutText:
    """Loss over the validation split or its first batches, as `train.eval_batches` says, every `train.eval_every`
    steps. `python -m maxlm.evaluate` measures the same."""

    name = "eval"

    def __init__(self, config: RunConfig, layout: Layout, objective: Objective) -> None:
        train = config.train
        self.every, self._tokens = train.eval_every, config.tokens
        self._batches = batches(config, Split.VALIDATION)
        assert self._batches.n_batches is not None, "a validation split has an end"
        self._n_batches = train.held_out_batches(self._batches.n_batches)
        self._sharding = layout.sharding(layout.activation("batch", "seq"))
        self._evaluate = make_evaluate(objective, layout)

    def __call__(self, step: int, state: TrainState) -> Mapping[str, float]:
        found = self._measured(state.parameters)
        average = averaged(state.optimizer)
        more = {} if average is None else {AVERAGE: self._measured(joined(average, state.parameters)).loss}
        row = {
            "tokens": self._tokens(step),
            "eval_loss": found.loss,
            "eval_perplexity": found.perplexity,
            "eval_bits_per_byte": found.bits_per_byte,
            "eval_tokens": found.tokens,
            **more,
        }
        return {key: value for key, value in row.items() if value is not None}

    def _measured(self, parameters: Params) -> HeldOut:
        with contextlib.closing(global_batches(self._batches, self._sharding, 0)) as feed:
            return held_out(
                self._evaluate,
                parameters,
                itertools.islice(feed, self._n_batches),
                bytes_per_token=self._batches.bytes_per_token,
            )

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        bits = row.get("eval_bits_per_byte")
        average = f"  of averaged parameters {row[AVERAGE]:.4f}" if AVERAGE in row else ""
        return (
            f"step {step:,}  held-out loss {row['eval_loss']:.4f}{average}  perplexity {row['eval_perplexity']:,.4g}  "
            f"{'' if bits is None else f'{bits:.4f} bits/byte  '}over {short(row['eval_tokens'])} tokens"
        )


@dataclass(kw_only=True)
class Sample:
    """How the model goes on after `observe.sample_prompt`, at the end; or answers, if it is asked in conversations."""

    observe: ObserveConfig
    loaded: Callable[[int, TrainState], LoadedRun]
    name: str = "sample"
    every: int = 0

    def __call__(self, step: int, state: TrainState) -> Mapping[str, str]:
        prompt, new, run = self.observe.sample_prompt, self.observe.sample_tokens, self.loaded(step, state)
        # One text, beside a state that fills the memory: room for it alone, and one program.
        ids = run.tokenizer.prompt_ids(prompt) if run.chat is None else _question(run.chat, run.tokenizer, prompt)
        small = EngineConfig(slots=1, tokens_per_step=2, cache_tokens=len(ids) + new)
        ends = (run.ends or TextEnds.of_documents(run.tokenizer)).last
        request = Request(prompt=tuple(ids), max_new_tokens=new, sampling=SamplingConfig(), ends=ends)
        [sample] = generator.Generator(run, engine=small).answer([request])
        return {"prompt": prompt if run.chat is None else f"{prompt}\n-> ", "text": sample.text}

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        return f"sample after step {step:,}:\n{row['prompt']}{row['text']}"


def _question(chat: ChatTemplate, tokenizer: Tokenizer, text: str) -> list[int]:
    """What an answer starts from."""
    return chat.encode(tokenizer, [{"role": "user", "content": text}]).ids
