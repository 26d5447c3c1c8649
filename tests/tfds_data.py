"""Small TFDS datasets on disk: TFDS' own features and writer, rows of ours."""

from pathlib import Path
from typing import Any


def write_tfds(data_dir: Path, name: str, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Writes <data_dir>/<dataset>/<configuration>/<version>/ as TFDS prepares it; in one file a split, which keeps the order."""
    import tensorflow_datasets as tfds

    dataset, _, version = name.partition(":")
    dataset, _, config = dataset.partition("/")
    builder = tfds.builder_cls(dataset)(**({"config": config} if config else {}), data_dir=str(data_dir), version=version)
    builder.data_path.mkdir(parents=True)
    writer = tfds.core.SequentialWriter(builder.info, max_examples_per_shard=10_000)
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()
