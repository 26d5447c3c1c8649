"""What a run writes down, and the tables made of it: `python -m benchmarks.results` prints those of all JSON files."""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.settings import EMBEDDED, Settings

RESULTS = Path(__file__).parent / "results"
Seconds = dict[str, list[list[float]]]  # of each contender: of each round the seconds of its turns


def circumstances(settings: Settings) -> dict[str, Any]:
    """When, where and with what. `load` gets the machine's load average (1 minute) at the beginning of each round."""
    shown = dataclasses.asdict(settings)
    del shown["output"]
    if settings.vocabulary != EMBEDDED:
        file = Path(settings.vocabulary)
        shown["vocabulary"] = f"{file.name}, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform(terse=True)},
        "settings": shown,
        "load": [],
    }


def _commit() -> str:
    """Of this repository, with "+" where files differ from it; "" outside of one."""
    git = ["git", "-C", str(RESULTS.parent)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True).stdout
    return found.stdout.strip() + ("+" if changed else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().split("\n"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def ratios(seconds: Seconds, examples: int, ours: str) -> dict[str, Any]:
    """Examples per second of each contender, and how many times as fast as each other one ours is.

    Both are medians over the rounds, with the quartiles and all rounds. A ratio is of the seconds of one round, in which all
    took their turns close to one another: what else the machine does slows both down alike.
    """
    totals = {label: np.array([sum(turns) for turns in rounds]) for label, rounds in seconds.items() if all(rounds)}
    result: dict[str, Any] = {label: {"examples_per_second": _spread(examples / total)} for label, total in totals.items()}
    for label, mine in totals.items():
        others = {other: theirs for other, theirs in totals.items() if not other.startswith(ours)}
        if label.startswith(ours):
            result[label]["times_as_fast_as"] = {other: _spread(theirs / mine) for other, theirs in others.items()}
    return result


def _spread(values: np.ndarray) -> dict[str, Any]:
    low, median, high = np.percentile(values, (25, 50, 75))
    rounded = [float(f"{value:.4g}") for value in values]
    return {"median": float(median), "quartiles": [float(low), float(high)], "n": len(values), "rounds": rounded}


def summary(report: dict[str, Any]) -> str:
    """A Markdown table of one run."""
    lines = [
        "| work | contender | examples/s | of the peak | times as fast as PEFT (quartiles; rounds) | by processor time |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for work, results in report["results"].items():
        for label, result in results.items():
            speed = result["examples_per_second"]["median"]
            by_processor = _times(report["processor_results"][work][label]) if report["settings"]["device"] == "cpu" else "–"
            cells = (work, label, f"{speed:.2f}", _mfu(report, work, speed), _times(result), by_processor)
            lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| | {label} failed | {why} | | | |" for label, why in report["failed"].items()]
    return "\n".join(lines)


def _times(result: dict[str, Any]) -> str:
    told = []
    for other, spread in result.get("times_as_fast_as", {}).items():
        low, high = spread["quartiles"]
        told.append(f"{other}: {spread['median']:.2f} ({low:.2f} to {high:.2f}; {spread['n']})")
    return "; ".join(told) or "–"


def _mfu(report: dict[str, Any], work: str, examples_per_second: float) -> str:
    """Of the device's peak; counted alike for all, by the products that the method needs (`mpt_jax.costs`)."""
    ours = report["contenders"].get("mpt_jax", {})
    if not ours.get("peak_flops") or report["settings"]["tasks"]:
        return "–"
    return f"{ours['flops'][work] * examples_per_second / report['settings']['batch'] / ours['peak_flops']:.1%}"


def title(report: dict[str, Any]) -> str:
    settings = report["settings"]
    device = next(iter(report["contenders"].values()))["device"]
    place = f"{report['machine']['processor']}, {settings['threads']} cores" if settings["device"] == "cpu" else device
    lengths = (
        f"{settings['tasks']} at its lengths"
        if settings["tasks"]
        else f"inputs {settings['inputs']}, targets {settings['targets']}"
    )
    return (
        f"{settings['size']}, batch {settings['batch']}, {lengths}, prompt {settings['prompt']}, {settings['dtype']}; {place}; "
        f"{report['started']}, load {min(report['load']):.1f} to {max(report['load']):.1f}"
    )


def main() -> None:
    for path in sorted(Path(arguments[0] if (arguments := sys.argv[1:]) else RESULTS).glob("*.json")):
        report = json.loads(path.read_text())
        print(f"{title(report)}\n\n{summary(report)}\n")


if __name__ == "__main__":
    main()
