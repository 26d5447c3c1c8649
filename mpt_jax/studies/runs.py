"""What the report takes from the runs' folders: training curves and task vectors. They may be gone; then there are none."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpt_jax.progress import read_history
from mpt_jax.prompts.files import FILE_NAME, load_prompts
from mpt_jax.studies import results
from mpt_jax.studies.figures import Curve
from mpt_jax.studies.results import Record
from mpt_jax.studies.wording import setting_label

Records = Sequence[Record]

LOSS_PARTS = {"loss": "total", "ce": "cross-entropy", "kl": "KL(teacher‖student)", "hidden": "hidden states"}


def read_curves(records: Records, folder: Path) -> dict[str, dict[str, list[Curve]]]:
    """Training loss from the runs' `metrics.jsonl`: panel title → label → curves."""
    panels: dict[str, dict[str, list[Curve]]] = {}
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


def _curves_of(record: Record, history: Sequence[Record]) -> Iterator[tuple[str, str, Curve]]:
    """(panel, label, curve) of one run. MPT's source training shows the parts of its loss."""
    own = _curve([(line["step"], _loss_of(line, record.get("group", 0))) for line in history])
    if record["stage"] == "source":
        for part, label in LOSS_PARTS.items():
            yield "MPT, source training", label, _curve([(line["step"], line.get(part)) for line in history])
    elif record["stage"] == "teachers":
        yield "teachers", record["task"], own
    else:
        yield f"targets, {setting_label(record['k'])}", record["method"], own


def _loss_of(line: Record, group: int) -> float | None:
    """One group's loss in a bank; a run of one group writes the total only."""
    losses = line.get("losses")
    return line["loss"] if losses is None else losses[group]


def _curve(points: Sequence[tuple[int, float | None]]) -> Curve:
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
