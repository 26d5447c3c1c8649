"""The command line as a user meets it: exit codes, one-line errors, what `show` prints."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import tiny

from mpt_jax import cli
from mpt_jax.config import to_dict
from mpt_jax.gin_bindings import parse

ROOT = Path(__file__).parent.parent
MINI = "--gin_file=gin/backbones/mini.gin"
FLAGS = ["--gin.MIXTURE_OR_TASK_NAME=a_task", "--gin.TRAIN_STEPS=7"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mpt_jax", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def failing(capsys, *arguments: str) -> str:
    """The one line that a user's mistake prints."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_show_prints_every_value_with_its_origin(capsys, tmp_path):
    assert cli.main(["show", MINI, *FLAGS, f"--gin.MODEL_DIR={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ +steps += 7 +# --gin.TRAIN_STEPS$", out, re.MULTILINE)
    assert re.search(r"^ +d_kv += 16 +# gin/backbones/mini.gin:\d+$", out, re.MULTILINE)
    assert re.search(r"^ +batch_size += 32 +# gin/base.gin:\d+ \(BATCH_SIZE\)$", out, re.MULTILINE)
    assert re.search(r"^ +rank += 1 +# default$", out, re.MULTILINE)
    assert "\nTrainConfig  (train)\n" in out
    assert "\033" not in out


def test_what_show_prints_can_be_pasted_into_a_gin_file(capsys, tmp_path):
    """Each line is CLASS.FIELD = VALUE under its class's heading."""
    cli.main(["show", MINI, *FLAGS, f"--gin.MODEL_DIR={tmp_path}"])
    owner, lines = "", []
    for line in capsys.readouterr().out.splitlines()[:-1]:
        if heading := re.match(r"(\S+)  \(", line):
            owner = heading[1]
        elif line.startswith("  "):
            lines.append(f"{owner}.{line.strip()}")
    file = tmp_path / "pasted.gin"
    file.write_text("\n".join(lines), encoding="utf-8")
    expected = parse(["gin/backbones/mini.gin"], [f.removeprefix("--gin.") for f in [*FLAGS, f"--gin.MODEL_DIR={tmp_path}"]])
    assert parse([str(file)]).experiment() == expected.experiment()


def test_show_changed_prints_what_differs_from_the_defaults(capsys, tmp_path):
    flags = [MINI, *FLAGS, f"--gin.MODEL_DIR={tmp_path}", "--gin.PromptConfig.rank=1", "--gin.PromptConfig.init=uniform"]
    assert cli.main(["show", "--changed", *flags]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ +steps += 7 +# --gin.TRAIN_STEPS$", out, re.MULTILINE)  # has no default
    assert re.search(r"^ +init += 'uniform' +# --gin.PromptConfig.init$", out, re.MULTILINE)
    assert not re.search(r"^ +(rank|length|seed) +=", out, re.MULTILINE)  # bound to their defaults
    assert "# default" not in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_explains_itself(capsys, command):
    for arguments in ([command, "--help"], ["-h", command]):
        assert cli.main(arguments) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out.startswith(f"usage: python -m mpt_jax {command} ")
        *_, example = captured.out.partition("\nexample:\n")
        assert max(map(len, captured.out.splitlines())) <= 130
    line = next(line for line in example.replace("\\\n", " ").splitlines() if "mpt_jax" in line)
    parsed = cli._parse_arguments(shlex.split(line)[3:])  # the example can be typed
    if parsed.gin_file and command in ("train", "pipeline", "show"):
        assert parse(parsed.gin_file, parsed.bindings).resolve().config


def test_show_and_help_are_fast():
    start = time.perf_counter()
    assert run("show", MINI, *FLAGS, "--gin.MODEL_DIR=/tmp/x").returncode == 0
    help_text = run("--help")
    assert time.perf_counter() - start < 10  # 0.3 s on an idle machine
    assert help_text.returncode == 0
    for command in cli.COMMANDS:
        assert f"\n  {command} " in help_text.stdout


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["shwo"], "Did you mean 'show'?"),
        (["train"], "train needs at least one --gin_file"),
        (["train", "--gin_file=gin/backbones/mni.gin"], "Did you mean 'gin/backbones/mini.gin'?"),
        (["train", MINI], "MODEL_DIR"),
        (["train", MINI, "--steps=3"], "--steps=3"),
        (["--gin.MODEL_DIR=/tmp/x"], "No command is given"),
        (["train", MINI, "--changed"], "--changed is for show"),
        (["show", MINI, "--vocabulary=bytes"], "--vocabulary is for import and export"),
        (["train", MINI, *FLAGS, "--model_dir=/tmp/x"], "--gin.MODEL_DIR=/tmp/x"),
        (["pipeline", MINI, *FLAGS, "--gin.MODEL_DIR=/tmp/x"], "PipelineConfig.sources"),
        (["report"], "--model_dir=DIR"),
        (["report", "--model_dir=/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, expected):
    assert expected in failing(capsys, *arguments)


def test_the_process_exits_with_2_and_no_traceback():
    result = run("train", MINI, *FLAGS, "--gin.MODEL_DIR=/proc/no/such")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "MODEL_DIR '/proc/no/such'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_command_to_resume_is_the_one_that_was_typed(monkeypatch):
    """`make demo` sets an environment that the plain command would lack."""
    assert re.search(r"^demo .*: export MPT_JAX_COMMAND = make \$@$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    monkeypatch.delenv("MPT_JAX_COMMAND", raising=False)
    assert cli.resuming_command(["train", "--gin.X=a b"]) == "python -m mpt_jax train '--gin.X=a b'"
    monkeypatch.setenv("MPT_JAX_COMMAND", "make demo")
    assert cli.resuming_command(["pipeline"]) == "make demo"


def test_a_python_without_the_requirements_is_told_what_to_do():
    result = subprocess.run(
        [sys.executable, "-S", "-m", "mpt_jax", "show", MINI], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "make install" in result.stderr and "source .venv/bin/activate" in result.stderr


def test_no_arguments_print_the_help():
    result = run()
    assert result.returncode == 0
    assert "usage: python -m mpt_jax COMMAND" in result.stdout


def test_output_cut_off_by_a_pipe_is_no_error():
    flags = " ".join(FLAGS)
    command = f"set -o pipefail; {sys.executable} -m mpt_jax show {MINI} {flags} --gin.MODEL_DIR=/tmp/x | head -c 1"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")


def test_config_gin_keeps_an_earlier_one(tmp_path):
    config = parse(
        ["gin/backbones/mini.gin"], [flag.removeprefix("--gin.") for flag in [*FLAGS, "--gin.MODEL_DIR=x"]]
    ).experiment()
    for text in ("a = 1\n", "a = 1\n", "a = 2\n", "a = 3\n"):
        cli.write_config(text, config, str(tmp_path))
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert json.loads(written.pop("config.json")) == json.loads(json.dumps(to_dict(config)))
    assert written == {"config.gin": "a = 3\n", "config.1.gin": "a = 1\n", "config.2.gin": "a = 2\n"}


def test_a_study_that_is_refused_leaves_no_configuration(capsys, tmp_path):
    flags = [f"--gin.MODEL_DIR={tmp_path}", "--gin.PipelineConfig.max_test_examples=-1"]
    assert "max_test_examples must not be negative" in failing(capsys, "pipeline", "--gin_file=gin/studies/demo.gin", *flags)
    assert not list(tmp_path.iterdir())


def test_module_and_console_script_are_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["mpt-jax"].partition(":")
    assert getattr(__import__(module, fromlist=[function]), function).__code__.co_names.count("main") == 1


def test_interrupting_a_run_says_how_to_go_on(tmp_path):
    """SIGINT in mid-run: one line, exit code 130, a checkpoint; the line's command resumes from it."""
    tiny.make(tmp_path)
    architecture = "\n".join(f"T5Config.{name} = {value!r}" for name, value in dataclasses.asdict(tiny.CONFIG).items())
    (tmp_path / "tiny.gin").write_text(f'include "gin/base.gin"\n{architecture}\n', encoding="utf-8")
    flags = {
        "INITIAL_CHECKPOINT_PATH": tmp_path / "model",
        "MIXTURE_OR_TASK_NAME": "tiny_mood",
        "TASK_FEATURE_LENGTHS": "{'inputs': 8, 'targets': 4}",
        "MODEL_DIR": tmp_path / "run",
        "BATCH_SIZE": 2,
        "PROMPT_LENGTH": 2,
        "PromptConfig.init": "uniform",
        "TrainConfig.log_period": 10,
        "TrainConfig.eval_period": 0,
        "TrainConfig.tensorboard": False,
        "DataConfig.cache_dir": tmp_path / "cache",
        "DataConfig.task_modules": "('tiny_tasks',)",
    }
    arguments = ["train", f"--gin_file={tmp_path}/tiny.gin", *(f"--gin.{name}={value}" for name, value in flags.items())]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "mpt_jax", *arguments, "--gin.TRAIN_STEPS=1_000_000"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        lines = iter(process.stderr.readline, "")
        told = any(line.startswith("step 10/") for line in lines)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert told and process.returncode == 130
    assert "Traceback" not in rest
    last = rest.splitlines()[-1]
    assert last.startswith("Interrupted. To go on from the last checkpoint: python -m mpt_jax train ")
    again = shlex.split(last.partition(": ")[2])
    assert again[3:] == command[3:]
    stopped = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    resumed = subprocess.run(
        [*command[:-1], f"--gin.TRAIN_STEPS={stopped + 1}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming at step {stopped}" in resumed.stderr
