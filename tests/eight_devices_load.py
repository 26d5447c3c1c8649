"""Run by test_leaves.py in a process with 8 simulated devices: `eight_devices_load.py FOLDER` loads checkpoints onto a mesh."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import t5x_reference as t5x
import tiny
from hf_reference import V1_1, random_params

from mpt_jax import setup
from mpt_jax.checkpoint import leaves
from mpt_jax.checkpoint.backbone import load_backbone
from mpt_jax.checkpoint.export_hf import export_hf
from mpt_jax.checkpoint.import_t5x import open_t5x
from mpt_jax.checkpoint.t5x_files import find_t5x
from mpt_jax.config import BackboneConfig, PartitionConfig
from mpt_jax.convert import run_import
from mpt_jax.models.t5 import logical_axes
from mpt_jax.partitioning import make_mesh, tree_sharding
from mpt_jax.trees import flatten, unflatten

# Of heads, d_kv and d_ff, four devices divide the width of all heads and d_ff; a shard of the former cuts heads apart.
CONFIG = dataclasses.replace(V1_1, vocab_size=56, num_heads=6, d_kv=6, param_dtype="bfloat16")


def load_and_compare(checkpoint, mesh):
    config = BackboneConfig(str(checkpoint), CONFIG, __file__)
    one = load_backbone(config)
    eight = setup.open_backbone(dataclasses.replace(tiny.experiment(Path(), "x"), backbone=config), mesh)
    assert one.fingerprint == eight.fingerprint
    shardings = flatten(tree_sharding(one.params, logical_axes(CONFIG), mesh))
    expected = flatten(one.params)
    cut = 0
    for path, leaf in flatten(eight.params).items():
        assert leaf.dtype == "bfloat16"
        assert leaf.sharding == shardings[path], path
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
        cut += leaf.addressable_shards[0].data.size < leaf.size
    assert cut == 20, f"{cut} leaves are shared out"
    return one.fingerprint


def read_without_digest(checkpoint, mesh):
    """As a process does that computes no fingerprint: what its devices hold, here everything, is read once and at once."""
    found = open_t5x(find_t5x(str(checkpoint)), CONFIG)
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, "float32") for path, leaf in found.items()}
    shardings = flatten(tree_sharding(unflatten(shapes), logical_axes(CONFIG), mesh))
    for path, leaf in found.items():
        reads = []

        def read(index, leaf=leaf, reads=reads):
            reads.append(np.prod([part.stop - part.start for part in index]))
            return leaf.read(index)

        array = leaves._place(dataclasses.replace(leaf, read=read), shardings[path], np.dtype("float32"), path, None)
        assert reads == [array.size], path
        np.testing.assert_array_equal(array, leaves.to_numpy(leaf, "float32", "x"), err_msg=path)


def main(folder):
    assert len(jax.devices()) == 8
    mesh = make_mesh(PartitionConfig(4))
    params = random_params(CONFIG)
    checkpoints = [
        export_hf(params, CONFIG, folder / "hf"),
        t5x.write_legacy(folder / "checkpoint_1", t5x.target_of(params)),
        t5x.write_legacy(folder / "checkpoint_2", t5x.target_of(params, scanned="same", heads=CONFIG)),
        t5x.write_single(folder / "checkpoint_3", t5x.target_of(params), 1000),
        t5x.write_orbax(folder / "checkpoint_4", t5x.target_of(params)),
    ]
    run_import(str(checkpoints[0]), str(folder / "own"))
    checkpoints.append(folder / "own")
    assert len({load_and_compare(checkpoint, mesh) for checkpoint in checkpoints}) == 1
    for checkpoint in checkpoints[1:3]:
        read_without_digest(checkpoint, mesh)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
