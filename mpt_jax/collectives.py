"""The communication in a compiled program, read from its text, with loops counted as often as they run."""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "f64": 8,
}

_COMPUTATION = re.compile(r"^(?:(ENTRY) )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALL = re.compile(r"(?:calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One operation of the program's text. `times` is how often a step runs it, `bytes` what it yields each time."""

    kind: str
    times: int
    bytes: int
    shapes: str  # as the text has them, such as "bf16[16,356,768]"


def collectives_of(text: str) -> list[Collective]:
    """Of a compiled program (`compiled.as_text()`).

    A loop over layers runs as often as its condition compares against; that of decoding, at most so often.
    """
    entry, computations = _computations(text)
    times = dict.fromkeys(computations, 0)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in computations[name]:
            if loop := _WHILE.search(line):
                condition, body = loop.groups()
                visit(body, count * _trips(line, computations.get(condition, [])))
            else:
                for called in re.findall(r"[\w.\-]+", " ".join(_CALL.findall(line))):
                    if called in computations:
                        visit(called, count)

    visit(entry, 1)
    found = []
    for name, lines in computations.items():
        for line in lines:
            operation = _OPERATION.match(line)
            if operation and times[name]:
                arrays = _yielded(operation[1], operation[2] if operation[3] else "")
                size = sum(ITEM_BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in arrays)
                shown = ", ".join(f"{kind}[{shape}]" for kind, shape in arrays)
                found.append(Collective(operation[2], times[name], size, shown))
    return found


def _yielded(shapes: str, started: str) -> list[tuple[str, str]]:
    """(kind of number, shape) of each array that a collective yields, from its type; `started` is its kind if it is asynchronous.

    What an asynchronous all-reduce yields is its results; all others yield their operands, their results and perhaps counters.
    """
    arrays = _ARRAY.findall(shapes)
    if started in ("", "all-reduce"):
        return arrays
    arrays = [array for array in arrays if array != ("u32", "")]  # counters of a collective-permute
    return arrays[len(arrays) // 2 :] if len(arrays) > 1 else arrays


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """(name of the entry, {name: lines})."""
    entry = ""
    computations: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            current = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return entry, computations


def _trips(line: str, condition: list[str]) -> int:
    if known := _TRIPS.search(line):
        return int(known[1])
    return max((int(number) for text in condition for number in _CONSTANT.findall(text)), default=1)
