"""Where a run does not fit: the cheapest changes that would make it, each checked by the same arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from maxlm.config import RunConfig
from maxlm.plan.analysis import Forecast, Json
from maxlm.plan.machines import Machine, larger
from maxlm.plan.search import MeshSpace, differences, fastest, fitting, layouts, optimizers, preference, spelled_out

MOST_DOUBLES = 6
"""Of the target's devices; and halves of the batch or a sequence."""
_LEARNED = ("optimizer", "train.batch_size", "train.seq_len")
"""How the keys begin that change what a run learns."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A way to make a run fit."""

    what: tuple[str, ...]
    """Each key that changes, as key = value."""
    candidate: Forecast

    @property
    def learns_otherwise(self) -> bool:
        """What comes out is another model, not the same one computed in another way."""
        return any(one.startswith(_LEARNED) for one in self.what)


def cheapest_changes(config: RunConfig, target: Machine, *, searched: bool = False, number: int = 3) -> list[Change]:
    """For a run that does not fit: what would make it, by arithmetic, cheapest first; what learns otherwise comes last.

    The price is the bound on device-seconds a token, then devices, then the number of keys that change. No change
    includes another one that comes before it.

    Args:
        config: the run.
        target: its machine.
        searched: a search has been done, and found nothing.
        number: of changes, at most.

    Raises:
        UserError: memory or speed of the target's devices is not known.
    """
    found = [*_on_this_machine(config, target), *_elsewhere(config, target)]
    changes = _distinct(found, config, target)
    if len(changes) < number:
        changes = _distinct([*found, *_searched(config, target, searched)], config, target)
    return changes[:number]


def _distinct(found: Sequence[Forecast], config: RunConfig, target: Machine) -> list[Change]:
    original, chosen = spelled_out(config, target), dict[frozenset[str], Change]()
    elsewhere = lambda one: () if one.target == target else (f"target = {one.target}",)
    changes = [Change(what=(*elsewhere(one), *differences(one.config, original)), candidate=one) for one in found]
    price = lambda change: (change.candidate.cost, change.candidate.target.devices, len(change.what))
    for change in sorted(changes, key=lambda change: (change.learns_otherwise, *price(change))):
        keys = frozenset(one.split(" = ")[0] for one in change.what)
        if not any(before <= keys for before in chosen):
            chosen[keys] = change
    return list(chosen.values())


def _on_this_machine(config: RunConfig, target: Machine) -> Iterator[Forecast]:
    """The fastest of the same mesh for each set of parts of the config that change, and the fastest other mesh."""
    original = spelled_out(config, target)
    space = MeshSpace(original, target, original.sharding)
    fastest: dict[tuple[bool, ...], Forecast] = {}
    for one in sorted(fitting(space.configs(), target), key=preference):
        parts = ("optimizer", "sharding", "train", "execution")
        fastest.setdefault(tuple(getattr(one.config, part) != getattr(original, part) for part in parts), one)
    yield from fastest.values()
    yield from _fastest_meshes(config, [target])


def _fastest_meshes(config: RunConfig, machines: Iterable[Machine]) -> list[Forecast]:
    """The fastest that fits with everything else as it is, on the first of the machines that has one; one or none."""
    for machine in machines:
        best: list[Forecast] = []
        for sharding in layouts(config, machine):
            one = Forecast(replace(config, sharding=sharding), machine)
            slow = best and one.compute_time > best[0].time.step_seconds
            if not slow and not one.config.broken_layout_rules(machine.devices) and one.fits:
                best = sorted([*best, one], key=preference)[:1]
        if best:
            return best
    return []


def _elsewhere(config: RunConfig, target: Machine) -> Iterator[Forecast]:
    """More devices, a smaller batch and shorter sequences, each by as few doubles or halves as it takes."""
    yield from _fastest_meshes(config, _larger_machines(target))
    for key in ("batch_size", "seq_len"):
        sizes = [max(1, getattr(config.train, key) >> halves) for halves in range(1, MOST_DOUBLES + 1)]
        less = [spelled_out(replace(config, train=replace(config.train, **{key: size})), target) for size in sizes]
        allowed = (one for one in less if not one.broken_layout_rules(target.devices))
        yield from itertools.islice(fitting(allowed, target), 1)


def _searched(config: RunConfig, target: Machine, already: bool) -> Iterator[Forecast]:
    """What takes longer to find: the best here, and of the smallest larger machine that needs no other optimizer."""
    own, *others = optimizers(config.optimizer)
    here = (fastest(config, target, choices) for choices in ([own], others) if not already)
    elsewhere = (fastest(config, machine, [own]) for machine in _larger_machines(target))
    for found in (here, elsewhere):
        yield from itertools.islice(filter(None, found), 1)


def _larger_machines(target: Machine) -> Iterator[Machine]:
    grown = (larger(target, 2 ** (target.devices.bit_length() - 1 + n)) for n in range(1, MOST_DOUBLES + 1))
    return (machine for machine in grown if machine is not None)


def change_json(change: Change) -> dict[str, Json]:
    """A change as plain values."""
    one = change.candidate
    return {
        "changes": change.what,
        "learns_otherwise": change.learns_otherwise,
        "target": str(one.target),
        "margin_bytes": one.margin,
        "step_seconds": one.time.step_seconds,
        "device_seconds_per_token": one.cost,
    }
