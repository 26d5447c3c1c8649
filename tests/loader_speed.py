"""`make loader-speed`: examples per second that the loader makes, from a cache of 400,000 generated examples.

Inputs of 256 and targets of 16 tokens at most, lengths as in MNLI (log-normal, median 40), batches of 256. Prints the best of
five passes for each way of sampling and laying out ("bank" and "mpt" are never sorted), by the time of
one thread.
"""

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from caches import write_cache

from mpt_jax.config import DataConfig
from mpt_jax.data.sampling import make_loader, stream_data

LENGTHS = {"inputs": 256, "targets": 16}
EXAMPLES, BATCH, STEPS, PASSES, PROMPT = 400_000, 256, 100, 5, 100
LAYOUTS = {
    "padded": {},
    "trimmed": {"trim_lengths": (32, 64, 96, 128, 192)},
    "sorted and trimmed": {"trim_lengths": (32, 64, 96, 128, 192), "sort_window": 16},
    "packed": {"pack_lengths": {"inputs": 512, "targets": 64}},
}


def make_cache(folder):
    rng = np.random.default_rng(0)
    rows = {}
    for name, median, spread in (("inputs", 40, 0.6), ("targets", 3, 0.5)):
        lengths = np.clip(rng.lognormal(np.log(median), spread, EXAMPLES).astype(int), 1, LENGTHS[name])
        rows[name] = np.split(rng.integers(2, 30_000, lengths.sum(), dtype=np.int32), np.cumsum(lengths)[:-1])
    return write_cache(folder, "generated", rows["inputs"], rows["targets"], LENGTHS)


def rate(loader):
    """Examples per second of this thread's own time after a first batch, the best of some passes."""
    seconds = []
    loader.batch(0)
    for number in range(PASSES):
        began = time.thread_time()
        for step in range(number * STEPS, (number + 1) * STEPS):
            loader.batch(step)
        seconds.append(time.thread_time() - began)
    return BATCH * STEPS / min(seconds)


def main():
    folder = Path(tempfile.mkdtemp())
    try:
        whole = stream_data(make_cache(folder))
        quarters = [dataclasses.replace(whole, rows=part) for part in np.array_split(whole.rows, 4)]
        for sampling, streams in (("proportional", [whole]), ("proportional", quarters), ("bank", quarters), ("mpt", quarters)):
            for name, fields in LAYOUTS.items():
                loader = make_loader(DataConfig("generated", LENGTHS, BATCH, sampling=sampling, **fields), streams, PROMPT)
                print(f"{sampling}, streams {len(streams)}, {name}: {rate(loader):,.0f} examples/s", flush=True)
        loader = make_loader(DataConfig("generated", LENGTHS, BATCH), [whole])
        began = time.thread_time()
        loader.batch(10**6)
        print(f"the first batch, at step 1,000,000 with the order of its epoch: {1e3 * (time.thread_time() - began):.1f} ms")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
