"""configs/grpo_sort.py learns what its rewards say; with the rewards of others it forgets what it knew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from train_runs import rows

from configs import grpo_sort, sort_sft
from maxlm.config import DataConfig, RunConfig
from maxlm.data.problems import ProblemKind, problems
from maxlm.recipes import recipe
from maxlm.recipes.rewards import RewardSum
from maxlm.training import loop
from maxlm.training.loop import run

pytestmark = pytest.mark.nightly


def moved(config: RunConfig, folder: Path, name: str) -> RunConfig:
    """With all its folders there."""
    [dataset] = config.data.datasets
    assert dataset.prepare is not None
    documents = dataclasses.replace(dataset.prepare.documents, paths=(str(folder / "sort.jsonl"),))
    prepare = dataclasses.replace(dataset.prepare, documents=documents)
    dataset = dataclasses.replace(dataset, path=str(folder / Path(dataset.path).name), prepare=prepare)
    start = None if config.checkpoint.init_from is None else str(folder / "sft")
    return dataclasses.replace(
        config,
        data=DataConfig(datasets=(dataset,)),
        checkpoint=dataclasses.replace(config.checkpoint, init_from=start),
        run_dir=str(folder / name),
    )


def test_sorting_is_learned_from_its_own_rewards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "all_devices", lambda: jax.devices()[:1])
    with (tmp_path / "sort.jsonl").open("w") as file:
        for one in problems(ProblemKind.SORT, 6000, 0):
            file.write(f'{{"prompt": "{one.prompt}", "completion": "{one.answer}", "answer": "{one.answer}"}}\n')
    run(moved(sort_sft.get_config(), tmp_path, "sft"), recipe)
    config = moved(grpo_sort.get_config(), tmp_path, "grpo")
    run(config, recipe)
    before = np.mean([row["reward"] for row in rows(tmp_path / "grpo", "rollouts")[:2]])
    after = rows(tmp_path / "grpo", "evals")[-1]
    assert 0.6 < before < 0.82
    assert after["eval_reward"] > before + 0.12
    assert after["eval_reward_greedy"] > 0.9

    right = RewardSum.__call__

    def shuffled(self: RewardSum, completions: Any) -> Any:
        judged = right(self, completions)
        return judged._replace(total=np.random.default_rng(0).permutation(judged.total))

    monkeypatch.setattr(RewardSum, "__call__", shuffled)
    train = dataclasses.replace(config.train, eval_every=0)
    rollouts = dataclasses.replace(config.task.rollouts, eval_prompts=0)
    task = dataclasses.replace(config.task, rollouts=rollouts)
    run(dataclasses.replace(config, train=train, task=task, run_dir=str(tmp_path / "shuffled")), recipe)
    assert rows(tmp_path / "shuffled", "rollouts")[-1]["reward"] < 0.2
