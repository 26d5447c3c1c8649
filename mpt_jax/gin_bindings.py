"""Reads gin files and flags, and writes `config.gin`: the only file that imports gin.

gin supplies the grammar (`gin.config_parser`); what the statements mean is `resolve.py`'s, so there is no global state,
no import of user code and nothing that is skipped. T5X's habits hold: later files and then flags win, macros are upper
case, `%gin.REQUIRED` asks for a value. A file is read once, however often it is named, so that every file of `gin/` can
include what it builds on and the order on the command line matters little; but one on a sweep's axis has the last word.
"""

import dataclasses
import itertools
import os
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from gin import config_parser

import mpt_jax
from mpt_jax.config import DistributedConfig, Experiment, PipelineConfig, SweepConfig, nearest
from mpt_jax.errors import UserError
from mpt_jax.gin_text import Macro, Reference, gin_literal
from mpt_jax.resolve import CLASSES, DEFAULT, REQUIRED, Bindings, Instance, Resolved, Setting

_FLAG_NAME = re.compile(r"[A-Za-z_]\w*(/[A-Za-z_]\w*)*(\.[A-Za-z_]\w*)?")
GIN_FILE_AXIS = "gin_file"
MODEL = ("BackboneConfig", "T5Config")  # the classes that say which model a run has
_PACKAGE = Path(mpt_jax.__file__).parent


def parse(
    gin_files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = (), on_axis: str = ""
) -> "Parsed":
    """Reads `gin_files` in order, then `on_axis`, a value of the axis "gin_file", then `bindings` ("NAME=VALUE" of `--gin.`).

    A file is looked for as given, beside the file that includes it, in `search_paths`, and in this package's own `gin/`.
    Raises `UserError` for a missing file, a syntax error or an unknown name, with file and line; for `on_axis`, where it was read
    before, in part or whole, and the model is not the one that it describes.
    """
    reader = _Reader(search_paths)
    for name in gin_files:
        reader.read_file(name, "--gin_file")
    if on_axis:
        reader.read_file(on_axis, f"SweepConfig.axes['{GIN_FILE_AXIS}']", again=True)
        alone = _Reader(search_paths)
        alone.read_file(on_axis, "")
        _check_model(on_axis, alone.bindings, reader.bindings)
    for text in bindings:
        reader.read_flag(text)
    return Parsed(reader.bindings, reader.files, reader.find)


def parse_cells(
    axes: Mapping[str, Sequence[Any]], gin_files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()
) -> Iterator[tuple[dict[str, Any], "Parsed"]]:
    """(values of the axes, what was read) of every combination: as if given by flags or, with "gin_file", by a last file."""
    for values in itertools.product(*axes.values()):
        cell = dict(zip(axes, values, strict=True))
        flags = [f"{name}={gin_literal(value)}" for name, value in cell.items() if name != GIN_FILE_AXIS]
        yield cell, parse(gin_files, [*bindings, *flags], search_paths, cell.get(GIN_FILE_AXIS, ""))


def _check_model(on_axis: str, alone: Bindings, cell: Bindings) -> None:
    """UserError where a cell has another model than its file, which read alone has the bindings `alone`.

    What that file includes and was read before is not read again, for it would undo what the study has set since (base.gin has
    a default of everything). The model alone must be the file's, which the cell is called by.
    """
    fields = [(key, binding) for key, binding in alone.fields.items() if key[1] in MODEL]
    macros = dict.fromkeys(binding.value.name for _, binding in fields if isinstance(binding.value, Macro))
    pairs = [(f"{key[1]}.{key[2]}", binding, cell.fields[key]) for key, binding in fields]
    pairs += [(name, alone.macros[name], cell.macros[name]) for name in macros if name in alone.macros]
    for name, own, other in pairs:
        if own.value != other.value and not (isinstance(own.value, Macro) and own.value.name in REQUIRED):
            raise UserError(
                f"SweepConfig.axes['{GIN_FILE_AXIS}'] has {on_axis}, which has {name} = {gin_literal(own.value)} from "
                f"{own.origin}, but {other.origin} sets {gin_literal(other.value)} after that; leave one of these files out, or "
                "name on the axis one that sets its whole model itself."
            )


class Parsed:
    """All that was read. Each method raises `UserError` when a value is missing, wrong or without effect."""

    def __init__(self, bindings: Bindings, files: list[str], find: Callable[[str, str, Path | None, str], Path]) -> None:
        self.bindings = bindings
        self.files = files
        self._find = find  # what gin files are found by
        self._resolved: dict[type, Resolved] = {}

    @property
    def root(self) -> type:
        """PipelineConfig where something is bound to it, else Experiment."""
        return PipelineConfig if self.binds(PipelineConfig) else Experiment

    def binds(self, cls: type) -> bool:
        """Whether something is bound to a class of the configuration."""
        return any(name == cls.__name__ for _, name, _ in self.bindings.fields)

    def resolve(self, root: type | None = None) -> Resolved:
        """The filled and validated `root`, with the origin of each value."""
        root = root or self.root
        if root not in self._resolved:
            self._resolved[root] = self.bindings.resolve(root)
        return self._resolved[root]

    def supply(self, macros: Mapping[str, Any]) -> None:
        """Gives values to the macros that are still asked for (`%gin.REQUIRED`), for a command that needs none of them."""
        for name, value in macros.items():
            binding = self.bindings.macros.get(name)
            if binding is not None and isinstance(binding.value, Macro) and binding.value.name in REQUIRED:
                self.bindings.bind_macro(name, value, DEFAULT)

    def experiment(self) -> Experiment:
        config: Experiment = self.resolve(Experiment).config
        return config

    def sweep(self) -> SweepConfig:
        """With the path of `published` as it was found: as a gin file is that the one which names it includes."""
        config: SweepConfig = self.resolve(SweepConfig).config
        if not config.published:
            return config
        origin = self.provenance(SweepConfig)["published"].origin.partition(" (")[0]
        is_flag = origin.startswith("--gin.")
        beside = None if is_flag else Path(origin.rpartition(":")[0]).parent
        path = self._find(config.published, origin if is_flag else f"{origin}: SweepConfig.published", beside, ".json")
        return dataclasses.replace(config, published=str(path))

    def pipeline(self) -> PipelineConfig:
        config: PipelineConfig = self.resolve(PipelineConfig).config
        return config

    def provenance(self, root: type | None = None) -> dict[str, Setting]:
        """Dotted path of each field → (value, "file:line (MACRO)", "--gin.NAME" or "default", owner)."""
        return self.resolve(root).settings

    def config_gin(self, root: type | None = None) -> str:
        """A gin file that alone gives the same configuration: every value, defaults too, with macros kept.

        But for the processes (`DistributedConfig`): the next call may have others.
        """
        resolved = self.resolve(root)
        lines = [f"# The resolved configuration of a run of mpt_jax {mpt_jax.__version__}; this file alone repeats it.", ""]
        for name in sorted(resolved.macros):
            lines.append(f"{name} = {gin_literal(self.bindings.macros[name].value)}")
        for instance in resolved.instances:
            if instance.cls is DistributedConfig:  # of this call's processes: another call has its own
                continue
            lines += _instance_lines(instance, resolved.settings)
        return "\n".join(lines) + "\n"


def _instance_lines(instance: Instance, settings: dict[str, Setting]) -> list[str]:
    owner = "/".join((*instance.scope, instance.cls.__name__))
    default = {path.split(".")[-1]: s.value for path, s in settings.items() if s.owner == owner and s.origin == DEFAULT}
    lines = [""] if instance.fields else []
    for field, binding in instance.fields.items():
        comment = "" if binding else "  # default"
        lines.append(f"{owner}.{field} = {gin_literal(binding.value if binding else default[field])}{comment}")
    return lines


class _Delegate(config_parser.ParserDelegate):
    """Builds what `resolve.py` understands, and looks nothing up: a name may be bound after its use."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        *scope, name = scoped_configurable_name.split("/")
        return Reference(tuple(scope), name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


class _Reader:
    def __init__(self, search_paths: Sequence[str]) -> None:
        self.bindings = Bindings()
        self.files: list[str] = []
        # A checkout has gin/ beside the package, an installed wheel inside it.
        bundled = [root for root in (_PACKAGE.parent, _PACKAGE) if (root / "gin" / "base.gin").is_file()]
        self._folders = [Path(path).expanduser() for path in search_paths] + [p for root in bundled for p in (root, root / "gin")]
        self._seen: set[Path] = set()

    def read_file(self, name: str, asked_by: str, beside: Path | None = None, again: bool = False) -> None:
        """With `again` also a file that was read before; not what it includes."""
        path = self.find(name, asked_by, beside)
        shown = _shown(path)
        if path.resolve() not in self._seen:
            self._seen.add(path.resolve())
            self.files.append(shown)
        elif not again:
            return
        try:
            with path.open(encoding="utf-8") as file:
                self._read(file, shown, path.parent)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The gin file {shown} cannot be read: {error}.") from None

    def read_flag(self, text: str) -> None:
        """`NAME=VALUE`, as it follows `--gin.`. A value that is no gin literal is a string, for shells eat quotes."""
        name, equals, value = text.partition("=")
        origin = f"--gin.{name}"
        if not equals:
            raise UserError(f"{origin} has no value; write --gin.{name}=VALUE.")
        if not _FLAG_NAME.fullmatch(name):
            raise UserError(f"{origin}: '{name}' is not a name; write --gin.MACRO=VALUE or --gin.CLASS.FIELD=VALUE.")
        try:
            statements = list(_statements(_parser(f"{name} = {value}\n"), origin))
        except UserError:
            if value[:1] in tuple("@%([{'\""):
                raise UserError(f"{origin}: {value} is not a value that gin can read.") from None
            statements = []
        if len(statements) == 1:
            self._bind(statements[0], origin)
        else:
            self._bind(next(_statements(_parser(f"{name} = {value!r}\n"), origin)), origin)

    def _read(self, file: TextIO, shown: str, folder: Path) -> None:
        for statement in _statements(_parser(file), shown):
            origin = f"{shown}:{statement.location.line_num}"
            if isinstance(statement, config_parser.IncludeStatement):
                self.read_file(statement.filename, origin, folder)
            elif isinstance(statement, config_parser.BindingStatement):
                self._bind(statement, origin)
            elif isinstance(statement, config_parser.ImportStatement):
                raise UserError(
                    f"{origin}: '{statement.format()}' has no place here, for gin only fills mpt_jax's own configuration; "
                    "name modules that register tasks in DataConfig.task_modules."
                )

    def _bind(self, statement: config_parser.BindingStatement, origin: str) -> None:
        scope, name, field, value, _ = statement
        if field:
            self.bindings.bind(tuple(scope.split("/")) if scope else (), name, field, value, origin)
        elif name in CLASSES:
            raise UserError(f"{origin}: {name} is a configuration, not a macro; bind one of its fields: {name}.FIELD = VALUE.")
        else:
            self.bindings.bind_macro(f"{scope}/{name}" if scope else name, value, origin)

    def find(self, name: str, asked_by: str, beside: Path | None, ending: str = ".gin") -> Path:
        """A gin file, or one of another ending that it names. Raises `UserError` where it is nowhere."""
        given = Path(name).expanduser()
        for folder in (Path(), *([beside] if beside else []), *self._folders):
            if (folder / given).is_file():
                return folder / given
        folders = list(dict.fromkeys((Path.cwd(), *([beside] if beside else []), *self._folders)))
        known = [_shown(file) for folder in self._folders if folder.name == "gin" for file in folder.rglob(f"*{ending}")]
        hint = nearest(name, known) or f" Looked in {', '.join(map(str, folders))}."
        raise UserError(f"{asked_by}: there is no {ending[1:]} file '{name}'.{hint}")


def _parser(source: TextIO | str) -> config_parser.ConfigParser:
    return config_parser.ConfigParser(source, _Delegate())


def _statements(parser: config_parser.ConfigParser, shown: str) -> Iterator[Any]:
    """The statements of a file; syntax errors become `UserError`s with file and line."""
    while True:
        try:
            statement = parser.parse_statement()
        except SyntaxError as error:
            line = (error.text or "").strip()
            raise UserError(f"{shown}:{error.lineno}: gin cannot read '{line}': {_reason(str(error.msg))}.") from None
        except tokenize.TokenError as error:
            raise UserError(f"{shown}:{error.args[1][0]}: {error.args[0]}; a bracket or a quote is not closed.") from None
        except (StopIteration, ValueError) as error:
            raise UserError(f"{shown}: gin cannot read this file: {_reason(str(error) or 'it ends too early')}.") from None
        if statement is None:
            return
        yield statement


def _reason(text: str) -> str:
    """gin's explanation of a syntax error in one line."""
    if token := re.search(r"Failed to parse token '(\w+)'", text):
        return f"{token[1]} is not a value; a string needs quotes"
    return text.splitlines()[0].rstrip(".")


def _shown(path: Path) -> str:
    """The path as a message prints it: relative where the file lies below the working directory."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith("..") else relative
