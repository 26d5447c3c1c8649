"""`results.jsonl`: one line per run, written once, read by the report; and the means that the report shows.

A run is one prompt (one group of a bank) or one tuned model, scored on the task that it was trained on; perhaps it is scored on
others besides, with a line of its own for each, whose stage is ZERO_SHOT and which has "trained_on". The `run_id` says which: a
second line with the same id replaces the first, and `append` leaves out ids that the file already has, so writing twice changes
nothing.
"""

import dataclasses
import json
import logging
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mpt_jax.errors import UserError

RESULTS_FILE = "results.jsonl"
STAGES = ("teachers", "source", "few_shot", "full")  # of the pipeline, in order
ZERO_SHOT = "zero_shot"  # the stage of a score on another task than the run was trained on
METHODS = ("mpt", "prompt_tuning", "spot", "model_tuning")  # in the order of tables and pictures
FIELDS = {"run_id": str, "stage": str, "method": str, "task": str, "k": int, "seed": int, "score": float}
SEVERAL = " + "  # between the sources that a run of SPoT started from together, and the parts of an axis' value
Record = Mapping[str, Any]
log = logging.getLogger(__name__)


def run_id(stage: str, method: str, task: str, k: int, seed: int) -> str:
    """'few_shot/k16/mpt/TASK/seed0'; k = 0 is written 'all'."""
    return f"{stage}/k{k or 'all'}/{method}/{task}/seed{seed}"


def zero_shot_id(run: str, task: str) -> str:
    """Of the score of a run, called by its `run_id`, on a task that it was not trained on."""
    return f"{run}/{ZERO_SHOT}/{task}"


def read(path: str | Path) -> list[Record]:
    """Returns the file's records, the latest of each `run_id`, in file order.

    A last line that was cut off while being written is ignored with a warning; it is written again by the run that comes next.

    Raises:
      UserError: no such file, or a line that is not a result; names file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(
            f"Cannot read results from {path} ({error.strerror}); run the pipeline first, or give its MODEL_DIR."
        ) from None
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # every complete line ends in "\n", so what follows the last one was cut off
                log.warning("%s, line %d was cut off while being written and is ignored", path, number)
                continue
            raise UserError(f"{path}, line {number} is not JSON ({error.msg}); mend or remove that line.") from None
        check_record(record, f"{path}, line {number}")
        records.pop(record["run_id"], None)
        records[record["run_id"]] = record
    return list(records.values())


def append(path: str | Path, records: Sequence[Record]) -> int:
    """Adds the records whose `run_id` the file lacks, in one write that reaches the disk; returns how many.

    A cut-off last line is taken away first, so that it never becomes a broken line in the middle.
    """
    path = Path(path)
    known = {record["run_id"] for record in read(path)} if path.exists() else set()
    new = [record for record in records if record["run_id"] not in known]
    if not new:
        return 0
    for record in new:
        check_record(record, f"The result {record.get('run_id')} for {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            _drop_cut_off_line(file)
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"Cannot write results to {path} ({error.strerror}); give a MODEL_DIR that is writable.") from None
    return len(new)


def _drop_cut_off_line(file: IO[bytes]) -> None:
    file.seek(0)
    content = file.read()
    tail = content[content.rfind(b"\n") + 1 :]
    if not tail:
        return
    try:
        json.loads(tail)
        file.write(b"\n")  # a whole line that only lacks its end
    except ValueError:
        file.truncate(len(content) - len(tail))


def check_record(record: Any, where: str) -> None:
    """UserError, which begins with `where`, unless it is a result, with a score that is a number."""
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; mend or remove that line.")
    for field, kind in FIELDS.items():
        value = record.get(field)
        good = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not good or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{where} has '{field}': {value!r} where a result has a {kind.__name__}; mend or remove that line.")
    if record["stage"] == ZERO_SHOT and not isinstance(record.get("trained_on"), str):
        raise UserError(f"{where} is a zero-shot score and does not say what it was trained on; mend or remove that line.")
    if "cell" in record and not (isinstance(record["cell"], dict) and record["cell"]):
        raise UserError(f"{where} has 'cell': {record['cell']!r} where a sweep has its axes' values; mend or remove that line.")


# ---------------------------------------------------------------------------------------------------------------- means


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mean over n seeds and their standard deviation (n − 1 in the denominator; nan when n = 1)."""

    mean: float
    std: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.n < 2 else f"{self.mean:.1f} ± {self.std:.1f}"


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and standard deviation over seeds; None for no values."""
    values = list(values)
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))


def select(records: Iterable[Record], **where: Any) -> list[Record]:
    """The records whose fields equal all of `where`."""
    return [record for record in records if all(record.get(field) == value for field, value in where.items())]


def values_of(records: Iterable[Record], field: str, order: Sequence[str] = ()) -> list[Any]:
    """The field's distinct values: those of `order` first, the rest as they come."""
    seen = list(dict.fromkeys(record[field] for record in records if field in record))
    return [value for value in order if value in seen] + [value for value in seen if value not in order]


def runs_of(records: Iterable[Record]) -> list[Record]:
    """What runs score on the task that they were trained on: one record each."""
    return [record for record in records if record["stage"] != ZERO_SHOT]


def each_once(records: Iterable[Record]) -> list[Record]:
    """A sweep's runs, each once, whichever of its cells have it."""
    fields = ("folder", "group", "stage", "method", "task", "k", "seed")
    return list({tuple(record.get(field) for field in fields): record for record in records}.values())


def zero_shot_of(records: Iterable[Record]) -> list[Record]:
    """What runs score on other tasks."""
    return select(records, stage=ZERO_SHOT)


def zero_shot_groups(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each cell of a sweep (a study is one), k and pair of tasks; k ascending within a cell, all examples last."""
    found: dict[tuple[str, int, str, str], list[Record]] = {}
    for record in records:
        cell = json.dumps(record.get("cell", {}), sort_keys=True)
        found.setdefault((cell, record["k"], record["trained_on"], record["task"]), []).append(record)
    cells = list(dict.fromkeys(key[0] for key in found))
    return [found[key] for key in sorted(found, key=lambda key: (cells.index(key[0]), key[1] == 0, key[1]))]


def settings_of(records: Iterable[Record]) -> list[int]:
    """The k of the target runs, ascending, with 0 (all examples) last."""
    found = set(values_of(targets_of(records), "k"))
    return sorted(found - {0}) + ([0] if 0 in found else [])


def targets_of(records: Iterable[Record]) -> list[Record]:
    """The runs on target tasks."""
    return [record for record in records if record["stage"] in ("few_shot", "full")]


def seed_means(records: Iterable[Record], method: str, k: int, tasks: Sequence[str]) -> dict[int, float]:
    """The mean score over `tasks` of each seed that has them all."""
    scores: dict[int, dict[str, float]] = {}
    for record in select(targets_of(records), method=method, k=k):
        scores.setdefault(record["seed"], {})[record["task"]] = record["score"]
    return {
        seed: statistics.fmean(by_task[task] for task in tasks)
        for seed, by_task in sorted(scores.items())
        if tasks and all(task in by_task for task in tasks)
    }


def mean_over_targets(records: Sequence[Record], method: str, k: int) -> Spread | None:
    """Mean over all target tasks; the spread is that of the seeds' means (each over all targets)."""
    return spread(seed_means(records, method, k, values_of(targets_of(records), "task")).values())


def task_score(records: Sequence[Record], method: str, k: int, task: str) -> Spread | None:
    """One target's score over seeds."""
    return spread(record["score"] for record in select(targets_of(records), method=method, k=k, task=task))


def difference(records: Sequence[Record], method: str, baseline: str, k: int) -> Spread | None:
    """`method` − `baseline`, paired by seed (the same seed has the same k examples), over the mean of all targets."""
    tasks = values_of(targets_of(records), "task")
    ours, theirs = seed_means(records, method, k, tasks), seed_means(records, baseline, k, tasks)
    return spread(ours[seed] - theirs[seed] for seed in ours if seed in theirs)


def paired(records: Sequence[Record], method: str, baseline: str) -> Spread | None:
    """`method` − `baseline`, paired by seed, over records of one task and k."""
    theirs = {record["seed"]: record["score"] for record in select(records, method=baseline)}
    return spread(r["score"] - theirs[r["seed"]] for r in select(records, method=method) if r["seed"] in theirs)


def reference(records: Iterable[Record], field: str, tasks: Sequence[str]) -> float | None:
    """'chance' or 'ceiling', averaged over `tasks`; None unless every one of them documents it, and all its records agree."""
    known: dict[str, set[float]] = {}
    for record in records:
        if record.get(field) is not None:
            known.setdefault(record["task"], set()).add(record[field])
    levels = [known.get(task, set()) for task in tasks]
    return statistics.fmean(min(level) for level in levels) if levels and all(len(level) == 1 for level in levels) else None
