"""`plan`: what a job needs of a machine, before the machine is rented.

For a TPU slice, libtpu's own compiler compiles the training step and decoding on any Linux machine
(`jax.experimental.topologies`): its memory figures are those of the real program, and a job that it refuses would be refused
on the pod. For GPUs, whose compiler needs one, memory is the estimate of `memory.py`. Times are the roofline's, and most programs
take two or three times as long.
"""

import collections
import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from mpt_jax import setup
from mpt_jax.collectives import Collective, collectives_of
from mpt_jax.config import Experiment, PartitionConfig
from mpt_jax.costs import Work, work_of
from mpt_jax.errors import UserError
from mpt_jax.hardware import GIB, Slice, find_slice
from mpt_jax.memory import Estimate, Programs, decoded_length, device_bytes, estimate_training, left_out, mesh_over, programs_of
from mpt_jax.models.t5 import count_parameters
from mpt_jax.partitioning import batch_ways, make_mesh
from mpt_jax.quiet import silent_stderr

LIBTPU = "libtpu==0.0.42.*"  # what jax 0.10.2 pins in its extra "tpu"
# libtpu 0.0.42 overflows the stacks of its own threads, and dies, over the step of a model cut in two with remat and dropout.
DEEP_STACKS = "--fibers_default_thread_stack_size=8388608"


class Compiled(NamedTuple):
    """What a TPU's compiler says of one program. Bytes of a device; `over` is how much it lacks where it refused, else 0."""

    temporaries: float
    code: float
    collectives: tuple[Collective, ...]
    seconds: float
    over: float


class Time(NamedTuple):
    """Seconds that a program takes at least, for each thing that could hold it up."""

    compute: float
    memory: float
    link: float
    efficiency: float  # of computing, `Device.efficiency`

    @property
    def least(self) -> float:
        """With all at once, as only a program could that computes while it sends."""
        return max(self.compute, self.memory, self.link)

    @property
    def likely(self) -> float:
        return max(self.compute / self.efficiency, self.memory) + self.link


class Plan(NamedTuple):
    experiment: Experiment
    slice: Slice
    programs: Programs
    estimate: Estimate
    train: Compiled | None  # None for GPUs
    decode: Compiled | None
    train_work: Work
    decode_work: Work


def make_plan(experiment: Experiment, topology: str, *, decoding: bool = True) -> Plan:
    """Compiles (for a TPU) and adds up.

    Args:
        topology: see `hardware.find_slice`.
        decoding: whether decoding is compiled, too, and not only the training step.
    Raises:
        UserError: an unknown topology, no libtpu, a batch that the devices cannot share, a job that fits with no model axis.
    """
    where = find_slice(topology)
    devices = _tpu_devices(where.topology) if where.topology else [jax.devices("cpu")[0]] * where.size
    groups = setup.find_streams(experiment).groups
    programs = programs_of(experiment, groups, mesh_over(experiment, groups, devices, where.device.memory))
    train: Compiled | None = None
    decode: Compiled | None = None
    if where.topology:
        train = _compile(programs.train, programs.train_arguments)
        decode = _compile(programs.decode, programs.decode_arguments) if decoding else None
    return Plan(
        experiment,
        where,
        programs,
        estimate_training(programs, experiment),
        train,
        decode,
        train_work=work_of(programs.train.trace(*programs.train_arguments)),
        decode_work=work_of(programs.decode.trace(*programs.decode_arguments), while_steps=decoded_length(experiment)),
    )


def _tpu_devices(topology: str) -> list[Any]:
    """The devices of a slice that need not exist."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would wait for a metadata server that only Google's VMs have
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two plans may be made at once: neither touches a device
    os.environ.setdefault("LIBTPU_INIT_ARGS", DEEP_STACKS)
    options: dict[str, Any] = {}
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)  # else libtpu takes 2 x 2 chips a host
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # else libtpu takes the two cores of a chip for devices of their own
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"A plan for a TPU asks its compiler, which is not installed: pip install '{LIBTPU}' (130 MB).")
    try:
        with silent_stderr():
            described = topologies.get_topology_desc(topology_name=topology, platform="tpu", **options)
            return list(described.devices)
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--topology={topology} is no slice that libtpu knows ({reason}); give its shape in chips.") from None


def _compile(function: Any, arguments: tuple[Any, ...]) -> Compiled:
    began = time.perf_counter()
    try:
        with silent_stderr():
            compiled = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(0, 0, (), time.perf_counter() - began, _lacking(str(error)))
    stats = compiled.memory_analysis()
    found = tuple(collectives_of(compiled.as_text()))
    seconds = time.perf_counter() - began
    return Compiled(stats.temp_size_in_bytes, stats.generated_code_size_in_bytes, found, seconds, 0)


def _lacking(message: str) -> float:
    """Bytes by which a program is too large, from the compiler's refusal; 1 where it does not say."""
    sizes = [float(number) * 1024 ** ("KMGT".index(unit) + 1) for number, unit in re.findall(r"([\d.]+)([KMGT])\b", message)]
    return max(sizes[0] - sizes[1], 1) if len(sizes) > 1 else 1


def time_of(plan: Plan, work: Work, compiled: Compiled | None) -> Time:
    """Of one run of a program on the plan's devices."""
    return roofline(work, plan.slice, plan.programs.mesh.shape, bytes_sent(compiled) if compiled else 0.0)


def bytes_sent(compiled: Compiled) -> float:
    """Of all collectives of a program, round an endless ring: what each yields passes every link once, of a sum twice."""
    return float(sum(c.times * c.bytes * (2 if c.kind == "all-reduce" else 1) for c in compiled.collectives))


def roofline(work: Work, where: Slice, mesh: Mapping[str, int], sent: float = 0.0) -> Time:
    """Of work that the devices of a mesh of these sizes share; `sent` see `bytes_sent`."""
    device, read = where.device, work.weight_bytes / mesh["model"] + work.other_bytes / where.size
    # Of the devices that hold a model together, or of all where none is shared. Two neighbours have one link, a longer ring goes
    # both ways round.
    ring = mesh["model"] * mesh["fsdp"] if mesh["model"] * mesh["fsdp"] > 1 else where.size
    link = sent * (ring - 1) / ring / (device.link * (1 if ring == 2 else 2))
    return Time(work.flops / where.size / device.flops, read / device.bandwidth, link, device.efficiency)


def peak(plan: Plan) -> float:
    """Bytes of a device during training: the compiler's where it was asked and did not refuse, else the estimate."""
    if plan.train is None:
        return plan.estimate.total
    held = device_bytes(plan.programs.train_arguments)
    return plan.slice.device.memory + plan.train.over if plan.train.over else held + plan.train.temporaries + plan.train.code


def describe(plan: Plan) -> str:
    """The plan as a person reads it."""
    experiment, mesh = plan.experiment, plan.programs.mesh
    architecture, data = experiment.backbone.architecture, experiment.data
    prompt = f" + prompt {experiment.prompt.length}" if plan.programs.prompt_module else ""
    parts = f" in {experiment.train.num_microbatches} microbatches" if experiment.train.num_microbatches > 1 else ""
    trained = sum(leaf.size for leaf in jax.tree.leaves(plan.programs.train_arguments[0].trainable))
    lines = [
        (
            f"Model     {count_parameters(architecture):,} weights in {architecture.param_dtype}, remat '{architecture.remat}'; "
            f"{trained:,} trained"
        ),
        (
            f"Step      {data.batch_size} examples{parts}, inputs {data.lengths['inputs']}{prompt}, "
            f"targets {data.lengths['targets']}"
        ),
        f"Devices   {plan.slice.size} x {plan.slice.device.name}, mesh "
        + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        *(f"Left out  {what}" for what in left_out(experiment)),
        "",
        *_memory_lines(plan),
        "",
        *_time_lines(plan),
    ]
    return "\n".join(lines)


def _memory_lines(plan: Plan) -> list[str]:
    state, frozen, batch = plan.programs.train_arguments
    others = {**frozen, "backbone": {}}
    rows: list[tuple[str, float]] = [
        ("weights", device_bytes(frozen["backbone"])),
        ("trained, its optimiser, teachers, batch", device_bytes((state, others, batch))),
    ]
    if plan.train is None:
        rows += [("kept for the gradient, estimated", plan.estimate.kept)]
        rows += [("of the layer at work, estimated", plan.estimate.working)]
    elif not plan.train.over:
        rows += [("temporaries", plan.train.temporaries), ("program", plan.train.code)]
    limit, total = plan.slice.device.memory, peak(plan)
    if plan.train is not None and plan.train.over:
        verdict = f"does NOT fit: the compiler wants {plan.train.over / GIB:.2f} GiB more"
    else:
        verdict = "fits" if total <= limit else "does NOT fit"
    rows.append((f"in all, of {limit / GIB:.2f}: {verdict}", total))
    lines = ["Memory of a device while training, GiB", *(f"  {size / GIB:8.2f}  {name}" for name, size in rows)]
    if plan.decode is not None:
        lines.append(_decode_line(plan, plan.decode))
    return lines if verdict == "fits" else [*lines, *_advice(plan)]


def _decode_line(plan: Plan, decode: Compiled) -> str:
    examples = plan.programs.decode_arguments[2]["task_ids"].shape[0]
    if decode.over:
        return (
            f"            decoding {examples} examples does NOT fit: {decode.over / GIB:.2f} GiB more; "
            "lower DecodeConfig.batch_size"
        )
    size = device_bytes(plan.programs.decode_arguments) + decode.temporaries + decode.code
    return f"  {size / GIB:8.2f}  in all while decoding {examples} examples: fits"


def _advice(plan: Plan) -> list[str]:
    """Changes with which the estimate fits, the least costly first: microbatches, recomputing, a larger model axis, int8."""
    mesh, heads = plan.programs.mesh, plan.experiment.backbone.architecture.num_heads
    now = PartitionConfig(mesh.shape["model"], mesh.shape["fsdp"])
    remat, dtype = plan.experiment.backbone.architecture.remat, plan.experiment.backbone.architecture.param_dtype
    larger = [n for n in range(now.num_partitions + 1, plan.slice.size + 1) if heads % n == 0]
    tried = [(remat, now, dtype), *([("full", now, dtype)] if remat != "full" else [])]
    tried += [("full", PartitionConfig(partitions, now.fsdp), dtype) for partitions in larger]
    if plan.programs.prompt_module is not None and dtype != "int8":
        tried.append(("full", now, "int8"))
    lines = []
    for option in tried:
        if (found := _fewest_microbatches(plan, *option)) is not None:
            microbatches, needed = found
            changes = {
                f"PartitionConfig.num_partitions={option[1].num_partitions}": option[1] != now,
                f"T5Config.remat='{option[0]}'": option[0] != remat,
                f"T5Config.param_dtype='{option[2]}'": option[2] != dtype,
                f"TrainConfig.num_microbatches={microbatches}": microbatches != plan.experiment.train.num_microbatches,
            }
            lines.append(f"  {needed / GIB:8.2f}  with {' and '.join(text for text, changed in changes.items() if changed)}")
    return (
        ["", "What would fit, estimated", *lines] if lines else ["", "Nothing known here would make it fit; take more devices."]
    )


def _fewest_microbatches(plan: Plan, remat: str, partition: PartitionConfig, dtype: str) -> tuple[int, float] | None:
    """The fewest, and not fewer than the plan's, with which a device's bytes fit by the estimate, and these; None if none do."""
    given = plan.experiment
    if plan.slice.size % (partition.num_partitions * partition.fsdp):
        return None
    mesh = make_mesh(partition, list(plan.programs.mesh.devices.flat))
    architecture = dataclasses.replace(given.backbone.architecture, remat=remat, param_dtype=dtype)
    backbone = dataclasses.replace(given.backbone, architecture=architecture)
    most = given.data.batch_size // batch_ways(mesh)
    if given.data.batch_size % batch_ways(mesh):
        return None
    for microbatches in (n for n in range(given.train.num_microbatches, most + 1) if most % n == 0):
        train = dataclasses.replace(given.train, num_microbatches=microbatches)
        changed = dataclasses.replace(given, backbone=backbone, train=train)
        if changed == given and mesh.shape == plan.programs.mesh.shape:
            continue  # what does not fit
        needed = estimate_training(programs_of(changed, plan.programs.groups, mesh), changed).total
        if needed <= plan.slice.device.memory:
            return microbatches, needed
    return None


def _time_lines(plan: Plan) -> list[str]:
    experiment = plan.experiment
    train, decode = (time_of(plan, *pair) for pair in ((plan.train_work, plan.train), (plan.decode_work, plan.decode)))
    rows = plan.programs.decode_arguments[2]["task_ids"].shape[0]
    steps, speeds = experiment.train.steps, (experiment.data.batch_size / train.likely, rows / decode.likely)
    flops = plan.train_work.flops / 1e12, plan.decode_work.flops / 1e12
    likely = f"ms likely, at {train.efficiency:.0%} of the peak"
    lines = [
        "Time of a step                                training    decoding",
        f"  TFLOP of all devices                       {flops[0]:9.2f}   {flops[1]:9.2f}",
        f"  ms to compute at the peak                  {1e3 * train.compute:9.1f}   {1e3 * decode.compute:9.1f}",
        f"  ms to read weights and activations         {1e3 * train.memory:9.1f}   {1e3 * decode.memory:9.1f}",
        *_link_times(plan, train, decode),
        f"  ms at least                                {1e3 * train.least:9.1f}   {1e3 * decode.least:9.1f}",
        f"  {likely:<41}  {1e3 * train.likely:9.1f}   {1e3 * decode.likely:9.1f}",
        f"  examples/s, likely                         {speeds[0]:9.1f}   {speeds[1]:9.1f}",
        "",
        (
            f"{steps:,} steps take about {_hours(steps * train.likely)}, not less than {_hours(steps * train.least)}; "
            "evaluation comes on top."
        ),
    ]
    for name, compiled in (("training", plan.train), ("decoding", plan.decode)):
        if compiled is not None and not compiled.over:
            lines += ["", f"Communication of a {name} step (compiled in {compiled.seconds:.0f} s)", *_link_lines(compiled)]
    return lines


def _link_times(plan: Plan, train: Time, decode: Time) -> list[str]:
    if plan.train is None and plan.programs.mesh.shape["model"] * plan.programs.mesh.shape["fsdp"] > 1:
        return ["  ms on the links                        not estimated for GPUs: times are without them"]
    return [f"  ms on the links                            {1e3 * train.link:9.1f}   {1e3 * decode.link:9.1f}"]


def _link_lines(compiled: Compiled) -> list[str]:
    sums: collections.Counter[tuple[str, str]] = collections.Counter()
    for collective in compiled.collectives:
        sums[collective.kind, collective.shapes] += collective.times
    sizes = {(c.kind, c.shapes): c.bytes for c in compiled.collectives}
    largest = sorted(sums, key=lambda key: -sums[key] * sizes[key])
    lines = [f"  {sums[key]:6d} x {key[0]:<12} {key[1]}  ({sums[key] * sizes[key] / 2**20:,.1f} MiB)" for key in largest[:6]]
    rest = largest[6:]
    if rest:
        size = sum(sums[key] * sizes[key] for key in rest)
        lines.append(f"  {sum(sums[key] for key in rest):6d} others ({size / 2**20:,.1f} MiB)")
    return lines or ["  none"]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
