"""What a run tells: `metrics.jsonl`, TensorBoard, and a progress bar on a terminal or plain lines elsewhere.

A line of `metrics.jsonl` is {"kind": "train", "step", "loss", "accuracy", "losses" [G], "examples_per_second", "seconds"}, where
loss is nats per target token since the line before, or {"kind": "validation", "step", "score", "scores" [G], "tasks" [N],
"metrics" [N]}, for classifications with "invalid", the mean percentage of answers that are no labels, or {"kind": "skipped",
"step", "losses" [G], "examples" {task: rows}} of a bad step that was left out; "skipped" in the next line of the kind "train"
counts these, of each group for itself.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from mpt_jax.files import write_text

LINE_SECONDS = 5.0  # between two lines of a run of a study, where there is no bar; `metrics.jsonl` has all

Record = dict[str, Any]
T = TypeVar("T")


def read_history(folder: Path, until_step: int | None = None) -> list[Record]:
    """The lines of the run's `metrics.jsonl`, up to a step; a last line that a kill cut short is left out."""
    path = Path(folder) / "metrics.jsonl"
    history: list[Record] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if until_step is None or record["step"] <= until_step:
            history.append(record)
    return history


class Progress:
    """Reports one run. A resumed run drops the lines beyond its start, so that each step is told once.

    Args:
        folder: the run's folder.
        steps: the run's length; `start`: the step it begins or resumes at.
        batch_size: examples per step.
        validated: False where the validation after `start` is still to come, though an earlier call may have written its line.
        label: put before every line on the terminal.
        out: where the bar or the lines go.
        writes: whether this process tells anything; if not, it only keeps the history.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        start: int,
        batch_size: int,
        tensorboard: bool,
        validated: bool = True,
        label: str = "",
        out: TextIO | None = None,
        writes: bool = True,
    ):
        self._steps, self._batch_size = steps, batch_size
        self._label = f"{label}  " if label else ""
        path = Path(folder) / "metrics.jsonl"
        history = read_history(folder, until_step=start)
        self.history = [line for line in history if validated or (line["kind"], line["step"]) != ("validation", start)]
        if writes:
            write_text(path, "".join(json.dumps(record) + "\n" for record in self.history))  # whole: others may be reading it
        self._file = (path if writes else Path(os.devnull)).open("a")
        self._out = out or (sys.stderr if writes else self._file)
        self._bar = (
            tqdm(total=steps, initial=start, desc=label or None, unit="step", file=self._out, leave=False, dynamic_ncols=True)
            if self._out.isatty()
            else None
        )
        self._tensorboard = _TensorBoard(Path(folder) / "tensorboard", start) if tensorboard and writes else None
        self._began = self._last_time = self._told = time.perf_counter()
        self._last_step = self._first_step = start

    def started(self, step: int) -> None:
        """Start the clock anew: the first step was the compiler's."""
        self._began = self._last_time = self._told = time.perf_counter()
        self._last_step = self._first_step = step

    def train(self, step: int, record: Record) -> None:
        """Tell the training metrics of the steps since the last call; of a study's lines, the last and some before it."""
        now = time.perf_counter()
        taken, seconds = step - self._last_step, now - self._last_time
        rate = taken * self._batch_size / seconds if taken and seconds > 0 else 0.0
        self._last_step, self._last_time = step, now
        self._write(
            {
                "kind": "train",
                "step": step,
                **record,
                "examples_per_second": round(rate, 1),
                "seconds": round(now - self._began, 2),
            }
        )
        scalars = {"train/loss": record["loss"], "train/accuracy": record["accuracy"], "train/examples_per_second": rate}
        self._scalars(step, scalars)
        loss = "none" if record["loss"] is None else f"{record['loss']:.4f}"  # where every step was skipped
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"loss {loss}, {rate:.0f} examples/s")
            return
        if self._label and step < self._steps and now - self._told < LINE_SECONDS:  # one of a study's many short runs
            return
        self._told, done = now, step - self._first_step
        left = (self._steps - step) * (now - self._began) / done if done else 0.0
        self.say(f"step {step}/{self._steps}  loss {loss}  {rate:.0f} examples/s  ETA {_clock(left)}")

    def validation(self, step: int, record: Record) -> None:
        """Tell the scores of the validation after `step`; its time is not counted against the examples per second."""
        self._write({"kind": "validation", "step": step, **record})
        scalars = {"validation/score": record["score"]}
        for number, (task, metrics) in enumerate(zip(record["tasks"], record["metrics"], strict=True)):
            scalars |= {f"validation/{number}_{task}/{name}": value for name, value in metrics.items()}
        self._scalars(step, scalars)
        invalid = f"  ({record['invalid']:.1f}% of the answers are no labels)" if record.get("invalid") else ""
        self.say(f"step {step}/{self._steps}  validation score {record['score']:.2f}{invalid}")

    def skipped(self, record: Record, text: str) -> None:
        """Tell of a bad step that was left out."""
        self._write({"kind": "skipped", **record})
        self.say(f"warning: {text}")

    def resume_clock(self) -> None:
        """Leave out of the examples per second what happened since the last line (validation, saving)."""
        self._last_time = time.perf_counter()

    def say(self, text: str) -> None:
        """One line on the terminal."""
        if self._bar is not None:
            self._bar.write(self._label + text, file=self._out)
        else:
            print(self._label + text, file=self._out, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._file.close()

    def _write(self, record: Record) -> None:
        self.history.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _scalars(self, step: int, scalars: dict[str, float | None]) -> None:
        if self._tensorboard is not None:
            self._tensorboard.write(step, {name: value for name, value in scalars.items() if value is not None})


class _TensorBoard:
    """An event file. Not tensorboardX's SummaryWriter, whose thread dies on a full disk, after which it blocks whoever writes.

    Args:
        folder: made if need be; each call of a run has its own file in it.
        start: events of later steps in older files are hidden.
    """

    def __init__(self, folder: Path, start: int):
        from tensorboardX.event_file_writer import EventsWriter  # takes a second where torch is installed
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._events = Event, EventsWriter(str(folder / "events"), f".{os.getpid()}")
        self._events.write_event(Event(step=start, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """The values of a step. Raises OSError."""
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            self._events.write_event(self._event(step=step, wall_time=time.time(), summary=scalar(name, value)))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def counted(
    batches: Iterable[T],
    size: Callable[[T], int],
    label: str,
    total: int | None,
    *,
    period: float = 10.0,
    out: TextIO | None = None,
) -> Iterator[T]:
    """The batches as they are; meanwhile a bar on a terminal, or elsewhere a line every `period` seconds, counts the examples.

    Args:
        size: how many examples a batch has.
        total: how many there will be in all; None where that is not known.
        out: where the bar or the lines go; default: stderr.
    """
    out = out or sys.stderr
    if out.isatty():
        with tqdm(total=total, desc=label, unit=" examples", delay=1.0, file=out, leave=False, dynamic_ncols=True) as bar:
            for batch in batches:
                yield batch
                bar.update(size(batch))
        return
    began = told = time.perf_counter()
    done = 0
    for batch in batches:
        yield batch
        done += size(batch)
        now = time.perf_counter()
        if now - told >= period:
            told, rate = now, done / (now - began)
            goal = f" of {total:,}" if total else ""
            left = f"  ETA {_clock((total - done) / rate)}" if total else ""
            print(f"{label}: {done:,}{goal} examples  {rate:,.0f} examples/s{left}", file=out, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
