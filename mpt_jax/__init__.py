"""Multitask prompt tuning of a frozen T5 in JAX/Flax."""

__version__ = "0.1.0"
