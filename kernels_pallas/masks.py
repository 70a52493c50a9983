"""Which keys a query may see, as data.

A mask is a union of intervals: the query at position q sees the keys start(q) .. stop(q) - 1 of each, and both ends
grow with q. One description thus gives the test of an element, the keys that a block of queries needs, the queries that
a block of keys needs, and whether a block needs testing at all; all exact, in integers.

    causal & local(1023, 0)      a sliding window of 1024 keys, the query's own included
    causal | prefix(100)         a prefix LM: all see the first 100 positions
    causal & chunked(8192)       causal within chunks of 8192 positions
    causal & (local(127, 0) | strided(128))    the last 128, and every 128th before

Of an interval a mask may leave out all but some stripes. They decide single elements alone: a block that an interval
touches is computed, whatever the stripes leave of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Place = int | jax.Array

END = 2**30
"""Beyond every position, and far enough from the int32 limit to add to."""


@dataclass(frozen=True)
class Bound:
    """An end of an interval: offset + (q rounded down to a multiple of step); with step 0 the constant offset."""

    offset: int
    step: int = 1

    def at(self, q: Place) -> Place:
        if self.step == 0:
            return self.offset
        return (q if self.step == 1 else q // self.step * self.step) + self.offset

    def first_query_above(self, k: Place) -> Place:
        """The lowest q with at(q) > k: below it all are <= k, from it on all are above."""
        if self.step == 0:
            if isinstance(k, int):
                return -END if self.offset > k else END
            return jnp.where(self.offset > k, -END, END)
        return -((self.offset - 1 - k) // self.step) * self.step


@dataclass(frozen=True)
class Stripes:
    """Keys a multiple of `step` away from the query; or, with `last`, the last so many of each `step` positions."""

    step: int
    last: int | None = None

    def has(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Elementwise. Divides both: give them the smaller shapes, [T, 1] and [1, S]."""
        place = k % self.step
        return place == q % self.step if self.last is None else place >= self.step - self.last


@dataclass(frozen=True)
class Interval:
    """Keys from the largest of `starts` up to the smallest of `stops`, open at a side that names none; of these, those
    in all of `stripes`."""

    starts: tuple[Bound, ...] = ()
    stops: tuple[Bound, ...] = ()
    stripes: tuple[Stripes, ...] = ()

    def start(self, q: Place) -> Place:
        return _max([0, *(bound.at(q) for bound in self.starts)])

    def stop(self, q: Place) -> Place:
        return _min([END, *(bound.at(q) for bound in self.stops)])


@dataclass(frozen=True)
class Mask:
    """A union of intervals. Combine masks with & and |."""

    intervals: tuple[Interval, ...]
    name: str

    def __and__(self, other: Mask) -> Mask:
        both = (
            Interval(a.starts + b.starts, a.stops + b.stops, a.stripes + b.stripes)
            for a in self.intervals
            for b in other.intervals
        )
        return Mask(tuple(both), f"({self.name} & {other.name})")

    def __or__(self, other: Mask) -> Mask:
        return Mask(self.intervals + other.intervals, f"({self.name} | {other.name})")

    def visible(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Elementwise over positions that broadcast: boolean. Divides only q: give it the smaller shape, [T, 1]."""
        everything = (q == q) & (k == k)
        tests = (
            functools.reduce(
                jnp.logical_and,
                [k >= b.at(q) for b in i.starts]
                + [k < b.at(q) for b in i.stops]
                + [one.has(q, k) for one in i.stripes],
                everything,
            )
            for i in self.intervals
        )
        return functools.reduce(jnp.logical_or, tests)

    def touches(self, first_q: Place, last_q: Place, first_k: Place, last_k: Place) -> jax.Array | bool:
        """Whether a query in first_q .. last_q may see a key in first_k .. last_k; False is certain."""
        return functools.reduce(
            lambda x, y: x | y, ((i.start(first_q) <= last_k) & (i.stop(last_q) > first_k) for i in self.intervals)
        )

    def covers(self, first_q: Place, last_q: Place, first_k: Place, last_k: Place) -> jax.Array | bool:
        """Whether every query in first_q .. last_q sees every key in first_k .. last_k; True is certain."""
        none: jax.Array | bool = False
        whole = [i for i in self.intervals if not i.stripes]
        return functools.reduce(
            lambda x, y: x | y, ((i.start(last_q) <= first_k) & (i.stop(first_q) > last_k) for i in whole), none
        )

    def key_range(self, first_q: Place, last_q: Place) -> tuple[Place, Place]:
        """Positions [start, stop) that hold every key visible to a query in first_q .. last_q."""
        return (
            _min(i.start(first_q) for i in self.intervals),
            _max(i.stop(last_q) for i in self.intervals),
        )

    def query_range(self, first_k: Place, last_k: Place) -> tuple[Place, Place]:
        """Positions [start, stop) that hold every query that sees a key in first_k .. last_k."""
        starts = (_max([-END, *(bound.first_query_above(first_k) for bound in i.stops)]) for i in self.intervals)
        stops = (_min([END, *(bound.first_query_above(last_k) for bound in i.starts)]) for i in self.intervals)
        return _min(starts), _max(stops)

    def opened(self) -> Mask:
        """Without what hides keys from above: every interval from its start on."""
        kinds = tuple(dict.fromkeys((i.starts, i.stripes) for i in self.intervals))
        if ((), ()) in kinds:
            kinds = (((), ()),)
        return Mask(tuple(Interval(starts, (), stripes) for starts, stripes in kinds), f"({self.name}, open above)")

    def as_window(self) -> tuple[int | None, int | None] | None:
        """(left, right) when this mask is `local(left, right)`, however it was written; None when it is another."""
        (interval, *others) = self.intervals
        if others or interval.stripes or any(bound.step != 1 for bound in interval.starts + interval.stops):
            return None
        return (
            min((-bound.offset for bound in interval.starts), default=None),
            min((bound.offset - 1 for bound in interval.stops), default=None),
        )

    def __str__(self) -> str:
        return self.name.removeprefix("(").removesuffix(")") if self.name.startswith("(") else self.name


full = Mask((Interval(),), "full")
"""Every key."""

causal = Mask((Interval(stops=(Bound(1),)),), "causal")
"""Keys at the query's position and before."""


def local(left: int | None, right: int | None) -> Mask:
    """The `left` keys before the query's position, the one at it, and the `right` keys after; None: all on that side.

    Raises:
        ValueError: a width that is negative or no integer.
    """
    for name, width in (("left", left), ("right", right)):
        if width is not None and not (isinstance(width, int) and width >= 0):
            raise ValueError(f"local: {name} = {width!r} must be an integer from 0 on, or None for no limit")
    return Mask(
        (
            Interval(
                () if left is None else (Bound(-left),),
                () if right is None else (Bound(right + 1),),
            ),
        ),
        f"local({left}, {right})",
    )


def prefix(n: int) -> Mask:
    """The keys before position n, for every query; `causal | prefix(n)` is a prefix LM.

    Raises:
        ValueError: n is no positive integer.
    """
    if not (isinstance(n, int) and n > 0):
        raise ValueError(f"prefix: n = {n!r} must be a positive integer")
    return Mask((Interval(stops=(Bound(n, 0),)),), f"prefix({n})")


def chunked(size: int) -> Mask:
    """Keys in the query's own chunk, where positions are cut at the multiples of `size`.

    Raises:
        ValueError: size is no positive integer.
    """
    if not (isinstance(size, int) and size > 0):
        raise ValueError(f"chunked: size = {size!r} must be a positive integer")
    return Mask((Interval((Bound(0, size),), (Bound(size, size),)),), f"chunked({size})")


def strided(step: int) -> Mask:
    """Keys a multiple of `step` positions from the query ("strided" attention, arXiv:1904.10509, section 4.2).

    Raises:
        ValueError: step is no positive integer.
    """
    if not (isinstance(step, int) and step > 0):
        raise ValueError(f"strided: step = {step!r} must be a positive integer")
    return Mask((Interval(stripes=(Stripes(step),)),), f"strided({step})")


def summaries(size: int, last: int) -> Mask:
    """The last `last` keys of each chunk of `size` positions ("fixed" attention, arXiv:1904.10509, section 4.2).

    Raises:
        ValueError: not 0 < last <= size, in integers.
    """
    if not (isinstance(size, int) and isinstance(last, int) and 0 < last <= size):
        raise ValueError(f"summaries: size = {size!r}, last = {last!r} must be integers with 0 < last <= size")
    return Mask((Interval(stripes=(Stripes(size, last),)),), f"summaries({size}, {last})")


@functools.cache
def count_visible(mask: Mask, n_queries: int, n_keys: int, q_offset: int = 0) -> int:
    """How many of n_queries x n_keys scores are visible, stripes not counted off; the first query has position
    q_offset."""
    total = 0
    for q in range(q_offset, q_offset + n_queries):
        reached = 0
        for start, stop in sorted((int(i.start(q)), int(min(i.stop(q), n_keys))) for i in mask.intervals):
            total += max(stop - max(start, reached), 0)
            reached = max(reached, stop)
    return total


def _max(positions: Iterable[Place]) -> Place:
    """The largest, of Python integers or of arrays."""
    return functools.reduce(lambda x, y: max(x, y) if _both_known(x, y) else jnp.maximum(x, y), positions)


def _min(positions: Iterable[Place]) -> Place:
    """The smallest, of Python integers or of arrays."""
    return functools.reduce(lambda x, y: min(x, y) if _both_known(x, y) else jnp.minimum(x, y), positions)


def _both_known(x: Place, y: Place) -> bool:
    return isinstance(x, int) and isinstance(y, int)
