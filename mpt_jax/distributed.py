"""Several processes that do one job: one on each host of a TPU pod, one on each node or GPU of a cluster.

Each runs the same command on the same configuration. JAX's coordination service, in process 0, brings them together, and the
arrays of the job then lie on the devices of all of them. What is written is written by process 0 (checkpoints by all), into
folders that all must share. A process that fails or is interrupted tells the others, which would else wait for it in their next
exchange; they end with it, process 0 as the last one.

JAX finds its processes by itself (`jax/_src/clusters`) on TPU pods, under SLURM, Open MPI and, with the package `kubernetes`, in
Kubernetes; elsewhere `DistributedConfig` or the environment says where they are. A process that has none of it calls nothing.
"""

import atexit
import contextlib
import itertools
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import clusters, distributed  # the client's barriers and keys, which Orbax uses as well, have no public name
from jax._src.lib import _jax
from jax.experimental import multihost_utils

from mpt_jax import signals
from mpt_jax.config import DistributedConfig
from mpt_jax.errors import UserError, sentence
from mpt_jax.quiet import stderr_into

VARIABLES = {  # of the environment; JAX reads the first one itself
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
POLL = 0.5  # seconds between two looks whether another process has failed
GRACE = 1.0  # seconds for a process to tell of an error of its own, which is often the same one, before another's ends it
LEAVING = 10.0  # seconds that a failed process waits for the others to have read why, and process 0 for the others to be gone
SHARED = 60.0  # seconds until a file must be seen by all: NFS remembers for about that long that there was none
AHEAD = 3  # seconds that the service, which can name who is missing, gives up before the clients do
LATE = 10  # seconds after that in which the service may still name them
RPC_MARGIN = 5  # seconds that JAX's client adds to its time-out
FAILED, LEAVE, GONE = "mpt_jax/failed", "mpt_jax/leave", "mpt_jax/gone"  # folders of the service's keys

logger = logging.getLogger("mpt_jax")
_barriers = itertools.count()  # a barrier's name is used once; all processes come to the same ones in the same order
_config = DistributedConfig()  # of the job that this process has joined


class Place(NamedTuple):
    """This process's place in the job; `local_device_ids` are the devices that it uses, None for all that it sees."""

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None


@contextlib.contextmanager
def joined(config: DistributedConfig) -> Iterator[None]:
    """The block runs as one of the job's processes; alone, it just runs.

    An error in it ends the other processes, too, each with a line that says so and with exit code 2; a signal, with its own exit
    code. Once the block is done, signals do nothing any more: a process that left then would take others with it that are done.

    Raises:
        UserError: see `initialize` and `barrier`.
    """
    if not initialize(config):
        yield
        return
    watch = _Watch()
    try:
        yield
        signals.ignore()
        barrier("end")
    except BaseException as error:
        watch.leave(error)
        raise
    watch.stop()


def initialize(config: DistributedConfig) -> bool:
    """Join the job's other processes, before anything touches a device. Returns whether there are several.

    Raises:
        UserError: half a description of the job; processes that do not come within `initialization_timeout`, by their numbers
            in process 0, which alone knows them.
    """
    global _config
    if jax.distributed.is_initialized():
        return several()
    place = find_place(config)
    if place is None:
        return False
    _config = config
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of no effect on accelerators
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM where we do not heed it ourselves
    logger.info(
        "process %d of %d, waiting for the others at %s", place.process_id, place.num_processes, place.coordinator_address
    )
    _connect(place, config)
    if not is_first():
        logger.setLevel(logging.ERROR)  # process 0 tells what all would tell
    return True


def find_place(config: DistributedConfig) -> Place | None:
    """Where this process is by `config`, else by `VARIABLES`, else by what JAX detects; None where it is alone.

    Raises:
        UserError: a number that is none, an address or a number that is missing.
    """
    address = config.coordinator_address or os.environ.get(VARIABLES["coordinator_address"]) or None
    number = config.num_processes or _number_in("num_processes")
    own = config.process_id if config.process_id >= 0 else _number_in("process_id")
    if number == 1:
        return None
    # A pod of its own, of no indexed job, is alone; JAX would warn or fail there.
    single_pod = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ
    try:
        with warnings.catch_warnings(action="ignore" if single_pod else None):
            address, number, own, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                address, number, own, None, None, config.initialization_timeout
            )
    except (RuntimeError, KeyError, ValueError, OSError) as error:
        if single_pod and (address, number, own) == (None, None, None):
            return None
        reason = " ".join(str(error).split())
        raise UserError(
            f"The other processes of this job cannot be found ({reason}); give DistributedConfig.coordinator_address, "
            "num_processes and process_id, or num_processes=1 to run alone."
        ) from None
    found = dict(zip(VARIABLES, (address, number, own), strict=True))
    missing = [name for name, value in found.items() if value is None]
    if len(missing) == len(found) or number == 1:
        return None
    if missing:
        there = ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
        wanted = " and ".join(f"DistributedConfig.{name} ({VARIABLES[name]})" for name in missing)
        raise UserError(f"This process has {there}, but no {wanted}; give it, or DistributedConfig.num_processes=1 to run alone.")
    assert address is not None and number is not None and own is not None
    if not 0 <= own < number:
        raise UserError(f"DistributedConfig.process_id is {own}, but {number} processes are numbered 0 to {number - 1}.")
    if not re.search(r":\d+$", address):
        raise UserError(f"DistributedConfig.coordinator_address is '{address}', without a port; write HOST:PORT.")
    return Place(address, number, own, None if devices is None else list(devices))


def refuse(config: DistributedConfig, command: str) -> None:
    """UserError where this process is one of several and the command is for one."""
    place = find_place(config)
    if place is not None:
        raise UserError(
            f"{command} runs in one process, but this is process {place.process_id} of {place.num_processes}; start it once, "
            "with DistributedConfig.num_processes=1 where a cluster's environment says otherwise."
        )


def several() -> bool:
    """Whether this job has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not several() or jax.process_index() == 0


def barrier(what: str) -> None:
    """Return when all processes have come here, at once where there is one.

    Raises:
        UserError: some have not come within `barrier_timeout`, by their numbers.
    """
    if not several():
        return
    try:
        _client().wait_at_barrier(f"mpt_jax/{next(_barriers)}/{what}", timeout_in_ms=_config.barrier_timeout * 1000)
    except jax.errors.JaxRuntimeError as error:
        missing = _timed_out(str(error))
        if not missing:
            raise
        raise UserError(
            f"{_processes(missing)} of {jax.process_count()} did not come within {_config.barrier_timeout} s "
            f"(DistributedConfig.barrier_timeout) to where the others are: {what}; look into the logs, or allow more time."
        ) from None


@contextlib.contextmanager
def first_goes_first(what: str) -> Iterator[None]:
    """Process 0 goes through the block before the others, who then find the files that it has made there."""
    if not is_first():
        barrier(what)
    yield
    if is_first():
        barrier(what)


def any_process(flag: bool) -> bool:
    """Whether it is true in one of the processes. All must ask."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag)))) if several() else flag


def least(value: float) -> float:
    """The smallest of all processes' values, in float32 where there are several. All must ask."""
    return float(np.min(multihost_utils.process_allgather(np.float32(value)))) if several() else value


def most(value: float) -> float:
    """The greatest of all processes' values, as `least`."""
    return -least(-value)


class Ballot:
    """A vote of all processes by a number each, which may be seen before all have voted. All make it, and all vote."""

    def __init__(self) -> None:
        self._folder = f"mpt_jax/ballot/{next(_barriers)}" if several() else ""

    def seen(self) -> int:
        """The greatest number so far, 0 where there is none; always 0 of a process alone."""
        return max((int(vote) for _, vote in _client().key_value_dir_get(self._folder)), default=0) if self._folder else 0

    def cast(self, number: int, what: str) -> int:
        """The greatest number of all.

        Raises:
            UserError: as `barrier`.
        """
        if not self._folder:
            return number
        _put(self._folder, str(number))
        barrier(what)
        return self.seen()


def check_shared(folder: Path, key: str) -> None:
    """UserError in a process that does not see in `folder`, the value of `key`, what process 0 writes there."""
    if not several():
        return
    token = folder / f".shared-{uuid.uuid4().hex}"
    name = f"mpt_jax/shared/{next(_barriers)}"
    if is_first():
        token.touch()
        _client().key_value_set(name, token.name)
    seen = folder / _client().blocking_key_value_get(name, _config.barrier_timeout * 1000)
    until = time.monotonic() + SHARED
    while not seen.exists():
        if time.monotonic() > until:
            raise UserError(
                f"{key} {folder} of process {jax.process_index()} is not that of process 0; give a folder that all processes "
                "share, such as a mounted bucket or NFS."
            )
        time.sleep(POLL)
    barrier(f"looking into {key}")
    if is_first():
        token.unlink()


def _client() -> Any:
    return distributed.global_state.client


def _number_in(field: str) -> int | None:
    """The number that the environment gives for a field."""
    text = os.environ.get(VARIABLES[field], "")
    if text and not text.isdecimal():
        raise UserError(f"The environment variable {VARIABLES[field]} is '{text}', which is no number; mend or unset it.")
    return int(text) if text else None


def _connect(place: Place, config: DistributedConfig) -> None:
    """JAX's own start, with time-outs that end in a sentence.

    By default its client ends the process from C++ when the others do not come. With a callback it calls that instead; it fails
    to (jaxlib 0.10.2 cannot make a Python object of the status), which raises an error that can be caught. The service has a
    time-out of its own, one hour, and writes the numbers of those who are missing to stderr.
    """
    seconds = config.initialization_timeout
    service, client = _jax.get_distributed_runtime_service, _jax.get_distributed_runtime_client

    def start_service(*args: Any, **kwargs: Any) -> Any:
        return service(*args, **kwargs, cluster_register_timeout=max(seconds - AHEAD, 1))

    def start_client(*args: Any, **kwargs: Any) -> Any:
        return client(*args, **kwargs, missed_heartbeat_callback=_say_status)

    failure = None
    with tempfile.TemporaryFile() as log, stderr_into(log.fileno()):
        try:
            _jax.get_distributed_runtime_service, _jax.get_distributed_runtime_client = start_service, start_client
            jax.distributed.initialize(
                place.coordinator_address,
                place.num_processes,
                place.process_id,
                place.local_device_ids,
                cluster_detection_method="deactivate",
                initialization_timeout=max(seconds - RPC_MARGIN, 1),
                heartbeat_timeout_seconds=config.heartbeat_timeout,
            )
        except Exception as error:  # JAX's own, gRPC's and std::bad_cast
            failure = error
        finally:
            _jax.get_distributed_runtime_service, _jax.get_distributed_runtime_client = service, client
        written = _content(log.fileno())
        until = time.monotonic() + LATE
        while place.process_id == 0 and _is_time_out(failure) and not _timed_out(written) and time.monotonic() < until:
            time.sleep(0.1)  # the service may write its names after the client, in this process, has given up
            written = _content(log.fileno())
    if failure is None:
        sys.stderr.write(written)
        return
    atexit.register(_end, 2)  # JAX's own clean-up would wait for the other processes
    raise _not_joined(place, seconds, written, failure)


def _not_joined(place: Place, seconds: int, written: str, failure: Exception) -> UserError:
    limit = f"within {seconds} s (DistributedConfig.initialization_timeout)"
    then = "start all, allow more time, or set DistributedConfig.num_processes=1 to run alone."
    if missing := _timed_out(written):
        return UserError(
            f"{_processes(missing)} of {place.num_processes} did not come to {place.coordinator_address} {limit}; {then}"
        )
    if not _is_time_out(failure):
        reason = " ".join(str(failure).split())[:200]
        return UserError(f"Process {place.process_id} cannot start at {place.coordinator_address}: {reason}.")
    if place.process_id == 0:
        return UserError(f"Not all of {place.num_processes} processes came to {place.coordinator_address} {limit}; {then}")
    return UserError(
        f"Process {place.process_id} of {place.num_processes} was not taken up at {place.coordinator_address} {limit}: either "
        f"process 0 cannot be reached there, or others are missing, whom its log names; {then}"
    )


def _is_time_out(failure: Exception | None) -> bool:
    return any(word in str(failure) for word in ("bad_cast", "DEADLINE"))


def _content(handle: int) -> str:
    """Of an open file; where it is written next stays where it was."""
    return os.pread(handle, os.fstat(handle).st_size, 0).decode(errors="replace")


def _say_status(*status: Any) -> None:
    """For a jaxlib that does call it: as the default does, the process cannot go on."""
    print("error: JAX's coordination service has lost a process:", *status, file=sys.stderr, flush=True)
    os._exit(1)


def _timed_out(message: str) -> list[int]:
    """The processes that a message of the service names as missing."""
    found = re.search(r"timed out task names:\s*((?:\d+\s+)+)", message)
    return sorted({int(number) for number in found[1].split()}) if found else []


def _processes(numbers: list[int]) -> str:
    """'Process 1', 'Processes 1, 2 and 5'."""
    if len(numbers) == 1:
        return f"Process {numbers[0]}"
    return f"Processes {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


class _Watch:
    """Ends this process when another one has failed or was interrupted; tells the others when this one has."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._told = False  # the others, why this process ends
        signals.before_end(self._leave_in_turn)
        threading.Thread(target=self._look, name="mpt_jax-watch", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def leave(self, error: BaseException) -> None:
        """Tell of an error and wait until the others have read it. This process's exit will not wait for them to finish."""
        if isinstance(error, KeyboardInterrupt):
            code, what = signals.exit_code(getattr(error, "number", signal.SIGINT)), ""
        elif told := sentence(error):
            code, what = 2, told
        else:
            code, what = 1, f"{type(error).__name__} {error}".split("\n")[0].strip()
        atexit.register(_end, code)  # before JAX's own clean-up, which would
        self._tell(code, what)

    def _look(self) -> None:
        number = jax.process_count()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone: JAX itself ends the process
            while not self._stopped.wait(POLL):
                failed = _client().key_value_dir_get(FAILED)
                if failed and not self._stopped.wait(GRACE):
                    key, message = failed[0]
                    process, (code, _, why) = key.rpartition("/")[2], message.partition(" ")
                    if int(code) > 128:
                        name = signal.Signals(int(code) - 128).name
                        print(f"process {process} of {number} was stopped ({name}), and this one with it", file=sys.stderr)
                    else:
                        print(f"error: process {process} of {number} has ended, and this one with it: {why}", file=sys.stderr)
                    _put(LEAVE)
                    self._told = True
                    _end(int(code) if int(code) > 128 else 2)

    def _tell(self, code: int, why: str) -> None:
        self.stop()
        self._told = True
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone, and all others with it
            _put(FAILED, f"{code} {why}")
            _put(LEAVE)
            _wait_for(LEAVE)

    def _leave_in_turn(self, code: int) -> None:
        """Process 0, whose service the others need to end in good order, is the last one to go."""
        if not self._told:
            self._tell(code, "")
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _put(GONE)
            if is_first():
                _wait_for(GONE)
                time.sleep(POLL)  # between the key and its end a process may be kept waiting for a core


def _put(folder: str, value: str = "") -> None:
    """Set this process's key in a folder of the service."""
    _client().key_value_set(f"{folder}/{jax.process_index()}", value, allow_overwrite=True)


def _wait_for(folder: str) -> None:
    """Wait a while until all processes have set their keys in a folder of the service."""
    until = time.monotonic() + LEAVING
    while len(_client().key_value_dir_get(folder)) < jax.process_count() and time.monotonic() < until:
        time.sleep(POLL / 5)


def _end(code: int) -> None:
    """End now what is not interrupted from the command line: after an error, or because of another process."""
    sys.stdout.flush()
    sys.stderr.flush()
    signals.end(code)
