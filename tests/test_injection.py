"""Prompts in front of a tiny T5: what must change the result and what must not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import random_batch

from mpt_jax.config import LossConfig, PromptConfig, T5Config
from mpt_jax.distill import make_loss
from mpt_jax.models.t5 import T5, init_params
from mpt_jax.prompted_t5 import forward, inject
from mpt_jax.prompts import build_prompt, compose

B, T, L, P, D, V = 3, 5, 4, 3, 8, 30
CONFIG = T5Config(vocab_size=V, d_model=D, d_kv=4, num_heads=2, d_ff=16, num_encoder_layers=2, num_decoder_layers=2)
MODEL = T5(CONFIG)
run = functools.partial(jax.jit, static_argnames="hidden")(functools.partial(forward, MODEL))


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    return random_batch((B, T, L), V, 2, [0, 1, 0])


@pytest.fixture(scope="module")
def prompt():
    return jnp.asarray(np.random.default_rng(1).normal(size=(B, P, D)), jnp.float32)


def test_inject_puts_the_prompt_first_and_attends_to_it(prompt):
    x, mask = jnp.ones((B, T, D), jnp.bfloat16), jnp.arange(T)[None] < jnp.array([[5], [3], [0]])
    y, both = inject(prompt, x, mask)
    assert y.shape == (B, P + T, D) and y.dtype == jnp.bfloat16 and both.shape == (B, P + T)
    np.testing.assert_array_equal(y[:, :P], prompt.astype(jnp.bfloat16))
    np.testing.assert_array_equal(y[:, P:], x)
    assert both[:, :P].all()
    np.testing.assert_array_equal(both[:, P:], mask)
    np.testing.assert_array_equal(inject(prompt, x, mask, jnp.zeros((B, P)))[1][:, :P], False)


def test_the_prompt_matters(params, batch, prompt):
    bare, prompted, other = (run(params, batch, p).logits for p in (None, prompt, prompt + 0.1))
    assert jnp.abs(bare - prompted).max() > 1e-2 and jnp.abs(other - prompted).max() > 1e-4


def test_a_fully_masked_prompt_is_no_prompt(params, batch, prompt):
    bare = run(params, batch, None)
    masked = run(params, batch, 1e3 * prompt, prompt_mask=jnp.zeros((B, P)))
    np.testing.assert_allclose(masked.logits, bare.logits, rtol=1e-5, atol=1e-5)
    real = np.asarray(batch["encoder_tokens"] > 0)
    np.testing.assert_allclose(masked.encoder_output[:, P:][real], bare.encoder_output[real], rtol=1e-5, atol=1e-5)


def test_a_prompt_padded_on_the_left_is_the_shorter_prompt(params, batch, prompt):
    longer = jnp.concatenate([jnp.full((B, 2, D), 7.0), prompt], axis=1)
    mask = jnp.ones((B, P + 2)).at[:, :2].set(0)
    np.testing.assert_allclose(
        run(params, batch, longer, prompt_mask=mask).logits, run(params, batch, prompt).logits, rtol=1e-5, atol=1e-5
    )


def test_the_composed_prompt_gives_the_same_logits(params, batch):
    rng, groups, cfg = np.random.default_rng(2), (0, 0), PromptConfig(method="mpt", length=P, rank=2)
    shapes = {"shared": (1, P, D), "task_u": (2, P, 2), "task_v": (2, 2, D)}
    trained = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    module = build_prompt(cfg, groups, D)
    x, mask = params["token_embedder"]["embedding"][batch["encoder_tokens"]], batch["encoder_tokens"] > 0
    prompts = module.apply({"params": trained}, batch["task_ids"], x, mask)
    plain = build_prompt(dataclasses.replace(cfg, method="plain"), (0, 1), D)
    loaded = plain.apply({"params": {"prompt": compose("mpt", trained, groups)}}, batch["task_ids"], x, mask)
    np.testing.assert_allclose(run(params, batch, loaded).logits, run(params, batch, prompts).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_padding_never_changes_an_examples_loss(params, batch, prompt, normalization):
    """Longer inputs, longer targets, more rows: every example's loss and its prompt's gradient stay as they are."""
    groups = (0, 1, 2, 3)
    module = build_prompt(PromptConfig(length=P), groups, D)
    loss_fn = make_loss(MODEL, module, LossConfig(normalization=normalization, hidden_layers="all"), groups)
    frozen = {"backbone": params, "teacher": jnp.asarray(np.random.default_rng(5).normal(size=(4, P, D)), jnp.float32)}
    bank = {"prompt": jnp.concatenate([prompt, prompt[:1]])}
    batch = batch | {"task_ids": jnp.arange(B)}

    def losses(batch):
        gradient, aux = jax.jit(jax.grad(loss_fn, has_aux=True))(bank, frozen, batch, None)
        return aux, gradient["prompt"]

    wider = {name: jnp.pad(leaf, ((0, 2), (0, 3))) if leaf.ndim == 2 else jnp.pad(leaf, (0, 2), constant_values=3)
             for name, leaf in batch.items()}  # fmt: skip
    wider["decoder_input_tokens"] = wider["decoder_input_tokens"].at[:, L:].set(9)  # whatever stands where nothing is predicted
    (one, gradient), (two, wide_gradient) = losses(batch), losses(wider)
    assert (one["loss"][:B] > 0).all() and one["loss"][3] == two["loss"][3] == 0
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(gradient, wide_gradient, rtol=1e-4, atol=1e-6)


def test_hidden_states_are_returned_as_asked(params, batch, prompt):
    none, last, every = (run(params, batch, prompt, hidden=kind) for kind in ("none", "last", "all"))
    assert none.encoder_hidden is none.decoder_hidden is none.decoder_output is last.encoder_hidden is last.decoder_hidden is None
    assert every.encoder_hidden.shape == (2, B, P + T, D) and every.decoder_hidden.shape == (2, B, L, D)
    kernel = params["decoder"]["logits_dense"]["kernel"]
    for output in (last, every):
        np.testing.assert_allclose(output.logits, none.logits, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(output.decoder_output @ kernel, none.logits, rtol=1e-4, atol=1e-5)  # the normed state


def test_dropout_needs_a_key_and_follows_it(params, batch, prompt):
    model = T5(dataclasses.replace(CONFIG, dropout_rate=0.3))
    drop = jax.jit(lambda key: forward(model, params, batch, prompt, dropout_key=key).logits)
    off = jax.jit(lambda: forward(model, params, batch, prompt).logits)()
    np.testing.assert_allclose(off, run(params, batch, prompt).logits, rtol=1e-5, atol=1e-5)
    one, same, other = (drop(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert jnp.abs(one - other).max() > 1e-2 and jnp.abs(one - off).max() > 1e-2
