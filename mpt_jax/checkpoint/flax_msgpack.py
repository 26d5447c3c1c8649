"""Where the arrays of a flax msgpack file lie, found without reading them.

flax (`flax/serialization.py`) writes an array as the msgpack extension 1 around [shape, dtype's name, bytes], and one of more
than 1 GiB as a dict of flat chunks. msgpack's own reader would take the whole file into memory, optimiser and all.
"""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

_NDARRAY = 1  # flax's extension type
_CHUNKED = "__msgpack_chunked_array__"
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = dict(zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True))
_LENGTHS = {  # first byte → (kind, format of the length that follows)
    **{0xC4 + n: ("bytes", code) for n, code in enumerate((">B", ">H", ">I"))},
    **{0xC7 + n: ("extension", code) for n, code in enumerate((">B", ">H", ">I"))},
    **{0xD9 + n: ("text", code) for n, code in enumerate((">B", ">H", ">I"))},
    **{0xDC + n: ("list", code) for n, code in enumerate((">H", ">I"))},
    **{0xDE + n: ("dict", code) for n, code in enumerate((">H", ">I"))},
}


class Packed(NamedTuple):
    """An array in C order, in one piece or in several that follow one another."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[int, int], ...]  # (offset in the file, bytes)


class _Bytes(NamedTuple):
    """A byte string that was not read."""

    offset: int
    size: int


def read_index(fetch: Callable[[int, int], bytes]) -> Any:
    """The file's dicts, lists and scalars, with a `Packed` for each array.

    Args:
        fetch: (offset, at most so many bytes) → bytes of the file; fewer only at its end.

    Raises:
        ValueError: no msgpack, or a file that ends too early.
    """
    reader = _Reader(fetch)
    tree = reader.value()
    if reader.offset and not fetch(reader.offset - 1, 1):  # the last array's bytes were skipped
        raise ValueError("the file ends too early")
    return tree


class _Reader:
    """Goes through the file by its headers; `offset` is the next byte to read."""

    WINDOW = 2**16

    def __init__(self, fetch: Callable[[int, int], bytes]):
        self.offset = 0
        self._fetch, self._window, self._start = fetch, b"", 0

    def value(self) -> Any:
        kind, size = self._header()
        if kind == "scalar":
            return size
        if kind == "bytes":
            self.offset += size
            return _Bytes(self.offset - size, size)
        if kind == "text":
            return self._take(size).decode()
        if kind == "list":
            return [self.value() for _ in range(size)]
        if kind == "extension":
            return self._extension(size)
        found = {self.value(): self.value() for _ in range(size)}
        return _unchunked(found) if _CHUNKED in found else found

    def _header(self) -> tuple[str, Any]:
        """(kind, length), or ("scalar", its value)."""
        (first,) = self._take(1)
        if first < 0x80 or first >= 0xE0:
            return "scalar", first if first < 0x80 else first - 0x100
        if first < 0x90:
            return "dict", first - 0x80
        if first < 0xA0:
            return "list", first - 0x90
        if first < 0xC0:
            return "text", first - 0xA0
        if first in _CONSTANTS:
            return "scalar", _CONSTANTS[first]
        if first in _NUMBERS:
            return "scalar", self._number(_NUMBERS[first])
        if 0xD4 <= first <= 0xD8:
            return "extension", 1 << (first - 0xD4)
        if first not in _LENGTHS:
            raise ValueError(f"it has a byte {first:#x} that no msgpack has")
        kind, code = _LENGTHS[first]
        return kind, self._number(code)

    def _extension(self, size: int) -> Packed | None:
        kind = self._number(">b")
        end = self.offset + size
        if kind != _NDARRAY:  # a scalar of NumPy or a complex number; no weight is one
            self.offset = end
            return None
        shape, dtype, data = self.value()
        if isinstance(dtype, _Bytes):  # flax leaves it to msgpack whether the name is text
            self.offset = dtype.offset
            dtype = self._take(dtype.size).decode()
        self.offset = end
        return Packed(tuple(shape), dtype, (tuple(data),))

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _take(self, size: int) -> bytes:
        at = self.offset - self._start
        if at < 0 or at + size > len(self._window):
            self._window, self._start, at = self._fetch(self.offset, max(size, self.WINDOW)), self.offset, 0
        if at + size > len(self._window):
            raise ValueError("the file ends too early")
        self.offset += size
        return self._window[at : at + size]


def _unchunked(found: dict[str, Any]) -> Packed:
    """flax's chunks of one array; `shape` and `chunks` are dicts from "0", "1", …"""
    shape, chunks = ([part[str(n)] for n in range(len(part))] for part in (found["shape"], found["chunks"]))
    return Packed(tuple(shape), chunks[0].dtype, tuple(piece for chunk in chunks for piece in chunk.pieces))
