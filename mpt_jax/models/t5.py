"""T5 1.0 and 1.1 (Raffel et al. 2020; t5x `examples/t5`, `examples/scalable_t5`) in Flax Linen.

The layers of a stack are one scanned block, so every leaf under `encoder/layers` and `decoder/layers` has a leading axis
"layers" and compile time does not grow with depth. `encode` takes embeddings, because prompts are put in front of them.
Parameters are a plain nested dict; letters are those of `shapes.py`.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mpt_jax.config import T5Config
from mpt_jax.errors import UserError
from mpt_jax.models.layers import (
    MASKED,
    Attention,
    Dropout,
    Embed,
    LogitsDense,
    Mlp,
    RelativePositionBias,
    RMSNorm,
    apply_kernel,
    few_queries,
    mask_bias,
    relative_buckets,
    split_heads,
)
from mpt_jax.trees import flatten, unflatten

Params = dict[str, Any]


class Encoded(NamedTuple):
    output: jax.Array  # [B, S, D], after the final norm
    hidden: jax.Array | None  # [layers, B, S, D], after each block


class Cache(NamedTuple):
    """State of step-by-step decoding; the leading axis of the four arrays is the layer, M the longest target.

    An input may have C targets, decoded side by side; C = 1 from `start_cache`.
    """

    position: jax.Array  # int32 scalar, number of tokens already decoded
    self_key: jax.Array  # [layers, B * C, H, M, K]
    self_value: jax.Array
    cross_key: jax.Array  # [layers, B, H, S, K]
    cross_value: jax.Array


class Decoded(NamedTuple):
    logits: jax.Array  # [B, L, V] float32
    hidden: jax.Array | None  # [layers, B, L, D], after each block
    cache: Cache | None


class LayerCache(NamedTuple):
    """One layer's part of `Cache`."""

    self_key: jax.Array
    self_value: jax.Array
    cross_key: jax.Array
    cross_value: jax.Array


class EncoderBlock(nn.Module):
    config: T5Config
    rows: NamedSharding | None
    deterministic: bool
    return_hidden: bool

    @nn.compact
    def __call__(self, x: jax.Array, biases: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array | None]:
        config, dropout = self.config, Dropout(self.config.dropout_rate, self.deterministic)
        attention = Attention(config, self.deterministic, name="attention")
        y = _lying(RMSNorm(config, name="pre_attention_layer_norm")(x), self.rows)
        x = _lying(x + dropout(attention(y, *attention.keys_values(y), biases)), self.rows)
        y = _lying(RMSNorm(config, name="pre_mlp_layer_norm")(x), self.rows)
        x = _lying(x + dropout(Mlp(config, self.deterministic, name="mlp")(y)), self.rows)
        return x, x if self.return_hidden else None


class DecoderBlock(nn.Module):
    config: T5Config
    rows: NamedSharding | None
    deterministic: bool
    return_hidden: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: LayerCache | None,
        position: jax.Array,
        encoded: jax.Array | None,
        self_biases: tuple[jax.Array, ...],
        cross_bias: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array | None, tuple[jax.Array, jax.Array] | None]]:
        config, dropout = self.config, Dropout(self.config.dropout_rate, self.deterministic)
        attention = Attention(config, self.deterministic, name="self_attention")
        cross_attention = Attention(config, self.deterministic, name="encoder_decoder_attention")

        y = _lying(RMSNorm(config, name="pre_self_attention_layer_norm")(x), self.rows)
        key, value = attention.keys_values(y)
        if cache is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache.self_key, key, position, axis=2)
            value = jax.lax.dynamic_update_slice_in_dim(cache.self_value, value, position, axis=2)
        x = _lying(x + dropout(attention(y, key, value, self_biases)), self.rows)

        y = _lying(RMSNorm(config, name="pre_cross_attention_layer_norm")(x), self.rows)
        source = encoded if cache is None else cache.cross_key
        assert source is not None, "decode needs the encoder's output or a cache"
        # Cross-attention knows no positions: an input's C targets are C * L queries to the same keys, which are not copied.
        queries = y.reshape(source.shape[0], -1, y.shape[-1])
        if cache is not None:
            read = cross_attention(queries, cache.cross_key, cache.cross_value, (cross_bias,))
        elif few_queries(queries.shape[1], source.shape[1], config.d_kv) and not self.is_initializing():
            read = cross_attention.to_source(queries, source, (cross_bias,))
        else:
            read = cross_attention(queries, *cross_attention.keys_values(source), (cross_bias,))
        x = _lying(x + dropout(read.reshape(y.shape)), self.rows)

        y = _lying(RMSNorm(config, name="pre_mlp_layer_norm")(x), self.rows)
        x = _lying(x + dropout(Mlp(config, self.deterministic, name="mlp")(y)), self.rows)
        return x, (x if self.return_hidden else None, None if cache is None else (key, value))


class Encoder(nn.Module):
    config: T5Config
    rows: NamedSharding | None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool, return_hidden: bool) -> Encoded:
        config, dropout = self.config, Dropout(self.config.dropout_rate, deterministic)
        positions = jnp.arange(x.shape[1])
        position_bias = RelativePositionBias(config, bidirectional=True, name="relpos_bias")(positions, positions)
        x = _lying(dropout(x.astype(config.dtype)), self.rows)
        layers = _stack(EncoderBlock, config, config.num_encoder_layers, in_axes=(nn.broadcast,))
        x, hidden = layers(config, self.rows, deterministic, return_hidden, name="layers")(x, (position_bias, mask_bias(mask)))
        return Encoded(_lying(dropout(RMSNorm(config, name="encoder_norm")(x)), self.rows), hidden)


class Decoder(nn.Module):
    config: T5Config
    rows: NamedSharding | None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array | None,
        mask: jax.Array,
        self_mask: jax.Array | None,
        embed: Embed,
        cache: Cache | None,
        deterministic: bool,
        return_hidden: bool,
    ) -> Decoded:
        config, dropout = self.config, Dropout(self.config.dropout_rate, deterministic)
        position = jnp.zeros((), jnp.int32) if cache is None else cache.position
        query_positions = position + jnp.arange(x.shape[1])
        key_positions = jnp.arange(x.shape[1] if cache is None else cache.self_key.shape[3])
        causal = key_positions[None, None, None, :] <= query_positions[None, None, :, None]
        position_bias = RelativePositionBias(config, bidirectional=False, name="relpos_bias")(query_positions, key_positions)
        self_biases: tuple[jax.Array, ...] = (jnp.where(causal, position_bias, MASKED),)
        if self_mask is not None:
            self_biases += (mask_bias(self_mask),)

        x = _lying(dropout(x), self.rows)
        layers = _stack(DecoderBlock, config, config.num_decoder_layers, in_axes=(0, *(nn.broadcast,) * 4))
        layer_cache = None if cache is None else LayerCache(*cache[1:])
        source = None if encoded is None else encoded.astype(config.dtype)
        x, (hidden, self_cache) = layers(config, self.rows, deterministic, return_hidden, name="layers")(
            x, layer_cache, position, source, self_biases, mask_bias(mask)
        )
        x = _lying(dropout(RMSNorm(config, name="decoder_norm")(x)), self.rows)
        logits = embed.attend(x) if config.tie_embeddings else LogitsDense(config, name="logits_dense")(x)
        if cache is not None:
            cache = cache._replace(position=cache.position + x.shape[1], self_key=self_cache[0], self_value=self_cache[1])
        return Decoded(logits, hidden, cache)


def _lying(x: jax.Array, rows: NamedSharding | None) -> jax.Array:
    """Activations [B,…] that lie so; with None wherever the compiler has them."""
    return x if rows is None else jax.lax.with_sharding_constraint(x, rows)


def _stack(block: type[nn.Module], config: T5Config, layers: int, in_axes: tuple[Any, ...]) -> Any:
    """`layers` copies of `block`, one after the other, with their parameters stacked on axis 0."""
    if config.remat != "none":
        policy = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[config.remat]
        block = nn.remat(block, policy=policy, prevent_cse=False)  # inside a scan nothing can be merged by CSE anyway
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        out_axes=0,
        length=layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class T5(nn.Module):
    """Encoder-decoder: `T5(config).apply({"params": params}, ..., method="encode")`, with dropout also `rngs={"dropout": k}`.

    Attributes:
        rows: where activations [B,…] lie between the parts of a layer, see `partitioning.rows_sharding`.
    """

    config: T5Config
    rows: NamedSharding | None = None

    def setup(self) -> None:
        self.token_embedder = Embed(self.config)
        self.encoder = Encoder(self.config, self.rows)
        self.decoder = Decoder(self.config, self.rows)

    def __call__(self, encoder_tokens: jax.Array, decoder_input_tokens: jax.Array) -> jax.Array:
        """Tokens [B, T] and [B, L] → logits [B, L, V], without dropout."""
        mask = encoder_tokens > 0
        encoded = self.encode(self.embed(encoder_tokens), mask).output
        return self.decode(decoder_input_tokens, encoded, mask).logits

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] → embeddings [B, T, D], unscaled, before dropout."""
        return self.token_embedder(tokens)

    def encode(self, x: jax.Array, mask: jax.Array, *, deterministic: bool = True, return_hidden: bool = False) -> Encoded:
        """Embeddings x [B, S, D], mask (1 = attend) → `Encoded`. Masked positions influence no other position.

        The mask is of keys [B, S], or of queries and keys [B, S, S] where not all positions of a row may attend to one another.
        """
        return self.encoder(x, mask, deterministic, return_hidden)

    def decode(
        self,
        tokens: jax.Array,
        encoded: jax.Array | None,
        mask: jax.Array,
        *,
        self_mask: jax.Array | None = None,
        deterministic: bool = True,
        cache: Cache | None = None,
        return_hidden: bool = False,
    ) -> Decoded:
        """Decoder input tokens [B, L] (first one 0), the encoder's output [B, S, D] and its mask [B, S] → `Decoded`.

        An input may have C targets, then tokens are [B * C, L], the targets of one input side by side; so is what comes back.
        Causal only: padding among the decoder's inputs is not masked, as in T5X and Hugging Face. Of packed rows, `self_mask`
        [B, L, L] and `mask` [B, L, S] are of queries and keys. With a cache from
        `start_cache`, `tokens` are the next L ones, the cache comes back advanced, and `encoded` is not looked at (None will do).
        """
        x = self.token_embedder(tokens)
        return self.decoder(x, encoded, mask, self_mask, self.token_embedder, cache, deterministic, return_hidden)


def start_cache(model: T5, params: Params, encoded: jax.Array, max_length: int) -> Cache:
    """An empty cache for `max_length` target positions, with the cross-attention's keys and values of encoded [B, S, D]."""
    config = model.config
    attention = params["decoder"]["layers"]["encoder_decoder_attention"]
    source = encoded.astype(config.dtype)

    def project(dense: Params) -> jax.Array:
        def one_layer(one: Params) -> jax.Array:
            return split_heads(apply_kernel(source, one["kernel"], one.get("kernel_scale")), config.num_heads)

        return jax.lax.map(one_layer, dense)

    shape = (config.num_decoder_layers, encoded.shape[0], config.num_heads, max_length, config.d_kv)
    empty = jnp.zeros(shape, config.dtype)
    key, value = project(attention["key"]), project(attention["value"])
    return Cache(jnp.zeros((), jnp.int32), empty, empty, key, value)


def _init(config: T5Config, key: jax.Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return T5(config).init(key, tokens, tokens)["params"]


def init_params(config: T5Config, key: jax.Array) -> Params:
    """Random parameters with T5X's initialisers, for pretraining from scratch."""
    return jax.jit(lambda key: nn.unbox(_init(config, key)))(key)


NOT_ITSELF, NEIGHBOUR = -6.0, 4.0  # position biases against scores that differ by about 6 between equal and other tokens


def mimetic(params: Params, config: T5Config, heads: int) -> Params:
    """Random parameters whose heads look where a trained T5's look, in the spirit of Trockman and Kolter 2023 (arXiv 2305.09828).

    The first `heads` heads of every attention attend to tokens equal to the querying one (their keys' weights are a multiple
    of their queries'), in the encoder not to itself; the encoder's next two heads attend to the token before and the token
    after. What the decoder reads from the encoder it writes as it is (out = valueᵀ), and untied logits start as the
    embedding's. Nothing stays tied. A T5 from scratch learns to look words up and to compare them tens of times sooner so.

    Raises:
        UserError: an attention has too few heads.
    """
    if heads and not 0 < heads <= config.num_heads - 2:
        raise UserError(
            f"BackboneConfig.mimetic_heads is {heads}, but an attention has {config.num_heads} heads, of which two look at "
            f"neighbours; choose 1 to {config.num_heads - 2}, or 0."
        )
    if not heads:
        return params
    flat, width = flatten(params), heads * config.d_kv
    for path, kernel in flat.items():
        if path.endswith("/key/kernel"):  # [layers, D, H*K]
            query = flat[path.replace("/key/", "/query/")]
            # T5's queries start smaller than its keys by the square root of K: the scores' usual 1/sqrt(K).
            flat[path] = kernel.at[..., :width].set(query[..., :width] * config.d_kv**0.5)
        elif path.endswith("/encoder_decoder_attention/out/kernel"):
            flat[path] = flat[path.replace("/out/", "/value/")].swapaxes(-1, -2)
        elif path == "decoder/logits_dense/kernel":
            flat[path] = flat["token_embedder/embedding"].T / config.d_model**0.5
        elif path == "encoder/relpos_bias/rel_embedding":  # [H, buckets]
            itself, before, after = relative_buckets(
                jnp.asarray([0, -1, 1]), True, config.relpos_buckets, config.relpos_max_distance
            )
            biases = kernel.at[:heads, itself].set(NOT_ITSELF)
            flat[path] = biases.at[heads, before].set(NEIGHBOUR).at[heads + 1, after].set(NEIGHBOUR)
    return unflatten(flat)


def param_shapes(config: T5Config) -> Params:
    """The tree of parameters as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return nn.unbox(_boxed_shapes(config))


def logical_axes(config: T5Config) -> Params:
    """For each parameter the tuple of its logical axis names, as in `param_shapes`' tree."""

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, nn.LogicallyPartitioned)

    return jax.tree.map(lambda box: tuple(box.names), _boxed_shapes(config), is_leaf=is_box)


@functools.lru_cache(maxsize=32)  # tracing a T5 takes a quarter of a second, and every run asks
def _boxed_shapes(config: T5Config) -> Params:
    return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


def count_parameters(config: T5Config) -> int:
    """Number of parameters, from shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))
