"""What a token cache depends on: code, data files and environment variables, checked without importing any of it."""

import functools
import hashlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def digest(*parts: str | bytes) -> str:
    """SHA-256 over the parts, each preceded by its length; 16 hex digits."""
    sha = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        sha.update(f"{len(part)}:".encode() + part)
    return sha.hexdigest()[:16]


def module_file(name: str) -> Path | None:
    """Source file of a module or package, found without running it (only `sys.path` is searched); None if there is none."""
    top, _, rest = name.partition(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin:
        return None
    if not rest:
        return Path(spec.origin)
    base = Path(spec.origin).parent.joinpath(*rest.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def module_hash(name: str) -> str:
    """Digest of a module's source, "" when it cannot be found."""
    path = module_file(name)
    return digest(path.read_bytes()) if path else ""


def tree_modules(names: Iterable[str]) -> set[str]:
    """Every module of the packages (or the module itself) that `names` belong to."""
    found = set()
    for top in {name.partition(".")[0] for name in names}:
        path = module_file(top)
        if path is None:
            continue
        found.add(top)
        if path.name == "__init__.py":
            for file in path.parent.rglob("*.py"):
                parts = file.relative_to(path.parent.parent).with_suffix("").parts
                found.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def code_closure(objects: Iterable[Any], start: Iterable[str], packages: Iterable[str]) -> set[str]:
    """Names of the loaded modules of `packages` that `objects` and the modules `start` use, directly or through one another."""
    tops = {name.partition(".")[0] for name in packages}
    todo, found = [*start], set[str]()
    for item in objects:
        todo += _modules_of(item, set())
    while todo:
        name = todo.pop()
        module = sys.modules.get(name)
        if name in found or name.partition(".")[0] not in tops or module is None:
            continue
        found.add(name)
        for value in vars(module).values():
            todo.append(value.__name__ if isinstance(value, types.ModuleType) else str(getattr(value, "__module__", "")))
    return found


def _modules_of(item: Any, seen: set[int]) -> list[str]:
    """Modules in which a callable (partial, closure, wrapped function, instance) and what it holds are defined."""
    if id(item) in seen:
        return []
    seen.add(id(item))
    if isinstance(item, (list, tuple)):
        return [name for part in item for name in _modules_of(part, seen)]
    if isinstance(item, functools.partial):
        return _modules_of([item.func, *item.args, *item.keywords.values()], seen)
    names = [str(getattr(item, "__module__", "") or ""), type(item).__module__]
    cells = [cell.cell_contents for cell in getattr(item, "__closure__", None) or () if _filled(cell)]
    inner = [value for value in cells if callable(value)]
    if hasattr(item, "__wrapped__"):
        inner.append(item.__wrapped__)
    return names + _modules_of(inner, seen)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False


def file_state(path: str) -> list[Any]:
    """[size, modification time in ns, digest] of a data file; zeros and "" when it is missing."""
    try:
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns, _file_digest(path, stat.st_size, stat.st_mtime_ns)]
    except OSError:
        return [0, 0, ""]


@functools.lru_cache(maxsize=1024)
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def file_unchanged(path: str, state: list[Any]) -> bool:
    """True when the file is as `file_state` saw it; its bytes are read only if its time changed and its size did not."""
    try:
        stat = os.stat(path)
    except OSError:
        return state[2] == ""
    if stat.st_size != state[0]:
        return False
    return stat.st_mtime_ns == state[1] or _file_digest(path, stat.st_size, stat.st_mtime_ns) == state[2]


def fresh(depends: dict[str, Any]) -> bool:
    """True when modules, files and environment variables are as recorded in `depends`."""
    return (
        all(os.environ.get(name, "") == value for name, value in depends["environment"].items())
        and all(module_hash(name) == value for name, value in depends["modules"].items())
        and all(file_unchanged(path, state) for path, state in depends["files"].items())
    )
