"""Bad steps: found by their loss or gradient, left out group by group, told, counted, and the same when a run is resumed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mpt_jax import setup
from mpt_jax.config import TrainConfig
from mpt_jax.errors import UserError
from mpt_jax.guard import finite_gradients, judge
from mpt_jax.train import run_training

NAN = np.nan
TWO = tiny.TASKS[:2]


def aux(loss, tokens):
    return {"loss": jnp.asarray(loss, jnp.float32), "tokens": jnp.asarray(tokens, jnp.float32)}


def judged(losses, tokens, factor=2.0, window=3, normalization="sum"):
    """Which steps of one group are bad, one after the other."""
    recent, bad = jnp.full((window, 1), jnp.nan), []
    for loss, count in zip(losses, tokens, strict=True):
        recent, metrics = judge(aux([loss], [count]), jnp.ones(1, bool), recent, normalization, factor)
        bad.append(bool(metrics["bad"][0]))
    return bad


def reference(losses, tokens, factor=2.0, window=3, normalization="sum"):
    kept, bad = [], []
    for loss, count in zip(losses, tokens, strict=True):
        one = loss / count if normalization == "sum" and count else loss
        spike = bool(factor) and len(kept) >= window and one > factor * np.median(kept[-window:])
        bad.append(count > 0 and (spike or not np.isfinite(loss)))
        if count and not bad[-1]:
            kept.append(one)
    return bad


@pytest.mark.parametrize("normalization", ["sum", "mean"])
@pytest.mark.parametrize("factor", [0.0, 1.5, 4.0])
def test_spikes_are_those_of_a_plain_loop(factor, normalization):
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 5, 60)
    losses = np.where(tokens > 0, rng.lognormal(0, 1, 60) * np.maximum(tokens, 1), 0.0).astype(np.float32)
    losses[[20, 41]] = np.inf, NAN
    tokens[[20, 41]] = 2
    expected = reference(losses, tokens, factor, normalization=normalization)
    assert judged(losses, tokens, factor, normalization=normalization) == expected
    assert expected[20] and expected[41] and (sum(expected) > 4 if factor else sum(expected) == 2)


def test_groups_are_judged_apart():
    recent = jnp.asarray([[1.0, 1.0, NAN, 1.0]] * 3)
    finite = jnp.asarray([True, True, True, False])
    after, metrics = judge(aux([3.0, 1.0, 9.0, 1.0], [1, 1, 1, 1]), finite, recent, "mean", 2.0)
    assert metrics["bad"].tolist() == [True, False, False, True]
    np.testing.assert_array_equal(after, [[1, 1, NAN, 1], [1, 1, NAN, 1], [1, 1, 9, 1]])


def test_a_gradient_counts_for_its_group():
    """Of MPT: a shared prompt for each group, and factors for each stream."""
    good = {"shared": jnp.ones((2, 4, 3)), "task_u": jnp.ones((3, 4, 1))}
    groups = (0, 1, 1)
    assert finite_gradients(good, groups, 2).tolist() == [True, True]
    assert finite_gradients(good | {"shared": good["shared"].at[0, 1, 1].set(NAN)}, groups, 2).tolist() == [False, True]
    assert finite_gradients(good | {"task_u": good["task_u"].at[2, 0, 0].set(np.inf)}, groups, 2).tolist() == [True, False]
    assert finite_gradients({"backbone": {"a": jnp.ones(3), "b": jnp.full(2, NAN)}}, (0,), 1).tolist() == [False]


# ---------------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("guard"))


def skipping(folder, run, steps=16, **train):
    train = {"on_bad_step": "skip", "max_skipped_steps": 100, "log_period": 4} | train
    return tiny.experiment(folder, run, tasks=TWO, steps=steps, batch_size=2, train=train)


def opened(config):
    return setup.open_backbone(config, setup.mesh_of(config))


def poisoned(config, word="dog"):
    """A backbone that makes no number of a word, which one task of the two has."""
    backbone = opened(config)
    token = np.asarray(setup.open_vocabulary(config, backbone).encode(word))[-1:]
    embedding = backbone.params["token_embedder"]["embedding"].at[token].set(jnp.nan)
    return backbone._replace(params=backbone.params | {"token_embedder": {"embedding": embedding}})


def skipped(result):
    return [record for record in result.history if record["kind"] == "skipped"]


def test_bad_steps_of_one_task_are_left_out_of_it_alone(folder):
    """The other task's prompt is that of a run without any; the first one's moves with its good steps only, and is finite."""
    config = skipping(folder, "poisoned")
    clean = run_training(skipping(folder, "clean"))
    result = run_training(config, poisoned(config))
    lines = skipped(result)
    assert 0 < len(lines) < 16
    assert np.isfinite(result.params["prompt"]).all()
    np.testing.assert_array_equal(result.params["prompt"][1], clean.params["prompt"][1])
    assert not np.array_equal(result.params["prompt"][0], clean.params["prompt"][0])
    vocabulary = setup.open_vocabulary(config, opened(config))
    [cache] = setup.open_caches(config, ["tiny_colour"], "train", vocabulary)
    for line in lines:
        assert list(line["examples"]) == ["tiny_colour"]
        assert all("dog" in cache.text(row)["inputs_pretokenized"] for row in line["examples"]["tiny_colour"])
    assert sum(record.get("skipped", 0) for record in result.history if record["kind"] == "train") == len(lines)


def test_by_default_the_run_stops_and_says_where(folder):
    config = skipping(folder, "stops", on_bad_step="stop")
    with pytest.raises(
        UserError, match=r"The loss is not finite at step \d+ \(tiny_colour\), whose batch has the examples \d+ of"
    ):
        run_training(config, poisoned(config))


def test_too_many_in_a_row_stop_the_run(folder):
    config = skipping(folder, "too_many", max_skipped_steps=3)
    with pytest.raises(
        UserError, match=r"at step 4 \(tiny_colour, tiny_mood\).*more than TrainConfig\.max_skipped_steps=3 steps in a row"
    ):
        run_training(config, poisoned(config, "the"))


@pytest.mark.parametrize("method", ["plain", "mpt", "none"])
def test_a_resumed_run_skips_the_same_steps(folder, method):
    def config(run, steps):
        train = {"spike_factor": 1.02, "spike_window": 3, "checkpoint_period": 3}
        rules = (("shared", 0.3), ("task_.*", 0.3)) if method == "mpt" else ((".*", 0.01 if method == "none" else 0.3),)
        whole = skipping(folder, f"{method}_{run}", steps, **train)
        return tiny.replace(whole, prompt={"method": method}, optimizer={"rules": rules})

    def timeless(result):
        return [{k: v for k, v in r.items() if k not in ("seconds", "examples_per_second")} for r in result.history]

    straight = run_training(config("straight", 16))
    for steps in (5, 10, 16):
        resumed = run_training(config("stopped", steps))
    assert skipped(straight)
    assert [r for r in timeless(resumed) if r["kind"] == "skipped"] == skipped(straight)
    jax.tree.map(np.testing.assert_array_equal, straight.params, resumed.params)
    assert json.loads((folder / f"{method}_stopped" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 16


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("spike_factor", 0.5, "must be 0 .* or above 1, not 0.5"),
        ("spike_window", 0, "must be positive, not 0"),
        ("on_bad_step", "stopp", "Did you mean 'stop'"),
        ("max_skipped_steps", 0, "must be positive, not 0"),
    ],
)
def test_settings_are_checked(field, value, expected):
    with pytest.raises(UserError, match=rf"TrainConfig\.{field}.*{expected}"):
        TrainConfig(steps=1, model_dir="x", **{field: value}).validate()
