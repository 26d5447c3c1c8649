import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.losses import cross_entropy, group_reduce, group_sum, present_streams

B, L, V = 5, 3, 7


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    weights = np.ones((B, L), np.float32)
    weights[0, 1:] = 0
    weights[3] = 0
    weights[4, 0] = 0.5
    return 3 * rng.normal(size=(B, L, V)).astype(np.float32), rng.integers(0, V, (B, L)), weights


def loop_cross_entropy(logits, targets, weights, z_loss, smoothing):
    """One token after the other, in float64."""
    result = np.zeros(targets.shape)
    for b, l in np.ndindex(*targets.shape):
        scores = logits[b, l].astype(np.float64)
        log_z = np.log(sum(np.exp(scores)))
        for v in range(len(scores)):
            truth = 1 - smoothing if v == targets[b, l] else smoothing / (len(scores) - 1)
            result[b, l] -= truth * (scores[v] - log_z)
            if truth > 0:
                result[b, l] += truth * np.log(truth)
        result[b, l] += z_loss * log_z**2
    return result * weights


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_against_a_loop(batch, z_loss, smoothing):
    logits, targets, weights = batch
    ours = cross_entropy(*map(jnp.asarray, batch), z_loss=z_loss, label_smoothing=smoothing)
    np.testing.assert_allclose(ours, loop_cross_entropy(logits, targets, weights, z_loss, smoothing), rtol=1e-5, atol=1e-6)


def test_a_perfect_smoothed_prediction_costs_nothing():
    smoothing, targets = 0.3, jnp.array([[2]])
    truth = jnp.full((1, 1, V), smoothing / (V - 1)).at[0, 0, 2].set(1 - smoothing)
    loss = cross_entropy(jnp.log(truth), targets, jnp.ones((1, 1)), label_smoothing=smoothing)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)


def test_cross_entropy_computes_in_float32(batch):
    logits, targets, weights = map(jnp.asarray, batch)
    loss = cross_entropy(logits.astype(jnp.bfloat16), targets, weights)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, cross_entropy(logits.astype(jnp.bfloat16).astype(jnp.float32), targets, weights))


@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_group_reduce_against_a_loop(batch, normalization):
    _, _, weights = batch
    losses = np.random.default_rng(1).normal(size=(B, L)).astype(np.float32) * weights
    groups, total = np.array([0, 2, 2, 3, 0]), 5  # 1 and 4 are absent, 3 has weight 0 only
    expected = np.zeros(total)
    for g in range(total):
        rows = [b for b in range(B) if groups[b] == g]
        amount = sum(weights[b].sum() for b in rows)
        if amount > 0:
            expected[g] = sum(losses[b].sum() for b in rows) / (amount if normalization == "mean" else 1)
    groups, tokens = jnp.asarray(groups), group_sum(jnp.asarray(weights), jnp.asarray(groups), total)
    ours = group_reduce(jnp.asarray(losses), tokens, groups, normalization)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert ours[1] == ours[3] == ours[4] == 0


def test_an_absent_group_has_a_finite_zero_gradient(batch):
    _, _, weights = map(jnp.asarray, batch)
    groups = jnp.zeros(B, jnp.int32)
    gradient = jax.grad(lambda x: group_reduce(x, group_sum(weights, groups, 2), groups, "mean")[1])(jnp.ones((B, L)))
    np.testing.assert_array_equal(gradient, 0)


def test_present_streams_do_not_count_padding_rows():
    weights = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    np.testing.assert_array_equal(present_streams(jnp.array([2, 1, 2]), weights, 4), [False, False, True, False])
