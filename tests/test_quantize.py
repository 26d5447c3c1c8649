"""int8 kernels: how far they are from the weights, and that prompts learn on them what they learn on the floats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mpt_jax.checkpoint import leaves
from mpt_jax.checkpoint.backbone import load_backbone
from mpt_jax.config import BackboneConfig, LossConfig, PromptConfig
from mpt_jax.data.vocabulary import load_vocabulary
from mpt_jax.decoding import greedy
from mpt_jax.distill import make_loss
from mpt_jax.errors import UserError
from mpt_jax.models.quantize import quantize, quantize_params
from mpt_jax.models.t5 import T5, count_parameters, init_params, param_shapes
from mpt_jax.prompts import build_prompt
from mpt_jax.train import run_training
from mpt_jax.trees import flatten

SENTENCES = [
    ("the teacher gave the boy a book because he had asked for it", "the boy had asked for a book"),
    ("nobody in the village had seen the river so high", "the river was high"),
    ("she left the house before the rain began", "it rained after she had left"),
    ("most of the soldiers were tired and hungry", "the soldiers"),
]


def test_a_weight_is_off_by_half_a_step_at_most():
    kernel = np.random.default_rng(0).normal(size=(3, 50, 7)).astype(np.float32) * np.geomspace(1e-3, 1e3, 7, dtype=np.float32)
    kernel[1, :, 2] = 0
    values, scale = quantize(kernel)
    assert values.dtype == np.int8 and scale.shape == (3, 7)
    error = np.abs(values * scale[:, None, :] - kernel)
    assert (error <= 0.5001 * scale[:, None, :]).all()
    assert (np.abs(values).max(axis=1)[scale != 1] == 127).all(), "each channel uses the whole range"
    assert (values[1, :, 2] == 0).all()


@pytest.mark.parametrize("architecture", [tiny.CONFIG, dataclasses.replace(tiny.CONFIG, activation="relu", tie_embeddings=True)])
def test_scaling_the_product_is_scaling_the_weights(architecture):
    """Logits and cached decoding equal those of the float model with the weights q · s."""
    params = init_params(architecture, jax.random.key(0))
    model = T5(dataclasses.replace(architecture, param_dtype="int8"))
    small = quantize_params(params)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, param_shapes(model.config))
    flat = flatten(small)
    rounded = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf
            if path[-1].key != "kernel"
            else flat["/".join(p.key for p in path)] * flat["/".join(p.key for p in path) + "_scale"][..., None, :]
        ),
        params,
    )
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(3, 200, (2, 9)), rng.integers(3, 200, (2, 5))
    expected = T5(architecture).apply({"params": rounded}, tokens, targets)
    np.testing.assert_allclose(model.apply({"params": small}, tokens, targets), expected, atol=2e-5 * np.abs(expected).max())
    mask = np.ones((2, 9), np.int32)
    found = []
    for t5, weights in ((model, small), (T5(architecture), rounded)):
        x = t5.apply({"params": weights}, tokens, method="embed")
        encoded = t5.apply({"params": weights}, x, mask, method="encode").output
        found.append(greedy(t5, weights, encoded, mask, 6))
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=1e-4)


def test_mini_loses_no_more_than_a_hundredth_and_teaches_a_prompt_the_same():
    """On real sentences: the loss within 1 %, and the direction of the prompt's gradient (cosine above 0.99)."""
    architecture = tiny_mini()
    backbone = load_backbone(BackboneConfig("embedded:mini", architecture))
    vocabulary = load_vocabulary(backbone.vocabulary)
    batch = make_batch(vocabulary)
    prompt = {"prompt": np.asarray(backbone.params["token_embedder"]["embedding"])[None, 100:120]}
    small = quantize_params(jax.device_get(backbone.params))
    values = []
    for dtype, params in (("float32", backbone.params), ("int8", small)):
        model = T5(dataclasses.replace(architecture, param_dtype=dtype))
        loss = make_loss(model, build_prompt(PromptConfig(length=20), (0,), architecture.d_model), LossConfig(), (0,))
        run = jax.jit(jax.value_and_grad(lambda prompt, params, loss=loss: loss(prompt, {"backbone": params}, batch, None)[0]))
        values.append(run(prompt, params))
    (exact, gradient), (rounded, other) = values
    assert abs(rounded - exact) < 0.01 * exact
    a, b = np.ravel(gradient["prompt"]), np.ravel(other["prompt"])
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99


def test_kernels_are_quantised_as_they_are_read(monkeypatch, tmp_path):
    """Block by block, whatever the blocks are: as the whole kernels would be; what is no kernel, and the fingerprint, as ever."""
    monkeypatch.setattr(leaves, "BLOCK", 100)
    folder = tiny.make(tmp_path)
    whole = load_backbone(BackboneConfig(str(folder / "model"), tiny.CONFIG, str(folder / "vocabulary.model")))
    architecture = dataclasses.replace(tiny.CONFIG, param_dtype="int8")
    loaded = load_backbone(BackboneConfig(str(folder / "model"), architecture, str(folder / "vocabulary.model")))
    assert loaded.fingerprint == whole.fingerprint
    expected = flatten(quantize_params(jax.device_get(whole.params)))
    assert flatten(loaded.params).keys() == expected.keys()
    for path, leaf in flatten(loaded.params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
        assert leaf.dtype == expected[path].dtype, path


@pytest.mark.parametrize("method", ["plain", "mpt"])
def test_a_prompt_is_trained_and_scored_on_int8(tmp_path, method):
    folder = tiny.make(tmp_path)
    architecture = dataclasses.replace(tiny.CONFIG, param_dtype="int8")
    config = tiny.experiment(folder, "run", method=method, architecture=architecture, train={"eval_period": 4})
    before = load_backbone(config.backbone)
    result = run_training(config, before)
    assert np.isfinite(result.scores).all()
    for path, leaf in flatten(load_backbone(config.backbone).params).items():
        np.testing.assert_array_equal(leaf, flatten(before.params)[path])


def tiny_mini():
    from mpt_jax.gin_bindings import parse

    flags = ["MIXTURE_OR_TASK_NAME=x", "MODEL_DIR=x", "TRAIN_STEPS=1"]
    return parse(["gin/backbones/mini.gin"], flags).experiment().backbone.architecture


def make_batch(vocabulary):
    rows = [[np.asarray([*vocabulary.encode(text), 1]) for text in pair] for pair in SENTENCES]
    lengths = [max(len(row[n]) for row in rows) for n in (0, 1)]
    inputs, targets = (np.stack([np.pad(row[n], (0, lengths[n] - len(row[n]))) for row in rows]).astype(np.int32) for n in (0, 1))
    return {
        "encoder_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "loss_weights": (targets > 0).astype(np.float32),
        "task_ids": np.zeros(len(rows), np.int32),
    }


def test_xxl_needs_less_than_11_5_gib():
    from mpt_jax.gin_bindings import parse

    flags = ["MIXTURE_OR_TASK_NAME=x", "MODEL_DIR=x", "TRAIN_STEPS=1", "INITIAL_CHECKPOINT_PATH=x", "T5Config.param_dtype=int8"]
    architecture = parse(["gin/backbones/t5_1_1_xxl.gin"], flags).experiment().backbone.architecture
    shapes = jax.tree.leaves(param_shapes(architecture))
    assert sum(shape.size * shape.dtype.itemsize for shape in shapes) < 11.5 * 2**30
    scales = sum(shape.size for shape in shapes) - count_parameters(dataclasses.replace(architecture, param_dtype="bfloat16"))
    assert 0 < scales < 10_000_000


@pytest.mark.parametrize("change", [{"prompt": {"method": "none"}}, {"backbone": {"checkpoint": "scratch"}}])
def test_weights_in_int8_cannot_be_trained(tmp_path, change):
    config = tiny.experiment(tmp_path, "run", architecture=dataclasses.replace(tiny.CONFIG, param_dtype="int8"))
    with pytest.raises(UserError, match="param_dtype is 'int8', but"):
        tiny.replace(config, **change).validate()
