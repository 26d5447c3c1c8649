"""Every test runs on the CPU, off line, with JAX's strictest broadcasting."""

import os

# Before anything imports JAX, TensorFlow or transformers.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compile much and compute little: spend less on optimising the programs, and write them by XLA's older, quicker emitters.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_multi_thread_eigen=false",
)

import jax
from task_folders import data, folder, vocabulary

__all__ = ["data", "folder", "vocabulary"]

jax.config.update("jax_numpy_rank_promotion", "raise")
