"""The pictures of a study, drawn from plain records (`results.read`) and arrays; nothing here reads files.

Error bars are one standard deviation over seeds, and each picture says over how many. Bars start at zero. Chance and ceiling
are drawn where the tasks document them.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mpt_jax.studies import results
from mpt_jax.studies.interpret import cosine_similarity
from mpt_jax.studies.looks import CURVE_LOOKS, EDGE, LOOKS, REFERENCE_LINES, STYLE, Look, look
from mpt_jax.studies.results import METHODS
from mpt_jax.studies.wording import mean_label, seeds_note, setting_label, task_labels

Records = Sequence[results.Record]
Spreads = Sequence[results.Spread | None]
Curve = tuple[Sequence[float], Sequence[float]]  # steps, values

POINTS = 72  # to an inch
PAGE_PIXELS = 104  # of the HTML page, to an inch
DOT = 3.6  # diameter of a seed's dot, in points
NUMBERED = 24  # things that a heatmap compares with numbers in its squares
BAR = 0.72  # width of a bar where methods stand at 0, 1, 2, …
LEGEND_ROWS, LEGEND_ROW = 3, 0.18  # rows of a legend that a figure has room for; inches of each further one


# ------------------------------------------------------------------------------------------------------------- pictures


def scores_by_method(records: Records) -> Figure | None:
    """One panel per setting (each k, all examples): mean over targets of every method, and the seeds as dots."""
    targets = results.targets_of(records)
    tasks, methods = results.values_of(targets, "task"), results.values_of(targets, "method", METHODS)
    settings = [k for k in results.settings_of(records) if any(results.mean_over_targets(records, m, k) for m in methods)]
    if not settings:
        return None
    panel = 2.35  # inches
    with rc_context(STYLE):
        figure = Figure(figsize=(max(4.2, panel * len(settings) + 0.5), 3.7), layout="constrained")
        axes = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
        for axis, k in zip(axes, settings, strict=True):
            seeds = [list(results.seed_means(targets, method, k, tasks).values()) for method in methods]
            top = _bars(axis, range(len(methods)), seeds, methods, BAR, BAR * panel / len(methods) * POINTS * 0.85)
            means = [results.spread(values) for values in seeds]
            axis.set_title(f"{setting_label(k)}", pad=16)
            axis.text(0, 1.02, seeds_note(means), transform=axis.transAxes, fontsize=8, color="#555555")
            axis.set_xticks(range(len(methods)), [f"{mean.mean:.1f}" if mean else "" for mean in means])
            axis.tick_params(axis="x", length=0)
            axis.set_ylim(0, max(100, top * 1.02))
            _references(axis, records, tasks)
        axes[0].set_ylabel(f"score, {mean_label(tasks)}")
        draw_legend(figure, [*_bar_handles(methods), *_reference_handles(records, tasks)])
    return figure


def scores_by_task(records: Records, k: int) -> Figure | None:
    """One setting in detail: bars of every method for every target, and the seeds as dots."""
    here = results.select(results.targets_of(records), k=k)
    labels = task_labels(results.values_of(here, "task"))
    return _groups_of_bars([(_two_lines(label), results.select(here, task=task)) for task, label in labels.items()], k)


def zero_shot_scores(records: Records, k: int) -> Figure | None:
    """The same for tasks that were not trained on, a group for each pair of tasks; of a study, not of a sweep's cells."""
    here = results.select(results.zero_shot_of(records), k=k)
    labels = task_labels(list(dict.fromkeys(record[field] for field in ("trained_on", "task") for record in here)))
    pairs = [(runs[0]["trained_on"], runs[0]["task"], runs) for runs in results.zero_shot_groups(here)]
    return _groups_of_bars([(f"{_two_lines(labels[old])}\n→ {_two_lines(labels[new])}", runs) for old, new, runs in pairs], k)


def _groups_of_bars(groups: Sequence[tuple[str, Records]], k: int) -> Figure | None:
    """A bar of each method for each group of one task's runs, above the group's label."""
    if not groups:
        return None
    everyone = [run for _, runs in groups for run in runs]
    tasks, methods = results.values_of(everyone, "task"), results.values_of(everyone, "method", METHODS)
    panel = 1.75  # inches for a group
    with rc_context(STYLE):
        figure = Figure(figsize=(max(4.6, panel * len(groups) + 0.8), 3.4), layout="constrained")
        axis = figure.subplots()
        width, everything, top = 0.8 / len(methods), [], 0.0
        for index, method in enumerate(methods):
            seeds = [[run["score"] for run in results.select(runs, method=method)] for _, runs in groups]
            where = [x + (index - (len(methods) - 1) / 2) * width for x in range(len(groups))]
            top = max(top, _bars(axis, where, seeds, [method] * len(groups), width * 0.92, width * panel * POINTS * 0.85))
            everything += [results.spread(values) for values in seeds]
        for x, (_, runs) in enumerate(groups):
            _references(axis, runs, [runs[0]["task"]], (x - 0.45, x + 0.45))
        axis.set_xticks(range(len(groups)), [label for label, _ in groups])
        axis.tick_params(axis="x", length=0)
        axis.set_ylim(0, max(100, top * 1.02))
        axis.set_ylabel("score")
        axis.set_title(f"{setting_label(k)} ({seeds_note(everything)})")
        draw_legend(figure, [*_bar_handles(methods), *_reference_handles(everyone, tasks)])
    return figure


def few_shot_curves(records: Records) -> Figure | None:
    """Score against k on a log scale, for the mean over targets and for each target; all panels share one axis."""
    few = results.select(records, stage="few_shot")
    settings = [k for k in results.settings_of(few) if k]
    if not settings:
        return None
    tasks, methods = results.values_of(few, "task"), results.values_of(few, "method", METHODS)
    labels = task_labels(tasks)
    panels: list[tuple[str, list[str]]] = [(mean_label(tasks), tasks)] if len(tasks) > 1 else []
    panels += [(labels[task], [task]) for task in tasks]
    places = [math.log2(k) for k in settings]
    margin = 0.22 * (places[-1] - places[0]) or 1.0
    limits = (places[0] - margin, places[-1] + margin)
    aside = 6.5 / POINTS / 2.4 * (limits[1] - limits[0])  # between methods: 6.5 points of a panel that is about 2.4 inches wide
    with rc_context(STYLE):
        figure, axes, columns = grid_of_axes(len(panels), (3.0, 2.55), 0.5, sharey=True)
        everything = []
        for axis, (title, shown) in zip(axes, panels, strict=False):
            _references(axis, records, shown)
            for index, method in enumerate(methods):
                spreads = [results.spread(results.seed_means(few, method, k, shown).values()) for k in settings]
                everything += spreads
                draw_line(axis, [x + aside * (index - (len(methods) - 1) / 2) for x in places], spreads, look(method))
            axis.set_title(title)
            axis.set_xticks(places, [str(k) for k in settings])
            axis.set_xlim(*limits)
        for index, axis in enumerate(axes):
            axis.set_ylabel("score" if index % columns == 0 else "")
            axis.set_xlabel("k, examples per class" if index + columns >= len(panels) else "")
        handles = [line_handle(look(method)) for method in methods]
        handles += _reference_handles(records, tasks)
        if len(panels) < len(axes):
            axes[-1].legend(handles=handles, loc="center", title=seeds_note(everything), handlelength=3.2, labelspacing=0.6)
        else:
            axes[0].set_title(f"{panels[0][0]} ({seeds_note(everything)})")
            draw_legend(figure, handles)
    return figure


def training_curves(panels: Mapping[str, Mapping[str, Sequence[Curve]]], ylabel: str = "training loss") -> Figure | None:
    """`panels[title][label]` = curves (steps, values): the line is their mean, the band their range; one panel per stage."""
    panels = {title: curves for title, curves in panels.items() if any(curves.values())}
    if not panels:
        return None
    with rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure, axes, _ = grid_of_axes(len(panels), (3.4, 2.7), 0.2)
        for axis, (title, curves) in zip(axes, panels.items(), strict=False):
            names = task_labels(list(curves))
            for index, name in enumerate(curves):
                style = LOOKS.get(name) or dataclasses.replace(CURVE_LOOKS[index % len(CURVE_LOOKS)], label=names[name])
                _band(axis, curves[name], style)
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.set_ylabel(ylabel)
            axis.set_ylim(0, 1.05 * max(max(y) for group in curves.values() for _, y in group if len(y)))
            axis.set_xlim(0, 1.02 * max(max(x) for group in curves.values() for x, _ in group if len(x)))
            axis.legend(fontsize=7, handlelength=2.6, labelspacing=0.25)
    return figure


def task_vector_heatmap(vectors: Mapping[str, np.ndarray]) -> Figure | None:
    """Cosine similarity of the task vectors u⊗v, as they are and, for three tasks or more, without their mean over tasks.

    Args:
      vectors: task → array of any shape (flattened), [P, D] for u⊗v.
    """
    if len(vectors) < 2:
        return None
    tasks = list(vectors)
    matrix = np.stack([np.asarray(vectors[task], np.float64).ravel() for task in tasks])
    panels = {"u⊗v": cosine_similarity(matrix)}
    if len(tasks) > 2:  # two vectors without their mean are always each other's opposite
        panels["u⊗v minus the tasks' mean"] = cosine_similarity(matrix - matrix.mean(0, keepdims=True))
    return similarity_heatmap(panels, list(task_labels(tasks).values()))


def similarity_heatmap(panels: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Cosine similarities [N,N] between the N things of these names, a panel for each title.

    The colours of a panel reach to its largest value, which for a mean of cosines is far below 1. More than `NUMBERED` things
    get smaller squares, without numbers.
    """
    numbered = len(names) <= NUMBERED
    size, edge = (0.52, 1.5) if numbered else (0.14, 0.3)
    letters: dict[str, Any] = {} if numbered else {"fontsize": 7}
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if numbered else {"rotation": 90}
    limits = {title: round(float(np.abs(values).max()), 6) or 1.0 for title, values in panels.items()}
    bars = 1 if len(set(limits.values())) == 1 else len(panels)
    side = size * len(names) + 1.3
    with rc_context(STYLE | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(len(panels) * side + 1.2 * bars, side + 0.5), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, values) in zip(axes, panels.items(), strict=True):
            limit = limits[title]
            mesh = axis.pcolormesh(values, cmap="PuOr_r", vmin=-limit, vmax=limit, edgecolors="white", linewidth=edge)
            for i, j in np.ndindex(values.shape) if numbered else ():
                value = float(values[i, j])
                color = "white" if abs(value) > 0.65 * limit else "#222222"
                axis.text(j + 0.5, i + 0.5, _short(value), ha="center", va="center", fontsize=7.5, color=color)
            axis.set_title(title)
            axis.set_aspect("equal")
            axis.set_xticks(np.arange(len(names)) + 0.5, names, **turned, **letters)
            axis.set_yticks(np.arange(len(names)) + 0.5, names, **letters)
            axis.tick_params(length=0)
            if bars > 1:
                figure.colorbar(mesh, ax=axis, shrink=0.8, label="cosine similarity")
        axes[0].invert_yaxis()
        if bars == 1:
            figure.colorbar(mesh, ax=axes, shrink=0.8, label="cosine similarity")
    return figure


# -------------------------------------------------------------------------------------------------------------- to files


def to_svg(figure: Figure) -> str:
    """The picture as an `<svg>` element, letters as shapes (no font is needed to see it)."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "mpt_jax", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def to_png(figure: Figure, dots_per_inch: int = 2 * PAGE_PIXELS) -> bytes:
    """The picture as PNG, sharp on screens with two pixels where the page has one."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------------- parts

MARKER: dict[str, Any] = {"mec": EDGE, "mew": 0.5}  # a dark edge lifts pale markers from white


def _bars(
    axis: Axes, where: Sequence[float], seeds: Sequence[Sequence[float]], methods: Sequence[str], width: float, points: float
) -> float:
    """Bars, and where there is more than one seed an error bar on the left and a dot for each; returns how high they reach.

    Args:
      seeds: the score of each seed, for each bar.
      width: of a bar in the axis' units; `points`: the same in points, nearly.
    """
    top = 0.0
    for x, values, method in zip(where, seeds, methods, strict=True):
        mean = results.spread(values)
        if mean is None:
            continue
        style = look(method)
        axis.bar(x, mean.mean, width, color=style.color, edgecolor=EDGE, linewidth=0.6, hatch=style.hatch, zorder=2)
        top = max(top, mean.mean)
        if mean.n > 1:
            axis.errorbar(x - 0.36 * width, mean.mean, mean.std, color="black", capsize=2.5, elinewidth=1.2, zorder=5)
            size = min(DOT, 0.6 * points / (mean.n - 1) / 1.4)  # evenly spaced over six tenths of the bar, with room between
            places = x + np.linspace(-0.18, 0.42, mean.n) * width
            axis.plot(places, values, "o", mfc="white", mec=EDGE, mew=0.8 * size / DOT, ms=size, ls="", zorder=6, clip_on=False)
            top = max(top, mean.mean + mean.std, *values)
    return top


def _bar_handles(methods: Sequence[str]) -> list[Any]:
    handles: list[Any] = [Patch(fc=look(m).color, ec=EDGE, hatch=look(m).hatch, lw=0.6, label=look(m).label) for m in methods]
    return [*handles, Line2D([], [], marker="o", mfc="white", mec=EDGE, mew=0.8, ms=DOT, ls="", label="one seed")]


def grid_of_axes(panels: int, size: tuple[float, float], extra: float, **shared: Any) -> tuple[Figure, Sequence[Axes], int]:
    """(figure, its axes row by row, columns), of panels of a size in inches; axes that are too many are switched off."""
    columns = 2 if panels == 4 else min(3, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(max(4.2, size[0] * columns + 0.3), size[1] * rows + extra), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for axis in axes[panels:]:
        axis.axis("off")
    return figure, axes, columns


def draw_line(axis: Axes, where: Sequence[float], spreads: Spreads, style: Look) -> None:
    points = [(x, s.mean, 0.0 if math.isnan(s.std) else s.std) for x, s in zip(where, spreads, strict=True) if s]
    if points:
        x, y, error = zip(*points, strict=True)
        looks = {"color": style.color, "ls": style.line, "marker": style.marker}
        axis.errorbar(x, y, error, ms=5, lw=1.6, capsize=2.5, elinewidth=1, **looks, **MARKER)


def line_handle(style: Look) -> Line2D:
    """What a legend shows of `draw_line`."""
    return Line2D([], [], color=style.color, ls=style.line, marker=style.marker, ms=5, label=style.label, **MARKER)


def _band(axis: Axes, curves: Sequence[Curve], style: Look) -> None:
    steps = sorted(set.intersection(*(set(x) for x, _ in curves))) if curves else []
    if not steps:
        return
    values = np.array([[dict(zip(x, y, strict=True))[step] for step in steps] for x, y in curves])
    every = max(1, len(steps) // 8)
    looks = {"color": style.color, "ls": style.line, "marker": style.marker, "label": style.label}
    axis.plot(steps, values.mean(0), lw=1.5, ms=4, markevery=every, **looks)
    if len(curves) > 1:
        axis.fill_between(steps, values.min(0), values.max(0), color=style.color, alpha=0.15, lw=0)


def _references(axis: Axes, records: Records, tasks: Sequence[str], extent: tuple[float, float] | None = None) -> None:
    for field, (color, line) in REFERENCE_LINES.items():
        value = results.reference(records, field, tasks)
        if value is not None and extent:
            axis.hlines(value, *extent, color=color, ls=line, lw=1.1, zorder=3)
        elif value is not None:
            axis.axhline(value, color=color, ls=line, lw=1.1, zorder=3)


def _reference_handles(records: Records, tasks: Sequence[str]) -> list[Line2D]:
    known = [field for field in REFERENCE_LINES if any(results.reference(records, field, [task]) is not None for task in tasks)]
    return [Line2D([], [], color=REFERENCE_LINES[f][0], ls=REFERENCE_LINES[f][1], lw=1.1, label=f) for f in known]


def draw_legend(figure: Figure, handles: list[Any]) -> None:
    """Below everything, in as many columns as the figure is wide enough for; many rows make the figure higher."""
    widest = max((len(handle.get_label()) for handle in handles), default=0)
    inches = max(1.25, 0.5 + 0.075 * widest)  # of a column: the line and some 8-point letters
    columns = min(len(handles), max(1, int(figure.get_figwidth() / inches)))
    rows = math.ceil(len(handles) / max(1, columns))
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * max(0, rows - LEGEND_ROWS))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, handlelength=2.4, columnspacing=1.4)


def _two_lines(label: str) -> str:
    """The label broken at the space nearest to its middle."""
    spaces = [index for index, letter in enumerate(label) if letter == " "]
    if len(label) < 12 or not spaces:
        return label
    middle = min(spaces, key=lambda index: abs(index - len(label) / 2))
    return label[:middle] + "\n" + label[middle + 1 :]


def _short(value: float) -> str:
    """'.42', '−.07', '1'."""
    text = f"{value:.2f}"
    return {"1.00": "1", "-1.00": "−1", "0.00": "0", "-0.00": "0"}.get(text, text.replace("0.", ".").replace("-", "−"))
