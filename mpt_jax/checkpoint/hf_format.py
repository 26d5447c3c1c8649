"""How Hugging Face stores a T5: the names of its tensors and the meaning of its `config.json`.

`import_hf` and `export_hf` both read the one table here, so that what one writes the other reads.
"""

from typing import Any, NamedTuple

from mpt_jax.config import T5Config
from mpt_jax.errors import UserError


class Source(NamedTuple):
    """Where one of our leaves lies in Hugging Face's file: one tensor, or one per layer where `{}` stands for its number."""

    key: str
    transpose: bool  # PyTorch's linear layers are [out, in], ours [in, out]

    def keys(self, layers: int) -> list[str]:
        return [self.key.format(i) for i in range(layers)] if "{}" in self.key else [self.key]


# Tensors that repeat `shared.weight` under another name; they are compared with it and then dropped.
COPIES_OF_EMBEDDING = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# T5 1.0's first files have a position bias for cross-attention that no implementation uses.
IGNORED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)

ARCHITECTURE = {  # our field: (Hugging Face's, its default where config.json leaves it out; None = required)
    "vocab_size": ("vocab_size", None),
    "d_model": ("d_model", None),
    "d_kv": ("d_kv", None),
    "num_heads": ("num_heads", None),
    "d_ff": ("d_ff", None),
    "num_encoder_layers": ("num_layers", None),
    "num_decoder_layers": ("num_decoder_layers", None),  # default: as many as the encoder
    "relpos_buckets": ("relative_attention_num_buckets", 32),
    "relpos_max_distance": ("relative_attention_max_distance", 128),
    "norm_epsilon": ("layer_norm_epsilon", 1e-6),
}
MODEL_TYPES = ("t5", "mt5")  # mT5 is a T5 1.1 by another name; ByT5 calls itself t5; UMT5 has other position biases
_FIXED = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "is_encoder_decoder": True}


def leaf_sources(config: T5Config) -> dict[str, Source]:
    """Path of each leaf in our tree ("a/b/c") → where Hugging Face keeps it (methods: t5x `convert_t5x_checkpoint_to_flax`)."""
    table = {
        "token_embedder/embedding": Source("shared.weight", False),
        "encoder/encoder_norm/scale": Source("encoder.final_layer_norm.weight", False),
        "decoder/decoder_norm/scale": Source("decoder.final_layer_norm.weight", False),
    }
    if not config.tie_embeddings:
        table["decoder/logits_dense/kernel"] = Source("lm_head.weight", True)
    mlp = ("wi", "wo") if config.activation == "relu" else ("wi_0", "wi_1", "wo")
    for stack, sublayers in (
        ("encoder", (("attention", "attention", "SelfAttention"), ("mlp", "mlp", "DenseReluDense"))),
        (
            "decoder",
            (
                ("self_attention", "self_attention", "SelfAttention"),
                ("encoder_decoder_attention", "cross_attention", "EncDecAttention"),
                ("mlp", "mlp", "DenseReluDense"),
            ),
        ),
    ):
        table[f"{stack}/relpos_bias/rel_embedding"] = Source(
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", True
        )
        for number, (ours, norm, theirs) in enumerate(sublayers):
            base = f"{stack}.block.{{}}.layer.{number}"
            table[f"{stack}/layers/pre_{norm}_layer_norm/scale"] = Source(f"{base}.layer_norm.weight", False)
            names = {name: name for name in mlp} if ours == "mlp" else {"query": "q", "key": "k", "value": "v", "out": "o"}
            for name, their_name in names.items():
                table[f"{stack}/layers/{ours}/{name}/kernel"] = Source(f"{base}.{theirs}.{their_name}.weight", True)
    return table


def parse_config(values: dict[str, Any], tie_embeddings: bool, file: str) -> T5Config:
    """Hugging Face's config.json → ours. What this code cannot reproduce is refused by field, not approximated."""
    if values.get("model_type", "t5") not in MODEL_TYPES:
        raise UserError(
            f"{file} has model_type={values['model_type']!r}; only {' and '.join(MODEL_TYPES)} are supported, so this model "
            "cannot be imported."
        )
    for field, wanted in _FIXED.items():
        if values.get(field, wanted) != wanted:
            raise UserError(
                f"{file} has {field}={values[field]!r}; only {wanted!r} is supported, so this model cannot be imported."
            )
    activation = values.get("feed_forward_proj", "relu")
    if activation not in ("relu", "gated-gelu"):
        raise UserError(
            f"{file} has feed_forward_proj={activation!r}; only 'relu' (T5 1.0) and 'gated-gelu' (T5 1.1) are supported."
        )
    ours: dict[str, Any] = {}
    for field, (theirs, default) in ARCHITECTURE.items():
        value = values.get(theirs)
        if value is None:  # absent, or null as transformers writes for "as many as the encoder"
            value = ours["num_encoder_layers"] if field == "num_decoder_layers" else default
        number = float if field == "norm_epsilon" else int
        if type(value) is not number or value <= 0:
            raise UserError(
                f"{file} has {theirs}={value!r}, but a positive {number.__name__} is needed; is this the config of a T5?"
            )
        ours[field] = value
    return T5Config(**ours, activation=activation, tie_embeddings=tie_embeddings)


def outputs_are_scaled(values: dict[str, Any]) -> bool:
    """Whether this config multiplies the decoder's output by D**-0.5 (T5 1.0).

    transformers 5 writes `scale_decoder_outputs` and always `tie_word_embeddings=true`; before, the latter stood for both. An
    mT5 is never scaled, and transformers 5 writes only the latter for it (`modeling_mt5.py`).
    """
    if values.get("model_type") == "mt5":
        return False
    scaled = values.get("scale_decoder_outputs")
    return values.get("tie_word_embeddings") is not False if scaled is None else bool(scaled)


def to_hf_config(config: T5Config, dtype: str) -> dict[str, Any]:
    """Ours → a config.json that transformers 4 and 5 and `parse_config` read alike."""
    values = {theirs: getattr(config, field) for field, (theirs, _) in ARCHITECTURE.items()}
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **_FIXED,
        **values,
        "feed_forward_proj": config.activation,
        "dropout_rate": 0.1,  # a property of training; Hugging Face's default
        "initializer_factor": 1.0,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
    }
