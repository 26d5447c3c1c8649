"""The pictures of a sweep: scores along an axis, and what parameters buy; published numbers are dashed."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mpt_jax.studies import results
from mpt_jax.studies.figures import draw_legend, draw_line, grid_of_axes, line_handle
from mpt_jax.studies.looks import MANY_LOOKS, REFERENCE_LINES, STYLE, Look, look
from mpt_jax.studies.published import Published, is_number
from mpt_jax.studies.results import SEVERAL, Spread
from mpt_jax.studies.series import (
    Records,
    Series,
    Values,
    axes_of,
    matters,
    mean_of,
    numbers_trained,
    points_of,
    results_at,
    series_of,
)
from mpt_jax.studies.wording import mean_label, seeds_note, setting_label, short, value_label

AXIS_NAMES = {"PROMPT_LENGTH": "prompt length, tokens", "INITIAL_CHECKPOINT_PATH": "backbone", "gin_file": "gin file"}
TICK_LETTERS = 45  # that stand side by side below a panel
# Of published curves, with hollow marks, for a curve may be a single point. No series is of these greys.
PUBLISHED_LOOKS = tuple((color, marker) for color in ("#6e6e6e", "#a0a0a0") for marker in "os^DvPX*")
PUBLISHED_LINE: Any = (0, (4, 3))
Handles = dict[Series | int | str, Line2D]  # of a series, of a published curve by its number, and of chance


def score_by_axis(targets: Records, x: str, published: Sequence[Published] = (), axes: Values | None = None) -> Figure:
    """One panel per k: the mean over targets along x, a curve for each series, which looks the same in all panels.

    All values of x in `axes` have ticks, those without results, too; None stands for the axes of the results.
    """
    tasks, settings = results.values_of(targets, "task"), results.settings_of(targets)
    values, series = (axes or axes_of(targets))[x], series_of(targets, x, axes)
    places, labels, log = _places(values)
    ordered = all(map(is_number, values)) or _sizes(targets, x, values)  # a line says that there is something in between
    looks = looks_of(list(series)) if ordered else _without_lines(looks_of(list(series)))
    with rc_context(STYLE):
        figure, panels, columns = grid_of_axes(len(settings), (4.2, 3.1), 0.7, sharey=True)
        handles: Handles = {one: line_handle(looks[one]) for one in series}
        for panel, k in zip(panels, settings, strict=False):
            everything = []
            for index, (one, runs) in enumerate(series.items()):
                spreads = [mean_of(results_at(runs, x, value), k, tasks) for value in values]
                everything += spreads
                apart = min(0.012, 0.1 / len(series)) if ordered else min(0.12, 0.6 / len(series)) / max(1, len(values) - 1)
                aside = apart * (index - (len(series) - 1) / 2)  # of the axis' width, so that error bars do not hide one another
                draw_line(panel, _aside(places, aside, log), spreads, looks[one])
            for number, curve in enumerate(published):
                both = [(place_of(at, values), y) for at, y in zip(curve.x, curve.y, strict=True)]
                if placed := [(where, y) for where, y in both if where is not None]:
                    handles[number] = _draw_published(panel, placed, curve, number)
            handles |= _draw_chance(panel, targets, tasks)
            panel.set_title(f"{setting_label(k)} ({seeds_note(everything)})")
            _scale(panel, places, labels, log)
            if not ordered:
                panel.set_xlim(-0.5, len(places) - 0.5)
            panel.set_xlabel(name_of(x))
        for index in range(0, len(panels), columns):
            panels[index].set_ylabel(f"score, {mean_label(tasks)}")
        draw_legend(figure, list(handles.values()))
    return figure


def parameter_frontier(
    targets: Records, x: str, published: Sequence[Published] = (), axes: Values | None = None
) -> Figure | None:
    """Score against the numbers trained, one panel per k: a mark for each series and value of x, with `score_by_axis`'s looks.

    None without published numbers where there is one method, or all runs train as many.
    """
    sizes = {record["params_trained"] for record in targets if record.get("params_trained")}
    if not published and (len(sizes) < 2 or len(results.values_of(targets, "method")) < 2):
        return None
    tasks, settings = results.values_of(targets, "task"), results.settings_of(targets)
    values, series = (axes or axes_of(targets))[x], series_of(targets, x, axes)
    looks = _without_lines(looks_of(list(series)))
    extent = math.log(max(sizes) / min(sizes)) or 1.0 if sizes else 1.0
    with rc_context(STYLE):
        figure, panels, columns = grid_of_axes(len(settings), (4.2, 3.1), 0.7, sharey=True)
        handles: Handles = {one: line_handle(looks[one]) for one in series}
        for panel, k in zip(panels, settings, strict=False):
            marks = [(one, size, mean) for one, runs in series.items() for size, mean in _bought(runs, x, k, values, tasks)]
            places = _beside([size for _, size, _ in marks], extent)
            for one in series:
                ours = [(place, mean) for (owner, _, mean), place in zip(marks, places, strict=True) if owner == one]
                draw_line(panel, [place for place, _ in ours], [mean for _, mean in ours], looks[one])
            for number, curve in enumerate(published):
                handles[number] = _draw_published(panel, list(zip(curve.x, curve.y, strict=True)), curve, number)
            handles |= _draw_chance(panel, targets, tasks)
            panel.set_xscale("log")
            panel.set_title(f"{setting_label(k)} ({seeds_note([mean for _, _, mean in marks])})")
            panel.set_xlabel("numbers trained for a task")
        for index in range(0, len(panels), columns):
            panels[index].set_ylabel(f"score, {mean_label(tasks)}")
        draw_legend(figure, list(handles.values()))
    return figure


def looks_of(every: Sequence[Series]) -> dict[Series, Look]:
    """The look of each series: a method's own for its first one, for the others what is no method's, then what is none's here.

    More than `MANY_LOOKS` start again.
    """
    first = {one.method: one for one in reversed(every)}
    taken = {(look(method).color, look(method).marker) for method in first}
    free = itertools.cycle([style for style in MANY_LOOKS if (style.color, style.marker) not in taken])
    looks = {one: look(one.method) if first[one.method] == one else next(free) for one in every}
    return {one: dataclasses.replace(style, label=one.label) for one, style in looks.items()}


def name_of(axis: str) -> str:
    """An axis as a person reads it."""
    return AXIS_NAMES.get(axis, short(axis))


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


def _sizes(targets: Records, x: str, values: Sequence[Any]) -> bool:
    """Whether each value of x that has results is a T5 of another size."""
    found = [[run.get("config", {}).get("backbone", {}) for run in results_at(targets, x, value)] for value in values]
    shapes = [{json.dumps(backbone.get("architecture")) for backbone in backbones} for backbones in found if backbones]
    return len(set.union(*shapes)) == len(shapes) > 1


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


def _beside(sizes: Sequence[float], extent: float) -> list[float]:
    """Places of sizes on a log scale of an extent: equal ones side by side so that none is hidden, but near their size."""
    places = []
    for n, size in enumerate(sizes):
        alike = sizes.count(size)
        rank = sizes[:n].count(size) - (alike - 1) / 2
        places.append(size * math.exp(min(0.02, 0.08 / alike) * extent * rank))
    return places


def _draw_published(axis: Axes, points: Sequence[tuple[float, float]], curve: Published, number: int) -> Line2D:
    """Draws the `number`-th published curve through the points that have a place; returns its line in the legend."""
    color, marker = PUBLISHED_LOOKS[number % len(PUBLISHED_LOOKS)]
    looks: dict[str, Any] = {"color": color, "marker": marker, "ls": PUBLISHED_LINE, "lw": 1.2, "ms": 5, "mfc": "none"}
    axis.plot(*zip(*points, strict=True), zorder=2.5, **looks)  # thin and hollow, so it hides nothing of ours
    return Line2D([], [], label=curve.label, **looks)


def _draw_chance(panel: Axes, targets: Records, tasks: Sequence[str]) -> Handles:
    """Draws the line for chance where all cells have the same; returns what the legend shows of it."""
    level = results.reference(targets, "chance", tasks)
    if level is None:
        return {}
    color, dashes = REFERENCE_LINES["chance"]
    panel.axhline(level, color=color, ls=dashes, lw=1.1, zorder=1)
    return {"chance": Line2D([], [], color=color, ls=dashes, lw=1.1, label="chance")}


def _bought(runs: Records, x: str, k: int, values: Sequence[Any], tasks: Sequence[str]) -> Iterator[tuple[int, Spread]]:
    """(numbers trained, mean) at each value of x, or once for a series that x does not change."""
    points = points_of(runs, x, k, values)
    for _, there in points if matters(results.select(runs, k=k), x) else points[:1]:
        size, mean = numbers_trained(there), mean_of(there, k, tasks)
        if size and mean:
            yield size, mean


def _scale(axis: Axes, places: Sequence[float], labels: Sequence[str], log: bool) -> None:
    if log:
        axis.set_xscale("log")
    broken = [label.replace(SEVERAL, f"\n{SEVERAL.lstrip()}") for label in labels]
    wide = sum(max(map(len, label.split("\n"))) for label in broken) > TICK_LETTERS
    turned: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if wide else {}
    axis.set_xticks(list(places), broken, **turned)
    axis.minorticks_off()


def _without_lines(looks: Mapping[Series, Look]) -> dict[Series, Look]:
    return {one: dataclasses.replace(style, line="none") for one, style in looks.items()}
