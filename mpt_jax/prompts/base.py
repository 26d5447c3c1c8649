"""What a prompt is, and the registry of methods.

A prompt module owns the prompts of N streams in G independent groups (`groups[n]` is the group of stream n) and maps
`(task_ids [B], x [B,T,D], mask [B,T])` to soft tokens `[B,P,D]`. A group's prompt may be shorter than P; its tokens are then
the last ones, and those before them are masked. The leading axis of each of its parameters is a bank
axis, over groups or, when the name begins with `task_`, over streams; the optimiser is vectorised over it.

A method is one file: a subclass of `Prompt` under `@register("name")`.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
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
    lengths: tuple[int, ...] = ()  # [G], each at most P; () = all are P

    method: ClassVar[str] = ""

    @property
    def num_groups(self) -> int:
        return number_of_groups(self.groups)

    def __call__(self, task_ids: jax.Array, x: jax.Array, mask: jax.Array) -> jax.Array:
        """(task_ids [B], embedded inputs x [B,T,D], their mask [B,T]) → the examples' prompts [B,P,D]."""
        raise NotImplementedError

    def mask(self, task_ids: jax.Array) -> jax.Array | None:
        """Which of the examples' soft tokens there are: task_ids [...] → bool [...,P]; None where all prompts have P."""
        if not self.lengths:
            return None
        first = self.length - np.asarray(self.lengths)[np.asarray(self.groups)]
        return jnp.asarray(np.arange(self.length) >= first[:, None])[task_ids]

    @classmethod
    def build(cls, cfg: PromptConfig, groups: Groups, d_model: int, lengths: tuple[int, ...]) -> "Prompt":
        """The module for a configuration."""
        return cls(groups=groups, length=cfg.length, d_model=d_model, lengths=lengths)

    @staticmethod
    def compose(params: Params, groups: Groups) -> jax.Array:
        """The plain prompt of every stream, [N,P,D]: what a tool that knows plain prompts only would load."""
        raise NotImplementedError

    @staticmethod
    def initial(cfg: PromptConfig, base: jax.Array, groups: Groups, keys: jax.Array, lengths: Sequence[int]) -> Params:
        """Parameters that start from plain prompts `base` [G,P,D]; `keys` [G] are the groups' random keys.

        What stands for the masked tokens of a group of a shorter length (`lengths` [G]) is 0, here and ever after.
        """
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


def build_prompt(cfg: PromptConfig, groups: Groups, d_model: int, lengths: Sequence[int] = ()) -> Prompt | None:
    """The prompt module of a configuration; None for method "none", which tunes the model itself.

    `lengths` are the groups' own [G]; () = all have `cfg.length`.
    """
    if cfg.method == "none":
        return None
    own = () if all(length == cfg.length for length in lengths) else tuple(lengths)
    return method_class(cfg.method).build(cfg, tuple(groups), d_model, own)


def compose(method: str, params: Params, groups: Groups) -> jax.Array:
    """Every stream's plain prompt [N,P,D], whatever the method."""
    return method_class(method).compose(params, tuple(groups))


def bank_axis(path: str) -> str:
    """What a prompt parameter's leading axis runs over: "stream" (name begins with task_) or "group"."""
    return "stream" if path.rpartition("/")[2].startswith("task_") else "group"


def has_tokens(path: str) -> bool:
    """Whether a prompt parameter's second axis runs over the prompt's tokens; that of a name with _v at its end does not."""
    return not path.endswith("_v")


def pad_tokens(rows: jax.Array, length: int) -> jax.Array:
    """[p,...] → [length,...], with zeros before what is there."""
    return jnp.pad(rows, [(length - len(rows), 0)] + [(0, 0)] * (rows.ndim - 1))


def number_of_groups(groups: Groups) -> int:
    """G; ValueError when a group below the highest has no stream."""
    total = max(groups) + 1
    if len(np.unique(groups)) != total:
        raise ValueError(f"groups must be numbered 0..G-1 without a gap, not {groups}")
    return total
