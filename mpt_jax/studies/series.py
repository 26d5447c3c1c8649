"""What one curve of a sweep's pictures shows, found in the lines of `results.jsonl`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mpt_jax.studies import results
from mpt_jax.studies.looks import look
from mpt_jax.studies.published import is_number
from mpt_jax.studies.results import METHODS, Record, Spread
from mpt_jax.studies.wording import short, value_label

Records = Sequence[Record]
Values = Mapping[str, Sequence[Any]]  # of each axis of a sweep, those without results yet, too


class Series(NamedTuple):
    """A curve's runs: method, and (axis, value) of what else its cells have in common."""

    method: str
    fixed: tuple[tuple[str, Any], ...]

    @property
    def label(self) -> str:
        names = ", ".join(f"{short(axis)} {value_label(value)}" for axis, value in self.fixed)
        return look(self.method).label + (f", {names}" if names else "")


def first_axis(axes: Values) -> str:
    """The first one with numbers, or the first."""
    return next((axis for axis, values in axes.items() if all(map(is_number, values)) and len(values) > 1), next(iter(axes)))


def axes_of(records: Records) -> dict[str, list[Any]]:
    """Every axis with its values: numbers by size, others in the order of the cells."""
    axes: dict[str, list[Any]] = {}
    for record in records:
        for axis, value in record.get("cell", {}).items():
            values = axes.setdefault(axis, [])
            if value not in values:
                values.append(value)
    return {axis: in_order(values) for axis, values in axes.items()}


def in_order(values: Sequence[Any]) -> list[Any]:
    """Numbers by size, for a value may have been added to an axis later."""
    return sorted(values) if all(map(is_number, values)) else list(values)


def series_of(records: Records, x: str, axes: Values | None = None) -> dict[Series, list[Record]]:
    """The runs of each series, methods in the tables' order. What several cells share is counted once for each value of x.

    Args:
      records: of all k, for a series has one name in all panels.
      axes: None for those of the records; a name is the same before all values have results.
    """
    axes = axes or axes_of(records)
    others = [axis for axis, values in axes.items() if axis != x and len(values) > 1]
    found: dict[Series, list[Record]] = {}
    for method in results.values_of(records, "method", METHODS):
        ours = results.select(records, method=method)
        own_axes = [axis for axis in others if matters(ours, axis, axes[axis])]
        seen = set()
        for record in ours:
            fixed = tuple((axis, _hashable(record["cell"].get(axis))) for axis in own_axes)
            own = (fixed, _hashable(record["cell"].get(x)), *(record[key] for key in ("stage", "task", "k", "seed")))
            if own not in seen:
                seen.add(own)
                found.setdefault(Series(method, fixed), []).append(record)
    return found


def matters(records: Records, axis: str, values: Sequence[Any] = ()) -> bool:
    """Whether the runs at one value of the axis are not those at another: cells that share points have the same ones.

    So it does where one of `values` has none: a result is written for all cells that share it.
    """
    runs: dict[str, set[Any]] = {json.dumps(value, sort_keys=True): set() for value in values}
    for record in records:
        value = json.dumps(record["cell"].get(axis), sort_keys=True)
        rest = json.dumps({name: other for name, other in record["cell"].items() if name != axis}, sort_keys=True)
        what = (rest, record["stage"], record["task"], record["k"], record["seed"])
        runs.setdefault(value, set()).add((*what, record.get("folder"), record.get("group"), record["score"]))
    return len({frozenset(those) for those in runs.values()}) > 1


def results_at(runs: Records, x: str, value: Any) -> list[Record]:
    """The runs at one value of x."""
    return [run for run in runs if _hashable(run["cell"].get(x)) == _hashable(value)]


def points_of(runs: Records, x: str, k: int, values: Sequence[Any]) -> list[tuple[Any, list[Record]]]:
    """(value, runs) of one series and k, at each value of x that has any."""
    here = results.select(runs, k=k)
    return [(value, there) for value in values if (there := results_at(here, x, value))]


def by_seed(runs: Records, k: int, tasks: Sequence[str]) -> dict[int, float]:
    """Of one series at one value of x: the mean over tasks of each seed that has them all."""
    return results.seed_means(runs, runs[0]["method"], k, tasks) if runs else {}


def mean_of(runs: Records, k: int, tasks: Sequence[str]) -> Spread | None:
    """The same over its seeds."""
    return results.spread(by_seed(runs, k, tasks).values())


def numbers_trained(runs: Records) -> int | None:
    """Of a run of one series at one value of x; None where no record says it."""
    return next((run["params_trained"] for run in runs if run.get("params_trained")), None)


def _hashable(value: Any) -> Any:
    """The same for what `value_label` calls the same way."""
    if isinstance(value, dict):
        value = sorted(value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
