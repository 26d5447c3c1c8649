"""How the pictures look: one colour (Okabe and Ito's palette), marker, line style and hatch for each method.

So they can be read in grey and by the colour-blind: `tests/test_report.py` measures the colours' distance as those see them.
"""

import dataclasses
from typing import Any

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "hatch.linewidth": 0.7,
    "svg.hashsalt": "mpt_jax",  # the same picture gives the same file
}
EDGE = "#222222"  # of bars, markers and dots


@dataclasses.dataclass(frozen=True)
class Look:
    """How one method is drawn everywhere."""

    label: str
    color: str
    marker: str
    line: Any
    hatch: str


LOOKS = {
    "mpt": Look("MPT", "#0072B2", "o", "-", ""),
    "prompt_tuning": Look("Prompt tuning", "#E69F00", "s", (0, (5, 2)), "////"),
    "spot": Look("SPoT", "#009E73", "^", (0, (1, 1.2)), "...."),
    "model_tuning": Look("Model tuning", "#4D4D4D", "D", (0, (6, 2, 1, 2)), "xxxx"),
}
OTHER_LOOKS = (
    Look("", "#D55E00", "v", "-", "\\\\\\\\"),
    Look("", "#CC79A7", "P", (0, (3, 1)), "++++"),
    Look("", "#56B4E9", "X", (0, (1, 2)), "oooo"),
    Look("", "#000000", "*", (0, (8, 2)), "||||"),
)
CURVE_LOOKS = (*LOOKS.values(), *OTHER_LOOKS)  # of things that are not methods
_ORDER = (*OTHER_LOOKS, *LOOKS.values())
# For many things: these, then their colours with one another's markers and lines. No colour has a marker twice.
MANY_LOOKS = tuple(
    Look("", style.color, _ORDER[(n + turn) % len(_ORDER)].marker, _ORDER[(n + 2 * turn) % len(_ORDER)].line, style.hatch)
    for turn in range(len(_ORDER))
    for n, style in enumerate(_ORDER)
)
# Thin and without markers, unlike any method's line: (colour, line style).
REFERENCE_LINES: dict[str, tuple[str, Any]] = {"chance": ("#B03A2E", "-"), "ceiling": ("#333333", (0, (4, 1.5)))}


def look(method: str) -> Look:
    """The method's look; methods that are not the four of the pipeline get one by their name."""
    if method in LOOKS:
        return LOOKS[method]
    return dataclasses.replace(OTHER_LOOKS[sum(map(ord, method)) % len(OTHER_LOOKS)], label=method.replace("_", " "))
