"""Run by test_partitioning.py in a process with 8 simulated devices: every mesh computes what one device does."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import tiny

from mpt_jax import partitioning, setup, train_state
from mpt_jax.checkpoint.backbone import Backbone
from mpt_jax.collectives import collectives_of
from mpt_jax.config import PartitionConfig
from mpt_jax.data.cache import LabelSet
from mpt_jax.distill import make_loss
from mpt_jax.models.t5 import T5, init_params
from mpt_jax.predict import predict_tokens, rank_labels
from mpt_jax.prompts import build_prompt

MESHES = {"one": (1, 1), "data": (8, 1), "both": (8, 4)}  # devices, of which so many hold one model together
# "model" and "fsdp" of every mesh of 8 devices.
SHAPES = [(model, fsdp) for model in (1, 2, 4, 8) for fsdp in (1, 2, 4, 8) if model * fsdp <= 8]
ARCHITECTURE = dataclasses.replace(tiny.CONFIG, num_heads=4, num_encoder_layers=2, num_decoder_layers=2)
PROMPT = {"prompt": np.linspace(-1, 1, 2 * 4 * 16, dtype=np.float32).reshape(2, 4, 16)}

TASK_IDS = [0, 1] * 5 + [0]
LABEL_SETS = LabelSet(("a", "b"), ((5, 1), (6, 7, 1))), LabelSet(("c", "d", "e"), ((8, 1), (9, 1), (3, 4, 5, 1)))


def make_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 200, (16, 12)).astype(np.int32)
    return {
        "encoder_tokens": tokens,
        "decoder_input_tokens": np.pad(tokens[:, :4], ((0, 0), (1, 0))),
        "decoder_target_tokens": tokens[:, :5],
        "loss_weights": (rng.random((16, 5)) < 0.8).astype(np.float32),
        "task_ids": np.arange(16, dtype=np.int32) % 2,
    }


def make_packed():
    """The same examples, two to a row, with room for their prompts."""
    batch = make_batch()
    batch["encoder_tokens"] = np.pad(batch["encoder_tokens"], ((0, 0), (PROMPT["prompt"].shape[1], 0)))
    segments = {
        f"{stack}_segments": np.tile(np.repeat(np.array([1, 2], np.int32), batch[name].shape[1]), (8, 1))
        for stack, name in (("encoder", "encoder_tokens"), ("decoder", "decoder_target_tokens"))
    }
    return {name: array.reshape(8, -1) for name, array in batch.items()} | segments


def shards(leaf):
    """Into how many different parts an array is cut."""
    return leaf.size // leaf.addressable_shards[0].data.size


def wi_0(params):
    return params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]


def gradients(config, plain, module):
    """Loss and gradient of the prompt on every mesh, and what its program sends."""

    def step_of(model):
        loss = make_loss(model, module, config.loss, (0, 1))
        return jax.jit(jax.value_and_grad(lambda prompt, frozen, batch: loss(prompt, frozen, batch, None)[0]))

    expected = step_of(plain.model)(PROMPT, {"backbone": plain.params}, make_batch())
    for model, fsdp in SHAPES:
        mesh = partitioning.make_mesh(PartitionConfig(model, fsdp))
        backbone = setup.place_backbone(plain, mesh)
        assert shards(wi_0(backbone.params)) == model * fsdp
        arguments = (
            jax.device_put(PROMPT, partitioning.replicated(mesh)),
            {"backbone": backbone.params},
            partitioning.place_batch(make_batch(), mesh),
        )
        compiled = step_of(backbone.model).lower(*arguments).compile()
        got = compiled(*arguments)
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, err_msg=f"{model=} {fsdp=}")
        error = np.abs(got[1]["prompt"] - expected[1]["prompt"]).max() / np.abs(expected[1]["prompt"]).max()
        assert error < 1e-5, f"{model=} {fsdp=}: the gradient is {error:.1e} off"
        check_communication(collectives_of(compiled.as_text()), mesh)


def check_communication(found, mesh):
    """Sums over "data" and "model"; weights are fetched where "fsdp" cuts them, and only there; rows stay where they are."""
    kernels = {(ARCHITECTURE.d_model, ARCHITECTURE.d_ff), (ARCHITECTURE.d_ff, ARCHITECTURE.d_model)}
    gathered = {shape for c in found if c.kind == "all-gather" for shape in sizes(c)} & kernels
    if mesh.shape["fsdp"] == 1:
        assert not gathered, f"{mesh.shape}: a weight is gathered: {gathered}"
    rows, _ = make_batch()["encoder_tokens"].shape
    of_all_rows = [c for c in found if c.times > 1 and any(len(shape) > 2 and shape[0] == rows for shape in sizes(c))]
    if partitioning.batch_ways(mesh) > 1:
        assert not of_all_rows, f"{mesh.shape}: activations of the whole batch are sent: {of_all_rows}"
    if mesh.shape["model"] == mesh.shape["fsdp"] == 1:
        assert {c.kind for c in found} == {"all-reduce"} and all(c.times == 1 for c in found), found
    if mesh.shape["model"] == 1 < mesh.shape["fsdp"]:
        assert gathered == kernels, f"{mesh.shape}: {kernels - gathered} are not gathered: {found}"


def sizes(collective):
    """The shapes of its arrays."""
    return [tuple(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]", collective.shapes)]


def check_rows_stay(text, batch, mesh):
    """Microbatches are made where the batch lies: no tokens are sent."""
    found, width = collectives_of(text), batch["encoder_tokens"].shape[1]
    sent = [c for c in found if "s32" in c.shapes and f"{width}]" in c.shapes]
    assert not sent, f"{mesh.shape}: rows of a batch are sent: {sent}"
    if mesh.shape["model"] == mesh.shape["fsdp"] == 1:
        assert {c.kind for c in found} <= {"all-reduce"}, f"{mesh.shape}: {found}"


def losses(config, backbone, module, mesh, make=make_batch, parts=1):
    """[2 steps, G], of the prompt (with a module) or of model tuning (without), of batches in so many parts."""
    groups = (0, 1) if module else (0, 0)
    recipe = (config.optimizer, 9, groups)
    state = train_state.create_state(PROMPT if module else {"backbone": backbone.params}, backbone.model, *recipe, 0, mesh)
    frozen = {"backbone": backbone.params if module else {}}
    step = train_state.make_train_step(backbone.model, module, config.loss, *recipe, mesh, num_microbatches=parts)
    if parts > 1:
        batch = partitioning.place_batch(make(), mesh)
        check_rows_stay(step.lower(state, frozen, batch).compile().as_text(), batch, mesh)
    found, compiled = [], step._cache_size()
    for _ in range(2):
        batch = partitioning.place_batch(make(), mesh)
        assert shards(batch["encoder_tokens"]) == partitioning.batch_ways(mesh)
        state, metrics = step(state, frozen, batch)
        found.append(np.asarray(metrics["loss"]))
    assert step._cache_size() == compiled + 1, "the state moved, and the second step was compiled anew"
    if not module:
        assert shards(wi_0(state.trainable["backbone"])) == mesh.shape["model"] * mesh.shape["fsdp"], (
            "the tuned model is not shared out"
        )
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == wi_0(state.trainable["backbone"]).shape]
        assert moments, "no second moment of the parameter's shape to look at"
        ways = mesh.shape["model"] * mesh.shape["fsdp"]
        assert all(shards(leaf) == ways for leaf in moments), "the optimiser's state is not shared out"
    return np.stack(found)


def main():
    assert len(jax.devices()) == 8
    config = tiny.experiment(Path(), "x")
    plain = Backbone(T5(ARCHITECTURE), init_params(ARCHITECTURE, jax.random.key(0)), "", Path())
    module = build_prompt(config.prompt, (0, 1), ARCHITECTURE.d_model)
    results = {}
    gradients(config, plain, module)
    for name, (devices, ways) in MESHES.items():
        mesh = partitioning.make_mesh(PartitionConfig(ways), jax.devices()[:devices])
        backbone = setup.place_backbone(plain, mesh)
        assert shards(wi_0(backbone.params)) == ways
        results[name, "prompt"] = losses(config, backbone, module, mesh)
        packed = losses(config, backbone, module, mesh, make_packed)
        np.testing.assert_allclose(packed, results[name, "prompt"], rtol=1e-5, err_msg=f"{name}, packed")
        halves = losses(config, backbone, module, mesh, parts=2)
        np.testing.assert_allclose(halves, results[name, "prompt"], rtol=1e-5, err_msg=f"{name}, two microbatches")
        if name != "data":
            packed = losses(config, backbone, module, mesh, make_packed, parts=4)
            np.testing.assert_allclose(packed, results[name, "prompt"], rtol=1e-5, err_msg=f"{name}, packed, four microbatches")
            results[name, "model"] = losses(config, backbone, None, mesh)
            parts = losses(config, backbone, None, mesh, parts=4)
            np.testing.assert_allclose(parts, results[name, "model"], rtol=1e-5, err_msg=f"{name}, model in four microbatches")
        inputs = list(make_batch()["encoder_tokens"][:11])
        lengths, decode = {"inputs": 12, "targets": 5}, dataclasses.replace(config.decode, batch_size=3)
        where = {"lengths": lengths, "mesh": mesh}
        ways_to_decode = {"tokens": {}, "sampled tokens": {"temperature": 1.0}, "beams' tokens": {"num_beams": 2}}
        for what, settings in list(ways_to_decode.items())[: 1 if name == "data" else 3]:
            chosen = dataclasses.replace(decode, **settings)
            results[name, what] = predict_tokens(backbone, module, PROMPT, inputs, TASK_IDS, decode=chosen, **where).tokens
        if name != "data":
            labels = [LABEL_SETS[task] for task in TASK_IDS]
            scores = rank_labels(backbone, module, PROMPT, inputs, TASK_IDS, labels, decode=decode, **where)
            results[name, "label scores"] = np.concatenate(scores)
    for (name, what), value in results.items():
        np.testing.assert_allclose(value, results["one", what], rtol=0 if "tokens" in what else 1e-5, err_msg=f"{name} {what}")


if __name__ == "__main__":
    main()
