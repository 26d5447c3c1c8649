"""`bench`: how fast a configuration trains and decodes on the devices that are here, on random weights and tokens.

No checkpoint, no data and no TensorFlow. Every input and target is full, so that the numbers are those of the shapes. MFU counts
the products that the traced program has, those that `remat` repeats left out: 4 for a weight and position in prompt tuning, 6 in
model tuning.
"""

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

import mpt_jax
from mpt_jax import setup
from mpt_jax.config import Experiment
from mpt_jax.costs import work_of
from mpt_jax.files import write_text
from mpt_jax.hardware import device_of
from mpt_jax.memory import Programs, decoded_length, left_out, programs_of
from mpt_jax.partitioning import check_batch_size
from mpt_jax.train_state import create_state

Tree = Any


def run_bench(experiment: Experiment) -> dict[str, Any]:
    """Measures, prints a few lines, writes `BenchConfig.output_file` and returns what is in it.

    Raises:
        UserError: a batch that the devices cannot share; no mesh that fits.
    """
    mesh = setup.mesh_of(experiment)
    check_batch_size(experiment.data.batch_size, mesh, experiment.train.num_microbatches)
    groups = setup.find_streams(experiment).groups
    programs = programs_of(experiment, groups, mesh)
    state, frozen, batch = _arrays(programs, experiment)

    def train(state: Any) -> Any:
        return programs.train(state, frozen, batch)[0]

    asked = {**{name: batch[name] for name in ("encoder_tokens", "task_ids")}, "numbers": batch["task_ids"]}
    rows = len(programs.decode_arguments[2]["task_ids"])
    asked = {name: jnp.resize(array, (rows, *array.shape[1:])) for name, array in asked.items()}
    asked = jax.device_put(asked, jax.tree.map(lambda shape: shape.sharding, programs.decode_arguments[2]))

    bare = dataclasses.replace(experiment.backbone.architecture, remat="none")
    plain = dataclasses.replace(experiment, backbone=dataclasses.replace(experiment.backbone, architecture=bare))
    needed = programs_of(plain, groups, mesh)
    flops = {
        "train": work_of(needed.train.trace(*needed.train_arguments)).flops,
        "decode": work_of(programs.decode.trace(*programs.decode_arguments), decoded_length(experiment)).flops,
    }
    trainable = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state.trainable)  # training gives its state away
    results = {
        "train": _measure(train, state, experiment, experiment.data.batch_size, flops["train"]),
        "decode": _measure(
            lambda _: programs.decode(trainable, frozen["backbone"], asked, np.uint32(0)), None, experiment, rows, flops["decode"]
        ),
    }
    report = {**_circumstances(experiment, programs), **results}
    for what in left_out(experiment):
        print(f"left out: {what}")
    for name in ("train", "decode"):
        print(_line(name, results[name]))
    stats = jax.local_devices()[0].memory_stats() or {}
    report["peak_memory_bytes"] = stats.get("peak_bytes_in_use")
    if report["peak_memory_bytes"]:
        print(f"peak memory of a device: {report['peak_memory_bytes'] / 2**30:.2f} GiB")
    if experiment.bench.output_file:
        write_text(Path(experiment.bench.output_file), json.dumps(report, indent=1) + "\n")
    return report


def _measure(
    run: Callable[[Any], Any], state: Any, experiment: Experiment, examples: int, flops: float
) -> dict[str, float | None]:
    """Seconds of single steps, and of steps that follow one another without waiting."""
    steps = experiment.bench.steps
    began = time.perf_counter()
    out = jax.block_until_ready(run(state))
    first = time.perf_counter() - began
    for _ in range(experiment.bench.warmup_steps - 1):
        out = jax.block_until_ready(run(out))
    single = []
    for _ in range(steps):
        began = time.perf_counter()
        out = jax.block_until_ready(run(out))
        single.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(steps):
        out = run(out)
    jax.block_until_ready(out)
    each = (time.perf_counter() - began) / steps
    device = device_of(jax.devices()[0].device_kind)
    return {
        "examples_per_second": examples / each,
        "step_seconds": each,
        **{f"step_seconds_p{p}": float(np.percentile(single, p)) for p in (10, 50, 90)},
        "first_step_seconds": first,
        "flops": flops,
        "mfu": flops / each / device.flops / jax.device_count() if device else None,
    }


def _arrays(programs: Programs, experiment: Experiment) -> tuple[Any, Tree, dict[str, jax.Array]]:
    """Random state, frozen tree and batch, in their places."""
    shapes, frozen, batch = programs.train_arguments
    key = jax.random.key(experiment.train.seed)
    weights = _random(frozen, key)
    trainable = _random(shapes.trainable, key)
    recipe = (experiment.optimizer, experiment.train.steps, programs.groups)
    state = create_state(trainable, programs.model, *recipe, experiment.train.seed, programs.mesh)
    rng = np.random.default_rng(experiment.train.seed)
    highest = {"task_ids": len(programs.groups), "loss_weights": 1}
    made = {}
    for name, shape in batch.items():
        top = highest.get(name, experiment.backbone.architecture.vocab_size)
        values = rng.integers(2, top, shape.shape) if top > 2 else np.ones(shape.shape) * (name == "loss_weights")
        made[name] = jax.device_put(values.astype(shape.dtype), shape.sharding)
    return state, weights, made


def _random(shapes: Tree, key: jax.Array) -> Tree:
    def leaf(shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        def draw(key: jax.Array) -> jax.Array:
            if shape.dtype == jnp.int8:
                return jax.random.randint(key, shape.shape, -127, 128, jnp.int8)
            return 0.05 * jax.random.normal(key, shape.shape, shape.dtype)

        return jax.jit(draw, out_shardings=shape.sharding)(key)

    leaves, structure = jax.tree.flatten(shapes)
    drawn = [leaf(shape, jax.random.fold_in(key, n)) for n, shape in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn)


def _circumstances(experiment: Experiment, programs: Programs) -> dict[str, Any]:
    data, prompt = experiment.data, experiment.prompt
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "mesh": dict(programs.mesh.shape),
        "architecture": dataclasses.asdict(experiment.backbone.architecture),
        "method": prompt.method,
        "prompt_length": prompt.length if programs.prompt_module else 0,
        "batch_size": data.batch_size,
        "num_microbatches": experiment.train.num_microbatches,
        "decode_batch_size": len(programs.decode_arguments[2]["task_ids"]),
        "lengths": data.lengths,
        "versions": {
            "mpt_jax": mpt_jax.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "python": platform.python_version(),
        },
        "timed_steps": experiment.bench.steps,
    }


def _line(name: str, result: dict[str, Any]) -> str:
    times = [1e3 * result[key] for key in ("step_seconds", "step_seconds_p50", "step_seconds_p10", "step_seconds_p90")]
    mfu = f" ({result['mfu']:.1%} of the peak)" if result["mfu"] is not None else ""
    rate = result["flops"] / result["step_seconds"] / 1e12
    return (
        f"{name}: {result['examples_per_second']:.1f} examples/s, {rate:.3f} TFLOP/s{mfu}; "
        f"a step {times[0]:.1f} ms, waited for {times[1]:.1f} ({times[2]:.1f} to {times[3]:.1f}, the middle 80 %), "
        f"the first {result['first_step_seconds']:.1f} s"
    )
