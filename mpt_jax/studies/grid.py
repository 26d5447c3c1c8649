"""What a sweep's report says: scores along an axis, what parameters buy, and a table; from `results.jsonl` alone.

A series (`series.py`) is what one curve shows: a method and the values of all axes but the one along x. Runs that several cells
share, because an axis does not matter to them, are one series.
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mpt_jax.studies import chance, results, tables
from mpt_jax.studies.curves import parameter_frontier, place_of, score_by_axis
from mpt_jax.studies.looks import MANY_LOOKS
from mpt_jax.studies.page import Block, Cell, Heading, Picture, Table, Text
from mpt_jax.studies.published import Drawing, Published
from mpt_jax.studies.results import Record, Spread
from mpt_jax.studies.series import (
    Records,
    Series,
    Values,
    axes_of,
    by_seed,
    first_axis,
    in_order,
    matters,
    mean_of,
    numbers_trained,
    points_of,
    series_of,
)
from mpt_jax.studies.wording import counted, listing, mean_label, seeds_note, setting_label, short, task_labels, value_label

DIFFERS = "which is not the same in all cells"


def build_grid(records: Records, drawing: Drawing | None = None) -> list[Block]:
    """The report of a sweep as blocks. An x or an axis of the drawing that the results do not have is left aside."""
    drawing = drawing or Drawing()
    axes = axes_of(records)
    planned = axes | {axis: in_order(values) for axis, values in drawing.axes.items() if axis in axes}
    x = drawing.x if drawing.x in axes else first_axis(planned)
    targets = results.targets_of(records)
    if not targets:
        return [Text(("No target task has been scored yet.",))]
    tasks = results.values_of(targets, "task")
    found = tuple(grid_findings(records, x, planned))
    blocks: list[Block] = [Text((_about(records, planned, drawing),)), Heading("Scores")]
    blocks.append(Text(found or ("No cell has been scored on every target yet, so there is no mean.",)))
    blocks += _pictures(targets, x, planned, drawing.published) if found else []
    blocks += [Heading("Numbers"), grid_table(targets, x, planned)]
    if len(tasks) > 1:
        blocks.append(by_task_table(targets, x, planned))
    return blocks


def _pictures(targets: Records, x: str, axes: Values, published: Sequence[Published]) -> Iterator[Picture]:
    mean = mean_label(results.values_of(targets, "task"))
    notes = f"{_no_chance(targets)}{_alike(len(series_of(targets, x, axes)))}"
    measured = f"error bars of one standard deviation over seeds (none where n = 1).{notes}"
    curves = [curve for curve in published if curve.against == "x"]
    text = f"Score against {short(x)}: {mean}, {measured}{_sources(curves)}{_without_place(curves, axes[x], x)}"
    yield Picture("score_by_axis", score_by_axis(targets, x, curves, axes), text)
    bought = [curve for curve in published if curve.against == "parameters"]
    frontier = parameter_frontier(targets, x, bought, axes)
    if frontier is not None:
        marks = f"a mark for each series and value of {short(x)} (side by side where these train as many)"
        text = f"Score against the numbers that a run trains, on a log scale: {mean}, {marks}, {measured}{_sources(bought)}"
        yield Picture("parameters", frontier, text)


def grid_table(targets: Records, x: str, axes: Values | None = None) -> Table:
    """A row for each k, series and value of x: mean over targets, spread, seeds, numbers trained, seconds.

    `axes`, here and below: as for `series_of`.
    """
    tasks, rows = results.values_of(targets, "task"), []
    for k, one, value, runs in _rows(targets, x, axes):
        mean = mean_of(runs, k, tasks)
        seconds = sum(run.get("seconds", 0.0) for run in runs)
        rows.append(
            (
                tables.setting_cell(k),
                Cell(one.label),
                tables.value_cell(value),
                tables.score_cell(mean, weak=_weak(runs, mean, tasks)),
                tables.number(mean.n if mean else None, "d"),
                tables.number(numbers_trained(runs), ",.0f"),
                tables.number(seconds, ",.0f"),
            )
        )
    columns = ("k", "series", short(x), mean_label(tasks), "seeds", "numbers trained", "seconds, all runs")
    caption = "Mean scores, ± one standard deviation over seeds; a dash where a target is missing"
    return Table(caption + _dagger(rows), columns, tuple(rows))


def by_task_table(targets: Records, x: str, axes: Values | None = None) -> Table:
    """The same for each target task."""
    tasks = results.values_of(targets, "task")
    rows = []
    for k, one, value, runs in _rows(targets, x, axes):
        scores = [results.spread(run["score"] for run in results.select(runs, task=task)) for task in tasks]
        cells = [tables.score_cell(score, weak=_weak(runs, score, [task])) for task, score in zip(tasks, scores, strict=True)]
        rows.append((tables.setting_cell(k), Cell(one.label), tables.value_cell(value), *cells))
    names = task_labels(tasks)
    return Table(
        "Scores on each target" + _dagger(rows), ("k", "series", short(x), *(names[task] for task in tasks)), tuple(rows)
    )


def _weak(runs: Records, score: Spread | None, tasks: Sequence[str]) -> bool:
    """Whether the score of these runs, and of no others, is not above chance: another cell may have another test split."""
    return chance.above(runs, score, tasks) is False


def _dagger(rows: Sequence[Sequence[Cell]]) -> str:
    return "; † is not above chance" if any(cell.weak for row in rows for cell in row) else ""


def _rows(targets: Records, x: str, axes: Values | None) -> Iterator[tuple[int, Series, Any, list[Record]]]:
    series, values = series_of(targets, x, axes), axes_of(targets)[x]
    for k in results.settings_of(targets):
        for one, runs in series.items():
            for value, there in points_of(runs, x, k, values):
                yield k, one, value, there


def _about(records: Records, axes: Values, drawing: Drawing) -> str:
    cells = {json.dumps(record["cell"], sort_keys=True) for record in records}
    parts = [f"{short(axis)} ({', '.join(value_label(value) for value in values)})" for axis, values in axes.items()]
    text = f"A sweep over {listing(parts)}: {counted(len(cells), 'cell')}, {counted(len(records), 'result')}."
    if not drawing.missing:
        return text
    why = f", {drawing.failed:,} of them failed (the folder `failures` says why)" if drawing.failed else ""
    return f"{text} It is not finished: {counted(drawing.missing, 'point')} without a result{why}."


def grid_findings(records: Records, x: str = "", axes: Values | None = None) -> Iterator[str]:
    """For each k and series: the mean at each value of x, and the best one."""
    targets = results.targets_of(records)
    axes = axes or axes_of(records)
    x = x if x in axes else first_axis(axes)
    tasks = results.values_of(targets, "task")
    weak = False
    series = series_of(targets, x, axes)
    for k in results.settings_of(targets):
        for one, runs in series.items():
            means = list(_means(runs, x, k, axes[x], tasks))
            if not means:
                continue
            alike = len(means) > 1 and not matters(results.select(runs, k=k), x)
            means = means[:1] if alike else means
            weak |= any(point.weak for point in means)
            where = [f", whatever {short(x)} is" if alike else f" at {value_label(point.value)}" for point in means]
            line = ", ".join(f"{point.mean}{' †' if point.weak else ''}{at}" for point, at in zip(means, where, strict=True))
            seeds = seeds_note([point.mean for point in means])
            yield f"{setting_label(k)}, {one.label}, by {short(x)} ({seeds}): {line}{_highest(means)}."
    if weak:
        level = results.reference(targets, "chance", tasks)
        known = DIFFERS if level is None else f"{level:.1f}"
        yield f"† is not above chance, {known}, by more than {chance.STANDARD_ERRORS:g} standard errors."


class _Mean(NamedTuple):
    """Of a series at one value of x."""

    value: Any
    mean: Spread
    seeds: frozenset[int]  # that the mean is over
    weak: bool


def _means(runs: Records, x: str, k: int, values: Sequence[Any], tasks: Sequence[str]) -> Iterator[_Mean]:
    for value, there in points_of(runs, x, k, values):
        if mean := mean_of(there, k, tasks):
            yield _Mean(value, mean, frozenset(by_seed(there, k, tasks)), _weak(there, mean, tasks))


def _highest(means: Sequence[_Mean]) -> str:
    """'; highest at 20, within one standard deviation of 5'; nothing of one mean.

    One seed may score higher than another whatever x is, so that means over different ones do not say which value is best.
    """
    if len(means) < 2:
        return ""
    if any(point.seeds != means[0].seeds for point in means):
        return "; no highest is named, for the means are not over the same seeds"
    best = max(means, key=lambda point: point.mean.mean)
    within = [value_label(point.value) for point in means if point is not best and _within(point.mean, best.mean)]
    near = f", within one standard deviation of {listing(within)}" if within else ""
    return f"; highest at {value_label(best.value)}{near}"


def _within(mean: Spread, best: Spread) -> bool:
    spread = max((s for s in (mean.std, best.std) if not math.isnan(s)), default=0.0)
    return best.mean - mean.mean <= spread


def _no_chance(targets: Records) -> str:
    """Says why there is no line for chance where it is known."""
    tasks = results.values_of(targets, "task")
    known = all(any(run.get("chance") is not None for run in results.select(targets, task=task)) for task in tasks)
    differs = known and results.reference(targets, "chance", tasks) is None
    return f" No line for chance, {DIFFERS}." if differs else ""


def _alike(series: int) -> str:
    """Says where more series are drawn than can be told apart."""
    return f" There are {len(MANY_LOOKS)} looks for {series} series, so that some look alike." if series > len(MANY_LOOKS) else ""


def _without_place(curves: Sequence[Published], values: Sequence[Any], x: str) -> str:
    """Names the published points that are not drawn."""
    found = {curve.label: [value_label(at) for at in curve.x if place_of(at, values) is None] for curve in curves}
    each = [f"{label} at {listing(missing)}" for label, missing in found.items() if missing]
    return f" Left out, for {short(x)} has no such value here: {'; '.join(each)}." if each else ""


def _sources(curves: Sequence[Published]) -> str:
    each = "; ".join(f"{curve.label} ({curve.source})" for curve in curves)
    return f" Published, in grey and dashed with hollow marks: {each}." if each else ""
