"""What a program costs, against sums made by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny

from mpt_jax.config import LossConfig, PromptConfig
from mpt_jax.costs import kept_for_gradient, work_of
from mpt_jax.distill import make_loss
from mpt_jax.models.t5 import T5, param_shapes
from mpt_jax.prompts import build_prompt

B, T, L, P = 4, 6, 3, 2
D, HK, F, V = tiny.CONFIG.d_model, tiny.CONFIG.num_heads * tiny.CONFIG.d_kv, tiny.CONFIG.d_ff, tiny.CONFIG.vocab_size
S = P + T


def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype)


BATCH = {
    "encoder_tokens": shape(B, T),
    "decoder_input_tokens": shape(B, L),
    "decoder_target_tokens": shape(B, L),
    "loss_weights": shape(B, L, dtype=jnp.float32),
    "task_ids": shape(B),
}
TRAINABLE = {"prompt": shape(1, P, D, dtype=jnp.float32)}


def loss_of(architecture):
    module = build_prompt(PromptConfig(length=P), (0,), D)
    loss = make_loss(T5(architecture), module, LossConfig(), (0,))
    return (lambda trainable, frozen, batch: loss(trainable, frozen, batch, None)), {"backbone": param_shapes(architecture)}


def test_a_loop_counts_as_often_as_it_runs():
    def layers(x, weights):
        return jax.lax.scan(lambda y, w: (y @ w, None), x, weights)[0]

    def steps(x, weight):
        return jax.lax.while_loop(lambda state: state[0] < 5, lambda state: (state[0] + 1, state[1] @ weight), (0, x))[1]

    x, one = shape(7, 4, 8, dtype=jnp.float32), shape(8, 8, dtype=jnp.float32)
    scanned = work_of(jax.jit(layers).trace(x, shape(3, 8, 8, dtype=jnp.float32)))
    assert scanned.flops == 3 * 2 * 7 * 4 * 8 * 8
    assert scanned.weight_bytes == 3 * 4 * 8 * 8
    assert scanned.other_bytes == 3 * 4 * 2 * 7 * 4 * 8
    assert work_of(jax.jit(steps).trace(x, one), while_steps=5).flops == 5 * 2 * 7 * 4 * 8 * 8


def forward_flops():
    """Of the tiny T5 on a batch: 2 for each weight and position, and the two products of each attention."""
    encoder = B * S * (4 * D * HK + 3 * D * F) + 2 * B * S * S * HK
    decoder = B * L * (6 * D * HK + 3 * D * F) + B * S * 2 * D * HK + 2 * B * L * (L + S) * HK
    return 2 * (2 * encoder + 2 * decoder + B * L * D * V)


def test_a_forward_pass_costs_two_for_each_weight_and_position():
    loss, frozen = loss_of(tiny.CONFIG)
    assert work_of(jax.jit(loss).trace(TRAINABLE, frozen, BATCH)).flops == pytest.approx(forward_flops(), rel=0.01)


@pytest.mark.parametrize("remat, passes", [("none", 2), ("full", 3)])
def test_a_prompts_gradient_costs_one_more_pass_and_recomputing_another(remat, passes):
    """4 N for a position instead of the 6 N of full training: no weight's gradient is computed."""
    loss, frozen = loss_of(dataclasses.replace(tiny.CONFIG, remat=remat))
    traced = jax.jit(jax.grad(loss, has_aux=True)).trace(TRAINABLE, frozen, BATCH)
    assert work_of(traced).flops == pytest.approx(passes * forward_flops(), rel=0.12)


def kept(remat, layers):
    architecture = dataclasses.replace(tiny.CONFIG, remat=remat, num_encoder_layers=layers, num_decoder_layers=layers)
    loss, frozen = loss_of(architecture)
    leaves = kept_for_gradient(loss, TRAINABLE, frozen, BATCH)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_full_remat_keeps_one_input_of_each_layer():
    """What a further layer of each stack adds: its input, in float32."""
    assert kept("full", 5) - kept("full", 4) == 4 * (B * S * D + B * L * D)


def test_remat_keeps_less_the_more_it_recomputes():
    assert kept("none", 3) > kept("dots", 3) > kept("full", 3)


def test_int8_weights_are_read_as_bytes():
    def product(x, weight):
        return x @ weight.astype(jnp.bfloat16)

    x, half = shape(7, 4, 8, dtype=jnp.bfloat16), shape(8, 8, dtype=jnp.bfloat16)
    assert work_of(jax.jit(product).trace(x, shape(8, 8, dtype=jnp.int8))).weight_bytes == 64
    assert work_of(jax.jit(product).trace(x, half)).weight_bytes == 128
