"""Import and export of Hugging Face folders: exact, strict, and clear about what does not fit."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
import transformers
from hf_reference import CONFIGS, V1_0, V1_1, random_hf_model, random_params, save_hf_model
from safetensors.numpy import load_file, save_file

from mpt_jax.checkpoint.backbone import load_backbone
from mpt_jax.checkpoint.export_hf import export_hf
from mpt_jax.checkpoint.import_hf import import_hf
from mpt_jax.config import BackboneConfig, T5Config
from mpt_jax.errors import UserError
from mpt_jax.models import T5, init_params, param_shapes
from mpt_jax.prompted_t5 import forward
from mpt_jax.trees import flatten


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {name: save_hf_model(random_hf_model(config), root / name) for name, config in (("v1.1", V1_1), ("v1.0", V1_0))}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A T5 1.1 folder that the test may spoil."""
    return Path(shutil.copytree(folders["v1.1"], tmp_path / "model"))


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def edit_weights(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_equal(left: Any, right: Any) -> None:
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


@pytest.mark.parametrize("name", ["v1.1-1-3-buckets", "v1.0-3-1"])
def test_export_gives_transformers_the_same_model(name: str, tmp_path: Path) -> None:
    model = random_hf_model(CONFIGS[name])
    config, params = import_hf(save_hf_model(model, tmp_path / "theirs"))
    export_hf(params, config, tmp_path / "ours")
    loaded, report = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    for key, value in state.items():
        assert torch.equal(value, loaded_state[key]), key
    inputs, targets = torch.tensor([[5, 9, 2, 0], [3, 3, 7, 8]]), torch.tensor([[4, 1], [6, 1]])
    with torch.no_grad():
        expected, found = (m(input_ids=inputs, attention_mask=inputs > 0, labels=targets).logits for m in (model, loaded))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_export_then_import_is_exact(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    params = random_params(config)
    found, again = import_hf(export_hf(params, config, tmp_path))
    assert found == config
    assert_equal(again, params)


def test_bfloat16_files_and_parameters(tmp_path: Path) -> None:
    params = random_params(V1_1)
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), params)
    export_hf(params, V1_1, tmp_path / "bf16", dtype="bfloat16")
    size = (tmp_path / "bf16" / "model.safetensors").stat().st_size
    assert size < 1.2 * 2 * sum(leaf.size for leaf in jax.tree.leaves(params))
    _, as_float32 = import_hf(tmp_path / "bf16")
    assert_equal(as_float32, jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded))
    config, as_bfloat16 = import_hf(tmp_path / "bf16", dataclasses.replace(V1_1, param_dtype="bfloat16"))
    assert config.param_dtype == "bfloat16"
    assert_equal(as_bfloat16, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(as_bfloat16)} == {np.dtype(ml_dtypes.bfloat16)}


def test_shards_and_bin_files_hold_the_same_model(folders: dict[str, Path], tmp_path: Path) -> None:
    expected = import_hf(folders["v1.1"])[1]
    model = random_hf_model(V1_1)
    sharded = save_hf_model(model, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert_equal(import_hf(sharded)[1], expected)

    old = tmp_path / "bin"
    old.mkdir()
    shutil.copy(folders["v1.1"] / "config.json", old)
    torch.save(model.state_dict(), old / "pytorch_model.bin")  # repeats the embedding under two more names, as old files do
    assert_equal(import_hf(old)[1], expected)
    torch.save({key: value.bfloat16() for key, value in model.state_dict().items()}, old / "pytorch_model.bin")
    np.testing.assert_allclose(
        flatten(import_hf(old)[1])["encoder/encoder_norm/scale"], expected["encoder"]["encoder_norm"]["scale"], rtol=0.01
    )
    (old / "pytorch_model.bin").write_bytes((old / "pytorch_model.bin").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read"):
        import_hf(old)


def test_every_leaf_comes_from_the_file(folders: dict[str, Path]) -> None:
    for name, config in (("v1.1", V1_1), ("v1.0", V1_0)):
        found, params = import_hf(folders[name])
        assert found == config
        assert flatten(params).keys() == flatten(param_shapes(config)).keys()
        stored = load_file(folders[name] / "model.safetensors")
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(tensor.size for tensor in stored.values())


REMOVABLE = ("shared.weight", "encoder.final_layer_norm.weight", "decoder.block.1.layer.1.EncDecAttention.k.weight")


@pytest.mark.parametrize("key", REMOVABLE)
def test_a_missing_tensor_is_named(folder: Path, key: str) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match=f"lacks {key}"):
        import_hf(folder)


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"encoder.block.0.adapter.weight": np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match=r"holds encoder\.block\.0\.adapter\.weight"):
        import_hf(folder)


def test_a_layer_more_than_configured_is_unexpected(folder: Path) -> None:
    edit_config(folder, num_decoder_layers=1)
    with pytest.raises(UserError, match=r"holds decoder\.block\.1\.layer"):
        import_hf(folder)


@pytest.mark.parametrize("wrong", ["shape", "transposed", "integer"])
def test_a_misshapen_tensor_is_named(folder: Path, wrong: str) -> None:
    key = "encoder.block.1.layer.1.DenseReluDense.wo.weight"

    def edit(tensors: dict[str, np.ndarray]) -> None:
        value = tensors[key]
        change = {"shape": value[:-1], "transposed": value.T, "integer": value.astype(np.int32)}
        tensors[key] = np.ascontiguousarray(change[wrong])

    edit_weights(folder, edit)
    with pytest.raises(UserError, match=f"{key} (has the shape|is int32)"):
        import_hf(folder)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        import_hf(folder)


def test_broken_shards_are_named(tmp_path: Path) -> None:
    folder = save_hf_model(random_hf_model(V1_1), tmp_path, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole, text = shard.read_bytes(), index.read_text()

    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=f"{shard.name} cannot be read"):
        import_hf(folder)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} cannot be read"):
        import_hf(folder)
    shard.write_bytes(whole)
    entries = json.loads(text)
    entries["weight_map"].pop("encoder.final_layer_norm.weight")
    index.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"encoder\.final_layer_norm\.weight, which the index does not list"):
        import_hf(folder)
    entries["weight_map"]["encoder.final_layer_norm.weight"] = next(
        name
        for name in entries["weight_map"].values()
        if name != json.loads(text)["weight_map"]["encoder.final_layer_norm.weight"]
    )
    index.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"says that encoder\.final_layer_norm\.weight is in"):
        import_hf(folder)
    index.write_text(text[:100])
    with pytest.raises(UserError, match=r"index\.json is not a readable index"):
        import_hf(folder)


def test_a_folder_without_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        import_hf(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        import_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        import_hf(folder)


def test_tied_or_untied_by_what_is_in_the_file(folders: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    # transformers 5 writes tie_word_embeddings=true for both; the pair of files differs in the tensor and in the scale
    written = json.loads((folder / "config.json").read_text())
    assert written["tie_word_embeddings"] is True
    assert written["scale_decoder_outputs"] is False
    # transformers 4 wrote one field for both
    edit_config(folder, tie_word_embeddings=False, scale_decoder_outputs=...)
    assert import_hf(folder)[0] == V1_1
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"has its own lm_head\.weight, but .* scale_decoder_outputs"):
        import_hf(folder)
    edit_config(folder, scale_decoder_outputs=False)
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"has no lm_head\.weight, but"):
        import_hf(folder)
    # T5 1.0 whose file repeats the embedding under every name that it has in PyTorch, and has a bias that nothing uses
    tied = Path(shutil.copytree(folders["v1.0"], tmp_path / "tied"))

    def repeat(tensors: dict[str, np.ndarray]) -> None:
        for name in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            tensors[name] = tensors["shared.weight"].copy()
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.zeros((32, 3), np.float32)

    edit_weights(tied, repeat)
    found, params = import_hf(tied)
    assert found == V1_0
    assert_equal(params, import_hf(folders["v1.0"])[1])
    edit_weights(tied, lambda tensors: tensors["encoder.embed_tokens.weight"].__setitem__(0, 9))
    with pytest.raises(UserError, match=r"encoder\.embed_tokens\.weight that differs from shared\.weight"):
        import_hf(tied)


def test_mt5_is_a_t5_by_another_name(tmp_path: Path) -> None:
    """A folder that transformers' MT5 writes gives its logits."""
    config = transformers.MT5Config(
        vocab_size=53, d_model=24, d_kv=5, num_heads=3, d_ff=40, num_layers=2, num_decoder_layers=2, decoder_start_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MT5ForConditionalGeneration(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(53, 24))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mt5"
    found, params = import_hf(tmp_path)
    assert found == V1_1
    inputs, targets = np.array([[5, 9, 2, 0], [3, 3, 7, 8]]), np.array([[0, 4], [0, 6]])
    batch = {"encoder_tokens": inputs, "decoder_input_tokens": targets}
    ours = forward(T5(found), params, jax.tree.map(jnp.asarray, batch), None).logits
    with torch.no_grad():
        ids, decoder = torch.tensor(inputs), torch.tensor(targets)
        theirs = model(input_ids=ids, attention_mask=ids > 0, decoder_input_ids=decoder).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * theirs.std())


def test_umt5_is_refused_by_name(folder: Path) -> None:
    edit_config(folder, model_type="umt5")
    with pytest.raises(UserError, match="has model_type='umt5'; only t5 and mt5 are supported"):
        import_hf(folder)


UNSUPPORTED = {
    "model_type": "bart",
    "feed_forward_proj": "gated-silu",
    "pad_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 5,
    "is_encoder_decoder": False,
    "d_model": -4,
    "num_layers": "two",
    "d_ff": ...,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_an_unsupported_configuration_is_named(folder: Path, field: str) -> None:
    edit_config(folder, **{field: UNSUPPORTED[field]})
    with pytest.raises(UserError, match=rf"config\.json has {field}="):
        import_hf(folder)


def backbone_config(checkpoint: str, vocabulary: str = "", config: T5Config = V1_1) -> BackboneConfig:
    return BackboneConfig(checkpoint, config, vocabulary)


def test_backbone_from_a_folder(folder: Path) -> None:
    (folder / "spiece.model").write_bytes(b"vocabulary")
    backbone = load_backbone(backbone_config(str(folder)))
    assert backbone.model.config == V1_1
    assert backbone.vocabulary == str(folder / "spiece.model")
    assert_equal(backbone.params, import_hf(folder)[1])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(backbone.params))

    half = dataclasses.replace(V1_1, dtype="bfloat16", param_dtype="bfloat16")
    in_half = load_backbone(backbone_config(str(folder), config=half))
    assert in_half.fingerprint == backbone.fingerprint  # the checkpoint's, not its rounding's
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(in_half.params)} == {"bfloat16"}

    edit_weights(folder, lambda tensors: tensors["shared.weight"].__setitem__((3, 3), 0.5))
    assert load_backbone(backbone_config(str(folder))).fingerprint != backbone.fingerprint


def test_backbone_from_a_run_that_tuned_a_model(tmp_path: Path) -> None:
    vocabulary = tiny.make_vocabulary(tmp_path / "words.model")
    params = random_params(V1_1)
    export_hf(params, V1_1, tmp_path / "run" / "model", vocabulary=vocabulary)
    backbone = load_backbone(backbone_config(str(tmp_path / "run")))
    assert_equal(backbone.params, params)
    assert Path(backbone.vocabulary).read_bytes() == vocabulary.read_bytes()


def test_backbone_from_scratch_only_when_asked_for(tmp_path: Path) -> None:
    vocabulary = tmp_path / "words.model"
    vocabulary.write_bytes(b"vocabulary")
    scratch = backbone_config("scratch", str(vocabulary))
    assert_equal(load_backbone(scratch, jax.random.key(3)).params, init_params(V1_1, jax.random.key(3)))
    with pytest.raises(UserError, match="'scratch' is for training only"):
        load_backbone(scratch)
    with pytest.raises(UserError, match=r"set BackboneConfig\.vocabulary"):
        load_backbone(backbone_config("scratch"), jax.random.key(3))


def test_backbone_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_heads=3, not 4"):
        load_backbone(backbone_config(str(folder), __file__, dataclasses.replace(V1_1, num_heads=4)))
    with pytest.raises(UserError, match="activation='gated-gelu', not 'relu'; tie_embeddings=False, not True"):
        load_backbone(backbone_config(str(folder), __file__, V1_0))
    with pytest.raises(UserError, match="no embedded checkpoint 'minni'"):
        load_backbone(backbone_config("embedded:minni"))
    with pytest.raises(UserError, match=r"'/no/such/folder' .* does not exist"):
        load_backbone(backbone_config("/no/such/folder"))
    with pytest.raises(UserError, match=r"has no sentencepiece\.model or spiece\.model"):
        load_backbone(backbone_config(str(folder)))
    with pytest.raises(UserError, match=r"vocabulary '/no/words\.model' does not exist"):
        load_backbone(backbone_config(str(folder), "/no/words.model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty \(INITIAL_CHECKPOINT_PATH\) holds no model"):
        load_backbone(backbone_config(str(tmp_path / "empty")))


def test_export_to_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        export_hf(random_params(V1_1), V1_1, tmp_path / "file" / "model")


@pytest.mark.parametrize("state", [{"state_dict": {}, "epoch": 3}, [1]])
def test_a_bin_with_more_than_tensors_is_told(state: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin holds .* beside tensors; save the model's state_dict alone"):
        import_hf(folder)
