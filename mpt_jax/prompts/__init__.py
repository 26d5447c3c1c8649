"""Prompts: one file per method, one registry, initialisers and prompt files."""

from mpt_jax.prompts import mpt, plain  # noqa: F401  (registers the methods)
from mpt_jax.prompts.base import METHODS, Prompt, bank_axis, build_prompt, compose, number_of_groups

__all__ = ["METHODS", "Prompt", "bank_axis", "build_prompt", "compose", "number_of_groups"]
