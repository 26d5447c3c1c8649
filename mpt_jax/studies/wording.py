"""How the report and its pictures name things and count them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpt_jax.studies import results


def task_labels(tasks: Sequence[str]) -> dict[str, str]:
    """Names for people: the prefix that all tasks share ('sketch_') and underscores are left out."""
    prefixes = {task.split("_", 1)[0] + "_" if "_" in task else "" for task in tasks}
    shared = prefixes.pop() if len(tasks) > 1 and len(prefixes) == 1 else ""
    return {task: task.removeprefix(shared).replace("_", " ") for task in tasks}


def setting_label(k: int) -> str:
    return f"k = {k}" if k else "all examples"


def mean_label(tasks: Sequence[str]) -> str:
    """'mean of 4 targets', or the name of the only one."""
    return f"mean of {len(tasks)} targets" if len(tasks) > 1 else task_labels(tasks)[tasks[0]]


def seeds_note(spreads: Sequence[results.Spread | None]) -> str:
    """'n = 3 seeds', or the range where runs are missing."""
    counts = sorted({spread.n for spread in spreads if spread})
    return f"n = {number_range(counts)} seed{'s' if counts[-1] > 1 else ''}" if counts else "no runs"


def number_range(numbers: Sequence[int]) -> str:
    """'3', or '2–3' where they differ."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def short(axis: str) -> str:
    """A sweep's axis in a table: 'PromptConfig.init_scale' → 'init scale'."""
    return axis.rpartition(".")[2].replace("_", " ").lower()


def value_label(value: Any) -> str:
    """A value of an axis, of a gin file, a line of JSON or a `Series`: '20', 'vocab', 't5_1_1_small' of a path.

    Of a stage @mpt/StageConfig() its scope, 'mpt'; of several things 'a + b'; of rules 'shared 0.3 + task_.* 0.03', or the rate
    of one for all.
    """
    match value:
        case [[".*", rate]]:
            return str(rate)
        case dict():
            return value_label(sorted(value.items()))
        case list() | tuple():
            parts = [" ".join(map(value_label, part)) if isinstance(part, list | tuple) else value_label(part) for part in value]
            return results.SEVERAL.join(parts) or "none"
        case str() if value.startswith("@"):
            scope, _, name = value.removeprefix("@").removesuffix("()").rpartition("/")
            return scope or name
        case str() if value.endswith(".gin"):
            return Path(value).stem
    return str(value)


def listing(items: Sequence[str]) -> str:
    """'a, b and c'."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def counted(number: int, noun: str) -> str:
    """'1 run', '2,000 runs'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
