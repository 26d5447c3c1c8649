"""Configuration of the frozen T5."""

import dataclasses

from mpt_jax.config.checks import check, choice

DTYPES = ("float32", "bfloat16")
NUMERICS = ("dropout_rate", "dtype", "param_dtype", "remat")  # of T5Config; the other fields are the architecture


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Architecture and numerics of a T5 (sizes: Raffel et al. 2020; 1.1: t5x `examples/t5/t5_1_1`)."""

    vocab_size: int
    d_model: int
    d_kv: int
    num_heads: int
    d_ff: int
    num_encoder_layers: int
    num_decoder_layers: int
    activation: str = "gated-gelu"  # "gated-gelu" (T5 1.1) or "relu" (T5 1.0)
    tie_embeddings: bool = False  # T5 1.0: logits from the embedding, scaled by d_model**-0.5
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    norm_epsilon: float = 1e-6
    dropout_rate: float = 0.0  # T5X fine-tunes with 0.1
    dtype: str = "float32"  # of activations; norms, softmax and logits are always float32
    param_dtype: str = "float32"  # of the weights in memory; "int8" for the kernels of a frozen model, a byte and a scale each
    remat: str = "none"  # "none", "full" (store only each layer's input) or "dots" (also keep matrix products)

    def validate(self) -> None:
        for name in ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_encoder_layers", "num_decoder_layers"):
            check(getattr(self, name) > 0, f"T5Config.{name} must be positive, not {getattr(self, name)}")
        choice("T5Config.activation", self.activation, ("gated-gelu", "relu"))
        choice("T5Config.dtype", self.dtype, DTYPES)
        choice("T5Config.param_dtype", self.param_dtype, (*DTYPES, "int8"))
        choice("T5Config.remat", self.remat, ("none", "full", "dots"))
        check(0 <= self.dropout_rate < 1, f"T5Config.dropout_rate must be in [0, 1), not {self.dropout_rate}")


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Where the frozen T5 comes from."""

    # "embedded:mini", a T5X checkpoint, a Hugging Face folder, what `import` wrote, a run that tuned a model, or "scratch"
    checkpoint: str
    architecture: T5Config
    vocabulary: str = ""  # SentencePiece file or "bytes" (ByT5); "" takes what lies beside the weights (T5X's have none)
    mimetic_heads: int = 0  # "scratch" only: heads of each attention that start by attending to equal tokens (`mimetic`)
