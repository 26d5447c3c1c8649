"""T5 1.0 and 1.1 in Flax Linen."""

from mpt_jax.models.t5 import (
    T5,
    Cache,
    Decoded,
    Encoded,
    count_parameters,
    init_params,
    logical_axes,
    param_shapes,
    start_cache,
)

__all__ = [
    "T5",
    "Cache",
    "Decoded",
    "Encoded",
    "count_parameters",
    "init_params",
    "logical_axes",
    "param_shapes",
    "start_cache",
]
