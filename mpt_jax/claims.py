"""Who is at work on what, as files that any number of jobs share, on one machine or on several with one file system.

A claim is made by creating its file, which of several jobs only one can do; the file's time of change is renewed while that job
lives. The claim of a job that is gone is taken over: at once where its process was of this machine, else after `timeout` seconds
without a sign of life, by the file system's own clock. A job that was only held up for so long must then stop: see `check`.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from mpt_jax.errors import UserError
from mpt_jax.files import read_object

BEATS = 5  # signs of life in the time after which their absence counts
LOOKS, PAUSE = 10, 0.1  # how often and how many seconds apart a claim is looked for that is not there: it may be given back


class ClaimLost(UserError):
    """Another job has taken over what this one has claimed."""


class Claims:
    """Within it this job's claims are kept alive; when it is left they are given back.

    Args:
        folder: of the claims' files; it is made.
        timeout: seconds.
    """

    def __init__(self, folder: Path, timeout: float):
        self._folder, self._timeout = folder, timeout
        self.me = {"machine": _machine(), "host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self._held: set[str] = set()
        self._lost: dict[str, dict[str, Any]] = {}  # name → who has it now
        self._seen = time.time()  # when all that is held was last looked at
        self._lock = threading.RLock()  # of the two sets, between the worker and the thread that gives its signs of life
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="mpt_jax-claims", daemon=True)

    def __enter__(self) -> "Claims":
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot write into MODEL_DIR '{self._folder.parent}' ({error.strerror}); give a folder that you may write to."
            ) from None
        self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._beating.join()
        self.give_back(set(self._held))

    def take(self, name: str) -> bool:
        """Claims it, unless another that lives has; whether it is now this job's."""
        with self._lock:
            if name not in self._held and (self._create(name) or self._take_over(name)):
                self._held.add(name)
                return True
            return False

    def take_or_wait(self, name: str, say: Callable[[str], None]) -> bool:
        """As `take`; but one of another machine is watched until it is renewed or its time is up: nothing else tells if it lives.

        Args:
            say: is told of the waiting.
        """
        before = _state(self._file(name))
        told = False
        while not self.take(name):
            now = _state(self._file(name))
            if now != before or now is None or now.owner.get("machine") == self.me["machine"]:
                return False
            if not told:
                say(f"waiting up to {self._timeout:g} s for a sign of life of {_name(now.owner)}, to go on if there is none")
            told = True
            time.sleep(min(1.0, self._timeout / BEATS))
        return True

    def give_back(self, names: Iterable[str]) -> None:
        """Leaves what this job has claimed to others."""
        with self._lock:
            for name in list(names):
                self._held.discard(name)
                if self.owner(name).get("token") == self.me["token"]:
                    self._file(name).unlink(missing_ok=True)

    def check(self, *names: str) -> None:
        """Goes on where this job's claims are still its own.

        Without names it costs nothing, unless signs of life are overdue, as they are where this process has just been woken.

        Args:
            names: of those that must be this job's, each of which is looked at.
        Raises:
            ClaimLost: another job has one of them, or has had it.
        """
        with self._lock:
            overdue = time.time() - self._seen > 2 * self._timeout / BEATS
            self._look(names or (list(self._held) if overdue else ()))
            for name, owner in self._lost.items():
                raise ClaimLost(
                    f"This call gave no sign of life for {self._timeout:g} s, and {_name(owner)} has taken over what it was at "
                    f"work on ({self._file(name)}), so it stops; the same command goes on with what is left. Where calls are "
                    "held up so long, give a longer claim_timeout."
                )

    def is_anothers(self, name: str) -> bool:
        """Whether another job, that lives, has claimed it."""
        owner = self.owner(name)
        return owner.get("token") != self.me["token"] and not self._is_gone(name, owner)

    def owner(self, name: str) -> dict[str, Any]:
        """Who has claimed it; {} if nobody, or in the moment between a claim's making and its writing."""
        return read_object(self._file(name))

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _create(self, name: str, owner: dict[str, Any] | None = None) -> bool:
        try:
            descriptor = os.open(self._file(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            json.dump(owner or self.me, file)
        return True

    def _take_over(self, name: str) -> bool:
        """Claims what is of an owner who is gone. Of several that try, one gets it: who moves the old claim out of the way."""
        claim, aside = self._file(name), self._file(name).with_suffix(f".{self.me['token']}")
        before = _state(claim)
        if before is not None and not self._is_gone(name, before.owner):
            return False
        try:
            claim.rename(aside)
        except FileNotFoundError:
            return self._create(name)
        try:
            if before == _state(aside):
                return self._create(name)
            # Another has taken it over in between, or its owner has woken: give it back, unless one has claimed it since.
            try:
                os.link(aside, claim)
            except FileExistsError:
                pass
            except OSError:  # no hard links, as in a bucket
                self._create(name, read_object(aside))
            return False
        finally:
            aside.unlink()

    def _is_gone(self, name: str, owner: dict[str, Any]) -> bool:
        if owner.get("machine") == self.me["machine"] and not _is_alive(int(owner.get("pid", 0))):
            return True
        try:
            age = self._now() - self._file(name).stat().st_mtime
        except FileNotFoundError:
            return True
        return age > self._timeout

    def _now(self) -> float:
        """The file system's time, which the claims have, too: machines' own clocks may differ."""
        clock = self._folder / f".clock-{self.me['token']}"
        clock.write_bytes(b"")
        now = clock.stat().st_mtime
        clock.unlink()
        return now

    def _beat(self) -> None:
        while not self._stop.wait(self._timeout / BEATS):
            with self._lock:
                for name in self._look(list(self._held)):
                    with contextlib.suppress(OSError):  # given back, taken over or not reachable: the next beat will see
                        os.utime(self._file(name))

    def _look(self, names: Iterable[str]) -> list[str]:
        """Those of the names whose claims are this job's. Of the others, who has them is put down."""
        names = list(names)
        for name in (name for name in names if name not in self._lost):
            owner: dict[str, Any] = {}
            for _ in range(LOOKS):
                try:
                    owner = _read(self._file(name))
                except OSError:  # not reachable now, which says nothing
                    owner = self.me
                if owner:
                    break
                time.sleep(PAUSE)
            if owner.get("token") != self.me["token"]:
                self._lost[name] = owner
        if set(names) >= self._held:
            self._seen = time.time()
        return [name for name in names if name not in self._lost]


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another call"


class _State(NamedTuple):
    """A claim as it was once looked at."""

    owner: dict[str, Any]
    stamp: int  # of its latest sign of life


def _state(file: Path) -> _State | None:
    try:
        stamp = file.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    return _State(read_object(file), stamp)


def _read(file: Path) -> dict[str, Any]:
    """The owner in a claim, {} where there is no claim or nothing in it yet. OSError where that cannot be told."""
    try:
        owner = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


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
