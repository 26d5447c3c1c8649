"""Random T5s of Hugging Face's `transformers`, the reference of the parity and import tests."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from mpt_jax.config import T5Config
from mpt_jax.models import param_shapes

V1_1 = T5Config(
    vocab_size=53, d_model=24, d_kv=5, num_heads=3, d_ff=40, num_encoder_layers=2, num_decoder_layers=2, activation="gated-gelu"
)
V1_0 = dataclasses.replace(V1_1, activation="relu", tie_embeddings=True)

CONFIGS = {
    "v1.1": V1_1,
    "v1.1-1-layer": dataclasses.replace(V1_1, num_encoder_layers=1, num_decoder_layers=1, d_kv=8),
    "v1.1-4-2": dataclasses.replace(V1_1, num_encoder_layers=4, num_decoder_layers=2, num_heads=2),
    "v1.1-1-3-buckets": dataclasses.replace(
        V1_1, num_encoder_layers=1, num_decoder_layers=3, relpos_buckets=8, relpos_max_distance=10, norm_epsilon=1e-5
    ),
    "v1.0": V1_0,
    "v1.0-3-1": dataclasses.replace(V1_0, num_encoder_layers=3, num_decoder_layers=1, d_model=16),
    "v1.0-4-layers": dataclasses.replace(V1_0, num_encoder_layers=4, num_decoder_layers=4),
}


def random_hf_model(config: T5Config, seed: int = 0) -> transformers.T5ForConditionalGeneration:
    """Float32, in evaluation mode, with no parameter at a value (ones, zeros) that would hide a mistake."""
    torch.manual_seed(seed)
    hf_config = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_heads=config.num_heads,
        num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
        relative_attention_num_buckets=config.relpos_buckets,
        relative_attention_max_distance=config.relpos_max_distance,
        layer_norm_epsilon=config.norm_epsilon,
        feed_forward_proj=config.activation,
        tie_word_embeddings=config.tie_embeddings,
        decoder_start_token_id=0,
        attn_implementation="eager",
    )
    model = transformers.T5ForConditionalGeneration(hf_config)
    if not config.tie_embeddings:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif "relative_attention_bias" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif name == "shared.weight":  # small, so that the norms' epsilon counts; tied, it must also make logits spread
                parameter.copy_(torch.randn_like(parameter) * (0.5 if config.tie_embeddings else 0.1))
        model.lm_head.weight[1] *= 2.5  # EOS (the tied embedding, too): generated texts must end at different lengths
    return model.eval()


def random_params(config: T5Config, seed: int = 0) -> dict[str, Any]:
    """Our tree filled with normal float32 numbers; nothing needs to be compiled for it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), param_shapes(config))


def save_hf_model(model: transformers.T5ForConditionalGeneration, folder: Path, max_shard_size: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
