"""Stopped in any phase, by a signal or a full disk: what is left is whole, and the same command ends as if nothing had been."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import soak
import tiny

from mpt_jax.gin_text import config_text
from mpt_jax.monitor import Interrupt
from mpt_jax.signals import Interrupted
from mpt_jax.train import run_training


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("interrupt"))


def start(folder: Path, name: str, config, *before: str) -> subprocess.Popen:
    """`python -m mpt_jax train` of a configuration; `before` comes before the command."""
    path = folder / f"{name}.gin"
    path.write_text(config_text(config), encoding="utf-8")
    arguments = [*before, sys.executable, "-m", "mpt_jax", "train", f"--gin_file={path}"]
    return soak.start(arguments)


# ------------------------------------------------------------------------------------------------------------- in one process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_it_is_asked_for(number):
    reached = []

    def work():
        with Interrupt() as interrupt:
            interrupt.heed()
            os.kill(os.getpid(), number)
            reached.append("the end of a step")
            interrupt.heed()
            reached.append("the next")

    with pytest.raises(Interrupted) as caught:
        work()
    assert caught.value.number == number and reached == ["the end of a step"]


def test_a_second_signal_does_not_wait():
    def work():
        with Interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("still here")

    with pytest.raises(KeyboardInterrupt):
        work()


def test_work_that_does_not_listen_is_left_behind():
    done = threading.Event()

    def work():
        with Interrupt() as interrupt:
            assert interrupt.abandonable(lambda: 3) == 3
            with pytest.raises(ZeroDivisionError):
                interrupt.abandonable(lambda: 1 // 0)
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            interrupt.abandonable(lambda: done.wait(60))

    began = time.monotonic()
    with pytest.raises(Interrupted):
        work()
    assert time.monotonic() - began < 10
    done.set()


class SignalAt(io.StringIO):
    """A terminal's other end that sends SIGTERM when it reads a line that begins so."""

    def __init__(self, line: str):
        super().__init__()
        self.line = line

    def write(self, text):
        if text.startswith(self.line):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def timeless(history):
    return [{k: v for k, v in record.items() if k not in ("seconds", "examples_per_second")} for record in history]


@pytest.mark.parametrize("step", [4, 8])
def test_a_validation_that_was_not_done_is_done_when_the_run_resumes(folder, monkeypatch, step):
    """The signal comes between a step and its validation; 8 is the last step."""
    train = {"eval_period": 4, "log_period": 4, "checkpoint_period": 100}
    straight = run_training(tiny.experiment(folder, f"calm_{step}", tasks=tiny.TASKS[:2], train=train))
    config = tiny.experiment(folder, f"evaluating_{step}", tasks=tiny.TASKS[:2], train=train)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", SignalAt(f"step {step}/8"))
        with pytest.raises(Interrupted):
            run_training(config)
    lines = [json.loads(line) for line in (folder / f"evaluating_{step}" / "metrics.jsonl").read_text().splitlines()]
    assert (lines[-1]["kind"], lines[-1]["step"]) == ("train", step)
    # Killed right after the validation has been done again, and before anything else is saved: it is told once nevertheless.
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", SignalAt(f"step {step}/8  validation"))
        with pytest.raises(Interrupted):
            run_training(config)
    resumed = run_training(config)
    assert timeless(resumed.history) == timeless(straight.history)
    np.testing.assert_array_equal(resumed.scores, straight.scores)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, straight.params)


# ---------------------------------------------------------------------------------------------------------- in processes


def test_sigterm_while_a_cache_is_built(folder):
    """Gone in seconds, with SIGTERM's exit code, the command to go on, and nothing half built."""
    config = tiny.experiment(folder, "building", steps=2)
    config = tiny.replace(config, data={"cache_dir": str(folder / "new_cache"), "task_modules": ("tiny_tasks", "slow_task")})
    config = tiny.replace(config, data={"mixture": "slow", "streams": ()})
    one, printed = soak.stop(start(folder, "building", config), "TERM", 0, 0.5)
    assert "building the token cache of slow/train" in one.line
    soak.check(one, printed)
    assert one.code == 143
    assert printed.splitlines()[-1].startswith(
        "Interrupted. To go on from the last checkpoint: python -m mpt_jax train --gin_file="
    )
    assert not list((folder / "new_cache").rglob(".build-*"))


def test_a_second_signal_ends_the_process_at_once(folder):
    """Here in a main thread that never listens."""
    script = (
        "import os, signal, sys, threading, time\n"
        "from mpt_jax import signals\n"
        "def send():\n"
        "    for _ in range(2):\n"
        "        time.sleep(0.3)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "with signals.handled('last words'):\n"
        "    threading.Thread(target=send).start()\n"
        "    while True:\n"
        "        try:\n"
        "            time.sleep(60)\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], cwd=soak.ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, "last words\n")
    assert time.monotonic() - began < 5


def test_kills_in_every_stage_change_nothing(folder):
    """A few of what `make soak` does: in the teachers' training, in the source's, and in a target's."""
    soak.finish(folder, "calm")
    expected = soak.left(folder / "calm")
    for name, lines, seconds in (("KILL", 6, 0.0), ("TERM", 7, 0.3), ("KILL", 11, 0.0)):
        one, printed = soak.stop(soak.start(soak.command(folder, "stopped")), name, lines, seconds)
        assert one.code != 0, printed
        soak.check(one, printed)
    soak.finish(folder, "stopped")
    soak.compare(expected, soak.left(folder / "stopped"))


def test_a_signal_is_not_lost_in_a_callback():
    """Python ignores what is raised while garbage is collected, where JAX has a callback."""
    script = (
        "import gc, os, signal, time\n"
        "from mpt_jax import signals\n"
        "def collected(phase, info):\n"
        "    if phase == 'stop':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.2)\n"
        "with signals.handled('last words'):\n"
        "    gc.callbacks.append(collected)\n"
        "    try:\n"
        "        gc.collect()\n"
        "        gc.callbacks.clear()\n"
        "        time.sleep(60)\n"
        "    except signals.Interrupted as interrupted:\n"
        "        print('heeded', interrupted.number)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=soak.ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"heeded {int(signal.SIGTERM)}\n", "")


def test_a_full_disk_is_a_sentence_and_leaves_the_last_checkpoint(folder):
    common = {"steps": 6, "prompt": {"length": 400, "init": "uniform"}, "train": {"checkpoint_period": 2, "log_period": 2}}
    config = tiny.experiment(folder, "full", **common)
    straight = run_training(tiny.experiment(folder, "room", **common))
    run_training(tiny.replace(config, train={"steps": 2}))
    with start(folder, "full", config, "sh", "-c", 'ulimit -f 32 && exec "$@"', "sh") as process:  # no file above 16 KiB
        printed = process.stderr.read()
    assert process.returncode == 2, printed
    last = printed.splitlines()[-1]
    assert last.startswith("error: Cannot write the checkpoint of step 4 into ") and "(File too large); make room" in last
    assert last.endswith("the checkpoint of step 2 is whole.")
    checkpoints = folder / "full" / "checkpoints"
    assert len(list(checkpoints.iterdir())) == 2, "the whole one, and what was written of the other"
    np.testing.assert_array_equal(run_training(config).params["prompt"], straight.params["prompt"])
    assert all(path.name.isdecimal() for path in checkpoints.iterdir())
