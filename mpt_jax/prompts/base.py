"""What a prompt is, and the registry of methods.

A prompt module owns the prompts of N streams in G independent groups (`groups[n]` is the group of stream n) and maps
`(task_ids [B], x [B,T,D], mask [B,T])` to soft tokens `[B,P,D]`. The leading axis of each of its parameters is a bank
axis, over groups or, when the name begins with `task_`, over streams; the optimiser is vectorised over it.

A method is one file: a subclass of `Prompt` under `@register("name")`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np

from mpt_jax.config import PromptConfig, nearest
from mpt_jax.errors import UserError

Params = dict[str, Any]  # one flat dict: a prompt's leaves have no folders
Groups = tuple[int, ...]


class Prompt(nn.Module):
    """Base of all methods. Fields are static and hashable, so that equal modules share compiled programs."""

    groups: Groups  # [N], the group of each stream
    length: int  # P
    d_model: int  # D

    method: ClassVar[str] = ""

    @property
    def num_groups(self) -> int:
        return number_of_groups(self.groups)

    def __call__(self, task_ids: jax.Array, x: jax.Array, mask: jax.Array) -> jax.Array:
        """(task_ids [B], embedded inputs x [B,T,D], their mask [B,T]) → the examples' prompts [B,P,D]."""
        raise NotImplementedError

    @classmethod
    def build(cls, cfg: PromptConfig, groups: Groups, d_model: int) -> "Prompt":
        """The module for a configuration."""
        return cls(groups=groups, length=cfg.length, d_model=d_model)

    @staticmethod
    def compose(params: Params, groups: Groups) -> jax.Array:
        """The plain prompt of every stream, [N,P,D]: what a tool that knows plain prompts only would load."""
        raise NotImplementedError

    @staticmethod
    def initial(cfg: PromptConfig, base: jax.Array, groups: Groups, keys: jax.Array) -> Params:
        """Parameters that start from plain prompts `base` [G,P,D]; `keys` [G] are the groups' random keys."""
        raise NotImplementedError

    @staticmethod
    def resume(cfg: PromptConfig, source: Params, meta: dict[str, Any], groups: Groups) -> Params | None:
        """Parameters that start from a trained prompt of the same method, or None to start from the composed one."""
        return None


METHODS: dict[str, type[Prompt]] = {}


def register(name: str) -> Callable[[type[Prompt]], type[Prompt]]:
    """Class decorator that makes a method known as `PromptConfig.method=name`."""

    def add(cls: type[Prompt]) -> type[Prompt]:
        cls.method = name
        METHODS[name] = cls
        return cls

    return add


def method_class(method: str) -> type[Prompt]:
    """The class of a method; UserError with the known names when there is none."""
    if method not in METHODS:
        raise UserError(f"There is no prompt method '{method}'; choose one of {', '.join(METHODS)}.{nearest(method, METHODS)}")
    return METHODS[method]


def build_prompt(cfg: PromptConfig, groups: Groups, d_model: int) -> Prompt | None:
    """The prompt module of a configuration; None for method "none", which tunes the model itself."""
    return None if cfg.method == "none" else method_class(cfg.method).build(cfg, tuple(groups), d_model)


def compose(method: str, params: Params, groups: Groups) -> jax.Array:
    """Every stream's plain prompt [N,P,D], whatever the method."""
    return method_class(method).compose(params, tuple(groups))


def bank_axis(path: str) -> str:
    """What a prompt parameter's leading axis runs over: "stream" (name begins with task_) or "group"."""
    return "stream" if path.rpartition("/")[2].startswith("task_") else "group"


def number_of_groups(groups: Groups) -> int:
    """G; ValueError when a group below the highest has no stream."""
    total = max(groups) + 1
    if len(np.unique(groups)) != total:
        raise ValueError(f"groups must be numbered 0..G-1 without a gap, not {groups}")
    return total
