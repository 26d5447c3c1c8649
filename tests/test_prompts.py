"""Prompt modules against plain loops, and where prompts start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.config import PromptConfig
from mpt_jax.errors import UserError
from mpt_jax.prompts import METHODS, bank_axis, build_prompt, compose
from mpt_jax.prompts.files import save_prompts
from mpt_jax.prompts.init import initial_prompt

P, D, V, B, T = 4, 6, 40, 5, 3
GROUPS = (0, 1, 0, 2)
TASK_IDS = jnp.array([3, 0, 2, 1, 0])
WORDS = {"good": [7], "very bad": [8, 9, 11], "": []}


@pytest.fixture(scope="module")
def embedding():
    return jnp.asarray(np.random.default_rng(0).normal(size=(V, D)), jnp.float32)


@pytest.fixture
def start(embedding):
    def make(cfg, groups=GROUPS, seeds=None, **rest):
        seeds = tuple(range(max(groups) + 1)) if seeds is None else seeds
        key = jax.random.key(rest.pop("key", 0))
        backbone = {"embed": embedding.__getitem__, "d_model": D, "vocab_size": len(embedding)}
        rest = backbone | {"tokenize": WORDS.__getitem__} | rest
        return initial_prompt(cfg, groups=groups, seeds=seeds, key=key, **rest)

    return make


def config(method="plain", **fields):
    return PromptConfig(**{"method": method, "length": P, "init": "uniform", "init_population": 30} | fields)


def apply(cfg, params, task_ids=TASK_IDS, groups=GROUPS):
    module = build_prompt(cfg, groups, D)
    return module.apply({"params": params}, task_ids, jnp.zeros((len(task_ids), T, D)), jnp.ones((len(task_ids), T)))


def random_mpt(rank=2, groups=GROUPS):
    rng, n, g = np.random.default_rng(1), len(groups), max(groups) + 1
    shapes = {"shared": (g, P, D), "task_u": (n, P, rank), "task_v": (n, rank, D)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_none_has_no_prompt_and_unknown_methods_are_errors():
    assert build_prompt(config("none"), GROUPS, D) is None
    with pytest.raises(UserError, match="'plane'.*Did you mean 'plain'"):
        build_prompt(config("plane"), GROUPS, D)


@pytest.mark.parametrize("method", METHODS)
def test_equal_modules_are_one_key_of_the_compilation_cache(method):
    one, two, other = (build_prompt(config(method), groups, D) for groups in (GROUPS, list(GROUPS), (0, 1, 2, 3)))
    assert one == two and hash(one) == hash(two) and one != other
    traced = []
    jitted = jax.jit(lambda module, params: traced.append(0) or module.apply({"params": params}, *inputs), static_argnums=0)
    inputs = (TASK_IDS, jnp.zeros((B, T, D)), jnp.ones((B, T)))
    params = one.init(jax.random.key(0), *inputs)["params"]
    jitted(one, params), jitted(two, params)
    assert len(traced) == 1


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_banks_over_groups_or_streams(method, start):
    params = start(config(method, rank=2))
    for name, leaf in params.items():
        assert len(leaf) == {"group": 3, "stream": 4}[bank_axis(name)], name
        assert leaf.dtype == jnp.float32
    declared = build_prompt(config(method, rank=2), GROUPS, D).init(
        jax.random.key(0), TASK_IDS, jnp.zeros((B, T, D)), jnp.ones((B, T))
    )["params"]
    assert jax.tree.map(jnp.shape, declared) == jax.tree.map(jnp.shape, params)


def test_plain_takes_the_prompt_of_the_examples_group():
    prompt = np.random.default_rng(0).normal(size=(3, P, D)).astype(np.float32)
    ours = apply(config(), {"prompt": prompt})
    for row, task in enumerate(TASK_IDS):
        np.testing.assert_array_equal(ours[row], prompt[GROUPS[task]])


@pytest.mark.parametrize("rank", [1, 3])
def test_mpt_against_a_loop(rank):
    params = random_mpt(rank)
    ours = apply(config("mpt", rank=rank), params)
    for row, task in enumerate(np.asarray(TASK_IDS)):
        shared, u, v = params["shared"][GROUPS[task]], params["task_u"][task], params["task_v"][task]
        for p, d in np.ndindex(P, D):
            expected = shared[p, d] * sum(u[p, r] * v[r, d] for r in range(rank))
            np.testing.assert_allclose(ours[row, p, d], expected, rtol=1e-5, atol=1e-6)


def test_mpt_with_factors_of_one_is_the_plain_prompt():
    params = random_mpt(1)
    ones = {"shared": params["shared"], "task_u": np.ones((4, P, 1), np.float32), "task_v": np.ones((4, 1, D), np.float32)}
    np.testing.assert_array_equal(apply(config("mpt"), ones), apply(config(), {"prompt": params["shared"]}))


@pytest.mark.parametrize("method", METHODS)
def test_the_composed_matrix_is_the_prompt(method):
    params = random_mpt() if method == "mpt" else {"prompt": random_mpt()["shared"]}
    plain = compose(method, params, GROUPS)
    assert plain.shape == (4, P, D)
    np.testing.assert_array_equal(plain[TASK_IDS], apply(config(method, rank=2), params))


def test_a_shared_group_gets_every_streams_gradient_and_separate_groups_their_own():
    def gradient(groups, wanted):
        params = random_mpt(2, groups)
        total = lambda params: (apply(config("mpt", rank=2), params, wanted, groups) ** 2).sum()  # noqa: E731
        return jax.grad(total)(params)["shared"]

    both = jnp.array([0, 1])
    assert (jnp.abs(gradient((0, 0), both)) > 0).all()
    separate = gradient((0, 1), jnp.array([1]))
    assert (separate[0] == 0).all() and (jnp.abs(separate[1]) > 0).all()


def test_uniform_ranges(start):
    lester = start(config(init="uniform", init_scale=0.5))["prompt"]
    t5x = start(config(init="uniform_positive", init_scale=0.5))["prompt"]
    assert -0.5 <= lester.min() < -0.3 and 0.3 < lester.max() < 0.5
    assert 0 <= t5x.min() < 0.1 and 0.4 < t5x.max() < 0.5


def rows_of(prompt, embedding):
    """The vocabulary id of each prompt token, -1 where it is none."""
    same = (np.asarray(prompt)[:, None] == np.asarray(embedding)[None]).all(axis=-1)
    return [int(row.argmax()) if row.any() else -1 for row in same]


def test_vocab_draws_different_ids_of_the_population(start, embedding):
    ids = rows_of(start(config(init="vocab", init_population=5), seeds=(0, 1, 2))["prompt"][0], embedding)
    assert len(set(ids)) == P and set(ids) <= set(range(5))
    everything = rows_of(start(config(init="vocab", init_population=P))["prompt"][1], embedding)
    assert sorted(everything) == list(range(P))
    used = rows_of(start(config(init="vocab"), vocab_size=P)["prompt"][0], embedding)  # no text has the ids above, as of ByT5
    assert sorted(used) == list(range(P))
    with pytest.raises(UserError, match="PROMPT_LENGTH is 4 .* 3 tokens"):
        start(config(init="vocab", init_population=3))


def test_labels_are_means_of_their_pieces_and_the_rest_is_vocab(start, embedding):
    cfg = config(init="labels", init_labels=("good", "very bad"))
    prompt = start(cfg)["prompt"][0]
    np.testing.assert_array_equal(prompt[0], embedding[7])
    np.testing.assert_allclose(prompt[1], (embedding[8] + embedding[9] + embedding[11]) / 3, rtol=1e-6)
    assert all(0 <= row < 30 for row in rows_of(prompt[2:], embedding))
    with pytest.raises(UserError, match="init_labels has ''"):
        start(config(init="labels", init_labels=("",)))


def test_labels_beyond_the_prompt_s_length_are_left_out_and_told(start, embedding, caplog):
    """As prompt-tuning's `from_embedded_list` does, with a warning too; other prompts of the bank have room for theirs."""
    cfg = config(init="labels", length=2)
    labels = [("good", "very bad"), ("good", "very bad", "fine", "poor"), ("very bad", "fine")]
    with caplog.at_level("WARNING", logger="mpt_jax"):
        prompts = start(cfg, groups=(0, 1, 2), lengths=(2, 2, 1), labels=labels)["prompt"]
    very_bad = (embedding[8] + embedding[9] + embedding[11]) / 3
    for prompt in prompts[:2]:
        np.testing.assert_array_equal(prompt[0], embedding[7])
        np.testing.assert_allclose(prompt[1], very_bad, rtol=1e-6)
    np.testing.assert_allclose(prompts[2][1], very_bad, rtol=1e-6)  # the one token that is not masked
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "'fine', 'poor'" in told[0] and "'fine'" in told[1]


def test_text_is_laid_out_token_by_token_and_cut(start, embedding):
    assert rows_of(start(config(init="text", init_text="very bad"))["prompt"][0], embedding)[:3] == [8, 9, 11]
    assert rows_of(start(config(init="text", init_text="very bad", length=2))["prompt"][0], embedding) == [8, 9]


@pytest.mark.parametrize("init", ["uniform", "uniform_positive", "vocab", "labels", "text"])
@pytest.mark.parametrize("method", METHODS)
def test_the_seed_and_not_the_place_decides_the_start(method, init, start):
    cfg = config(method, init=init, rank=2, init_labels=("good",), init_text="very bad")
    bank = start(cfg, groups=(0, 1, 2), seeds=(5, 9, 5))
    alone = start(cfg, groups=(0,), seeds=(9,))
    other_key = start(cfg, groups=(0,), seeds=(9,), key=1)
    for name, leaf in bank.items():
        np.testing.assert_array_equal(leaf[1], alone[name][0])
        np.testing.assert_array_equal(leaf[0], leaf[2])
        if name != "task_u":
            assert not np.array_equal(leaf[0], leaf[1])
            assert not np.array_equal(alone[name], other_key[name])


@pytest.mark.parametrize("rank", [1, 3])
def test_factors_of_ones_start_at_the_shared_prompt_with_ranks_that_differ(rank, start):
    cfg = config("mpt", rank=rank, factor_init="ones")
    params = start(cfg)
    plain = start(dataclasses.replace(cfg, method="plain"))["prompt"]
    np.testing.assert_allclose(compose("mpt", params, GROUPS), plain[jnp.array(GROUPS)], rtol=1e-5)
    if rank > 1:
        assert jnp.abs(params["task_v"][:, 0] - params["task_v"][:, 1]).min() > 0
    assert (params["task_v"][0] == params["task_v"][2]).all() == (rank == 1)  # noise of a stream, not of its group


def test_normal_factors(start):
    params = start(config("mpt", factor_init="normal", factor_scale=0.02, rank=8), groups=(0,) * 40, seeds=(0,))
    for name in ("task_u", "task_v"):
        assert float(params[name].std()) == pytest.approx(0.02, rel=0.1) and abs(float(params[name].mean())) < 0.002


def write(path, params, tasks, groups, **meta):
    seeds = [0] * (max(groups) + 1)
    meta |= {"tasks": tasks, "groups": groups, "seeds": seeds, "scores": [None] * len(seeds)}
    return str(save_prompts(path, params, meta))


@pytest.fixture
def source(tmp_path):
    """An MPT source run: one shared prompt, three tasks."""
    params = random_mpt(2, (0, 0, 0))
    return params, write(tmp_path / "source.safetensors", params, ["a", "b", "c"], [0, 0, 0], backbone="f00d")


def test_mpt_from_an_mpt_file_takes_the_mean_or_one_sources_factors(source, start):
    params, path = source
    cfg = config("mpt", init="file", init_file=path, rank=2)
    mean = start(cfg, fingerprint="f00d")
    for group in range(3):
        np.testing.assert_array_equal(mean["shared"][group], params["shared"][0])
    for name in ("task_u", "task_v"):
        for stream in range(4):
            np.testing.assert_allclose(mean[name][stream], params[name].mean(axis=0), rtol=1e-6)
    one = start(dataclasses.replace(cfg, factor_source="b"))
    np.testing.assert_array_equal(one["task_u"][3], params["task_u"][1])
    chosen = start(dataclasses.replace(cfg, init_file=path + "#b"))
    np.testing.assert_array_equal(chosen["task_v"][0], params["task_v"][1])
    with pytest.raises(UserError, match="factor_source is 'd'"):
        start(dataclasses.replace(cfg, factor_source="d"))
    with pytest.raises(UserError, match="rank"):
        start(dataclasses.replace(cfg, rank=1))


def test_plain_from_an_mpt_file_is_the_composed_prompt(source, start):
    params, path = source
    composed = compose("mpt", params, (0, 0, 0))
    chosen = start(config(init="file", init_file=path + "#c"))["prompt"]
    np.testing.assert_allclose(chosen, np.stack([composed[2]] * 3), rtol=1e-6)
    np.testing.assert_allclose(start(config(init="file", init_file=path))["prompt"][1], composed.mean(axis=0), rtol=1e-5)


def test_mpt_from_a_plain_file_starts_at_that_prompt(tmp_path, start):
    prompt = random_mpt()["shared"]
    path = write(tmp_path / "p.safetensors", {"prompt": prompt}, ["a", "b", "c"], [0, 1, 2])
    params = start(config("mpt", init="file", init_file=path + "#b"))
    np.testing.assert_array_equal(params["shared"], np.stack([prompt[1]] * 3))
    np.testing.assert_array_equal(compose("mpt", params, GROUPS)[3], prompt[1])


def test_a_bank_starts_from_a_bank_only_when_asked_to(tmp_path, start):
    prompt = random_mpt()["shared"]
    path = write(tmp_path / "p.safetensors", {"prompt": prompt}, ["a", "b", "a2", "c"], list(GROUPS))
    np.testing.assert_array_equal(start(config(init="file", init_file=path + "#*"))["prompt"], prompt)
    with pytest.raises(UserError, match="holds 3 prompts for a, a2, b, c; choose one"):
        start(config(init="file", init_file=path))
    with pytest.raises(UserError, match="equal banks"):
        start(config(init="file", init_file=path + "#*"), groups=(0, 1, 2, 3))
    mpt = write(tmp_path / "m.safetensors", random_mpt(2), ["a", "b", "a2", "c"], list(GROUPS))
    params = start(config("mpt", init="file", init_file=mpt + "#*", rank=2))
    np.testing.assert_array_equal(params["task_u"], random_mpt(2)["task_u"])
    with pytest.raises(UserError, match="task_u.*rank"):
        start(config("mpt", init="file", init_file=mpt + "#*", rank=1))


def test_a_file_that_does_not_fit_is_an_error_with_both_values(source, start):
    _, path = source
    cfg = config("mpt", init="file", init_file=path, rank=2)
    with pytest.raises(UserError, match="f00d.*beef"):
        start(cfg, fingerprint="beef")
    with pytest.raises(UserError, match="4 tokens but PROMPT_LENGTH is 7"):
        start(dataclasses.replace(cfg, length=7))
