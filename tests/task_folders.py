"""Fixtures that all tests of tasks share, through `conftest.py`: a vocabulary, a configuration, a folder; and files in it."""

import json
from pathlib import Path

import pytest
from tiny import make_vocabulary

from mpt_jax.config import DataConfig
from mpt_jax.data.vocabulary import load_vocabulary


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    return load_vocabulary(make_vocabulary(tmp_path_factory.mktemp("vocabulary") / "sentencepiece.model"))


@pytest.fixture
def data(tmp_path):
    return DataConfig("", {"inputs": 64, "targets": 16}, 4, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of MPT_JAX_DATA, empty."""
    path = tmp_path / "data"
    path.mkdir()
    monkeypatch.setenv("MPT_JAX_DATA", str(path))
    return path


def write_splits(folder: Path, **splits: list) -> None:
    """A JSONL file for each split; a row that is a text is a line as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
