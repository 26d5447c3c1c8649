"""A random batch in the loader's form, for tests of what comes after the loader."""

import jax.numpy as jnp
import numpy as np


def random_batch(shape, vocabulary, target_end, task_ids):
    """`shape` is (B, T, L); row 1 is padded from position 3 of its input on, row 2 from `target_end` of its target."""
    b, t, length = shape
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(3, vocabulary, (b, t)), rng.integers(3, vocabulary, (b, length))
    tokens[1, 3:] = 0
    targets[2, target_end:] = 0
    inputs = np.concatenate([np.zeros((b, 1), targets.dtype), targets[:, :-1]], axis=1)
    return {
        "encoder_tokens": jnp.asarray(tokens),
        "decoder_input_tokens": jnp.asarray(inputs),
        "decoder_target_tokens": jnp.asarray(targets),
        "loss_weights": jnp.asarray(targets > 0, jnp.float32),
        "task_ids": jnp.array(task_ids),
    }
