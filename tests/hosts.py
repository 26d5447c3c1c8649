"""Starts the processes of a job on one machine's CPU, over its loopback, and collects what they say; see host.py."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import tiny

ROOT = Path(__file__).parent.parent
TASKS = list(tiny.TASKS[:2])
NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LIMIT = 400  # seconds for any of the runs here, most of which the compiler takes: on two cores with nothing else to do, 30


def start(count, folder, jobs, *, devices=1, which=None, **settings):
    """The processes `which` of `count`, each with so many devices, at the jobs."""
    arguments = [str(ROOT / "tests" / "host.py"), str(folder), json.dumps(jobs), json.dumps(settings)]
    return launch(count, arguments, devices=devices, which=which)


def launch(count, arguments, *, devices=1, which=None):
    """As `start`, with these arguments of Python."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    places = {n: dict(zip(NAMES, (f"127.0.0.1:{port}", str(count), str(n)), strict=True)) for n in which or range(count)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([sys.executable, *arguments], env=env | place, **pipes) for place in places.values()]


def finish(processes):
    """(exit code, standard output, standard error) of each."""
    try:
        outputs = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def results(count, folder, jobs, **how):
    """What each job returned, known to be the same in all processes."""
    found = []
    for code, out, err in finish(start(count, folder, jobs, **how)):
        assert code == 0, err[-3000:]
        found.append([json.loads(line) for line in out.splitlines() if line.startswith("{")])
    assert all(one == found[0] for one in found), "the processes do not agree"
    assert len(found[0]) == len(jobs)
    return found[0]


def training(run, steps=8, **more):
    train = {"eval_period": 4, "checkpoint_period": 4}
    return {"do": "train", "run": run, "tasks": TASKS, "steps": steps, "train": train, **more}


def scoring(do, run, **more):
    return {"do": do, "run": run, "tasks": TASKS, **more}


def write_rows(path):
    """Nine rows for `infer`."""
    rows = [{"task": TASKS[n % 2], "inputs": f"the {animal} is {colour}"} for n, (animal, colour) in enumerate(
        (animal, colour) for animal in ("cat", "dog", "bird") for colour in ("red", "blue", "green"))]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(result):
    return [record["loss"] for record in result["history"] if record["kind"] == "train"]


def scores(result):
    return [record["scores"] for record in result["history"] if record["kind"] == "validation"]


def assert_alike(ours, theirs):
    """To the digits of the log, 1e-6: gloo's sums may differ in the last bit, as those of another mesh do."""
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=0, atol=2e-6)
    assert scores(ours) == scores(theirs)
    assert max(np.ravel(scores(ours))) > 0
