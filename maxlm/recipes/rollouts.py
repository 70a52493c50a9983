"""Rollouts: the policy answers prompts, the answers are judged, and become batches to learn from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from maxlm.config import Reinforced, Rollouts, RunConfig, SamplingConfig, UserError
from maxlm.data.packing import pack
from maxlm.data.prompts import Prompt, Prompts
from maxlm.inference.request import Finish
from maxlm.observe.text import short
from maxlm.recipes.completions import Completion
from maxlm.recipes.rewards import Judged, RewardSum
from maxlm.recipes.writing import PolicyWriter, WrittenText, seed_of
from maxlm.sharding import Layout
from maxlm.training import policy_losses as losses
from maxlm.training.objective import Batch
from maxlm.training.policy_objective import PolicyGradient
from maxlm.training.state import TrainState, of_model

RowArrays = dict[str, npt.NDArray[Any]]


class RolloutTexts(NamedTuple):
    """Completions of the prompts of a rollout: P prompts, S samples of each, R = P S rows in that order."""

    prompts: list[Prompt]
    written: list[WrittenText]
    """[R]."""
    rewards: npt.NDArray[np.float64]
    """[R]; 0 where there is none."""
    usable: npt.NDArray[np.bool_]
    """[R]."""
    parts: dict[str, npt.NDArray[np.float64]]
    """[R] of each reward."""


class Rollout(NamedTuple):
    """What is known of the rows of a rollout before it is learned from."""

    texts: RolloutTexts
    arrays: RowArrays
    """[R, T], as batches have them: those of `NextToken`, where `loss_mask` is what is learned from, and those of
    `PolicyGradient.scores`."""


Learn = Callable[[Rollout, dict[str, Any]], tuple[RowArrays, dict[str, float]]]
"""What a task makes of a rollout and of the feed's memory, which it may change: the other arrays of its batches, by
row, and figures to log."""


class RolloutFeed:
    """Batches of what the policy has written. A step that begins a rollout waits for it.

    Rollout n is a function of the parameters before it, the memory, `train.seed` and n; a run that goes on begins one.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Reinforced,
        layout: Layout,
        objective: PolicyGradient,
        writer: PolicyWriter,
        prompts: Prompts,
        rewards: RewardSum,
        learn: Learn,
        *,
        redraws: int = 0,
        beside: Callable[[int], RowArrays] | None = None,
    ) -> None:
        """
        Args:
            config, task, layout, objective: of the run.
            writer: of the policy.
            prompts: to train on.
            rewards: of completions.
            learn: what the task makes of them.
            redraws: as of `Grpo`.
            beside: further arrays of the batch of a step.
        """
        self._config, self._rollouts, self._layout, self._objective = config, task.rollouts, layout, objective
        self._writer, self._prompts, self._rewards, self._learn = writer, prompts, rewards, learn
        self._redraws, self._beside = redraws, beside
        self._scores = jax.jit(objective.scores, out_shardings=layout.sharding())
        self._batches: list[RowArrays] = []
        self.stride = task.rollouts.steps(config.train.batch_size)
        self.fingerprint = f"{prompts.fingerprint} {rewards.fingerprint} {writer.fingerprint}"
        self.memory: dict[str, Any] = {"prompts": 0}
        self.figures: dict[str, float | str | None] = {}
        """Of the newest rollout."""

    def next(self, step: int, state: TrainState) -> Batch:
        number, turn = divmod(step, self.stride)
        if turn == 0:
            self._batches = self._rollout(number, state)
        batch = self._batches[turn]
        if self._beside is not None:
            batch = batch | self._beside(step)
        return self._placed(batch)

    def close(self) -> None:
        pass

    def _rollout(self, number: int, state: TrainState) -> list[RowArrays]:
        began = time.perf_counter()
        self._writer.update(of_model(state.parameters))
        texts, figures = self._answers(number)
        judged = time.perf_counter()
        arrays = _rows(texts, self._config.model.virtual_tokens, self._config.train.seq_len, self._rollouts)
        orders = [self._order(number, epoch) for epoch in range(self._rollouts.epochs)]
        arrays |= self._scored(state, arrays, orders[0])
        figures |= _of_scores(arrays)
        made, more = self._learn(Rollout(texts, arrays), self.memory)
        if (cap := self._rollouts.importance_cap) is not None:
            sampled = arrays["old_log_probs"], arrays["sampler_log_probs"], arrays["loss_mask"]
            made["advantages"] = made["advantages"] * losses.truncated_weights(*sampled, cap)
        arrays |= made
        wanted = {name: array.dtype for name, array in self._objective.arrays.items() if name in arrays}
        arrays = {name: arrays[name].astype(dtype) for name, dtype in wanted.items()}
        self.figures = figures | more | {"writing_seconds": judged - began, "seconds": time.perf_counter() - began}
        return [{name: x[rows] for name, x in arrays.items()} for order in orders for rows in self._cut(order)]

    def _answers(self, number: int) -> tuple[RolloutTexts, dict[str, Any]]:
        """Of as many prompts as a rollout has; those whose completions are worth the same give way to others, as far as
        `redraws` goes."""
        wanted = self._rollouts.prompts
        useful, useless, drawn = list[RolloutTexts](), list[RolloutTexts](), 0
        for _ in range(1 + self._redraws):
            asked = [self._prompts.drawn(self.memory["prompts"] + n) for n in range(wanted - len(useful))]
            for group in self._groups(asked):
                equal = self._redraws and _equal(group.rewards, group.usable)
                (useless if equal else useful).append(group)
            self.memory["prompts"] += len(asked)
            drawn += len(asked)
            if len(useful) == wanted:
                break
        groups = useful + useless[: wanted - len(useful)]
        found = RolloutTexts(
            prompts=[prompt for group in groups for prompt in group.prompts],
            written=[one for group in groups for one in group.written],
            rewards=np.concatenate([group.rewards for group in groups]),
            usable=np.concatenate([group.usable for group in groups]),
            parts={name: np.concatenate([group.parts[name] for group in groups]) for name in groups[0].parts},
        )
        return found, {"rollout": number, "drawn_prompts": drawn} | _figures(found, self._rollouts)

    def _groups(self, prompts: Sequence[Prompt]) -> Iterator[RolloutTexts]:
        """Each prompt with its completions and what they are worth."""
        S, first = self._rollouts.samples, self.memory["prompts"]
        seeds = [seed_of(self._config.train.seed, first + n, i) for n in range(len(prompts)) for i in range(S)]
        asked = [prompt for prompt in prompts for _ in range(S)]
        written = self._writer.write(asked, seeds, sampling(self._rollouts))
        judged = judge(self._rewards, asked, written)
        for n, prompt in enumerate(prompts):
            own = slice(n * S, (n + 1) * S)
            parts = {name: values[own] for name, values in judged.parts.items()}
            worth = np.where(judged.usable, judged.total, 0.0)[own]
            yield RolloutTexts([prompt], written[own], worth, judged.usable[own], parts)

    def _order(self, number: int, epoch: int) -> npt.NDArray[np.int64]:
        """In which the rows of a rollout are learned from."""
        seed = seed_of(self._config.train.seed, number, epoch, 1)
        return np.random.default_rng(seed).permutation(self._rollouts.completions)

    def _cut(self, order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows of each batch, [batches, B]."""
        return order.reshape(-1, self._config.train.batch_size)

    def _scored(self, state: TrainState, arrays: RowArrays, order: npt.NDArray[np.int64]) -> RowArrays:
        """What the policy, the reference and the critic say of all rows, in the very batches of the first epoch."""
        found: RowArrays = {}
        for rows in self._cut(order):
            batch = self._placed({name: x[rows] for name, x in arrays.items() if name in self._objective.arrays})
            for name, values in self._scores(state.parameters, state.frozen, batch).items():
                found.setdefault(name, np.zeros(arrays["inputs"].shape, np.float32))[rows] = np.asarray(values)
        return found

    def _placed(self, batch: RowArrays) -> Batch:
        dims = {name: self._objective.arrays[name].dims for name in batch}
        place = lambda name, x: jax.device_put(x, self._layout.sharding(self._layout.activation(*dims[name])))
        return {name: place(name, x) for name, x in batch.items()}


def sampling(rollouts: Rollouts) -> SamplingConfig:
    """How the policy draws."""
    return SamplingConfig(temperature=rollouts.temperature, top_k=rollouts.top_k, top_p=rollouts.top_p)


def judge(rewards: RewardSum, prompts: Sequence[Prompt], written: Sequence[WrittenText]) -> Judged:
    """What completions are worth."""
    heard = lambda one: len(one.tokens) - sum(one.drawn)
    texts = zip(prompts, written, strict=True)
    return rewards([Completion(prompt, one.text, one.tokens, one.finish, heard(one)) for prompt, one in texts])


def check_lengths(prompts: Prompts, room: int, key: str) -> None:
    """Refuse prompts after which no completion has room.

    Args:
        prompts: all that may be asked.
        room: ids that a prompt may have.
        key: what decides that, in words.

    Raises:
        UserError: one is longer.
    """
    long = [n for n in range(len(prompts)) if len(prompts[n].ids) > room]
    if long:
        raise UserError(
            f"{prompts.folders[0]}: {len(long):,} of {len(prompts):,} prompts are too long; the first, number "
            f"{long[0]}, has {len(prompts[long[0]].ids)} ids, and {key} leave {max(room, 0)}; use a longer "
            "train.seq_len, a smaller task.rollouts.max_new_tokens, or prepare the prompts with max_tokens"
        )


def _rows(texts: RolloutTexts, virtual: int, length: int, rollouts: Rollouts) -> RowArrays:
    """Texts as rows [R, T], with what the sampler said of each target."""
    S, R = rollouts.samples, len(texts.written)
    tokens = np.zeros((R, length + 1), np.int32)
    begins, counts = np.zeros(tokens.shape, np.bool_), np.zeros(tokens.shape, np.bool_)
    log_probs = np.zeros(tokens.shape, np.float32)
    for n, one in enumerate(texts.written):
        prompt = (0,) * virtual + texts.prompts[n // S].ids
        start, end = len(prompt), len(prompt) + len(one.tokens)
        tokens[n, :start], tokens[n, start:end] = prompt, one.tokens
        begins[n, 0] = True
        begins[n, end : end + 1] = True  # what fills the row is no part of the text
        log_probs[n, start:end] = one.log_probs
        learned = texts.usable[n] and (rollouts.learn_cut or one.finish is not Finish.LENGTH)
        counts[n, start:end] = np.asarray(one.drawn) & learned
    arrays = pack(tokens, begins, counts)
    return arrays | {"sampler_log_probs": log_probs[:, 1:]}


def _figures(texts: RolloutTexts, rollouts: Rollouts) -> dict[str, Any]:
    """What one sees of a rollout."""
    usable, rewards = texts.usable, texts.rewards
    lengths = np.array([sum(one.drawn) for one in texts.written])
    groups = zip(*(x.reshape(-1, rollouts.samples) for x in (rewards, usable)), strict=True)
    equal = np.mean([_equal(*group) for group in groups])
    mean = lambda values: float(values[usable].mean()) if usable.any() else None
    of_groups = {"equal_groups": float(equal)} if rollouts.samples > 1 else {}
    of_tools = {
        "calls": float(np.mean([one.calls for one in texts.written])),
        "failed_calls": sum(one.failed for one in texts.written),
        "unanswered": sum(one.unanswered for one in texts.written),
    }
    return (
        of_groups
        | (of_tools if rollouts.tools else {})
        | {
            "reward": mean(rewards),
            "reward_std": float(rewards[usable].std()) if usable.any() else None,
            **({name: mean(values) for name, values in texts.parts.items()} if len(texts.parts) > 1 else {}),
            "length": float(lengths.mean()),
            "cut": float(np.mean([one.finish is Finish.LENGTH for one in texts.written])),
            "skipped": int((~usable).sum()),
            "text": texts.written[0].text,
        }
    )


def _equal(rewards: npt.NDArray[np.float64], usable: npt.NDArray[np.bool_]) -> bool:
    """Whether completions are all worth the same, so that nothing can be learned of them."""
    return not usable.any() or bool(np.ptp(rewards[usable]) == 0)


def _of_scores(arrays: RowArrays) -> dict[str, float | None]:
    """The policy's entropy, and how far the engine's log-probabilities are from those of the program that trains."""
    there = arrays["loss_mask"] > 0
    apart = (arrays["old_log_probs"].astype(np.float64) - arrays["sampler_log_probs"])[there]
    if not apart.size:
        return dict.fromkeys(("entropy", "sampler_ratio", "sampler_largest"))
    return {
        "entropy": float(arrays["entropy"][there].mean()),
        "sampler_ratio": float(np.exp(apart).mean()),
        "sampler_largest": float(np.abs(apart).max()),
    }


class RolloutFigures:
    """What was seen of the newest rollout, after its last step."""

    name = "rollout"

    def __init__(self, feed: RolloutFeed) -> None:
        self._feed, self.every = feed, feed.stride

    def __call__(self, step: int, state: TrainState) -> Mapping[str, float | str | list[list[float]] | None]:
        return dict(self._feed.figures)

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        if not row:
            return f"step {step:,}  no rollout since this run went on"
        said = f"rollout {row['rollout']:,}  reward {_shown(row['reward'])}  length {row['length']:.4g}"
        if "equal_groups" in row:
            said += f"  equal groups {row['equal_groups']:.0%}"
        said += f"  entropy {_shown(row['entropy'])}  written in {row['writing_seconds']:.3g} s"
        if row["entropy"] is None:
            return f"{said}  (nothing is learned: every completion was left out)"
        if row.get("equal_groups") == 1:
            return f"{said}  (nothing is learned: the completions of each prompt are all worth the same)"
        return said


class PromptScores:
    """What completions of held-out prompts are worth: drawn as in training, and the likeliest."""

    name = "eval"

    def __init__(self, config: RunConfig, task: Reinforced, writer: PolicyWriter, prompts: Prompts, rewards: RewardSum):
        self.every, self._seed, self._rollouts = config.train.eval_every, config.train.seed, task.rollouts
        self._tokens_per_step = config.train.batch_size * config.train.seq_len
        self._writer, self._rewards = writer, rewards
        self._prompts = [prompts[n] for n in range(min(len(prompts), task.rollouts.eval_prompts))]

    def __call__(self, step: int, state: TrainState) -> Mapping[str, float | str | list[list[float]] | None]:
        self._writer.update(of_model(state.parameters))
        row: dict[str, Any] = {"tokens": step * self._tokens_per_step}
        seeds = [seed_of(self._seed, prompt.number, 2) for prompt in self._prompts]
        for name, how in (("", sampling(self._rollouts)), ("_greedy", SamplingConfig(temperature=0))):
            written = self._writer.write(self._prompts, seeds, how)
            judged = judge(self._rewards, self._prompts, written)
            mean = lambda values, there=judged.usable: float(values[there].mean()) if there.any() else None
            row[f"eval_reward{name}"] = mean(judged.total)
            if len(judged.parts) > 1:
                row |= {f"eval_{part}{name}": mean(values) for part, values in judged.parts.items()}
            row[f"eval_length{name}"] = float(np.mean([sum(one.drawn) for one in written]))
        return row

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        return (
            f"step {step:,}  held-out reward {_shown(row['eval_reward'])} drawn, {_shown(row['eval_reward_greedy'])} "
            f"greedy  over {short(len(self._prompts))} prompts"
        )


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
