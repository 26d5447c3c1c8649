"""What a sweep's points have come to, as files that any number of jobs share, on one machine or on several with one file system.

points/<key>.json     the results of a point that is done
claims/<key>.json     who is at work on it (`claims.py`)
failures/<key>.json   the error of a point that failed; the next call tries it again
"""

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from mpt_jax.claims import Claims
from mpt_jax.errors import UserError
from mpt_jax.files import read_object, write_text


class Board:
    """Within it this job's claims are kept alive; when it is left they are given back.

    Args:
        folder: of the sweep.
        timeout: seconds.
    """

    def __init__(self, folder: Path, timeout: float):
        self._folder = folder
        self.claims = Claims(folder / "claims", timeout)

    def __enter__(self) -> "Board":
        self.claims.__enter__()
        for name in ("points", "failures"):
            (self._folder / name).mkdir(exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.claims.__exit__(kind, error, trace)

    def results(self, key: str) -> list[dict[str, Any]] | None:
        """The records of a point that is done; None of another."""
        return read_results(self._folder, key)

    def take(self, keys: Iterable[str]) -> list[str]:
        """Claims those of the points that nobody is at work on, and returns them; none that is done."""
        taken = [key for key in keys if self.results(key) is None and self.claims.take(key)]
        # One may have been done, and its claim given back, since it was looked at.
        late = {key for key in taken if self.results(key) is not None}
        self.claims.give_back(late)
        return [key for key in taken if key not in late]

    def finish(self, key: str, records: Sequence[Any]) -> None:
        """Writes the results, whole and at least one, of a point that this job has claimed, and gives its claim back.

        Raises:
            ClaimLost: the point is another job's by now.
        """
        if not records:
            raise ValueError(f"the point {key} has no results")
        self.claims.check(key)
        write_text(_point(self._folder, key), json.dumps(list(records), ensure_ascii=False, indent=1) + "\n")
        (self._folder / "failures" / f"{key}.json").unlink(missing_ok=True)
        self.claims.give_back([key])

    def fail(self, key: str, name: str, error: str) -> None:
        """Records why a point that this job has claimed failed, and gives its claim back.

        Raises:
            ClaimLost: the point is another job's by now.
        """
        self.claims.check(key)
        text = json.dumps({"point": name, "error": error, "host": self.claims.me["host"]}, ensure_ascii=False, indent=1)
        write_text(self._folder / "failures" / f"{key}.json", text + "\n")
        self.claims.give_back([key])


def read_results(folder: Path, key: str) -> list[dict[str, Any]] | None:
    """The records of a point; None if it is not done.

    Raises:
        UserError: the file is damaged.
    """
    path = _point(folder, key)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it, and its point is trained again.") from None
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path} does not hold the results of a point; delete it, and its point is trained again.")
    return records


class Failure(NamedTuple):
    """Why a point failed, and when its file was written."""

    error: str
    stamp: int


def read_failures(folder: Path, keys: Iterable[str]) -> dict[str, Failure]:
    """The points that failed when they were last tried."""
    found = {}
    for key in keys:
        path = folder / "failures" / f"{key}.json"
        with contextlib.suppress(FileNotFoundError):  # none, or another call has done the point in this moment
            stamp = path.stat().st_mtime_ns
            found[key] = Failure(str(read_object(path).get("error", f"{path} does not say why.")), stamp)
    return found


def _point(folder: Path, key: str) -> Path:
    return folder / "points" / f"{key}.json"
