"""The files of a token cache: written batch by batch into a temporary folder, which is then moved into place in one step."""

import contextlib
import json
import os
import shutil
import socket
import uuid
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mpt_jax.data import fingerprint
from mpt_jax.data.cache import MAX_CLASSES, PERCENTILES, RECURRENCE
from mpt_jax.errors import UserError


class Columns:
    """A batch of examples as they are written: token rows cut to their length, what they were cut from, text as JSON lines."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[np.ndarray]] = {"inputs": [], "targets": []}
        self.uncut: dict[str, list[int]] = {"inputs": [], "targets": []}  # tokens of each row before it was cut
        self.texts: list[bytes] = []
        self.targets: list[str | None] = []

    def __len__(self) -> int:
        return len(self.texts)


def write(folder: Path, batches: Iterable[Columns], meta: dict[str, Any]) -> None:
    """Writes the files of a cache into `folder`, batch by batch, and completes `meta`, which is written last."""
    with _Writer(folder) as writer:
        for columns in batches:
            with writing(folder.parent):
                writer.add(columns)
        with writing(folder.parent):
            meta |= writer.finish()
            meta["sizes"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            (folder / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True))


class _Writer:
    """The open files of a cache under way. What it keeps in memory is two bytes an example, where there are few targets."""

    def __init__(self, folder: Path):
        self._folder = folder
        names = ("inputs", "targets", "text")
        with contextlib.ExitStack() as stack, writing(folder.parent):
            self._text = stack.enter_context((folder / "text.jsonl").open("wb"))
            self._tokens = {name: stack.enter_context(_ArrayFile(folder / f"{name}.npy", np.int32)) for name in names[:2]}
            self._offsets = {name: stack.enter_context(_ArrayFile(folder / f"{name}_offsets.npy", np.int64)) for name in names}
            for file in self._offsets.values():
                file.append([0])
            self._open = stack.pop_all()
        self._ends = dict.fromkeys(names, 0)
        self._uncut = {name: Counter[int]() for name in names[:2]}
        self._truncated = dict.fromkeys(names[:2], 0)
        self._examples = 0
        self._number: dict[str, int] | None = {}  # target → number by first occurrence; None: no classification
        self._labels = array("h")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, columns: Columns) -> None:
        for name, rows in columns.tokens.items():
            sizes = [len(row) for row in rows]
            self._tokens[name].append(np.concatenate(rows))
            self._end(name, sizes)
            self._uncut[name].update(columns.uncut[name])
            self._truncated[name] += sum(before > size for before, size in zip(columns.uncut[name], sizes, strict=True))
        self._text.write(b"".join(columns.texts))
        self._end("text", [len(text) for text in columns.texts])
        self._examples += len(columns)
        self._classify(columns.targets)

    def finish(self) -> dict[str, Any]:
        """Writes the labels and closes the files. Returns what `meta` needs to know."""
        if not self._ends["text"]:
            self._text.write(b"\n")  # an empty file cannot be memory-mapped
        self._open.close()
        names = sorted(self._number or ())
        classes = bool(names) and RECURRENCE * len(names) <= self._examples
        if classes:
            sorted_number = np.array([names.index(name) for name in self._number or ()], np.int16)
            np.save(self._folder / "labels.npy", sorted_number[np.asarray(self._labels)])
        return {
            "examples": self._examples,
            "truncated": self._truncated,
            "percentiles": {name: percentiles(counts) for name, counts in self._uncut.items()},
            "labels": names if classes else None,
        }

    def _end(self, name: str, sizes: list[int]) -> None:
        ends = np.cumsum([self._ends[name], *sizes], dtype=np.int64)
        self._offsets[name].append(ends[1:])
        self._ends[name] = int(ends[-1])

    def _classify(self, targets: list[str | None]) -> None:
        if self._number is None:
            return
        for target in targets:
            number = None if target is None else self._number.setdefault(target, len(self._number))
            if number is None or number >= MAX_CLASSES:
                self._number, self._labels = None, array("h")
                return
            self._labels.append(number)


class _ArrayFile:
    """A one-dimensional .npy file that grows; byte for byte what `np.save` would have written, once it is closed."""

    def __init__(self, path: Path, dtype: Any):
        self._dtype, self._size = np.dtype(dtype), 0
        self._file = path.open("wb")
        self._write_header()

    def __enter__(self) -> "_ArrayFile":
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()  # of the same length: NumPy leaves room in it for the first axis to grow

    def append(self, values: Any) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._size += len(values)

    def _write_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._size,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def percentiles(counts: Counter[int]) -> dict[str, int]:
    """{"50": n, …}: the length that so many percent of the examples do not exceed, from how often each length occurs."""
    sizes = sorted(counts)
    reached = np.cumsum([counts[size] for size in sizes])
    return {str(q): sizes[int(np.searchsorted(reached, q / 100 * reached[-1]))] for q in PERCENTILES if sizes}


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder` that is gone afterwards, under this name at least."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_dead_builds(folder)
        temporary = folder / f".build-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_dead_builds(folder)  # of a builder that was killed meanwhile: nobody may build here again


def install(temporary: Path, final: Path, environment: dict[str, str]) -> None:
    """Renames what was built; of two builders the first one's work stays."""
    with writing(final.parent):
        if final.exists() and not _whole(final):
            shutil.rmtree(final)
        _remove_stale(final.parent, environment)
        try:
            temporary.rename(final)
        except OSError:
            if not _whole(final):  # not another builder's: a real failure
                raise


def _whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "meta.json").read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _remove_stale(folder: Path, environment: dict[str, str]) -> None:
    """Removes variants whose code or data is no longer there (one made under another environment may be wanted again)."""
    for path in folder.glob("[!.]*/meta.json"):
        with contextlib.suppress(ValueError, KeyError):
            depends = json.loads(path.read_text())["depends"]
            if depends["environment"] == environment and not fingerprint.fresh(depends):
                shutil.rmtree(path.parent, ignore_errors=True)


def _remove_dead_builds(folder: Path) -> None:
    """Removes what killed builders of this machine left behind."""
    host = socket.gethostname()
    for path in folder.glob(f".build-{host}-*"):
        pid = path.name.removeprefix(f".build-{host}-").partition("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (ValueError, PermissionError):
            continue


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write the token cache in '{folder}' ({error.strerror}); set DataConfig.cache_dir to a writable folder."
        ) from None
