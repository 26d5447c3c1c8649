"""Rows from TFDS: prepared datasets are read from disk, without a network; what cannot be downloaded is told at once."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from task_folders import write_splits
from tfds_data import write_tfds

from mpt_jax.data.cache import open_task
from mpt_jax.errors import UserError


def texts(cache) -> list[tuple[str, str]]:
    return [(cache.text(i)["inputs_pretokenized"], cache.target_text(i)) for i in range(len(cache))]


def rte(name: str, count: int) -> list[dict]:
    return [{"sentence1": f"{name} {i}", "sentence2": "é", "label": i % 2, "idx": i} for i in range(count)]


def boolq(name: str, count: int) -> list[dict]:
    return [{"question": f"{name} {i}?", "passage": "p", "label": i % 2, "idx": i} for i in range(count)]


def squad(name: str, count: int) -> list[dict]:
    row = {"title": "", "question": "Who?", "answers": {"text": ["Ann", "Ann B."], "answer_start": [0, 0]}}
    return [{"id": f"{name}{i}", "context": f"Ann B. {i}", **row} for i in range(count)]


CASES = {  # dataset of the library → TFDS' name, rows, sizes of the official splits
    "glue_rte": ("glue/rte:2.0.0", rte, (5, 11)),
    "boolq": ("super_glue/boolq:1.0.2", boolq, (4, 7)),
    "squad": ("squad/v1.1:3.0.0", squad, (1_003, 2)),  # large by protocol: 1,000 rows are held out
}


@pytest.mark.parametrize("name", CASES)
def test_tfds_gives_what_files_with_its_fields_give(tmp_path, data, vocabulary, monkeypatch, name):
    dataset, rows, (train, validation) = CASES[name]
    splits = {"train": rows("train", train), "validation": rows("v", validation)}
    monkeypatch.delenv("MPT_JAX_DATA", raising=False)
    write_tfds(tmp_path / "tfds", dataset, splits)
    data = dataclasses.replace(data, tfds_data_dir=str(tmp_path / "tfds"))
    found = {split: texts(open_task(data, f"{name}_attempt", split, vocabulary)) for split in ("train", "validation", "test")}
    write_splits(tmp_path / "files" / name, **splits)
    monkeypatch.setenv("MPT_JAX_DATA", str(tmp_path / "files"))
    for split, expected in found.items():
        assert texts(open_task(data, f"{name}_attempt", split, vocabulary)) == expected and expected


def test_references_of_one_input_are_one_example_to_test_on(tmp_path, data, vocabulary, monkeypatch):
    """GEM's E2E has a row for each reference."""
    monkeypatch.delenv("MPT_JAX_DATA", raising=False)
    texts_of = [(meaning, f"{meaning} {n}") for n in range(3) for meaning in ("cat", "dog")]
    rows = [{"meaning_representation": meaning, "target": text, "references": [text]} for meaning, text in texts_of]
    rows = [{**row, "gem_id": str(number), "gem_parent_id": ""} for number, row in enumerate(rows)]
    train = [{**row, "references": []} for row in rows]
    write_tfds(tmp_path / "tfds", "gem/e2e_nlg:1.1.0", {"train": train, "validation": rows, "test": rows})
    data = dataclasses.replace(data, tfds_data_dir=str(tmp_path / "tfds"))
    cache = open_task(data, "e2e_nlg_t5", "test", vocabulary)
    assert [cache.text(i)["answers"] for i in range(len(cache))] == [[f"{of} {n}" for n in range(3)] for of in ("cat", "dog")]
    assert texts(open_task(data, "e2e_nlg_t5", "train", vocabulary)) == [(f"e2e_nlg {of}", text) for of, text in texts_of]


def test_the_folder_may_be_named_by_tfds_own_variable(tmp_path):
    """In a new process, for TFDS reads its variable when it is imported; there, too, no row is read for `infer`."""
    write_tfds(tmp_path / "tfds", "glue/rte:2.0.0", {"train": rte("train", 3), "validation": rte("v", 4)})
    environment = {name: value for name, value in os.environ.items() if name != "MPT_JAX_DATA"}
    done = subprocess.run(
        [sys.executable, "-m", "mpt_jax", "tasks", "glue_rte_t5", f"--gin.DataConfig.cache_dir={tmp_path}/cache"],
        env=environment | {"TFDS_DATA_DIR": str(tmp_path / "tfds")},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "rte sentence1: train 0 sentence2: é" in done.stdout


def test_without_data_and_without_a_network_the_error_is_quick(tmp_path, data, vocabulary, monkeypatch):
    """As far as a name can be found out: the resolver answers that there is no such host, as without a network."""

    def no_network(*_args, **_options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "MPT_JAX_DATA"):
        monkeypatch.delenv(name, raising=False)
    data = dataclasses.replace(data, tfds_data_dir=str(tmp_path / "empty"))
    began = time.monotonic()
    with pytest.raises(
        UserError,
        match=r"'glue/cola:2.0.0' of 'cola' could not be read \(it is not there, and there is no connection to .*Name or service "
        r"not known.*set DataConfig.tfds_data_dir or .*TFDS_DATA_DIR to a folder that has it, or put .* a folder cola",
    ):
        open_task(data, "cola_t5", "train", vocabulary)
    with pytest.raises(UserError, match=r"'c4/en:3.1.0' of task 'c4_prefix_lm' could not be read \(it is not there"):
        open_task(data, "c4_prefix_lm", "train", vocabulary)
    bucket = dataclasses.replace(data, tfds_data_dir="gs://nowhere/at/all")
    with pytest.raises(UserError, match=r"no connection to storage.googleapis.com"):
        open_task(bucket, "cola_t5", "train", vocabulary)
    assert time.monotonic() - began < 30  # TFDS itself takes 204 s for a single file


def test_one_server_that_answers_is_a_network(monkeypatch):
    from mpt_jax.data import downloads

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = socket.create_connection
        monkeypatch.setattr(socket, "create_connection", lambda address, *rest: connect((address[0], port), *rest))
        monkeypatch.setattr(downloads.urllib.request, "getproxies", dict)
        downloads._require_one_of({"127.0.0.1", "no-such-host.invalid"})
        with pytest.raises(downloads._Unreachable, match="no-such-host.invalid"):
            downloads._require_one_of({"no-such-host.invalid"})


def test_fields_of_a_row_are_known_without_any_data(tmp_path, data, vocabulary, monkeypatch):
    """`infer` with a task's fields needs neither files nor TFDS, and reads no row."""
    from mpt_jax.data.rows import tokenise_rows

    monkeypatch.delenv("MPT_JAX_DATA", raising=False)
    data = dataclasses.replace(data, tfds_data_dir=str(tmp_path / "empty"))
    rows = [{"passage": "p", "question": "q"}, {"passage": "p", "question": "q", "label": 1}]
    tokens, _ = tokenise_rows(data, "boolq_t5", rows, vocabulary)
    expected = vocabulary.encode("boolq passage: p question: q")
    assert [row[:-1].tolist() for row in tokens] == [expected] * 2
