"""run_tpu.sh in its dry run, where it prints the commands: nothing here needs gcloud or a TPU."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "run_tpu.sh"
ODD = ["train", '--gin.PromptConfig.init_labels=("yes", "no")', "--gin.MODEL_DIR='/a b/$HOME'", "--gin.X=`id`;*"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, env=env)


def commands(*arguments: str, **environment: str) -> list[list[str]]:
    """The commands of a dry run, split by a shell as it would split them when pasted."""
    result = run("--dry-run", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    lines = [line[2:] for line in result.stderr.splitlines() if line.startswith("+ ")]
    return [shell_words(line) for line in lines]


def shell_words(line: str) -> list[str]:
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True).stdout
    return printed.split("\0")[:-1]


def test_arguments_reach_every_worker_as_they_were_given(tmp_path):
    (command,) = commands("--zone", "z", "run", "--", *ODD)
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mpt-jax"]
    assert "--worker=all" in command
    # Run what a worker would run, with a stand-in for its interpreter that writes its arguments down.
    python = tmp_path / "mpt_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\" >&2\n")
    python.chmod(0o755)
    remote = command[-1].removeprefix("--command=") + "; wait"
    subprocess.run(["bash", "-c", remote], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "mpt_jax.log").read_text().splitlines() == ["-m", "mpt_jax", *ODD]


def test_the_job_gets_the_environment_that_was_given(tmp_path):
    (command,) = commands("--zone=z", "--env", "MPT_JAX_DATA=/a b/$HOME", "--env=MPT_JAX_CORPUS=/c", "run", "--", "train")
    python = tmp_path / "mpt_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf \'%s\\n\' "$MPT_JAX_DATA" "$MPT_JAX_CORPUS"\n')
    python.chmod(0o755)
    subprocess.run(["bash", "-c", command[-1].removeprefix("--command=") + "; wait"], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "mpt_jax.log").read_text().splitlines() == ["/a b/$HOME", "/c"]


def test_a_value_may_follow_an_equals_sign():
    assert commands("--zone=z", "--name=a=b", "--spot", "create") == commands("--zone", "z", "--name", "a=b", "--spot", "create")


def test_a_dry_run_does_not_say_that_it_has_started_anything():
    assert "started" not in run("--dry-run", "--zone", "z", "run", "--", "train").stderr


def test_copy_goes_to_a_bucket_and_back(tmp_path):
    (command,) = commands("--zone", "z", "copy", "--", "runs/a b", "gs://bucket/x")
    assert "--worker=0" in command
    assert shell_words(command[-1].rpartition("&& ")[2]) == [
        "gcloud",
        "storage",
        "rsync",
        "--recursive",
        "runs/a b",
        "gs://bucket/x",
    ]


@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_setup_refuses_another_python_before_it_changes_anything(tmp_path, python):
    *_, install = commands("--zone", "z", "--python", python, "setup")
    remote = install[-1].removeprefix("--command=")
    result = subprocess.run(["bash", "-c", remote], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert f"mpt_jax needs Python 3.11, 3.12 or 3.13, which {python} on the TPU VM is not" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("action", ["create", "setup", "logs", "stop", "delete"])
def test_each_action_names_the_tpu_zone_and_project(action):
    found = commands("--name", "mine", "--project", "p", "--zone", "z", action)
    on_cloud = [command for command in found if command[0] == "gcloud"]
    assert on_cloud
    for command in on_cloud:
        assert any(word.split(":")[0] == "mine" for word in command)
        assert "--zone=z" in command
        assert "--project=p" in command


def test_create_asks_for_what_was_said():
    create, _ = commands("--spot", "--type", "v4-8", "--version", "tpu-ubuntu2204-base", "create", TPU_ZONE="z")
    assert {"--accelerator-type=v4-8", "--runtime-version=tpu-ubuntu2204-base", "--spot", "--zone=z"} <= set(create)


@pytest.mark.parametrize("kind", ["v2-8", "v5litepod-1", "v4-16", "v5p-128"])
def test_every_worker_gets_the_code_the_bucket_and_the_job(kind):
    assert f"--accelerator-type={kind}" in commands("--zone", "z", "--type", kind, "create")[0]
    for arguments in (["setup"], ["mount", "--", "b", "f"], ["run", "--", "train"], ["stop"]):
        on_workers = [command for command in commands("--zone", "z", "--type", kind, *arguments) if command[0] == "gcloud"]
        assert on_workers
        assert all("--worker=all" in command for command in on_workers)


def test_the_log_of_any_worker_can_be_followed():
    assert "--worker=0" in commands("--zone", "z", "logs")[0]
    assert "--worker=3" in commands("--zone", "z", "--worker=3", "logs")[0]


def test_a_bucket_is_mounted_once(tmp_path):
    """Run what a worker would run, with stand-ins that write their arguments down."""
    (command,) = commands("--zone", "z", "mount", "--", "gs://my-bucket", "a folder")
    (tmp_path / "mpt_jax").mkdir()
    (tmp_path / "bin").mkdir()
    for name, body in (("gcsfuse", 'printf "%s\\n" "$@" >gcsfuse.log'), ("mountpoint", "test -e gcsfuse.log")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    remote, log = command[-1].removeprefix("--command="), tmp_path / "mpt_jax" / "gcsfuse.log"
    path = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", remote], cwd=tmp_path, env=path, check=True, timeout=60)
    assert log.read_text().splitlines() == ["--implicit-dirs", "--rename-dir-limit=100000", "my-bucket", "a folder"]
    log.write_text("mounted")
    subprocess.run(["bash", "-c", remote], cwd=tmp_path, env=path, check=True, timeout=60)
    assert log.read_text() == "mounted"
    missing = subprocess.run(["bash", "-c", remote], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert missing.returncode == 2
    assert "gcsfuse is not installed on the TPU VM" in missing.stderr


def test_setup_copies_the_code_and_keeps_runs_and_environment():
    tar, copy, install = commands("--zone", "z", "setup")
    assert {"--exclude=./.git", "--exclude=./.venv"} <= set(tar)
    assert tar[2] in copy
    assert "rm -rf mpt_jax tasks gin tests" in install[-1]
    assert "requirements.txt" in install[-1]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["create"], "--zone is not set"),
        (["--zone", "z", "run"], "run needs the arguments"),
        (["--zone", "z", "frobnicate"], "no action frobnicate"),
        (["--zone", "z", "--tpye", "x", "create"], "no option --tpye"),
        (["--zone"], "--zone needs a value"),
        (["--zone", "z", "delete", "--", "train"], "takes no arguments"),
        (["--zone=z", "--env", "X", "run", "--", "train"], "--env needs NAME=VALUE"),
        (["--zone=z", "--env=X=1", "setup"], "--env is for run"),
        (["--zone=z", "copy", "--", "runs/x"], "copy needs FROM and TO"),
        (["--zone=z", "mount", "--", "b"], "mount needs BUCKET and FOLDER"),
        (["--zone=z", "--worker=all", "logs"], "--worker is all; give a worker's number"),
    ],
)
def test_mistakes_exit_with_2(arguments, expected):
    result = run("--dry-run", *arguments)
    assert result.returncode == 2
    assert expected in result.stderr
