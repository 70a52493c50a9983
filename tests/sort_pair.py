"""The pair of configs/grpo_sort.py, in a process that compiles as users' do: what it learns from its rewards, and what
from the same rewards in another order.

    python tests/sort_pair.py FOLDER STEPS SHUFFLED_STEPS
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from configs import grpo_sort, sort_sft
from maxlm.config import DataConfig, RunConfig
from maxlm.data.problems import ProblemKind, problems
from maxlm.recipes import recipe
from maxlm.recipes.rewards import RewardSum
from maxlm.training.loop import run


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


def rewards(folder: Path, name: str) -> list[float]:
    """Of each rollout."""
    return [json.loads(line)["reward"] for line in (folder / name / "rollouts.jsonl").read_text().splitlines()]


def main(folder: Path, steps: int, shuffled_steps: int) -> dict[str, Any]:
    with (folder / "sort.jsonl").open("w") as file:
        for one in problems(ProblemKind.SORT, 6000, 0):
            file.write(f'{{"prompt": "{one.prompt}", "completion": "{one.answer}", "answer": "{one.answer}"}}\n')
    run(moved(sort_sft.get_config(), folder, "sft"), recipe)
    config = moved(grpo_sort.get_config(), folder, "grpo")
    run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps, eval_every=0)), recipe)

    right = RewardSum.__call__

    def shuffled(self: RewardSum, completions: Any) -> Any:
        judged = right(self, completions)
        return judged._replace(total=np.random.default_rng(0).permutation(judged.total))

    RewardSum.__call__ = shuffled  # type: ignore[method-assign]
    train = dataclasses.replace(config.train, steps=shuffled_steps, eval_every=0, eval_batches=0)
    rollouts = dataclasses.replace(config.task.rollouts, eval_prompts=0)
    task = dataclasses.replace(config.task, rollouts=rollouts)
    run(dataclasses.replace(config, train=train, task=task, run_dir=str(folder / "shuffled")), recipe)
    after = json.loads((folder / "grpo" / "evals.jsonl").read_text().splitlines()[-1])
    return {
        "before": float(np.mean(rewards(folder, "grpo")[:2])),
        "after": after["eval_reward"],
        "greedy": after["eval_reward_greedy"],
        "shuffled": float(np.mean(rewards(folder, "shuffled")[-2:])),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
