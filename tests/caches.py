"""Token caches of given examples, written and opened as the product writes and opens them."""

import numpy as np

from mpt_jax.data import writer
from mpt_jax.data.cache import TokenCache


def write_cache(folder, task, inputs, targets, lengths, texts=None, vocabulary=None):
    """`inputs` and `targets` are lists of token rows; `texts`, if given, the targets' texts."""
    columns = writer.Columns()
    for name, rows in (("inputs", inputs), ("targets", targets)):
        columns.tokens[name] = [np.asarray(row, np.int32) for row in rows]
        columns.uncut[name] = [len(row) for row in rows]
    columns.texts, columns.targets = [b""] * len(inputs), texts or [None] * len(inputs)
    folder.mkdir(exist_ok=True)
    meta = {"task": task, "split": "train", "lengths": lengths, "truncated": {}, "examples": len(inputs)}
    writer.write(folder, [columns], meta)
    return TokenCache(folder, meta, vocabulary)


def random_cache(folder, task, size, lengths, seed=0, vocabulary_size=30):
    """Random tokens, of random lengths from 1 to `lengths`."""
    rng = np.random.default_rng(seed)
    rows = {
        name: [rng.integers(3, vocabulary_size, rng.integers(1, most + 1)) for _ in range(size)] for name, most in lengths.items()
    }
    return write_cache(folder, task, rows["inputs"], rows["targets"], lengths)
