"""The report's tables."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mpt_jax.studies import chance, results
from mpt_jax.studies.looks import look
from mpt_jax.studies.page import Cell, Table
from mpt_jax.studies.published import is_number
from mpt_jax.studies.results import METHODS, SEVERAL, Record
from mpt_jax.studies.series import axes_of
from mpt_jax.studies.wording import counted, number_range, seeds_note, short, task_labels, value_label

Records = Sequence[Record]
OPTIMIZERS = {"adafactor": "Adafactor", "adamw": "AdamW"}


def study_table(records: Records) -> Table:
    """What each kind of run trains, for how long and at which rates, and what it takes."""
    rows = []
    for stage in results.values_of(records, "stage", results.STAGES):
        for method in results.values_of(results.select(records, stage=stage), "method", METHODS):
            runs = results.select(records, stage=stage, method=method)
            cells = [Cell(_stage_label(stage)), Cell(look(method).label), number(len(runs), "d")]
            for field in ("steps", "batch", "params_trained", "params_shared"):
                cells.append(_mean_of(runs, field, ",.0f"))
            cells += [_mean_of(runs, "seconds", ",.1f"), Cell("; ".join(dict.fromkeys(_optimizer(run) for run in runs)))]
            rows.append(tuple(cells))
    columns = ("stage", "method", "runs", "steps", "batch", "parameters", "shared", "seconds", "optimiser and rates")
    total = sum(record.get("seconds", 0.0) for record in records)
    caption = (
        "The study. Batch, parameters trained (and those of them that tasks can share) and seconds are one run's; seconds are "
        f"those of its stage's training and scoring, divided by the runs trained side by side in it, {total:,.0f} in all"
    )
    return Table(caption, columns, tuple(rows))


def target_table(records: Records) -> Table:
    """Settings × methods against targets, chance and ceiling last.

    The best mean of each setting is bold, unless it is not above chance, or no better than all others. † marks what is not.
    """
    targets = results.targets_of(records)
    tasks, methods = results.values_of(targets, "task"), results.values_of(targets, "method", METHODS)
    names = task_labels(tasks)
    groups = [[task] for task in tasks] + ([tasks] if len(tasks) > 1 else [])  # the columns: each target, and their mean
    rows = []
    for k in results.settings_of(records):
        table = {
            method: [results.spread(results.seed_means(targets, method, k, group).values()) for group in groups]
            for method in methods
            if results.select(targets, method=method, k=k)
        }
        columns = list(zip(*table.values(), strict=True))
        for method, row in table.items():
            seeds = Cell(seeds_of(row), row[0].n if row[0] else 0)
            scores = []
            for score, group, column in zip(row, groups, columns, strict=True):
                weak = chance.above(targets, score, group) is False
                scores.append(score_cell(score, not weak and _is_best(score, column), weak))
            rows.append((setting_cell(k), Cell(look(method).label), seeds, *scores))
    for field in ("chance", "ceiling"):
        values = [results.reference(targets, field, group) for group in groups]
        if any(value is not None for value in values):
            rows.append((Cell(""), Cell(field), Cell(""), *(number(value) for value in values)))
    mean = [f"mean of {len(tasks)}"] if len(tasks) > 1 else []
    columns_ = ("k", "method", "seeds", *(names[task] for task in tasks), *mean)
    return Table("Scores on the target tasks; k is the number of training examples per class", columns_, tuple(rows))


def source_table(records: Records) -> Table:
    """How well the teachers and MPT's source prompts do on the tasks that they were trained on."""
    tasks = results.values_of(records, "task")
    names, rows = task_labels(tasks), []
    for task in tasks:
        means = [
            results.spread(record["score"] for record in results.select(records, task=task, stage=stage))
            for stage in ("teachers", "source")
        ]
        gap = number(means[1].mean - means[0].mean, "+.1f") if means[0] and means[1] else Cell("–")
        limits = [number(results.reference(records, field, [task])) for field in ("chance", "ceiling")]
        cells = [score_cell(mean, weak=chance.above(records, mean, [task]) is False) for mean in means]
        rows.append((Cell(names[task]), *cells, gap, *limits))
    count = source_trainings(records)
    trainings = "one training" if count == 1 else f"{count} trainings with different seeds"
    columns = ("source task", "teacher (own prompt)", "MPT (shared prompt)", "MPT − teacher", "chance", "ceiling")
    weak = "; † is not above chance" if any(cell.weak for row in rows for cell in row) else ""
    return Table(f"Scores on the source tasks themselves ({trainings}){weak}", columns, tuple(rows))


def zero_shot_table(records: Records) -> Table:
    """Scores of runs on tasks that they were not trained on: a row for each k and pair of tasks, and for each cell of a sweep.

    Args:
        records: of `results.zero_shot_of`, at least one.
    """
    axes = list(axes_of(records))
    methods = results.values_of(records, "method", METHODS)
    names = task_labels(list(dict.fromkeys(record[field] for field in ("trained_on", "task") for record in records)))
    compared = {"prompt_tuning", "model_tuning"} <= set(methods)
    rows = []
    for runs in results.zero_shot_groups(records):
        first = runs[0]
        task = first["task"]
        scores = [results.spread(run["score"] for run in results.select(runs, method=method)) for method in methods]
        front = axis_cells(first, axes)
        seeds = Cell(seeds_of(scores), scores[0].n if scores[0] else 0)
        front += [setting_cell(first["k"]), Cell(names[first["trained_on"]]), Cell(names[task]), seeds]
        cells = [score_cell(score, weak=chance.above(runs, score, [task]) is False) for score in scores]
        gap = [gap_cell(results.paired(runs, "prompt_tuning", "model_tuning"))] if compared else []
        back = [number(results.reference(runs, "chance", [task])), number(chance.examples(runs, task), "d")]
        rows.append((*front, *cells, *gap, *back))
    columns = [*map(short, axes), "k", "trained on", "scored on", "seeds", *(look(method).label for method in methods)]
    columns += ["prompt − model tuning"] if compared else []
    caption = "Scores on tasks that were not trained on, ± one standard deviation over seeds; differences are paired by seed"
    return Table(caption, (*columns, "chance", "test examples"), tuple(rows))


def start_table(spot: Records, source_names: Mapping[str, str]) -> Table:
    """Which source, or sources, each of SPoT's runs started from."""
    tasks = results.values_of(spot, "task")
    names, rows = task_labels(tasks), []
    for k in results.settings_of(spot):
        for task in tasks:
            chosen = Counter(record["started_from"] for record in results.select(spot, k=k, task=task))
            text = ", ".join(f"{_short(start, source_names)} × {count}" for start, count in chosen.most_common())
            rows.append((setting_cell(k), Cell(names[task]), Cell(text)))
    how = "; ".join(dict.fromkeys(_retrieval(record.get("config", {}).get("retrieval", {})) for record in spot))
    return Table(f"SPoT's start: {how}; and how many seeds chose it", ("k", "target", "chosen source"), tuple(rows))


def _short(started_from: str, names: Mapping[str, str]) -> str:
    return SEVERAL.join(names.get(source, source) for source in started_from.split(SEVERAL))


def _retrieval(config: Mapping[str, Any]) -> str:
    """How SPoT's sources were chosen, in words; `config` is RetrievalConfig's, whose defaults stand for what is missing."""
    top = config.get("top", 1)
    ranked = {
        "loss": "the lowest loss on the target's training examples, before training there",
        "average_token": "the highest cosine of its average token with that of a prompt of the target's own",
        "per_token": "the highest mean cosine between its tokens and those of a prompt of the target's own",
    }[config.get("by", "loss")]
    if top == 1 and config.get("use", "best") != "mixture":
        return f"of the source tasks' prompts, the one with {ranked}"
    made = {
        "best": "the one that came out best by validation score, of runs from each of",
        "average": "the weighted mean of",
        "mixture": "a prompt trained on the target's examples and those of",
    }[config.get("use", "best")]
    return f"{made} the {counted(top, 'source task')} whose prompt has {ranked}"


def run_table(records: Records) -> Table:
    """All records, one row each; those of a sweep with the values of its axes first."""
    axes = list(axes_of(records))
    columns = ("stage", "method", "task", "k", "seed", "score", "metrics", "examples", "steps", "seconds", "started from", "run")
    rows = []
    for r in records:
        metrics = ", ".join(f"{name} {value:.1f}" for name, value in r.get("metrics", {}).items())
        numbers = [number(r.get("num_examples"), "d"), number(r.get("steps"), "d"), number(r.get("seconds"), ".1f")]
        task = f"{r['task']} (trained on {r['trained_on']})" if "trained_on" in r else r["task"]
        head = (Cell(_stage_label(r["stage"])), Cell(look(r["method"]).label), Cell(task))
        setting = (setting_cell(r["k"]), number(r["seed"], "d"), number(r["score"], ".2f"), Cell(metrics))
        back = (Cell(r.get("started_from", "")), Cell("configuration", detail=_configuration(r)))
        rows.append((*axis_cells(r, axes), *head, *setting, *numbers, *back))
    title = f"Every run: {counted(len(rows), 'row')}, with its whole configuration"
    return Table(title, (*map(short, axes), *columns), tuple(rows), folded=True)


def source_trainings(records: Records) -> int:
    """How many source trainings the study has."""
    return len({record["seed"] for record in records if record["stage"] in ("teachers", "source")})


# ----------------------------------------------------------------------------------------------------------------- cells


def setting_cell(k: int) -> Cell:
    return Cell(f"{k}" if k else "all", float(k) if k else 1e9)


def value_cell(value: Any) -> Cell:
    """A value of an axis."""
    return Cell(value_label(value), float(value) if is_number(value) else None)


def axis_cells(record: Record, axes: Sequence[str]) -> list[Cell]:
    """The values of the axes in the record's cell."""
    return [value_cell(record.get("cell", {}).get(axis, "")) for axis in axes]


def score_cell(spread: results.Spread | None, best: bool = False, weak: bool = False) -> Cell:
    return Cell("–") if spread is None else Cell(f"{spread}{' †' if weak else ''}", spread.mean, best, weak)


def gap_cell(gap: results.Spread | None) -> Cell:
    """A difference with its sign."""
    return Cell("–") if gap is None else Cell(f"{'+' if gap.mean >= 0 else ''}{gap}".replace("-", "−"), gap.mean)


def seeds_of(scores: Sequence[results.Spread | None]) -> str:
    """'3', or '2–3'; '0' would be no runs."""
    return seeds_note(scores).removeprefix("n = ").split(" ")[0]


def number(value: float | None, form: str = ".1f") -> Cell:
    """The number as `form` says, with a typographic minus; '–' for None."""
    if value is None:
        return Cell("–")
    return Cell(format(int(value) if form == "d" else value, form).replace("-", "−"), float(value))


def _is_best(score: results.Spread | None, column: Sequence[results.Spread | None]) -> bool:
    """Whether a method has the best mean of its column; where all have the same, or there is one only, none has."""
    means = [other.mean for other in column if other]
    return score is not None and score.mean >= max(means) - 1e-9 and min(means) < max(means) - 1e-9


def _mean_of(runs: Records, field: str, form: str) -> Cell:
    known = [run[field] for run in runs if run.get(field) is not None]
    if field != "seconds" and len(set(known)) > 1:
        return Cell(number_range(known), statistics.fmean(known))
    return number(statistics.fmean(known) if known else None, form)


def _configuration(record: Record) -> str:
    """What the run was trained with, a line for each field, and where it lies."""
    lines = [
        f"{name} = {record[name]}" for name in ("run_id", "folder", "backbone", "data", "device", "versions") if name in record
    ]
    lines += [f"{path} = {value!r}" for path, value in _fields(record.get("config", {}))]
    return "\n".join(lines)


def _fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _stage_label(stage: str) -> str:
    return {"full": "all examples"}.get(stage, stage.replace("_", " "))


def _optimizer(record: Mapping[str, Any]) -> str:
    """'Adafactor 0.3', or with each group of parameters named where they have rates of their own."""
    optimizer = record.get("config", {}).get("optimizer", {})
    rules = optimizer.get("rules", [])
    rates = [f"{rate:g}" if len(rules) == 1 and pattern == ".*" else f"{pattern} {rate:g}" for pattern, rate in rules]
    name = optimizer.get("name", "")
    return " ".join(part for part in (OPTIMIZERS.get(name, name), ", ".join(rates)) if part)
