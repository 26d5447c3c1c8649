"""run_tpu.sh: the commands of a dry run, and what becomes of them with a `gcloud` whose workers are folders of this machine."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "run_tpu.sh"
ODD = ["train", '--gin.PromptConfig.init_labels=("yes", "no")', "--gin.MODEL_DIR='/a b/$HOME'", "--gin.X=`id`;*", "a\nb", ""]
BASH = "/bin/bash"
SYSTEM = "/usr/bin:/bin"

# `list` answers with the first line of `states`, which the next one follows as long as there is one. A worker is a folder of
# `workers`, and the programs of `bin` are there, too.
GCLOUD = r"""#!/bin/bash
set -euo pipefail
cd "$FAKE"
printf '%s\0' "$@" END >>calls
command=
for argument in "$@"; do
  case $argument in
    --worker=all) workers=(workers/*) ;;
    --worker=*) workers=("workers/w-${argument#*=}") ;;
    --command=*) command=${argument#*=} ;;
  esac
done
case "$3 $4" in
  'queued-resources list')
    read -r state <states
    [ "$(wc -l <states)" -eq 1 ] || sed -i 1d states
    [ "$state" != BROKEN ] || { echo 'ERROR: unavailable' >&2; exit 1; }
    printf 'mpt-jax-2\tACTIVE\n'
    [ "$state" = ABSENT ] || printf 'mpt-jax\t%s\n' "$state"
    ;;
  'queued-resources delete') rm -rf workers/*/* ;;
  'tpu-vm scp') for home in "${workers[@]}"; do cp "$5" "$home/${6#*:}"; done ;;
  'tpu-vm ssh')
    code=0
    for home in "${workers[@]}"; do
      cd "$FAKE/$home"
      env -i FAKE="$FAKE" HOME="$PWD" HOSTNAME="${home#*/}" PATH="$FAKE/bin:/usr/bin:/bin" bash -c "$command" || code=$?
    done
    exit "$code"
    ;;
esac
"""

# Of a worker: the installer of uv, uv, the job, and what mounts a bucket.
CURL = r"""#!/bin/bash
printf '%s\n' "$@" >>curl.log
cat <<'TEXT'
mkdir -p "$UV_UNMANAGED_INSTALL" && cp "$FAKE/uv" "$UV_UNMANAGED_INSTALL/uv"
TEXT
"""
UV = r"""#!/bin/bash
set -eu
printf '%s\n' "$*" >>../uv.log
if [ "$1" = venv ]; then
  [ ! -e .venv ] || { echo 'error: there is something at .venv' >&2; exit 2; }
  mkdir -p .venv/bin
  cp "$FAKE/python" .venv/bin/python
else
  [ -x .venv/bin/python ]
fi
"""
PYTHON = r"""#!/bin/bash
printf '%s\0' "$@" >arguments
printf '%s\0' "${MPT_JAX_DATA-}" "${MPT_JAX_CORPUS-}" >environment
trap 'echo saved; exit 143' TERM
printf 'step 1\rstep 2\n\n'
[ -e ../ends ] || while true; do sleep 0.05; done
"""
GCSFUSE = r"""#!/bin/bash
printf '%s\n' "$@" >>gcsfuse.log
"""
MOUNTPOINT = r"""#!/bin/bash
[ -e gcsfuse.log ]
"""


def run(*arguments: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess:
    env = {"PATH": SYSTEM, **environment}
    return subprocess.run([BASH, str(script), *arguments], capture_output=True, text=True, timeout=60, env=env)


def commands(*arguments: str, **environment: str) -> list[list[str]]:
    """The commands of a dry run, split by a shell as it would split them when pasted."""
    result = run("--dry-run", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    lines = [line[2:] for line in result.stderr.splitlines() if line.startswith("+ ")]
    assert len(lines) == len(result.stderr.splitlines())
    return [shell_words(line) for line in lines]


def shell_words(line: str) -> list[str]:
    printed = subprocess.run([BASH, "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True).stdout
    return printed.split("\0")[:-1]


class Cloud:
    """A folder with a `gcloud`, the answers it gives, its calls, a home for each worker, and a small checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.homes = [folder / "workers" / f"w-{number}" for number in range(2)]
        for home in self.homes:
            home.mkdir(parents=True)
        (folder / "local").mkdir()
        (folder / "tmp").mkdir()
        (folder / "checkout" / "gin").mkdir(parents=True)
        for file in ("run_tpu.sh", "requirements.txt", "gin/base.gin"):
            shutil.copy(SCRIPT.parent / file, folder / "checkout" / file)
        self.script("local/gcloud", GCLOUD)
        self.script("bin/curl", CURL)
        self.script("bin/gcsfuse", GCSFUSE)
        self.script("bin/mountpoint", MOUNTPOINT)
        self.script("uv", UV)
        self.script("python", PYTHON)
        self.states("ACTIVE")

    def script(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def states(self, *states: str) -> None:
        (self.folder / "states").write_text("\n".join(states) + "\n")

    def set_up(self) -> None:
        """What `setup` leaves, as far as a job needs it."""
        for home in self.homes:
            python = home / "mpt_jax" / ".venv" / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.write_text(PYTHON)
            python.chmod(0o755)

    def run(self, *arguments: str, script: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        local = {"FAKE": str(self.folder), "TMPDIR": str(self.folder / "tmp"), "PATH": f"{self.folder / 'local'}:{SYSTEM}"}
        local |= {"TPU_ZONE": "z", "TPU_POLL_SECONDS": "0.01"} | environment
        return run(*arguments, script=script or self.folder / "checkout" / "run_tpu.sh", **local)

    def calls(self) -> list[str]:
        """What gcloud was asked since the last time, in two words, or by the function that the workers ran."""
        log = self.folder / "calls"
        words = log.read_text().split("\0") if log.exists() else []
        log.unlink(missing_ok=True)
        calls, call = [], []
        for word in words[:-1]:
            if word != "END":
                call.append(word)
                continue
            remote = [argument for argument in call if argument.startswith("--command=")]
            calls.append(shlex.split(remote[0].rpartition("; ")[2])[0] if remote else call[3])
            call = []
        return calls

    def job(self, home: Path) -> tuple[list[str], list[str]]:
        """The arguments and the environment of the job that was started on a worker, once it has written them down."""
        files = [home / "mpt_jax" / name for name in ("arguments", "environment")]
        wait_until(lambda: "step 2" in (home / "mpt_jax.log").read_text())
        arguments, environment = (file.read_text().split("\0")[:-1] for file in files)
        return arguments, environment

    def end_jobs(self, kind: int = signal.SIGKILL) -> None:
        for pid in self.pids():
            try:
                os.kill(pid, kind)
            except ProcessLookupError:
                continue
            wait_until(lambda pid=pid: not runs(pid))

    def pids(self) -> list[int]:
        return [int(file.read_text()) for file in self.folder.glob("workers/*/mpt_jax.pid")]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


@pytest.fixture
def cloud(tmp_path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.end_jobs()


# What a dry run prints.


def test_a_value_may_follow_an_equals_sign():
    assert commands("--zone=z", "--name=a=b", "--spot", "create") == commands("--zone", "z", "--name", "a=b", "--spot", "create")


def test_a_dry_run_does_not_say_that_it_has_done_anything():
    for arguments in (["create"], ["setup"], ["status"], ["run", "--", "train"], ["--mount=b:f", "resume", "--", "train"]):
        assert commands("--zone=z", *arguments)


@pytest.mark.parametrize("action", ["create", "setup", "status", "logs", "stop", "delete"])
def test_each_action_names_the_tpu_zone_and_project(action):
    found = commands("--name", "mine", "--project", "p", "--zone", "z", action)
    on_cloud = [command for command in found if command[0] == "gcloud"]
    assert on_cloud
    for command in on_cloud:
        assert command[4] == "list" or any(word.split(":")[0] == "mine" for word in command)
        assert "--zone=z" in command
        assert "--project=p" in command


@pytest.mark.parametrize("spot", [{"arguments": ["--spot"]}, {"TPU_SPOT": "true"}])
def test_create_asks_for_what_was_said(spot):
    arguments = ["--type", "v4-8", "--version", "tpu-ubuntu2204-base", *spot.pop("arguments", []), "create"]
    _, create, _ = commands(*arguments, TPU_ZONE="z", **spot)
    assert {"--accelerator-type=v4-8", "--runtime-version=tpu-ubuntu2204-base", "--spot", "--zone=z"} <= set(create)


def test_create_asks_for_no_spot_where_none_was_said():
    assert "--spot" not in commands("--zone=z", "create", TPU_SPOT="false")[1]


@pytest.mark.parametrize("kind", ["v2-8", "v5litepod-1", "v4-16", "v5p-128"])
def test_every_worker_gets_the_code_the_bucket_and_the_job(kind):
    assert f"--accelerator-type={kind}" in commands("--zone", "z", "--type", kind, "create")[1]
    for arguments in (["setup"], ["mount", "--", "b", "f"], ["run", "--", "train"], ["stop"]):
        on_workers = [command for command in commands("--zone", "z", "--type", kind, *arguments) if command[0] == "gcloud"]
        assert on_workers
        assert all("--worker=all" in command for command in on_workers)


def test_the_log_of_any_worker_can_be_followed():
    assert "--worker=0" in commands("--zone", "z", "logs")[0]
    assert "--worker=3" in commands("--zone", "z", "--worker=3", "logs")[0]


def test_a_dry_run_of_resume_shows_what_follows_a_preemption():
    found = commands("--zone=z", "--spot", "--type=v4-8", "--mount=gs://b:f", "--env=A=1", "resume", "--", "train")
    whole = [" ".join(command) for command in found]
    kinds = "list delete list create list job_state tar scp install_checkout mount_folder start_job".split()
    assert len(whole) == len(kinds)
    assert all(kind in command for kind, command in zip(kinds, whole, strict=True))
    assert {"--spot", "--accelerator-type=v4-8"} <= set(found[3])
    assert whole[-2].endswith("mount_folder b f")
    assert whole[-1].endswith("start_job env A=1 .venv/bin/python -m mpt_jax train")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["create"], "--zone is not set"),
        (["--zone", "z", "run"], "run needs the arguments"),
        (["--zone", "z", "--mount=b:f", "resume"], "resume needs the arguments"),
        (["--zone", "z", "resume", "--", "train"], "--mount is ''; give BUCKET:FOLDER"),
        (["--zone", "z", "--mount=b", "resume", "--", "train"], "--mount is 'b'; give BUCKET:FOLDER"),
        (["--zone", "z", "--mount=gs://b", "resume", "--", "train"], "--mount is 'gs://b'; give BUCKET:FOLDER"),
        (["--zone", "z", "--mount=b:f", "run", "--", "train"], "--mount is for resume"),
        (["--zone", "z", "frobnicate"], "no action frobnicate"),
        (["--zone", "z", "--tpye", "x", "create"], "no option --tpye"),
        (["--zone"], "--zone needs a value"),
        (["--zone", "--dry-run", "create"], "--zone needs a value, not '--dry-run'"),
        (["--zone=z", "--name", "", "delete"], "--name needs a value, not ''"),
        (["--zone=z", "mount", "--", "gs://b/c", "f"], "mount needs a BUCKET and a FOLDER"),
        (["--zone", "z", "delete", "--", "train"], "takes no arguments"),
        (["--zone=z", "--env", "X", "run", "--", "train"], "--env needs NAME=VALUE"),
        (["--zone=z", "--env=X=1", "setup"], "--env is for run"),
        (["--zone=z", "copy", "--", "runs/x"], "copy needs FROM and TO"),
        (["--zone=z", "mount", "--", "b"], "mount needs a BUCKET and a FOLDER"),
        (["--zone=z", "--worker=all", "logs"], "--worker is all; give a worker's number"),
    ],
)
def test_mistakes_exit_with_2(arguments, expected):
    result = run("--dry-run", *arguments)
    assert result.returncode == 2
    assert expected in result.stderr


@pytest.mark.parametrize("name, value", [("TPU_SPOT", "1"), ("TPU_POLL_SECONDS", "soon")])
def test_a_wrong_value_in_the_environment_is_refused(name, value):
    result = run("--dry-run", "--zone=z", "create", **{name: value})
    assert result.returncode == 2
    assert f"{name} is {value}; give" in result.stderr


def test_gcloud_must_be_installed(tmp_path):
    result = run("--zone=z", "create", PATH=str(tmp_path))
    assert result.returncode == 2
    assert result.stderr == "error: gcloud is not installed; see https://cloud.google.com/sdk/docs/install.\n"


# The queued resource.


def test_create_waits_until_the_tpu_is_there(cloud):
    cloud.states("ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    result = cloud.run("create")
    assert result.returncode == 0, result.stderr
    assert cloud.calls() == ["list", "create", "list", "list", "list"]
    assert "WAITING_FOR_RESOURCES" in result.stderr
    assert result.stderr.endswith("the TPU mpt-jax is ACTIVE\n")


def test_create_waits_for_a_tpu_that_was_asked_for_before(cloud):
    cloud.states("WAITING_FOR_RESOURCES", "ACTIVE")
    assert cloud.run("create").returncode == 0
    assert cloud.calls() == ["list", "list"]


@pytest.mark.parametrize("before", [["ABSENT", "PROVISIONING"], ["PROVISIONING"], ["ABSENT", "SUSPENDING"], []])
@pytest.mark.parametrize("end", ["FAILED", "SUSPENDED"])
def test_create_says_that_the_tpu_will_not_come(cloud, before, end):
    cloud.states(*before, end)
    result = cloud.run("create")
    assert result.returncode == 2
    assert result.stderr.endswith(f"error: the TPU mpt-jax is {end}; delete it and create it anew.\n")


def test_create_passes_over_a_few_failures_of_gcloud(cloud):
    cloud.states("BROKEN", "ABSENT", "PROVISIONING", *["BROKEN"] * 4, "PROVISIONING", *["BROKEN"] * 4, "ACTIVE")
    assert cloud.run("create").returncode == 0
    assert cloud.calls().count("create") == 1


@pytest.mark.parametrize("given, seconds", [("", "20"), ("7.5", "7.5")])
def test_the_time_between_two_looks_can_be_set(cloud, given, seconds):
    cloud.states("PROVISIONING", "BROKEN", "ACTIVE")
    cloud.script("local/sleep", '#!/bin/bash\nprintf "%s\n" "$@" >>"$FAKE/sleeps"\n')
    assert cloud.run("create", TPU_POLL_SECONDS=given).returncode == 0
    assert (cloud.folder / "sleeps").read_text().split() == [seconds] * 2


def test_create_ends_when_gcloud_keeps_failing(cloud):
    cloud.states("ABSENT", "PROVISIONING", "BROKEN")
    result = cloud.run("create")
    assert result.returncode == 2
    assert result.stderr.endswith("could not list the queued resources of z, five times in a row; see its messages above.\n")
    assert cloud.calls() == ["list", "create", *["list"] * 6]


# The workers.


def test_setup_brings_the_code_and_an_environment(cloud):
    stays = cloud.homes[0] / "mpt_jax" / "runs" / "mine"
    stays.mkdir(parents=True)
    stale = cloud.homes[0] / "mpt_jax" / "mpt_jax" / "stale.py"
    stale.parent.mkdir()
    stale.touch()
    result = cloud.run("setup", script=SCRIPT)
    assert result.returncode == 0, result.stderr
    assert list((cloud.folder / "tmp").iterdir()) == []
    assert stays.exists()
    assert not stale.exists()
    for home in cloud.homes:
        code = home / "mpt_jax"
        for file in ("run_tpu.sh", "mpt_jax/__main__.py", "gin/base.gin", "tasks/__init__.py", "requirements.txt"):
            assert (code / file).read_bytes() == (SCRIPT.parent / file).read_bytes()
        with tarfile.open(home / "mpt_jax.tar.gz") as archive:
            names = archive.getnames()
        assert not [name for name in names if re.match(r"\./(\.git|\.venv|\.\w+_cache|runs)(/|$)|.*__pycache__", name)]
        assert "https://astral.sh/uv/" in (code / "curl.log").read_text()
        venv, install = (home / "uv.log").read_text().splitlines()
        assert "--python 3.11 .venv" in venv
        (jax,) = re.findall(r"^jax==([0-9.]+)", (code / "requirements.txt").read_text(), re.MULTILINE)
        assert install.endswith(f"--python .venv -r requirements.txt jax[tpu]=={jax}")


def test_setup_heals_an_environment_that_was_left_half_made(cloud):
    half = cloud.homes[0] / "mpt_jax" / ".venv" / "bin" / "python"
    half.parent.mkdir(parents=True)
    half.symlink_to("/usr/bin/python3.10-of-the-image")
    assert cloud.run("setup").returncode == 0
    assert half.read_text() == PYTHON
    assert cloud.run("setup").returncode == 0
    assert (cloud.homes[0] / "mpt_jax" / "curl.log").read_text().count("install.sh") == 1


@pytest.mark.parametrize("step", ["tar", "curl"])
def test_a_setup_that_fails_says_so_and_leaves_no_archive(cloud, step):
    cloud.script(f"bin/{step}", f"#!/bin/bash\necho '{step}: no luck' >&2\nexit 6\n")
    result = cloud.run("setup")
    assert result.returncode != 0
    assert f"{step}: no luck" in result.stderr
    assert not (cloud.homes[0] / "uv.log").exists()
    assert list((cloud.folder / "tmp").iterdir()) == []


def test_setup_leaves_the_code_of_a_running_job_alone(cloud):
    cloud.set_up()
    assert cloud.run("run", "--", "train").returncode == 0
    result = cloud.run("setup")
    assert result.returncode == 2
    assert "error: w-1: a job is running; stop it before its code is replaced." in result.stderr
    assert not (cloud.homes[0] / "mpt_jax" / "gin").exists()


def test_a_bucket_is_mounted_once(cloud):
    cloud.set_up()
    for _ in range(2):
        assert cloud.run("mount", "--", "gs://my-bucket", "a folder").returncode == 0
    for home in cloud.homes:
        log = (home / "mpt_jax" / "gcsfuse.log").read_text().splitlines()
        assert log == ["--implicit-dirs", "--rename-dir-limit=100000", "my-bucket", "a folder"]
        assert (home / "mpt_jax" / "a folder").is_dir()


def test_mount_installs_gcsfuse_where_it_is_missing(cloud):
    cloud.set_up()
    gcsfuse = (cloud.folder / "bin" / "gcsfuse").rename(cloud.folder / "gcsfuse")
    cloud.script("bin/lsb_release", "#!/bin/bash\necho jammy\n")
    cloud.script(
        "bin/sudo",
        f"""#!/bin/bash
case "$*" in
  tee*) cat >>sudo.log ;;
  *update) [ -e locked ] || {{ touch locked; exit 100; }} ;;
  *install*gcsfuse) cp {gcsfuse} {cloud.folder / "bin"} ;;
esac
""",
    )
    cloud.script("bin/sleep", "#!/bin/bash\n")
    result = cloud.run("mount", "--", "b", "f")
    assert result.returncode == 0, result.stderr
    assert "https://packages.cloud.google.com/apt gcsfuse-jammy main" in (cloud.homes[0] / "sudo.log").read_text()
    assert "my-bucket" not in (cloud.homes[1] / "mpt_jax" / "gcsfuse.log").read_text()


def test_mount_needs_setup(cloud):
    result = cloud.run("mount", "--", "b", "f")
    assert result.returncode == 2
    assert "error: w-0: there is no mpt_jax here; run setup first." in result.stderr


def test_copy_goes_to_a_bucket_and_back(cloud):
    cloud.set_up()
    cloud.script("bin/gcloud", "#!/bin/bash\nprintf '%s\\n' \"$@\" >rsync.log\n")
    assert cloud.run("copy", "--", "runs/a b", "gs://bucket/$x").returncode == 0
    log = (cloud.homes[0] / "mpt_jax" / "rsync.log").read_text()
    assert log.splitlines() == ["storage", "rsync", "--recursive", "runs/a b", "gs://bucket/$x"]
    assert not (cloud.homes[1] / "mpt_jax" / "rsync.log").exists()


def test_arguments_and_environment_reach_the_job_on_every_worker_as_they_were_given(cloud):
    cloud.set_up()
    odd = "/a 'b'/$HOME \"`id`\"\\"
    result = cloud.run("--env", f"MPT_JAX_DATA={odd}", "--env=MPT_JAX_CORPUS=/c", "run", "--", *ODD)
    assert result.returncode == 0, result.stderr
    for home in cloud.homes:
        assert cloud.job(home) == (["-m", "mpt_jax", *ODD], [odd, "/c"])


def test_run_tells_a_command_that_follows_this_very_job(cloud):
    cloud.set_up()
    result = cloud.run("--name=mine", "--project=p", "run", "--", "train")
    told = shell_words(result.stderr.rpartition("follow it with: ")[2].strip())
    assert told[1:] == ["--name=mine", "--zone=z", "--project=p", "logs"]
    assert commands(*told[1:])[0][4:8] == ["ssh", "mine", "--zone=z", "--project=p"]


def test_run_needs_setup(cloud):
    result = cloud.run("run", "--", "train")
    assert result.returncode == 2
    assert "error: w-0: there is no mpt_jax here; run setup first." in result.stderr


def test_a_second_job_is_refused_until_the_first_was_stopped(cloud):
    cloud.set_up()
    assert cloud.run("run", "--", "train").returncode == 0
    first = cloud.pids()
    for home in cloud.homes:
        cloud.job(home)
    assert all(os.getsid(pid) == pid for pid in first)
    again = cloud.run("run", "--", "train")
    assert again.returncode == 2
    assert "error: w-1: a job is running already; stop it first." in again.stderr
    assert cloud.pids() == first
    stop = cloud.run("stop")
    assert stop.returncode == 0, stop.stderr
    assert stop.stdout == "w-0: the job has ended\nw-1: the job has ended\n"
    assert not any(runs(pid) for pid in first)
    assert "saved" in (cloud.homes[1] / "mpt_jax.log").read_text()
    assert cloud.run("run", "--", "train").returncode == 0


def test_stop_says_that_no_job_is_running(cloud):
    stop = cloud.run("stop")
    assert (stop.returncode, stop.stdout) == (0, "w-0: no job is running\nw-1: no job is running\n")


def test_a_number_that_another_process_got_is_no_job(cloud):
    cloud.set_up()
    with subprocess.Popen(["sleep", "60"]) as other:
        for home in cloud.homes:
            (home / "mpt_jax.pid").write_text(f"{other.pid}\n")
        stop = cloud.run("stop")
        alive = other.poll() is None
        started = cloud.run("run", "--", "train")
        other.kill()
    assert alive
    assert "no job is running" in stop.stdout
    assert started.returncode == 0, started.stderr


def test_status_tells_the_state_and_the_job_on_every_worker(cloud):
    assert cloud.run("status").stdout.split() == ["mpt-jax", "ACTIVE", "w-0", "never", "w-1", "never"]
    cloud.set_up()
    cloud.run("run", "--", "train")
    for home in cloud.homes:
        cloud.job(home)
    os.kill(int((cloud.homes[1] / "mpt_jax.pid").read_text()), signal.SIGTERM)
    wait_until(lambda: "saved" in (cloud.homes[1] / "mpt_jax.log").read_text())
    assert cloud.run("status").stdout == "mpt-jax  ACTIVE\nw-0  running  step 2\nw-1  ended  saved\n"


@pytest.mark.parametrize("state", ["ABSENT", "SUSPENDED", "WAITING_FOR_RESOURCES"])
def test_status_asks_no_worker_that_is_not_there(cloud, state):
    cloud.states(state)
    result = cloud.run("status")
    assert (result.returncode, result.stdout) == (0, f"mpt-jax  {state}\n")
    assert cloud.calls() == ["list"]


# After a preemption.


RESUME = ["--spot", "--mount=gs://b:f", "--env=MPT_JAX_DATA=f/a b", "resume", "--", *ODD]
FRESH = ["job_state", "scp", "install_checkout", "mount_folder", "start_job"]


@pytest.mark.parametrize(
    "states, expected",
    [
        ("SUSPENDED ABSENT WAITING_FOR_RESOURCES ACTIVE", "list delete list create list list"),
        ("FAILED ABSENT ACTIVE", "list delete list create list"),
        ("SUSPENDING SUSPENDED DELETING ABSENT ACTIVE", "list list delete list list create list"),
        ("ABSENT ABSENT ACTIVE", "list list create list"),
        ("PROVISIONING ACTIVE", "list list list"),
        ("ACTIVE", "list list"),
    ],
)
def test_a_tpu_that_was_taken_away_is_asked_for_anew_and_gets_the_job(cloud, states, expected):
    cloud.states(*states.split())
    result = cloud.run(*RESUME)
    assert result.returncode == 0, result.stderr
    assert cloud.calls() == expected.split() + FRESH
    assert ("--spot" in result.stderr) == ("create" in expected)
    for home in cloud.homes:
        assert cloud.job(home) == (["-m", "mpt_jax", *ODD], ["f/a b", ""])
        assert (home / "mpt_jax" / "gcsfuse.log").read_text().splitlines()[-2:] == ["b", "f"]


def test_where_the_tpu_is_there_and_the_job_has_ended_only_the_job_is_started(cloud):
    cloud.set_up()
    (cloud.homes[0] / "ends").touch()
    (cloud.homes[1] / "ends").touch()
    cloud.run("run", "--", "train")
    for home in cloud.homes:
        cloud.job(home)
    cloud.end_jobs()
    cloud.calls()
    assert cloud.run(*RESUME).returncode == 0
    assert cloud.calls() == ["list", "list", "job_state", "mount_folder", "start_job"]


def test_where_the_job_runs_nothing_is_done(cloud):
    cloud.set_up()
    cloud.run("run", "--", "train")
    before = cloud.pids()
    cloud.calls()
    result = cloud.run(*RESUME)
    assert result.returncode == 0
    assert result.stderr.endswith("the job is running already; nothing to resume\n")
    assert cloud.calls() == ["list", "list", "job_state"]
    assert cloud.pids() == before


def test_where_the_job_runs_on_some_workers_nothing_is_started(cloud):
    cloud.set_up()
    cloud.run("run", "--", "train")
    os.kill(int((cloud.homes[1] / "mpt_jax.pid").read_text()), signal.SIGKILL)
    cloud.calls()
    result = cloud.run(*RESUME)
    assert result.returncode == 2
    assert result.stderr.endswith("error: the job runs on 1 of 2 workers; stop it, and resume again.\n")
    assert cloud.calls() == ["list", "list", "job_state"]


def test_resume_never_deletes_where_the_state_could_not_be_told(cloud):
    cloud.states("BROKEN")
    assert cloud.run(*RESUME).returncode == 2
    assert cloud.calls() == ["list"] * 5


def test_resume_starts_no_job_where_a_step_before_failed(cloud):
    cloud.states("SUSPENDED", "ABSENT", "ACTIVE")
    cloud.script("bin/curl", "#!/bin/bash\nexit 6\n")
    assert cloud.run(*RESUME).returncode != 0
    assert cloud.calls()[-2:] == ["scp", "install_checkout"]
