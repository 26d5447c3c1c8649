"""What a sweep's report says: scores along an axis, what parameters buy, and a table; from `results.jsonl` alone.

A series is what one curve shows: a method and the values of all axes but the one along x. Runs that several cells share, because
an axis does not matter to them, are one series.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mpt_jax.errors import UserError
from mpt_jax.studies import chance, results, tables
from mpt_jax.studies.figures import MARKER, draw_legend, draw_line, grid_of_axes, line_handle
from mpt_jax.studies.looks import CURVE_LOOKS, LOOKS, REFERENCE_LINES, STYLE, Look, look
from mpt_jax.studies.page import Block, Cell, Heading, Picture, Table, Text
from mpt_jax.studies.results import METHODS, Record, Spread
from mpt_jax.studies.wording import counted, listing, mean_label, seeds_note, setting_label, short, task_labels, value_label

Records = Sequence[Record]
AXIS_NAMES = {"PROMPT_LENGTH": "prompt length, tokens", "INITIAL_CHECKPOINT_PATH": "backbone", "gin_file": "gin file"}
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


@dataclasses.dataclass(frozen=True)
class Published:
    """A curve to draw dashed beside those of the sweep.

    `x` are values of the sweep's x axis, as its labels have them, or parameters trained with `against` = "parameters".
    """

    label: str
    source: str
    x: tuple[Any, ...]
    y: tuple[float, ...]
    against: str = "x"


def read_published(path: str | Path) -> list[Published]:
    """The curves of a JSON file, a list of {"label", "source", "x", "y", "against"}; `source` is printed under the picture.

    Raises:
      UserError: no such file, or not such a list.
    """
    try:
        return [
            Published(**curve | {key: tuple(curve[key]) for key in ("x", "y")}) for curve in json.loads(Path(path).read_text())
        ]
    except OSError as error:
        raise UserError(f"SweepConfig.published is '{path}', which cannot be read ({error.strerror}); check the path.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f'SweepConfig.published is {path}, which is no list of {{"label", "source", "x", "y"}} ({error}); mend it.'
        ) from None


def build_grid(records: Records, x: str = "", published: Sequence[Published] = ()) -> list[Block]:
    """The report of a sweep as blocks.

    Args:
      x: the axis along which curves run; "" = the first one with numbers, or the first.
    """
    axes = axes_of(records)
    x = x or _first_axis(axes)
    targets = results.targets_of(records)
    if not targets:
        return [Text(("No target task has been scored yet.",))]
    tasks = results.values_of(targets, "task")
    blocks: list[Block] = [Text((_about(records, axes),)), Heading("Scores"), Text(tuple(grid_findings(records, x)))]
    curves = [curve for curve in published if curve.against == "x"]
    blocks.append(
        Picture(
            "score_by_axis",
            score_by_axis(targets, x, curves),
            f"Score against {short(x)}: {mean_label(tasks)}, error bars of one standard deviation over seeds (none where "
            f"n = 1).{_sources(curves)}",
        )
    )
    bought = [curve for curve in published if curve.against == "parameters"]
    frontier = parameter_frontier(targets, bought)
    if frontier is not None:
        text = "Score against the numbers that a run trains, on a log scale; one mark for each series and value."
        blocks.append(Picture("parameters", frontier, text + _sources(bought)))
    blocks += [Heading("Numbers"), grid_table(targets, x)]
    if len(tasks) > 1:
        blocks.append(by_task_table(targets, x))
    return blocks


def _first_axis(axes: Mapping[str, Sequence[Any]]) -> str:
    return next((axis for axis, values in axes.items() if all(map(is_number, values)) and len(values) > 1), next(iter(axes)))


def axes_of(records: Records) -> dict[str, list[Any]]:
    """Every axis with its values, in the order of the cells."""
    axes: dict[str, list[Any]] = {}
    for record in records:
        for axis, value in record.get("cell", {}).items():
            values = axes.setdefault(axis, [])
            if value not in values:
                values.append(value)
    return axes


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


def score_by_axis(targets: Records, x: str, published: Sequence[Published] = ()) -> Figure:
    """One panel per k: the mean over targets along x, a curve for each series."""
    tasks, settings = results.values_of(targets, "task"), results.settings_of(targets)
    values = axes_of(targets)[x]
    places, labels, log = _places(values)
    with rc_context(STYLE):
        figure, axes, columns = grid_of_axes(len(settings), (4.2, 3.1), 0.7, sharey=True)
        handles: dict[str, Line2D] = {}
        for axis, k in zip(axes, settings, strict=False):
            here = results.select(targets, k=k)
            series = series_of(here, x)
            everything = []
            for index, (one, runs) in enumerate(series.items()):
                style = _style(one, list(series))
                spreads = [_mean(results_at(runs, x, value), k, tasks) for value in values]
                everything += spreads
                aside = 0.012 * (index - (len(series) - 1) / 2)  # of the axis' width, so that error bars do not hide one another
                draw_line(axis, _aside(places, aside, log), spreads, style)
                handles[one.label] = line_handle(style)
            for number, curve in enumerate(published):
                where = [places[labels.index(at)] if at in labels else at for at in map(_as_drawn, curve.x)]
                handles[curve.label] = _draw_published(axis, where, curve, number)
            level = results.reference(targets, "chance", tasks)
            if level is not None:
                color, dashes = REFERENCE_LINES["chance"]
                axis.axhline(level, color=color, ls=dashes, lw=1.1, zorder=1)
                handles["chance"] = Line2D([], [], color=color, ls=dashes, lw=1.1, label="chance")
            axis.set_title(f"{setting_label(k)} ({seeds_note(everything)})")
            _scale(axis, places, labels, log)
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
                handles[curve.label] = _draw_published(axis, curve.x, curve, number)
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


def is_number(value: Any) -> bool:
    """Whether an axis' value has a place on a scale."""
    return isinstance(value, int | float) and not isinstance(value, bool)


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


def _about(records: Records, axes: Mapping[str, Sequence[Any]]) -> str:
    cells = {json.dumps(record["cell"], sort_keys=True) for record in records}
    parts = [f"{short(axis)} ({', '.join(value_label(value) for value in values)})" for axis, values in axes.items()]
    return f"A sweep over {listing(parts)}: {counted(len(cells), 'cell')}, {counted(len(records), 'result')}."


def grid_findings(records: Records, x: str = "") -> Iterator[str]:
    """For each k and series: the best value of x and the spread there, with the ends of the curve."""
    targets = results.targets_of(records)
    x = x or _first_axis(axes_of(records))
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


def _as_drawn(value: Any) -> Any:
    """A value of a published curve as the axis' labels have it."""
    return value if is_number(value) else value_label(value)


def _sources(curves: Sequence[Published]) -> str:
    return "".join(f" Dashed: {curve.label} ({curve.source})." for curve in curves)


def _hashable(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


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


def _draw_published(axis: Axes, where: Sequence[float], curve: Published, number: int) -> Line2D:
    """Draws the `number`-th published curve at the places `where`; returns its line in the legend."""
    looks: dict[str, Any] = {"ls": ("--", ":", "-.")[number % 3], "lw": 1.2, "color": PUBLISHED_COLOR}
    looks |= {"marker": PUBLISHED_MARKERS[number % len(PUBLISHED_MARKERS)], "ms": 4.5, "mfc": "none"}
    axis.plot(where, curve.y, zorder=1, **looks)
    return Line2D([], [], label=curve.label, **looks)


def _scale(axis: Axes, places: Sequence[float], labels: Sequence[str], log: bool) -> None:
    if log:
        axis.set_xscale("log")
    axis.set_xticks(list(places), list(labels))
    axis.minorticks_off()


def _style(one: Series, every: Sequence[Series]) -> Look:
    """The methods' own looks where each has one series, else one of the palette's, which are the same, for each series."""
    own = len({other.method for other in every}) == len(every) and one.method in LOOKS
    style = look(one.method) if own else CURVE_LOOKS[list(every).index(one) % len(CURVE_LOOKS)]
    return dataclasses.replace(style, label=one.label)
