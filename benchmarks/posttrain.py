"""Tasks after pre-training beside pre-training, and beside TRL, on this machine's CPU: turn by turn in one call.

    pip install -e '.[parity]' trl peft
    python -m benchmarks.posttrain [--rounds 3] [--cores 1] [--sides ...] [--out FILE]
    python -m benchmarks.posttrain --sides "maxlm grpo" --out benchmarks/results/posttrain_grpo.json

The model of `benchmarks.compare_torch`: 4 layers, d_model 256, 8 heads, d_ff 688, vocabulary 4096 untied, float32,
AdamW, gradients clipped at norm 1, nothing recomputed. Every text is as long as every other, so that nobody pads: SFT
has 8 conversations of 512 tokens a step, half of them the assistant's; DPO 8 pairs of 2 x 256 tokens, with the
reference in memory and asked in each step; LoRA is SFT with rank 8 at every matrix. With `--lengths natural` texts are
up to that long, log-normal with a median of 150 tokens (of a pair's answers 50) and a sigma of 0.7; then a step has 8
windows of packed texts here and 8 records, padded to the longest, there, as both do by themselves. Both sides run their
whole loop, their own loading of data included; the first steps are not counted.

Every figure comes from a process of its own; the sides take turns. A ratio is the median over the rounds, with its
range.

GRPO has 8 prompts of 256 tokens and 4 completions of each, of up to 64 tokens, one step a rollout. After each rollout
the same requests are put to an engine of their own with the same parameters, in the same process: rollouts and bare
engine take turns. Figures are medians over the rollouts of a run, the first ones left out.

tokens_per_cpu_s   tokens of texts (prompts too, padding not) for each second that any core was busy
tokens_per_s       for each second of the clock
peak_mb            most memory that the process had resident, compilation included, in MiB
rollout_share      of a rollout and its step, the time until the first batch is there: written, judged, and read by the
                   program that trains
writing_share      of them, the time until all is written and judged
rollout_tokens_per_s, engine_tokens_per_s, rollout_over_engine
                   drawn tokens for each second until all is written and judged, the weights' update included; for each
                   second of the bare engine; and the first over the second
first_token_s      from the call that updates the weights to the first token of all those requests
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.compare_torch import CONTEXT, D_FF, HEADS, LAYERS, VOCAB, WIDTH, cpu_name, peak_mb, spread, use_cores

Figures = dict[str, float]

SIDES = ("maxlm pretrain", "maxlm sft", "maxlm lora", "maxlm dpo", "maxlm grpo", "trl sft", "trl dpo")
RATIOS = (
    ("maxlm sft", "maxlm pretrain"),
    ("maxlm lora", "maxlm sft"),
    ("maxlm sft", "trl sft"),
    ("maxlm dpo", "trl dpo"),
)
ROWS, RECORDS, APART = 8, 256, 6
"""Rows of a step, records of the data, and steps that are timed, after as many that are not."""
PROMPTS, SAMPLES, NEW_TOKENS, ROLLOUTS, EARLIER = 8, 4, 64, 6, 2
"""Of GRPO: prompts, completions of each and their tokens; rollouts that count, and those before them."""
RESULTS = Path(__file__).parent / "results" / "posttrain.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--cores", type=int, default=1, help="number of cores")
    parser.add_argument("--lengths", default="equal", choices=("equal", "natural"), help="of the texts")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="what to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file for every run's figures, as JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        use_cores(options.cores)
        print(json.dumps(measured(options.child[0], Path(options.child[1]))))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        write_records(Path(place), natural=options.lengths == "natural")
        child("base", options.cores, place)
        for number in range(options.rounds):
            for side in options.sides:
                figures = child(side, options.cores, place)
                runs.append({"side": side, "round": number, **figures})
                print(f"{side}: {figures}", file=sys.stderr, flush=True)
    packages = (
        "jax",
        "numpy",
        *(("torch", "transformers", "trl") if any("trl" in side for side in options.sides) else ()),
    )
    by_side = {side: [run for run in runs if run["side"] == side] for side in options.sides}
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m benchmarks.posttrain", *sys.argv[1:]]),
        "cpu": cpu_name(),
        "cores": options.cores,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "medians": {
            side: {
                name: statistics.median(run[name] for run in found)
                for name in found[0]
                if name not in ("side", "round")
            }
            for side, found in by_side.items()
        },
        "ratios": {
            f"{one} / {other}": {
                name: spread([a[name] / b[name] for a, b in zip(by_side[one], by_side[other], strict=True)])
                for name in ("tokens_per_cpu_s", "tokens_per_s", "peak_mb")
            }
            for one, other in RATIOS
            if one in by_side and other in by_side
        },
        "runs": runs,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: report[name] for name in ("cpu", "medians", "ratios")}, indent=1))


def child(side: str, cores: int, place: str) -> Figures:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.posttrain", "--child", side, place, "--cores", str(cores)]
    environment = os.environ | {"OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores)}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: Figures = json.loads(output.splitlines()[-1])
    return found


def write_records(place: Path, natural: bool) -> None:
    """Random letters, so that every token is a byte: of CONTEXT tokens with bos and eos, or of half as many; `natural`:
    of up to as many."""
    import numpy as np

    draw = np.random.default_rng(0)
    letters = lambda count: bytes(draw.integers(97, 123, count).astype(np.uint8)).decode()

    def length(most: int, median: int) -> int:
        return int(np.clip(draw.lognormal(np.log(median), 0.7), 8, most)) if natural else most

    half = CONTEXT // 2 - 1
    short = (half - 1) // 2
    sft = ({"prompt": letters(length(half, 75)), "completion": letters(length(half, 75))} for _ in range(RECORDS))
    dpo = (
        {
            "prompt": letters(length(half - short, 50)),
            "chosen": letters(length(short, 50)),
            "rejected": letters(length(short, 50)),
        }
        for _ in range(RECORDS)
    )
    for name, records in (("sft", sft), ("dpo", dpo)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


# ---- A child: one side -----------------------------------------------------------------------------------------------


def measured(side: str, place: Path) -> Figures:
    match side.split():
        case ["trl", "sft"]:
            return trl_sft(place)
        case ["trl", "dpo"]:
            return trl_dpo(place)
        case ["maxlm", "grpo"]:
            return grpo(place)
        case [*_, task]:
            return maxlm(task, place)
    raise AssertionError(side)


class Clock:
    """A `Measure` that is called twice, APART steps apart."""

    name, every = "clock", APART

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.tokens: list[int] = []
        """Of each batch, without padding."""

    def __call__(self, step: int, state: Any) -> Mapping[str, float]:
        self.times.append((time.perf_counter(), time.process_time()))
        return {}

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        return ""

    def figures(self) -> Figures:
        (wall, cpu), (wall_after, cpu_after) = self.times[:2]
        tokens = sum(self.tokens[APART : 2 * APART])
        return {
            "tokens_per_cpu_s": tokens / (cpu_after - cpu),
            "tokens_per_s": tokens / (wall_after - wall),
            "peak_mb": peak_mb(),
        }


def maxlm(task: str, place: Path) -> Figures:
    from maxlm.config import (
        AdamW,
        Adapter,
        ByteTokenizer,
        CheckpointConfig,
        ConstantSchedule,
        Conversations,
        DataConfig,
        Dataset,
        Dtype,
        ExecutionConfig,
        Lora,
        ObserveConfig,
        Preference,
        PrepareConfig,
        Pretrain,
        Purpose,
        Remat,
        RunConfig,
        Sft,
        TrainConfig,
        llama,
    )
    from maxlm.recipes import recipe
    from maxlm.training.loop import run

    model = llama(vocab_size=VOCAB, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, d_ff=D_FF, max_seq_len=CONTEXT)
    if task == "lora":
        model = dataclasses.replace(model, adapter=Adapter(kind=Lora(rank=8, targets=("all-linear",))))
    name = "dpo" if task == "dpo" else "sft"
    documents = Conversations(
        paths=(str(place / f"{name}.jsonl"),),
        purpose=Purpose.PREFERENCE if task == "dpo" else Purpose.SFT,
        template="raw",
    )
    prepare = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0)
    is_base = task == "base"
    config = RunConfig(
        model=model,
        task=Preference() if task == "dpo" else Pretrain() if task == "pretrain" else Sft(),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE),
        data=DataConfig(datasets=(Dataset(path=str(place / f"data-{name}"), prepare=prepare),)),
        train=TrainConfig(
            steps=1 if is_base else 2 * APART + 1, batch_size=ROWS, seq_len=CONTEXT, log_every=1, eval_batches=0
        ),
        optimizer=AdamW(learning_rate=3e-4, schedule=ConstantSchedule(warmup_steps=0)),
        checkpoint=CheckpointConfig(init_from=None if is_base else str(place / "base")),
        observe=ObserveConfig(sample_tokens=0),
        run_dir=str(place / "base" if is_base else Path(tempfile.mkdtemp(dir=place)) / "run"),
    )
    clock = Clock()

    def made(config: RunConfig, layout: Any) -> Any:
        found = recipe(config, layout)
        deal = found.feed.next

        def counted(step: int, state: Any) -> Any:
            batch = deal(step, state)
            clock.tokens.append(texts_of(batch))
            return batch

        found.feed.next = counted  # type: ignore[method-assign]
        return dataclasses.replace(found, measures=(clock,))

    run(config, made)
    return {} if is_base else clock.figures()


def texts_of(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch without what windows are filled up with: a last document of which nothing counts and all ids
    are one."""
    import numpy as np

    ids, segments, counts = (np.asarray(batch[name]) for name in ("inputs", "segment_ids", "loss_mask"))
    last = segments == segments.max(1, keepdims=True)
    first = np.take_along_axis(ids, last.argmax(1)[:, None], 1)
    fill = last & (~last | ((ids == first) & (counts == 0))).all(1, keepdims=True)
    return int(((segments > 0) & ~fill).sum())


class RolloutClock:
    """A `Measure` after each rollout's step, which lets a bare engine write the same."""

    name, every = "rollout_clock", 1

    def __init__(self, config: Any, feed: Any, loaded: Any) -> None:
        """feed: of the run; loaded: a model to serve, from a step and its state."""
        self._config, self._feed, self._loaded = config, feed, loaded
        self._generator: Any = None
        self._began = 0.0
        self.rows: list[Figures] = []

    def __call__(self, step: int, state: Any) -> Mapping[str, float]:
        import jax

        jax.block_until_ready(state)
        figures, whole = self._feed.figures, time.perf_counter() - self._began
        row = {
            "rollout_share": figures["seconds"] / whole,
            "writing_share": figures["writing_seconds"] / whole,
            "rollout_tokens_per_s": figures["length"] * PROMPTS * SAMPLES / figures["writing_seconds"],
            **self._bare(step, state),
        }
        self.rows.append(row | {"rollout_over_engine": row["rollout_tokens_per_s"] / row["engine_tokens_per_s"]})
        self._began = time.perf_counter()
        return {}

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        return ""

    def figures(self) -> Figures:
        rows = self.rows[EARLIER:]
        return {name: statistics.median(row[name] for row in rows) for name in rows[0]} | {"peak_mb": peak_mb()}

    def _bare(self, step: int, state: Any) -> Figures:
        from maxlm.inference.generator import Generator
        from maxlm.training.state import of_model

        rollouts = self._config.task.rollouts
        if self._generator is None:
            engine = rollouts.engine(self._config.train.seq_len + 1)
            self._generator = Generator(self._loaded(step, state), engine=engine)
        engine, requests = self._generator.engine, self._requests(step - 1)
        began = time.perf_counter()
        engine.update_weights(of_model(state.parameters))
        tickets = [engine.submit(request) for request in requests]
        while not engine.step():
            pass
        first = time.perf_counter() - began
        for ticket in tickets:
            engine.cancel(ticket)
        while not engine.idle:
            engine.step()
        engine.update_weights(of_model(state.parameters))  # nothing of the prompts is there yet
        began = time.perf_counter()
        texts = self._generator.texts(requests)
        took = time.perf_counter() - began
        return {
            "engine_tokens_per_s": sum(len(text.generation.tokens) for text in texts) / took,
            "first_token_s": first,
        }

    def _requests(self, number: int) -> list[Any]:
        """Those of a rollout, as `RolloutFeed` makes them."""
        from maxlm.data.prompts import open_prompts
        from maxlm.data.shards import Split
        from maxlm.inference.request import Request
        from maxlm.recipes.rollouts import sampling
        from maxlm.recipes.writing import seed_of

        prompts, places = open_prompts(self._config.data, Split.TRAIN), range(number * PROMPTS, (number + 1) * PROMPTS)
        assert prompts is not None
        return [
            Request(
                prompt=prompts.drawn(n).ids,
                max_new_tokens=NEW_TOKENS,
                sampling=sampling(self._config.task.rollouts),
                seed=seed_of(self._config.train.seed, n, sample),
                ends=self._generator.engine.ends.last,
                logprobs=0,
                processed_logprobs=True,
            )
            for n in places
            for sample in range(SAMPLES)
        ]


def grpo(place: Path) -> Figures:
    from maxlm.config import (
        AdamW,
        ByteTokenizer,
        CheckpointConfig,
        ConstantSchedule,
        Conversations,
        DataConfig,
        Dataset,
        Dtype,
        ExecutionConfig,
        Grpo,
        ObserveConfig,
        PatternReward,
        PrepareConfig,
        Purpose,
        Remat,
        Rollouts,
        RunConfig,
        TrainConfig,
        llama,
    )
    from maxlm.recipes import recipe
    from maxlm.training.loop import run

    documents = Conversations(paths=(str(place / "sft.jsonl"),), purpose=Purpose.PROMPTS, template="raw")
    prepare = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0)
    rollouts = Rollouts(
        prompts=PROMPTS, samples=SAMPLES, max_new_tokens=NEW_TOKENS, slots=PROMPTS * SAMPLES, eval_prompts=0
    )
    config = RunConfig(
        model=llama(vocab_size=VOCAB, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, d_ff=D_FF, max_seq_len=CONTEXT),
        task=Grpo(rewards=(PatternReward(pattern="(?s).*e.*"),), rollouts=rollouts),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE),
        data=DataConfig(datasets=(Dataset(path=str(place / "data-prompts"), prepare=prepare),)),
        train=TrainConfig(
            steps=EARLIER + ROLLOUTS,
            batch_size=PROMPTS * SAMPLES,
            seq_len=CONTEXT // 2 + NEW_TOKENS,
            log_every=1,
            eval_batches=0,
        ),
        optimizer=AdamW(learning_rate=3e-4, schedule=ConstantSchedule(warmup_steps=0)),
        checkpoint=CheckpointConfig(init_from=str(place / "base")),
        observe=ObserveConfig(sample_tokens=0),
        run_dir=str(Path(tempfile.mkdtemp(dir=place)) / "run"),
    )
    clocks = []

    def made(config: RunConfig, layout: Any) -> Any:
        found = recipe(config, layout)
        clocks.append(RolloutClock(config, found.feed, found.outcome))
        return dataclasses.replace(found, measures=(clocks[0],))

    run(config, made)
    return clocks[0].figures()


def llama_of_torch() -> Any:
    from benchmarks.compare_torch import torch_model

    return torch_model("sdpa")


def trl_figures(trainer: Any) -> Figures:
    """As `Clock`, by the trainer's own events."""
    import transformers

    clock = Clock()

    class Events(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % APART == 0:
                clock(state.global_step, None)

    collate = trainer.data_collator

    def counted(examples: Any) -> Any:
        batch = collate(examples)
        clock.tokens.append(int(batch["attention_mask"].sum()))
        return batch

    trainer.data_collator = counted
    trainer.add_callback(Events())
    trainer.train()
    return clock.figures()


def trl_arguments(place: Path) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(dir=place),
        "per_device_train_batch_size": ROWS,
        "max_steps": 2 * APART + 1,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": CONTEXT,
    }


def records_of(place: Path, name: str) -> Any:
    import datasets

    return datasets.Dataset.from_list([json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()])


def trl_sft(place: Path) -> Figures:
    import transformers
    import trl

    return trl_figures(
        trl.SFTTrainer(
            model=llama_of_torch(),
            args=trl.SFTConfig(**trl_arguments(place), completion_only_loss=True),
            train_dataset=records_of(place, "sft"),
            processing_class=transformers.ByT5Tokenizer(),
        )
    )


def trl_dpo(place: Path) -> Figures:
    import transformers
    import trl

    return trl_figures(
        trl.DPOTrainer(
            model=llama_of_torch(),
            ref_model=llama_of_torch(),
            args=trl.DPOConfig(**trl_arguments(place)),
            train_dataset=records_of(place, "dpo"),
            processing_class=transformers.ByT5Tokenizer(),
        )
    )


if __name__ == "__main__":
    main()
