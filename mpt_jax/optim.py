"""Adafactor as T5X runs it and AdamW as MPT-derived code does, with a learning rate per path rule, for banks of prompts.

Every entry of a bank is an optimiser of its own: updates are vectorised over a prompt parameter's leading axis, norms are
never taken over two groups, and an entry whose stream or group is absent from the batch keeps its value and its state,
counters included. Training N prompts together is thus training each of them alone.

Two counters drive an entry. Moments and bias corrections count the updates of that very entry. Learning rates follow the
clock of the entry's group (the steps in which any of its streams took part), so that MPT's u, v of a task that was drawn
in half of the steps are at the same point of the schedule as the P* that they multiply.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpt_jax import trees
from mpt_jax.config import OptimizerConfig
from mpt_jax.errors import UserError
from mpt_jax.prompts.base import bank_axis, has_tokens, number_of_groups

BACKBONE = "backbone/"
LAYERS = "/layers/"  # scanned layers: one leaf stacks the parameters of all layers on axis 0


class GroupScales(NamedTuple):
    """What the groups of a bank have of their own; () = 1 for all. Hashable, so that equal ones share compiled programs.

    Attributes:
        rates: [G], factors on the learning rates of `OptimizerConfig.rules`.
        filled: [G], how much of a prompt's P tokens are not masked; means over a parameter are taken over these.
    """

    rates: tuple[float, ...] = ()
    filled: tuple[float, ...] = ()


ALIKE = GroupScales()


class Optimizer(NamedTuple):
    """`init(params) -> state` and `update(grads, state, params, present [N] bool) -> (params, state)`; both pure."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]]


def learning_rates(rules: tuple[tuple[str, float], ...], paths: list[str]) -> dict[str, float]:
    """The learning rate of every path by (regex over the whole path, rate); a rate of 0 freezes.

    Raises:
      UserError: when no rule or more than one matches a path; it names the parameter.
    """
    rates = {}
    for path in paths:
        matching = [(pattern, rate) for pattern, rate in rules if re.fullmatch(pattern, path)]
        if len(matching) != 1:
            found = "matches no rule" if not matching else "matches " + " and ".join(f"'{p}'" for p, _ in matching)
            raise UserError(
                f"The parameter '{path}' {found} of OptimizerConfig.rules = {[p for p, _ in rules]}; "
                "give exactly one rule for each parameter (a rate of 0 freezes it)."
            )
        rates[path] = matching[0][1]
    return rates


def schedule(cfg: OptimizerConfig, step: jax.Array, total_steps: int) -> jax.Array:
    """The factor on the peak learning rate at a 0-based step, any shape.

    As `get_linear_schedule_with_warmup` of transformers and T5X's linear warm-up: step / warmup_steps, then 1
    ("constant") or a straight line that would reach 0 at step `total_steps` ("linear").
    """
    step = step.astype(jnp.float32)
    factor = jnp.ones_like(step)
    if cfg.schedule == "linear":
        factor = jnp.clip((total_steps - step) / max(1, total_steps - cfg.warmup_steps), 0.0, 1.0)
    return jnp.where(step < cfg.warmup_steps, step / max(1, cfg.warmup_steps), factor)


def transformation(
    cfg: OptimizerConfig, rate: jax.Array | float, filled: jax.Array | float = 1.0
) -> optax.GradientTransformation:
    """The optax update of one parameter at one learning rate. The state's structure does not depend on the rate.

    `filled` is how much of the parameter is no masked zero: Adafactor clips by the root mean square of a whole update, which such
    zeros lower by √filled.
    """
    if cfg.name == "adafactor":
        return optax.adafactor(
            rate,
            clipping_threshold=jnp.sqrt(filled),
            decay_rate=cfg.decay_rate,
            decay_offset=cfg.decay_offset,
            multiply_by_parameter_scale=cfg.scale_by_parameter,
            weight_decay_rate=cfg.weight_decay or None,
            factored=cfg.factored,
        )
    return optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay)


def make_optimizer(
    cfg: OptimizerConfig,
    total_steps: int,
    groups: tuple[int, ...],
    trainable_shapes: Mapping[str, Any] | None = None,
    scales: GroupScales = ALIKE,
) -> Optimizer:
    """The optimiser of a bank, or of a backbone (leaves under "backbone/").

    Args:
      cfg: name, rules, schedule and constants.
      total_steps: length of the run, for the "linear" schedule only.
      groups: [N], the group of each stream.
      trainable_shapes: the tree that will be trained (arrays or shapes); checked against the rules at once when given.
      scales: of the groups; a backbone has none.

    Returns:
      `Optimizer`. Its state is {"clock": [G] int32 steps of each group, "step": int32, "leaves": optax states}; frozen
      parameters have no state. Backbone leaves of scanned layers are treated as one parameter per layer, as in T5X.

    Raises:
      UserError: when a parameter is matched by no rule or by two.
    """
    if trainable_shapes is not None:
        learning_rates(cfg.rules, list(trees.flatten(trainable_shapes)))
    group_of = jnp.asarray(groups, jnp.int32)
    num_groups = number_of_groups(groups)
    rate_factors = jnp.asarray(scales.rates or (1.0,) * num_groups, jnp.float32)
    filled = jnp.asarray(scales.filled or (1.0,) * num_groups, jnp.float32)

    def init(params: Any) -> Any:
        states = {}
        flat = trees.flatten(params)
        for path, rate in learning_rates(cfg.rules, list(flat)).items():
            if rate > 0:
                start = transformation(cfg, rate).init
                states[path] = (jax.vmap(start) if _is_stacked(path) else start)(flat[path])
        return {
            "clock": jnp.zeros(num_groups, jnp.int32),
            "step": jnp.zeros((), jnp.int32),
            "leaves": trees.unflatten(states),
        }

    def one(
        grad: jax.Array, old: Any, param: jax.Array, moves: jax.Array, rate: jax.Array, share: jax.Array
    ) -> tuple[jax.Array, Any]:
        updates, new = transformation(cfg, rate, share).update(grad, old, param)
        moved = optax.apply_updates(param, updates)
        return jax.tree.map(lambda after, before: jnp.where(moves, after, before), (moved, new), (param, old))

    def update(grads: Any, state: Any, params: Any, present: jax.Array) -> tuple[Any, Any]:
        flat_params, flat_states = trees.flatten(params), trees.flatten(state["leaves"])
        rates = learning_rates(cfg.rules, list(flat_params))
        group_present = jax.ops.segment_max(present.astype(jnp.int32), group_of, num_segments=num_groups) > 0
        # What does not move is no part of the step, so its gradient must not enter the norm either.
        flat_grads = {path: grad for path, grad in trees.flatten(grads).items() if rates[path] > 0}
        if cfg.clip_norm > 0:
            flat_grads = _clip(flat_grads, present, group_present, group_of, cfg.clip_norm)
        by_group = schedule(cfg, state["clock"], total_steps) * rate_factors
        moving = {  # which entries take the step, the factor on their learning rate, and how much of them is not masked
            "stream": (present, by_group[group_of], filled[group_of]),
            "group": (group_present, by_group, filled),
            "backbone": (present.any(), schedule(cfg, state["step"], total_steps), jnp.ones(())),
        }
        for path, grad in flat_grads.items():
            moves, factor, share = moving[_owner(path)]
            share = share if has_tokens(path) else jnp.ones_like(share)
            axes = (0, 0, 0) + ((None,) * 3 if path.startswith(BACKBONE) else (0,) * 3)
            step = jax.vmap(one, in_axes=axes) if _is_stacked(path) else one
            arguments = grad, flat_states[path], flat_params[path], moves, factor * rates[path], share
            flat_params[path], flat_states[path] = step(*arguments)
        new_state = {
            "clock": state["clock"] + group_present.astype(jnp.int32),
            "step": state["step"] + present.any().astype(jnp.int32),
            "leaves": trees.unflatten(flat_states),
        }
        return trees.unflatten(flat_params), new_state

    return Optimizer(init, update)


def _owner(path: str) -> str:
    """What an entry of the leaf belongs to: a "stream", a "group" or the "backbone"."""
    return "backbone" if path.startswith(BACKBONE) else bank_axis(path)


def _is_stacked(path: str) -> bool:
    """Whether axis 0 holds separate parameters: a bank's prompts, or the layers of a scanned stack."""
    return not path.startswith(BACKBONE) or LAYERS in path


def _clip(
    grads: dict[str, jax.Array], present: jax.Array, group_present: jax.Array, group_of: jax.Array, limit: float
) -> dict[str, jax.Array]:
    """Scale each group's gradient, over all of its leaves and present streams, to norm `limit` where it is longer.

    A backbone's leaves count as one group of their own.
    """
    num_groups = len(group_present)
    squares, backbone = jnp.zeros(num_groups), jnp.zeros(())
    for path, grad in grads.items():
        square = jnp.square(grad.astype(jnp.float32))
        if path.startswith(BACKBONE):
            backbone = backbone + square.sum()
        else:
            entries = square.reshape(grad.shape[0], -1).sum(axis=1)
            entries = jnp.where(present if bank_axis(path) == "stream" else group_present, entries, 0.0)
            if bank_axis(path) == "stream":
                entries = jax.ops.segment_sum(entries, group_of, num_segments=num_groups)
            squares = squares + entries
    factors = _shrink(squares, limit)

    def scaled(path: str, grad: jax.Array) -> jax.Array:
        if path.startswith(BACKBONE):
            return (grad * _shrink(backbone, limit)).astype(grad.dtype)
        entries = factors[group_of] if bank_axis(path) == "stream" else factors
        return (grad * entries.reshape((-1,) + (1,) * (grad.ndim - 1))).astype(grad.dtype)

    return {path: scaled(path, grad) for path, grad in grads.items()}


def _shrink(square: jax.Array, limit: float) -> jax.Array:
    """min(1, limit / norm), also for a norm of 0."""
    norm = jnp.sqrt(square)
    return jnp.where(norm > limit, limit / jnp.where(norm > limit, norm, 1.0), 1.0)
