"""`report.md`, `report.html` and `figures/*.png` from a study's `results.jsonl`.

Scores and their tables need that file alone. Training curves and the task vectors are read from the runs' folders where these
are still there, and left out, saying so, where they are not.
"""

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mpt_jax.errors import UserError
from mpt_jax.files import write_text
from mpt_jax.studies import chance, figures, page, results, tables
from mpt_jax.studies.findings import findings
from mpt_jax.studies.grid import build_grid
from mpt_jax.studies.looks import look
from mpt_jax.studies.page import Block, Heading, Picture, Text
from mpt_jax.studies.published import drawing_of
from mpt_jax.studies.results import Record
from mpt_jax.studies.runs import read_curves, read_task_vectors
from mpt_jax.studies.wording import counted, listing, mean_label, setting_label, task_labels

Records = Sequence[Record]
Curves = Mapping[str, Mapping[str, Sequence[figures.Curve]]]

FIGURE_FOLDER = "figures"
WEAK = (
    f"† is not above chance: not by more than {chance.STANDARD_ERRORS:g} standard errors, √(s²/n + c(100 − c)/N) with s over n "
    "seeds, chance c and N test examples. Differences between such scores say nothing about a method."
)
ERROR_BARS = "Error bars: one standard deviation over seeds; none where n = 1."


def write_report(model_dir: str | Path) -> Path:
    """Writes the report of the study in `model_dir` beside its `results.jsonl`; returns the path of the HTML page.

    Raises:
      UserError: no results file, a broken line in it, or a folder that cannot be written.
    """
    folder = Path(model_dir).expanduser()
    records = results.read(folder / results.RESULTS_FILE)
    if not records:
        raise UserError(f"{folder / results.RESULTS_FILE} holds no result yet; run the pipeline first.")
    command = shlex.join(["python", "-m", "mpt_jax", "report", f"--model_dir={folder}"])
    if any("cell" in record for record in records):
        title, blocks = "A sweep: results", _sweep(records, folder, command)
    else:
        title = "Multitask prompt tuning: results"
        curves = read_curves(results.runs_of(records), folder)
        blocks = build(records, curves, read_task_vectors(records, folder), command)
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


def _sweep(records: Records, folder: Path, command: str) -> list[Block]:
    """The report of a sweep, from its `results.jsonl` alone."""
    drawing = drawing_of(records, folder / results.RESULTS_FILE)
    cells = [record for record in records if "cell" in record]
    runs = results.each_once(results.runs_of(records))
    blocks = [*build_grid(results.runs_of(cells), drawing), *_zero_shot_blocks(cells)]
    blocks += [Heading("Study"), Text((_about(runs),)), tables.study_table(runs), tables.run_table(records)]
    return [*blocks, Text(tuple(_provenance(records, f"`{results.RESULTS_FILE}`", command)))]


def build(
    records: Records,
    curves: Curves | None = None,
    task_vectors: Mapping[str, np.ndarray] | None = None,
    command: str = "",
) -> list[Block]:
    """The whole report as blocks: the study, what came out, how it was measured, the rest of the evidence.

    `command` is what writes the report again.
    """
    runs = results.runs_of(records)
    blocks: list[Block] = [Text((_about(runs),)), tables.study_table(runs)]
    if results.targets_of(runs):
        blocks += [Heading("What came out"), Text(tuple(findings(records))), *_target_blocks(runs)]
    blocks += _zero_shot_blocks(records)
    blocks += _source_blocks(runs)
    picture = figures.training_curves(curves or {})
    caption = (
        "Training loss in nats per target token. A point is the mean over the steps since the point before, so the first says "
        "little about the start. Lines are means over a stage's runs, bands reach from the lowest to the highest run."
    )
    blocks += [Heading("Training"), _picture("training_curves", picture, caption, "The runs' folders hold no training curves.")]
    blocks += [Heading("Task vectors"), _task_vector_block(task_vectors or {}, tables.source_trainings(records))]
    blocks += [
        Heading("How this page was made"),
        Text(
            tuple(
                _provenance(
                    records, f"`{results.RESULTS_FILE}`, the runs' `metrics.jsonl` and the source run's prompt file", command
                )
            )
        ),
        tables.run_table(records),
    ]
    return blocks


def _about(records: Records) -> str:
    """One sentence: how many runs, on which model, by which versions."""
    checkpoints = dict.fromkeys(record.get("config", {}).get("backbone", {}).get("checkpoint", "") for record in records)
    known = [f"`{checkpoint}`" for checkpoint in checkpoints if checkpoint]
    prints = [f"`{name}`" for name in results.values_of(records, "backbone")]
    text = counted(len(records), "run")
    if known or prints:
        name = f" {listing(known)}" if known else ""
        text += f" on the T5{name}" + (f" (fingerprint {', '.join(prints)})" if prints else "")
        tuned = bool(results.select(records, method="model_tuning"))
        text += ", which stays frozen except in model tuning" if tuned else ", which stays frozen"
    versions = ", ".join(sorted({f"{name} {version}" for r in records for name, version in r.get("versions", {}).items()}))
    return text + (f"; made with {versions}." if versions else ".")


# --------------------------------------------------------------------------------------------------------------- targets


def _target_blocks(records: Records) -> list[Block]:
    tasks = results.values_of(results.targets_of(records), "task")
    table = tables.target_table(records)
    weak = any(cell.weak for row in table.rows for cell in row)
    blocks: list[Block] = [table, Text(tuple(_notes(records, weak)))]
    dots = "The open dots are single seeds" + (", each its mean over the targets." if len(tasks) > 1 else ".")
    caption = f"Score by method, {mean_label(tasks)}. {dots} {ERROR_BARS}"
    otherwise = "No method has been scored on every target yet."
    blocks.append(_picture("scores", figures.scores_by_method(records), caption, otherwise))
    settings = results.settings_of(records)
    few = [k for k in settings if k]
    if len(few) > 1:
        caption = f"Score against k, which is on a log scale; the methods stand side by side at each k. {ERROR_BARS}"
        blocks.append(_picture("few_shot_curves", figures.few_shot_curves(records), caption))
    for k in ([] if len(few) > 1 else few) + ([0] if 0 in settings else []) if len(tasks) > 1 else []:
        name = f"scores_k{k}" if k else "scores_full"
        caption = f"Every target, {setting_label(k)}. The open dots are single seeds. {ERROR_BARS}"
        blocks.append(_picture(name, figures.scores_by_task(records, k), caption))
    return blocks


def _notes(records: Records, weak: bool) -> Iterator[str]:
    """What the table's numbers are: of which examples, over which seeds, and what they leave out; `weak`: some have a †."""
    targets = results.targets_of(records)
    names = task_labels(results.values_of(targets, "task"))
    sizes = _test_sizes(targets, names)
    yield f"A score is the mean of the task's own metrics, 0–100, on examples that were not trained on{sizes}."
    mean = " (last column: of the seeds' means over the targets)" if len(names) > 1 else ""
    yield (
        f"± is one standard deviation over seeds{mean}. A seed chooses the examples, their order and, for prompt tuning, the "
        f"prompt's random start. {_source_note(records)}"
    )
    if any(k for k in results.settings_of(records)):
        yield "Nothing is selected in few-shot runs: the last step's prompt is scored."
    full = [record for record in results.select(targets, stage="full") if record.get("selection_split")]
    if full:
        text = "On all examples the prompt that is scored is that of the step with the best validation score."
        if any(record["selection_split"] == record.get("split") for record in full):
            text += " There the scored split is also the one that chose the step, so those scores are a little too high."
        yield text
    yield from _chance_notes(targets, names, weak)
    yield from _scarcity(targets, names)
    yield from _seen(records, names)


def _test_sizes(targets: Records, names: Mapping[str, str]) -> str:
    """' (the split `test`: 600 examples of each target)'."""
    sizes = {names[task]: size for task in names if (size := chance.examples(targets, task))}
    splits = listing([f"`{split}`" for split in results.values_of(targets, "split")])
    if not sizes:
        return ""
    if len(set(sizes.values())) == 1:
        each = " of each target" if len(sizes) > 1 else ""
        return f" ({f'the split {splits}: ' if splits else ''}{counted(next(iter(sizes.values())), 'example')}{each})"
    each = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    return f" ({f'the split {splits}; ' if splits else ''}examples: {each})"


def _source_note(records: Records) -> str:
    """Whether the spread of MPT and SPoT covers the source training."""
    started = [m for m in ("mpt", "spot") if results.select(results.targets_of(records), method=m)]
    if not started:
        return ""
    methods = listing([look(method).label for method in started])
    verb, their = ("start", "their") if len(started) > 1 else ("starts", "its")
    count = tables.source_trainings(records)
    if count > 1:
        return f"{methods} {verb} from {count} source trainings in turn, so {their} ± covers the source training, too."
    return (
        f"{methods} {verb} from one source training whatever the seed, so what another source training would change is not in "
        f"{their} ± (PipelineConfig.source_seeds)."
    )


def _chance_notes(targets: Records, names: Mapping[str, str], weak: bool) -> Iterator[str]:
    """What † and chance mean; which targets have no known chance."""
    levels = {task: results.reference(targets, "chance", [task]) for task in names}
    if any(level is not None for level in levels.values()):
        yield "Chance is what the task documents, else what the best single label scores when it is the answer to every example."
    if weak:
        yield WEAK
    if _generated(targets) and any(_below(targets, task) for task in names):
        yield "Answers are generated, so a score may lie below chance: whatever is none of the labels is wrong."
    unknown = [names[task] for task, level in levels.items() if level is None]
    if unknown:
        yield f"No chance level is known for {listing(unknown)}."


def _below(targets: Records, task: str) -> bool:
    """Whether a method is below chance on the task, more than chance would have it."""
    settings, methods = results.settings_of(targets), results.values_of(targets, "method")
    scores = [results.task_score(targets, method, k, task) for method in methods for k in settings]
    return any(chance.below(targets, score, [task]) for score in scores)


def _generated(targets: Records) -> bool:
    return any(record.get("config", {}).get("decode", {}).get("method", "generate") == "generate" for record in targets)


def _seen(records: Records, names: Mapping[str, str]) -> Iterator[str]:
    """Which targets were sources, too, so that what starts from the sources has seen more of them than k says."""
    sources = {record["task"] for record in records if record["stage"] in ("teachers", "source")}
    both = [name for task, name in names.items() if task in sources]
    started = [look(m).label for m in ("mpt", "spot") if results.select(results.targets_of(records), method=m)]
    if both and started:
        verb, these = ("was a source", "it") if len(both) == 1 else ("were sources", "them")
        yield f"{listing(both)} {verb}, too: {listing(started)} start from all training examples of {these}, whatever k says."


def _scarcity(targets: Records, names: Mapping[str, str]) -> Iterator[str]:
    """Where a class had fewer than k examples to train on: one sentence a task."""
    for task, name in names.items():
        found: dict[str, list[int]] = {}
        for record in sorted(results.select(targets, task=task), key=lambda record: record["k"]):
            for label, size in record.get("scarce", {}).items():
                what = counted(size, "training example") + (f" of class '{label}'" if label else "")
                found.setdefault(what, [])
                if record["k"] not in found[what]:
                    found[what].append(record["k"])
        if found:
            each = "; ".join(f"{what}, fewer than {listing([setting_label(k) for k in ks])}" for what, ks in found.items())
            yield f"{name} has only {each}: all of them are taken there."


# ------------------------------------------------------------------------------------------------------ the other blocks


def _zero_shot_blocks(records: Records) -> list[Block]:
    """What runs score on tasks that they were not trained on; nothing where there are no such scores."""
    shifted = results.zero_shot_of(records)
    if not shifted:
        return []
    table = tables.zero_shot_table(shifted)
    notes = ["A run was neither trained nor chosen on the task that is scored here. These scores are in no mean."]
    sources = {record["task"] for record in records if record["stage"] in ("teachers", "source")}
    seen = [record for record in shifted if record["method"] in ("mpt", "spot") and record["task"] in sources]
    if seen:
        methods = [look(method).label for method in results.values_of(seen, "method", results.METHODS)]
        verb = "start" if len(methods) > 1 else "starts"
        taught = listing(results.values_of(seen, "task"))
        notes.append(f"But {listing(methods)} {verb} from prompts of the source tasks, {taught} among them.")
    if any(cell.weak for row in table.rows for cell in row):
        notes.append(WEAK)
    blocks: list[Block] = [Heading("Zero-shot on other tasks"), table, Text(tuple(notes))]
    for k in [] if any("cell" in record for record in shifted) else results.values_of(shifted, "k"):
        name = f"zero_shot_k{k}" if k else "zero_shot"
        caption = f"Scores on tasks that were not trained on, {setting_label(k)}. The open dots are single seeds. {ERROR_BARS}"
        blocks.append(_picture(name, figures.zero_shot_scores(shifted, k), caption))
    return blocks


def _source_blocks(records: Records) -> list[Block]:
    """How well the sources were learned, and what SPoT chose from them."""
    sources = [record for record in records if record["stage"] in ("teachers", "source")]
    blocks: list[Block] = [Heading("Source tasks"), tables.source_table(sources)] if sources else []
    spot = [record for record in records if record.get("started_from")]
    if spot:
        source_names = task_labels(results.values_of(sources, "task") or results.values_of(spot, "started_from"))
        blocks.append(tables.start_table(spot, source_names))
    return blocks


def _provenance(records: Records, sources: str, command: str) -> Iterator[str]:
    if devices := results.values_of(records, "device"):
        yield "Device: " + ", ".join(f"`{device}`" for device in devices) + "."
    again = f" To write it again: `{command}`" if command else ""
    yield f"Written {time.strftime('%Y-%m-%d %H:%M')} from {sources}.{again}"


def _task_vector_block(vectors: Mapping[str, np.ndarray], trainings: int) -> Block:
    tasks = len(vectors)
    first = ", of the first source training," if trainings > 1 else ","
    caption = (
        f"Cosine similarity between the source tasks' vectors u⊗v{first} which turn the shared prompt into each task's own. They "
        "all start alike, so they stay similar"
    )
    if tasks > 2:
        caption += (
            f" as they are (left); without the part that all share (right) unrelated vectors are at −{1 / (tasks - 1):.2f}."
        )
    else:
        caption += ". (Without the part that both share, two vectors are each other's opposite, so that is not shown.)"
    otherwise = "The source run's prompt file is not there, or has none without decomposition, so task vectors are not shown."
    if tasks == 1:
        otherwise = "There is one source task only, so its vector has nothing to be compared with."
    return _picture("task_vectors", figures.task_vector_heatmap(vectors), caption, otherwise)


def _picture(name: str, figure: Figure | None, caption: str, otherwise: str = "") -> Block:
    return Text((otherwise,)) if figure is None else Picture(name, figure, caption)
