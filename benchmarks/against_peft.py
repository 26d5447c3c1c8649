"""Runs a comparison: prepares the folder, starts the contenders, checks that they compute the same, times them in turns.

    python -m benchmarks.against_peft --device cpu
    python -m benchmarks.against_peft --device cpu --tasks sst2,mnli,boolq --inputs 512 --batch 32 --rounds 3
    python -m benchmarks.against_peft --device gpu

Each run is one JSON file in `--output`, written after every round. All flags: benchmarks/settings.py.
"""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import Seconds, circumstances, ratios, summary
from benchmarks.settings import Settings, parse
from benchmarks.worker import ROOT, Failed, Worker
from mpt_jax.errors import UserError
from mpt_jax.files import write_text

OURS = "mpt_jax"
LARGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592"  # as in the Makefile
PARITY_STEPS = 3
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of losses, relative
EQUAL_TOKENS = {"float32": 0.99, "bfloat16": 0.0}  # of decoding; in bfloat16 near ties are decided by rounding


class Entry(NamedTuple):
    """A line of the comparison: a contender on a set of batches."""

    label: str
    contender: str
    batches: str


def entries(settings: Settings) -> list[Entry]:
    if not settings.tasks:
        return [Entry(name if name == OURS else f"peft {name}", name, "full") for name in settings.names]
    ours = [Entry(f"{OURS} {way}", OURS, way) for way in settings.ways.split(",") if OURS in settings.names]
    return ours + [Entry(f"peft {name}", name, "padded") for name in settings.names if name != OURS]


def environment(settings: Settings, contender: str) -> dict[str, str]:
    """The same memory allocator for both; for each its own way to the cores or the GPU."""
    common = {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", LARGE_PAGES), "HF_HUB_OFFLINE": "1"}
    on_gpu = settings.device == "gpu"
    if contender != OURS:
        return common | ({} if on_gpu else {"OMP_NUM_THREADS": str(settings.threads), "CUDA_VISIBLE_DEVICES": ""})
    if on_gpu:
        return common | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    flags = os.environ.get("XLA_FLAGS", "")
    if settings.host_devices > 1:
        flags += f" --xla_force_host_platform_device_count={settings.host_devices} --xla_cpu_multi_thread_eigen=false"
    return common | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


class Comparison:
    """One run: workers by contender, and the report as far as it is known."""

    def __init__(self, settings: Settings, folder: Path, file: Path):
        self.settings, self.folder, self.file = settings, folder, file
        self.workers: dict[str, Worker] = {}
        self.entries = entries(settings)
        parts = ("failed", "losses", "seconds", "processor_seconds", "contenders")
        self.report: dict[str, Any] = circumstances(settings) | {part: {} for part in parts}

    def prepare(self) -> None:
        command = [sys.executable, "-m", "benchmarks.prepare", _json(self.settings), str(self.folder)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
        self.report["batches"] = json.loads((self.folder / "batches.json").read_text())

    def files(self, batches: str) -> list[str]:
        return [str(path) for path in sorted((self.folder / "batches" / batches).glob("*.npz"))]

    def ask(self, entry: Entry, *questions: tuple[str, dict[str, Any]]) -> list[Any] | None:
        """The answers of an entry's contender, or None where it failed (for want of memory, say): then it has no further part.

        Raises:
            UserError: all have failed.
        """
        name = entry.contender
        try:
            worker = self.workers.pop(name, None) or self._start(name)
            answers = [worker.ask(what, **arguments) for what, arguments in questions]
        except Failed as failure:
            print(f"{name} failed: {failure}", flush=True)
            self.report["failed"][name] = str(failure)
            self.entries = [other for other in self.entries if other.contender != name]
            if not self.entries:
                raise UserError(f"No contender is left: {self.report['failed']}") from None
            return None
        if self.settings.apart:
            worker.close()
        else:
            self.workers[name] = worker
        return answers

    def _start(self, contender: str) -> Worker:
        module = "benchmarks.with_mpt_jax" if contender == OURS else "benchmarks.with_peft"
        arguments = [_json(self.settings), str(self.folder), contender]
        return Worker(module, arguments, environment(self.settings, contender), self.folder / f"{contender}.log")

    def check(self) -> None:
        """The losses of a few training steps on one batch, and what decoding writes, against ours.

        Raises:
            UserError: they differ.
        """
        losses: dict[str, list[float]] = {}
        tokens: dict[str, list[list[int]]] = {}
        for entry in {entry.contender: entry for entry in self.entries}.values():
            # With tasks, the batches that have the same examples; `sorted` and `packed` are `trimmed` laid out otherwise.
            ours = entry.contender == OURS
            batch = self.files("full" if not self.settings.tasks else "trimmed" if ours else "padded")[0]
            answers = self.ask(entry, ("losses", {"batch": batch, "steps": PARITY_STEPS}), ("decoded", {"batch": batch}))
            if answers is not None:
                losses[entry.contender], tokens[entry.contender] = answers
        if OURS not in losses:
            return
        others = [contender for contender in losses if contender != OURS]
        equal = {other: _share_of_equal(tokens[OURS], tokens[other]) for other in others}
        self.report |= {"losses": losses, "equal_tokens": equal}
        for other in others:
            apart = max(abs(a - b) / abs(b) for a, b in zip(losses[other], losses[OURS], strict=True))
            if apart > TOLERANCE[self.settings.dtype]:
                raise UserError(f"PEFT ({other}) has the losses {losses[other]}, {OURS} {losses[OURS]}; nothing was timed.")
            if equal[other] < EQUAL_TOKENS[self.settings.dtype]:
                raise UserError(f"Of what PEFT ({other}) decodes, {equal[other]:.0%} is what {OURS} decodes; nothing was timed.")

    def measure(self, work: str) -> None:
        """All rounds of one kind of work. Who begins changes with each turn."""
        seconds: Seconds = {entry.label: [] for entry in self.entries}
        processor: Seconds = {entry.label: [] for entry in self.entries}
        self.report["seconds"][work], self.report["processor_seconds"][work] = seconds, processor
        if not self.settings.apart:
            for entry in self.entries:
                self.ask(entry, self._warm(entry, work))
        for number in range(self.settings.rounds):
            self.report["load"].append(os.getloadavg()[0])
            for rounds in (*seconds.values(), *processor.values()):
                rounds.append([])
            for turn in range(-(-self.settings.batches // self.settings.steps) if self.settings.tasks else 1):
                for entry in self.entries[:: -1 if (number + turn) % 2 else 1]:
                    before = [self._warm(entry, work)] if self.settings.apart else []
                    answers = self.ask(entry, *before, (work, {"batches": self._batches(entry, turn)}), ("about", {}))
                    if answers is not None:
                        seconds[entry.label][-1].append(answers[-2][0])
                        processor[entry.label][-1].append(answers[-2][1])
                        self.report["contenders"][entry.contender] = answers[-1]
            self._write()
            told = ", ".join(
                f"{label} {self._examples() / sum(rounds[-1]):.2f}" for label, rounds in seconds.items() if rounds[-1]
            )
            print(f"{work} {number + 1}/{self.settings.rounds}, examples/s: {told}", flush=True)

    def _warm(self, entry: Entry, work: str) -> tuple[str, dict[str, Any]]:
        """Each shape once: what is compiled is compiled now."""
        shapes = self.report["batches"][entry.batches]["shapes"]
        different = {tuple(shape): file for shape, file in zip(shapes, self.files(entry.batches), strict=True)}
        return work, {"batches": list(different.values())}

    def _batches(self, entry: Entry, turn: int) -> list[str]:
        files, steps = self.files(entry.batches), self.settings.steps
        return files[turn * steps : (turn + 1) * steps] if self.settings.tasks else files * steps

    def _examples(self) -> int:
        """Of a contender's turns in a round."""
        return self.settings.batch * (self.settings.batches if self.settings.tasks else self.settings.steps)

    def _write(self) -> None:
        examples = self._examples()
        for results, seconds in (("results", "seconds"), ("processor_results", "processor_seconds")):
            self.report[results] = {work: ratios(each, examples, OURS) for work, each in self.report[seconds].items()}
        write_text(self.file, json.dumps(self.report, indent=1) + "\n")

    def run(self) -> None:
        try:
            self.prepare()
            self.check()
            for work in ("train",) if self.settings.tasks else self.settings.work.split(","):
                self.measure(work)
        finally:
            self.close()

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def run(settings: Settings) -> Path:
    """One comparison; returns its JSON file. UserError where the two sides do not compute the same."""
    settings.validate()
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H%M%S")
    what = "-".join(part for part in (settings.device, settings.size, settings.tasks, now) if part)
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(settings, Path(folder), Path(settings.output) / f"{what}.json")
        comparison.run()
    print(summary(comparison.report))
    return comparison.file


def _share_of_equal(tokens: list[list[int]], others: list[list[int]]) -> float:
    pairs = [a == b for row, other in zip(tokens, others, strict=True) for a, b in zip(row, other, strict=True)]
    return sum(pairs) / len(pairs)


def _json(settings: Settings) -> str:
    return json.dumps(dataclasses.asdict(settings))


def main() -> None:
    try:
        for settings in parse(sys.argv[1:]):
            for task in settings.tasks.split(","):
                print(run(dataclasses.replace(settings, tasks=task)))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
