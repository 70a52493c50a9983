"""Self-instruct (arXiv:2212.10560): a model writes new tasks after a few that people wrote, and then solves them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from maxlm.data.near_duplicates import Novelty, words

_SHOWN, _OWN = 8, 2
"""Tasks that are shown in a prompt, and how many of them the model wrote (section 2.2)."""
_EXAMPLES = 4
"""Solved tasks before the one to solve."""
_LENGTHS = range(3, 151)
"""Words of an instruction (appendix A)."""
_UNSUITED = re.compile(
    r"\b(?:images?|pictures?|photos?|graphs?|files?|maps?|draw|plot|videos?|audio|music)\b", re.IGNORECASE
)
"""Words of tasks that text alone cannot solve."""
_NEXT = re.compile(r"\n\s*(?:Task )?\d+[:.] ")


class Ask(Protocol):
    """A model that goes on with texts."""

    def __call__(self, prompts: Sequence[str], stop: Sequence[str], seed: int) -> list[str]:
        """A continuation of each prompt, without the first of the `stop` strings and what follows it."""


class WrittenTask(NamedTuple):
    """As Alpaca has it."""

    instruction: str
    input: str
    output: str


def self_instruct(
    seeds: Sequence[WrittenTask],
    ask: Ask,
    *,
    count: int,
    rounds: int,
    at_once: int = 8,
    threshold: float = 0.7,
    seed: int = 0,
) -> Iterator[WrittenTask]:
    """New tasks, solved; at most `count`, in at most `rounds` rounds of `at_once` prompts.

    In a round each prompt lists tasks, of seeds and of the model's own, and the model goes on with the list. What it
    adds is a task if it is long enough, can be solved in text, and its ROUGE-L with every task so far is less than
    `threshold` (0.7 in the paper). Then the model is shown solved tasks and solves the new ones. A solution that is
    empty, or repeats its input, is none.

    Args:
        seeds: tasks that people wrote; at least one.
        ask: the model.
        count: of tasks.
        rounds: of asking.
        at_once: prompts of a round.
        threshold: of nearness.
        seed: of what is shown and of the model's drawing.
    """
    novelty, own, draw, given = Novelty(threshold), list[WrittenTask](), random.Random(seed), 0
    for task in seeds:
        novelty.add(task.instruction)
    for _ in range(rounds):
        lists = [_listed(seeds, own, draw) for _ in range(at_once)]
        found = ask(lists, ["\n\n"], draw.randrange(1 << 31))
        fresh = [one for text in found for one in _instructions(text) if _suited(one) and novelty.add(one)]
        if not fresh:
            continue
        examples = draw.sample(list(seeds), min(_EXAMPLES, len(seeds)))
        prompts = ["".join(map(_solved, examples)) + f"Task: {instruction}\nInput:" for instruction in fresh]
        for instruction, text in zip(fresh, ask(prompts, ["\nTask:"], draw.randrange(1 << 31)), strict=True):
            said, _, output = text.partition("\nOutput:")
            said = "" if said.strip() == _NOTHING else said.strip()
            if not output.strip() or output.strip() == said:
                continue
            task = WrittenTask(instruction, said, output.strip())
            own.append(task)
            yield task
            given += 1
            if given == count:
                return


_NOTHING = "(none)"
"""What stands for an empty input, so that the model says that there is none."""


def _listed(seeds: Sequence[WrittenTask], own: Sequence[WrittenTask], draw: random.Random) -> str:
    mine = draw.sample(list(own), min(_OWN, len(own)))
    shown = [*mine, *draw.sample(list(seeds), min(_SHOWN - len(mine), len(seeds)))]
    draw.shuffle(shown)
    lines = [f"Task {n}: {' '.join(task.instruction.split())}\n" for n, task in enumerate(shown, 1)]
    return "Come up with a series of tasks:\n\n" + "".join(lines) + f"Task {len(shown) + 1}:"


def _instructions(text: str) -> list[str]:
    """Each of a list that the model went on with. The last may have been cut, and counts only if it is a sentence."""
    found = [" ".join(one.split()) for one in _NEXT.split(text)]
    return [one for n, one in enumerate(found) if one and (n + 1 < len(found) or one[-1] in ".?!")]


def _suited(instruction: str) -> bool:
    return len(words(instruction)) in _LENGTHS and instruction[0].isalnum() and not _UNSUITED.search(instruction)


def _solved(task: WrittenTask) -> str:
    return f"Task: {task.instruction}\nInput: {task.input or _NOTHING}\nOutput: {task.output}\n\n"
