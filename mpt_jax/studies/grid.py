"""What a sweep's report says: scores along an axis, what parameters buy, and a table; from `results.jsonl` alone.

A series is what one curve shows: a method and the values of all axes but the one along x. Runs that several cells share, because
an axis does not matter to them, are one series.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mpt_jax.studies import chance, results, tables
from mpt_jax.studies.figures import MARKER, draw_legend, draw_line, grid_of_axes, line_handle
from mpt_jax.studies.looks import LOOKS, OTHER_LOOKS, REFERENCE_LINES, STYLE, Look, look
from mpt_jax.studies.page import Block, Cell, Heading, Picture, Table, Text
from mpt_jax.studies.published import Drawing, Published, is_number
from mpt_jax.studies.results import METHODS, Record, Spread
from mpt_jax.studies.wording import counted, listing, mean_label, seeds_note, setting_label, short, task_labels, value_label

Records = Sequence[Record]
AXIS_NAMES = {"PROMPT_LENGTH": "prompt length, tokens", "INITIAL_CHECKPOINT_PATH": "backbone", "gin_file": "gin file"}
TICK_LETTERS = 45  # that stand side by side below a panel
PUBLISHED_COLOR = "#7a7a7a"
PUBLISHED_MARKERS = "os^DvPX*"  # hollow; a curve may be a single point


class Series(NamedTuple):
    """A curve's runs: method, and (axis, value) of what else its cells have in common."""

    method: str
    fixed: tuple[tuple[str, Any], ...]

    @property
    def label(self) -> str:
        names = ", ".join(f"{short(axis)} {value_label(value)}" for axis, value in self.fixed)
        return look(self.method).label + (f", {names}" if names else "")


def build_grid(records: Records, drawing: Drawing | None = None) -> list[Block]:
    """The report of a sweep as blocks. An x or an axis of the drawing that the results do not have is left aside."""
    drawing = drawing or Drawing()
    axes = axes_of(records)
    planned = axes | {axis: _in_order(values) for axis, values in drawing.axes.items() if axis in axes}
    x = drawing.x if drawing.x in axes else _first_axis(planned)
    targets = results.targets_of(records)
    if not targets:
        return [Text(("No target task has been scored yet.",))]
    tasks = results.values_of(targets, "task")
    found = tuple(grid_findings(records, x))
    blocks: list[Block] = [Text((_about(records, planned, drawing),)), Heading("Scores")]
    blocks.append(Text(found or ("No cell has been scored on every target yet, so there is no mean.",)))
    blocks += _pictures(targets, x, planned[x], drawing.published) if found else []
    blocks += [Heading("Numbers"), grid_table(targets, x)]
    if len(tasks) > 1:
        blocks.append(by_task_table(targets, x))
    return blocks


def _pictures(targets: Records, x: str, values: Sequence[Any], published: Sequence[Published]) -> Iterator[Picture]:
    curves = [curve for curve in published if curve.against == "x"]
    yield Picture(
        "score_by_axis",
        score_by_axis(targets, x, curves, values),
        f"Score against {short(x)}: {mean_label(results.values_of(targets, 'task'))}, error bars of one standard deviation over "
        f"seeds (none where n = 1).{_sources(curves)}{_without_place(curves, values, x)}",
    )
    bought = [curve for curve in published if curve.against == "parameters"]
    frontier = parameter_frontier(targets, bought)
    if frontier is not None:
        text = "Score against the numbers that a run trains, on a log scale; one mark for each series and value."
        yield Picture("parameters", frontier, text + _sources(bought))


def _first_axis(axes: Mapping[str, Sequence[Any]]) -> str:
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
    return {axis: _in_order(values) for axis, values in axes.items()}


def _in_order(values: Sequence[Any]) -> list[Any]:
    """Numbers by size, for a value may have been added to an axis later."""
    return sorted(values) if all(map(is_number, values)) else list(values)


def series_of(records: Records, x: str) -> dict[Series, list[Record]]:
    """The runs of each series, methods in the tables' order. What several cells share is counted once for each value of x."""
    axes = axes_of(records)
    others = [axis for axis, values in axes.items() if axis != x and len(values) > 1]
    found: dict[Series, list[Record]] = {}
    for method in results.values_of(records, "method", METHODS):
        ours = results.select(records, method=method)
        matters = [axis for axis in others if _matters(ours, axis)]
        seen = set()
        for record in ours:
            fixed = tuple((axis, _hashable(record["cell"].get(axis))) for axis in matters)
            own = (fixed, _hashable(record["cell"].get(x)), *(record[key] for key in ("stage", "task", "k", "seed")))
            if own not in seen:
                seen.add(own)
                found.setdefault(Series(method, fixed), []).append(record)
    return found


def _matters(records: Records, axis: str) -> bool:
    """Whether the runs at one value of the axis are not those at another: cells that share points have the same ones."""
    runs: dict[str, set[Any]] = {}
    for record in records:
        value = json.dumps(record["cell"].get(axis), sort_keys=True)
        rest = json.dumps({name: other for name, other in record["cell"].items() if name != axis}, sort_keys=True)
        what = (rest, record["stage"], record["task"], record["k"], record["seed"])
        runs.setdefault(value, set()).add((*what, record.get("folder"), record.get("group"), record["score"]))
    return len({frozenset(those) for those in runs.values()}) > 1


def score_by_axis(targets: Records, x: str, published: Sequence[Published] = (), values: Sequence[Any] = ()) -> Figure:
    """One panel per k: the mean over targets along x, a curve for each series.

    `values` have the ticks, those without results, too; () stands for those with results.
    """
    tasks, settings = results.values_of(targets, "task"), results.settings_of(targets)
    values = values or axes_of(targets)[x]
    places, labels, log = _places(values)
    ordered = all(map(is_number, values)) or _sizes(targets, x, values)  # a line says that there is something in between
    with rc_context(STYLE):
        figure, axes, columns = grid_of_axes(len(settings), (4.2, 3.1), 0.7, sharey=True)
        handles: dict[str, Line2D] = {}
        for axis, k in zip(axes, settings, strict=False):
            here = results.select(targets, k=k)
            series = series_of(here, x)
            looks = _looks(list(series))
            everything = []
            for index, (one, runs) in enumerate(series.items()):
                style = looks[one] if ordered else dataclasses.replace(looks[one], line="none")
                spreads = [_mean(results_at(runs, x, value), k, tasks) for value in values]
                everything += spreads
                apart = 0.012 if ordered else min(0.12, 0.6 / len(series)) / max(1, len(values) - 1)
                aside = apart * (index - (len(series) - 1) / 2)  # of the axis' width, so that error bars do not hide one another
                draw_line(axis, _aside(places, aside, log), spreads, style)
                handles[one.label] = line_handle(style)
            for number, curve in enumerate(published):
                both = [(place_of(at, values), y) for at, y in zip(curve.x, curve.y, strict=True)]
                if placed := [(where, y) for where, y in both if where is not None]:
                    handles[curve.label] = _draw_published(axis, placed, curve, number)
            level = results.reference(targets, "chance", tasks)
            if level is not None:
                color, dashes = REFERENCE_LINES["chance"]
                axis.axhline(level, color=color, ls=dashes, lw=1.1, zorder=1)
                handles["chance"] = Line2D([], [], color=color, ls=dashes, lw=1.1, label="chance")
            axis.set_title(f"{setting_label(k)} ({seeds_note(everything)})")
            _scale(axis, places, labels, log)
            if not ordered:
                axis.set_xlim(-0.5, len(places) - 0.5)
            axis.set_xlabel(name_of(x))
        for index in range(0, len(axes), columns):
            axes[index].set_ylabel(f"score, {mean_label(tasks)}")
        draw_legend(figure, list(handles.values()))
    return figure


def parameter_frontier(targets: Records, published: Sequence[Published] = ()) -> Figure | None:
    """Score against the numbers trained, one panel per k; None for one method, or where all runs train as many."""
    sizes = {record["params_trained"] for record in targets if record.get("params_trained")}
    if len(sizes) < 2 or len(results.values_of(targets, "method")) < 2:
        return None
    tasks, settings = results.values_of(targets, "task"), results.settings_of(targets)
    with rc_context(STYLE):
        figure, axes, columns = grid_of_axes(len(settings), (4.2, 3.1), 0.7, sharey=True)
        handles: dict[str, Line2D] = {}
        for axis, k in zip(axes, settings, strict=False):
            marks: dict[tuple[str, int, str], list[Record]] = {}
            for record in results.select(targets, k=k):
                cell = json.dumps(record["cell"], sort_keys=True)
                marks.setdefault((record["method"], record["params_trained"], cell), []).append(record)
            for (method, size, _), runs in marks.items():
                looks: dict[str, Any] = {"color": look(method).color, "marker": look(method).marker, **MARKER}
                if mean := _mean(runs, k, tasks):
                    error = 0.0 if math.isnan(mean.std) else mean.std
                    axis.errorbar(size, mean.mean, error, ms=5, capsize=2, elinewidth=1, **looks)
                handles[method] = Line2D([], [], ls="", label=look(method).label, **looks)
            for number, curve in enumerate(published):
                handles[curve.label] = _draw_published(axis, list(zip(curve.x, curve.y, strict=True)), curve, number)
            axis.set_xscale("log")
            axis.set_title(setting_label(k))
            axis.set_xlabel("numbers trained for a task")
        for index in range(0, len(axes), columns):
            axes[index].set_ylabel(f"score, {mean_label(tasks)}")
        draw_legend(figure, list(handles.values()))
    return figure


def grid_table(targets: Records, x: str) -> Table:
    """A row for each k, series and value of x: mean over targets, spread, seeds, numbers trained, seconds."""
    tasks, rows = results.values_of(targets, "task"), []
    for k, one, value, runs in _rows(targets, x):
        mean = _mean(runs, k, tasks)
        known = [run["params_trained"] for run in runs if run.get("params_trained")]
        seconds = sum(run.get("seconds", 0.0) for run in runs)
        rows.append(
            (
                tables.setting_cell(k),
                Cell(one.label),
                _value_cell(value),
                tables.score_cell(mean, weak=_weak(targets, mean, tasks)),
                tables.number(mean.n if mean else None, "d"),
                tables.number(known[0] if known else None, ",.0f"),
                tables.number(seconds, ",.0f"),
            )
        )
    columns = ("k", "series", short(x), mean_label(tasks), "seeds", "numbers trained", "seconds, all runs")
    caption = "Mean scores, ± one standard deviation over seeds; a dash where a target is missing"
    return Table(caption + _dagger(rows), columns, tuple(rows))


def by_task_table(targets: Records, x: str) -> Table:
    """The same for each target task."""
    tasks = results.values_of(targets, "task")
    rows = []
    for k, one, value, runs in _rows(targets, x):
        scores = [results.spread(run["score"] for run in results.select(runs, task=task)) for task in tasks]
        cells = [tables.score_cell(score, weak=_weak(targets, score, [task])) for task, score in zip(tasks, scores, strict=True)]
        rows.append((tables.setting_cell(k), Cell(one.label), _value_cell(value), *cells))
    names = task_labels(tasks)
    return Table(
        "Scores on each target" + _dagger(rows), ("k", "series", short(x), *(names[task] for task in tasks)), tuple(rows)
    )


def _weak(targets: Records, score: Spread | None, tasks: Sequence[str]) -> bool:
    return chance.above(targets, score, tasks) is False


def _dagger(rows: Sequence[Sequence[Cell]]) -> str:
    return "; † is not above chance" if any(cell.weak for row in rows for cell in row) else ""


def results_at(runs: Records, x: str, value: Any) -> list[Record]:
    """The runs at one value of x."""
    return [run for run in runs if _hashable(run["cell"].get(x)) == _hashable(value)]


def name_of(axis: str) -> str:
    """An axis as a person reads it."""
    return AXIS_NAMES.get(axis, short(axis))


def _rows(targets: Records, x: str) -> Iterator[tuple[int, Series, Any, list[Record]]]:
    for k in results.settings_of(targets):
        here = results.select(targets, k=k)
        for one, runs in series_of(here, x).items():
            for value in axes_of(targets)[x]:
                if there := results_at(runs, x, value):
                    yield k, one, value, there


def _value_cell(value: Any) -> Cell:
    return Cell(value_label(value), float(value) if is_number(value) else None)


def _mean(runs: Records, k: int, tasks: Sequence[str]) -> Spread | None:
    """Of one series at one value of x, over the seeds that have all tasks."""
    if not runs:
        return None
    return results.spread(results.seed_means(runs, runs[0]["method"], k, tasks).values())


def _about(records: Records, axes: Mapping[str, Sequence[Any]], drawing: Drawing) -> str:
    cells = {json.dumps(record["cell"], sort_keys=True) for record in records}
    parts = [f"{short(axis)} ({', '.join(value_label(value) for value in values)})" for axis, values in axes.items()]
    text = f"A sweep over {listing(parts)}: {counted(len(cells), 'cell')}, {counted(len(records), 'result')}."
    if not drawing.missing:
        return text
    why = f", {drawing.failed:,} of them failed (the folder `failures` says why)" if drawing.failed else ""
    return f"{text} It is not finished: {counted(drawing.missing, 'point')} without a result{why}."


def grid_findings(records: Records, x: str = "") -> Iterator[str]:
    """For each k and series: the best value of x and the spread there, with the ends of the curve."""
    targets = results.targets_of(records)
    axes = axes_of(records)
    x = x if x in axes else _first_axis(axes)
    tasks = results.values_of(targets, "task")
    weak = False
    for k in results.settings_of(targets):
        here = results.select(targets, k=k)
        for one, runs in series_of(here, x).items():
            means = [(value, mean) for value in axes_of(targets)[x] if (mean := _mean(results_at(runs, x, value), k, tasks))]
            if not means:
                continue
            alike = len(means) > 1 and not _matters(runs, x)
            means = means[:1] if alike else means
            value, best = max(means, key=lambda pair: pair[1].mean)
            marks = [" †" if _weak(targets, mean, tasks) else "" for _, mean in means]
            weak |= any(marks)
            where = [f", whatever {short(x)} is" if alike else f" at {value_label(at)}" for at, _ in means]
            line = ", ".join(f"{mean}{mark}{at}" for (_, mean), mark, at in zip(means, marks, where, strict=True))
            within = [value_label(at) for at, mean in means if at != value and _within(mean, best)]
            near = f", within one standard deviation of {listing(within)}" if within else ""
            highest = f"; highest at {value_label(value)}{near}" if len(means) > 1 else ""
            seeds = seeds_note([mean for _, mean in means])
            yield f"{setting_label(k)}, {one.label}, by {short(x)} ({seeds}): {line}{highest}."
    if weak:
        level = results.reference(targets, "chance", tasks)
        yield f"† is not above chance, {level:.1f}, by more than {chance.STANDARD_ERRORS:g} standard errors."


def _within(mean: Spread, best: Spread) -> bool:
    spread = max((s for s in (mean.std, best.std) if not math.isnan(s)), default=0.0)
    return best.mean - mean.mean <= spread


def _sizes(targets: Records, x: str, values: Sequence[Any]) -> bool:
    """Whether each value of x that has results is a T5 of another size."""
    found = [[run.get("config", {}).get("backbone", {}) for run in results_at(targets, x, value)] for value in values]
    shapes = [{json.dumps(backbone.get("architecture")) for backbone in backbones} for backbones in found if backbones]
    return len(set.union(*shapes)) == len(shapes) > 1


def place_of(at: Any, values: Sequence[Any]) -> float | None:
    """Where a value of a published curve stands on an axis of these values; None where it has no place.

    A number has one on any scale of numbers; what stands side by side is found by its value or by its label.
    """
    places, labels, log = _places(values)
    if all(map(is_number, values)):
        return float(at) if is_number(at) and (at > 0 or not log) else None
    if at in values:
        return places[list(values).index(at)]
    return places[labels.index(value_label(at))] if value_label(at) in labels else None


def _without_place(curves: Sequence[Published], values: Sequence[Any], x: str) -> str:
    """Names the published points that are not drawn."""
    found = {curve.label: [value_label(at) for at in curve.x if place_of(at, values) is None] for curve in curves}
    each = [f"{label} at {listing(missing)}" for label, missing in found.items() if missing]
    return f" Left out, for {short(x)} has no such value here: {'; '.join(each)}." if each else ""


def _sources(curves: Sequence[Published]) -> str:
    return "".join(f" Dashed: {curve.label} ({curve.source})." for curve in curves)


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value


def _places(values: Sequence[Any]) -> tuple[list[float], list[str], bool]:
    """(places, labels, whether on a log scale): numbers over more than a factor of ten are, words are at 0, 1, 2, …"""
    labels = [value_label(value) for value in values]
    if not all(map(is_number, values)):
        return [float(n) for n in range(len(values))], labels, False
    places = [float(value) for value in values]
    return places, labels, min(places) > 0 and max(places) / min(places) > 10


def _aside(places: Sequence[float], share: float, log: bool) -> list[float]:
    """The places moved by a share of their whole extent."""
    if log:
        extent = math.log(max(places) / min(places))
        return [place * math.exp(share * extent) for place in places]
    return [place + share * (max(places) - min(places) or 1.0) for place in places]


def _draw_published(axis: Axes, points: Sequence[tuple[float, float]], curve: Published, number: int) -> Line2D:
    """Draws the `number`-th published curve through the points that have a place; returns its line in the legend."""
    looks: dict[str, Any] = {"ls": ("--", ":", "-.")[number % 3], "lw": 1.2, "color": PUBLISHED_COLOR}
    looks |= {"marker": PUBLISHED_MARKERS[number % len(PUBLISHED_MARKERS)], "ms": 4.5, "mfc": "none"}
    axis.plot(*zip(*points, strict=True), zorder=1, **looks)
    return Line2D([], [], label=curve.label, **looks)


def _scale(axis: Axes, places: Sequence[float], labels: Sequence[str], log: bool) -> None:
    if log:
        axis.set_xscale("log")
    wide = sum(map(len, labels)) > TICK_LETTERS
    turned: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if wide else {}
    axis.set_xticks(list(places), list(labels), **turned)
    axis.minorticks_off()


def _looks(every: Sequence[Series]) -> dict[Series, Look]:
    """The look of each series: a method's own for its first one, for the others what is no method's, then what is none's here."""
    first = {one.method: one for one in reversed(every)}
    taken = [look(method) for method in first]
    free = itertools.cycle([style for style in (*OTHER_LOOKS, *LOOKS.values()) if style not in taken])
    looks = {one: look(one.method) if first[one.method] == one else next(free) for one in every}
    return {one: dataclasses.replace(style, label=one.label) for one, style in looks.items()}
