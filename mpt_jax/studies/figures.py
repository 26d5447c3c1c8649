"""The pictures of a study, drawn from plain records (`results.read`) and arrays; nothing here reads files.

Every method has its own colour (Okabe and Ito's palette), marker, line style and hatch, so that the pictures can be read in
grey and by the colour-blind. Error bars are one standard deviation over seeds, and each picture says over how many.
Bars start at zero. Chance and ceiling are drawn where the tasks document them.
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
from mpt_jax.studies.results import METHODS

Records = Sequence[results.Record]
Spreads = Sequence[results.Spread | None]
Curve = tuple[Sequence[float], Sequence[float]]  # steps, values

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "hatch.linewidth": 0.7,
    "svg.hashsalt": "mpt_jax",  # the same picture gives the same file
}


@dataclasses.dataclass(frozen=True)
class Look:
    """How one method is drawn everywhere."""

    label: str
    color: str
    marker: str
    line: Any
    hatch: str


LOOKS = {
    "mpt": Look("MPT", "#0072B2", "o", "-", ""),
    "prompt_tuning": Look("Prompt tuning", "#E69F00", "s", (0, (5, 2)), "////"),
    "spot": Look("SPoT", "#009E73", "^", (0, (1, 1.2)), "...."),
    "model_tuning": Look("Model tuning", "#8C8C8C", "D", (0, (6, 2, 1, 2)), "xxxx"),
}
OTHER_LOOKS = (
    Look("", "#D55E00", "v", "-", "\\\\\\\\"),
    Look("", "#CC79A7", "P", (0, (3, 1)), "++++"),
    Look("", "#56B4E9", "X", (0, (1, 2)), "oooo"),
    Look("", "#000000", "*", (0, (8, 2)), "||||"),
)
CURVE_LOOKS = (*LOOKS.values(), *OTHER_LOOKS)  # of things that are not methods


def look(method: str) -> Look:
    """The method's look; methods that are not the four of the pipeline get one by their name."""
    if method in LOOKS:
        return LOOKS[method]
    return dataclasses.replace(OTHER_LOOKS[sum(map(ord, method)) % len(OTHER_LOOKS)], label=method.replace("_", " "))


def task_labels(tasks: Sequence[str]) -> dict[str, str]:
    """Names for axes: the prefix that all tasks share ('sketch_') and underscores are left out."""
    prefixes = {task.split("_", 1)[0] + "_" if "_" in task else "" for task in tasks}
    shared = prefixes.pop() if len(tasks) > 1 and len(prefixes) == 1 else ""
    return {task: task.removeprefix(shared).replace("_", " ") for task in tasks}


def setting_label(k: int) -> str:
    return f"k = {k}" if k else "all examples"


def seeds_note(spreads: Spreads) -> str:
    """'n = 3 seeds', or the range where runs are missing."""
    counts = sorted({spread.n for spread in spreads if spread})
    if not counts:
        return "no runs"
    number = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"n = {number} seed{'s' if counts[-1] > 1 else ''}"


# ------------------------------------------------------------------------------------------------------------- pictures


def scores_by_method(records: Records) -> Figure | None:
    """One panel per setting (each k, all examples): mean over targets of every method, and the targets as dots."""
    targets = results.targets_of(records)
    tasks, methods = results.values_of(targets, "task"), results.values_of(targets, "method", METHODS)
    settings = [k for k in results.settings_of(records) if any(results.mean_over_targets(records, m, k) for m in methods)]
    if not settings:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(max(4.2, 2.35 * len(settings) + 0.5), 3.7), layout="constrained")
        axes = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
        for axis, k in zip(axes, settings, strict=True):
            means = [results.mean_over_targets(records, method, k) for method in methods]
            top = _bars(axis, range(len(methods)), means, methods)
            for x, method in enumerate(methods):
                dots = [results.task_score(records, method, k, task) for task in tasks]
                heights = [dot.mean for dot in dots if dot]
                offsets = x + np.linspace(-0.24, 0.24, len(heights))
                axis.plot(offsets, heights, "o", mfc="white", mec="#333333", mew=0.8, ms=3.6, ls="", zorder=4)
            for x, mean in enumerate(means):
                if mean:
                    axis.text(x, 3, f"{mean.mean:.1f}", ha="center", va="bottom", fontsize=8, zorder=6, bbox=LABEL_BOX)
            axis.set_title(f"{setting_label(k)}", pad=16)
            axis.text(0, 1.02, f"{seeds_note(means)}", transform=axis.transAxes, fontsize=8, color="#555555")
            axis.set_xticks([])
            axis.set_ylim(0, max(100, top * 1.02))
            _references(axis, records, tasks)
        axes[0].set_ylabel(f"score, mean of {len(tasks)} target tasks")
        handles: list[Any] = [
            Patch(fc=look(m).color, ec="#222222", hatch=look(m).hatch, lw=0.6, label=look(m).label) for m in methods
        ]
        handles.append(Line2D([], [], marker="o", mfc="white", mec="#333333", ms=3.6, ls="", label="one target task"))
        _legend(figure, handles + _reference_handles(records, tasks))
    return figure


def scores_by_task(records: Records, k: int) -> Figure | None:
    """One setting in detail: bars of every method for every target."""
    here = results.select(results.targets_of(records), k=k)
    if not here:
        return None
    tasks, methods = results.values_of(here, "task"), results.values_of(here, "method", METHODS)
    labels = task_labels(tasks)
    with rc_context(STYLE):
        figure = Figure(figsize=(max(4.6, 1.75 * len(tasks) + 0.8), 3.4), layout="constrained")
        axis = figure.subplots()
        width, everything, top = 0.8 / len(methods), [], 0.0
        for index, method in enumerate(methods):
            spreads = [results.task_score(here, method, k, task) for task in tasks]
            where = [x + (index - (len(methods) - 1) / 2) * width for x in range(len(tasks))]
            top = max(top, _bars(axis, where, spreads, [method] * len(tasks), width=width * 0.92))
            everything += spreads
        for x, task in enumerate(tasks):
            _references(axis, records, [task], (x - 0.45, x + 0.45))
        axis.set_xticks(range(len(tasks)), [_two_lines(labels[task]) for task in tasks])
        axis.tick_params(axis="x", length=0)
        axis.set_ylim(0, max(100, top * 1.02))
        axis.set_ylabel("score")
        axis.set_title(f"{setting_label(k)} ({seeds_note(everything)})")
        handles: list[Any] = [
            Patch(fc=look(m).color, ec="#222222", hatch=look(m).hatch, lw=0.6, label=look(m).label) for m in methods
        ]
        _legend(figure, handles + _reference_handles(records, tasks))
    return figure


def few_shot_curves(records: Records) -> Figure | None:
    """Score against k, for the mean over targets and for each target; all panels share one axis."""
    few = results.select(records, stage="few_shot")
    settings = [k for k in results.settings_of(few) if k]
    if not settings:
        return None
    tasks, methods = results.values_of(few, "task"), results.values_of(few, "method", METHODS)
    labels = task_labels(tasks)
    panels: list[tuple[str, list[str]]] = [(f"mean of {len(tasks)} targets", tasks)] if len(tasks) > 1 else []
    panels += [(labels[task], [task]) for task in tasks]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.0 * columns + 0.3, 2.55 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        everything = []
        for axis, (title, shown) in zip(axes, panels, strict=False):
            for index, method in enumerate(methods):
                spreads = [results.spread(results.seed_means(few, method, k, shown).values()) for k in settings]
                everything += spreads
                _line(axis, [x + 0.05 * (index - (len(methods) - 1) / 2) for x in range(len(settings))], spreads, look(method))
            _references(axis, records, shown)
            axis.set_title(title)
            axis.set_xticks(range(len(settings)), [str(k) for k in settings])
            axis.set_xlim(-0.3, len(settings) - 0.7)
        for index, axis in enumerate(axes):
            axis.set_ylabel("score" if index % columns == 0 else "")
            axis.set_xlabel("k, examples per class" if index + columns >= len(panels) else "")
        handles = [
            Line2D([], [], color=look(m).color, ls=look(m).line, marker=look(m).marker, ms=5, label=look(m).label)
            for m in methods
        ]
        handles += _reference_handles(records, tasks)
        for axis in axes[len(panels) :]:
            axis.axis("off")
        if len(panels) < len(axes):
            axes[-1].legend(handles=handles, loc="center", title=seeds_note(everything), handlelength=3.2, labelspacing=0.6)
        else:
            axes[0].set_title(f"{panels[0][0]} ({seeds_note(everything)})")
            _legend(figure, handles)
    return figure


def training_curves(panels: Mapping[str, Mapping[str, Sequence[Curve]]], ylabel: str = "training loss") -> Figure | None:
    """`panels[title][label]` = curves (steps, values): the line is their mean, the band their range; one panel per stage."""
    panels = {title: curves for title, curves in panels.items() if any(curves.values())}
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.4 * columns + 0.2, 2.7 * rows + 0.2), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (title, curves) in zip(axes, panels.items(), strict=False):
            names = task_labels(list(curves))
            for index, name in enumerate(curves):
                style = LOOKS.get(name) or dataclasses.replace(CURVE_LOOKS[index % len(CURVE_LOOKS)], label=names[name])
                _band(axis, curves[name], style)
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.set_ylabel(ylabel)
            axis.set_ylim(0, 1.05 * max(max(y) for group in curves.values() for _, y in group if len(y)))
            axis.margins(x=0.02)
            axis.legend(fontsize=7, handlelength=2.6, labelspacing=0.25)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
    return figure


def similarity_heatmap(vectors: Mapping[str, np.ndarray]) -> Figure | None:
    """Cosine similarity of the task vectors u⊗v, as they are and after taking away their mean over tasks.

    Args:
      vectors: task → array of any shape (flattened), [P, D] for u⊗v.
    """
    if len(vectors) < 2:
        return None
    tasks = list(vectors)
    matrix = np.stack([np.asarray(vectors[task], np.float64).ravel() for task in tasks])
    names = list(task_labels(tasks).values())
    size = 0.52 * len(tasks) + 1.3
    with rc_context(STYLE | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(2 * size + 1.2, size + 0.5), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, rows, title in (
            (axes[0], matrix, "u⊗v"),
            (axes[1], matrix - matrix.mean(0, keepdims=True), "u⊗v minus the tasks' mean"),
        ):
            values = cosine_similarity(rows)
            mesh = axis.pcolormesh(values, cmap="PuOr_r", vmin=-1, vmax=1, edgecolors="white", linewidth=1.5)
            for i in range(len(tasks)):
                for j in range(len(tasks)):
                    color = "white" if abs(values[i, j]) > 0.65 else "#222222"
                    axis.text(j + 0.5, i + 0.5, _short(values[i, j]), ha="center", va="center", fontsize=7.5, color=color)
            axis.set_title(title)
            axis.set_aspect("equal")
            axis.set_xticks(np.arange(len(tasks)) + 0.5, names, rotation=40, ha="right", rotation_mode="anchor")
            axis.set_yticks(np.arange(len(tasks)) + 0.5, names)
            axis.tick_params(length=0)
        axes[0].invert_yaxis()
        figure.colorbar(mesh, ax=axes, shrink=0.8, label="cosine similarity")
    return figure


def cosine_similarity(rows: np.ndarray) -> np.ndarray:
    """[N, X] → [N, N]; a row of zeros is similar to nothing (0)."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return unit @ unit.T


# -------------------------------------------------------------------------------------------------------------- to files


def to_svg(figure: Figure) -> str:
    """The picture as an `<svg>` element, letters as shapes (no font is needed to see it)."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "mpt_jax", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def to_png(figure: Figure, dots_per_inch: int = 160) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------------- parts

LABEL_BOX = {"boxstyle": "round,pad=0.18", "fc": "white", "ec": "none", "alpha": 0.9}
REFERENCE_LINES: dict[str, tuple[str, Any]] = {"chance": ("#B03A2E", (0, (1, 1.5))), "ceiling": ("#333333", (0, (4, 1.5)))}


def _bars(axis: Axes, where: Sequence[float], spreads: Spreads, methods: Sequence[str], width: float = 0.72) -> float:
    """Bars with error bars where there is more than one seed; returns how high they reach."""
    top = 0.0
    for x, spread, method in zip(where, spreads, methods, strict=True):
        if spread is None:
            continue
        style = look(method)
        axis.bar(x, spread.mean, width, color=style.color, edgecolor="#222222", linewidth=0.6, hatch=style.hatch, zorder=2)
        error = 0.0 if math.isnan(spread.std) else spread.std
        if error:
            axis.errorbar(x, spread.mean, error, color="black", capsize=3, elinewidth=1.2, zorder=5)
        top = max(top, spread.mean + error)
    return top


def _line(axis: Axes, where: Sequence[float], spreads: Spreads, style: Look) -> None:
    points = [(x, s.mean, 0.0 if math.isnan(s.std) else s.std) for x, s in zip(where, spreads, strict=True) if s]
    if points:
        x, y, error = zip(*points, strict=True)
        axis.errorbar(x, y, error, color=style.color, ls=style.line, marker=style.marker, ms=5, lw=1.6, capsize=2.5, elinewidth=1)


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
            axis.axhline(value, color=color, ls=line, lw=1.1, zorder=1.5)


def _reference_handles(records: Records, tasks: Sequence[str]) -> list[Line2D]:
    known = [field for field in REFERENCE_LINES if any(results.reference(records, field, [task]) is not None for task in tasks)]
    return [Line2D([], [], color=REFERENCE_LINES[f][0], ls=REFERENCE_LINES[f][1], lw=1.1, label=f) for f in known]


def _legend(figure: Figure, handles: list[Any]) -> None:
    """Below everything, in as many columns as the figure is wide enough for."""
    columns = min(len(handles), max(2, int(figure.get_figwidth() / 1.25)))
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
