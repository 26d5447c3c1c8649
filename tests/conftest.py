"""Every test runs on the CPU, off line, with JAX's strictest broadcasting."""

import os

# Before anything imports JAX, TensorFlow or transformers.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
