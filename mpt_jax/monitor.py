"""What watches a run: means and bad steps (`Meter`), the best so far of each group (`Best`), requests to stop (`Interrupt`)."""

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np

from mpt_jax import distributed, trees
from mpt_jax.config import TrainConfig
from mpt_jax.errors import UserError
from mpt_jax.evaluate import main_score
from mpt_jax.metrics import INVALID
from mpt_jax.partitioning import to_host
from mpt_jax.prompts import bank_axis
from mpt_jax.signals import NUMBERS, Interrupted
from mpt_jax.train_state import all_finite

T = TypeVar("T")
Tree = Any
PARTS = ("loss", "ce", "kl", "hidden")  # of the loss, in a step's metrics
LISTED = 16  # examples of a task that a sentence names; metrics.jsonl has all of a step that was skipped
POLL = 0.1  # seconds between two looks for a signal
ASKED = 2.0  # seconds after which several processes ask one another, which waits for what the devices still do
RUN_AHEAD = 8  # steps that may be under way on the devices: more would pile up batches and gain nothing


class BadStepError(UserError):
    """A loss, a gradient or a parameter is not finite, or a loss is a spike. `what` says which and when, without the advice."""

    def __init__(self, what: str, skip: bool):
        also = ", or leave such steps out with TrainConfig.on_bad_step='skip'" if skip else ""
        super().__init__(
            f"{what} Lower the learning rate (OptimizerConfig.rules) or set OptimizerConfig.clip_norm, and give another "
            f"MODEL_DIR{also}."
        )
        self.what = what
        self.settings = ""  # the field of a study that has the rate, where it is not that of the stage at work


class Meter:
    """Sums up the steps' metrics between two lines of the log, and finds the steps that are bad (see `guard.py`).

    Args:
        step: steps taken so far.
        config: says what happens at a bad step.
        tasks, groups: of each stream [N].
        draw: step (counted from 0) → the streams [B] and the rows of their data [B] in its batch, to name those of a bad step.
        last_good: () → the newest checkpoint's step or None.
        skipped: told of a step that was left out: a line of the log without its kind, and a sentence.
    """

    def __init__(
        self,
        step: int,
        config: TrainConfig,
        tasks: Sequence[str],
        groups: Sequence[int],
        draw: Callable[[int], tuple[np.ndarray, np.ndarray]],
        last_good: Callable[[], int | None],
        skipped: Callable[[dict[str, Any], str], None],
    ):
        self._step, self._config, self._tasks, self._groups = step, config, tasks, groups
        self._draw, self._last_good, self._tell_skipped = draw, last_good, skipped
        self._pending: list[dict[str, jax.Array]] = []
        self._sums: dict[str, np.ndarray] = {}
        self._in_a_row = np.zeros(max(groups) + 1, np.int64)  # of each group, bad steps since its last good one

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Take a step's metrics without waiting for it."""
        self._pending.append(metrics)
        if len(self._pending) >= RUN_AHEAD:
            jax.block_until_ready(self._pending[-RUN_AHEAD])

    def record(self, normalization: str) -> dict[str, Any]:
        """The means since the last record: loss (and its parts) per target token, of all groups and of each; accuracy.

        The loss is None where all steps were skipped; "skipped" counts those that were, where there are any.

        Raises:
            BadStepError: as `check`.
        """
        self._collect()
        sums, self._sums = self._sums, {}
        tokens, steps = sums["tokens"], np.maximum(sums["present"], 1)
        # Under "sum" a step's loss is a sum over tokens, under "mean" it is a mean already.
        weight = np.maximum(tokens, 1) if normalization == "sum" else steps
        mean = {name: sums[name] / weight for name in PARTS}
        here = sums["present"] > 0
        distilling = mean["kl"].any() or mean["hidden"].any()
        record: dict[str, Any] = {
            name: _number(value[here].mean()) if here.any() else None
            for name, value in mean.items()
            if name == "loss" or (distilling and value.any())
        }
        if len(self._groups) and max(self._groups):
            record["losses"] = [_number(value) if there else None for value, there in zip(mean["loss"], here, strict=True)]
        if skipped := int(sums["bad"].sum()):
            record["skipped"] = skipped
        return record | {"accuracy": _number(100 * sums["correct"].sum() / max(tokens.sum(), 1))}

    def check(self, trainable: Tree) -> None:
        """BadStepError if a step was bad and must not be skipped, or the trainable is not finite now: it must not be saved."""
        self._collect()
        if not all_finite(trainable):
            what = f"The parameters are not finite at step {self._step} ({', '.join(dict.fromkeys(self._tasks))})"
            raise BadStepError(f"{what}; {self._kept()}.", skip=False)

    def tree(self) -> dict[str, Any]:
        """For the checkpoint, what was summed up since the last record: a resumed run logs what it would have logged."""
        self._collect()
        sums = {name: np.atleast_1d(value).tolist() for name, value in self._sums.items()}
        return {"sums": sums, "in_a_row": self._in_a_row.tolist()}

    def load(self, tree: dict[str, Any]) -> None:
        """From the checkpoint."""
        self._sums = {name: np.asarray(value) for name, value in tree["sums"].items()}
        self._in_a_row = np.asarray(tree["in_a_row"])

    def _collect(self) -> None:
        pending, self._pending = jax.device_get(self._pending), []
        for metrics in pending:
            self._step += 1
            good = (metrics["tokens"] > 0) & ~metrics["bad"]
            self._in_a_row = np.where(good, 0, self._in_a_row + metrics["bad"])
            if metrics["bad"].any():
                self._bad_step(metrics)
            counted = {name: np.where(metrics["bad"], 0.0, metrics[name]) for name in (*PARTS, "tokens", "correct")}
            for name, value in (counted | {"present": good, "bad": metrics["bad"]}).items():
                self._sums[name] = self._sums.get(name, 0.0) + np.asarray(value, np.float64)

    def _bad_step(self, metrics: dict[str, np.ndarray]) -> None:
        """Stop, or tell that the step was skipped, as the configuration says."""
        streams, rows = self._draw(self._step - 1)
        bad = metrics["bad"]
        blamed = [n for n in np.unique(streams).tolist() if bad[self._groups[n]]]
        examples: dict[str, list[int]] = {self._tasks[n]: [] for n in blamed}
        for n in blamed:
            examples[self._tasks[n]] += rows[streams == n].tolist()
        what = f"{self._reason(metrics)} at step {self._step} ({', '.join(examples)})"
        batch = f"whose batch has the examples {listed(examples)}"
        if self._config.on_bad_step == "stop":
            raise BadStepError(f"{what}, {batch}; {self._kept()}.", skip=True)
        most = self._config.max_skipped_steps
        if self._in_a_row.max() > most:
            many = f"more than TrainConfig.max_skipped_steps={most} steps in a row were bad"
            raise BadStepError(f"{what}, {batch}; {many}, and {self._kept()}.", skip=False)
        losses = [_number(value) for value in metrics["token_loss"]]
        self._tell_skipped({"step": self._step, "losses": losses, "examples": examples}, f"{what}, {batch}; it was skipped")

    def _reason(self, metrics: dict[str, np.ndarray]) -> str:
        """What is wrong with the first bad group."""
        group = int(np.argmax(metrics["bad"]))
        loss, median = float(metrics["token_loss"][group]), float(metrics["median"][group])
        if not math.isfinite(loss):
            return "The loss is not finite"
        if self._config.spike_factor and loss > self._config.spike_factor * median:
            return f"The loss is {loss:.4g}, above {self._config.spike_factor:g} times its running median of {median:.4g},"
        return "The gradient is not finite"

    def _kept(self) -> str:
        good = self._last_good()
        return f"the last good checkpoint, of step {good}, is kept" if good is not None else "no checkpoint had been written yet"


def listed(examples: Mapping[str, Sequence[int]]) -> str:
    """'3, 17 of a; 5 of b', and of many the first ones and how many more there are."""
    parts = []
    for task, rows in examples.items():
        more = f" and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
        parts.append(f"{', '.join(map(str, rows[:LISTED]))}{more} of {task}")
    return "; ".join(parts)


class Best:
    """The best trainable of each group by validation score, apart from the one in training. NumPy arrays throughout.

    Attributes:
        trainable: as the state's; each group's entries are of its best step.
        score, step: [G]; -inf and 0 before the first validation.
        stale: [G], validations since then.
    """

    def __init__(self, trainable: Tree, groups: Sequence[int]):
        total = max(groups) + 1
        self._groups = np.asarray(groups)
        self.trainable = to_host(trainable)
        self.score = np.full(total, -np.inf)
        self.step = np.zeros(total, np.int64)
        self.stale = np.zeros(total, np.int64)

    def tree(self) -> Tree:
        """For the checkpoint."""
        return {"trainable": self.trainable, "score": self.score, "step": self.step, "stale": self.stale}

    def load(self, tree: Tree | None) -> None:
        """From the checkpoint."""
        if tree is not None:
            self.trainable = to_host(tree["trainable"])
            self.score, self.step, self.stale = (np.array(tree[name]) for name in ("score", "step", "stale"))

    def update(self, step: int, metrics: Sequence[dict[str, float]], tasks: Sequence[str], trainable: Tree) -> dict[str, Any]:
        """Keep the groups that are better than ever. Returns the record of this validation.

        Args:
            metrics: of each stream [N]; a group's score is the mean of its streams' main scores.
        """
        by_stream = np.asarray([main_score(one) for one in metrics])
        scores = np.asarray([by_stream[self._groups == group].mean() for group in range(len(self.score))])
        better = scores > self.score
        self.stale = np.where(better, 0, self.stale + 1)
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
    """Within it the first SIGINT or SIGTERM waits until it is asked for, at the latest when this is left; a second interrupts.

    It replaces what handles the two signals outside, including handlers that a device's own library has installed meanwhile.

    Several processes all come to `heed`, `abandonable` and `in_parts` alike, and a request to one of them stops all, at the same
    place. When this is left, it stops that one alone, and `distributed.joined` the others.

    Args:
        check: is called again and again within it, and stops the work by what it raises.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.check = check
        self._received = 0
        self._before: dict[int, Any] = {}
        self._steps = _Asking()

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            _raise(self._received)

    def heed(self) -> None:
        """Raises `Interrupted` if a stop was requested. Between two steps; several processes take some more, and stop at one."""
        _raise(self._steps.heard(self._received))

    def abandonable(self, work: Callable[[], T]) -> T:
        """What `work` returns, done in another thread, where it is left behind if a stop is requested before it is done.

        For what takes long and changes nothing that is kept: a compiler does not listen to signals. Several processes each do it
        without an exchange with the others, and none goes on before all have done it.

        Raises:
            Interrupted: a stop was requested.
            Exception: whatever `check` raises.
        """
        done: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                done.append(work())
            except BaseException as error:  # handed to the caller, who raises it
                failed.append(error)

        ballot = distributed.Ballot()
        thread = threading.Thread(target=run, name="mpt_jax-abandonable", daemon=True)
        if not self._received:
            thread.start()
        while thread.is_alive() and not self._received and not ballot.seen():
            thread.join(POLL)
            self.check()
        if failed:
            raise failed[0]
        _raise(ballot.cast(0 if done else self._received, "going on or stopping"))
        return done[0]

    def in_parts(self, work: Callable[[Callable[[], None]], T]) -> T:
        """What `work` returns, which calls what it is given between its parts and may then be left, as with `abandonable`.

        Of several processes all call it equally often, and may exchange what they like within a part.

        Raises:
            Interrupted, Exception: as `abandonable`.
        """
        if not distributed.several():
            return self.abandonable(lambda: work(lambda: None))
        parts = _Asking()
        return work(lambda: _raise(parts.heard(self._received)))

    def whole(self, work: Callable[[], T]) -> T:
        """What `work` returns, which is not left before it is done.

        A request that came meanwhile is then forgotten in several processes, where all are done, or else stops what comes next.
        """
        done = work()
        if distributed.several():
            self._received = 0
        return done

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            raise KeyboardInterrupt  # anywhere, so that nothing may be saved
        self._received = number


class _Asking:
    """Whether a signal was received, of several processes by any: every so many calls all ask, every `ASKED` seconds or so.

    How many calls these are follows from the time that they took, of which all hear the longest: so all ask at the same call.
    """

    def __init__(self) -> None:
        self._calls, self._next = 0, 1
        self._since = time.monotonic()

    def heard(self, received: int) -> int:
        """The signal's number, 0 for none or where this call does not ask. All call it equally often."""
        if not distributed.several():
            return received
        self._calls += 1
        if self._calls < self._next:
            return 0
        heard = int(distributed.most(received))
        seconds = distributed.most(time.monotonic() - self._since)
        # At most twice as many as now: the first ones, which wait for a compiler, say little.
        self._next = int(np.clip(self._calls * ASKED / max(seconds, 1e-6), 1, 2 * self._calls))
        self._calls, self._since = 0, time.monotonic()
        return heard


def _raise(received: int) -> None:
    """Interrupted by the signal of this number, unless it is 0."""
    if received:
        raise Interrupted(received)


def _number(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return round(float(value), 6) if math.isfinite(value) else None
