"""Planning for devices that are not here: shapes of slices, memory, communication, and what a person reads."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import plan_table
import pytest
import tiny

from mpt_jax import memory, plan
from mpt_jax.collectives import collectives_of
from mpt_jax.config import PartitionConfig, StreamConfig
from mpt_jax.errors import UserError
from mpt_jax.hardware import GIB, find_slice
from mpt_jax.partitioning import make_mesh

ROOT = Path(__file__).parent.parent
STREAMS = (StreamConfig("tiny_colour"),)


@pytest.fixture
def experiment(tmp_path):
    return tiny.experiment(tmp_path, "run", streams=STREAMS)


def wide(experiment, **changes):
    """The experiment with a T5 of 16 heads, so that it can be cut."""
    architecture = dataclasses.replace(tiny.CONFIG, num_heads=16, **changes)
    return dataclasses.replace(experiment, backbone=dataclasses.replace(experiment.backbone, architecture=architecture))


@pytest.mark.parametrize("name, size, topology", [("v5e:2x4", 8, "v5e:2x4"), ("V4:2x2x4", 16, "v4:2x2x4"), ("h100", 1, "")])
def test_a_topology_names_its_devices(name, size, topology):
    found = find_slice(name)
    assert (found.size, found.topology) == (size, topology)


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5x:2x4", r"--topology=v5x:2x4 names no device that is known here. Did you mean v5"),
        ("v5e:8", r"--topology=v5e:8 is no shape of v5e; write it like v5e:2x4"),
        ("h100:2x4", r"write it like h100:8"),
        ("v5e:0x4", r"is no shape of v5e"),
    ],
)
def test_a_wrong_topology_is_one_sentence(name, message):
    with pytest.raises(UserError, match=message):
        find_slice(name)


def test_a_plan_for_gpus_asks_no_compiler(experiment):
    made = plan.make_plan(wide(experiment), "h100:2")
    assert made.train is None and made.slice.size == 2
    text = plan.describe(made)
    assert "in all, of 67.06: fits" in text and "2 x H100" in text
    assert plan.peak(made) == made.estimate.total > 0


def test_a_models_gradient_is_counted(experiment):
    """Model tuning needs its weights' gradient beside them."""
    tuned = tiny.replace(wide(experiment), prompt={"method": "none"})
    estimate = plan.make_plan(tuned, "h100").estimate
    trained = sum(leaf.size * 4 for leaf in jax.tree.leaves(memory.param_shapes(tuned.backbone.architecture)))
    assert estimate.working >= trained and estimate.state >= trained


def test_links_of_gpus_are_not_said_to_cost_nothing(experiment):
    text = plan.describe(plan.make_plan(tiny.replace(wide(experiment), partition={"num_partitions": 4}), "h100:4"))
    assert "not estimated for GPUs" in text and "on the links                            0" not in text


def test_what_does_not_fit_is_told_with_what_would(experiment, monkeypatch):
    small = find_slice("h100:4")
    monkeypatch.setattr(plan, "find_slice", lambda _: small._replace(device=small.device._replace(memory=small_memory)))
    big = tiny.replace(wide(experiment, d_ff=4096), data={"batch_size": 64})
    devices = [jax.devices()[0]] * 4
    estimates = [
        memory.estimate_training(memory.programs_of(big, (0,), make_mesh(PartitionConfig(n), devices)), big).total for n in (1, 4)
    ]
    small_memory = (estimates[0] + estimates[1]) / 2
    text = plan.describe(plan.make_plan(big, "h100:4"))
    assert "does NOT fit" in text and "num_partitions=4" in text and "remat='full'" in text


def test_microbatches_are_told_where_activations_do_not_fit(experiment, monkeypatch):
    """The fewest that fit, before anything that costs more; and with them the job fits."""
    big = tiny.replace(wide(experiment, d_ff=4096), data={"batch_size": 64})
    found = find_slice("h100")

    def needs(parts):
        changed = tiny.replace(big, train={"num_microbatches": parts})
        mesh = make_mesh(PartitionConfig(1), [jax.devices()[0]])
        return memory.estimate_training(memory.programs_of(changed, (0,), mesh), changed)

    whole, quarter = needs(1), needs(4)
    assert quarter.kept == pytest.approx(whole.kept / 4, rel=0.01)
    assert quarter.weights == whole.weights and quarter.total < needs(2).total < whole.total
    limit = found._replace(device=found.device._replace(memory=quarter.total))
    monkeypatch.setattr(plan, "find_slice", lambda _: limit)
    text = plan.describe(plan.make_plan(big, "h100"))
    assert text.index("with TrainConfig.num_microbatches=4\n") < text.index("with T5Config.remat='full'")
    fitting = plan.describe(plan.make_plan(tiny.replace(big, train={"num_microbatches": 4}), "h100"))
    assert ": fits" in fitting and "64 examples in 4 microbatches, inputs 24" in fitting
    with pytest.raises(UserError, match="cannot be cut into TrainConfig.num_microbatches=3 equal parts"):
        plan.make_plan(tiny.replace(big, train={"num_microbatches": 3}), "h100")


def test_the_fewest_partitions_that_fit_are_chosen(experiment):
    big, devices = wide(experiment, d_ff=4096), [jax.devices()[0]] * 8
    needs = {}
    for n in (1, 2, 4, 8):
        programs = memory.programs_of(big, (0,), make_mesh(PartitionConfig(n), devices))
        needs[n] = memory.estimate_training(programs, big).total
    assert needs[1] > needs[2] > needs[4] > needs[8]
    for n in (1, 2, 4):
        enough = needs[n] / (1 - memory.HEADROOM)
        assert memory.choose_partitions(big, (0,), devices, enough * 1.001) == n
        assert memory.choose_partitions(big, (0,), devices, enough * 0.999) == 2 * n
    with pytest.raises(UserError, match=r"num_partitions=0 finds no size .* take T5Config.remat='full', a larger"):
        memory.choose_partitions(big, (0,), devices, 1000)
    with pytest.raises(UserError, match=r"\(BATCH_SIZE; .* times its prompts\) is 5, which cannot be shared evenly by 3 devices"):
        memory.choose_partitions(tiny.replace(big, data={"batch_size": 5}), (0,), devices[:6], math.inf)
    with pytest.raises(UserError, match=r"times PartitionConfig.fsdp \(16\) is 16, which does not divide the 8"):
        memory.choose_partitions(tiny.replace(big, partition={"fsdp": 16}), (0,), devices, math.inf)


def test_xxl_fits_one_gpu_of_80_gb():
    """T5 1.1 XXL, bfloat16, remat full, batch 32, inputs 256 + prompt 100: the weights, and a quarter of what is left."""
    done = run_plan("t5_1_1_xxl.gin", "h100")
    assert "11,135,332,352 weights in bfloat16" in done and "20.74  weights" in done and ": fits" in done


def test_the_tables_of_the_docs_are_of_the_plans_that_were_made():
    """And in them XXL fits one v5e-8 and GPUs of 80 GB."""
    cells, text = json.loads(plan_table.CELLS.read_text()), plan_table.PAGE.read_text()
    assert plan_table.page(text, cells) == text
    held = {tuple(cell["name"]): cell.get("arguments", math.inf) + cell.get("temporaries", math.inf) for cell in cells["cells"]}
    for place, limit in (("v5e-8", 15.75), ("A100 80 GB", 67.1), ("H100 80 GB", 67.1)):
        assert held["xxl", "bfloat16", place, 0] < limit * GIB, place


def test_the_tables_of_the_docs_are_of_the_step_as_it_is_now():
    """A step with other products of matrices makes them stale: `make plan-table`. The rows of one GPU stand for all."""
    cells = [cell for cell in json.loads(plan_table.CELLS.read_text())["cells"] if cell["name"][2] == "H100 80 GB"]
    assert len(cells) == len(plan_table.SIZES) + 1
    for cell in cells:
        assert plan_table.step_work(cell)._asdict() == cell["work"], cell["name"]


def run_plan(backbone, topology):
    flags = ["--gin.MIXTURE_OR_TASK_NAME=sketch_sentiment", "--gin.TRAIN_STEPS=100", f"--topology={topology}"]
    files = [f"--gin_file=gin/backbones/{backbone}", "--gin_file=gin/methods/prompt_tuning.gin"]
    command = [sys.executable, "-m", "mpt_jax", "plan", *files, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    return done.stdout


class TestTPU:
    """With libtpu's compiler."""

    @pytest.fixture(autouse=True)
    def libtpu(self):
        pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -r requirements-dev.txt")

    def test_a_step_is_compiled_for_a_slice_that_is_not_here(self, experiment):
        made = plan.make_plan(tiny.replace(wide(experiment), partition={"num_partitions": 4}), "v5e:2x2")
        assert made.train.over == made.decode.over == 0 < made.train.code
        layers = [c for c in made.train.collectives if c.times == 2]
        assert layers and {c.kind for c in layers} == {"all-reduce"}, "a layer sums its results, and gathers no weight"
        assert "fits" in plan.describe(made)

    @pytest.mark.parametrize("name, size", [("v3:2x2", 8), ("v5e:1x1", 1), ("v4:2x2x1", 4), ("v5p:2x2x1", 4), ("v6e:2x4", 8)])
    def test_a_slice_has_the_devices_that_it_is_counted_as(self, name, size):
        """Of v4 and later a chip is one device, of v3 each of its two cores."""
        found = find_slice(name)
        assert len(plan._tpu_devices(found.topology)) == found.size == size

    def test_a_refusal_says_how_much_is_lacking(self, experiment):
        huge = tiny.replace(wide(experiment, d_ff=2**16), data={"batch_size": 2**14})
        made = plan.make_plan(huge, "v5e:1x1")
        assert made.train.over > GIB
        assert plan.peak(made) > made.slice.device.memory
        assert "the compiler wants" in plan.describe(made)

    def test_an_unknown_shape_is_one_sentence(self):
        with pytest.raises(UserError, match=r"--topology=v5e:3x5 is no slice that libtpu knows"):
            plan.make_plan(tiny.experiment(Path("/nowhere"), "run", streams=STREAMS), "v5e:3x5")


HLO = """HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %reduced = bf16[4,8]{1,0} all-reduce(%x), channel_id=1, to_apply=%add
  ROOT %t = (s32[], bf16[4,8]) tuple(%i, %reduced)
}

%inner_ends (p: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%outer (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  ROOT %w = (s32[], bf16[4,8]) while(%p), condition=%inner_ends, body=%inner
}

%outer_ends (p: (s32[], bf16[4,8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %loop = (s32[], bf16[4,8]) while(%a), condition=%outer_ends, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %gathered = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%b), channel_id=2
  ROOT %r = bf16[4,8] get-tuple-element(%loop), index=1
}
"""


OPERATIONS = [
    ("(f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%b), dimensions={0}", "f32[8,8]"),
    ("(bf16[4,8]{1,0}, bf16[4,8]{1,0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%b)", "bf16[4,8]"),
    ("(f32[100]{0}, f32[10]{0}) all-reduce-start(%b, %c), to_apply=%add", "f32[100], f32[10]"),
    ("f32[100]{0} all-reduce-start(%b), to_apply=%add", "f32[100]"),
    ("((f32[2]{0}, f32[3]{0}), (f32[4]{0}, f32[6]{0})) all-gather-start(%b, %c), dimensions={0}", "f32[4], f32[6]"),
    ("(f32[5]{0}, f32[6]{0}) all-reduce(%b, %c), to_apply=%add", "f32[5], f32[6]"),
]


@pytest.mark.parametrize("operation, shapes", OPERATIONS)
def test_of_an_asynchronous_operation_its_results_count(operation, shapes):
    (found,) = collectives_of(f"ENTRY %main (a: f32[1]) -> f32[1] {{\n  %x = {operation}\n}}\n")
    assert found.shapes == shapes


def test_communication_in_every_branch_is_counted():
    """Any of them may run."""
    branches = "".join(f"%branch_{n} (x: f32[8]) -> f32[8] {{\n  ROOT %r = f32[{n}] all-reduce(%x)\n}}\n\n" for n in (3, 4))
    choice = "f32[8] conditional(%i, %a), branch_computations={%branch_3, %branch_4}"
    entry = f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  ROOT %c = {choice}\n}}\n"
    assert [c.shapes for c in collectives_of(branches + entry)] == ["f32[3]", "f32[4]"]


def test_communication_within_nested_loops_is_multiplied():
    found = {c.kind: c for c in collectives_of(HLO)}
    assert (found["all-reduce"].times, found["all-reduce"].bytes) == (15, 64)
    assert (found["all-gather"].times, found["all-gather"].bytes) == (1, 4 * 64)
