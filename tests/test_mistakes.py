"""What a user does wrong, through the command line: one line that says so, exit code 2, and nothing lost."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny

from mpt_jax import cli
from mpt_jax.checkpoint.export_hf import export_hf
from mpt_jax.models.t5 import init_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny backbone and a finished prompt on it."""
    folder = tiny.make(tmp_path_factory.mktemp("mistakes"))
    assert cli.main(arguments(folder, "train", "MODEL_DIR=good")) == 0
    return folder


def arguments(folder: Path, command: str, *flags: str) -> list[str]:
    """A run of the tiny setting; MODEL_DIR and other paths of `flags` are taken to lie in `folder`."""
    config = tiny.CONFIG
    fields = ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_encoder_layers", "num_decoder_layers")
    settings = {
        **{f"T5Config.{name}": str(getattr(config, name)) for name in fields},
        "INITIAL_CHECKPOINT_PATH": f"{folder}/model",
        "MIXTURE_OR_TASK_NAME": "tiny_mood",
        "TASK_FEATURE_LENGTHS": str(tiny.LENGTHS),
        "TRAIN_STEPS": "4",
        "BATCH_SIZE": "4",
        "PROMPT_LENGTH": "4",
        "PromptConfig.init_population": "40",
        "DataConfig.task_modules": "('tiny_tasks', 'tasks.files')",
        "DataConfig.cache_dir": f"{folder}/cache",
        "TrainConfig.tensorboard": "False",
        "TrainConfig.eval_period": "0",
        "TrainConfig.checkpoint_period": "2",
        "TrainConfig.log_period": "1",
    }
    settings |= dict(flag.split("=", 1) for flag in flags)
    settings["MODEL_DIR"] = f"{folder / settings['MODEL_DIR']}"
    files = ("gin/backbones/mini.gin", "gin/methods/prompt_tuning.gin")
    return [command, *(f"--gin_file={file}" for file in files), *(f"--gin.{name}={value}" for name, value in settings.items())]


def mistake(capsys, *argv: str) -> str:
    """The one line that a mistake prints last."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["INITIAL_CHECKPOINT_PATH=/no/such/model"], ["/no/such/model", "does not exist"]),
        (["MIXTURE_OR_TASK_NAME=tiny_moood"], ["tiny_moood", "Did you mean 'tiny_mood'"]),
        (["PROMPT_LENGTH=65", "PromptConfig.max_length=64"], ["65", "64", "max_length"]),
        (["MIXTURE_OR_TASK_NAME=tiny_word", "TrainConfig.eval_period=2"], ["tiny_word", "no split 'validation'"]),
        (["MODEL_DIR=/proc/no/such"], ["MODEL_DIR", "/proc/no/such"]),
        (["TRAIN_STEPS=0"], ["TRAIN_STEPS", "is 0"]),
    ],
    ids=["missing checkpoint", "misspelt task", "prompt too long", "no validation split", "unwritable folder", "no steps"],
)
def test_a_wrong_value_is_named(folder, capsys, flags, words):
    line = mistake(capsys, *arguments(folder, "train", "MODEL_DIR=wrong", *flags))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "call, words",
    [
        (["pipeline", "lengths_mini"], ["sets SweepConfig", "run it with sweep"]),
        (["sweep", "demo"], ["no axes", "run it with pipeline"]),
        (["sweep", "lengths_mini", "--topology=h100"], ["--topology=h100", "--dry-run"]),
    ],
)
def test_a_study_of_the_other_kind_is_not_begun(tmp_path, capsys, call, words):
    command, study, *flags = call
    line = mistake(capsys, command, f"--gin_file=gin/studies/{study}.gin", f"--gin.MODEL_DIR={tmp_path}/new", *flags)
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_what_was_trained_is_called_by_its_name(folder, capsys):
    for method, words in (
        ("plain", f"prompts in {folder}/named/prompts.safetensors"),
        ("none", f"the tuned model in {folder}/m/model"),
    ):
        run = "named" if method == "plain" else "m"
        assert cli.main(arguments(folder, "train", f"MODEL_DIR={run}", f"PromptConfig.method={method}", "TRAIN_STEPS=1")) == 0
        assert capsys.readouterr().out.rstrip().endswith(words)


def test_a_run_is_not_trained_into_a_study_nor_a_study_into_a_run(folder, capsys):
    for name, mark in (("begun", "config.json"), ("with_results", "results.jsonl")):
        (folder / name).mkdir()
        (folder / name / mark).write_text('{"base": {}}\n')
        assert f"{folder / name} holds a study" in mistake(capsys, *arguments(folder, "train", f"MODEL_DIR={name}"))
        assert [path.name for path in (folder / name).iterdir()] == [mark]
    config = (folder / "good" / "config.gin").read_text()
    study = ["pipeline", "--gin_file=gin/studies/demo.gin", f"--gin.MODEL_DIR={folder}/good"]
    assert f"{folder}/good holds a single run" in mistake(capsys, *study)
    assert (folder / "good" / "config.gin").read_text() == config


def test_a_truncated_checkpoint_is_named(folder, capsys):
    model = shutil.copytree(folder / "model", folder / "half")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert str(weights) in mistake(capsys, *arguments(folder, "train", "MODEL_DIR=r1", f"INITIAL_CHECKPOINT_PATH={model}"))


def test_a_prompt_of_another_backbone_is_refused(folder, capsys):
    other = folder / "other"
    export_hf(init_params(tiny.CONFIG, jax.random.key(2)), tiny.CONFIG, other, vocabulary=folder / "vocabulary.model")
    start = [f"INITIAL_CHECKPOINT_PATH={other}", "PromptConfig.init=file", f"PromptConfig.init_file={folder}/good"]
    line = mistake(capsys, *arguments(folder, "train", "MODEL_DIR=r2", *start))
    assert "backbone" in line and str(folder / "good") in line


def test_a_vocabulary_that_does_not_fit_is_refused(folder, capsys):
    mini = next((Path(cli.__file__).parent / "assets" / "mini").glob("*.model"))
    line = mistake(capsys, *arguments(folder, "train", "MODEL_DIR=r3", f"BackboneConfig.vocabulary={mini}"))
    assert str(mini) in line and "vocab_size=256" in line


def test_a_line_that_is_not_json_is_named_by_file_and_number(folder, capsys, monkeypatch):
    task = folder / "data" / "sst2"
    task.mkdir(parents=True)
    rows = [json.dumps({"sentence": "the food is good", "label": 1})] * 5
    (task / "validation.jsonl").write_text("\n".join(rows))
    (task / "train.jsonl").write_text("\n".join([*rows[:3], "{'sentence': 'not json'}", *rows]))
    monkeypatch.setenv("MPT_JAX_DATA", str(task.parent))
    line = mistake(capsys, *arguments(folder, "train", "MODEL_DIR=r4", "MIXTURE_OR_TASK_NAME=sst2_attempt"))
    assert f"{task / 'train.jsonl'}, line 4" in line


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(folder, capsys):
    """The rate explodes after the second step's checkpoint."""
    flags = ["MODEL_DIR=r5", "TRAIN_STEPS=40", "OptimizerConfig.rules=(('.*', 1e30),)", "OptimizerConfig.warmup_steps=40"]
    flags += ["TrainConfig.checkpoint_period=1", "OptimizerConfig.name=adamw", "OptimizerConfig.weight_decay=1e6"]
    line = mistake(capsys, *arguments(folder, "train", *flags))
    assert "not finite at step" in line and "tiny_mood" in line and "is kept" in line
    assert any((folder / "r5" / "checkpoints").iterdir())
    assert not (folder / "r5" / "prompts.safetensors").exists()


def test_a_device_without_the_memory_is_a_sentence(capsys, monkeypatch):
    """Whatever the command: here it makes an array that no machine holds."""
    command = cli.COMMANDS["bench"]._replace(run=lambda arguments: jnp.zeros(2**60, jnp.int8).block_until_ready())
    monkeypatch.setitem(cli.COMMANDS, "bench", command)
    line = mistake(capsys, "bench")
    assert f"has not the memory for this (Out of memory allocating {2**60} bytes)" in line
    for setting in ("num_microbatches", "num_partitions", "remat", "BATCH_SIZE", "DecodeConfig.batch_size", "`plan`"):
        assert setting in line


def test_no_mistake_has_cost_the_finished_prompt(folder):
    assert cli.main(arguments(folder, "evaluate", "MODEL_DIR=good")) == 0
