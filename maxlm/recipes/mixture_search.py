"""The weights of a run's data sets that small runs on random mixtures say are best."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from maxlm.config import RunConfig, UserError, serialize
from maxlm.data.mixing_laws import MixingLaw, best_mixture, draw_mixtures, fit, rank_correlation, target_loss
from maxlm.data.prepare import ensure_prepared
from maxlm.data.shards import open_prepared
from maxlm.recipes.mixture_runs import MixtureRuns

_Each = tuple[float, ...]


@dataclass(frozen=True)
class MixtureSearch:
    """What was tried, and what came of it; tuples have a number for each data set."""

    paths: tuple[str, ...]
    targets: _Each
    """Weights of the losses in the one that is to be low."""
    tried: tuple[tuple[_Each, _Each], ...]
    """Weights and held-out losses of each run that the law is fitted to; the first has the config's weights."""
    law: MixingLaw
    best: _Each
    """Weights."""
    measured: _Each
    """Losses of a run with these, which the law has not seen."""

    @property
    def foretold(self) -> _Each:
        """Losses at the best weights, by the law."""
        return tuple(map(float, self.law(self.best)))

    def target(self, losses: Sequence[float]) -> float:
        """The loss that is to be low."""
        return float(target_loss(losses, self.targets))

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of that loss in each run and by the law of the others."""
        return rank_correlation(
            target_loss([losses for _, losses in self.tried], self.targets),
            target_loss(self.law.left_out, self.targets),
        )

    @property
    def error(self) -> float:
        """Root mean square of how far a law of all runs but one is from that one, as a part of its losses."""
        measured = np.array([losses for _, losses in self.tried])
        return float(np.sqrt(np.mean((self.law.left_out / measured - 1) ** 2)))


def search(
    config: RunConfig,
    *,
    runs: int,
    rounds: int,
    file: Path,
    targets: Sequence[float],
    seed: int,
    tell: Callable[[str], None],
) -> MixtureSearch:
    """Run what `file` does not have yet, fit, choose, and run the chosen; and the same again, with that run too.

    Args:
        config: of the small runs; its weights are what mixtures are drawn around.
        runs: mixtures, the config's own among them.
        rounds: how often is fitted and chosen.
        file: a row of JSON for each run is added to it.
        targets: see `MixtureSearch`; none: the config's weights.
        seed: of the mixtures.
        tell: gets a line for each run.

    Raises:
        UserError: the file has other runs' rows, or `MixtureRuns` and `fit` refuse.
    """
    n_sets = len(config.data.datasets)
    if targets and len(targets) != n_sets:
        raise UserError(f"--targets has {len(targets)} numbers for the {n_sets} of data.datasets; give one for each")
    if n_sets < 2 or runs < n_sets + 2:
        raise UserError(f"--runs {runs} for {n_sets} data.datasets: use two data sets or more, and two runs more")
    ensure_prepared(config.data)
    known, small_runs = _Rows(file, config), functools.cache(lambda: MixtureRuns(config))
    shares = config.data.weights
    mixtures = [_plain(np.array(shares) / sum(shares)), *map(_plain, draw_mixtures(shares, runs - 1, seed))]

    def have(wanted: Sequence[_Each]) -> list[_Each]:
        lacking = [weights for weights in dict.fromkeys(wanted) if weights not in known.rows]
        for number, weights in enumerate(lacking, start=1):
            known.add(weights, small_runs().losses(weights))
            tell(f"run {number} of {len(lacking)}: weights {_said(weights)}, losses {_said(known.rows[weights])}")
        return [known.rows[weights] for weights in wanted]

    targets = tuple(targets) or mixtures[0]
    for number in range(rounds):
        losses = have(mixtures)
        law = fit(mixtures, losses)
        best = _plain(best_mixture(law, shares, targets, seed))
        (measured,) = have([best])
        if number + 1 < rounds and best not in mixtures:
            mixtures.append(best)
    tried = tuple(zip(mixtures, losses, strict=True))
    return MixtureSearch(tuple(one.path for one in config.data.datasets), targets, tried, law, best, measured)


class _Rows:
    """Weights and losses of runs of one config, in a file."""

    def __init__(self, file: Path, config: RunConfig) -> None:
        self._file = file
        datasets = tuple(dataclasses.replace(one, weight=1.0, prepare=None) for one in config.data.datasets)
        alike = dataclasses.replace(config, data=dataclasses.replace(config.data, datasets=datasets), run_dir="-")
        texts = [open_prepared(Path(one.path), verify=False).info.text_sha256 for one in datasets]
        decides = json.dumps([serialize.to_dict(alike), texts], sort_keys=True)
        self._of = hashlib.sha256(decides.encode()).hexdigest()[:16]
        self.rows: dict[_Each, _Each] = {}
        try:
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            found = [(row["of"], tuple(row["weights"]), tuple(row["losses"])) for row in map(json.loads, lines)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--out {file}: is not what regmix wrote ({error}); name another file") from error
        if any(of != self._of for of, _, _ in found):
            raise UserError(f"--out {file}: has runs of another config, or on other data; name another file")
        self.rows = {weights: losses for _, weights, losses in found}

    def add(self, weights: _Each, losses: _Each) -> None:
        self.rows[weights] = losses
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"of": self._of, "weights": weights, "losses": losses}) + "\n")
        except OSError as error:
            raise UserError(f"--out {self._file}: cannot be written ({error.strerror}); name another file") from error


def _plain(weights: Any) -> _Each:
    """In thousandths, as Python's numbers."""
    return tuple(round(float(weight), 3) for weight in weights)


def _said(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"


def table_of(found: MixtureSearch) -> Table:
    """A row for each data set, and one for the loss that is to be low."""
    table = Table("source")
    names = ("weight", "target", "loss", "best weight", "loss, by the law", "loss, measured")
    for name in names:
        table.add_column(name, justify="right")
    weights, losses = found.tried[0]
    for i, path in enumerate(found.paths):
        before = (f"{weights[i]:.3f}", f"{found.targets[i]:g}", f"{losses[i]:.4f}")
        after = (f"{found.best[i]:.3f}", f"{found.foretold[i]:.4f}", f"{found.measured[i]:.4f}")
        table.add_row(Text(path), *before, *after)
    table.add_section()
    one, foretold, measured = (f"{found.target(values):.4f}" for values in (losses, found.foretold, found.measured))
    table.add_row("target", "", "", one, "", foretold, measured)
    return table


def lines_of(found: MixtureSearch) -> Iterator[str]:
    """How good the law is, and the weights for a config."""
    yield (
        f"{len(found.tried)} runs; the law of all but one is {found.error:.2%} from that one's losses (root mean "
        f"square), and puts the runs in their order with a rank correlation of {found.rank_correlation:.2f}"
    )
    if found.target(found.measured) >= (least := min(found.target(losses) for _, losses in found.tried)):
        yield f"note: one of the runs tried has a lower target, {least:.4f}; more --runs make a better law"
    yield f"weights: {_said(found.best)}"


def as_json(found: MixtureSearch) -> dict[str, Any]:
    """All of it but the law's numbers."""
    return {
        "paths": found.paths,
        "targets": found.targets,
        "runs": [{"weights": weights, "losses": losses} for weights, losses in found.tried],
        "best": {"weights": found.best, "foretold": found.foretold, "measured": found.measured},
        "left_out_error": found.error,
        "rank_correlation": found.rank_correlation,
    }
