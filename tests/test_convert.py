"""Backbones of our own form, and the ways in and out: exact, streamed, checked at each load."""

import dataclasses
import gc
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import bucket
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import t5x_reference as t5x
import tiny
import transformers
from hf_reference import CONFIGS, V1_1, random_params
from safetensors.numpy import load_file, save_file
from t5x_reference import assert_equal

from mpt_jax import cli
from mpt_jax.checkpoint import leaves as leaves_module
from mpt_jax.checkpoint import own, storage
from mpt_jax.checkpoint.backbone import load_backbone, open_checkpoint
from mpt_jax.checkpoint.export_hf import export_hf, write_hf
from mpt_jax.checkpoint.import_hf import import_hf, open_hf
from mpt_jax.checkpoint.leaves import Leaf, in_memory
from mpt_jax.config import BackboneConfig, T5Config
from mpt_jax.convert import run_export_model, run_import
from mpt_jax.data.vocabulary import BYTES, EOS_ID, load_vocabulary
from mpt_jax.errors import UserError
from mpt_jax.files import UNFINISHED
from mpt_jax.trees import fingerprint, flatten

ROOT = Path(__file__).parent.parent
# Large enough for the vocabulary of the tiny tasks.
CONFIG = dataclasses.replace(V1_1, vocab_size=256, num_decoder_layers=3)
KERNEL = "encoder/layers/mlp/wo/kernel"


def load(checkpoint: Path | str, config: T5Config = CONFIG, vocabulary: str = __file__) -> Any:
    return load_backbone(BackboneConfig(str(checkpoint), config, vocabulary))


def rounded(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A backbone of ours that the test may spoil."""
    run_import(str(export_hf(random_params(CONFIG), CONFIG, tmp_path / "hf")), str(tmp_path / "own"))
    return tmp_path / "own"


@pytest.mark.parametrize("name", ["v1.1-1-3-buckets", "v1.0-3-1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_and_out_again_is_exact(name: str, dtype: str, tmp_path: Path) -> None:
    """Hugging Face → ours → Hugging Face: the same tensors in the same dtype; ours is what Orbax writes and reads."""
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    params = params if dtype == "float32" else rounded(params)
    export_hf(params, config, tmp_path / "first", dtype=dtype)
    run_import(str(tmp_path / "first"), str(tmp_path / "own"))
    run_export_model(str(tmp_path / "own"), str(tmp_path / "second"))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert {key: value.tobytes() for key, value in first.items()} == {key: value.tobytes() for key, value in second.items()}
    assert json.loads((tmp_path / "first" / "config.json").read_text()) == json.loads(
        (tmp_path / "second" / "config.json").read_text()
    )

    card = own.read_card(str(tmp_path / "own"))
    assert card is not None and card.architecture == config and card.fingerprint == fingerprint(params)
    assert card.dtype == dtype
    for param_dtype in ("float32", "bfloat16"):
        found = load(tmp_path / "own", dataclasses.replace(config, param_dtype=param_dtype))
        assert found.fingerprint == card.fingerprint
        assert_equal(found.params, jax.tree.map(lambda leaf, to=param_dtype: leaf.astype(to), params))
    assert_equal(ocp.load(str(tmp_path / "own" / own.PARAMS))["params"], params)


NAMES = {
    "layer by layer": {},
    "heads": {"heads": CONFIG},
    "flaxformer": {"scanned": "same", "heads": CONFIG},
    "scalable": {"scanned": "layers", "heads": CONFIG},
    "scanned, joined": {"scanned": "same"},
}


@pytest.mark.parametrize("names", NAMES)
def test_a_t5x_checkpoint_shows_its_architecture(names: str, tmp_path: Path) -> None:
    params = random_params(CONFIG)
    t5x.write_legacy(tmp_path / "checkpoint_5", t5x.target_of(params, **NAMES[names]))
    assert open_checkpoint(str(tmp_path / "checkpoint_5")).config == CONFIG
    run_import(str(tmp_path), str(tmp_path / "own"))
    assert_equal(load(tmp_path / "own").params, params)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_shown(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    t5x.write_orbax(tmp_path / "checkpoint_1", t5x.target_of(random_params(config)))
    shown = {"relpos_max_distance": 128, "norm_epsilon": 1e-6}  # T5X's, which arrays do not show
    assert open_checkpoint(str(tmp_path / "checkpoint_1")).config == dataclasses.replace(config, **shown)


def test_what_is_no_t5_shows_none(tmp_path: Path) -> None:
    t5x.write_legacy(tmp_path / "checkpoint_1", {"some/kernel": np.ones((3, 4), np.float32)})
    with pytest.raises(UserError, match="checkpoint_1/checkpoint is no T5, for it has no target/…/token_embedder/embedding"):
        open_checkpoint(str(tmp_path / "checkpoint_1"))


def test_shards_are_read_by_transformers(tmp_path: Path) -> None:
    params = random_params(V1_1)
    leaves = in_memory(flatten(params))
    write_hf(leaves, V1_1, tmp_path / "sharded", shard_bytes=20_000)
    names = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / "sharded" / name).values()) for name in names]
    assert max(sizes) <= 20_000 and sum(sizes) == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert_equal(import_hf(tmp_path / "sharded")[1], params)
    write_hf(leaves, V1_1, tmp_path / "whole")
    models = [transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("sharded", "whole")]
    left, right = (model.state_dict() for model in models)
    assert left.keys() == right.keys() and all((left[key] == right[key]).all() for key in left)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`import SRC DST` and `export SRC DST`, with the vocabulary that lies beside the weights, or is given."""
    tiny.make(tmp_path)
    assert cli.main(["import", f"{tmp_path}/model", f"{tmp_path}/own"]) == 0
    assert cli.main(["export", f"{tmp_path}/own", f"{tmp_path}/back"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/own: T5 1.1, " in out and f"{tmp_path}/back: " in out
    original = (tmp_path / "model" / "spiece.model").read_bytes()
    for copy in ("own/sentencepiece.model", "back/spiece.model"):
        assert (tmp_path / copy).read_bytes() == original
    backbone = load(tmp_path / "own", tiny.CONFIG, vocabulary="")
    assert backbone.vocabulary == str(tmp_path / "own" / "sentencepiece.model")
    assert backbone.fingerprint == load(tmp_path / "model", tiny.CONFIG, vocabulary="").fingerprint

    (tmp_path / "model" / "spiece.model").unlink()
    assert cli.main(["import", f"{tmp_path}/model", f"{tmp_path}/bare"]) == 0
    assert "It has no vocabulary" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"bare has no sentencepiece\.model .*; set BackboneConfig\.vocabulary"):
        load(tmp_path / "bare", tiny.CONFIG, vocabulary="")
    given = f"--vocabulary={tmp_path}/vocabulary.model"
    assert cli.main(["import", f"{tmp_path}/model", f"{tmp_path}/dressed", given]) == 0
    assert load(tmp_path / "dressed", tiny.CONFIG, vocabulary="").vocabulary.endswith("dressed/sentencepiece.model")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["import", "embedded:mini"], "import needs two paths"),
        (["import", "embedded:mini", "{own}"], "own is not empty"),
        (["export", "{own}", "{own}"], "own is not empty"),
        (["export", "{own}", "gs://bucket/model"], "written locally"),
        (["export", "{own}", "new", "--gin.MODEL_DIR=x"], "either gin flags, for prompts, or two paths"),
        (["export", "{own}"], "either gin flags, for prompts, or two paths"),
        (["import", "{own}", "gs://bucket/model"], "written locally; give a local folder, then copy it: gcloud storage cp -r"),
        (["import", "{own}", "new", "--gin.MODEL_DIR=x"], "import takes no gin flags"),
        (["import", "{own}", "new", "--gin_file=/no/such.gin"], "import takes no gin flags"),
        (["import", "/no/such", "new"], "'/no/such' (SRC) does not exist"),
        (["import", "{own}", "new", "--vocabulary=/no/words.model"], "--vocabulary '/no/words.model' does not exist"),
        (["import", "embedded:mini", "/proc/no/own"], "/proc/no"),
        (["import", "embedded:mini", "{own}/card.json/new"], "Not a directory"),
        (["train", "--gin_file=gin/backbones/mini.gin", "--vocabulary=bytes"], "train --gin.BackboneConfig.vocabulary"),
        (["train", "stray"], "train takes no 'stray'"),
    ],
)
def test_mistakes_are_told(arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([argument.format(own=folder) for argument in arguments]) == cli.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def edit_card(folder: Path, **values: Any) -> None:
    card = json.loads((folder / own.CARD).read_text())
    (folder / own.CARD).write_text(json.dumps(card | values))


def chunk_of(folder: Path) -> Path:
    return next((folder / own.PARAMS / "state" / f"params.{KERNEL.replace('/', '.')}").glob("1.*"))


def test_a_changed_weight_is_found_at_each_load(folder: Path) -> None:
    chunk = chunk_of(folder)
    values = np.fromfile(chunk, np.float32)
    values[5] += 1
    values.tofile(chunk)
    with pytest.raises(UserError, match=f"own was changed after it was written: {KERNEL}; import the backbone again"):
        load(folder)


def test_a_damaged_file_is_named(folder: Path) -> None:
    chunk = chunk_of(folder)
    chunk.write_bytes(chunk.read_bytes()[:40])
    with pytest.raises(UserError, match=r"params\.encoder\.layers\.mlp\.wo\.kernel.*; copy the checkpoint again"):
        load(folder)
    chunk.unlink()
    with pytest.raises(UserError, match=r"params\.encoder\.layers\.mlp\.wo\.kernel.*; copy the checkpoint again"):
        load(folder)
    shutil.rmtree(chunk.parent)
    with pytest.raises(UserError, match=f"does not hold what .*card.json says of {KERNEL}"):
        load(folder)
    shutil.rmtree(folder / own.PARAMS)
    with pytest.raises(UserError, match="has a card.json but no whole Orbax checkpoint in params"):
        load(folder)


def test_a_damaged_card_is_told(folder: Path) -> None:
    text = (folder / own.CARD).read_text()
    edit_card(folder, fingerprint="0" * 16)
    with pytest.raises(UserError, match="its digests do not make its fingerprint"):
        load(folder)
    edit_card(folder, architecture={"vocab_size": 3})
    with pytest.raises(UserError, match=r"card\.json is damaged"):
        load(folder)
    edit_card(folder, digests=["none"])
    with pytest.raises(UserError, match=r"card\.json is damaged"):
        load(folder)
    (folder / own.CARD).write_text(text[:100])
    with pytest.raises(UserError, match=r"card\.json is damaged \(it is no whole JSON\)"):
        load(folder)


def test_an_import_that_was_killed_is_begun_anew(tmp_path: Path) -> None:
    """What it left is no backbone, and the same command succeeds."""
    command = [sys.executable, "-m", "mpt_jax", "import", "embedded:mini", f"{tmp_path}/own"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list((tmp_path / "own" / UNFINISHED).glob("params*")):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "own").iterdir()] == [UNFINISHED]
    with pytest.raises(UserError, match="holds no model"):
        load(tmp_path / "own")
    assert cli.main(command[3:]) == 0
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["card.json", "params", "sentencepiece.model"]


def test_what_failed_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = random_params(CONFIG)
    params["token_embedder"]["embedding"][3, 2] = np.nan  # the last leaf
    export_hf(params, CONFIG, tmp_path / "hf")
    for command in ("import", "export"):
        arguments = [command, f"{tmp_path}/hf", f"{tmp_path}/new"]
        assert cli.main(arguments) == cli.EXIT_USER_ERROR
        assert "shared.weight holds nan at [3, 2]" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    export_hf(random_params(CONFIG), CONFIG, tmp_path / "hf")
    assert cli.main(arguments) == 0
    for name in ("params", "model-00001-of-00002.safetensors"):  # of somebody else
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        with pytest.raises(UserError, match="is not empty"):
            run_import(f"{tmp_path}/hf", f"{tmp_path}/{name}")


def test_paths_are_those_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two lines, which have relative paths, in an empty folder; and a path from HOME."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if " t5-xl-lm-adapt xl " in line or " xl xl-" in line]
    assert len(lines) == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    export_hf(random_params(CONFIG), CONFIG, "t5-xl-lm-adapt")
    for line in lines:
        assert cli.main(shlex.split(line, comments=True)[3:]) == 0
    assert load("xl").fingerprint == load("t5-xl-lm-adapt").fingerprint == load("xl-for-transformers").fingerprint
    run_import("xl", "~/xl")
    assert load(tmp_path / "home" / "xl").fingerprint == load("xl").fingerprint


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    save_file({key: change(key, value) for key, value in load_file(file).items()}, file, metadata={"format": "pt"})


def test_other_dtypes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """float16 becomes float32 exactly; float64 is rounded, and what float32 cannot hold is refused by every reader."""
    export_hf(random_params(CONFIG), CONFIG, tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda key, value: value.astype(np.float16))
    half = load(tmp_path / "hf")
    for command in ("import", "export"):
        assert cli.main([command, f"{tmp_path}/hf", f"{tmp_path}/{command}"]) == 0
        assert "float32 (from float16)" in capsys.readouterr().out
        assert load(tmp_path / command).fingerprint == half.fingerprint
    double = 1 / 3
    rewrite(tmp_path / "hf", lambda key, value: np.full_like(value, double, np.float64) if "wo" in key else value)
    for command in ("import", "export"):
        assert cli.main([command, f"{tmp_path}/hf", f"{tmp_path}/{command}64"]) == 0
        assert "float32 (rounded from float16, float64)" in capsys.readouterr().out
        found = flatten(load(tmp_path / f"{command}64").params)[KERNEL]
        np.testing.assert_array_equal(found, np.full(found.shape, double, np.float32))
    rewrite(tmp_path / "hf", lambda key, value: value * 3e300 if value.dtype == np.float64 else value)
    for command in ("import", "export"):
        assert cli.main([command, f"{tmp_path}/hf", f"{tmp_path}/{command}300"]) == cli.EXIT_USER_ERROR
        assert "has a weight of size 1e+300, which float32 cannot hold" in capsys.readouterr().err
    with pytest.raises(UserError, match="has a weight of size 1e.300, which float32 cannot hold"):
        load(tmp_path / "hf")


def test_what_bfloat16_cannot_hold_is_refused(tmp_path: Path) -> None:
    """The largest float32 would be rounded to infinity."""
    params = random_params(CONFIG)
    params["encoder"]["layers"]["mlp"]["wo"]["kernel"][0, 0, 0] = np.finfo(np.float32).max
    export_hf(params, CONFIG, tmp_path / "hf")
    assert np.isfinite(load(tmp_path / "hf").params["encoder"]["layers"]["mlp"]["wo"]["kernel"]).all()
    half = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    for read in (lambda: load(tmp_path / "hf", half), lambda: import_hf(tmp_path / "hf", half)):
        with pytest.raises(UserError, match=rf"{KERNEL} has a weight of size 3\.4.*e\+38, which bfloat16 cannot hold"):
            read()


def test_what_t5x_does_not_say_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """UL2's checkpoints look like a T5 1.1's but for the function of the gate."""
    t5x.write_legacy(tmp_path / "checkpoint_5", t5x.target_of(random_params(CONFIG)))
    assert cli.main(["import", f"{tmp_path}/checkpoint_5", f"{tmp_path}/own"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Assumed")]
    card = own.read_card(str(tmp_path / "own"))
    assert card is not None and len(told) == 1 and card.assumed in told[0]
    assert "gelu" in card.assumed and "128" in card.assumed and "1e-6" in card.assumed
    assert cli.main(["export", f"{tmp_path}/own", f"{tmp_path}/hf"]) == 0
    assert card.assumed in capsys.readouterr().out
    assert cli.main(["import", f"{tmp_path}/hf", f"{tmp_path}/again"]) == 0  # this one says it
    assert "Assumed" not in capsys.readouterr().out


MISSHAPEN = {
    "embedding": ("", {"token_embedder/embedding": (4, 8, 2)}, "token_embedder/embedding has the shape [4, 8, 2]"),
    "biases": ("", {"encoder/relpos_bias/rel_embedding": (4,), "decoder/relpos_bias/rel_embedding": (4,)}, "but a T5's has 2"),
    "query": ("", {"encoder/layers_0/attention/query/kernel": (4,)}, "query/kernel has the shape [4]"),
    "scanned query": ("same", {"encoder/encoder/attention/query/kernel": (4, 3)}, "has the shape [4, 3], but a T5's has 3 axes"),
    "heads": ("", {"decoder/relpos_bias/rel_embedding": (99, 8)}, "shows no T5: T5Config.d_kv must be positive"),
    "wo": ("same", {"encoder/encoder/mlp/wo/kernel": (4,)}, "wo/kernel has the shape [4], but a T5's has 3 axes"),
    "wi": ("", {"decoder/layers_0/mlp/wi_0/kernel": (4,)}, "wi_0/kernel has the shape [4]"),
}


@pytest.mark.parametrize("name", MISSHAPEN)
def test_shapes_of_no_t5_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scanned, changes, words = MISSHAPEN[name]
    target = t5x.target_of(random_params(CONFIG), scanned=scanned)
    assert changes.keys() <= target.keys()
    t5x.write_single(
        tmp_path / "checkpoint_1", target | {key: np.ones(shape, np.float32) for key, shape in changes.items()}, 2**30
    )
    assert cli.main(["import", f"{tmp_path}/checkpoint_1", f"{tmp_path}/own"]) == cli.EXIT_USER_ERROR
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["added sentinels", "own sentinels", "bytes"])
def test_transformers_makes_the_right_tokenizer(kind: str, tmp_path: Path) -> None:
    """Of an exported folder, with as many ids as ours has, and the same ones."""
    config, given = tiny.CONFIG, BYTES
    if kind == "bytes":
        config = dataclasses.replace(config, vocab_size=384)
    else:
        given = str(tiny.make_vocabulary(tmp_path / "vocabulary.model"))
    if kind == "own sentinels":
        given = str(tiny.with_sentinels(Path(given), tmp_path / "whole.model"))
    export_hf(random_params(config), config, tmp_path / "hf")
    assert cli.main(["export", f"--vocabulary={given}", f"{tmp_path}/hf", f"{tmp_path}/out"]) == 0
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), load_vocabulary(given)
    text = "the food is good and the dog is red"
    assert theirs(text).input_ids == [*ours.encode(text), EOS_ID]
    if kind != "bytes":
        assert len(theirs) == ours.vocab_size
        for number in (0, 57, 99):
            assert theirs(f"<extra_id_{number}>").input_ids == [ours.vocab_size - 1 - number, EOS_ID]
            assert theirs(f"<extra_id_{number}>").input_ids == [*ours.encode(f"<extra_id_{number}>"), EOS_ID]


def test_a_changed_vocabulary_is_found(tmp_path: Path) -> None:
    tiny.make(tmp_path)
    run_import(f"{tmp_path}/model", f"{tmp_path}/own")
    file = tmp_path / "own" / "sentencepiece.model"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"own/sentencepiece\.model was changed after it was written; import the backbone again"):
        load(tmp_path / "own", tiny.CONFIG, vocabulary="")
    file.unlink()
    with pytest.raises(UserError, match=r"INITIAL_CHECKPOINT_PATH '.*own/sentencepiece\.model' does not exist"):
        load(tmp_path / "own", tiny.CONFIG, vocabulary="")
    with pytest.raises(UserError, match=r"^SRC '.*own/sentencepiece\.model' does not exist"):
        run_export_model(f"{tmp_path}/own", f"{tmp_path}/out")
    load(tmp_path / "own", tiny.CONFIG, vocabulary=f"{tmp_path}/vocabulary.model")  # another one may be given


@pytest.mark.parametrize("text", ["[1]", "not json", '{"format": 3}', ""])
def test_files_of_others_do_not_disturb(text: str, tmp_path: Path) -> None:
    tiny.make(tmp_path)
    for name in ("card.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_text(text)
    assert load(tmp_path / "model", tiny.CONFIG, vocabulary="").vocabulary.endswith("model/spiece.model")
    (tmp_path / "model" / "spiece.model").unlink()
    with pytest.raises(UserError, match=r"has no sentencepiece\.model or spiece\.model; set BackboneConfig\.vocabulary"):
        load(tmp_path / "model", tiny.CONFIG, vocabulary="")


def traced_peak(run: Any) -> int:
    """Bytes of arrays that a call had at most."""
    gc.collect()
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


LARGE = dataclasses.replace(CONFIG, d_ff=20_000, num_encoder_layers=4, num_decoder_layers=4)
LEAF = 4 * 4 * 20_000 * 24  # bytes of the largest leaf, of which LARGE has six


def test_one_leaf_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves_module, "BLOCK", LEAF // 40)
    export_hf(random_params(LARGE), LARGE, tmp_path / "hf")
    run_import(f"{tmp_path}/hf", f"{tmp_path}/warm")
    # Beside the leaf one of its four layers, as read and as our tree has it.
    assert traced_peak(lambda: run_import(f"{tmp_path}/hf", f"{tmp_path}/own")) < 1.75 * LEAF


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    leaves = open_hf(export_hf(random_params(LARGE), LARGE, tmp_path / "hf"))[1]
    assert traced_peak(lambda: write_hf(leaves, LARGE, tmp_path / "out", shard_bytes=LEAF)) < 1.6 * LEAF
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5


def test_layers_that_lie_together_are_read_once(tmp_path: Path) -> None:
    """As in a scanned T5X checkpoint, in whose chunks a layer is a slice."""
    reads: list[int] = []

    def counted(leaf: Leaf, together: int) -> Leaf:
        def read(index: Any) -> np.ndarray:
            values = leaf.read(index)
            rows = min(-(-index[0].stop // together) * together, leaf.shape[0]) - index[0].start // together * together
            reads.append(values.size // len(values) * rows)
            return values

        return dataclasses.replace(leaf, chunks=(together, *leaf.chunks[1:]), read=read)

    params = random_params(CONFIG)
    lazy = in_memory(flatten(params))
    lazy = {path: counted(leaf, {2: 2, 3: 2}.get(leaf.shape[0], 1)) for path, leaf in lazy.items()}
    write_hf(lazy, CONFIG, tmp_path / "out")
    assert_equal(import_hf(tmp_path / "out")[1], params)
    assert sum(reads) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_another_architecture_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="own has num_decoder_layers=3, not 4 as T5Config says"):
        load(folder, dataclasses.replace(CONFIG, num_decoder_layers=4))


def test_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's and our own folders from gs://, their vocabulary included; of a tensor only the rows that are asked for."""
    tiny.make(tmp_path)
    params = import_hf(tmp_path / "model")[1]
    write_hf(in_memory(flatten(params)), tiny.CONFIG, tmp_path / "sharded", shard_bytes=40_000)
    write_hf(in_memory(flatten(rounded(params))), tiny.CONFIG, tmp_path / "half", dtype="bfloat16")
    run_import(f"{tmp_path}/model", f"{tmp_path}/own")
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "old")
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"weights")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with bucket.serve(tmp_path) as (address, ranges):
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        for name in ("model", "own"):
            backbone = load(f"gs://bucket/{name}/", tiny.CONFIG, vocabulary="")
            assert_equal(backbone.params, params)
            assert Path(backbone.vocabulary).read_bytes() == (tmp_path / "vocabulary.model").read_bytes()
            assert backbone.vocabulary.startswith(str(tmp_path / "home"))
        given = load("gs://bucket/sharded", tiny.CONFIG, vocabulary="gs://bucket/vocabulary.model")
        assert_equal(given.params, params)
        assert Path(given.vocabulary).read_bytes() == (tmp_path / "vocabulary.model").read_bytes()
        half = dataclasses.replace(tiny.CONFIG, param_dtype="bfloat16")
        assert_equal(load("gs://bucket/half", half).params, rounded(params))

        (tmp_path / "file").touch()
        with pytest.MonkeyPatch.context() as elsewhere:
            elsewhere.setenv("HOME", str(tmp_path / "file"))
            with pytest.raises(UserError, match=r"spiece\.model .* cannot be copied to .*; set HOME to a folder"):
                load("gs://bucket/model", tiny.CONFIG, vocabulary="")
            load("gs://bucket/model", tiny.CONFIG, vocabulary=f"{tmp_path}/vocabulary.model")  # then none is copied

        ranges.clear()
        leaf = open_checkpoint("gs://bucket/model").leaves["token_embedder/embedding"]
        ranges.clear()
        leaf.read((slice(3, 5), slice(0, tiny.CONFIG.d_model)))
        assert sum(ranges) == 2 * 4 * tiny.CONFIG.d_model

        with pytest.raises(
            UserError, match=r"gs://bucket/old/pytorch_model\.bin is a PyTorch file, which can only be read locally"
        ):
            load("gs://bucket/old", tiny.CONFIG)
        with pytest.raises(UserError, match=r"BackboneConfig\.vocabulary 'gs://bucket/nothing\.model' does not exist"):
            load("gs://bucket/model", tiny.CONFIG, vocabulary="gs://bucket/nothing.model")
        weights = tmp_path / "model" / "model.safetensors"
        for keep in (0, 4, 1000, weights.stat().st_size - 1):
            weights.write_bytes(weights.read_bytes()[:keep])
            with pytest.raises(UserError, match=r"gs://bucket/model/model\.safetensors cannot be read"):
                load("gs://bucket/model", tiny.CONFIG)
            export_hf(params, tiny.CONFIG, tmp_path / "model")


def test_a_bucket_that_does_not_answer_is_told_of_and_given_up(monkeypatch, caplog):
    """The server takes the connection and says nothing; by default the first line comes after 5 s, the end within a minute."""
    assert storage.PATIENCE <= 5 and storage.DEADLINE <= 60
    monkeypatch.setattr(storage, "PATIENCE", 0.1)
    monkeypatch.setattr(storage, "DEADLINE", 0.3)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match=r"gs://bucket/silent/card\.json .* has not answered"):
            load("gs://bucket/silent", tiny.CONFIG)
    assert "waiting for gs://bucket/silent/card.json" in caplog.text
