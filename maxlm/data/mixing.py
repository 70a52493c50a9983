"""Several sets of instructions as one, in given shares."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from maxlm.config import UserError

T = TypeVar("T")


def shares(sizes: Sequence[int], weights: Sequence[float], rate_cap: int | None = None) -> list[float]:
    """The share of each set: its weight times its size, where a size of more than `rate_cap` is as one of `rate_cap`.

    That is examples-proportional mixing (T5, arXiv:1910.10683, section 3.5.2), as FLAN uses it with a cap of 3,000
    (arXiv:2109.01652, section 2.4), so that large sets do not drown small ones. The shares sum to 1.

    Raises:
        UserError: no set has a record, or a weight is not positive.
    """
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise UserError(f"weights {tuple(weights)} must all be positive")
    counts = [weight * min(size, rate_cap or size) for size, weight in zip(sizes, weights, strict=True)]
    if not sum(counts):
        raise UserError("the sets to mix have no records")
    return [count / sum(counts) for count in counts]


def sampled(records: Sequence[T], cap: int | None, seed: int | str) -> list[T]:
    """At most `cap` of the records, drawn evenly, in their order; all of them if it is None."""
    if cap is None or len(records) <= cap:
        return list(records)
    return [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), cap))]


def mixed(sizes: Sequence[int], parts: Sequence[float], count: int, seed: int = 0) -> Iterator[tuple[int, int]]:
    """`count` times which set and which of its records.

    After n records each set has given its share of n, less than one more or one less for each other set. A set runs
    through all of its records, shuffled, before it gives one twice, and is shuffled anew then.

    Args:
        sizes: records of each set.
        parts: of `shares`.
        count: records in all.
        seed: of the shuffling.
    """
    due = [(1 / part, n) for n, part in enumerate(parts) if part > 0]
    heapq.heapify(due)
    taken, orders = [0] * len(sizes), [list[int]()] * len(sizes)
    for _ in range(count):
        _, n = heapq.heappop(due)
        epoch, at = divmod(taken[n], sizes[n])
        if at == 0:
            orders[n] = list(range(sizes[n]))
            random.Random(f"{seed}/{n}/{epoch}").shuffle(orders[n])
        yield n, orders[n][at]
        taken[n] += 1
        heapq.heappush(due, ((taken[n] + 1) / parts[n], n))
