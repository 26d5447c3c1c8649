"""Configurations written as gin files. Reading them is `gin_bindings.py`'s; nothing here needs gin."""

import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%name`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/name()`; `called` is whether the parentheses are there."""

    scope: tuple[str, ...]
    name: str
    called: bool


def config_text(config: Any) -> str:
    """A gin file that alone gives `config`, a dataclass of `config/`: every value of every field.

    Configurations within a tuple or dict get a scope of their own: `@streams_0/StreamConfig()`.
    """
    return "\n".join(_lines(config, "")).lstrip("\n") + "\n"


def _lines(config: Any, scope: str) -> Iterator[str]:
    owner = f"{scope}{type(config).__name__}"
    inner: list[tuple[Any, str]] = []

    def written(value: Any, name: str) -> Any:
        """`value` with references in place of the configurations in it."""
        if dataclasses.is_dataclass(value):
            inner.append((value, f"{scope}{name}/"))
            return Reference((*filter(None, scope.split("/")), name), type(value).__name__, True)
        if isinstance(value, dict):
            return {key: written(one, f"{name}_{key}") for key, one in value.items()}
        if isinstance(value, tuple):
            return tuple(written(one, f"{name}_{n}") for n, one in enumerate(value))
        return value

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    kinds = [type(value) for value in values.values()]
    yield ""
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and kinds.count(type(value)) == 1:  # is made in its owner's scope, without a binding
            inner.append((value, scope))
        else:
            yield f"{owner}.{name} = {gin_literal(written(value, name))}"
    for value, its_scope in inner:
        yield from _lines(value, its_scope)


def gin_literal(value: Any) -> str:
    """A value as gin reads it: `%MACRO`, `@scope/Class()`, or a Python literal; long containers one item to a line."""
    if isinstance(value, Macro):
        return f"%{value.name}"
    if isinstance(value, Reference):
        return "@" + "/".join((*value.scope, value.name)) + ("()" if value.called else "")
    if isinstance(value, dict):
        return _bracketed("{", [f"{gin_literal(k)}: {gin_literal(v)}" for k, v in value.items()], "}")
    if isinstance(value, tuple | list):
        return _bracketed("(", [gin_literal(item) for item in value], ",)" if len(value) == 1 else ")")
    return repr(value)


def _bracketed(left: str, items: list[str], right: str) -> str:
    line = left + ", ".join(items) + right
    if len(line) <= 80:
        return line
    indented = [item.replace("\n", "\n    ") for item in items]
    return "\n    ".join([left, *(f"{item}," for item in indented)]) + "\n" + right[-1]
