"""A contender in a process of its own: it does what it is asked, one thing at a time, and waits idle meanwhile.

Questions and answers are lines of JSON, on a pair of pipes that nothing else is written to.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent


class Failed(Exception):
    """A contender that could not do what it was asked: the last line that it wrote of it."""


class Clock:
    """Time since it was made."""

    def __init__(self) -> None:
        self.began, self.worked = time.perf_counter(), time.process_time()

    def read(self) -> list[float]:
        """Seconds, and seconds that the cores spent on this process; the latter are less than the former where it had to wait."""
        return [time.perf_counter() - self.began, time.process_time() - self.worked]


class Side(Protocol):
    """What a contender can be asked. Batches are .npz files, read before the clock runs."""

    def losses(self, batch: str, steps: int) -> list[float]:
        """The loss before each of so many training steps on one batch."""
        ...

    def train(self, batches: list[str]) -> list[float]:
        """`Clock.read` of a training step on each of the batches, together, after one on the first that is not timed.

        A process that was idle may have lost its pages and its caches, which training, where step follows step, does not.
        """
        ...

    def decode(self, batches: list[str]) -> list[float]:
        """`Clock.read` of greedy decoding of each of the batches, together, after one of the first as in `train`."""
        ...

    def decoded(self, batch: str) -> list[list[int]]:
        """The tokens [B, L] that greedy decoding writes."""
        ...

    def about(self) -> dict[str, Any]:
        """Versions, device, and whatever else belongs to the numbers."""
        ...


def serve(side: Side, answers: Any) -> None:
    """Answers until there are no more questions."""
    for line in sys.stdin:
        question = json.loads(line)
        answer = getattr(side, question["do"])(**question["with"])
        print(json.dumps(answer), file=answers, flush=True)


def use_cores(count: int) -> None:
    """No more than so many cores for this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def private_output() -> Any:
    """The answers' pipe; what libraries print goes to standard error instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


class Worker:
    """A running contender. Its first answer, `{}`, says that it is ready."""

    def __init__(self, module: str, arguments: list[str], environment: Mapping[str, str], log: Path):
        self.log, began = log, time.perf_counter()
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._answer()
        self.start_seconds = time.perf_counter() - began

    def ask(self, what: str, **arguments: Any) -> Any:
        """Raises `Failed` where the process ended instead of answering."""
        assert self.process.stdin is not None
        try:
            print(json.dumps({"do": what, "with": arguments}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self.close()
            raise Failed(self._last_words()) from None
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what was asked last, of a process that has ended
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise Failed(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        told = [line.strip() for line in lines if line.strip()]
        return f"exit code {self.process.returncode}: {told[-1][:500] if told else 'it said nothing'}"
