"""Jobs of several processes, as on the hosts of a TPU pod: here 2 to 4 of them on one machine's CPU, over its loopback.

Their devices are simulated, and the sums over them travel by gloo. What the processes do is in host.py.
"""

import json
import os
import signal
import time

import numpy as np
import pytest
import tiny
from hosts import LIMIT, TASKS, assert_alike, finish, launch, lines, losses, results, scoring, start, training, write_rows
from safetensors.numpy import load_file

from mpt_jax import distributed
from mpt_jax.config import DistributedConfig, Experiment
from mpt_jax.errors import UserError
from mpt_jax.gin_bindings import parse
from mpt_jax.gin_text import config_text
from mpt_jax.prompts.files import load_prompts

MODEL = {"method": "none", "partition": {"num_partitions": 4}, "rate": 0.01, "train": {"checkpoint_period": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.make(tmp_path_factory.mktemp("hosts"))
    write_rows(folder / "in.jsonl")
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """Two processes with two devices each; the first one builds the token caches, and the other waits for them."""
    jobs = [training("begun_by_two", 4), training("model_two", 4, **MODEL)]
    return results(2, folder, jobs, devices=2)


@pytest.fixture(scope="module")
def alone(folder, two):
    """One process with four devices does the same, and goes on with what two began."""
    jobs = [training("one"), training("begun_by_two"), training("begun_by_one", 4), training("model_one", 4, **MODEL)]
    jobs += [scoring("evaluate", "one"), scoring("infer", "one")]
    found = results(1, folder, [*jobs, training("damaged", 4, train={"eval_period": 4, "checkpoint_period": 2})], devices=4)
    newest = max((folder / "damaged" / "checkpoints" / "4").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return found


@pytest.fixture(scope="module")
def four(folder, alone):
    """Four processes with one device each, and they go on with what one began."""
    jobs = [training("four"), training("begun_by_one"), scoring("evaluate", "four"), scoring("infer", "four")]
    parts = training("parts", train={"eval_period": 4, "checkpoint_period": 4, "num_microbatches": 2})
    return results(4, folder, [*jobs, training("damaged"), parts])


def test_four_processes_train_as_one_does(folder, alone, four):
    """And in the end all four hold the same bits, which `results` has compared."""
    assert_alike(four[0], alone[0])
    ours, theirs = (load_prompts(folder / run)[0]["prompt"] for run in ("four", "one"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert [record["step"] for record in lines(folder / "four" / "metrics.jsonl")] == [4, 4, 8, 8], "each line is written once"
    assert (folder / "four" / "finished.json").exists()
    assert not list((folder / "four").glob(".*")), "something temporary is left"


def test_four_processes_score_and_answer_as_one_does(folder, alone, four):
    assert four[2]["tasks"] == alone[4]["tasks"]
    assert json.loads((folder / "four" / "evaluation_validation.json").read_text()) == four[2]
    answers = [lines(folder / run / "out.jsonl") for run in ("four", "one")]
    for mine, other in zip(*answers, strict=True):
        assert mine["prediction"] == other["prediction"]
        np.testing.assert_allclose(mine["score"], other["score"], rtol=1e-4)


def test_checkpoints_go_from_two_processes_to_one_and_from_one_to_four(two, alone, four):
    assert losses(two[0]) == pytest.approx(losses(alone[0])[:1], abs=2e-6)
    assert_alike(alone[1], alone[0])
    assert_alike(four[1], alone[0])


def test_all_processes_leave_a_damaged_checkpoint_for_the_one_before(folder, alone, four):
    assert (folder / "damaged" / "damaged" / "4").is_dir()
    assert_alike(four[4], alone[0])


def test_microbatches_of_four_processes_make_the_step_of_one(alone, four):
    assert_alike(four[5], alone[0])


def test_a_model_is_tuned_across_processes(folder, two, alone):
    """Each has a part of it and of the optimiser's state; process 0 writes the whole, gathered."""
    assert losses(two[1]) == pytest.approx(losses(alone[3]), abs=2e-6)
    ours, theirs = (load_file(folder / run / "model" / "model.safetensors") for run in ("model_two", "model_one"))
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_request_to_stop_one_process_stops_all_at_one_step(folder, two):
    """Soon, however seldom they log, and with the signal's exit code. The checkpoint is that of a step which all have taken."""
    settings = {"eval_period": 0, "checkpoint_period": 200, "log_period": 10**6}
    config = tiny.experiment(folder, "stopped", tasks=TASKS, steps=10**6, train=settings)
    path = folder / "stopped.gin"
    path.write_text(config_text(config), encoding="utf-8")
    processes = launch(2, ["-m", "mpt_jax", "train", f"--gin_file={path}"])
    checkpoints = folder / "stopped" / "checkpoints"
    until = time.monotonic() + LIMIT
    while not (checkpoints / "200").exists() and time.monotonic() < until:
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    ended = finish(processes)
    assert time.monotonic() - began < 30
    assert [code for code, _, _ in ended] == [143, 143], ended
    newest = max(int(checkpoint.name) for checkpoint in checkpoints.iterdir())
    assert f"stopped at step {newest}; the same command continues from here" in ended[0][2]


def stopped(folder, run, at, call=1, steps=4, **more):
    """What two processes left that train, of which process 1 gets SIGTERM at the function, and the second one's messages."""
    job = training(run, steps, **more) | {"signal": {"process": 1, "at": at, "call": call}}
    return finish(start(2, folder, [job]))


def test_a_signal_while_they_compile_stops_all_without_a_step(folder, two):
    ended = stopped(folder, "compiling", "train:_Run._compile")
    assert [code for code, _, _ in ended] == [143, 143], ended
    assert "stopped at step 0;" in ended[0][2]


def test_a_signal_while_they_validate_stops_all_between_two_batches(folder, two, alone):
    """The step before it is saved, and the validation is done when the run resumes."""
    ended = stopped(folder, "validating", "predict:place_batch", 2, 8)
    assert [code for code, _, _ in ended] == [143, 143], ended
    assert [record["kind"] for record in lines(folder / "validating" / "metrics.jsonl")] == ["train"]
    assert [path.name for path in (folder / "validating" / "checkpoints").iterdir()] == ["4"]
    assert_alike(results(1, folder, [training("validating")], devices=2)[0], alone[0])


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_signal_after_the_last_step_leaves_all_stopped_or_all_done(folder, two, checkpoints):
    """Stopped where the result can be written again, and done where it would be lost."""
    run = f"ending_{checkpoints}"
    train = {"eval_period": 0, "checkpoint_period": 4 if checkpoints else 0}
    ended = stopped(folder, run, "train:_Run.finish", train=train)
    assert [code for code, _, _ in ended] == ([143, 143] if checkpoints else [0, 0]), ended
    assert (folder / run / "finished.json").exists() or checkpoints


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_process_ends_all_alike(tmp_path, signalled):
    """Within seconds, where they have not agreed on it, and each with the signal's exit code; none is aborted."""
    processes = start(2, tmp_path, [{"do": "apart"}])
    assert [process.stdout.readline() for process in processes] == ["waiting\n"] * 2
    processes[signalled].send_signal(signal.SIGTERM)
    began = time.monotonic()
    ended = finish(processes)
    assert time.monotonic() - began < 20
    assert [code for code, _, _ in ended] == [143, 143], ended
    assert "Interrupted. To go on from the last checkpoint: python -m mpt_jax jobs" in ended[signalled][2]
    assert f"\nprocess {signalled} of 2 was stopped (SIGTERM), and this one with it\n" in ended[1 - signalled][2]
    assert "terminate" not in ended[0][2] + ended[1][2]


def test_processes_that_do_not_come_are_named(tmp_path):
    """By the one that knows; the other says where to look. Both within the time that was given."""
    began = time.monotonic()
    first, third = finish(start(4, tmp_path, [], which=(0, 2), initialization_timeout=12))
    assert time.monotonic() - began < 60
    assert first[0] == third[0] == 2
    assert "error: Processes 1 and 3 of 4 did not come to 127.0.0.1:" in first[2]
    assert "within 12 s (DistributedConfig.initialization_timeout)" in first[2]
    assert "error: Process 2 of 4 was not taken up at 127.0.0.1:" in third[2]
    assert "Traceback" not in first[2] + third[2]


def test_an_error_in_one_process_ends_all(tmp_path):
    """Within seconds, though the other is in an exchange with it; and it says whose error it was.

    Before that they find their shares of several meshes, and one is late at a barrier.
    """
    began = time.monotonic()
    jobs = [{"do": "shards", "partitions": [1, 3, 6, 2]}, {"do": "late"}, {"do": "own_folder"}]
    ended = finish(start(2, tmp_path, jobs, devices=3, barrier_timeout=5))
    assert time.monotonic() - began < 60
    assert [code for code, _, _ in ended] == [2, 2], ended
    for index, (_, out, err) in enumerate(ended):
        found, late = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
        *shares, refused = found["shards"]
        assert shares == [[index, 2], [index, 2], [0, 1]]
        assert "num_partitions is 2, with which processes of 3 devices cannot hold equal parts of a batch" in refused
        assert "Process 1 of 2 did not come within 5 s (DistributedConfig.barrier_timeout)" in late["error"]
        assert "to where the others are: the test's barrier" in late["error"]
        assert "Traceback" not in err
    why = "of process 1 is not that of process 0; give a folder that all processes share"
    assert f"error: MODEL_DIR {tmp_path / 'none' / '1'} {why}" in ended[1][2]
    assert "error: process 1 of 2 has ended, and this one with it: MODEL_DIR" in ended[0][2]


@pytest.fixture
def nowhere(monkeypatch):
    """An environment that says nothing of other processes."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_NUM", "JAX_PROCESS", "KUBERNETES", "JOB_", "TPU_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_a_process_alone_joins_nothing(nowhere):
    assert distributed.find_place(DistributedConfig()) is None
    assert not distributed.initialize(DistributedConfig())
    nowhere.setenv("JAX_NUM_PROCESSES", "4")
    assert distributed.find_place(DistributedConfig(num_processes=1)) is None


def test_a_pod_of_its_own_is_alone(nowhere):
    """Without a warning about the package that JAX would ask Kubernetes with, which would be an error here."""
    nowhere.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert distributed.find_place(DistributedConfig()) is None


def test_one_gin_file_serves_all_processes(nowhere):
    """The configuration comes first, then the environment."""
    nowhere.setenv("JAX_PROCESS_ID", "2")
    nowhere.setenv("JAX_NUM_PROCESSES", "9")
    config = DistributedConfig("10.0.0.1:8476", num_processes=4)
    assert distributed.find_place(config) == distributed.Place("10.0.0.1:8476", 4, 2, None)
    with pytest.raises(UserError, match="bench runs in one process, but this is process 2 of 4"):
        distributed.refuse(config, "bench")


def test_slurm_tells_all(nowhere):
    """As in a step of two nodes with four tasks each; every task takes the device of its number on the node."""
    tells = {"JOB_ID": "5000", "STEP_NODELIST": "node[007-008]", "NTASKS": "8", "PROCID": "6", "LOCALID": "2"}
    for name, value in tells.items():
        nowhere.setenv(f"SLURM_{name}", value)
    assert distributed.find_place(DistributedConfig()) == distributed.Place(f"node007:{5000 % 4096 + 61440}", 8, 6, [2])


@pytest.mark.parametrize(
    "config, environment, expected",
    [
        ({"num_processes": 2}, {}, r"num_processes 2, but no .*coordinator_address \(JAX_COORDINATOR_ADDRESS\) and .*process_id"),
        ({}, {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID is 'x', which is no number"),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
            {},
            "process_id is 2, but 2 processes are numbered",
        ),
        ({"coordinator_address": "a", "num_processes": 2, "process_id": 0}, {}, "'a', without a port; write HOST:PORT"),
    ],
)
def test_half_a_description_is_refused(nowhere, config, environment, expected):
    for name, value in environment.items():
        nowhere.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        distributed.find_place(DistributedConfig(**config))


def test_config_gin_keeps_no_place(tmp_path):
    """Else `evaluate` with the config.gin of a job of four would wait for three others."""
    flags = ["MODEL_DIR=x", "MIXTURE_OR_TASK_NAME=sketch_sentiment", "TRAIN_STEPS=1", "DistributedConfig.num_processes=4"]
    parsed = parse(["gin/backbones/mini.gin", "gin/methods/prompt_tuning.gin"], flags)
    assert parsed.experiment().distributed.num_processes == 4
    kept = tmp_path / "config.gin"
    kept.write_text(parsed.config_gin(Experiment))
    assert "DistributedConfig" not in kept.read_text()
    assert parse([str(kept)]).experiment().distributed == DistributedConfig()
