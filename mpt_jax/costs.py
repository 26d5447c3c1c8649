"""What a traced program costs, before any compiler has seen it: multiplications, bytes read, and what is kept for the gradient.

XLA's own cost analysis counts the body of a loop once, and a T5 is three loops over its layers; here a scan counts as often as
it runs. Everything is a global number, of all devices together.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jex_core

Tree = Any


class Work(NamedTuple):
    """Of one run of a program.

    Attributes:
        flops: of matrix products, two for a multiplication and its addition; all else is small beside them.
        weight_bytes: read of matrices that a whole batch shares (a weight is read again for each product that it is in).
        other_bytes: read and written by matrix products besides; what lies between them is taken to be fused.
    """

    flops: float = 0.0
    weight_bytes: float = 0.0
    other_bytes: float = 0.0

    def plus(self, other: "Work", times: float = 1.0) -> "Work":
        return Work(*(mine + times * theirs for mine, theirs in zip(self, other, strict=True)))


def work_of(traced: Any, while_steps: int = 1) -> Work:
    """Of a traced function (`jax.jit(f).trace(*shapes)`); a `while` loop, whose length no one knows, runs `while_steps` times."""
    return _work(traced.jaxpr.jaxpr, while_steps)


def _work(jaxpr: Any, while_steps: int) -> Work:
    total = Work()
    stored = {}  # what is converted for a product is read as it is stored: int8 weights, for one
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "convert_element_type":
            stored[equation.outvars[0]] = equation.invars[0].aval
        if name == "dot_general":
            total = total.plus(_product(equation, stored))
            continue
        times = {"scan": equation.params.get("length", 1), "while": while_steps}.get(name, 1)
        for inner in _inner(equation):
            total = total.plus(_work(inner, while_steps), times)
    return total


def _inner(equation: Any) -> Iterator[Any]:
    """The programs within an operation: bodies of loops, called functions, all branches."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, jex_core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, jex_core.Jaxpr):
                yield part


def _product(equation: Any, stored: dict[Any, Any]) -> Work:
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    operands, out = [variable.aval for variable in equation.invars], equation.outvars[0].aval
    read = [stored.get(variable, variable.aval) for variable in equation.invars]
    flops = 2.0 * math.prod(out.shape) * math.prod(operands[0].shape[axis] for axis in contracted)
    weights = [not batched and operand.ndim == 2 for operand in operands]
    weight_bytes = sum(_bytes(aval) for aval, weight in zip(read, weights, strict=True) if weight)
    other_bytes = sum(_bytes(aval) for aval, weight in zip(operands, weights, strict=True) if not weight) + _bytes(out)
    return Work(flops, weight_bytes, other_bytes)


def kept_for_gradient(loss: Callable[..., Any], trainable: Tree, *arguments: Tree) -> list[jax.ShapeDtypeStruct]:
    """What the forward pass of `loss(trainable, *arguments) -> (loss, aux)` leaves to the backward pass, arguments excluded.

    All arguments are shapes; nothing is computed. This is what `remat` decides about.
    """

    def residuals(trainable: Tree, *arguments: Tree) -> list[jax.Array]:
        _, pull, _ = jax.vjp(lambda inner: loss(inner, *arguments), trainable, has_aux=True)
        given = {id(leaf) for leaf in jax.tree.leaves((trainable, arguments))}
        return [leaf for leaf in jax.tree.leaves(pull) if id(leaf) not in given]

    return jax.eval_shape(residuals, trainable, *arguments)


def _bytes(aval: Any) -> float:
    return float(math.prod(aval.shape) * np.dtype(aval.dtype).itemsize)
