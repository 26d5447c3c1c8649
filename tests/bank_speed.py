"""`make bank-speed`: N prompts side by side against N separate runs, the table of docs/speed.md.

Prompt tuning with batches of 8 examples for each prompt, inputs of T random tokens and prompts of P. In turn, REPEATS times, one
step of the bank of N is timed, and one step of a single prompt; N separate runs take N of the latter. Then, from XLA, what a step
needs besides the weights, and the seconds of compiling it. On mini, on this machine; `SIZE=small` takes a random T5 1.1 small.
"""

import os
import statistics
import time

import jax
import numpy as np

from mpt_jax.checkpoint.backbone import load_backbone
from mpt_jax.config import BackboneConfig, LossConfig, OptimizerConfig, PromptConfig, T5Config
from mpt_jax.models.t5 import T5, init_params
from mpt_jax.partitioning import make_mesh, place_batch
from mpt_jax.prompts import build_prompt
from mpt_jax.train_state import create_state, make_train_step

MINI = T5Config(4096, 64, d_kv=16, num_heads=4, d_ff=128, num_encoder_layers=4, num_decoder_layers=2)  # gin/backbones/mini.gin
SMALL = T5Config(32128, 512, d_kv=64, num_heads=6, d_ff=1024, num_encoder_layers=8, num_decoder_layers=8)
EACH, TARGETS, REPEATS = 8, 8, 9
SHAPES = ((32, 20), (128, 100))  # T, P


class Bank:
    """N prompts, and a batch of EACH examples for each."""

    def __init__(self, model, params, prompts, inputs, length, mesh):
        groups, optimizer, width = tuple(range(prompts)), OptimizerConfig(), model.config.d_model
        start = {"prompt": 0.5 * jax.random.normal(jax.random.key(0), (prompts, length, width))}
        module = build_prompt(PromptConfig(length=length), groups, width)
        self.step = make_train_step(model, module, LossConfig(), optimizer, 0, groups, mesh)
        self.state = create_state(start, model, optimizer, 0, groups, 0, mesh)
        rng, rows = np.random.default_rng(0), prompts * EACH
        tokens = rng.integers(3, model.config.vocab_size, (rows, inputs + TARGETS)).astype(np.int32)
        batch = {
            "encoder_tokens": tokens[:, :inputs],
            "decoder_input_tokens": np.roll(tokens[:, inputs:], 1, axis=1),
            "decoder_target_tokens": tokens[:, inputs:],
            "loss_weights": np.ones((rows, TARGETS), np.float32),
            "task_ids": np.repeat(np.arange(prompts), EACH).astype(np.int32),
        }
        self.rest = {"backbone": params}, place_batch(batch, mesh)
        began = time.perf_counter()
        compiled = self.step.lower(self.state, *self.rest).compile()
        self.compile_seconds = time.perf_counter() - began
        self.temporaries = compiled.memory_analysis().temp_size_in_bytes

    def seconds(self):
        began = time.perf_counter()
        self.state, metrics = jax.block_until_ready(self.step(self.state, *self.rest))
        assert np.isfinite(metrics["loss"]).all()
        return time.perf_counter() - began


def main():
    if os.environ.get("SIZE") == "small":
        model, params = T5(SMALL), init_params(SMALL, jax.random.key(0))
    else:
        backbone = load_backbone(BackboneConfig("embedded:mini", MINI))
        model, params = backbone.model, backbone.params
    mesh = make_mesh()
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {REPEATS} repeats, load {os.getloadavg()[0]:.1f} at the start")
    print("| T, P | N | examples/s, bank | examples/s, N runs | gain (median, range) | MiB, bank | MiB, N runs | s to compile |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for inputs, length in SHAPES:
        single = Bank(model, params, 1, inputs, length, mesh)
        for prompts in (1, 4, 16):
            bank = Bank(model, params, prompts, inputs, length, mesh)
            pairs = [(bank.seconds(), single.seconds()) for _ in range(REPEATS + 1)][1:]
            together, alone = (statistics.median(times) for times in zip(*pairs, strict=True))
            gains = [prompts * one / many for many, one in pairs]
            speeds = f"{prompts * EACH / together:.0f} | {EACH / alone:.0f}"
            gain = f"{statistics.median(gains):.2f} ({min(gains):.2f}-{max(gains):.2f})"
            memory = f"{bank.temporaries / 2**20:.1f} | {single.temporaries / 2**20:.1f} each"
            print(f"| {inputs}, {length} | {prompts} | {speeds} | {gain} | {memory} | {bank.compile_seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
