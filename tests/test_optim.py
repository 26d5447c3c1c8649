"""Optimisers against formulas written out in NumPy, and banks against optimisers of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpt_jax.config import OptimizerConfig
from mpt_jax.errors import UserError
from mpt_jax.optim import learning_rates, make_optimizer, schedule

P, D, R, STEPS = 4, 6, 2, 50
ALL = jnp.array([True])
MPT_GROUPS = (0, 1, 0, 1, 1)


def gradients(steps=STEPS, shape=(P, D), seed=0):
    """Of a size that wanders over two orders of magnitude, as it does in training."""
    rng = np.random.default_rng(seed)
    scale = np.exp(np.cumsum(rng.normal(size=steps) * 0.4))
    return [(s * rng.normal(size=shape)).astype(np.float32) for s in scale]


def run(cfg, param, grads, present=ALL):
    """The parameter after each step, as a bank of one plain prompt."""
    params = {"prompt": jnp.asarray(param)[None]}
    optimizer = make_optimizer(cfg, len(grads), (0,), params)
    state, update, history = optimizer.init(params), jax.jit(optimizer.update), []
    for grad in grads:
        params, state = update({"prompt": jnp.asarray(grad)[None]}, state, params, present)
        history.append(np.asarray(params["prompt"][0]))
    return history


def t5x_adafactor(param, grads, lr, decay, exponent, steps_before):
    """t5x `adafactor.py` for an unfactored parameter without momentum and parameter scaling."""
    v, history, param = np.zeros(param.shape), [], param.astype(np.float64)
    for t, g in enumerate(np.asarray(grads, np.float64)):
        beta2 = np.float32(1) - np.float32(t + 1 + steps_before) ** np.float32(-exponent)  # float32, as there
        v = beta2 * v + (1 - beta2) * (g * g + 1e-30)
        y = g / np.sqrt(v)
        y = y / max(1.0, np.sqrt(np.mean(y * y)))
        param = (1 - decay) * param - lr * y
        history.append(param)
    return history


@pytest.mark.parametrize("steps_before", [0, 1_100_000])
def test_adafactor_is_t5xs(steps_before):
    start = np.random.default_rng(1).normal(size=(P, D)).astype(np.float32)
    cfg = OptimizerConfig(rules=((".*", 0.3),), weight_decay=1e-2, decay_offset=-steps_before)
    ours = run(cfg, start, gradients())
    np.testing.assert_allclose(ours, t5x_adafactor(start, gradients(), 0.3, 1e-2, 0.8, steps_before), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("steps_before", [0, 1_100_000])
def test_a_prompt_on_a_model_of_a_million_steps_moves_by_the_learning_rate(steps_before):
    """T5X hands the restored step to the prompt's Adafactor: its second moment is then a sum, and the RMS clip never rests."""
    cfg = OptimizerConfig(rules=((".*", 0.3),), weight_decay=0.0, decay_offset=-steps_before)
    history = np.stack([np.zeros((P, D)), *run(cfg, np.zeros((P, D), np.float32), gradients())])
    moved = np.sqrt(np.mean(np.diff(history, axis=0) ** 2, axis=(1, 2)))
    if steps_before:
        np.testing.assert_allclose(moved, 0.3, rtol=1e-4)
    else:
        assert moved.max() <= 0.3 * 1.0001 and moved.min() < 0.2


def test_adafactor_scales_by_the_parameter():
    start = np.full((P, D), 5.0, np.float32)
    cfg = OptimizerConfig(rules=((".*", 0.1),), weight_decay=0.0, scale_by_parameter=True)
    np.testing.assert_allclose(np.abs(run(cfg, start, gradients(1))[0] - start), 0.5, rtol=1e-5)


def test_adamw_against_its_formula():
    start = np.random.default_rng(1).normal(size=(P, D)).astype(np.float32)
    cfg = OptimizerConfig(name="adamw", rules=((".*", 0.05),), weight_decay=0.1)
    m = v = np.zeros((P, D))
    param, expected = start.astype(np.float64), []
    for t, g in enumerate(np.asarray(gradients(), np.float64), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        param = param - 0.05 * (step + 0.1 * param)  # PyTorch's AdamW: the decay is multiplied by the rate
        expected.append(param)
    np.testing.assert_allclose(run(cfg, start, gradients()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind, warmup, expected",
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1, 1]),
        ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 1, [0, 1, 0.75, 0.5, 0.25]),
    ],
)
def test_schedule(kind, warmup, expected):
    cfg = OptimizerConfig(schedule=kind, warmup_steps=warmup)
    np.testing.assert_allclose(schedule(cfg, jnp.arange(5), 5), expected, rtol=1e-6)
    assert kind == "constant" or schedule(cfg, jnp.asarray(9), 5) == 0  # never negative after the end


def mpt_tree(rng, groups):
    n, g = len(groups), max(groups) + 1
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in
            (("shared", (g, P, D)), ("task_u", (n, P, R)), ("task_v", (n, R, D)))}  # fmt: skip


def test_two_speeds():
    rng = np.random.default_rng(0)
    params, grads = mpt_tree(rng, (0, 0)), mpt_tree(rng, (0, 0))
    cfg = OptimizerConfig(rules=(("shared", 0.3), ("task_.*", 0.4)), weight_decay=0.0)
    optimizer = make_optimizer(cfg, 1, (0, 0), params)
    new, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params, jnp.ones(2, bool))
    moved = {name: float(jnp.sqrt(jnp.mean(jnp.square(new[name] - params[name])))) for name in params}
    assert moved == pytest.approx({"shared": 0.3, "task_u": 0.4, "task_v": 0.4}, rel=1e-4)


@pytest.mark.parametrize(
    "rules, named",
    [((("shared", 0.3), ("task_u", 0.4)), "task_v"), (((".*", 0.3), ("shared", 0.4)), "shared"), ((("share", 1.0),), "shared")],
)
def test_a_parameter_without_exactly_one_rule_is_an_error_that_names_it(rules, named):
    params = mpt_tree(np.random.default_rng(0), (0,))
    with pytest.raises(UserError, match=f"'{named}'"):
        make_optimizer(OptimizerConfig(rules=rules), 1, (0,), params)
    with pytest.raises(UserError, match=f"'{named}'"):
        make_optimizer(OptimizerConfig(rules=rules), 1, (0,)).init(params)


def test_rules_match_whole_paths():
    assert learning_rates((("a/.*", 1.0), ("b", 2.0)), ["a/x/y", "b"]) == {"a/x/y": 1.0, "b": 2.0}


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_frozen_leaves_hold_no_state_and_do_not_move(name):
    rng = np.random.default_rng(0)
    params, grads = mpt_tree(rng, (0, 0)), mpt_tree(rng, (0, 0))
    grads["shared"] = 1e6 * grads["shared"]  # must not eat up the clipped norm either
    cfg = OptimizerConfig(name=name, rules=(("shared", 0.0), ("task_.*", 0.4)), clip_norm=1e3)
    optimizer = make_optimizer(cfg, 1, (0, 0), params)
    state = optimizer.init(params)
    assert set(state["leaves"]) == {"task_u", "task_v"}
    per_number = 2 if name == "adamw" else 1  # m and v, or v
    tensors = [leaf for leaf in jax.tree.leaves(state["leaves"]) if leaf.ndim > 2]
    assert sum(leaf.size for leaf in tensors) == per_number * (params["task_u"].size + params["task_v"].size)
    new, new_state = jax.jit(optimizer.update)(grads, state, params, jnp.ones(2, bool))
    np.testing.assert_array_equal(new["shared"], params["shared"])
    assert jnp.abs(new["task_u"] - params["task_u"]).min() > 0.1
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_an_absent_prompt_and_its_state_do_not_move(name):
    rng, groups = np.random.default_rng(0), (0, 0, 1)
    params = mpt_tree(rng, groups)
    optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.1, clip_norm=1.0), 10, groups, params)
    update = jax.jit(optimizer.update)
    params, state = update(mpt_tree(rng, groups), optimizer.init(params), params, jnp.ones(3, bool))
    fine, present = mpt_tree(rng, groups), jnp.array([True, False, False])
    absent = {leaf: jnp.array(entries) for leaf, entries in (("shared", [1]), ("task_u", [1, 2]), ("task_v", [1, 2]))}

    def step(value):
        """One update where the absent entries' gradient is `value`."""
        return update({leaf: grad.at[absent[leaf]].set(value) for leaf, grad in fine.items()}, state, params, present)

    new, new_state = step(0.0)
    for leaf, entries in absent.items():
        pairs = zip(
            jax.tree.leaves((new[leaf], new_state["leaves"][leaf])),
            jax.tree.leaves((params[leaf], state["leaves"][leaf])),
            strict=True,
        )
        for after, before in pairs:
            np.testing.assert_array_equal(after[entries], before[entries])
        assert jnp.abs(new[leaf][0] - params[leaf][0]).max() > 1e-2
    np.testing.assert_array_equal(new_state["clock"] - state["clock"], [1, 0])
    # Even a gradient that is large or not a number reaches neither the absent prompt nor, by the norm, its group.
    for value in (1e6, jnp.nan):
        jax.tree.map(np.testing.assert_array_equal, step(value), (new, new_state))


class Alone:
    """One group trained by plain optax: every leaf of every stream its own parameter, one norm over all that take part."""

    def __init__(self, transformation, clip_norm, params):
        self.make, self.clip = transformation, optax.clip_by_global_norm(clip_norm)
        self.params, self.clock = params, 0
        self.states = {name: self.make(0.0).init(value) for name, value in params.items()}
        self.one = jax.jit(self._one)

    def _one(self, rate, grad, state, param):
        updates, state = self.make(rate).update(grad, state, param)
        return param + updates, state

    def step(self, grads, factor):
        clipped, _ = self.clip.update(grads, optax.EmptyState())
        for name, grad in clipped.items():
            rate = factor(self.clock) * (0.3 if name == "shared" else 0.4)
            self.params[name], self.states[name] = self.one(jnp.float32(rate), grad, self.states[name], self.params[name])
        self.clock += 1


def of_group(tree, group, streams):
    """The leaves of one group, under names of their own."""
    result = {"shared": tree["shared"][group]}
    return result | {f"{leaf}{n}": tree[leaf][n] for leaf in ("task_u", "task_v") for n in streams}


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_a_bank_trains_as_its_groups_do_alone(name):
    steps, rng = 12, np.random.default_rng(3)
    cfg = OptimizerConfig(
        name=name, rules=(("shared", 0.3), ("task_.*", 0.4)), clip_norm=5.0, schedule="linear", warmup_steps=2, weight_decay=0.01
    )

    def plain(rate):
        if name == "adamw":
            return optax.adamw(rate, weight_decay=0.01)
        return optax.adafactor(rate, multiply_by_parameter_scale=False, weight_decay_rate=0.01, factored=False)

    def factor(clock):
        return clock / 2 if clock < 2 else (steps - clock) / (steps - 2)

    members = {g: [n for n, group in enumerate(MPT_GROUPS) if group == g] for g in (0, 1)}
    params = mpt_tree(rng, MPT_GROUPS)
    alone = {g: Alone(plain, 5.0, of_group(params, g, streams)) for g, streams in members.items()}
    optimizer = make_optimizer(cfg, steps, MPT_GROUPS, params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(steps):
        present = rng.random(len(MPT_GROUPS)) < 0.4
        grads = jax.tree.map(lambda leaf: leaf * rng.choice([0.1, 1.0]), mpt_tree(rng, MPT_GROUPS))
        grads |= {leaf: jnp.where(present[:, None, None], grads[leaf], 0.0) for leaf in ("task_u", "task_v")}
        group_present = np.array([present[members[g]].any() for g in (0, 1)])
        grads["shared"] = jnp.where(group_present[:, None, None], grads["shared"], 0.0)
        params, state = update(grads, state, params, jnp.asarray(present))
        for g, streams in members.items():
            if group_present[g]:
                alone[g].step(of_group(grads, g, [n for n in streams if present[n]]), factor)
    for g, streams in members.items():
        for leaf, value in of_group(params, g, streams).items():
            np.testing.assert_allclose(value, alone[g].params[leaf], rtol=2e-5, atol=2e-6, err_msg=f"group {g} {leaf}")


@pytest.mark.parametrize("factored", [False, True])
def test_scanned_layers_are_parameters_of_their_own(factored):
    """T5X's Adafactor clips and scales every layer's kernel alone; one leaf that stacks them must give the same."""
    rng = np.random.default_rng(0)
    cfg = OptimizerConfig(rules=((".*", 1e-2),), scale_by_parameter=True, factored=factored)
    param, grad = (jnp.asarray(rng.normal(size=(2, 130, 140)) * [[[1.0]], [[50.0]]], jnp.float32) for _ in range(2))

    def step(path, param, grad):
        params = {"backbone": {"encoder": {path: {"kernel": param}}}}
        grads = {"backbone": {"encoder": {path: {"kernel": grad}}}}
        optimizer = make_optimizer(cfg, 1, (0,), params)
        return jax.jit(optimizer.update)(grads, optimizer.init(params), params, ALL)[0]["backbone"]["encoder"][path]["kernel"]

    stacked = step("layers", param, grad)
    for layer in range(2):
        np.testing.assert_allclose(stacked[layer], step("one", param[layer], grad[layer]), rtol=1e-6)


def test_the_norm_of_a_backbone_is_taken_over_all_of_it():
    params = {"backbone": {"a": jnp.zeros(3), "encoder": {"layers": {"b": jnp.zeros((2, 3))}}}}
    grads = jax.tree.map(jnp.ones_like, params)
    cfg = OptimizerConfig(name="adamw", rules=((".*", 1.0),), clip_norm=1.0, eps=1e8, b1=0.0)  # a huge eps: step = gradient / eps
    optimizer = make_optimizer(cfg, 1, (0,), params)
    new, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params, ALL)
    np.testing.assert_allclose(optax.tree.norm(new) * 1e8, 1.0, rtol=1e-4)
