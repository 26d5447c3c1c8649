"""The parts of a T5 block. Semantics and parameter names: t5x `examples/t5/{layers,network}.py`.

No module here has a bias, attention scores are not divided by sqrt(K), norms only scale; norms and softmax are float32.
Parameters carry logical axis names (T5X's).
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.config import T5Config

MASKED = -1e10  # added to the score of a position that must not be attended to; exp of it is exactly 0

Initializer = Callable[..., jax.Array]
fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
fan_in_truncated = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def mask_bias(mask: jax.Array) -> jax.Array:
    """0/1 mask [B, S] of keys, or [B, Q, S] of queries and keys → additive float32 bias [B, 1, 1, S] or [B, 1, Q, S]."""
    mask = mask[:, None, :] if mask.ndim == 2 else mask
    return jnp.where(mask[:, None] > 0, 0.0, MASKED).astype(jnp.float32)


def relative_buckets(distance: jax.Array, bidirectional: bool, num_buckets: int, max_distance: int) -> jax.Array:
    """Bucket of each `key position - query position`, int32 of the same shape.

    Half of the buckets hold one small distance each, the others widen logarithmically up to `max_distance`; farther
    positions share the last one. With `bidirectional`, each direction has half of all buckets; without, all keys after
    the query fall into bucket 0. Raffel et al. 2020 §2.1; t5x `layers.py:RelativePositionBiases`.
    """
    behind = -distance
    offset = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(behind < 0, num_buckets, 0)
        behind = jnp.abs(behind)
    else:
        behind = jnp.maximum(behind, 0)
    exact = num_buckets // 2
    # float32 as in T5X and Hugging Face: float64 would put a few boundary distances elsewhere.
    ratio = jnp.log(behind.astype(jnp.float32) / exact + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    wide = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return (offset + jnp.where(behind < exact, behind, wide)).astype(jnp.int32)


# The three functions below are cheap to compute and costly to store. Their backward passes keep the inputs only (softmax: the
# output only); without this, a scan over layers would stack 2 [B, H, S, S] and 7 [B, S, F] arrays per layer.


@partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    y = (x32 * jax.lax.rsqrt(mean_square + epsilon)).astype(scale.dtype)
    return y * scale.reshape((1,) * (x.ndim - 1) + (-1,))


@partial(jax.checkpoint, prevent_cse=False)
def _gated_gelu(gate: jax.Array, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(gate, approximate=True) * x


@jax.custom_jvp
def softmax(x: jax.Array) -> jax.Array:
    """Softmax over the last axis."""
    return jax.nn.softmax(x, axis=-1)


@softmax.defjvp
def _softmax_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y, dx = softmax(*primals), tangents[0]
    return y, y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) * scale, statistics in float32, result in the activations' dtype."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        scale = self.param("scale", init, (x.shape[-1],), float_dtype(config))
        return _rms_norm(x, scale.astype(config.dtype), config.norm_epsilon)


def float_dtype(config: T5Config) -> str:
    """Of the weights that are no matrix products' kernels: `param_dtype`, or beside int8 kernels the activations' dtype."""
    return config.dtype if config.param_dtype == "int8" else config.param_dtype


def kernel_of(
    module: nn.Module, config: T5Config, shape: tuple[int, int], axes: tuple[str, str], init: Initializer
) -> tuple[jax.Array, jax.Array | None]:
    """The parameter `kernel` [in, out] of a module; of an int8 model also `kernel_scale` [out] float32, see `quantize.py`."""
    if config.param_dtype != "int8":
        return module.param("kernel", nn.with_logical_partitioning(init, axes), shape, config.param_dtype), None
    kernel = module.param("kernel", nn.with_logical_partitioning(nn.initializers.zeros_init(), axes), shape, jnp.int8)
    ones = nn.with_logical_partitioning(nn.initializers.ones_init(), axes[1:])
    return kernel, module.param("kernel_scale", ones, shape[1:], jnp.float32)


def apply_kernel(x: jax.Array, kernel: jax.Array, scale: jax.Array | None) -> jax.Array:
    """x [..., in] @ kernel [in, out], in the dtype of x; what an int8 kernel gives is scaled by output channel afterwards."""
    y = jnp.dot(x, kernel.astype(x.dtype))
    return y if scale is None else y * scale.astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class Dense(nn.Module):
    """x [..., in] @ kernel [in, out]."""

    config: T5Config
    features: int
    axes: tuple[str, str]
    kernel_init: Initializer = fan_in_truncated

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, scale = kernel_of(self, self.config, (x.shape[-1], self.features), self.axes, self.kernel_init)
        return apply_kernel(x.astype(self.config.dtype), kernel, scale)


class LogitsDense(nn.Module):
    """The untied output layer: x [..., D] @ kernel [D, V] in float32."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        shape = config.d_model, config.vocab_size
        kernel, scale = kernel_of(self, config, shape, ("embed", "vocab"), fan_in_truncated)
        if scale is None:
            return float32_dot(x, kernel)
        return float32_dot(x, kernel.astype(x.dtype)) * scale[None, None]


class Embed(nn.Module):
    """Token embedding; `attend` is its use as the output layer of T5 1.0."""

    config: T5Config

    def setup(self) -> None:
        config = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(stddev=1.0), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (config.vocab_size, config.d_model), float_dtype(config))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] → [B, T, D]. An id outside the vocabulary gives NaN, never another token's embedding."""
        return jnp.take(self.embedding, tokens, axis=0, mode="fill").astype(self.config.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """x [B, L, D] → logits [B, L, V] float32, scaled by D**-0.5 as T5 1.0 wants it."""
        return float32_dot(x * self.config.d_model**-0.5, self.embedding.T)


def float32_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Matrix product accumulated and returned in float32; bfloat16 operands are not copied to float32 first."""
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    return jnp.dot(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)


class RelativePositionBias(nn.Module):
    """Per head bias by the distance of key and query; one table per stack (rel_embedding [H, buckets])."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Positions [Q] and [S] → bias [1, H, Q, S] float32."""
        config = self.config
        init = nn.with_logical_partitioning(
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"), ("heads", "relpos_buckets")
        )
        table = self.param("rel_embedding", init, (config.num_heads, config.relpos_buckets), float_dtype(config))
        distance = key_positions[None, :] - query_positions[:, None]
        buckets = relative_buckets(distance, self.bidirectional, config.relpos_buckets, config.relpos_max_distance)
        return jnp.take(table.astype(jnp.float32), buckets, axis=1)[None]


class Attention(nn.Module):
    """Multi-head attention; keys and values are [B, H, S, K], so that a cache holds them as the products want them."""

    config: T5Config
    deterministic: bool

    def setup(self) -> None:
        config = self.config
        width = config.num_heads * config.d_kv
        self.query = Dense(config, width, ("embed", "joined_kv"), _query_init(config.d_kv))
        self.key = Dense(config, width, ("embed", "joined_kv"), fan_in_normal)
        self.value = Dense(config, width, ("embed", "joined_kv"), fan_in_normal)
        self.out = Dense(config, config.d_model, ("joined_kv", "embed"), fan_in_normal)
        self.dropout = Dropout(config.dropout_rate, self.deterministic)

    def keys_values(self, source: jax.Array) -> tuple[jax.Array, jax.Array]:
        """source [B, S, D] → keys and values, each [B, H, S, K]."""
        return split_heads(self.key(source), self.config.num_heads), split_heads(self.value(source), self.config.num_heads)

    def __call__(self, x: jax.Array, key: jax.Array, value: jax.Array, biases: Sequence[jax.Array]) -> jax.Array:
        """x [B, Q, D], key and value [B, H, S, K], biases each broadcastable to [B, H, Q, S] → [B, Q, D]."""
        query = split_heads(self.query(x), self.config.num_heads)
        scores = jnp.einsum("bhqk,bhsk->bhqs", query, key, preferred_element_type=jnp.float32)
        y = jnp.einsum("bhqs,bhsk->bhqk", self._weights(scores, biases), value)
        y = y.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[1], -1)
        return self.out(y)

    def to_source(self, x: jax.Array, source: jax.Array, biases: Sequence[jax.Array]) -> jax.Array:
        """What `__call__` computes with the keys and values of source [B, S, D], which are never made.

        (q Kᵀ) with K = source Wk is (q Wkᵀ) sourceᵀ, and w (source Wv) is (w source) Wv. With few queries these are far fewer
        operations; see `few_queries`. The kernels have to be there: not for `init`.
        """
        config = self.config
        key, value = (dense.variables["params"] for dense in (self.key, self.value))
        shape = source.shape[-1], config.num_heads, -1  # of a kernel: D, H, K
        source = source.astype(config.dtype)
        query = self.query(x)
        if (scale := key.get("kernel_scale")) is not None:
            query = query * scale.astype(query.dtype)[None, None]
        query = split_heads(query, config.num_heads)
        query = jnp.einsum("bhqk,dhk->bhqd", query, key["kernel"].astype(config.dtype).reshape(shape))
        scores = jnp.einsum("bhqd,bsd->bhqs", query, source, preferred_element_type=jnp.float32)
        y = jnp.einsum("bhqs,bsd->bhqd", self._weights(scores, biases), source)
        y = jnp.einsum("bhqd,dhk->bqhk", y, value["kernel"].astype(config.dtype).reshape(shape))
        y = y.reshape(x.shape[0], x.shape[1], -1)
        if (scale := value.get("kernel_scale")) is not None:
            y = y * scale.astype(y.dtype)[None, None]
        return self.out(y)

    def _weights(self, scores: jax.Array, biases: Sequence[jax.Array]) -> jax.Array:
        for bias in biases:  # added one by one: their sum over batch and heads is never stored
            scores = scores + bias
        return self.dropout(softmax(scores).astype(self.config.dtype))


def few_queries(queries: int, source: int, head_width: int) -> bool:
    """Whether attention of Q queries to S positions takes fewer operations without keys and values (`Attention.to_source`).

    Keys and values take 4 S D H K operations forward and as many backward to the source. Without them 4 Q (S + K) D H take their
    place and twice as many backward, where both operands of a product have a gradient.
    """
    return 3 * queries * (source + head_width) < 2 * source * head_width


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[B, T, H*K] → [B, H, T, K]."""
    return x.reshape(x.shape[0], x.shape[1], num_heads, -1).transpose(0, 2, 1, 3)


def _query_init(head_width: int) -> Initializer:
    """T5X puts the missing 1/sqrt(K) of the scores into the queries' initial values."""
    return nn.initializers.variance_scaling(1.0 / head_width, "fan_in", "normal")


class Mlp(nn.Module):
    """relu(x wi) wo, or gelu(x wi_0) * (x wi_1) wo with the tanh form of gelu (`gelu_new`)."""

    config: T5Config
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, axes = self.config, ("embed", "mlp")
        if config.activation == "relu":
            y = jax.nn.relu(Dense(config, config.d_ff, axes, name="wi")(x))
        else:
            gate = Dense(config, config.d_ff, axes, name="wi_0")(x)
            y = _gated_gelu(gate, Dense(config, config.d_ff, axes, name="wi_1")(x))
        y = Dropout(config.dropout_rate, self.deterministic)(y)
        return Dense(config, config.d_model, ("mlp", "embed"), name="wo")(y)


def Dropout(rate: float, deterministic: bool) -> nn.Dropout:
    """T5X's dropout: one mask for all positions of the next to last axis. Random numbers: "dropout"."""
    return nn.Dropout(rate, broadcast_dims=(-2,), deterministic=deterministic)
