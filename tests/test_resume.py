"""Resumed equals uninterrupted, bit for bit: stopped at a checkpoint, or killed anywhere."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from mpt_jax.checkpoint.store import Store
from mpt_jax.train import run_training

DROPOUT = dataclasses.replace(tiny.CONFIG, dropout_rate=0.1)  # so that the random key matters
TASKS = tiny.TASKS[:2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tiny.make(tmp_path_factory.mktemp("resume"))
    run_training(tiny.experiment(folder, "teachers", tasks=TASKS, steps=2))
    return folder


def config_of(folder, kind, run, steps=8, **train):
    train = {"eval_period": 3, "checkpoint_period": 2, "log_period": 2} | train
    common = {"tasks": TASKS, "steps": steps, "architecture": DROPOUT, "train": train}
    if kind == "plain":
        return tiny.experiment(folder, run, **common)
    loss = {"teachers": str(folder / "teachers")} if kind == "distilled" else {}
    optimizer = {"name": "adamw", "clip_norm": 1.0, "rules": (("shared", 0.3), ("task_.*", 0.1)), "warmup_steps": 4}
    return tiny.experiment(folder, run, method="mpt", sampling="mpt", loss=loss, optimizer=optimizer, **common)


def everything(folder, run):
    """All arrays of the run's last checkpoint, as files hold them, and the numbers of its log."""
    import orbax.checkpoint as ocp

    last = max((folder / run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    with ocp.StandardCheckpointer() as reader:
        return {part: reader.restore((last / part).absolute()) for part in ("state", "best")}


def timeless(history):
    return [
        {name: value for name, value in record.items() if name not in ("seconds", "examples_per_second")} for record in history
    ]


@pytest.mark.parametrize("kind", ["plain", "mpt", "distilled"])
def test_stopped_at_a_checkpoint(folder, kind):
    straight = run_training(config_of(folder, kind, f"{kind}_straight"))
    for steps in (4, 8):
        resumed = run_training(config_of(folder, kind, f"{kind}_stopped", steps))
    whole, parts = everything(folder, f"{kind}_straight"), everything(folder, f"{kind}_stopped")
    assert whole["state"]["step"] == 8
    # The stop itself adds a validation at step 4, so what is best may differ; everything else may not.
    jax.tree.map(np.testing.assert_array_equal, whole["state"], parts["state"])
    train = [[r for r in timeless(result.history) if r["kind"] == "train"] for result in (straight, resumed)]
    assert train[0] == train[1]


@pytest.mark.parametrize("kind", ["plain", "distilled"])
def test_killed_between_checkpoints(folder, kind, monkeypatch):
    """A kill after step 5 (4 is on disk): the run goes on from 4 and ends as if nothing had happened, best included."""
    straight = run_training(config_of(folder, kind, f"{kind}_calm"))

    def dying(self, step, *arguments):
        if step == 6:
            raise KeyboardInterrupt
        return save(self, step, *arguments)

    save = Store.save
    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            run_training(config_of(folder, kind, f"{kind}_killed"))
    resumed = run_training(config_of(folder, kind, f"{kind}_killed"))
    whole, parts = everything(folder, f"{kind}_calm"), everything(folder, f"{kind}_killed")
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    jax.tree.map(np.testing.assert_array_equal, straight.params, resumed.params)
    np.testing.assert_array_equal(straight.scores, resumed.scores)
    assert timeless(straight.history) == timeless(resumed.history)


def test_sigkill(folder):
    """A real kill -9 of another process, wherever it happens to be."""
    long = {"eval_period": 0, "checkpoint_period": 20, "log_period": 50}
    straight = run_training(config_of(folder, "plain", "long_straight", 500, **long))
    root = Path(__file__).parent.parent
    script = (
        "import pathlib, test_resume\n"
        f"config = test_resume.config_of(pathlib.Path({str(folder)!r}), 'plain', 'long_killed', 500, **{long!r})\n"
        "test_resume.run_training(config)\n"
    )
    path = os.pathsep.join([str(root), str(root / "tests")])
    child = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.DEVNULL)
    checkpoints = folder / "long_killed" / "checkpoints"
    deadline = time.monotonic() + 240
    while not (checkpoints.is_dir() and any(int(p.name) >= 40 for p in checkpoints.iterdir() if p.name.isdigit())):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (folder / "long_killed" / "finished.json").exists()
    resumed = run_training(config_of(folder, "plain", "long_killed", 500, **long))
    np.testing.assert_array_equal(straight.params["prompt"], resumed.params["prompt"])
    assert timeless(straight.history) == timeless(resumed.history)


def test_without_checkpoints_a_longer_run_begins_again(folder):
    straight = run_training(config_of(folder, "plain", "again_straight", checkpoint_period=0, eval_period=0))
    run_training(config_of(folder, "plain", "again", 3, checkpoint_period=0, eval_period=0))
    longer = run_training(config_of(folder, "plain", "again", checkpoint_period=0, eval_period=0))
    np.testing.assert_array_equal(straight.params["prompt"], longer.params["prompt"])
