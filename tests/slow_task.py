"""A seqio task whose examples come slowly."""

import time

import seqio

from tasks import features


def _rows():
    for n in range(10_000):
        time.sleep(0.01)
        yield {"inputs": f"the cat is {n}", "targets": "red"}


def _dataset(split, shuffle_files, seed=None):
    import tensorflow as tf

    text = tf.TensorSpec((), tf.string)
    return tf.data.Dataset.from_generator(_rows, output_signature={"inputs": text, "targets": text})


seqio.TaskRegistry.add(
    "slow",
    source=seqio.FunctionDataSource(_dataset, splits=("train",)),
    preprocessors=[*features.TOKENIZE],
    output_features=features.output_features(),
    metric_fns=[],
)
