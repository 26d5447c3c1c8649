"""What a sweep's report is drawn with besides its runs: the axes that were asked for, and curves that others have published."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpt_jax.errors import UserError
from mpt_jax.studies.results import Record

AGAINST = ("x", "parameters")
FORM = '{"label", "source", "x", "y"}, with "against": "parameters" for the second picture'


@dataclasses.dataclass(frozen=True)
class Published:
    """A curve to draw beside those of the sweep, dashed and grey.

    `x` are values of the sweep's x axis, as its labels have them, or parameters trained with `against` = "parameters".
    """

    label: str
    source: str
    x: tuple[Any, ...]
    y: tuple[float, ...]
    against: str = "x"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How the runs of a sweep are drawn.

    `x` is the axis along which curves run ("": the first with numbers); `axes` has all values, also of cells without results yet.
    `missing` points have no results yet; `failed` of these have failed.
    """

    x: str = ""
    axes: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    published: tuple[Published, ...] = ()
    missing: int = 0
    failed: int = 0


def read_published(path: str | Path) -> tuple[Published, ...]:
    """The curves of a JSON file, a list of {"label", "source", "x", "y", "against"}; `source` is printed under the picture.

    Raises:
      UserError: no such file, or not such a list.
    """
    try:
        return _curves(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"SweepConfig.published is '{path}', which cannot be read ({error.strerror}); check the path.") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"SweepConfig.published is {path}, which is no list of {FORM} ({error}); mend it.") from None


def drawing_of(records: Iterable[Record], path: Path) -> Drawing:
    """The drawing that the results in the file `path` were written with: their first line has it as "sweep".

    Raises:
      UserError: it is damaged.
    """
    found: Any = next((record["sweep"] for record in records if "sweep" in record), {})
    try:
        drawing = Drawing(**found | {"published": _curves(found.get("published", []))})
        if isinstance(drawing.x, str) and all(isinstance(values, list) for values in drawing.axes.values()):
            return drawing
        reason = "x is no name or an axis has no list of values"
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error)
    raise UserError(f'{path} has a "sweep" that cannot be drawn ({reason}); the sweep\'s command again writes it anew.')


def _curves(items: Any) -> tuple[Published, ...]:
    """ValueError or TypeError, which says why, for anything but a list of curves."""
    if not isinstance(items, list):
        raise TypeError(f"it is a {type(items).__name__}")
    return tuple(_curve(item) for item in items)


def _curve(item: Any) -> Published:
    if not isinstance(item, dict) or not isinstance(item.get("label"), str):
        raise TypeError(f"{str(item)[:80]} has no label")
    name = f"'{item['label']}'"
    if unknown := sorted(item.keys() - {field.name for field in dataclasses.fields(Published)}):
        raise ValueError(f"{name} has '{unknown[0]}'")
    if not isinstance(item.get("source"), str):
        raise TypeError(f"{name} has no source")
    x, y, against = item.get("x"), item.get("y"), item.get("against", "x")
    if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y) or not x:
        raise ValueError(f"{name} has not as many x as y, at least one of each")
    if against not in AGAINST:
        raise ValueError(f"{name} has against = {against!r}, not one of {', '.join(AGAINST)}")
    if not all(map(is_number, y)):
        raise ValueError(f"{name} has a y that is no number")
    if against == "parameters" and not all(is_number(size) and size > 0 for size in x):
        raise ValueError(f"{name} has an x that is no number of parameters")
    return Published(item["label"], item["source"], tuple(x), tuple(y), against)


def is_number(value: Any) -> bool:
    """Whether a value has a place on a scale."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
