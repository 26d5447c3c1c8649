"""Which rows are trained on, validated on and tested on: the protocol of ATTEMPT, MPT and DePT, row for row.

ATTEMPT (Asai et al. 2022, `attempt/data/tasks.py`) makes a labelled test split where a dataset has none. A small dataset's
validation split is halved into validation and test. Of a large one, 1,000 training rows become the validation split and the
official validation split is the test split. Which rows: those that `torch.randperm` draws with seed 42.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

SEED = 42
HELD_OUT = 1_000
SMALL_TRAIN = 10_000  # ATTEMPT's border between small and large, for tasks that its lists do not name

WINDOW = 1 << 32  # the generator's numbers are below


class Part(NamedTuple):
    """Rows of an official split: all, the `first` of its permutation, or the rest of it (at most `limit`).

    A `first` of 0 is half of the split, rounded down.
    """

    official: str
    keep: Literal["all", "first", "rest"] = "all"
    first: int = 0
    limit: int | None = None


Protocol = Mapping[str, Part]


def halved() -> Protocol:
    """The official validation split is halved into validation and test."""
    return {"train": Part("train"), "validation": Part("validation", "first"), "test": Part("validation", "rest")}


def held_out(test: str = "validation", limit: int | None = None) -> Protocol:
    """1,000 training rows are the validation split, `limit` others the training split; the official `test` is the test split."""
    return {
        "train": Part("train", "rest", HELD_OUT, limit),
        "validation": Part("train", "first", HELD_OUT),
        "test": Part(test),
    }


def own(validation: str = "validation", test: str = "test") -> Protocol:
    """The dataset's own splits, all of them labelled."""
    return {"train": Part("train"), "validation": Part(validation), "test": Part(test)}


def chosen(part: Part, rows: int) -> np.ndarray:
    """Numbers of the rows of `part` in an official split of `rows` rows, int64, ascending."""
    if part.keep == "all":
        return np.arange(rows)
    order = permutation(rows)
    first = part.first or max(rows // 2, 1)  # a single row is for validation
    return np.sort(order[:first] if part.keep == "first" else order[first:][: part.limit])


def counts(protocol: Protocol, rows: Mapping[str, int]) -> dict[str, int]:
    """Rows of each split of the protocol, from those of the official splits; splits whose size is not known are left out."""
    sizes = {}
    for split, part in protocol.items():
        total = rows.get(part.official, 0)
        first = part.first or total // 2
        size = {"all": total, "first": first, "rest": total - first}[part.keep]
        if total:
            sizes[split] = min(size, part.limit) if part.limit else size
    return sizes


def permutation(n: int, seed: int = SEED) -> np.ndarray:
    """`torch.randperm(n)` with a CPU generator of this seed, int64 [n].

    PyTorch (`aten/src/ATen/native/TensorFactories.cpp`, `randperm_cpu`) exchanges each item with a later one or itself, which
    32-bit draws of the Mersenne Twister choose, modulo the number of items left. So for n < 2^32 / 20; above it draws 64 bits.
    """
    if n >= WINDOW // 20:
        raise ValueError(f"a permutation of {n} rows; PyTorch draws other numbers from {WINDOW // 20} on")
    twister: Any = np.random.MT19937()
    twister.state = np.random.RandomState(seed).get_state(legacy=False)  # seeded as PyTorch seeds: init_genrand
    left = np.arange(n, 1, -1)
    steps = (twister.random_raw(len(left)) % left.astype(np.uint64)).astype(np.int64).tolist()
    order = list(range(n))
    for i, step in enumerate(steps):
        order[i], order[i + step] = order[i + step], order[i]
    return np.array(order, np.int64)
