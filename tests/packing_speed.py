"""`make packing-speed`: prompt tuning with padded, trimmed, sorted and packed batches on four tasks, the table of docs/speed.md.

Needs MPT_JAX_DATA with the folders sst2, mnli, boolq and multirc (docs/tasks.md). T is the smallest multiple of 32 up to
512 that holds 99 % of a task's training inputs (what is longer is cut). Relative to padded batches and exact, as means over
STEPS steps: positions of the encoder, and multiplications and additions of a forward pass of mini and of a T5 1.1 base. Then
time, on mini and this machine's CPU: for each length of row that these steps have, a training step of ROWS rows is compiled and
timed, all lengths in turn, REPEATS times; examples per second follow from the medians and from the numbers of rows of the STEPS
steps, as if a step took as long as its rows together. A quarter of an hour; `TIMES=0` leaves the times out.
"""

import os
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.checkpoint.backbone import load_backbone
from mpt_jax.config import BackboneConfig, DataConfig, LossConfig, OptimizerConfig, PromptConfig, T5Config
from mpt_jax.data.cache import open_task
from mpt_jax.data.sampling import make_loader, stream_data
from mpt_jax.data.vocabulary import load_vocabulary
from mpt_jax.partitioning import make_mesh, place_batch
from mpt_jax.prompts import build_prompt
from mpt_jax.shapes import PACKED_SHAPES
from mpt_jax.train_state import create_state, make_train_step

TASKS = ("sst2", "mnli", "boolq", "multirc")
PROMPTS = (20, 100)
LONGEST, TARGETS, BATCH, STEPS, ROWS, REPEATS = 512, 16, 32, 200, 4, 5
BASE = T5Config(32128, 768, d_kv=64, num_heads=12, d_ff=2048, num_encoder_layers=12, num_decoder_layers=12)
MINI = T5Config(4096, 64, d_kv=16, num_heads=4, d_ff=128, num_encoder_layers=4, num_decoder_layers=2)  # gin/backbones/mini.gin


def layouts(length, mean, prompt):
    """The ways of laying out a batch; packed, a row holds the longest example, or two of mean length if that is little more."""
    quarters = tuple(length * n // 4 for n in (1, 2, 3))
    longest, two = prompt + length, int(2 * (prompt + mean))
    row = -(-(two if longest < two <= 1.5 * longest else longest) // 32) * 32
    return {
        "padded": {},
        "trimmed": {"trim_lengths": quarters},
        "sorted": {"trim_lengths": quarters, "sort_window": 16},
        f"packed {row}": {"pack_lengths": {"inputs": row, "targets": max(TARGETS, row // 8)}},
    }


def operations(shape, config):
    """Multiplications and additions of a forward pass over rows of (encoder, decoder) positions."""
    rows, encoder, decoder = shape
    d, inner, feed = config.d_model, config.num_heads * config.d_kv, config.d_ff
    attention, dense = 4 * inner, 2 * (4 * d * inner + 3 * d * feed)
    of_encoder = config.num_encoder_layers * encoder * (dense + attention * encoder)
    of_decoder = decoder * (dense + 4 * d * inner + attention * (decoder + encoder)) + encoder * 4 * d * inner
    return rows * (of_encoder + config.num_decoder_layers * of_decoder + 2 * decoder * d * config.vocab_size)


def shape_of(batch, prompt):
    rows, encoder = batch["encoder_tokens"].shape
    return rows, encoder + (0 if "encoder_segments" in batch else prompt), batch["decoder_target_tokens"].shape[1]


def totals(histogram):
    """Positions, and operations of mini and of a T5 1.1 base, in all batches of a histogram of shapes."""
    positions = sum(n * rows * encoder for (rows, encoder, _), n in histogram.items())
    return positions, *(sum(n * operations(shape, config) for shape, n in histogram.items()) for config in (MINI, BASE))


def row_seconds(backbone, prompt, batches):
    """Median seconds that a training step of ROWS rows spends on each, by key; `batches` have the rows."""
    groups, optimizer, mesh = (0,), OptimizerConfig(), make_mesh()
    width = backbone.model.config.d_model
    start = {"prompt": jax.random.normal(jax.random.key(0), (1, prompt, width))}
    step = make_train_step(
        backbone.model, build_prompt(PromptConfig(length=prompt), groups, width), LossConfig(), optimizer, 0, groups, mesh
    )
    state = create_state(start, backbone.model, optimizer, 0, groups, 0, mesh)
    seconds = {key: [] for key in batches}
    for repeat in range(REPEATS + 1):  # the first compiles
        for key, batch in batches.items():
            rows = {name: np.resize(array, (ROWS, *array.shape[1:])) for name, array in batch.items() if name in PACKED_SHAPES}
            placed = place_batch(rows, mesh)
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, {"backbone": backbone.params}, placed))
            assert jnp.isfinite(metrics["loss"]).all()
            if repeat:
                seconds[key].append((time.perf_counter() - began) / ROWS)
    return {key: float(np.median(times)) for key, times in seconds.items()}


def main():
    backbone = load_backbone(BackboneConfig("embedded:mini", MINI))
    vocabulary = load_vocabulary(backbone.vocabulary)
    print("| task (T, mean input) | P | batch | shapes | positions | operations, mini | base | examples/s |")
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for task in TASKS:
        data = DataConfig(f"{task}_attempt", {"inputs": LONGEST, "targets": TARGETS}, BATCH)
        cache = open_task(data, data.mixture, "train", vocabulary)
        counts = cache.token_counts("inputs")
        length = min(-(-int(np.quantile(counts, 0.99)) // 32) * 32, LONGEST)
        mean = np.minimum(counts, length).mean()
        for prompt in PROMPTS:
            histograms, batches = {}, {}
            for name, fields in layouts(length, mean, prompt).items():
                config = DataConfig(data.mixture, {"inputs": length, "targets": TARGETS}, BATCH, **fields)
                histograms[name], loader = Counter(), make_loader(config, [stream_data(cache)], prompt)
                for batch in map(loader.batch, range(STEPS)):
                    shape = shape_of(batch, prompt)
                    histograms[name][shape] += 1
                    batches.setdefault((name.startswith("packed"), *shape[1:]), batch)
            times = row_seconds(backbone, prompt, batches) if os.environ.get("TIMES") != "0" else None
            padded = totals(histograms["padded"])
            for name, histogram in histograms.items():
                shares = " | ".join(f"{mine / other:.2f}" for mine, other in zip(totals(histogram), padded, strict=True))
                speed = "–"
                if times is not None:
                    packed = name.startswith("packed")
                    seconds = sum(n * shape[0] * times[packed, *shape[1:]] for shape, n in histogram.items())
                    speed = f"{BATCH * STEPS / seconds:.0f}"
                label = f"{task} ({length}, {mean:.0f})"
                print(f"| {label} | {prompt} | {name} | {len(histogram)} | {shares} | {speed} |", flush=True)


if __name__ == "__main__":
    main()
