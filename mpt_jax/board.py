"""What a sweep's points have come to, as files that any number of jobs share, on one machine or on several with one file system.

    points/<key>.json     the results of a point that is done
    claims/<key>.json     who is at work on it; its time of change is renewed while that job lives
    failures/<key>.json   the error of a point that failed; the next call tries it again

A claim is made by creating its file, which of several jobs only one can do. The claim of a job that is gone is taken over: at
once where its process was of this machine, else after `timeout` seconds without a sign of life, by the file system's own clock.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from mpt_jax.errors import UserError
from mpt_jax.files import write_text

BEATS = 5  # signs of life in the time after which their absence counts


class Board:
    """Within it this job's claims are kept alive; when it is left they are given back.

    Args:
        folder: of the sweep.
        timeout: seconds.
    """

    def __init__(self, folder: Path, timeout: float):
        self._folder, self._timeout = folder, timeout
        self._me = {"machine": _machine(), "host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self._held: set[str] = set()
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="mpt_jax-claims", daemon=True)

    def __enter__(self) -> "Board":
        try:
            for name in ("points", "claims", "failures"):
                (self._folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot write into MODEL_DIR '{self._folder}' ({error.strerror}); give a folder that you may write to."
            ) from None
        self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._beating.join()
        self.give_back(set(self._held))

    def results(self, key: str) -> list[dict[str, Any]] | None:
        """The records of a point that is done; None of another."""
        return read_results(self._folder, key)

    def take(self, keys: Iterable[str]) -> list[str]:
        """Claims those of the points that nobody is at work on, and returns them; none that is done."""
        taken = [key for key in keys if self.results(key) is None and (self._create(key) or self._take_over(key))]
        self._held |= set(taken)
        # One may have been done, and its claim given back, since it was looked at.
        late = {key for key in taken if self.results(key) is not None}
        self.give_back(late)
        return [key for key in taken if key not in late]

    def give_back(self, keys: Iterable[str]) -> None:
        """Leaves points to others."""
        for key in list(keys):
            if self._owner(key).get("token") == self._me["token"]:
                self._claim(key).unlink(missing_ok=True)
            self._held.discard(key)

    def finish(self, key: str, records: Sequence[Any]) -> None:
        """Writes a point's results, whole and at least one, and gives its claim back."""
        if not records:
            raise ValueError(f"the point {key} has no results")
        write_text(_point(self._folder, key), json.dumps(list(records), ensure_ascii=False, indent=1) + "\n")
        (self._folder / "failures" / f"{key}.json").unlink(missing_ok=True)
        self.give_back([key])

    def fail(self, key: str, name: str, error: str) -> None:
        """Records why a point failed, and gives its claim back."""
        text = json.dumps({"point": name, "error": error, "host": self._me["host"]}, ensure_ascii=False, indent=1)
        write_text(self._folder / "failures" / f"{key}.json", text + "\n")
        self.give_back([key])

    def _claim(self, key: str) -> Path:
        return self._folder / "claims" / f"{key}.json"

    def _owner(self, key: str) -> dict[str, Any]:
        """Who has claimed the point; {} if nobody, or in the moment between a claim's making and its writing."""
        return _read_object(self._claim(key))

    def _create(self, key: str) -> bool:
        try:
            descriptor = os.open(self._claim(key), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            json.dump(self._me, file)
        return True

    def _take_over(self, key: str) -> bool:
        """Claims a point whose owner is gone. Of several that try, one gets it: who moves the old claim out of the way."""
        owner = self._owner(key)
        if not self._is_gone(key, owner):
            return False
        aside = self._claim(key).with_suffix(f".{self._me['token']}")
        try:
            self._claim(key).rename(aside)
        except FileNotFoundError:
            return self._create(key)
        if _read_object(aside).get("token") != owner.get("token"):  # another has taken it over in between: give it back
            aside.rename(self._claim(key))
            return False
        aside.unlink()
        return self._create(key)

    def _is_gone(self, key: str, owner: dict[str, Any]) -> bool:
        if owner.get("machine") == self._me["machine"] and not _is_alive(int(owner.get("pid", 0))):
            return True
        try:
            age = self._now() - self._claim(key).stat().st_mtime
        except FileNotFoundError:
            return True
        return age > self._timeout

    def _now(self) -> float:
        """The file system's time, which the claims have, too: machines' own clocks may differ."""
        clock = self._folder / "claims" / f".clock-{self._me['token']}"
        clock.write_bytes(b"")
        now = clock.stat().st_mtime
        clock.unlink()
        return now

    def _beat(self) -> None:
        while not self._stop.wait(self._timeout / BEATS):
            for key in list(self._held):
                try:
                    os.utime(self._claim(key))
                except OSError:  # given back, taken over or not reachable: the next beat will see
                    continue


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
    return list(records)


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
            found[key] = Failure(str(_read_object(path).get("error", f"{path} does not say why.")), stamp)
    return found


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none, whole, or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _point(folder: Path, key: str) -> Path:
    return folder / "points" / f"{key}.json"


def _machine() -> str:
    """Names this start of this machine and this container: where it is equal, process ids can be compared."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if "ns" in path else Path(path).read_text().strip())
        except OSError:
            parts.append(str(time.time()))  # not to be told: then it is nobody's
    return "/".join(parts)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0
