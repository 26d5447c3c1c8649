"""Kernels in a byte per weight: what a frozen model needs of memory is halved again, and nothing about its use changes.

Weight only, symmetric, one scale for each output channel of each layer: w ≈ q · s with q in -127 … 127 and s = max |w| / 127. The
product is taken with q and scaled afterwards, in the activations' dtype, to which the scale is rounded. Embedding, norms and
position biases keep their floats.
"""

import numpy as np

from mpt_jax.models.t5 import Params
from mpt_jax.trees import flatten, unflatten

LARGEST = 127


def scale_of(largest: np.ndarray) -> np.ndarray:
    """The scales of channels whose largest weights have these sizes, float32; 1 for a channel of zeros."""
    return np.where(largest > 0, largest / LARGEST, 1.0).astype(np.float32)


def quantized(kernel: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """kernel [..., in, out] in steps of scale [..., out], int8."""
    return np.rint(kernel / scale[..., None, :]).astype(np.int8)


def quantize(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """kernel [..., in, out] → (int8 of that shape, scale [..., out] float32)."""
    kernel = np.asarray(kernel, np.float32)
    scale = scale_of(np.abs(kernel).max(axis=-2))
    return quantized(kernel, scale), scale


def quantize_params(params: Params) -> Params:
    """The parameters of a T5 with `param_dtype` "int8": every `kernel` in two parts, all else as it is."""
    flat = {}
    for path, leaf in flatten(params).items():
        if path.endswith("/kernel"):
            flat[path], flat[f"{path}_scale"] = quantize(leaf)
        else:
            flat[path] = leaf
    return unflatten(flat)
