"""Our side of the comparison: the training step and the decoding that `train`, `evaluate` and `infer` compile."""

import dataclasses
import json
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax

import mpt_jax
from benchmarks.settings import Settings
from benchmarks.worker import Clock, private_output, serve, use_cores
from mpt_jax.checkpoint.import_hf import import_hf
from mpt_jax.config import (
    BackboneConfig,
    DataConfig,
    DecodeConfig,
    Experiment,
    LossConfig,
    OptimizerConfig,
    PromptConfig,
    TrainConfig,
)
from mpt_jax.costs import work_of
from mpt_jax.hardware import device_of
from mpt_jax.memory import decoded_length, programs_of
from mpt_jax.models.t5 import logical_axes
from mpt_jax.partitioning import make_mesh, place_batch, tree_sharding
from mpt_jax.shapes import PACKED_SHAPES
from mpt_jax.train_state import create_state


def experiment_of(settings: Settings) -> Experiment:
    """The run that both sides take steps of: one plain prompt, AdamW, the mean over target tokens."""
    return Experiment(
        BackboneConfig("scratch", settings.architecture),
        DataConfig("none", {"inputs": settings.inputs, "targets": settings.targets}, settings.batch),
        TrainConfig(0, "none"),
        PromptConfig(length=settings.prompt),
        LossConfig(normalization="mean"),
        OptimizerConfig("adamw", rules=((".*", settings.learning_rate),), weight_decay=settings.weight_decay),
        DecodeConfig(batch_size=settings.batch),
    )


class Ours:
    """See `worker.Side`."""

    def __init__(self, settings: Settings, folder: Path):
        self.experiment, self.mesh = experiment_of(settings), make_mesh()
        config = settings.architecture
        _, params = import_hf(folder / "model", config)
        self.params = jax.device_put(params, tree_sharding(params, logical_axes(config), self.mesh))
        self.programs = programs_of(self.experiment, (0,), self.mesh)
        prompt = {"prompt": jnp.asarray(np.load(folder / "prompt.npy"))[None]}
        plain = programs_of(experiment_of(dataclasses.replace(settings, remat="none")), (0,), self.mesh)
        self.flops = {  # of a full batch; what remat computes twice is counted once, as `bench` does
            "train": work_of(plain.train.trace(*plain.train_arguments)).flops,
            "decode": work_of(plain.decode.trace(*plain.decode_arguments), decoded_length(self.experiment)).flops,
        }
        self.state = create_state(prompt, self.programs.model, self.experiment.optimizer, 0, (0,), 0, self.mesh)

    def losses(self, batch: str, steps: int) -> list[float]:
        [arrays] = _load([batch])
        return [float(self._step(arrays)["loss"][0]) for _ in range(steps)]

    def train(self, batches: list[str]) -> list[float]:
        loaded = _load(batches)
        jax.block_until_ready(self._step(loaded[0]))
        clock = Clock()
        for arrays in loaded:
            metrics = self._step(arrays)
        jax.block_until_ready((self.state, metrics))
        return clock.read()

    def decode(self, batches: list[str]) -> list[float]:
        loaded = _load(batches)
        jax.block_until_ready(self._decode(loaded[0]))
        clock = Clock()
        outputs = [self._decode(arrays) for arrays in loaded]
        jax.block_until_ready(outputs)
        return clock.read()

    def decoded(self, batch: str) -> list[list[int]]:
        return np.asarray(self._decode(_load([batch])[0])[0]).tolist()

    def about(self) -> dict[str, Any]:
        device = jax.devices()[0]
        known = device_of(device.device_kind)
        modules = {"mpt_jax": mpt_jax, "jax": jax, "jaxlib": jaxlib, "flax": flax, "optax": optax, "numpy": np}
        return {
            "versions": {"python": platform.python_version(), **{name: module.__version__ for name, module in modules.items()}},
            "device": device.device_kind,
            "devices": jax.device_count(),
            "flops": self.flops,
            "peak_flops": known.flops if known else None,
            "peak_memory_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
            "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "environment": {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "GLIBC_TUNABLES")},
        }

    def _step(self, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        self.state, metrics = self.programs.train(self.state, {"backbone": self.params}, place_batch(arrays, self.mesh))
        return metrics

    def _decode(self, arrays: dict[str, np.ndarray]) -> Any:
        asked = {name: arrays[name] for name in ("encoder_tokens", "task_ids")} | {"numbers": arrays["task_ids"]}
        return self.programs.decode(self.state.trainable, self.params, place_batch(asked, self.mesh), np.uint32(0))


def _load(batches: list[str]) -> list[dict[str, np.ndarray]]:
    """As the loader hands them to the loop of `train`."""
    return [{name: array for name, array in np.load(path).items() if name in PACKED_SHAPES} for path in batches]


def main() -> None:
    answers = private_output()
    settings = Settings(**json.loads(sys.argv[1]))
    if settings.device == "cpu":
        use_cores(settings.threads)
    side = Ours(settings, Path(sys.argv[2]))
    print("{}", file=answers, flush=True)
    serve(side, answers)


if __name__ == "__main__":
    main()
