"""What a rollout takes at least: its texts are written, read by all models that say something of them, and learned
from.

Texts are taken to be as long as they may be; those that end sooner take less. What prompts take is not counted, nor
what rewards do.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from maxlm.config import Grpo, Ppo, Zero
from maxlm.config.task_rules import rollout_asks_reference
from maxlm.plan.analysis import Forecast
from maxlm.plan.bound import peak_flops
from maxlm.plan.serving import ServingForecast
from maxlm.plan.serving_load import ServingLoad
from maxlm.plan.traffic import gather_seconds
from maxlm.plan.work import critic_of
from maxlm.shapes import reading_flops


@dataclass(frozen=True, kw_only=True)
class RolloutTime:
    """Of one rollout, in seconds, by the data sheet's figures."""

    texts: int
    """Completions, of `task.rollouts.max_new_tokens`."""
    at_once: int
    """Of them, that are written together."""
    token_seconds: float
    """One more token of all that are written together, at their mean length."""
    limited_by: str
    """What that is: "compute", "memory", or "gathering", of the weights that fsdp cuts, in every step."""
    write_seconds: float
    read_seconds: float
    """Products of policy, reference and critic, forward."""
    learn_seconds: float
    """All of its optimizer steps."""

    @property
    def seconds(self) -> float:
        """Of all three, one after the other."""
        return self.write_seconds + self.read_seconds + self.learn_seconds


def rollout_time(found: Forecast) -> RolloutTime | None:
    """None: the task has no rollouts, or the speed of the target's devices is not known."""
    config, target, task = found.config, found.target, found.config.task
    if not isinstance(task, Grpo | Ppo) or target.hardware is None:
        return None
    rollouts, length = task.rollouts, config.train.seq_len + 1
    load = ServingLoad(slots=rollouts.slots, context=max(length - rollouts.max_new_tokens // 2, 1))
    serving = ServingForecast(config, target, load)
    at_once = min(serving.texts, rollouts.completions)
    load = dataclasses.replace(load, slots=-(-at_once // serving.shards))
    step = dataclasses.replace(serving, load=load).step
    assert step.compute_seconds is not None and step.memory_seconds is not None
    limits = {"compute": step.compute_seconds, "memory": step.memory_seconds}
    decoding = dataclasses.replace(config, sharding=serving.sharding)
    if serving.sharding.zero is Zero.PARAMETERS and serving.mesh["fsdp"] > 1:
        limits["gathering"] = gather_seconds(decoding, target, step.weight_bytes)
    limited_by, seconds = max(limits.items(), key=lambda pair: pair[1])
    policy = reading_flops(config.model, config.train.seq_len)
    flops = policy * (1 + rollout_asks_reference(task))
    if isinstance(task, Ppo):
        flops += reading_flops(critic_of(config.model), config.train.seq_len)
    tokens = rollouts.completions * config.train.seq_len
    return RolloutTime(
        texts=rollouts.completions,
        at_once=at_once,
        token_seconds=seconds,
        limited_by=limited_by,
        write_seconds=-(-rollouts.completions // at_once) * rollouts.max_new_tokens * seconds,
        read_seconds=flops * tokens / target.devices / peak_flops(config, target, target.hardware),
        learn_seconds=rollouts.steps(config.train.batch_size) * found.time.step_seconds,
    )
