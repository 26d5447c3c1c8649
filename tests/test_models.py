"""Properties of the T5 modules that need no reference implementation (parity: test_parity_hf.py)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.config import T5Config
from mpt_jax.costs import work_of
from mpt_jax.errors import UserError
from mpt_jax.models import T5, Cache, Decoded, Encoded, count_parameters, init_params, logical_axes, param_shapes, start_cache
from mpt_jax.models.layers import Attention, Dropout, RelativePositionBias, few_queries, relative_buckets
from mpt_jax.models.t5 import mimetic
from mpt_jax.trees import flatten

V1_1 = T5Config(vocab_size=41, d_model=16, d_kv=4, num_heads=3, d_ff=24, num_encoder_layers=2, num_decoder_layers=3)
V1_0 = dataclasses.replace(V1_1, activation="relu", tie_embeddings=True)
BOTH = pytest.mark.parametrize("config", [V1_1, V1_0], ids=["v1.1", "v1.0"])


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, V1_1.vocab_size, (rows, length))


@functools.cache
def params_of(config: T5Config) -> Any:
    return init_params(config, jax.random.key(1))


@functools.partial(jax.jit, static_argnames="config")
def forward(
    config: T5Config, params: Any, inputs: Any, targets: Any, mask: Any, dropout_key: jax.Array | None = None
) -> tuple[Encoded, Decoded]:
    model, variables = T5(config), {"params": params}
    options: dict[str, Any] = {"return_hidden": True, "deterministic": dropout_key is None}
    options["rngs"] = {} if dropout_key is None else {"dropout": dropout_key}
    x = model.apply(variables, inputs, method="embed")
    encoded = model.apply(variables, x, mask, method="encode", **options)
    return encoded, model.apply(variables, targets, encoded.output, mask, method="decode", **options)


# d_model, heads, layers of each stack, d_ff, parameters (Lester et al. 2021, Table 4)
SIZES = {
    "small": (512, 6, 8, 1024, 76_961_152),
    "base": (768, 12, 12, 2048, 247_577_856),
    "large": (1024, 16, 24, 2816, 783_150_080),
    "xl": (2048, 32, 24, 5120, 2_849_757_184),
    "xxl": (4096, 64, 24, 10240, 11_135_332_352),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_of_t5_1_1(size: str) -> None:
    d_model, heads, layers, d_ff, expected = SIZES[size]
    assert count_parameters(T5Config(32128, d_model, 64, heads, d_ff, layers, layers)) == expected


def test_parameter_names_shapes_and_axes() -> None:
    shapes, axes = flatten(param_shapes(V1_1)), flatten(logical_axes(V1_1))
    assert shapes.keys() == axes.keys()
    for path, shape in shapes.items():
        assert len(axes[path]) == len(shape.shape), path
        assert (axes[path][0] == "layers") == ("/layers/" in path)
    assert shapes["encoder/layers/attention/query/kernel"].shape == (2, 16, 12)
    assert axes["encoder/layers/attention/query/kernel"] == ("layers", "embed", "joined_kv")
    assert axes["decoder/layers/encoder_decoder_attention/out/kernel"] == ("layers", "joined_kv", "embed")
    assert axes["decoder/layers/mlp/wi_1/kernel"] == ("layers", "embed", "mlp")
    assert axes["decoder/layers/mlp/wo/kernel"] == ("layers", "mlp", "embed")
    assert axes["token_embedder/embedding"] == ("vocab", "embed")
    assert axes["decoder/logits_dense/kernel"] == ("embed", "vocab")
    assert axes["encoder/relpos_bias/rel_embedding"] == ("heads", "relpos_buckets")
    assert axes["decoder/layers/pre_cross_attention_layer_norm/scale"] == ("layers", "embed")
    assert axes["decoder/decoder_norm/scale"] == ("embed",)
    tied = flatten(param_shapes(V1_0))
    assert shapes.keys() - tied.keys() == {
        "decoder/logits_dense/kernel",
        *(f"{stack}/layers/mlp/wi_{i}/kernel" for stack in ("encoder", "decoder") for i in (0, 1)),
    }
    assert tied.keys() - shapes.keys() == {"encoder/layers/mlp/wi/kernel", "decoder/layers/mlp/wi/kernel"}


def test_initial_values_are_t5x_s() -> None:
    config = dataclasses.replace(V1_1, d_model=64, d_kv=16, num_heads=4, vocab_size=400, d_ff=96)
    params = flatten(init_params(config, jax.random.key(0)))
    assert params.keys() == flatten(param_shapes(config)).keys()
    deviations = {
        "token_embedder/embedding": 1.0,
        "encoder/layers/attention/query/kernel": (64 * 16) ** -0.5,
        "encoder/layers/attention/key/kernel": 64**-0.5,
        "decoder/layers/self_attention/out/kernel": 64**-0.5,
        "decoder/layers/mlp/wi_0/kernel": 64**-0.5,
        "decoder/layers/mlp/wo/kernel": 96**-0.5,
        "decoder/logits_dense/kernel": 64**-0.5,
    }
    for path, expected in deviations.items():
        assert np.std(params[path]) == pytest.approx(expected, rel=0.05), path
    layers = params["encoder/layers/attention/key/kernel"]
    assert not np.allclose(layers[0], layers[1])  # each layer draws its own
    assert (params["encoder/layers/pre_mlp_layer_norm/scale"] == 1).all()


def test_mimetic_heads_attend_to_equal_tokens_and_to_neighbours() -> None:
    config = dataclasses.replace(V1_1, d_model=64, d_kv=16, num_heads=4)
    plain = init_params(config, jax.random.key(0))
    params = mimetic(plain, config, 2)
    x = jax.random.normal(jax.random.key(1), (50, config.d_model))  # as RMSNorm leaves 50 different tokens
    for stack, name in (("encoder", "attention"), ("decoder", "self_attention"), ("decoder", "encoder_decoder_attention")):
        attention = params[stack]["layers"][name]
        query, key = (
            jnp.dot(x, attention[part]["kernel"][0]).reshape(50, config.num_heads, config.d_kv) for part in ("query", "key")
        )
        nearest = jnp.einsum("qhk,shk->hqs", query, key).argmax(-1)
        matched = (np.asarray(nearest) == np.arange(50)).mean(axis=1)
        assert (matched[:2] > 0.9).all() and (matched[2:] < 0.2).all()
    jax.tree.map(np.testing.assert_array_equal, mimetic(plain, config, 0), plain)
    positions, biases = jnp.arange(9), {"params": params["encoder"]["relpos_bias"]}
    bias = RelativePositionBias(config, bidirectional=True).apply(biases, positions, positions)
    assert (bias[0, :2].argmin(-1) == positions[None]).all()  # not itself
    assert (bias[0, 2].argmax(-1)[1:] == jnp.arange(8)).all() and (bias[0, 3].argmax(-1)[:-1] == jnp.arange(1, 9)).all()
    for heads in (3, -1):
        with pytest.raises(UserError, match=f"mimetic_heads is {heads}, but an attention has 4 heads"):
            mimetic(plain, config, heads)


@BOTH
def test_padding_never_changes_an_example(config: T5Config) -> None:
    params = params_of(config)
    inputs, targets = tokens(3, 6), tokens(3, 5, seed=1)
    lengths = np.array([6, 4, 1])
    mask = (np.arange(9)[None] < lengths[:, None]).astype(np.int32)
    rng = np.random.default_rng(3)
    padded = np.where(mask > 0, np.pad(inputs, ((0, 0), (0, 3))), rng.integers(0, 41, mask.shape))  # whatever stands there
    together, decoded_together = forward(config, params, padded, targets, mask)
    for row, length in enumerate(lengths[1:], start=1):
        alone, decoded = forward(config, params, inputs[row : row + 1, :length], targets[row : row + 1], np.ones((1, length)))
        np.testing.assert_allclose(together.output[row, :length], alone.output[0], atol=2e-5)
        np.testing.assert_allclose(decoded_together.logits[row], decoded.logits[0], atol=5e-5)


@BOTH
def test_decoder_is_causal(config: T5Config) -> None:
    params = params_of(config)
    inputs, targets = tokens(2, 6), tokens(2, 5, seed=1)
    changed = targets.copy()
    changed[:, 3:] = 7
    _, before = forward(config, params, inputs, targets, np.ones((2, 6)))
    _, after = forward(config, params, inputs, changed, np.ones((2, 6)))
    np.testing.assert_array_equal(before.logits[:, :3], after.logits[:, :3])
    assert not np.allclose(before.logits[:, 3:], after.logits[:, 3:])


@BOTH
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1), (3, 1, 2)], ids=["one-by-one", "in-pieces"])
def test_cached_decoding_equals_uncached(config: T5Config, chunks: tuple[int, ...]) -> None:
    params = params_of(config)
    inputs, targets = tokens(3, 7), tokens(3, 6, seed=1)
    mask = (np.arange(7)[None] < np.array([[7], [4], [2]])).astype(np.float32)
    encoded, whole = forward(config, params, inputs, targets, mask)
    model = T5(config)
    cache = start_cache(model, params, encoded.output, max_length=8)  # longer than what is decoded

    @jax.jit
    def step(cache: Cache, tokens: jax.Array) -> Decoded:
        return model.apply({"params": params}, tokens, None, mask, cache=cache, return_hidden=True, method="decode")

    logits, hidden, start = [], [], 0
    for chunk in chunks:
        decoded = step(cache, targets[:, start : start + chunk])
        cache, start = decoded.cache, start + chunk
        logits.append(decoded.logits)
        hidden.append(decoded.hidden)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), whole.logits, atol=2e-5)
    np.testing.assert_allclose(np.concatenate(hidden, axis=2), whole.hidden, atol=2e-5)
    assert int(cache.position) == 6


def attend(config: T5Config, params: Any, x: Any, source: Any, bias: Any, few: bool) -> jax.Array:
    def run(module: Attention, x: Any, source: Any) -> jax.Array:
        return module.to_source(x, source, (bias,)) if few else module(x, *module.keys_values(source), (bias,))

    return Attention(config, True).apply({"params": params}, x, source, method=run)


@pytest.mark.parametrize("param_dtype", ["float32", "int8"])
def test_attention_without_keys_and_values_is_the_same(param_dtype: str) -> None:
    """Values, and gradients to the queries' input and to the source, with a masked position."""
    config, rng = dataclasses.replace(V1_1, param_dtype=param_dtype), np.random.default_rng(0)
    shapes = param_shapes(config)["decoder"]["layers"]["encoder_decoder_attention"]
    draw = {"int8": lambda shape: rng.integers(-127, 128, shape).astype(np.int8)}.get(param_dtype, rng.standard_normal)
    params = {
        name: {
            leaf: (draw(shape.shape[1:]) if leaf == "kernel" else rng.uniform(1e-3, 5e-3, shape.shape[1:])).astype(shape.dtype)
            for leaf, shape in kernel.items()
        }
        for name, kernel in shapes.items()
    }
    x, source = (rng.standard_normal((2, length, 16)).astype(np.float32) for length in (3, 7))
    bias = np.where(np.arange(7) < [[7], [5]], 0.0, -1e10).astype(np.float32)[:, None, None]

    def values_and_gradients(few: bool) -> Any:
        value, back = jax.vjp(lambda x, source: attend(config, params, x, source, bias, few), x, source)
        return value, *back(jnp.sin(value))

    for ours, expected in zip(values_and_gradients(True), values_and_gradients(False), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())
        assert np.abs(expected).max() > 1e-2


@pytest.mark.parametrize("source", [16, 64, 228])
def test_few_queries_take_fewer_operations(source: int) -> None:
    """Forward and backward to the source and the queries' input."""
    config = dataclasses.replace(V1_1, d_kv=16, d_model=48)
    shapes = param_shapes(config)["decoder"]["layers"]["encoder_decoder_attention"]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes)
    chosen = [few_queries(queries, source, config.d_kv) for queries in range(1, 17)]
    assert chosen[0] and not chosen[-1] and chosen == sorted(chosen, reverse=True)

    def flops(queries: int, few: bool) -> float:
        def loss(x: Any, other: Any, params: Any) -> jax.Array:
            return attend(config, params, x, other, jnp.zeros((1, 1, 1, source)), few).sum()

        x, other = (jax.ShapeDtypeStruct((1, length, config.d_model), jnp.float32) for length in (queries, source))
        return work_of(jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, other, params)).flops

    for queries in range(1, 1 + sum(chosen)):
        assert flops(queries, True) < flops(queries, False)
    assert flops(16, True) > flops(16, False)


def test_remat_changes_no_value_and_no_gradient() -> None:
    params = params_of(V1_1)
    inputs, targets = tokens(2, 6), tokens(2, 4, seed=1)

    def loss_and_gradient(remat: str) -> Any:
        config = dataclasses.replace(V1_1, remat=remat, dropout_rate=0.2)

        def loss(trained: Any) -> jax.Array:
            merged = params | {"token_embedder": trained}
            _, decoded = forward(config, merged, inputs, targets, np.ones((2, 6)), jax.random.key(9))
            return jnp.square(decoded.logits).mean()

        return jax.jit(jax.value_and_grad(loss))(params["token_embedder"])

    expected = loss_and_gradient("none")
    for remat in ("full", "dots"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), loss_and_gradient(remat), expected)


def test_remat_stores_less() -> None:
    """The gradient by a prompt's position must not keep every layer's activations when it is told not to."""
    shape = jax.ShapeDtypeStruct((4, 32, 16), jnp.float32)

    def stored(remat: str) -> int:
        model = T5(dataclasses.replace(V1_1, remat=remat, num_encoder_layers=8))
        params = param_shapes(model.config)

        def encode(params: Any, x: jax.Array) -> Any:
            output, back = jax.vjp(lambda x: model.apply({"params": params}, x, jnp.ones((4, 32)), method="encode").output, x)
            return output, back

        _, residuals = jax.eval_shape(encode, params, shape)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    sizes = {remat: stored(remat) for remat in ("full", "dots", "none")}
    assert sizes["full"] < sizes["dots"] < sizes["none"]


def test_dtypes_are_separate_and_logits_float32() -> None:
    full = params_of(V1_1)
    inputs, targets, mask = tokens(2, 6), tokens(2, 4, seed=1), np.ones((2, 6))
    expected_encoded, expected = forward(V1_1, full, inputs, targets, mask)
    for dtype, param_dtype in (("bfloat16", "float32"), ("float32", "bfloat16")):
        config = dataclasses.replace(V1_1, dtype=dtype, param_dtype=param_dtype)
        params = jax.tree.map(lambda leaf, d=param_dtype: leaf.astype(d), full)
        assert {leaf.dtype for leaf in jax.tree.leaves(param_shapes(config))} == {jnp.dtype(param_dtype)}
        encoded, decoded = forward(config, params, inputs, targets, mask)
        assert encoded.output.dtype == encoded.hidden.dtype == decoded.hidden.dtype == jnp.dtype(dtype)
        assert decoded.logits.dtype == jnp.float32
        for ours, reference in ((encoded.output, expected_encoded.output), (decoded.logits, expected.logits)):
            error = np.asarray(ours, np.float32) - np.asarray(reference)
            assert 0 < np.sqrt(np.mean(error**2)) < 0.05 * np.std(reference)


def test_bfloat16_keeps_norms_and_softmax_in_float32() -> None:
    """Every reduction (mean of squares, softmax's maximum and sum) of the traced bfloat16 model is over float32."""
    config = dataclasses.replace(V1_1, dtype="bfloat16", param_dtype="bfloat16")
    shapes = param_shapes(config)
    jaxpr = jax.make_jaxpr(lambda p: T5(config).apply({"params": p}, tokens(2, 6), tokens(2, 4)))(shapes)
    found: dict[str, set[Any]] = {}

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("reduce_sum", "reduce_max", "exp", "rsqrt"):
                found.setdefault(equation.primitive.name, set()).add(equation.invars[0].aval.dtype)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jaxpr.jaxpr)
    assert found == {name: {jnp.dtype("float32")} for name in ("reduce_sum", "reduce_max", "exp", "rsqrt")}


def test_dropout_is_one_mask_for_all_positions() -> None:
    y = Dropout(0.5, deterministic=False).apply({}, jnp.ones((3, 5, 64)), rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1], y.shape))
    assert set(np.unique(y)) == {0.0, 2.0}
    assert not np.array_equal(y[0], y[1])


def test_dropout_depends_on_its_key_alone() -> None:
    config = dataclasses.replace(V1_1, dropout_rate=0.3)
    params = params_of(V1_1)
    inputs, targets, mask = tokens(2, 6), tokens(2, 4, seed=1), np.ones((2, 6))

    def logits(key: jax.Array | None, config: T5Config = config) -> np.ndarray:
        return np.asarray(forward(config, params, inputs, targets, mask, key)[1].logits)

    np.testing.assert_array_equal(logits(jax.random.key(0)), logits(jax.random.key(0)))
    assert not np.allclose(logits(jax.random.key(0)), logits(jax.random.key(1)))
    np.testing.assert_array_equal(logits(None), logits(None, V1_1))


def test_an_id_outside_the_vocabulary_is_not_another_token() -> None:
    params = params_of(V1_1)
    x = T5(V1_1).apply({"params": params}, np.array([[40, 41]]), method="embed")
    assert np.isfinite(x[0, 0]).all()
    assert np.isnan(x[0, 1]).all()


def test_relative_buckets() -> None:
    """T5's table: 16 + 16 buckets by direction in the encoder, all 32 for the past in the decoder, 128 and beyond in the last."""
    distance = np.array([-1000, -128, -127, -9, -8, -7, -1, 0, 1, 7, 8, 127, 128, 1000])
    both = relative_buckets(jnp.asarray(distance), bidirectional=True, num_buckets=32, max_distance=128)
    assert both.tolist() == [15, 15, 15, 8, 8, 7, 1, 0, 17, 23, 24, 31, 31, 31]
    past = relative_buckets(jnp.asarray(distance), bidirectional=False, num_buckets=32, max_distance=128)
    assert past.tolist() == [31, 31, 31, 9, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0]
