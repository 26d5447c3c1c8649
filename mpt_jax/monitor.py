"""What watches a run: running means and NaN (`Meter`), the best so far of each group (`Best`), requests to stop (`Interrupt`)."""

import math
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import jax
import numpy as np

from mpt_jax import trees
from mpt_jax.errors import UserError
from mpt_jax.evaluate import main_score
from mpt_jax.metrics import INVALID
from mpt_jax.partitioning import to_host
from mpt_jax.prompts import bank_axis
from mpt_jax.train_state import all_finite

Tree = Any
RUN_AHEAD = 8  # steps that may be under way on the devices: more would pile up batches and gain nothing


class NotFiniteError(UserError):
    """A loss or a parameter is not finite. `what` says which and when, without the advice."""

    def __init__(self, what: str):
        super().__init__(
            f"{what} Lower the learning rate (OptimizerConfig.rules) or set OptimizerConfig.clip_norm, and give another "
            "MODEL_DIR."
        )
        self.what = what


class Meter:
    """Sums up the steps' metrics between two lines of the log, and finds the step in which a loss was not finite.

    Args:
        step: steps taken so far.
        tasks, groups: of each stream [N].
        task_ids: step (counted from 0) → the streams in its batch [B], to name the tasks of a bad step.
        last_good: () → the newest checkpoint's step or None.
    """

    def __init__(
        self,
        step: int,
        tasks: Sequence[str],
        groups: Sequence[int],
        task_ids: Callable[[int], np.ndarray],
        last_good: Callable[[], int | None],
    ):
        self._step, self._tasks, self._groups = step, tasks, groups
        self._task_ids, self._last_good = task_ids, last_good
        self._pending: list[dict[str, jax.Array]] = []
        self._sums: dict[str, np.ndarray] = {}

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Take a step's metrics without waiting for it."""
        self._pending.append(metrics)
        if len(self._pending) >= RUN_AHEAD:
            jax.block_until_ready(self._pending[-RUN_AHEAD])

    def record(self, normalization: str) -> dict[str, Any]:
        """The means since the last record: loss (and its parts) per target token, of all groups and of each; accuracy.

        Raises:
            NotFiniteError: as `check`.
        """
        self._collect()
        sums, self._sums = self._sums, {}
        tokens, steps = sums["tokens"], np.maximum(sums["present"], 1)
        # Under "sum" a step's loss is a sum over tokens, under "mean" it is a mean already.
        weight = np.maximum(tokens, 1) if normalization == "sum" else steps
        mean = {name: sums[name] / weight for name in ("loss", "ce", "kl", "hidden")}
        here = sums["present"] > 0
        distilling = mean["kl"].any() or mean["hidden"].any()
        record: dict[str, Any] = {
            name: _number(value[here].mean()) for name, value in mean.items() if name == "loss" or (distilling and value.any())
        }
        if len(self._groups) and max(self._groups):
            record["losses"] = [_number(value) if there else None for value, there in zip(mean["loss"], here, strict=True)]
        return record | {"accuracy": _number(100 * sums["correct"].sum() / max(tokens.sum(), 1))}

    def check(self, trainable: Tree) -> None:
        """NotFiniteError if the loss of a step, or now the trainable, is not finite: it must be neither saved nor evaluated."""
        self._collect()
        if not all_finite(trainable):
            raise self._broken(self._step, "The parameters are", range(len(self._tasks)))

    def sums(self) -> dict[str, list[float]]:
        """What has been summed up since the last record, for the checkpoint: a resumed run logs what it would have logged."""
        self._collect()
        return {name: np.atleast_1d(value).tolist() for name, value in self._sums.items()}

    def load(self, sums: dict[str, list[float]]) -> None:
        """From the checkpoint."""
        self._sums = {name: np.asarray(value) for name, value in sums.items()}

    def _collect(self) -> None:
        pending, self._pending = jax.device_get(self._pending), []
        for metrics in pending:
            self._step += 1
            bad = ~np.isfinite(metrics["loss"])
            if bad.any():
                present = set(self._task_ids(self._step - 1).tolist())
                raise self._broken(self._step, "The loss is", [n for n, g in enumerate(self._groups) if bad[g] and n in present])
            metrics = metrics | {"present": (metrics["tokens"] > 0).astype(np.float64)}
            for name, value in metrics.items():
                self._sums[name] = self._sums.get(name, 0.0) + np.asarray(value, np.float64)

    def _broken(self, step: int, what: str, streams: Sequence[int]) -> NotFiniteError:
        tasks = ", ".join(dict.fromkeys(self._tasks[n] for n in streams))
        good = self._last_good()
        kept = f"the last good checkpoint, of step {good}, is kept" if good is not None else "no checkpoint had been written yet"
        return NotFiniteError(f"{what} not finite at step {step} ({tasks}); {kept}.")


class Best:
    """The best trainable of each group by validation score, apart from the one in training. NumPy arrays throughout.

    Attributes:
        trainable: as the state's; each group's entries are of its best step.
        score, step: [G]; -inf and 0 before the first validation.
    """

    def __init__(self, trainable: Tree, groups: Sequence[int]):
        total = max(groups) + 1
        self._groups = np.asarray(groups)
        self.trainable = to_host(trainable)
        self.score = np.full(total, -np.inf)
        self.step = np.zeros(total, np.int64)

    def tree(self) -> Tree:
        """For the checkpoint."""
        return {"trainable": self.trainable, "score": self.score, "step": self.step}

    def load(self, tree: Tree | None) -> None:
        """From the checkpoint."""
        if tree is not None:
            self.trainable, self.score, self.step = to_host(tree["trainable"]), np.array(tree["score"]), np.array(tree["step"])

    def update(self, step: int, metrics: Sequence[dict[str, float]], tasks: Sequence[str], trainable: Tree) -> dict[str, Any]:
        """Keep the groups that are better than ever. Returns the record of this validation.

        Args:
            metrics: of each stream [N]; a group's score is the mean of its streams' main scores.
        """
        by_stream = np.asarray([main_score(one) for one in metrics])
        scores = np.asarray([by_stream[self._groups == group].mean() for group in range(len(self.score))])
        better = scores > self.score
        if better.any():
            self.score, self.step = np.where(better, scores, self.score), np.where(better, step, self.step)
            now = to_host(trainable)
            if "backbone" in now:
                self.trainable = now
            else:
                old, new = trees.flatten(self.trainable), trees.flatten(now)
                for path, value in new.items():
                    rows = better[self._groups] if bank_axis(path) == "stream" else better
                    old[path][rows] = value[rows]
                self.trainable = trees.unflatten(old)
        numbers = [_number(score) for score in scores]
        invalid = [one[INVALID] for one in metrics if INVALID in one]
        return {
            "score": _number(scores.mean()),
            "scores": numbers,
            **({"invalid": _number(float(np.mean(invalid)))} if invalid else {}),
            "best_step": int(self.step[0]) if len(self.step) == 1 else self.step.tolist(),
            "tasks": list(tasks),
            "metrics": [{name: _number(value) for name, value in one.items()} for one in metrics],
        }


class Interrupt:
    """The first SIGINT or SIGTERM within it only sets `requested`, for the loop to stop at its next step; a second interrupts."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def _number(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return round(float(value), 6) if math.isfinite(value) else None
