"""Packed rows and trimmed inputs give the losses and gradients of padded ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from caches import random_cache

from mpt_jax.config import DataConfig, LossConfig, PromptConfig, T5Config
from mpt_jax.data.sampling import make_loader, stream_data
from mpt_jax.distill import make_loss
from mpt_jax.errors import UserError
from mpt_jax.losses import of_positions, present_streams
from mpt_jax.models.t5 import T5, init_params
from mpt_jax.prompted_t5 import batch_prompts, forward, inject_packed
from mpt_jax.prompts import build_prompt
from mpt_jax.prompts.base import Prompt
from mpt_jax.shapes import PACKED_SHAPES
from mpt_jax.train import run_training

P, D, V, N = 3, 8, 30, 3
LENGTHS = {"inputs": 16, "targets": 4}
LONGEST = {"inputs": 11, "targets": 4}  # of the examples
ROWS = {"inputs": 36, "targets": 10}
GROUPS = (0, 0, 1)
CONFIG = T5Config(
    V, D, d_kv=4, num_heads=2, d_ff=16, num_encoder_layers=2, num_decoder_layers=2, relpos_buckets=8, relpos_max_distance=16
)
MODEL = T5(CONFIG)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def params():
    params = init_params(CONFIG, jax.random.key(0))
    for stack in ("encoder", "decoder"):  # distances must matter
        params[stack]["relpos_bias"]["rel_embedding"] *= 3
    return params


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return [stream_data(random_cache(folder / f"task{n}", f"task{n}", 40, LONGEST, n, V)) for n in range(N)]


def batch_of(streams, sampling="mpt", batch_size=16, step=2, prompt_length=P, ids=False, **fields):
    config = DataConfig("x", LENGTHS, batch_size, sampling=sampling, **fields)
    batch = make_loader(config, streams, prompt_length).batch(step)
    return {name: jnp.asarray(array) for name, array in batch.items() if ids or name in PACKED_SHAPES}


def start_of(method, rng):
    shapes = {
        "plain": {"prompt": (2, P, D)},
        "mpt": {"shared": (2, P, D), "task_u": (N, P, 1), "task_v": (N, 1, D)},
    }[method]
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


LOSSES = {
    "sum": LossConfig(z_loss=0.1, label_smoothing=0.1),
    "mean": LossConfig(normalization="mean"),
    "distilled, last": LossConfig(normalization="mean", teachers="yes", temperature=2.0),
    "distilled, all": LossConfig(teachers="yes", hidden_layers="all", z_loss=0.1, label_smoothing=0.1),
}


@functools.cache
def gradient_of(method, loss):
    module = None if method == "none" else build_prompt(PromptConfig(method=method, length=P), GROUPS, D)
    return jax.jit(jax.grad(make_loss(MODEL, module, LOSSES[loss], GROUPS), has_aux=True))


@pytest.mark.parametrize(
    "method, loss, sampling",
    [
        ("plain", "sum", "bank"),
        ("mpt", "mean", "proportional"),
        ("mpt", "distilled, last", "mpt"),
        ("mpt", "distilled, all", "bank"),
        ("none", "sum", "proportional"),
    ],
)
def test_packed_and_trimmed_losses_and_gradients_are_those_of_padded_rows(params, streams, method, loss, sampling):
    rng = np.random.default_rng(0)
    length, size = 0 if method == "none" else P, 15
    layouts = {"padded": {}, "trimmed": {"trim_lengths": (11, 13)}, "packed": {"pack_lengths": ROWS}}
    batches = {
        name: batch_of(streams, sampling, size, step=4, prompt_length=length, **fields) for name, fields in layouts.items()
    }
    if method == "none":
        trainable, frozen = {"backbone": params}, {"backbone": {}}
    else:
        trainable, frozen = start_of(method, rng), {"backbone": params}
        if LOSSES[loss].teachers:
            frozen["teacher"] = jnp.asarray(rng.normal(size=(N, P, D)), jnp.float32)
    results = {name: gradient_of(method, loss)(trainable, frozen, batch, None) for name, batch in batches.items()}
    gradient, aux = results["padded"]
    assert batches["trimmed"]["encoder_tokens"].shape == (size, 11) and len(batches["packed"]["encoder_tokens"]) < size / 2
    assert (aux["loss"] > 0).any() and all(jnp.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradient))
    for name in ("trimmed", "packed"):
        for part in aux:
            np.testing.assert_allclose(results[name][1][part], aux[part], **TOLERANCE, err_msg=f"{name}, {part}")
        for (path, one), other in zip(
            jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(results[name][0]), strict=True
        ):
            # Sums of hundreds of float32 products in another order: relative to the leaf's largest gradient.
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * float(jnp.abs(one).max()), err_msg=f"{name}, {path}")


@pytest.fixture(scope="module")
def run(params):
    return jax.jit(functools.partial(forward, MODEL, params), static_argnames="hidden")


def test_a_packed_example_is_as_in_a_row_of_its_own_whatever_stands_beside_it(params, streams, run):
    """Positions, masks and the decoder's shift: states and logits as unpacked, and bit for bit the same with other neighbours."""
    table = jnp.asarray(np.random.default_rng(1).normal(size=(N, 40, P, D)), jnp.float32)  # a prompt for each example
    results = []
    for fields in ({}, {"pack_lengths": ROWS}):
        batch = batch_of(streams, ids=True, **fields)
        results.append((batch, run(batch, table[batch["task_ids"], batch["example_ids"]], hidden="all")))
    (padded, alone), (batch, packed) = results
    where = {(int(n), int(i)): b for b, (n, i) in enumerate(zip(padded["task_ids"], padded["example_ids"], strict=True))}
    encoder, decoder = (np.asarray(batch[f"{name}_segments"]) for name in ("encoder", "decoder"))
    found = np.argwhere(np.asarray(batch["example_ids"]) >= 0)
    assert len(found) == len(where) == 16 and found[:, 1].max() >= 2
    for r, e in found:
        b, source, target = where[int(batch["task_ids"][r, e]), int(batch["example_ids"][r, e])], encoder[r], decoder[r]
        source, target = source == e + 1, target == e + 1
        np.testing.assert_allclose(packed.logits[r, target], alone.logits[b, : target.sum()], **TOLERANCE)
        np.testing.assert_allclose(packed.encoder_hidden[:, r, source], alone.encoder_hidden[:, b, : source.sum()], **TOLERANCE)
        np.testing.assert_allclose(packed.decoder_output[r, target], alone.decoder_output[b, : target.sum()], **TOLERANCE)

    second = [np.where(segments == 2, 7, batch[name]) for name, segments in
              (("encoder_tokens", encoder), ("decoder_input_tokens", decoder))]  # fmt: skip
    changed = batch | {"encoder_tokens": jnp.asarray(second[0]), "decoder_input_tokens": jnp.asarray(second[1])}
    beside = run(changed, table[batch["task_ids"], batch["example_ids"]].at[:, 1].add(1.0), hidden="all")
    kept = (decoder != 2) & (decoder > 0)
    np.testing.assert_array_equal(beside.logits[kept], packed.logits[kept])
    assert jnp.abs(beside.logits[decoder == 2] - packed.logits[decoder == 2]).max() > 1e-2


def test_inject_packed_against_a_loop(streams):
    batch, rng = batch_of(streams, pack_lengths=ROWS), np.random.default_rng(2)
    segments = np.asarray(batch["encoder_segments"])
    prompts = rng.normal(size=(*batch["task_ids"].shape, P, D)).astype(np.float32)
    x = rng.normal(size=(*segments.shape, D)).astype(np.float32)
    expected = x.copy()
    for r in range(len(segments)):
        for e in range(segments[r].max()):
            first = np.flatnonzero(segments[r] == e + 1)[0]
            expected[r, first : first + P] = prompts[r, e]
    np.testing.assert_array_equal(inject_packed(jnp.asarray(prompts), jnp.asarray(x), batch["encoder_segments"]), expected)


class MeanOfText(Prompt):
    """A prompt that depends on its input, as a method may: the mean of the text, in every position."""

    def __call__(self, task_ids, x, mask):
        mean = (x * mask[..., None]).sum(axis=1) / mask.sum(axis=1)[:, None].clip(1)
        return jnp.repeat(mean[:, None], self.length, axis=1) + task_ids[:, None, None]


def test_a_prompt_that_looks_at_its_input_sees_its_own_text(params, streams):
    module = MeanOfText(groups=(0, 1, 2), length=P, d_model=D)
    padded, packed = (batch_of(streams, **fields) for fields in ({}, {"pack_lengths": ROWS}))
    of_padded, of_packed = (np.asarray(batch_prompts(module, {}, MODEL, params, batch)[0]) for batch in (padded, packed))
    real = np.asarray(packed["encoder_segments"]).max(axis=1)
    flat = np.concatenate([of_packed[r, : real[r]] for r in range(len(real))])
    assert of_padded.shape == flat.shape == (16, P, D)
    order, packed_order = np.lexsort(of_padded[:, 0].T), np.lexsort(flat[:, 0].T)
    np.testing.assert_allclose(flat[packed_order], of_padded[order], **TOLERANCE)


def test_of_positions():
    segments = jnp.array([[1, 1, 2, 3, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(of_positions(jnp.array([[5, 6, 7], [8, 0, 0]]), segments), [[5, 5, 6, 7, 5], [8] * 5])
    np.testing.assert_array_equal(of_positions(jnp.array([5, 8]), None), [5, 8])


def test_present_streams_of_packed_rows(streams):
    padded, packed = (batch_of(streams, step=3, **fields) for fields in ({}, {"pack_lengths": ROWS}))
    ids = of_positions(packed["task_ids"], packed["decoder_segments"])
    present = present_streams(ids, packed["loss_weights"], 5)
    np.testing.assert_array_equal(present, present_streams(padded["task_ids"], padded["loss_weights"], 5))
    assert 0 < present.sum() < 5


def test_teachers_of_another_length_are_refused(params, streams):
    module = build_prompt(PromptConfig(length=P), GROUPS, D)
    loss_fn = make_loss(MODEL, module, LossConfig(teachers="yes"), GROUPS)
    frozen = {"backbone": params, "teacher": jnp.zeros((N, P + 1, D))}
    with pytest.raises(UserError, match=f"has prompts of {P + 1} tokens, but .* room for .* {P}; make them equal, or clear"):
        loss_fn(start_of("plain", np.random.default_rng(0)), frozen, batch_of(streams, pack_lengths=ROWS), None)


def test_a_packed_run_is_the_unpacked_run(tmp_path):
    """From configuration to prompt file, with teachers; the packed run goes on where the unpacked one stopped."""
    folder, tasks = tiny.make(tmp_path), tiny.TASKS
    run_training(tiny.experiment(folder, "teachers", tasks=tasks, steps=1, batch_size=12))
    optimizer = {"name": "adamw", "rules": (("shared", 0.03), ("task_.*", 0.01))}
    loss = {"teachers": str(folder / "teachers"), "normalization": "mean"}

    def config(run, steps, **fields):
        made = tiny.experiment(
            folder, run, tasks=tasks, method="mpt", steps=steps, batch_size=12, sampling="mpt", loss=loss, optimizer=optimizer,
            train={"checkpoint_period": 3, "log_period": 1},
        )  # fmt: skip
        return dataclasses.replace(made, data=dataclasses.replace(made.data, **fields))

    packing = {"pack_lengths": {"inputs": 64, "targets": 24}}
    plain = run_training(config("plain", 6))
    run_training(config("mixed", 3))
    for name, result in (("packed", run_training(config("packed", 6, **packing))),
                         ("mixed", run_training(config("mixed", 6, **packing)))):  # fmt: skip
        ours, theirs = ([record["loss"] for record in r.history if record["kind"] == "train"] for r in (result, plain))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, err_msg=name)
        for leaf, value in plain.params.items():
            # AdamW's first steps are signs of gradients: a gradient near 0 may step otherwise.
            np.testing.assert_allclose(result.params[leaf], value, rtol=1e-3, atol=1e-3, err_msg=f"{name}, {leaf}")
    with pytest.raises(UserError, match="an example may take 28, 4 of its prompt and 24 of its text; set 'inputs' to 28 or more"):
        run_training(config("narrow", 6, pack_lengths={"inputs": 27, "targets": 24}))
