"""One process of those that test_hosts.py starts: does the jobs that it is given as JSON, each {"do", "run", …}.

The environment says where the other processes are and how many devices this one has. Prints a line of JSON for each job. It does
them as a command of `python -m mpt_jax`, and so ends as that does.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tiny
from jax.experimental import multihost_utils

from mpt_jax import __main__, cli, distributed, trees
from mpt_jax.checkpoint import leaves
from mpt_jax.checkpoint.backbone import open_checkpoint
from mpt_jax.config import DistributedConfig, Experiment, PartitionConfig
from mpt_jax.errors import UserError
from mpt_jax.evaluate import run_evaluate
from mpt_jax.infer import run_infer
from mpt_jax.models.quantize import quantize_params
from mpt_jax.models.t5 import logical_axes, param_shapes
from mpt_jax.partitioning import batch_shard, make_mesh, tree_sharding
from mpt_jax.train import run_training


def experiment(folder: Path, run: str, partition: dict, **changes: dict) -> Experiment:
    """Labels are ranked, so that a prompt of a few steps has scores."""
    pack, rate = changes.pop("pack", False), changes.pop("rate", 0.3)
    changes["architecture"] = dataclasses.replace(tiny.CONFIG, param_dtype=changes.pop("dtype", "float32"))
    made = tiny.experiment(folder, run, optimizer={"rules": ((".*", rate),)}, **changes)
    made = dataclasses.replace(made, partition=PartitionConfig(**partition))
    return tiny.replace(made, decode={"method": "rank"}, data={"pack_lengths": {"inputs": 60, "targets": 12}} if pack else {})


def train(config: Experiment) -> dict:
    result = run_training(config)
    return {
        "history": [
            {name: value for name, value in record.items() if name not in ("seconds", "examples_per_second")}
            for record in result.history
        ],
        "params": trees.fingerprint(result.params),
        "scores": np.asarray(result.scores).tolist(),
    }


def evaluate(config: Experiment) -> dict:
    return run_evaluate(config)


def infer(config: Experiment) -> dict:
    files = {
        "input_file": str(Path(config.train.model_dir).parent / "in.jsonl"),
        "output_file": f"{config.train.model_dir}/out.jsonl",
    }
    run_infer(tiny.replace(config, infer=files))
    return {}


def load(config: Experiment) -> dict:
    """Of each process: how many of the backbone's weights it read; how many its devices hold, kernels alone, and as they should.

    Reads are counted where the checkpoint's leaves are asked for a part.
    """
    architecture, mesh = config.backbone.architecture, make_mesh(config.partition)
    opened = open_checkpoint(config.backbone.checkpoint, tiny.CONFIG).leaves
    read = {"all": 0}

    def counted(leaf: leaves.Leaf) -> leaves.Leaf:
        def read_part(index: leaves.Index) -> np.ndarray:
            part = leaf.read(index)
            read["all"] += part.size
            return part

        return dataclasses.replace(leaf, read=read_part)

    shapes = param_shapes(architecture)
    shardings = trees.flatten(tree_sharding(shapes, logical_axes(architecture), mesh))
    dtypes = {path: shape.dtype for path, shape in trees.flatten(shapes).items()}
    loaded = leaves.load({path: counted(leaf) for path, leaf in opened.items()}, shardings, dtypes)
    expected = trees.unflatten({path: leaves.to_numpy(leaf, "float32", path) for path, leaf in opened.items()})
    expected = trees.flatten(quantize_params(expected) if architecture.param_dtype == "int8" else expected)
    held = dict.fromkeys(opened, 0)
    right = loaded.arrays.keys() == expected.keys()
    for path, array in loaded.arrays.items():
        parts = {str(shard.index): shard for shard in array.addressable_shards}.values()
        right &= all(np.array_equal(part.data, expected[path][part.index]) for part in parts)
        if path in held:
            held[path] = sum(part.data.size for part in parts)
    kernels = sum(size for path, size in held.items() if path.endswith("/kernel"))
    told = multihost_utils.process_allgather(np.asarray([read["all"], sum(held.values()), kernels, right]))
    names = ("read", "held", "kernels", "right")
    return {"fingerprint": loaded.fingerprint} | dict(zip(names, told.reshape(-1, 4).T.tolist(), strict=True))


def late(config: Experiment) -> dict:
    """Process 1 does not come to a barrier in time, and only then goes on with the others."""
    error = ""
    if jax.process_index() == 1:
        next(distributed._barriers)  # the one that it misses
    else:
        try:
            distributed.barrier("the test's barrier")
        except UserError as caught:
            error = str(caught)
        distributed._client().key_value_set("go on", error)
    return {"error": distributed._client().blocking_key_value_get("go on", 60_000)}


def apart(config: Experiment) -> dict:
    """Process 0 waits for the other one, and both for a signal. It wakes process 1, but not process 0, whose thread is in C++."""
    print("waiting", flush=True)
    if distributed.is_first():
        distributed.barrier("the test's barrier")
    time.sleep(3600)
    return {}


def own_folder(config: Experiment) -> dict:
    """A MODEL_DIR that each process has for itself, as on a pod whose hosts share no disk."""
    distributed.SHARED = 1.0
    folder = Path(config.train.model_dir) / str(jax.process_index())
    folder.mkdir(parents=True)
    distributed.check_shared(folder, "MODEL_DIR")
    return {}


def shards(partitions: list[int]) -> dict:
    """This process's share of a batch on several meshes."""
    found: list = []
    for number in partitions:
        try:
            found.append(batch_shard(make_mesh(PartitionConfig(number))))
        except UserError as error:
            found.append(str(error))
    return {"shards": found}


def send_signal(process: int, at: str, call: int) -> None:
    """That process sends itself SIGTERM when it comes to the function, "MODULE:NAME" of mpt_jax, for the so-manieth time."""
    module, _, path = at.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(f"mpt_jax.{module}"))
    function, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(function)
    def signalled(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    if jax.process_index() == process:
        setattr(owner, name, signalled)


def do_jobs(folder: Path, jobs: list[dict], settings: dict) -> None:
    with distributed.joined(DistributedConfig(**settings)):
        for job in jobs:
            if "signal" in job:
                send_signal(**job.pop("signal"))
            do, run, partition = job.pop("do"), job.pop("run", "none"), job.pop("partition", {})
            result = shards(**job) if do == "shards" else globals()[do](experiment(folder, run, partition, **job))
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    given = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    cli.COMMANDS["jobs"] = cli._Command(lambda arguments: do_jobs(*given), "")
    sys.argv[1:] = ["jobs"]
    __main__.run()
