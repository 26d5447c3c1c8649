"""Distillation and the complete loss, against formulas and plain loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import random_batch

from mpt_jax.config import LossConfig, PromptConfig, T5Config
from mpt_jax.distill import distillation, kl_divergence, make_loss
from mpt_jax.errors import UserError
from mpt_jax.losses import cross_entropy
from mpt_jax.models.t5 import T5, init_params
from mpt_jax.prompted_t5 import Output, forward
from mpt_jax.prompts import build_prompt, compose

B, T, L, P, D, V, N = 4, 5, 3, 2, 8, 30, 3
GROUPS = (0, 0, 1)
CONFIG = T5Config(vocab_size=V, d_model=D, d_kv=4, num_heads=2, d_ff=16, num_encoder_layers=2, num_decoder_layers=3)
MODEL = T5(CONFIG)
MPT = build_prompt(PromptConfig(method="mpt", length=P, rank=1), GROUPS, D)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    return random_batch((B, T, L), V, 1, [0, 2, 1, 2])


def student_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"shared": (2, P, D), "task_u": (N, P, 1), "task_v": (N, 1, D)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def teacher_prompts(length=P):
    return jnp.asarray(np.random.default_rng(7).normal(size=(N, length, D)), jnp.float32)


@functools.cache
def gradient_of(cfg):
    return jax.jit(jax.grad(make_loss(MODEL, MPT, cfg, GROUPS), has_aux=True))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_against_its_formula(temperature):
    rng = np.random.default_rng(0)
    teacher, student = 4 * rng.normal(size=(2, 6, V)), 4 * rng.normal(size=(2, 6, V))
    p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum(-1, keepdims=True) for x in (teacher, student))
    ours = kl_divergence(jnp.asarray(teacher, jnp.float32), jnp.asarray(student, jnp.float32), temperature)
    np.testing.assert_allclose(ours, (p * np.log(p / q)).sum(-1), rtol=1e-4)
    assert (ours > 0).all()


@pytest.mark.parametrize("hidden_layers, normalization", [("last", "mean"), ("all", "sum")])
def test_a_student_that_equals_its_teacher_is_at_distance_zero(params, batch, hidden_layers, normalization):
    cfg = LossConfig(hidden_layers=hidden_layers, normalization=normalization)
    student = student_params()
    frozen = {"backbone": params, "teacher": compose("mpt", student, GROUPS)}
    _, aux = jax.jit(make_loss(MODEL, MPT, cfg, GROUPS))(student, frozen, batch, None)
    np.testing.assert_allclose(aux["kl"], 0.0, atol=1e-6)
    np.testing.assert_allclose(aux["hidden"], 0.0, atol=1e-6)
    np.testing.assert_allclose(aux["loss"], aux["ce"], rtol=1e-6)


@pytest.mark.parametrize("which", ["1,4", "-4"])
def test_a_layer_that_is_not_there_is_named(batch, which):
    with pytest.raises(UserError, match=f"'{which}', but the encoder has no layer -?4: it has 3"):
        distillation(outputs(0), outputs(1), batch, LossConfig(hidden_layers=which))


def test_distance_zero_is_a_minimum(batch):
    cfg = LossConfig(hidden_layers="all")

    def total(student):
        return sum(leaf.sum() for leaf in jax.tree.leaves(distillation(student, outputs(0), batch, cfg)))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total, allow_int=True))(outputs(0))):
        assert leaf.dtype == jax.dtypes.float0 or jnp.abs(leaf).max() < 1e-6


def test_no_gradient_reaches_the_teacher(params, batch):
    cfg = LossConfig(hidden_layers="all")
    frozen = {"backbone": params, "teacher": teacher_prompts()}
    loss_fn = make_loss(MODEL, MPT, cfg, GROUPS)
    of_teacher = jax.grad(lambda t: loss_fn(student_params(), frozen | {"teacher": t}, batch, None), has_aux=True)
    gradient, aux = jax.jit(of_teacher)(frozen["teacher"])
    assert (aux["kl"] > 0).all() and (aux["hidden"] > 0).all()
    np.testing.assert_array_equal(gradient, 0.0)


def test_distillation_pulls_the_student_to_the_teacher(params, batch):
    cfg = LossConfig(distill_weight=1e3)
    frozen, student = {"backbone": params, "teacher": teacher_prompts()}, student_params()
    gradient, before = gradient_of(cfg)(student, frozen, batch, None)
    nearer = jax.tree.map(lambda leaf, g: leaf - 1e-5 * g, student, gradient)
    _, after = gradient_of(cfg)(nearer, frozen, batch, None)
    assert (after["kl"] + after["hidden"] < before["kl"] + before["hidden"]).all()


def outputs(seed, length=P, layers=3):
    """An `Output` of random numbers; the text's mask is the same for every seed, the first prompt token's is not."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    mask = np.ones((B, length + T), bool)
    mask[1, -2:] = False
    mask[seed, 0] = False
    size = length + T
    return Output(
        draw(B, L, V), draw(layers, B, size, D), draw(B, size, D), jnp.asarray(mask), draw(layers, B, L, D), draw(B, L, D)
    )


def loop_distance(pairs, mask):
    """Mean over layers and width, summed over the positions of each example that the mask has."""
    total = np.zeros(mask.shape[0])
    for student, teacher in pairs:
        for b, s in np.ndindex(*mask.shape):
            if mask[b, s]:
                total[b] += np.mean((np.asarray(student[b, s], np.float64) - np.asarray(teacher[b, s])) ** 2) / len(pairs)
    return total


WHICH = {"last": (), "all": (0, 1), "1,3": (0,), "-2,-1,3": (1,)}  # of three blocks, besides the top


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("teacher_length", [P, P + 3, 1])
def test_hidden_distance_against_a_loop(batch, which, teacher_length):
    student, teacher = outputs(0), outputs(1, teacher_length)
    terms = distillation(student, teacher, batch, LossConfig(hidden_layers=which))
    both = min(P, teacher_length) + T
    mask = np.zeros((B, both), bool)
    for b, back in np.ndindex(B, both):  # from the right
        mask[b, -1 - back] = student.encoder_mask[b, -1 - back] and teacher.encoder_mask[b, -1 - back]

    def pairs(stack, size):
        result = [(getattr(student, f"{stack}_output")[:, -size:], getattr(teacher, f"{stack}_output")[:, -size:])]
        for layer in WHICH[which]:  # the last block's state is the normed output
            result.append(tuple(getattr(o, f"{stack}_hidden")[layer][:, -size:] for o in (student, teacher)))
        return result

    np.testing.assert_allclose(terms.encoder.sum(1), loop_distance(pairs("encoder", both), mask), rtol=1e-5)
    np.testing.assert_array_equal(terms.encoder > 0, mask)
    targets = np.asarray(batch["loss_weights"]) > 0
    np.testing.assert_allclose(terms.decoder.sum(1), loop_distance(pairs("decoder", L), targets), rtol=1e-5)
    np.testing.assert_array_equal(terms.decoder > 0, targets)


def test_masked_positions_may_hold_anything(batch):
    cfg = LossConfig(hidden_layers="all")
    student, teacher = outputs(0), outputs(1)
    broken = student._replace(
        encoder_output=student.encoder_output.at[1, -1].set(jnp.nan),
        encoder_hidden=student.encoder_hidden.at[:, 1, -2].set(jnp.inf),
        decoder_output=student.decoder_output.at[2, 1].set(jnp.nan),  # row 2 has one target
    )
    for clean, dirty in zip(*(jax.tree.leaves(distillation(s, teacher, batch, cfg)) for s in (student, broken)), strict=True):
        np.testing.assert_array_equal(clean, dirty)


def test_parts_can_be_left_out(batch):
    def parts(**fields):
        terms = distillation(outputs(0), outputs(1), batch, LossConfig(**fields))
        return {name for name, term in terms._asdict().items() if term is not None}

    assert parts() == {"kl", "encoder", "decoder"}
    assert parts(distill_logits=False) == {"encoder", "decoder"}
    assert parts(hidden_layers="none") == {"kl"}
    assert parts(distill_encoder=False) == {"kl", "decoder"}
    assert parts(distill_decoder=False) == {"kl", "encoder"}


@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_the_complete_loss_against_a_loop_over_groups(params, batch, normalization):
    cfg = LossConfig(normalization=normalization, z_loss=0.1, label_smoothing=0.1, distill_weight=0.7, temperature=2.0)
    student, prompts = student_params(), teacher_prompts()
    frozen = {"backbone": params, "teacher": prompts}
    loss, aux = jax.jit(make_loss(MODEL, MPT, cfg, GROUPS))(student, frozen, batch, None)

    ids, weights = np.asarray(batch["task_ids"]), np.asarray(batch["loss_weights"])
    run = jax.jit(lambda prompt: forward(MODEL, params, batch, prompt, hidden="last"))
    s, t = (run(p[jnp.asarray(ids)]) for p in (compose("mpt", student, GROUPS), prompts))
    targets = batch["decoder_target_tokens"]
    ce = np.asarray(cross_entropy(s.logits, targets, batch["loss_weights"], z_loss=0.1, label_smoothing=0.1))
    kl = np.asarray(kl_divergence(t.logits, s.logits, 2.0)) * weights
    real = np.asarray(s.encoder_mask)
    total = 0.0
    for group in range(2):
        rows = [row for row in range(B) if GROUPS[ids[row]] == group]
        tokens = weights[rows].sum()
        divisor = tokens if normalization == "mean" else 1.0
        hidden = 0.0
        for student_state, teacher_state, mask in (
            (s.encoder_output, t.encoder_output, real),
            (s.decoder_output, t.decoder_output, weights > 0),
        ):
            square = (np.asarray(student_state) - np.asarray(teacher_state))[rows] ** 2
            hidden += square[mask[rows]].mean()
        hidden *= 1.0 if normalization == "mean" else tokens
        correct = ((np.asarray(s.logits).argmax(-1) == np.asarray(targets)) * weights)[rows].sum()
        expected = {"ce": ce[rows].sum() / divisor, "kl": kl[rows].sum() / divisor, "hidden": hidden, "tokens": tokens}
        expected |= {"correct": correct, "loss": expected["ce"] + 0.7 * (expected["kl"] + hidden)}
        for name, value in expected.items():
            np.testing.assert_allclose(aux[name][group], value, rtol=1e-4, err_msg=name)
        total += expected["loss"]
    np.testing.assert_allclose(loss, total, rtol=1e-4)


@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_a_groups_gradient_does_not_depend_on_the_other_groups(params, batch, normalization):
    cfg = LossConfig(normalization=normalization)
    frozen, gradient = {"backbone": params, "teacher": teacher_prompts()}, gradient_of(cfg)
    others = jnp.array([0, 2])  # rows of group 0; 1 and 3 are of group 1
    changed = batch | {
        "encoder_tokens": batch["encoder_tokens"].at[others].set(5),
        "decoder_target_tokens": batch["decoder_target_tokens"].at[others].set(4),
    }
    absent = batch | {"loss_weights": batch["loss_weights"].at[others].set(0.0)}
    (one, first), (two, second), (three, third) = (gradient(student_params(), frozen, b, None) for b in (batch, changed, absent))
    assert jnp.abs(one["shared"][0] - two["shared"][0]).max() > 1e-3
    for other, aux in ((two, second), (three, third)):
        np.testing.assert_array_equal(one["shared"][1], other["shared"][1])
        np.testing.assert_array_equal(one["task_u"][2], other["task_u"][2])
        assert first["loss"][1] == aux["loss"][1]
    assert third["loss"][0] == third["tokens"][0] == 0
    assert not three["shared"][0].any() and not three["task_v"][:2].any()


def test_without_a_prompt_module_the_backbone_is_trained(params, batch):
    loss_fn = make_loss(MODEL, None, LossConfig(), GROUPS)
    gradient, aux = jax.jit(jax.grad(loss_fn, has_aux=True))({"backbone": params}, {}, batch, None)
    assert all((jnp.abs(leaf) > 0).any() for leaf in jax.tree.leaves(gradient))
    bare = jax.jit(lambda: forward(MODEL, params, batch, None))()
    ce = cross_entropy(bare.logits, batch["decoder_target_tokens"], batch["loss_weights"]).sum()
    np.testing.assert_allclose(aux["loss"].sum(), ce, rtol=1e-5)


def test_dropout_is_the_students_only(params, batch):
    """With dropout a student that equals its teacher is not at distance zero, and the key decides how far it is."""
    model = T5(dataclasses.replace(CONFIG, dropout_rate=0.2))
    student = student_params()
    frozen = {"backbone": params, "teacher": compose("mpt", student, GROUPS)}
    loss_fn = jax.jit(make_loss(model, MPT, LossConfig(), GROUPS))
    one, same, other = (loss_fn(student, frozen, batch, jax.random.key(seed))[1] for seed in (0, 0, 1))
    assert (one["kl"] > 1e-3).all() and not np.array_equal(one["kl"], other["kl"])
    np.testing.assert_array_equal(one["loss"], same["loss"])
    np.testing.assert_allclose(loss_fn(student, frozen, batch, None)[1]["kl"], 0.0, atol=1e-6)
