"""T5X checkpoints of every layout give the tree that they were written from, and what does not fit is named."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import bucket
import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
import t5x_reference as t5x
from hf_reference import V1_0, V1_1, random_params
from t5x_reference import assert_equal

from mpt_jax.checkpoint.backbone import load_backbone
from mpt_jax.checkpoint.t5x_files import find_t5x
from mpt_jax.config import BackboneConfig, T5Config
from mpt_jax.errors import UserError
from mpt_jax.trees import fingerprint

CONFIG = dataclasses.replace(V1_1, num_decoder_layers=3)


def load(checkpoint: Path | str, config: T5Config = CONFIG) -> Any:
    return load_backbone(BackboneConfig(str(checkpoint), config, __file__))


def as_bfloat16(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)


LAYOUTS = {
    "gfile": lambda folder, target: t5x.write_legacy(folder, target),
    "gcs, no .zarray": lambda folder, target: t5x.write_legacy(folder, target, driver="gcs", zarray=False),
    "file, one chunk": lambda folder, target: t5x.write_legacy(folder, target, driver="file", chunks=list),
    "version 2": lambda folder, target: t5x.write_legacy(folder, target, version=2),
    "not within optimizer": lambda folder, target: t5x.write_legacy(folder, target, wrapped=False),
    "one file": lambda folder, target: t5x.write_single(folder, target, 2**30),
    "one file in chunks": lambda folder, target: t5x.write_single(folder, target, 1000),
    "ocdbt": lambda folder, target: t5x.write_orbax(folder, target),
    "ocdbt of params": lambda folder, target: t5x.write_orbax(folder, target, name="params"),
    "orbax's folders": lambda folder, target: t5x.write_orbax(folder, target, ocdbt=False),
    "orbax's first": lambda folder, target: t5x.write_first_orbax(folder, target),
}
NAMES = {
    "unscanned": {},
    "heads": {"heads": CONFIG},
    "flaxformer": {"scanned": "same", "heads": CONFIG},
    "scalable": {"scanned": "layers", "heads": CONFIG},
    "scanned, joined": {"scanned": "same"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_tree_that_it_was_written_from(layout: str, tmp_path: Path) -> None:
    """Float32 and bfloat16 on disk, each loaded as both; the fingerprint is that of the float32 values."""
    params = random_params(CONFIG)
    rounded = as_bfloat16(params)
    half = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    for name, tree in (("checkpoint_1", params), ("checkpoint_2", rounded)):
        checkpoint = LAYOUTS[layout](tmp_path / name, t5x.target_of(tree))
        found = load(checkpoint)
        assert_equal(found.params, jax.tree.map(lambda leaf: leaf.astype(np.float32), tree))
        assert found.fingerprint == fingerprint(tree)
        found = load(checkpoint, half)
        assert_equal(found.params, rounded)
        assert found.fingerprint == fingerprint(tree)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("layout", ["gfile", "one file in chunks", "ocdbt"])
def test_scanned_layers_and_separate_heads(names: str, layout: str, tmp_path: Path) -> None:
    params = random_params(CONFIG)
    checkpoint = LAYOUTS[layout](tmp_path / "checkpoint_7", t5x.target_of(params, **NAMES[names]))
    assert_equal(load(checkpoint).params, params)


def test_tied_embeddings(tmp_path: Path) -> None:
    params = random_params(V1_0)
    folder = t5x.write_legacy(tmp_path / "checkpoint_1", t5x.target_of(params))
    assert_equal(load(folder, V1_0).params, params)
    with pytest.raises(UserError, match="lacks target/decoder/layers_0/mlp/wi_0/kernel"):
        load(folder, V1_1)


def test_the_folder_above(tmp_path: Path) -> None:
    """The one checkpoint in a folder is taken; of several the newest are named."""
    params = random_params(CONFIG)
    target = t5x.target_of(params)
    (tmp_path / "run" / "train").mkdir(parents=True)
    t5x.write_legacy(tmp_path / "run" / "checkpoint_100", target)
    assert_equal(load(f"{tmp_path}/run/").params, params)
    t5x.write_single(tmp_path / "run" / "checkpoint_99", target, 2**30)
    with pytest.raises(UserError, match="holds 2 T5X checkpoints, the newest checkpoint_100, checkpoint_99; give the path of"):
        load(tmp_path / "run")
    assert_equal(load(tmp_path / "run" / "checkpoint_99").params, params)


def test_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = random_params(CONFIG)
    target = t5x.target_of(params)
    t5x.write_legacy(tmp_path / "a" / "checkpoint_1", target)
    t5x.write_orbax(tmp_path / "b" / "checkpoint_20", target)
    t5x.write_single(tmp_path / "checkpoint_3", target, 2**30)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with bucket.serve(tmp_path) as (address, ranges):
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        for path in ("a/checkpoint_1", "a", "b/checkpoint_20/", "b", "checkpoint_3"):
            assert_equal(load(f"gs://bucket/{path}").params, params)
        assert ranges  # arrays in a msgpack are read by range
        with pytest.raises(UserError, match="gs://bucket/nothing .* holds no model; give a T5X checkpoint"):
            load("gs://bucket/nothing")
        with pytest.raises(UserError, match=r"gs://bucket/a has no .*; set BackboneConfig\.vocabulary"):
            load_backbone(BackboneConfig("gs://bucket/a", CONFIG))
        chunk = tmp_path / "a" / "checkpoint_1" / "target.encoder.layers_1.mlp.wo.kernel" / "1.0"
        chunk.write_bytes(chunk.read_bytes()[:20])
        with pytest.raises(UserError, match=r"layers_1\.mlp\.wo\.kernel/1\.0.*; copy the checkpoint again"):
            load("gs://bucket/a")


def test_the_vocabulary_must_be_given(tmp_path: Path) -> None:
    folder = t5x.write_legacy(tmp_path / "checkpoint_1", t5x.target_of(random_params(CONFIG)))
    with pytest.raises(UserError, match=r"checkpoint_1 has no .*; set BackboneConfig\.vocabulary"):
        load_backbone(BackboneConfig(str(folder), CONFIG))


KERNEL = "encoder/layers_1/mlp/wo/kernel"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that the test may spoil."""
    return t5x.write_legacy(tmp_path / "checkpoint_5", t5x.target_of(random_params(CONFIG)))


def edit(folder: Path, change: Any) -> None:
    """Changes the msgpack's tree."""
    tree = msgpack.unpackb((folder / "checkpoint").read_bytes())
    change(tree)
    (folder / "checkpoint").write_bytes(msgpack.packb(tree))


def test_an_array_that_is_missing_or_too_many_is_named(folder: Path) -> None:
    target = t5x.target_of(random_params(CONFIG))
    with pytest.raises(UserError, match="checkpoint_5/checkpoint holds target/decoder/layers_2/.* and 9 more, which the T5 of"):
        load(folder, V1_1)
    with pytest.raises(UserError, match="checkpoint_5/checkpoint lacks target/decoder/layers_3/"):
        load(folder, dataclasses.replace(CONFIG, num_decoder_layers=4))
    edit(folder, lambda tree: tree["optimizer"]["target"]["encoder"].pop("encoder_norm"))
    with pytest.raises(UserError, match="checkpoint_5/checkpoint lacks target/encoder/encoder_norm/scale; it is incomplete"):
        load(folder)
    del target[KERNEL]
    with pytest.raises(UserError, match=f"checkpoint_6/state lacks target/{KERNEL};"):
        load(t5x.write_orbax(folder.parent / "checkpoint_6", target))
    scanned = t5x.target_of(random_params(CONFIG), scanned="same")
    del scanned["encoder/encoder/mlp/wo/kernel"]
    with pytest.raises(UserError, match="lacks target/encoder/encoder/mlp/wo/kernel;"):
        load(t5x.write_legacy(folder.parent / "checkpoint_7", scanned))


@pytest.mark.parametrize("scanned", ["", "same"])
def test_a_misshapen_array_is_named_with_both_shapes(scanned: str, tmp_path: Path) -> None:
    folder = t5x.write_legacy(tmp_path / "checkpoint_5", t5x.target_of(random_params(CONFIG), scanned=scanned))
    found, wanted = (r"\[24, 3, 40\]", r"\[24, 3, 48\]") if scanned else (r"\[24, 40\]", r"\[24, 48\]")
    message = rf"checkpoint_5/checkpoint: target/decoder/\w+/mlp/wi_0/kernel has the shape {found}, but T5Config wants {wanted};"
    with pytest.raises(UserError, match=message):
        load(folder, dataclasses.replace(CONFIG, d_ff=48))


def test_a_dtype_that_is_no_weight_is_named(tmp_path: Path) -> None:
    target = t5x.target_of(random_params(CONFIG))
    for dtype in ("int32", "float16"):
        target[KERNEL] = target[KERNEL].astype(dtype)
        with pytest.raises(UserError, match=f"target/{KERNEL} is {dtype}, but weights must be float32 or bfloat16"):
            load(t5x.write_legacy(tmp_path / dtype, target))


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    target = t5x.target_of(random_params(CONFIG))
    target[KERNEL] = target[KERNEL].copy()
    target[KERNEL][30, 11] = np.inf
    with pytest.raises(UserError, match=r"target\.encoder\.layers_1\.mlp\.wo\.kernel holds inf at \[30, 11\]"):
        load(t5x.write_legacy(tmp_path / "checkpoint_1", target))
    target["encoder/encoder_norm/scale"] = np.full(24, np.nan, ml_dtypes.bfloat16)
    target[KERNEL][30, 11] = 1
    with pytest.raises(UserError, match=r"target/params/encoder/encoder_norm/scale holds nan at \[0\]"):
        load(t5x.write_single(tmp_path / "checkpoint_2", target, 2**30))


@pytest.mark.parametrize("keep", [20, 0, None])
def test_a_damaged_chunk_is_named(folder: Path, keep: int | None) -> None:
    """Cut short, emptied, and missing altogether, which zarr would read as zeros."""
    chunk = folder / "target.encoder.layers_1.mlp.wo.kernel" / "1.0"
    assert chunk.exists()
    if keep is None:
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"layers_1\.mlp\.wo\.kernel/1\.0.*; copy the checkpoint again"):
        load(folder)


def test_a_folder_of_an_array_that_is_missing_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "target.encoder.layers_1.mlp.wo.kernel")
    with pytest.raises(UserError, match=r"target\.encoder\.layers_1\.mlp\.wo\.kernel.*; copy the checkpoint again"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 1, 100, 3000, -1])
def test_a_truncated_msgpack_is_named(tmp_path: Path, keep: int) -> None:
    file = t5x.write_single(tmp_path / "checkpoint_1", t5x.target_of(random_params(CONFIG)), 1000)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"checkpoint_1 is no whole T5X checkpoint \(the file ends too early\)"):
        load(file)


def test_a_checkpoint_without_target_is_refused(folder: Path, tmp_path: Path) -> None:
    edit(folder, lambda tree: tree["optimizer"].pop("target"))
    with pytest.raises(
        UserError, match="checkpoint_5/checkpoint is no T5X checkpoint, for it has no 'target' but optimizer, ver"
    ):
        load(folder)
    (tmp_path / "words").write_text("hello")
    with pytest.raises(UserError, match="words is no T5X checkpoint, for it has no 'target' but no names at all"):
        load(tmp_path / "words")
    other = t5x.write_orbax(tmp_path / "checkpoint_6", {"a/b": np.zeros(3, np.float32)}, name="trainable")
    with pytest.raises(UserError, match="checkpoint_6/state is no T5X checkpoint, for it has no zarr array of a 'target'"):
        load(other)
    (other / "state" / "manifest.ocdbt").write_bytes(b"no database")
    with pytest.raises(UserError, match="checkpoint_6/state is no whole T5X checkpoint"):
        load(other)


def test_position_biases_that_differ_between_layers_are_refused(tmp_path: Path) -> None:
    target = t5x.target_of(random_params(CONFIG), scanned="same")
    target["decoder/decoder/relpos_bias/rel_embedding"][:, 2] += 1
    with pytest.raises(
        UserError, match="target/decoder/decoder/relpos_bias/rel_embedding differs from layer to layer, as in umT5"
    ):
        load(t5x.write_legacy(tmp_path / "checkpoint_1", target))


def test_an_array_in_another_format_is_named(folder: Path) -> None:
    edit(folder, lambda tree: tree["optimizer"]["target"]["token_embedder"]["embedding"].update(driver="n5"))
    with pytest.raises(UserError, match="target/token_embedder/embedding is .*'n5'.*, which is no array of T5X's"):
        load(folder)


@pytest.mark.parametrize("path", ["gs://", "gs:///x/checkpoint_1", "gs://My Bucket/x", "gs://T5-Data/x"])
def test_a_name_that_no_bucket_has_is_told(path: str) -> None:
    with pytest.raises(UserError, match=r"cannot be opened .*give gs://BUCKET/"):
        find_t5x(path)


def test_a_weights_file_is_told_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"model\.safetensors .* is a file of a Hugging Face folder; give the folder"):
        find_t5x(str(tmp_path / "model.safetensors"))
