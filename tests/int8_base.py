"""`make int8-base`: a random T5 1.1 base in bfloat16 and in int8, against itself in float32; minutes, and 6 GB of memory.

Random weights at T5X's initialisers, random tokens, a prompt of 100 embeddings: the loss, the logits, and the gradient to the
prompt, on the CPU. The numbers are in docs/plan.md, with what they mean.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.config import LossConfig, PromptConfig, T5Config
from mpt_jax.distill import make_loss
from mpt_jax.models.quantize import quantize_params
from mpt_jax.models.t5 import T5, init_params
from mpt_jax.prompted_t5 import batch_prompts, forward
from mpt_jax.prompts import build_prompt

BASE = T5Config(32128, 768, 64, 12, 2048, 12, 12)  # gin/backbones/t5_1_1_base.gin
B, T, L, P = 8, 64, 16, 100
# (of weights, of activations)
NUMERICS = {"float32": ("float32", "float32"), "bfloat16": ("bfloat16", "bfloat16"), "int8": ("int8", "bfloat16")}
NUMERICS["int8, float32 activations"] = ("int8", "float32")


def make_batch(rng):
    targets = rng.integers(3, BASE.vocab_size, (B, L)).astype(np.int32)
    return {
        "encoder_tokens": rng.integers(3, BASE.vocab_size, (B, T)).astype(np.int32),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "loss_weights": np.ones((B, L), np.float32),
        "task_ids": np.zeros(B, np.int32),
    }


def weights_of(params, weights, activations):
    """As they are loaded: what is no kernel of an int8 model has the activations' type."""
    made = quantize_params(jax.device_get(params)) if weights == "int8" else params
    floats = activations if weights == "int8" else weights

    def cast(path, leaf):
        exact = leaf.dtype == np.int8 or path[-1].key.endswith("kernel_scale")
        return jnp.asarray(leaf) if exact else jnp.asarray(leaf, floats)

    return jax.tree_util.tree_map_with_path(cast, made)


def measure(architecture, params, prompt, batch):
    """(loss, gradient, logits) as float64 arrays."""
    model, module = T5(architecture), build_prompt(PromptConfig(length=P), (0,), architecture.d_model)
    loss = make_loss(model, module, LossConfig(normalization="mean"), (0,))

    def run(prompt, params):
        value, _ = loss(prompt, {"backbone": params}, batch, None)
        output = forward(model, params, batch, batch_prompts(module, prompt, model, params, batch))
        return value, output.logits

    (value, logits), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(prompt, params)
    return tuple(np.asarray(array, np.float64) for array in (value, gradient["prompt"], logits))


def cosine(a, b):
    return float(np.ravel(a) @ np.ravel(b) / np.linalg.norm(a) / np.linalg.norm(b))


def compare(name, got, reference):
    loss, gradient, logits = got
    centred = [
        array - array.mean(axis=-1, keepdims=True) for array in (logits, reference[2])
    ]  # a constant changes no probability
    rms = np.sqrt(np.mean((centred[0] - centred[1]) ** 2) / np.mean(centred[1] ** 2))
    same = np.mean(logits.argmax(-1) == reference[2].argmax(-1))
    print(
        f"{name:28s} loss {loss:.4f} ({loss / reference[0] - 1:+.3%}), logits {rms:.2%} off, the same likeliest token "
        f"{same:.1%}, gradient: cosine {cosine(gradient, reference[1]):.5f}, "
        f"norm {np.linalg.norm(gradient) / np.linalg.norm(reference[1]):.4f}",
        flush=True,
    )


def main():
    rng = np.random.default_rng(0)
    batch, params = make_batch(rng), init_params(BASE, jax.random.key(0))
    prompt = {"prompt": params["token_embedder"]["embedding"][None, 100 : 100 + P]}
    found = {}
    for name, (weights, activations) in NUMERICS.items():
        architecture = dataclasses.replace(BASE, param_dtype=weights, dtype=activations)
        stored = weights_of(params, weights, activations)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(stored)) / 2**20
        found[name] = measure(architecture, stored, prompt, batch)
        compare(f"{name} ({size:.0f} MiB)", found[name], found["float32"])
    print("int8 against bfloat16:")
    compare("int8", found["int8"], found["bfloat16"])
    print(f"ln V = {np.log(BASE.vocab_size):.4f}, logits' standard deviation {found['float32'][2].std(axis=-1).mean():.3f}")
    other = init_params(BASE, jax.random.key(1))
    compare("another random base", measure(BASE, other, prompt, batch), found["float32"])


if __name__ == "__main__":
    main()
