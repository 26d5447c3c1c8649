"""What `bench` measures and writes; how fast it is here is nobody's business."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from mpt_jax import bench
from mpt_jax.config import StreamConfig
from mpt_jax.costs import work_of
from mpt_jax.errors import UserError
from mpt_jax.hardware import GPUS, TPUS, device_of
from mpt_jax.memory import programs_of
from mpt_jax.setup import mesh_of

STREAMS = (StreamConfig("tiny_colour", 0), StreamConfig("tiny_mood", 1))


@pytest.mark.parametrize("method", ["plain", "mpt", "none"])
def test_every_method_is_measured_and_written(tmp_path, method, capsys):
    streams = STREAMS if method == "plain" else STREAMS[:1]
    config = tiny.experiment(tmp_path, "run", streams=streams, method=method)
    parts = 2 if method == "mpt" else 1
    config = tiny.replace(
        config,
        bench={"steps": 2, "warmup_steps": 1, "output_file": str(tmp_path / "out.json")},
        train={"num_microbatches": parts},
    )
    jax.clear_caches()  # the first step is to have its compilation in it, whatever other tests have compiled
    bench.run_bench(config)
    written = json.loads((tmp_path / "out.json").read_text())
    for name in ("train", "decode"):
        result = written[name]
        assert (
            result["step_seconds_p10"] <= result["step_seconds_p50"] <= result["step_seconds_p90"] <= result["first_step_seconds"]
        )
        assert result["examples_per_second"] > 0 and result["mfu"] is None, "a CPU is in no table"
    assert written["num_microbatches"] == parts
    assert written["method"] == method and written["versions"]["jax"] == jax.__version__
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists(), "no data is read and no run begun"
    assert "train: " in capsys.readouterr().out


def test_work_that_remat_repeats_is_not_counted(tmp_path):
    """MFU is of the work that the method needs, whatever is computed twice to save memory."""
    counted = []
    for remat in ("none", "full"):
        config = tiny.experiment(tmp_path, "run", streams=STREAMS)
        config = tiny.replace(config, bench={"steps": 1, "warmup_steps": 1})
        architecture = {"architecture": dataclasses.replace(tiny.CONFIG, remat=remat)}
        counted.append(bench.run_bench(tiny.replace(config, backbone=architecture))["train"]["flops"])
    programs = programs_of(config, (0, 1), mesh_of(config))
    assert counted == [work_of(programs.train.trace(*programs.train_arguments)).flops] * 2


def test_the_batch_is_full(tmp_path):
    config = tiny.experiment(tmp_path, "run", streams=STREAMS)
    _, _, batch = bench._arrays(programs_of(config, (0, 1), mesh_of(config)), config)
    assert np.all(batch["encoder_tokens"] > 1) and np.all(batch["loss_weights"] == 1)
    assert batch["encoder_tokens"].shape == (8, 24)


@pytest.mark.parametrize(
    "kind, device",
    [
        ("TPU v5 lite", TPUS["v5e"]),
        ("TPU v5e", TPUS["v5e"]),
        ("TPU v5", TPUS["v5p"]),
        ("TPU v4 lite", None),
        ("NVIDIA H100 80GB HBM3", GPUS["h100"]),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_devices_are_known_by_jaxs_names(kind, device):
    assert device_of(kind) == device


def test_a_number_of_steps_is_checked(tmp_path):
    with pytest.raises(UserError, match=r"BenchConfig.steps must be positive, not 0"):
        tiny.replace(tiny.experiment(tmp_path, "run"), bench={"steps": 0}).validate()
