"""Reading a checkpoint in parts: the views are NumPy's, no more is read than asked for, and devices get what is theirs."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import t5x_reference as t5x
from hf_reference import V1_1, random_params
from jax.sharding import SingleDeviceSharding

from mpt_jax.checkpoint import leaves
from mpt_jax.checkpoint.export_hf import export_hf
from mpt_jax.checkpoint.import_hf import open_hf
from mpt_jax.checkpoint.import_t5x import open_t5x
from mpt_jax.checkpoint.leaves import Leaf, file_leaf, joined, stack, transposed
from mpt_jax.checkpoint.t5x_files import find_t5x
from mpt_jax.errors import UserError
from mpt_jax.trees import fingerprint

ROOT = Path(__file__).parent.parent


def in_memory(array: np.ndarray, reads: list[int], chunks: tuple[int, ...] | None = None) -> Leaf:
    """A leaf of an array that notes how many scalars each read takes from it."""

    def read(index: leaves.Index) -> np.ndarray:
        reads.append(array[index].size)
        return array[index]

    return file_leaf("memory", array.shape, array.dtype, read, chunks)


VIEWS = {
    "itself": ((6, 4, 10), lambda leaf: leaf, lambda array: array),
    "transposed": ((6, 4, 10), lambda leaf: transposed(leaf, (1, 2, 0)), lambda array: array.transpose(1, 2, 0)),
    "joined": ((6, 4, 10), lambda leaf: joined(leaf, 1), lambda array: array.reshape(6, 40)),
    "joined in front": ((6, 4, 10), lambda leaf: joined(leaf, 0), lambda array: array.reshape(24, 10)),
    "stacked": (
        (6, 4),
        lambda leaf: stack([leaf, transposed(transposed(leaf, (1, 0)), (1, 0))]),
        lambda array: np.stack([array] * 2),
    ),
    "scanned": (
        (6, 2, 4, 10),
        lambda leaf: joined(transposed(leaf, (1, 0, 2, 3)), 2),
        lambda array: array.swapaxes(0, 1).reshape(2, 6, 40),
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_read_what_numpy_would_and_no_more(name: str) -> None:
    shape, view, expected = VIEWS[name]
    array = np.random.default_rng(0).standard_normal(shape, np.float32)
    reads: list[int] = []
    leaf, wanted = view(in_memory(array, reads)), expected(array)
    assert leaf.shape == wanted.shape
    np.testing.assert_array_equal(leaves.to_numpy(leaf, "float32", "x"), wanted)
    rng = np.random.default_rng(1)
    for _ in range(50):
        bounds = [sorted(rng.choice(size + 1, 2, replace=False)) for size in leaf.shape]
        index = tuple(slice(int(a), int(b)) for a, b in bounds)
        reads.clear()
        found = leaf.read(index)
        np.testing.assert_array_equal(found, wanted[index])
        # Of two joined axes, rows of the inner one are read whole: at most 9 more of 10 at each end.
        spare = found.size // (bounds[-1][1] - bounds[-1][0]) * 18 if name != "joined in front" else 18 * 10
        assert sum(reads) <= found.size + (spare if "joined" in name or name == "scanned" else 0)


@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_a_load_reads_everything_once_and_never_much_at_a_time(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves, "BLOCK", block)
    rng = np.random.default_rng(0)
    tree = {"a": rng.standard_normal((7, 5, 4), np.float32), "b": rng.standard_normal((30, 4)), "c": np.ones(9, np.float32)}
    reads: list[int] = []
    lazy = {"a": stack([in_memory(layer, reads) for layer in tree["a"]]), "c": in_memory(tree["c"], reads)}
    lazy["b"] = in_memory(tree["b"], reads, (4, 4))
    places = dict.fromkeys(tree, SingleDeviceSharding(jax.devices()[0]))
    arrays, digest, _ = leaves.load(lazy, places, dict.fromkeys(lazy, "float32"))
    assert digest == fingerprint(tree)
    assert sum(reads) == sum(leaf.size for leaf in tree.values())
    assert max(reads) <= max(block, 20)
    for path, leaf in tree.items():
        np.testing.assert_array_equal(arrays[path], leaf.astype(np.float32))


def test_a_part_of_a_zarr_array_needs_its_chunks_only(tmp_path: Path) -> None:
    params = random_params(V1_1)
    folder = t5x.write_legacy(tmp_path / "checkpoint_1", t5x.target_of(params), chunks=lambda shape: [16, shape[1]])
    leaf = open_t5x(find_t5x(str(folder)), V1_1)["token_embedder/embedding"]
    for name in ("0.0", "2.0", "3.0"):
        (folder / "target.token_embedder.embedding" / name).unlink()
    found = leaf.read((slice(18, 30), slice(3, 9)))
    np.testing.assert_array_equal(found, params["token_embedder"]["embedding"][18:30, 3:9])


def bytes_read() -> int:
    """By this process, with read calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts the bytes")
def test_rows_of_a_single_file_are_read_without_the_rest(tmp_path: Path) -> None:
    config = dataclasses.replace(V1_1, vocab_size=300_000)
    params = random_params(config)
    file = t5x.write_single(tmp_path / "checkpoint_1", t5x.target_of(params), 2**20)
    size = file.stat().st_size
    assert size > 50e6
    before = bytes_read()
    leaf = open_t5x(find_t5x(str(file)), config)["token_embedder/embedding"]
    rows = slice(54_600, 54_700)  # over the border of two of flax's chunks
    np.testing.assert_array_equal(leaf.read((rows, slice(0, 24))), params["token_embedder"]["embedding"][rows])
    assert bytes_read() - before < size / 4


def test_a_weight_that_is_not_finite_in_a_hugging_face_file(tmp_path: Path) -> None:
    params = random_params(V1_1)
    params["decoder"]["layers"]["mlp"]["wo"]["kernel"][1, 3, 2] = np.nan
    lazy = open_hf(export_hf(params, V1_1, tmp_path / "model"))[1]["decoder/layers/mlp/wo/kernel"]
    with pytest.raises(UserError, match=r"tensor decoder\.block\.1\.layer\.2\.\S+\.wo\.weight holds nan at \[2, 3\]"):
        leaves.to_numpy(lazy, "float32", "x")


def test_eight_devices_hold_what_one_does(tmp_path: Path) -> None:
    """Each kind of checkpoint, streamed onto a mesh of 2 x 4 devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    script = [sys.executable, str(ROOT / "tests" / "eight_devices_load.py"), str(tmp_path)]
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
