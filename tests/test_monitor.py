"""The best of each group, running means, and which step and tasks a bad loss is blamed on."""

import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.config import TrainConfig
from mpt_jax.errors import UserError
from mpt_jax.monitor import Best, Meter

GROUPS, TASKS = (0, 1, 1), ("a", "b", "c")


def trainable(value: float) -> dict:
    return {"shared": jnp.full((2, 3, 4), value), "task_u": jnp.full((3, 3, 1), value)}


def scores(a: float, b: float, c: float) -> list[dict[str, float]]:
    return [{"accuracy": value} for value in (a, b, c)]


def test_each_group_keeps_its_own_best():
    """Group 0 is best at step 1, group 1 (streams b and c, by their mean) at step 2; equals do not replace."""
    best = Best(trainable(0), GROUPS)
    best.update(1, scores(80, 10, 30), TASKS, trainable(1))
    record = best.update(2, scores(70, 50, 10), TASKS, trainable(2))
    best.update(3, scores(80, 0, 60), TASKS, trainable(3))
    assert best.score.tolist() == [80, 30] and best.step.tolist() == [1, 2]
    assert record["scores"] == [70, 30] and record["score"] == 50 and record["tasks"] == list(TASKS)
    assert [set(row.ravel().tolist()) for row in best.trainable["shared"]] == [{1}, {2}]
    assert [set(row.ravel().tolist()) for row in best.trainable["task_u"]] == [{1}, {2}, {2}]


def test_a_score_that_is_no_number_is_never_best():
    best = Best(trainable(0), GROUPS)
    record = best.update(1, [{"f1": np.nan}, {"f1": 1.0}, {"f1": 2.0}], TASKS, trainable(1))
    assert best.score.tolist() == [-np.inf, 1.5] and record["scores"] == [None, 1.5]


def test_best_does_not_alias_what_it_was_given():
    given = {"shared": np.ones((2, 1, 1), np.float32)}
    best = Best(given, (0, 1))
    best.update(1, scores(1, 1, 1)[:2], TASKS[:2], given)
    given["shared"][:] = 9
    assert best.trainable["shared"].max() == 1


def test_best_survives_a_checkpoint():
    best, again = Best(trainable(0), GROUPS), Best(trainable(0), GROUPS)
    best.update(1, scores(80, 10, 30), TASKS, trainable(1))
    again.load(best.tree())
    again.update(2, scores(0, 0, 0), TASKS, trainable(2))
    np.testing.assert_equal(again.tree(), best.tree() | {"stale": best.stale + 1})  # a validation without a better score


def metrics(
    loss: tuple[float, float],
    tokens: tuple[int, int] = (4, 2),
    correct: tuple[int, int] = (1, 1),
    bad: tuple[bool, bool] | None = None,
    median: tuple[float, float] = (np.nan, np.nan),
) -> dict:
    parts = {"ce": loss, "kl": (0, 0), "hidden": (0, 0), "loss": loss, "tokens": tokens, "correct": correct}
    parts |= {"token_loss": np.divide(loss, np.maximum(tokens, 1)), "median": median}
    bad = ~np.isfinite(loss) if bad is None else bad
    return {name: jnp.asarray(value, jnp.float32) for name, value in parts.items()} | {"bad": jnp.asarray(bad)}


def make_meter(present: tuple[int, ...] = (0, 1, 2), told: list | None = None, **config) -> Meter:
    """After ten steps. Step 12 has the streams `present`, others have all; of stream n the examples 10n and 10n + 1."""

    def draw(step):
        streams = np.repeat(np.asarray(present if step == 11 else (0, 1, 2)), 2)
        return streams, 10 * streams + np.arange(len(streams)) % 2

    told = [] if told is None else told
    config = TrainConfig(steps=20, model_dir="-", **config)
    return Meter(10, config, TASKS, GROUPS, draw, lambda: 8, lambda record, text: told.append((record, text)))


def test_means_are_per_token_and_start_anew():
    meter = make_meter()
    meter.add(metrics((8.0, 2.0)))
    meter.add(metrics((4.0, 0.0), tokens=(4, 0), correct=(3, 0)))
    record = meter.record("sum")
    assert record["losses"] == [12 / 8, 2 / 2]
    assert record["loss"] == (12 / 8 + 2 / 2) / 2 and record["accuracy"] == 50
    meter.add(metrics((8.0, 0.0), tokens=(4, 0), correct=(0, 0)))
    assert meter.record("mean") == {"loss": 8.0, "losses": [8.0, None], "accuracy": 0.0}


def test_sums_carry_over():
    whole, first, second = make_meter(), make_meter(), make_meter()
    for step in range(4):
        whole.add(metrics((step / 3, step / 7)))
        (first if step < 2 else second).add(metrics((step / 3, step / 7)))
    second.load(first.tree())
    assert second.record("sum") == whole.record("sum")


def test_a_bad_loss_is_blamed_on_its_step_and_tasks():
    """Group 1 has the streams b and c; only c was in the batch of step 12 (the twelfth, after ten were taken)."""
    meter = make_meter(present=(0, 2))
    meter.add(metrics((1.0, 1.0)))
    meter.add(metrics((1.0, np.nan)))
    meter.add(metrics((np.nan, np.nan)))
    expected = (
        r"loss is not finite at step 12 \(c\), whose batch has the examples 20, 21 of c; the last good checkpoint, of step 8"
    )
    with pytest.raises(UserError, match=expected):
        meter.record("sum")


def test_bad_parameters_are_found_although_no_loss_was_bad():
    meter = make_meter()
    meter.add(metrics((1.0, 1.0)))
    meter.check(trainable(1))
    with pytest.raises(UserError, match=r"parameters are not finite at step 11 \(a, b, c\)"):
        meter.check(trainable(np.inf))
