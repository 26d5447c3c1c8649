"""Stops a study at random moments, again and again, and compares what it leaves with that of one that nothing stopped.

    make soak                     50 times, some half an hour on two cores; a line each
    make soak KILLS=500 SEED=7 SIGNALS="KILL TERM INT"

Each time a real `python -m mpt_jax pipeline` begins or continues a study of a tiny T5, in all its kinds of stages, and gets a
signal at some line of what it prints, or a little later. A study that came to its end is compared, and another one begun.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import study
import tiny

from mpt_jax.config import PipelineConfig, StageConfig
from mpt_jax.gin_text import config_text
from mpt_jax.prompts.files import load_prompts

ROOT = Path(__file__).parent.parent
LINES = 14  # at most so many are waited for: about a third of what a whole study prints
LATER = 1.5  # seconds at most after the line: compiling, decoding and saving print nothing
HEEDED = 10.0  # seconds at most until a process that was asked to stop is gone


class Stop(NamedTuple):
    """A signal to a process: after so many lines, the last of which was `line`, and so many seconds."""

    name: str
    lines: int
    seconds: float
    line: str
    code: int  # the process's exit code; 0 where it was done before
    took: float  # seconds until it was gone


def small_study(folder: Path, run: str) -> PipelineConfig:
    """Teachers, source training, and two targets by MPT and prompt tuning; with validation, dropout and many checkpoints."""
    stages = {"mpt": StageConfig(12, 4, study.MPT), "prompt_tuning": StageConfig(12, 4, study.PLAIN)}
    cfg = study.pipeline(folder, run, few_shot=stages, full_data={}, k_shots=(2,), seeds=(0,))
    base = tiny.replace(cfg.base, train={"eval_period": 4, "log_period": 3, "checkpoint_period": 2})
    base = tiny.replace(base, decode={"method": "rank"})  # untrained, a T5 writes nothing that scores
    base = tiny.replace(base, backbone={"architecture": dataclasses.replace(tiny.CONFIG, dropout_rate=0.1)})
    return dataclasses.replace(
        cfg, base=base, teacher=StageConfig(12, 4, study.PLAIN), source=StageConfig(12, 8, study.MPT, "adamw")
    )


def command(folder: Path, run: str) -> list[str]:
    """What begins or continues the study `folder/run`."""
    path = folder / f"{run}.gin"
    if not path.exists():
        path.write_text(config_text(small_study(folder, run)), encoding="utf-8")
    return [sys.executable, "-m", "mpt_jax", "pipeline", f"--gin_file={path}"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def stop(process: subprocess.Popen[str], name: str, lines: int, seconds: float) -> tuple[Stop, str]:
    """Send the signal. Returns what it did, and all that the process printed."""
    printed: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        printed.append(line)
        if len(printed) > lines:
            break
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.extend(process.stderr or ()))
    reader.start()
    reader.join(seconds)
    process.send_signal(getattr(signal, f"SIG{name}"))
    sent = time.monotonic()
    code = process.wait()
    took = time.monotonic() - sent
    reader.join()
    process.stderr.close()
    text = "".join(printed + rest)
    return Stop(name, len(printed), seconds, (printed or ["-"])[-1].strip(), code, took), text


def finish(folder: Path, run: str) -> None:
    done = subprocess.run(command(folder, run), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def left(folder: Path) -> dict[str, Any]:
    """What a study leaves, without times: the arrays and metadata of its prompt files, and the lines of its results and logs."""
    prompts = {str(path.relative_to(folder)): _prompts(path) for path in sorted(folder.rglob("prompts.safetensors"))}
    logs = {str(path.relative_to(folder)): _lines(path) for path in sorted(folder.rglob("*.jsonl"))}
    return prompts | logs


def compare(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """AssertionError with the first file, and its first line, that differs."""
    assert expected.keys() == found.keys()
    for name, before in expected.items():
        for number, (line, other) in enumerate(zip(before, found[name], strict=False), start=1):
            assert line == other, f"{name}, line {number} differs:\n{line}\n{other}"
        assert len(before) == len(found[name]), f"{name} has {len(found[name])} lines instead of {len(before)}"


def _prompts(path: Path) -> list[tuple[str, Any]]:
    """Not the bytes of the file: safetensors writes metadata in any order."""
    arrays, meta = load_prompts(path)
    content = {name: (array.shape, array.tobytes()) for name, array in arrays.items()}
    return sorted((content | {name: value for name, value in meta.items() if name != "path"}).items())


def _lines(path: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "finished", "examples_per_second", "config")  # the configuration names its folder
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


def check(one: Stop, printed: str) -> None:
    """That a process which was asked to stop did so in time and orderly, unless it was done or had not quite begun."""
    number = getattr(signal, f"SIG{one.name}")
    assert "Traceback" not in printed or one.lines == 0, printed
    assert one.code in (0, 128 + number, -number), (one, printed)
    if one.code == 128 + number:
        assert one.took < HEEDED, one
        assert "Interrupted. To go on from the last checkpoint: " in printed, printed


def soak(folder: Path, kills: int, seed: int, names: list[str]) -> None:
    """Stop studies `kills` times. AssertionError at the first that leaves something else than one that was not stopped."""
    rng = random.Random(seed)
    tiny.make(folder)
    finish(folder, "calm")
    expected = left(folder / "calm")
    number, studies, run = 0, 0, "study0"
    while number < kills:
        name, lines, seconds = rng.choice(names), rng.randint(0, LINES), rng.choice((0.0, rng.uniform(0, LATER)))
        one, printed = stop(start(command(folder, run)), name, lines, seconds)
        check(one, printed)
        if one.code != 0:
            number += 1
            after = f"{one.seconds:.2f} s after '{one.line[:70]}'"
            print(f"{number}/{kills}  {run}  SIG{name} {after}  exit {one.code} in {one.took:.1f} s", flush=True)
        if one.code == 0 or number == kills:
            finish(folder, run)
            compare(expected, left(folder / run))
            studies += 1
            print(f"{run} equals one that was not stopped: {len(expected)} files", flush=True)
            run = f"study{studies}"


if __name__ == "__main__":
    options = {"KILLS": "50", "SEED": "0", "SIGNALS": "KILL"} | os.environ
    with tempfile.TemporaryDirectory() as temporary:
        soak(Path(temporary), int(options["KILLS"]), int(options["SEED"]), options["SIGNALS"].split())
