"""SIGINT and SIGTERM: the first stops the work wherever it is, a second one ends the process at once (one of several takes leave
of the others first, which is seconds).

`handled` is the command line's. It raises `Interrupted` in the main thread, so that what is under way cleans up after itself.
Where the main thread does not get to it, deep in a compiler say, a second thread ends the process. Training replaces the handler
for its steps (`monitor.Interrupt`), because it first saves the state. One of several processes does not leave without the others:
what it owes them, `distributed` hands to `before_end`.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)
GRACE = 5.0  # seconds to clean up, after which the process is ended: nothing that is worth saving takes as long
AGAIN = 0.05  # seconds


class Interrupted(KeyboardInterrupt):
    """The work was stopped by the signal `number`, and may be begun again by the same call."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(number: int) -> int:
    """As a shell has it of a process that a signal ended: 130 after SIGINT, 143 after SIGTERM."""
    return 128 + number


def before_end(call: Callable[[int], None]) -> None:
    """From now on `end` calls this, with the exit code."""
    global _before_end
    _before_end = call


def end(code: int) -> NoReturn:
    """Ends the process without an orderly end, which would wait for what other threads do; from any thread."""
    _before_end(code)
    os._exit(code)


def ignore() -> None:
    """From now on, to the end of the process, neither signal does anything. In another than the main thread nothing changes."""
    if threading.current_thread() is threading.main_thread():
        for number in NUMBERS:
            signal.signal(number, signal.SIG_IGN)


def _nothing(code: int) -> None:
    """What a process alone does before it ends."""


_before_end: Callable[[int], None] = _nothing


@contextlib.contextmanager
def handled(last_words: str) -> Iterator[None]:
    """Within it the first signal raises `Interrupted`; the process ends GRACE seconds later if it still runs, or at a second one.

    While another handler is installed, the first signal is that one's affair alone. In another than the main thread this does
    nothing.

    Args:
        last_words: printed where the process is ended so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handling = _Handling(reader, last_words)
    before = {number: signal.signal(number, _raise) for number in NUMBERS}
    hook, sys.unraisablehook = sys.unraisablehook, handling.raise_again
    # A Python handler runs when the main thread is back in Python; this file descriptor is written to at once.
    outer = signal.set_wakeup_fd(writer)
    threading.Thread(target=handling.watch, name="mpt_jax-signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(outer)
        sys.unraisablehook = hook
        for number, handler in before.items():
            if signal.getsignal(number) is _raise:  # else `ignore` was called
                signal.signal(number, handler)
        os.close(writer)  # which ends the thread


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


class _Handling:
    """What goes on beside the main thread."""

    def __init__(self, reader: int, last_words: str):
        self._reader, self._last_words = reader, last_words
        self._hook = sys.unraisablehook
        self._repeated = 0  # signals that we have sent ourselves and not yet read

    def watch(self) -> None:
        """Ends the process in time, or at a second signal; returns when the file descriptor is closed."""
        with open(self._reader, "rb", buffering=0) as file:
            received = 0
            while message := file.read(1):
                if message[0] not in NUMBERS:
                    continue
                if self._repeated:
                    self._repeated -= 1
                elif received:
                    self._end(message[0])
                else:
                    received = message[0]
                    threading.Thread(target=self._end_later, args=(received,), daemon=True).start()

    def raise_again(self, ignored: Any) -> None:
        """`sys.unraisablehook`: Python ignores what is raised in a callback, such as JAX's for the garbage collector."""
        if not isinstance(ignored.exc_value, Interrupted):
            self._hook(ignored)
            return
        self._repeated += 1
        main = threading.main_thread().ident
        threading.Timer(AGAIN, signal.pthread_kill, (main, ignored.exc_value.number)).start()  # when the callback is done

    def _end_later(self, number: int) -> None:
        """Ends the process when the signal has been ours to heed for GRACE seconds."""
        ours = 0.0
        while ours < GRACE:
            time.sleep(0.1)
            ours = ours + 0.1 if signal.getsignal(number) is _raise else 0.0
        self._end(number)

    def _end(self, number: int) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{self._last_words}\n".encode())
        end(exit_code(number))
