"""Who does which point of a sweep: real files, and real processes that die."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mpt_jax.board import Board, read_failures
from mpt_jax.claims import ClaimLost, Claims
from mpt_jax.errors import UserError

KEYS = [f"{n:04x}" for n in range(40)]
WORKER = """
import sys, time, random
from pathlib import Path
from mpt_jax.board import Board
folder, name, keys = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
random.seed(name)
random.shuffle(keys)
with Board(folder, 60) as board:
    print("ready", flush=True)
    sys.stdin.readline()
    while left := [key for key in keys if board.results(key) is None]:
        for key in board.take(left[:3]):
            with open(folder / "log", "a") as log:
                log.write(f"{key}\\n")
            time.sleep(0.002)
            board.finish(key, [{"by": name}])
"""
SLEEPER = """
import sys, time
from pathlib import Path
from mpt_jax.board import Board
with Board(Path(sys.argv[1]), float(sys.argv[2])) as board:
    print(*board.take(sys.argv[3].split(",")), flush=True)
    time.sleep(600)
"""
LATE = """
import sys
from pathlib import Path
from mpt_jax.board import Board
from mpt_jax.claims import ClaimLost
with Board(Path(sys.argv[1]), 0.5) as board:
    print(*board.take(["a", "b"]), flush=True)
    for line in sys.stdin:
        try:
            board.claims.check() if line == "go on\\n" else eval(line)
            print("went on", flush=True)
        except ClaimLost as error:
            print(error, flush=True)
"""
# C looks at a claim whose owner is gone; before it moves that away, B takes it over; before C gives B's back, D claims it.
RACE = """
import sys
from pathlib import Path
from mpt_jax.board import Board
from mpt_jax.claims import ClaimLost
folder, steps, busy = Path(sys.argv[1]), [], []
def between(event, arguments):
    if not busy and steps and event in steps[0][0]:
        busy.append(event)
        steps.pop(0)[1]()
        busy.clear()
sys.addaudithook(between)
with Board(folder, 60) as b, Board(folder, 60) as c, Board(folder, 60) as d:
    steps += [(("os.rename",), lambda: b.take("a")), (("os.rename", "os.link"), lambda: d.take("a"))]
    print(c.take("a"), len(steps), c.claims.owner("a")["token"] == d.claims.me["token"])
    for board in (b, d):
        try:
            board.finish("a", [{"by": "b" if board is b else "d"}])
        except ClaimLost:
            print("lost")
    print(d.results("a"))
"""


def start(script: str, *arguments: str) -> subprocess.Popen:
    root = Path(__file__).parent.parent
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=root, stdin=pipe, stdout=pipe, text=True)


def test_several_processes_do_every_point_once(tmp_path):
    with contextlib.ExitStack() as running:
        workers = [running.enter_context(start(WORKER, str(tmp_path), str(n), ",".join(KEYS))) for n in range(4)]
        for worker in workers:
            running.callback(worker.kill)
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        assert [worker.wait(timeout=60) for worker in workers] == [0] * 4
    assert sorted((tmp_path / "log").read_text().split()) == KEYS
    assert list((tmp_path / "claims").iterdir()) == []


def test_the_claims_of_a_killed_process_are_taken_over_at_once_and_those_of_a_living_one_never(tmp_path):
    sleeping = start(SLEEPER, str(tmp_path), "0.5", "a,b")
    with sleeping as sleeper, contextlib.ExitStack() as stopping, Board(tmp_path, 0.5) as board:
        stopping.callback(sleeper.kill)
        assert sleeper.stdout.readline().split() == ["a", "b"]
        time.sleep(1.2)  # its signs of life go on
        assert board.take(["a", "b", "c"]) == ["c"]
        os.kill(sleeper.pid, signal.SIGKILL)
        sleeper.wait()
        assert board.take(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize("end", ["finish('a', [{'by': 'late'}])", "fail('a', 'point a', 'no luck')"])
def test_a_job_that_was_held_up_for_too_long_stops(tmp_path, end):
    """What it held and another has taken over meanwhile it neither finishes nor fails, nor works on."""
    with start(LATE, str(tmp_path)) as late, contextlib.ExitStack() as stopping, Board(tmp_path, 0.5) as board:
        stopping.callback(late.kill)

        def asked(line: str) -> str:
            late.stdin.write(f"{line}\n")
            late.stdin.flush()
            return late.stdout.readline()

        assert late.stdout.readline() == "a b\n"
        time.sleep(0.7)
        assert asked("go on") == "went on\n"
        os.kill(late.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while not board.take(["a"]) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(late.pid, signal.SIGCONT)
        sentence = f"no sign of life for 0.5 s, and process {os.getpid()} on "
        assert sentence in asked("go on")
        assert sentence in asked(f"board.{end}")
        assert board.results("a") is None and read_failures(tmp_path, ["a"]) == {}
        board.finish("a", [{"by": "board"}])
        late.stdin.close()
        assert late.wait(timeout=30) == 0
        assert board.results("a") == [{"by": "board"}]
        assert board.take(["b"]) == ["b"]  # given back, or taken over


def test_a_claim_that_changes_hands_while_it_is_taken_over_has_one_owner(tmp_path):
    claim = tmp_path / "claims" / "a.json"
    claim.parent.mkdir()
    claim.write_text(json.dumps({"machine": "elsewhere", "pid": 1, "token": "theirs"}))
    os.utime(claim, (1, 1))
    with start(RACE, str(tmp_path)) as race:
        assert race.stdout.read().splitlines() == ["[] 0 True", "lost", "[{'by': 'd'}]"]
    assert list((tmp_path / "claims").iterdir()) == []


def test_only_a_claim_of_a_living_job_is_anothers(tmp_path):
    with Claims(tmp_path, 0.5) as mine, Claims(tmp_path, 0.5) as theirs:
        assert not mine.is_anothers("a")
        assert theirs.take("a") and not theirs.take("a")
        assert mine.is_anothers("a") and not theirs.is_anothers("a")
        theirs.check("a")
        with pytest.raises(ClaimLost, match=r"and process \d+ on .*a\.json\), so it stops; the same command"):
            mine.check("a")


def test_a_claim_from_another_machine_is_watched_for_a_sign_of_life(tmp_path):
    """One whose owner is seen to live is not waited for, nor one of this machine, where that can be told at once."""
    claim, said = tmp_path / "a.json", []
    with Claims(tmp_path, 4) as claims:
        claim.write_text(json.dumps({"machine": "elsewhere", "host": "there", "pid": 7, "token": "theirs"}))
        beat = threading.Timer(1, os.utime, [claim])
        beat.start()
        began = time.monotonic()
        assert not claims.take_or_wait("a", said.append) and time.monotonic() - began < 4
        assert claims.take_or_wait("a", said.append) and claims.owner("a") == claims.me
        assert said == ["waiting up to 4 s for a sign of life of process 7 on there, to go on if there is none"] * 2
        with Claims(tmp_path, 4) as others:
            began = time.monotonic()
            assert not others.take_or_wait("a", said.append) and time.monotonic() - began < 1
    assert len(said) == 2


def test_a_claim_from_another_machine_is_taken_over_when_its_time_is_up(tmp_path):
    with Board(tmp_path, 0.5) as board:
        claim = tmp_path / "claims" / "a.json"
        claim.write_text(json.dumps({"machine": "elsewhere", "pid": os.getpid(), "token": "theirs"}))
        assert board.take(["a"]) == []
        past = time.time() - 1
        os.utime(claim, (past, past))
        assert board.take(["a"]) == ["a"]
        assert json.loads(claim.read_text())["token"] != "theirs"


def test_what_a_board_holds_is_given_back_when_it_is_left(tmp_path):
    with Board(tmp_path, 60) as board:
        assert board.take(["a", "b"]) == ["a", "b"]
        board.finish("a", [{"score": 1.0}])
    with Board(tmp_path, 60) as board:
        assert board.take(["a", "b"]) == ["b"]  # a is done
        assert board.results("a") == [{"score": 1.0}]


def test_failures_are_kept_until_the_point_is_done(tmp_path):
    with Board(tmp_path, 60) as board:
        board.take(["a"])
        board.fail("a", "point a", "no luck")
        assert {key: failure.error for key, failure in read_failures(tmp_path, ["a", "b"]).items()} == {"a": "no luck"}
        assert board.take(["a"]) == ["a"]  # it may be tried again
        with pytest.raises(ValueError, match="no results"):
            board.finish("a", [])
        board.finish("a", [{"score": 1.0}])
        assert read_failures(tmp_path, ["a", "b"]) == {}


def test_a_failure_whose_file_is_damaged_or_gone_is_one_without_a_reason_or_none(tmp_path):
    """A machine that dies leaves an empty file; another call removes the file once its point is done."""
    with Board(tmp_path, 60):
        for name, text in (("a", ""), ("b", "{"), ("c", "[]"), ("d", "{}")):
            (tmp_path / "failures" / f"{name}.json").write_text(text)
        found = read_failures(tmp_path, ["a", "b", "c", "d", "e"])
    assert found.keys() == {"a", "b", "c", "d"}
    assert all(f"{key}.json does not say why" in failure.error for key, failure in found.items())


def test_failures_may_be_read_while_another_call_removes_them(tmp_path):
    stop, errors = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                read_failures(tmp_path, ["a"])
            except Exception as error:
                errors.append(error)
                return

    with Board(tmp_path, 60) as board:
        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(1000):
            assert board.take(["a"]) == ["a"]
            board.fail("a", "point a", "no luck")
            (tmp_path / "failures" / "a.json").unlink()
        stop.set()
        reader.join()
    assert not errors


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_claim_that_is_half_written_is_taken_over_when_its_time_is_up(tmp_path, text):
    with Board(tmp_path, 0.5) as board:
        claim = tmp_path / "claims" / "a.json"
        claim.write_text(text)
        past = time.time() - 1
        os.utime(claim, (past, past))
        assert board.take(["a"]) == ["a"]
        assert [path.name for path in (tmp_path / "claims").iterdir()] == ["a.json"]


def test_bad_folders_and_files_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write into MODEL_DIR"), Board(tmp_path / "file", 60):
        pass
    with Board(tmp_path, 60) as board:
        (tmp_path / "points" / "a.json").write_text("[{")
        with pytest.raises(UserError, match=r"points/a.json is not JSON .* delete it"):
            board.results("a")
        for text in ("5", "null", "{}", "[]", '{"a": 1}', "[1]"):
            (tmp_path / "points" / "a.json").write_text(text)
            with pytest.raises(UserError, match=r"points/a.json does not hold the results of a point; delete it"):
                board.results("a")
