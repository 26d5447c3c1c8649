"""`report.md`, `report.html` and `figures/*.png` from a study's `results.jsonl`.

Scores and their tables need that file alone. Training curves and the task vectors are read from the runs' folders where these
are still there, and left out, saying so, where they are not.
"""

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mpt_jax.errors import UserError
from mpt_jax.files import write_text
from mpt_jax.progress import read_history
from mpt_jax.prompts.files import FILE_NAME, load_prompts
from mpt_jax.studies import figures, page, results
from mpt_jax.studies.page import Block, Cell, Heading, Picture, Table, Text
from mpt_jax.studies.results import METHODS, Record

Records = Sequence[Record]
Curves = Mapping[str, Mapping[str, Sequence[figures.Curve]]]

FIGURE_FOLDER = "figures"
LOSS_PARTS = {"loss": "total", "ce": "cross-entropy", "kl": "KL(teacher‖student)", "hidden": "hidden states"}


def write_report(model_dir: str | Path) -> Path:
    """Writes the report of the study in `model_dir` beside its `results.jsonl`; returns the path of the HTML page.

    Raises:
      UserError: no results file, a broken line in it, or a folder that cannot be written.
    """
    folder = Path(model_dir).expanduser()
    records = results.read(folder / results.RESULTS_FILE)
    if not records:
        raise UserError(f"{folder / results.RESULTS_FILE} holds no result yet; run the pipeline first.")
    blocks = build(records, read_curves(records, folder), read_task_vectors(records, folder))
    title = "Multitask prompt tuning: results"
    try:
        (folder / FIGURE_FOLDER).mkdir(exist_ok=True)
        for block in blocks:
            if isinstance(block, Picture):
                (folder / FIGURE_FOLDER / f"{block.name}.png").write_bytes(figures.to_png(block.figure))
        write_text(folder / "report.md", page.to_markdown(title, blocks, FIGURE_FOLDER))
        write_text(folder / "report.html", page.to_html(title, blocks))
    except OSError as error:
        raise UserError(f"The report cannot be written to {folder} ({error.strerror}); make that folder writable.") from None
    return folder / "report.html"


def build(records: Records, curves: Curves | None = None, task_vectors: Mapping[str, np.ndarray] | None = None) -> list[Block]:
    """The whole report as blocks: what came out, how it was measured, the rest of the evidence."""
    blocks: list[Block] = [Text((_about(records),))]
    if results.targets_of(records):
        blocks += [Heading("What came out"), Text(tuple(findings(records))), *_target_blocks(records)]
    blocks += _source_blocks(records)
    picture = figures.training_curves(curves or {})
    caption = (
        "Training loss per target token. Lines are means over a stage's runs, bands reach from the lowest to the highest run."
    )
    blocks += [Heading("Training"), _picture("training_curves", picture, caption, "The runs' folders hold no training curves.")]
    blocks += [Heading("Task vectors"), _task_vector_block(task_vectors or {}, _source_trainings(records))]
    blocks += [Heading("Cost and settings"), cost_table(records), Text(tuple(_provenance(records)))]
    blocks += [Heading("Every run"), run_table(records)]
    return blocks


# -------------------------------------------------------------------------------------------------------------- findings


def findings(records: Records) -> Iterator[str]:
    """Sentences that say, for each setting, where MPT stands; from the numbers, whatever they are."""
    targets = results.targets_of(records)
    tasks, methods = results.values_of(targets, "task"), results.values_of(targets, "method", METHODS)
    names = figures.task_labels(tasks)
    for k in results.settings_of(records):
        means = {method: mean for method in methods if (mean := results.mean_over_targets(records, method, k))}
        if not means:
            yield f"{figures.setting_label(k)}: no method has been scored on every target yet."
            continue
        ranking = sorted(means, key=lambda method: -means[method].mean)
        line = ", ".join(f"{figures.look(method).label} {means[method]}" for method in ranking)
        sentence = (
            f"{figures.setting_label(k)}: mean of {len(tasks)} targets {line} ({figures.seeds_note(list(means.values()))})."
        )
        gain = results.difference(records, "mpt", "prompt_tuning", k)
        if gain:
            sentence += f" {_gain(gain)}{_losses(records, k, tasks, names)}"
        yield sentence


def _gain(gain: results.Spread) -> str:
    if abs(gain.mean) < 0.05:
        return "MPT is level with prompt tuning from scratch"
    side = "above" if gain.mean > 0 else "below"
    text = f"MPT is {abs(gain.mean):.1f} points {side} prompt tuning from scratch"
    if gain.n == 1:
        return text + " (one seed: no spread can be given)"
    verdict = "more than" if abs(gain.mean) > gain.std else "no more than"
    return text + f", {verdict} the standard deviation of that difference over {gain.n} seeds, {gain.std:.1f}"


def _losses(records: Records, k: int, tasks: Sequence[str], names: Mapping[str, str]) -> str:
    """'; it is below it on A (−2.0) and B (−0.3).'"""
    lost = []
    for task in tasks:
        ours, theirs = (results.task_score(records, method, k, task) for method in ("mpt", "prompt_tuning"))
        if ours and theirs and ours.mean < theirs.mean:
            lost.append(f"{names[task]} (−{theirs.mean - ours.mean:.1f})")
    return f"; it is below on {', '.join(lost)}." if lost else "; it is below on no target."


def _about(records: Records) -> str:
    """One sentence: how many runs, on which model, by which versions."""
    backbones = "; ".join(f"`{name}`" for name in results.values_of(records, "backbone"))
    versions = ", ".join(sorted({f"{name} {version}" for r in records for name, version in r.get("versions", {}).items()}))
    text = f"{len(records)} runs" + (f" on the frozen model with fingerprint {backbones}" if backbones else "")
    return text + (f", made with {versions}." if versions else ".")


# ---------------------------------------------------------------------------------------------------------------- tables


def _target_blocks(records: Records) -> list[Block]:
    targets = results.targets_of(records)
    settings = results.settings_of(records)
    blocks: list[Block] = [target_table(records)]
    spread_note = "Error bars: one standard deviation over seeds (of the seeds' means over the targets); none where n = 1."
    picture = figures.scores_by_method(records)
    caption = f"Mean over the target tasks by method; the open dots are the single targets' means. {spread_note}"
    blocks.append(_picture("scores", picture, caption, "No method has been scored on every target yet."))
    few = [k for k in settings if k]
    if len(few) > 1:
        caption = "Score against the number of training examples. Error bars: one standard deviation over seeds."
        blocks.append(_picture("few_shot_curves", figures.few_shot_curves(records), caption))
    for k in ([] if len(few) > 1 else few) + ([0] if 0 in settings else []):
        name = f"scores_k{k}" if k else "scores_full"
        caption = f"Every target, {figures.setting_label(k)}. Error bars: one standard deviation over seeds; none where n = 1."
        blocks.append(_picture(name, figures.scores_by_task(records, k), caption))
    notes = [
        (
            "A score is the mean of the task's own metrics, 0–100, on examples that were not trained on. ± is one standard "
            "deviation over seeds (last column: of the seeds' means over targets); a seed chooses the examples, their order and, "
            f"for prompt tuning, the prompt's random start. {_source_note(records)}"
        ),
        "Nothing is selected in few-shot runs: the last step's prompt is scored.",
    ]
    full = [record for record in results.select(targets, stage="full") if record.get("selection_split")]
    if full:
        notes.append("On all examples the prompt that is scored is that of the step with the best validation score.")
    if any(record["selection_split"] == record.get("split") for record in full):
        notes.append("There the scored split is also the one that chose the step, so those scores are a little too high.")
    return [*blocks, Text(tuple(notes))]


def _source_note(records: Records) -> str:
    """Whether the spread of MPT and SPoT covers the source training."""
    count = _source_trainings(records)
    if count > 1:
        return f"MPT and SPoT start from {count} source trainings in turn, so their ± covers the source training, too."
    return (
        "MPT and SPoT start from one source training whatever the seed, so what another source training would change is not in "
        "their ± (PipelineConfig.source_seeds)."
    )


def target_table(records: Records) -> Table:
    """Settings × methods against targets; the best mean of each setting in bold, chance and ceiling last."""
    targets = results.targets_of(records)
    tasks, methods = results.values_of(targets, "task"), results.values_of(targets, "method", METHODS)
    names = figures.task_labels(tasks)
    rows = []
    for k in results.settings_of(records):
        table = {
            method: [results.task_score(records, method, k, task) for task in tasks]
            + [results.mean_over_targets(records, method, k)]
            for method in methods
            if results.select(targets, method=method, k=k)
        }
        best = [max((s.mean for row in table.values() if (s := row[i])), default=0.0) for i in range(len(tasks) + 1)]
        for method, row in table.items():
            seeds = Cell(figures.seeds_note(row).removeprefix("n = ").split(" ")[0], row[0].n if row[0] else 0)
            scores = tuple(_score_cell(s, bool(s and s.mean >= best[i] - 1e-9)) for i, s in enumerate(row))
            rows.append((_setting_cell(k), Cell(figures.look(method).label), seeds, *scores))
    for field in ("chance", "ceiling"):
        values = [results.reference(targets, field, [task]) for task in tasks] + [results.reference(targets, field, tasks)]
        if any(value is not None for value in values):
            rows.append((Cell(""), Cell(field), Cell(""), *(_number(value) for value in values)))
    columns = ("k", "method", "seeds", *(names[task] for task in tasks), f"mean of {len(tasks)}")
    return Table("Scores on the target tasks; k is the number of training examples per class", columns, tuple(rows))


def _source_blocks(records: Records) -> list[Block]:
    """How well the teachers and MPT's source prompts do on the tasks they were trained on, and what SPoT chose from them."""
    sources = [record for record in records if record["stage"] in ("teachers", "source")]
    blocks: list[Block] = []
    if sources:
        tasks = results.values_of(sources, "task")
        names, rows = figures.task_labels(tasks), []
        for task in tasks:
            teacher, student = (results.select(sources, task=task, stage=stage) for stage in ("teachers", "source"))
            means = [results.spread(record["score"] for record in found) for found in (teacher, student)]
            gap = _number(means[1].mean - means[0].mean, "+.1f") if means[0] and means[1] else Cell("–")
            limits = [_number(results.reference(sources, field, [task])) for field in ("chance", "ceiling")]
            rows.append((Cell(names[task]), *(_score_cell(mean, best=False) for mean in means), gap, *limits))
        count = _source_trainings(records)
        trainings = "one training" if count == 1 else f"{count} trainings with different seeds"
        columns = ("source task", "teacher (own prompt)", "MPT (shared prompt)", "MPT − teacher", "chance", "ceiling")
        blocks += [Heading("Source tasks"), Table(f"Scores on the source tasks themselves ({trainings})", columns, tuple(rows))]
    spot = [record for record in records if record.get("started_from")]
    if spot:
        tasks = results.values_of(spot, "task")
        source_names = figures.task_labels(results.values_of(sources, "task") or results.values_of(spot, "started_from"))
        names, rows = figures.task_labels(tasks), []
        for k in results.settings_of(spot):
            for task in tasks:
                chosen = Counter(record["started_from"] for record in results.select(spot, k=k, task=task))
                text = ", ".join(f"{source_names[name]} × {count}" for name, count in chosen.most_common())
                rows.append((_setting_cell(k), Cell(names[task]), Cell(text)))
        caption = (
            "SPoT's start: of the source tasks' prompts, the one with the lowest loss on the target's training examples, before "
            "training there; and how many seeds chose it"
        )
        blocks.append(Table(caption, ("k", "target", "chosen source"), tuple(rows)))
    return blocks


def _source_trainings(records: Records) -> int:
    return len({record["seed"] for record in records if record["stage"] in ("teachers", "source")})


def cost_table(records: Records) -> Table:
    """What each kind of run trains and takes."""
    rows = []
    for stage in results.values_of(records, "stage", results.STAGES):
        for method in results.values_of(results.select(records, stage=stage), "method", METHODS):
            runs = results.select(records, stage=stage, method=method)
            cells = [Cell(stage.replace("_", " ")), Cell(figures.look(method).label), _number(len(runs), "d")]
            for field in ("params_trained", "params_shared", "steps", "batch", "seconds"):
                known = [run[field] for run in runs if run.get(field) is not None]
                cells.append(_number(statistics.fmean(known) if known else None, ",.1f" if field == "seconds" else ",.0f"))
            cells.append(Cell("; ".join(dict.fromkeys(_optimizer(run) for run in runs))))
            rows.append(tuple(cells))
    columns = (
        "stage",
        "method",
        "runs",
        "numbers trained",
        "of them shared",
        "steps",
        "batch",
        "seconds",
        "optimiser and rates",
    )
    caption = "Per run (means). Seconds: its stage's training and scoring, divided by the runs trained side by side in that stage"
    return Table(caption, columns, tuple(rows))


def run_table(records: Records) -> Table:
    """All records, one row each."""
    columns = ("stage", "method", "task", "k", "seed", "score", "metrics", "examples", "steps", "seconds", "started from")
    rows = []
    for r in records:
        metrics = ", ".join(f"{name} {value:.1f}" for name, value in r.get("metrics", {}).items())
        numbers = [_number(r.get("num_examples"), "d"), _number(r.get("steps"), "d"), _number(r.get("seconds"), ".1f")]
        head = (Cell(r["stage"].replace("_", " ")), Cell(figures.look(r["method"]).label), Cell(r["task"]))
        setting = (_setting_cell(r["k"]), _number(r["seed"], "d"), _number(r["score"], ".2f"), Cell(metrics))
        rows.append((*head, *setting, *numbers, Cell(r.get("started_from", ""))))
    return Table(f"All {len(rows)} runs; results.jsonl holds their whole configuration", columns, tuple(rows), folded=True)


def _optimizer(record: Mapping[str, Any]) -> str:
    optimizer = record.get("config", {}).get("optimizer", {})
    return ", ".join([optimizer.get("name", ""), *(f"{pattern} {rate:g}" for pattern, rate in optimizer.get("rules", []))])


def _provenance(records: Records) -> Iterator[str]:
    for name, field in (("Backbone", "backbone"), ("Device", "device")):
        if found := results.values_of(records, field):
            yield f"{name}: " + ", ".join(f"`{value}`" for value in found)
    sources = f"`{results.RESULTS_FILE}`, the runs' `metrics.jsonl` and the source run's prompt file"
    yield f"Written {time.strftime('%Y-%m-%d %H:%M')} from {sources}; `mpt-jax report` writes it anew."


def _setting_cell(k: int) -> Cell:
    return Cell(f"{k}" if k else "all", float(k) if k else 1e9)


def _score_cell(spread: results.Spread | None, best: bool) -> Cell:
    return Cell("–") if spread is None else Cell(str(spread), spread.mean, best)


def _number(value: float | None, form: str = ".1f") -> Cell:
    return (
        Cell("–") if value is None else Cell(format(int(value) if form == "d" else value, form).replace("-", "−"), float(value))
    )


# ------------------------------------------------------------------------------------------------------ the runs' folders


def read_curves(records: Records, folder: Path) -> dict[str, dict[str, list[figures.Curve]]]:
    """Training loss from the runs' `metrics.jsonl`: panel title → label → curves."""
    panels: dict[str, dict[str, list[figures.Curve]]] = {}
    histories: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        where = record.get("folder")
        if not where or (record["stage"] == "source" and where in histories):  # the source run's curves are of all its tasks
            continue
        if where not in histories:
            histories[where] = [line for line in read_history(folder / where) if line.get("kind") == "train"]
        for title, label, curve in _curves_of(record, histories[where]):
            if curve[0]:
                panels.setdefault(title, {}).setdefault(label, []).append(curve)
    return panels


def _curves_of(record: Record, history: Sequence[Record]) -> Iterator[tuple[str, str, figures.Curve]]:
    """(panel, label, curve) of one run. MPT's source training shows the parts of its loss."""
    own = _curve([(line["step"], _loss_of(line, record.get("group", 0))) for line in history])
    if record["stage"] == "source":
        for part, label in LOSS_PARTS.items():
            yield "MPT, source training", label, _curve([(line["step"], line.get(part)) for line in history])
    elif record["stage"] == "teachers":
        yield "teachers", record["task"], own
    else:
        yield f"targets, {figures.setting_label(record['k'])}", record["method"], own


def _loss_of(line: Record, group: int) -> float | None:
    """One group's loss in a bank; a run of one group writes the total only."""
    losses = line.get("losses")
    return line["loss"] if losses is None else losses[group]


def _curve(points: Sequence[tuple[int, float | None]]) -> figures.Curve:
    """(steps, values); steps without a finite value are left out."""
    known = [(step, value) for step, value in points if value is not None and np.isfinite(value)]
    return [step for step, _ in known], [value for _, value in known]


def read_task_vectors(records: Records, folder: Path) -> dict[str, np.ndarray]:
    """u⊗v of every source task of the MPT source run, {task: [P, D]}; empty where its prompt file is gone."""
    runs = [record for record in results.select(records, stage="source") if record.get("folder")]
    if not runs or not (folder / runs[0]["folder"] / FILE_NAME).exists():
        return {}
    params, meta = load_prompts(folder / runs[0]["folder"])
    if "task_u" not in params:
        return {}
    vectors = np.einsum("npr,nrd->npd", np.asarray(params["task_u"]), np.asarray(params["task_v"]))
    return dict(zip(meta["tasks"], vectors, strict=True))


def _task_vector_block(vectors: Mapping[str, np.ndarray], trainings: int) -> Block:
    tasks = len(vectors)
    first = ", of the first source training," if trainings > 1 else ","
    caption = (
        f"Cosine similarity between the source tasks' vectors u⊗v{first} which turn the shared prompt into each task's own. They "
        "all start alike, so they stay similar as they are (left); without the part that all share (right) unrelated vectors are "
        f"at −{1 / max(tasks - 1, 1):.2f}."
    )
    otherwise = "The source run's prompt file is not there, so its task vectors are not shown."
    return _picture("task_vectors", figures.similarity_heatmap(vectors), caption, otherwise)


def _picture(name: str, figure: Figure | None, caption: str, otherwise: str = "") -> Block:
    return Text((otherwise,)) if figure is None else Picture(name, figure, caption)
