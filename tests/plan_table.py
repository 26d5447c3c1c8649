"""`make plan-table`: what `plan` says of the sizes of T5 1.1 on common TPU slices and GPUs, as the tables of docs/plan.md.

Each cell takes a minute or two on two cores and is kept in docs/plan.json as soon as it is there: stop whenever you like, the
next call goes on. A cell whose step has other products of matrices by now is computed again; delete one for any other reason.
The tables between the marks in docs/plan.md are written anew at each call; the words around them are not touched.
"""

import dataclasses
import itertools
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path

import jax

from mpt_jax import plan
from mpt_jax.config import PartitionConfig, StreamConfig
from mpt_jax.costs import Work, work_of
from mpt_jax.hardware import find_slice
from mpt_jax.memory import estimate_training, programs_of
from mpt_jax.partitioning import make_mesh

DOCS = Path(__file__).parent.parent / "docs"
CELLS, PAGE = DOCS / "plan.json", DOCS / "plan.md"
SIZES = ("small", "base", "large", "xl", "xxl")
SLICES = {  # as Google calls them, and as --topology does
    "v3-8": "v3:2x2",
    "v4-8": "v4:2x2x1",
    "v5e-1": "v5e:1x1",
    "v5e-4": "v5e:2x2",
    "v5e-8": "v5e:2x4",
    "v5p-8": "v5p:2x2x1",
    "v6e-8": "v6e:2x4",
}
GPUS = {"A100 80 GB": "a100", "H100 80 GB": "h100", "H200 141 GB": "h200"}
AXES = (2, 4, 8)  # of XXL on a v5e-8
INT8_PLACES = (*GPUS, "v5e-1", "v5e-4", "v5e-8", "v3-8")  # of XXL, where memory is short
BINDINGS = {
    "MIXTURE_OR_TASK_NAME": "sketch_sentiment",  # any task: nothing of it is read
    "MODEL_DIR": "none",
    "INITIAL_CHECKPOINT_PATH": "none",
    "TRAIN_STEPS": "30_000",
    "BATCH_SIZE": "32",
    "PROMPT_LENGTH": "100",
    "TASK_FEATURE_LENGTHS": '{"inputs": 256, "targets": 16}',
    "T5Config.dtype": "bfloat16",
}
START, END = "<!-- tables: make plan-table -->", "<!-- end of tables -->"


def names():
    """(size, weights, place, model axis or 0 = the smallest that fits), the cells that people ask for first."""
    places = [*GPUS, "v5e-8", "v5e-1", *(name for name in SLICES if name not in ("v5e-8", "v5e-1"))]
    plain = [(size, "bfloat16", place, 0) for place in places for size in reversed(SIZES)]
    small = [("xxl", "int8", place, 0) for place in INT8_PLACES]
    axes = [("xxl", "bfloat16", "v5e-8", axis) for axis in AXES]
    ahead = len(GPUS) * len(SIZES)  # these take seconds
    return [*plain[:ahead], *small, *axes, *plain[ahead:]]


def job(size, weights):
    """What is planned."""
    from mpt_jax.gin_bindings import parse

    bindings = BINDINGS | {"T5Config.param_dtype": weights}
    files = [f"gin/backbones/t5_1_1_{size}.gin", "gin/methods/prompt_tuning.gin"]
    given = parse(files, [f"{name}={value}" for name, value in bindings.items()]).experiment()
    return dataclasses.replace(given, data=dataclasses.replace(given.data, streams=(StreamConfig("any"),)))


def laid_out(given, parts, partitions):
    """The job in so many microbatches, with a model over so many devices."""
    train = dataclasses.replace(given.train, num_microbatches=parts)
    return dataclasses.replace(given, train=train, partition=PartitionConfig(partitions))


def programs_on(experiment, devices):
    return programs_of(experiment, (0,), make_mesh(experiment.partition, [jax.devices("cpu")[0]] * devices))


def step_work(cell):
    """The products of matrices that the step of a cell has as the code is now."""
    size, weights, place, _ = cell["name"]
    experiment = laid_out(job(size, weights), cell["microbatches"], cell["mesh"]["model"])
    programs = programs_on(experiment, find_slice((SLICES | GPUS)[place]).size)
    return work_of(programs.train.trace(*programs.train_arguments))


def compute(size, weights, place, axis):
    """A cell: with the smallest model axis that fits, in microbatches only where none does; or why there is none."""
    topology, given = (SLICES | GPUS)[place], job(size, weights)
    where, least, crashed = find_slice(topology), math.inf, []
    axes = [axis] if axis else [n for n in (1, 2, 4, 8) if where.size % n == 0]
    for parts, partitions in itertools.product((1, 2, 4, 8, 16, 32), axes):
        ways, heads = where.size // partitions, given.backbone.architecture.num_heads
        if heads % partitions or given.data.batch_size % (ways * parts):
            continue
        changed = laid_out(given, parts, partitions)
        needed = estimate_training(programs_on(changed, where.size), changed).total
        if needed <= where.device.memory:
            try:  # in a process of its own: libtpu's compiler may take it down
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    cell = pool.submit(planned, changed, topology).result()
            except BrokenProcessPool:
                crashed.append(f"model {partitions}" + (f" in {parts} microbatches" if parts > 1 else ""))
                continue
            needed = cell["arguments"] + cell["temporaries"]
            if needed <= where.device.memory:
                return cell | {"crashed": crashed}
        least = min(least, needed)
    if math.isinf(least):
        return {"why": f"not known: libtpu crashes with {', '.join(crashed)}"}
    return {"why": f"does not fit: needs {least / 2**30:.1f} GiB at least, of {where.device.memory / 2**30:.2f}"}


def planned(experiment, topology):
    """What a cell has of a plan."""
    made = plan.make_plan(experiment, topology, decoding=False)
    arguments = plan.device_bytes(made.programs.train_arguments)
    return {
        "mesh": dict(made.programs.mesh.shape),
        "microbatches": experiment.train.num_microbatches,
        "remat": experiment.backbone.architecture.remat,
        "arguments": arguments,
        "temporaries": plan.peak(made) - arguments,  # with the program itself
        "estimate": made.estimate.total,
        "memory": made.slice.device.memory,
        "compiled": made.train is not None,
        "work": made.train_work._asdict(),
        "sent": plan.bytes_sent(made.train) if made.train else 0.0,
        "examples": experiment.data.batch_size,
        "steps": experiment.train.steps,
    }


def line(first, cell):
    """A row of a table."""
    if "why" in cell:
        return f"| {first} | {cell['why']} | | | | | | |"
    mesh = " × ".join(f"{axis} {size}" for axis, size in cell["mesh"].items() if size > 1) or "1 device"
    if cell["microbatches"] > 1:
        mesh += f", {cell['microbatches']} microbatches"
    if cell["crashed"]:
        mesh += f" (libtpu crashes with {', '.join(cell['crashed'])})"
    total = cell["arguments"] + cell["temporaries"]
    gib = [f"{value / 2**30:.2f}" for value in (cell["arguments"], cell["temporaries"], total)]
    time = plan.roofline(Work(**cell["work"]), find_slice((SLICES | GPUS)[cell["name"][2]]), cell["mesh"], cell["sent"])
    step = " – ".join(f"{1e3 * seconds:.{seconds < 0.01:d}f}" for seconds in (time.least, time.likely))
    hours = cell["steps"] * time.likely / 3600
    columns = [
        first if cell["compiled"] else f"{first}, estimated",
        mesh,
        *gib[:2],
        f"{gib[2]} of {cell['memory'] / 2**30:.2f}",
        step,
        f"{cell['examples'] / time.likely:.0f}",
        f"{hours:.{1 if hours >= 1 else 2}f}",
    ]
    return f"| {' | '.join(columns)} |"


def table(first, rows):
    heads = [first, "mesh", "weights, state", "temporaries", "in all, GiB", "step, ms", "examples/s", "hours"]
    return "\n".join([f"| {' | '.join(heads)} |", "|---|---|---:|---:|---:|---:|---:|---:|", *rows])


def tables(cells):
    """The part of the page between the marks, of the cells that are there."""
    found = {tuple(cell["name"]): cell for cell in cells["cells"]}
    parts = []
    for size, weights in [*((size, "bfloat16") for size in SIZES), ("xxl", "int8")]:
        own = {place: found.get((size, weights, place, 0)) for place in (*SLICES, *GPUS)}
        title = f"### {size.upper() if size.startswith('x') else size}, weights in {weights}"
        parts += [title, table("on", [line(place, cell) for place, cell in own.items() if cell])]
    axes = {axis: found.get(("xxl", "bfloat16", "v5e-8", axis)) for axis in AXES}
    rows = [line(f"model {axis}", cell) for axis, cell in axes.items() if cell]
    parts += ["### XXL on a v5e-8 by the model axis, weights in bfloat16", table("axis", rows)]
    versions = {" and ".join(f"{name} {version}" for name, version in cell["versions"].items()) for cell in cells["cells"]}
    missing = len(set(names()) - found.keys())
    parts += [f"{missing} more are not computed yet: `make plan-table` does it."] if missing else []
    return "\n\n".join([*parts, f"Computed with {' or '.join(sorted(versions))}."])


def page(text, cells):
    """docs/plan.md with its tables."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{tables(cells)}\n\n{END}{rest.split(END)[1]}"


def main():
    cells = json.loads(CELLS.read_text()) if CELLS.exists() else {"cells": []}
    cells["cells"] = [cell for cell in cells["cells"] if "why" in cell or step_work(cell).flops == cell["work"]["flops"]]
    for name in names():
        if any(cell["name"] == list(name) for cell in cells["cells"]):
            continue
        try:
            cell = {"name": list(name), **compute(*name)}
        except jax.errors.JaxRuntimeError as error:
            cell = {"name": list(name), "why": f"the compiler failed: {' '.join(str(error).split())[:200]}"}
        cell |= {"versions": {library: metadata.version(library) for library in ("jax", "libtpu")}}
        cells["cells"].append(cell)
        CELLS.write_text(json.dumps(cells, indent=1) + "\n")
        print(line(" ".join(map(str, name)), cell), flush=True)
    PAGE.write_text(page(PAGE.read_text(), cells))


if __name__ == "__main__":
    main()
