"""From bindings to configuration: fills the dataclasses of `config/` and remembers where each value came from.

A binding gives a value to a field of a class (`TrainConfig.steps = 100`), to that field within a scope
(`few/mpt/StageConfig.steps = 100`) or to a macro (`TRAIN_STEPS = 100`, used as `%TRAIN_STEPS`); the last one wins.
Scopes mean what they mean in gin: an object made by `@few/mpt/StageConfig()` takes each field from the most specific of
the bindings in `few/mpt`, in `few` and in no scope, and what it refers to without a scope of its own is made in the same
scope. One thing is simpler: a field that is itself a configuration needs no binding, it is made in its owner's scope.

Nothing is swallowed. An unknown name, a value of the wrong type, a value that is missing, a binding that no object can
take and a flag without effect are each a `UserError` that names the place.
"""

import dataclasses
import functools
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mpt_jax.config import Experiment, PipelineConfig, SweepConfig, T5Config, nearest
from mpt_jax.errors import UserError
from mpt_jax.gin_text import Macro, Reference

Scope = tuple[str, ...]
Key = tuple[Scope, str, str]  # (scope, class, field)
DEFAULT = "default"  # the origin of a value that nothing was bound to
LEARNING_RATES = (
    " Learning rates, by parameter, are OptimizerConfig.rules (in a study, StageConfig.rules), such as "
    "--gin.OptimizerConfig.rules='((\".*\", 0.3),)'."
)
REQUIRED = ("gin.REQUIRED", "REQUIRED")


class Binding(NamedTuple):
    """A value as it was written, and where: "file:line" or "--gin.NAME"."""

    value: Any
    origin: str

    @property
    def is_flag(self) -> bool:
        return self.origin.startswith("--gin.")


class Setting(NamedTuple):
    """One resolved field: `owner` is the scoped class ("few/mpt/StageConfig") that gin knows it by."""

    value: Any
    origin: str
    owner: str


class Instance(NamedTuple):
    """A dataclass that was filled: where it lives, and for each field its binding, or None for the default."""

    scope: Scope
    cls: type
    fields: dict[str, Binding | None]


class Resolved(NamedTuple):
    """`settings` is keyed by the dotted path from the root ("data.batch_size", "few_shot.mpt.steps")."""

    config: Any
    settings: dict[str, Setting]
    instances: list[Instance]
    macros: set[str]


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, evaluated."""
    return typing.get_type_hints(cls)


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
        for inner in type_hints(hint).values():
            yield from _dataclasses_in(inner)
    for argument in typing.get_args(hint):
        yield from _dataclasses_in(argument)


# What a command is given, and every class that a gin file may name: all that these are made of.
ROOTS = (Experiment, PipelineConfig, SweepConfig)
CLASSES: dict[str, type] = {cls.__name__: cls for root in ROOTS for cls in _dataclasses_in(root)}


def find_class(name: str, origin: str) -> type:
    """The configuration class called `name`. Raises `UserError` with the nearest name."""
    if name not in CLASSES:
        raise UserError(f"{origin}: there is no configuration called '{name}'.{nearest(name, CLASSES) or _list_of(CLASSES)}")
    return CLASSES[name]


def check_field(name: str, field: str, origin: str) -> None:
    """Raises `UserError` unless the class called `name` has `field`."""
    fields = [f.name for f in dataclasses.fields(find_class(name, origin))]
    if field not in fields:
        hint = LEARNING_RATES if "learning_rate" in field.lower() else nearest(field, fields) or _list_of(fields)
        raise UserError(f"{origin}: {name} has no field '{field}'.{hint}")


def _list_of(names: Iterable[str]) -> str:
    return f" There are {', '.join(sorted(names))}."


class Bindings:
    """All bindings of a run, in the order in which they were read."""

    def __init__(self) -> None:
        self.fields: dict[Key, Binding] = {}
        self.macros: dict[str, Binding] = {}
        self.history: list[tuple[Key | str, Binding]] = []  # also those that a later one replaced

    def bind(self, scope: Scope, name: str, field: str, value: Any, origin: str) -> None:
        """`scope/name.field = value`. Raises `UserError` for an unknown class or field."""
        check_field(name, field, origin)
        self.fields[scope, name, field] = Binding(value, origin)
        self.history.append(((scope, name, field), Binding(value, origin)))

    def bind_macro(self, name: str, value: Any, origin: str) -> None:
        """`name = value`; `name = %gin.REQUIRED` asks for a value, also for another than the one that is there."""
        self.macros[name] = Binding(value, origin)
        self.history.append((name, Binding(value, origin)))

    def find(self, scope: Scope, name: str, field: str) -> Key | None:
        """The key of the most specific binding for a field of an object that lives in `scope`."""
        keys = ((scope[:depth], name, field) for depth in range(len(scope), -1, -1))
        return next((key for key in keys if key in self.fields), None)

    def resolve(self, root: type) -> Resolved:
        """Fills `root`, one of ROOTS, validated. Raises `UserError` as the module's text says."""
        resolver = _Resolver(self)
        config = resolver.build(root, (), ())
        every = [_Resolver(self) for _ in ROOTS]
        for other, cls in zip(every, ROOTS, strict=True):
            other.build(cls, (), ())
        _check_reach(self, resolver, every)
        if resolver.undefined:
            raise UserError(_undefined_message(resolver.undefined, self.macros))
        if resolver.missing:
            raise UserError(_missing_message(resolver.missing))
        try:
            (config.base if isinstance(config, PipelineConfig) else config).validate()
        except UserError as error:
            raise UserError(_with_origin(str(error), resolver.settings)) from None
        return Resolved(config, resolver.settings, list(resolver.instances.values()), resolver.used_macros)


class _Target(NamedTuple):
    """What a value is being found for."""

    field: str  # "TrainConfig.steps"
    scope: Scope
    path: tuple[str, ...]
    origin: str
    macros: tuple[str, ...] = ()  # that led here, outermost first

    @property
    def name(self) -> str:
        return f"{self.field} ({self.macros[-1]})" if self.macros else self.field

    @property
    def source(self) -> str:
        """The origin as `show` prints it, with the macro's name."""
        return f"{self.origin} ({self.macros[-1]})" if self.macros and not self.origin.startswith("--gin.") else self.origin


class _Missing:
    """Stands for a value that is not there, until all of them can be reported at once."""


MISSING = _Missing()


class _Resolver:
    """One walk from a root. It remembers what it met, for `show`, for `config.gin` and for the check of unused bindings."""

    def __init__(self, bindings: Bindings) -> None:
        self.bindings = bindings
        self.settings: dict[str, Setting] = {}
        self.instances: dict[tuple[Scope, str], Instance] = {}
        self.used_keys: set[Key] = set()
        self.used_macros: set[str] = set()
        self.missing: list[tuple[str, str]] = []  # (name, origin or "")
        self.undefined: dict[str, _Target] = {}  # macros that nothing defines, with the first place that uses them

    def build(self, cls: type, scope: Scope, path: tuple[str, ...]) -> Any:
        """An object of dataclass `cls` that lives in `scope`, or MISSING where one of its values is."""
        name = cls.__name__
        instance = self.instances.setdefault((scope, name), Instance(scope, cls, {}))
        values = {}
        for field in dataclasses.fields(cls):
            hint = type_hints(cls)[field.name]
            key = self.bindings.find(scope, name, field.name)
            where = (*path, field.name)
            if key is not None:
                binding = self.bindings.fields[key]
                self.used_keys.add(key)
                instance.fields[field.name] = binding
                target = _Target(f"{name}.{field.name}", scope, where, binding.origin)
                value, source = self.find(binding.value, hint, target)
            elif dataclasses.is_dataclass(hint):
                value, source = self.build(typing.cast(type, hint), scope, where), ""
            else:
                instance.fields[field.name] = None
                value, source = _default(field), DEFAULT
                if value is MISSING:
                    self.missing.append((f"{name}.{field.name}", ""))
            values[field.name] = value
            if not dataclasses.is_dataclass(hint):
                self.settings[".".join(where)] = Setting(value, source, "/".join((*scope, name)))
        return MISSING if any(value is MISSING for value in values.values()) else cls(**values)

    def find(self, value: Any, hint: Any, target: _Target) -> tuple[Any, str]:
        """`value` with its macros and references replaced, checked against annotation `hint`; and where it came from."""
        while isinstance(value, Macro):
            if value.name in REQUIRED:
                self.missing.append((target.macros[-1] if target.macros else target.field, target.origin))
                return MISSING, target.source
            if value.name in target.macros:
                raise UserError(f"{target.origin}: the macro {value.name} is defined by itself.")
            if value.name not in self.bindings.macros:
                self.undefined.setdefault(value.name, target)
                return MISSING, target.source
            self.used_macros.add(value.name)
            binding = self.bindings.macros[value.name]
            target = target._replace(origin=binding.origin, macros=(*target.macros, value.name))
            value = binding.value
        return self._convert(value, hint, target), target.source

    def _convert(self, value: Any, hint: Any, target: _Target) -> Any:
        if hint is Any:
            return value
        if isinstance(value, Reference):
            return self._refer(value, hint, target)
        kind, arguments = typing.get_origin(hint), typing.get_args(hint)
        if kind is tuple and isinstance(value, tuple | list):
            hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
            if len(hints) == len(value):
                items = zip(value, hints, range(len(value)), strict=True)
                return self._whole(tuple(self.find(v, h, self._inside(target, str(i)))[0] for v, h, i in items))
        elif kind is dict and isinstance(value, dict) and all(isinstance(k, str) for k in value):
            found = {k: self.find(v, arguments[1], self._inside(target, k))[0] for k, v in value.items()}
            return MISSING if self._whole(tuple(found.values())) is MISSING else found
        elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif hint in (int, str, bool) and type(value) is hint:
            return value
        assert kind in (tuple, dict) or hint in (int, str, bool, float) or dataclasses.is_dataclass(hint), f"no rule for {hint}"
        # A shell eats one pair of quotes.
        quoted = f'''; type "{target.origin}='{value}'"''' if hint is str and target.origin.startswith("--gin.") else ""
        raise UserError(f"{target.origin}: {target.name} must be {describe(hint)}, not {value!r}{quoted}.")

    @staticmethod
    def _inside(target: _Target, key: str) -> _Target:
        return target._replace(path=(*target.path, key))

    @staticmethod
    def _whole(values: tuple[Any, ...]) -> Any:
        return MISSING if any(value is MISSING for value in values) else values

    def _refer(self, reference: Reference, hint: Any, target: _Target) -> Any:
        cls = find_class(reference.name, target.origin)
        written = "/".join((*reference.scope, reference.name))
        if cls is not hint:
            raise UserError(f"{target.origin}: {target.name} must be {describe(hint)}, not @{written}().")
        if not reference.called:
            raise UserError(f"{target.origin}: {target.name} must be an object; write @{written}() with its parentheses.")
        return self.build(cls, reference.scope or target.scope, target.path)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else MISSING


def is_default(path: str, setting: Setting) -> bool:
    """Whether the value at a dotted path is the field's own default, bound or not."""
    fields = {field.name: field for field in dataclasses.fields(CLASSES[setting.owner.split("/")[-1]])}
    field = fields.get(path.split(".")[-1])
    return setting.origin == DEFAULT or (field is not None and _default(field) == setting.value)


def describe(hint: Any) -> str:
    """An annotation in words, with an example of what to write."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    plain = {int: "a whole number", float: "a number", str: "a string in quotes", bool: "True or False"}
    if hint in plain:
        return plain[hint]
    if kind is tuple and arguments[-1] is Ellipsis:
        return f"a tuple such as ({example(arguments[0])},)"
    if kind in (tuple, dict):
        return f"{'a dict' if kind is dict else 'a tuple'} such as {example(hint)}"
    return f"@SCOPE/{hint.__name__}()" if isinstance(hint, type) else str(hint)


def example(hint: Any) -> str:
    """A value of an annotation's type as one writes it in gin."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind is tuple and arguments[-1] is Ellipsis:
        return f"({example(arguments[0])},)"
    if kind is tuple:
        return "(" + ", ".join(example(a) for a in arguments) + ")"
    if kind is dict:
        return "{" + f"{example(arguments[0])}: {example(arguments[1])}" + "}"
    return {Any: "4", int: "4", float: "0.3", str: "'name'", bool: "True"}.get(hint) or f"@SCOPE/{hint.__name__}()"


def _named(value: Any) -> Iterator[Macro | Reference]:
    """The macros and classes that a value, as written, names."""
    if isinstance(value, Macro | Reference):
        yield value
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _named(item)


def _check_reach(bindings: Bindings, resolver: _Resolver, every: list[_Resolver]) -> None:
    """Raises `UserError` for what would be ignored: misspelt macros and scopes, and flags that something overrides."""
    used = [(key, one.name) for key, binding in bindings.history for one in _named(binding.value) if isinstance(one, Macro)]
    known = {macro for _, macro in used}
    for name, binding in bindings.macros.items():
        if name not in known:
            # A misspelt macro and a misspelt or forgotten class look alike; the nearest of both is worth naming.
            hint = nearest(name, known - set(REQUIRED)) or _field_instead(name)
            raise UserError(f"{binding.origin}: nothing uses the macro {name}.{hint}")
        if binding.is_flag and name not in resolver.used_macros:
            keys = [bindings.find(*key) if isinstance(key, tuple) else None for key, macro in used if macro == name]
            places = {f"{key[1]}.{key[2]} is bound at {bindings.fields[key].origin}" for key in keys if key is not None}
            raise UserError(
                f"{binding.origin} has no effect here: {'; '.join(sorted(places)) or 'this command does not use it'}."
            )
    reached = set().union(*(set(other.instances) for other in every))
    on_axes = [one for key, binding in bindings.fields.items() if key[1] == SweepConfig.__name__ for one in _named(binding.value)]
    reached |= {(one.scope, one.name) for one in on_axes if isinstance(one, Reference)}
    for (scope, name, field), binding in bindings.fields.items():
        if not any(name == other and place[: len(scope)] == scope for place, other in reached):
            scopes = {"/".join(place) for place, other in reached if other == name and place}
            what = "/".join((*scope, name))
            raise UserError(
                f"{binding.origin}: nothing uses @{what}(), so {field} has no effect.{nearest('/'.join(scope), scopes)}"
            )
        if binding.is_flag and (scope, name, field) not in resolver.used_keys:
            raise UserError(
                f"{binding.origin} has no effect here: every {name} gets {field} from a scope, or this command has none."
            )


def _field_instead(macro: str) -> str:
    """For a macro of other programs, the field that does the same here; "" where there is none."""
    if "LEARNING_RATE" in macro:
        return LEARNING_RATES
    owners = [name for name, cls in CLASSES.items() if macro.lower() in {field.name for field in dataclasses.fields(cls)}]
    return f" There is a field {' and a field '.join(f'{owner}.{macro.lower()}' for owner in owners)}." if owners else ""


def _undefined_message(undefined: dict[str, _Target], macros: Iterable[str]) -> str:
    parts = [f"{t.origin}: the macro {name} is not defined, but {t.name} uses it" for name, t in undefined.items()]
    return "; ".join(parts) + "." + next(filter(None, (nearest(name, macros) for name in undefined)), "")


def _missing_message(missing: list[tuple[str, str]]) -> str:
    """Everything that is missing, at once; an architecture, whose fields belong together, as one thing."""
    unique = dict(missing)
    shown = [f"{name} (asked for at {origin})" if origin else name for name, origin in unique.items() if not _is_size(name)]
    flags = " ".join(f"--gin.{name}=VALUE" for name in unique if not _is_size(name))
    sizes = [name for name in unique if _is_size(name)]
    if sizes:
        shown.append(f"{sizes[0]}{f' and {len(sizes) - 1} more of T5Config' if len(sizes) > 1 else ''}")
    advice = [f"bind in a gin file or pass {flags}"] if flags else []
    advice += ["a file of gin/backbones sets the architecture"] if sizes else []
    return f"{', '.join(shown)} {'is' if len(unique) == 1 else 'are'} not set; {'; '.join(advice)}."


def _is_size(name: str) -> bool:
    return name.startswith(f"{T5Config.__name__}.")


def _with_origin(message: str, settings: dict[str, Setting]) -> str:
    """Adds to a message of `validate` where the field that it names first was set.

    Of several objects of a class it is the one whose key in a dict the message names: "TaskConfig.inputs of 'reviews' ...".
    """
    found: dict[str, str] = {}
    for path, setting in settings.items():
        *_, key, field = ("", *path.split("."))
        if message.startswith(f"{setting.owner.split('/')[-1]}.{field} ") and setting.origin != DEFAULT:
            found.setdefault(f" of '{key}' ", setting.origin)
    origin = next((origin for named, origin in found.items() if named in message), next(iter(found.values()), ""))
    return f"{origin}: {message}" if origin else message
