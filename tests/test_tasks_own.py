"""Tasks of one's own in gin: from a binding to the cache and the score, from a folder or a TFDS dataset."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
from task_folders import write_splits
from tfds_data import write_tfds

from mpt_jax import cli
from mpt_jax.config import TaskConfig
from mpt_jax.data.cache import mixture_tasks, open_task
from mpt_jax.errors import UserError
from mpt_jax.gin_bindings import parse
from mpt_jax.gin_text import config_text

STARS = TaskConfig("review: {text}", "stars", {"1": "bad", "5": "good"}, ("accuracy", "f1"))


def rows(name: str, count: int) -> list[dict]:
    return [{"text": f"{name} {i}", "stars": (1, 5)[i % 2]} for i in range(count)]


def texts(cache) -> list[tuple[str, str]]:
    return [(cache.text(i)["inputs_pretokenized"], cache.target_text(i)) for i in range(len(cache))]


def with_task(data, task: TaskConfig, name: str = "own_reviews"):
    return dataclasses.replace(data, own_tasks={name: task})


def test_a_task_of_a_folder_is_read_mapped_and_scored(folder, data, vocabulary):
    write_splits(folder / "anywhere", train=rows("train", 4), dev=rows("dev", 5))
    task = dataclasses.replace(STARS, folder=str(folder / "anywhere"), splits={"train": "train", "validation": "dev"})
    data = with_task(data, task)
    assert mixture_tasks(data, "own_reviews") == [("own_reviews", 1.0)]
    train = open_task(data, "own_reviews", "train", vocabulary)
    assert texts(train) == [(f"review: train {i}", ("bad", "good")[i % 2]) for i in range(4)]
    scores = train.score(["bad", "good", "good", "good"])
    assert (scores["accuracy"], scores["f1"]) == pytest.approx((75.0, 80.0))
    assert train.meta["scoring"] is not None  # scores without TensorFlow
    halves = [texts(open_task(data, "own_reviews", split, vocabulary)) for split in ("validation", "test")]
    assert [len(half) for half in halves] == [2, 3]  # ATTEMPT's rule, as there is no test file
    assert {text for half in halves for text, _ in half} == {f"review: dev {i}" for i in range(5)}


def test_another_definition_is_another_cache_in_the_same_program(folder, data, vocabulary):
    write_splits(folder / "own_reviews", train=rows("train", 2))
    first = open_task(with_task(data, STARS), "own_reviews", "train", vocabulary)
    for change, expected in (
        ({"labels": {"5": "great", "1": "poor"}}, ("review: train 0", "poor")),
        ({"inputs": "{text}", "labels": {}, "metrics": ("accuracy",)}, ("train 0", "1")),
    ):
        other = with_task(data, dataclasses.replace(STARS, **change))
        cache = open_task(other, "own_reviews", "train", vocabulary)
        assert cache.folder != first.folder and texts(cache)[0] == expected
    assert open_task(with_task(data, STARS), "own_reviews", "train", vocabulary).folder == first.folder
    write_splits(folder / "own_reviews", train=rows("other", 2))
    assert texts(open_task(with_task(data, STARS), "own_reviews", "train", vocabulary))[0][0] == "review: other 0"


def test_mistakes_name_the_field_or_the_line(folder, data, vocabulary, monkeypatch):
    write_splits(folder / "own_reviews", train=[*rows("train", 2), {"text": "x", "stars": 3}], validation=rows("v", 2))
    for change, message in (
        ({}, r"own_reviews/train.jsonl, line 3: 'stars' must be one of 1, 5, not 3; correct the line"),
        ({"inputs": "{texte}"}, r"line 1: no field 'texte' \(it has text, stars\)"),
        ({"splits": {"train": "trian"}}, r"There is no .*own_reviews/trian.jsonl .* TaskConfig.folder of 'own_reviews'"),
        ({"folder": str(folder / "none")}, r"There is no folder .*/none; .* correct TaskConfig.folder of 'own_reviews'"),
    ):
        with pytest.raises(UserError, match=message):
            open_task(with_task(data, dataclasses.replace(STARS, **change)), "own_reviews", "train", vocabulary)
    monkeypatch.delenv("MPT_JAX_DATA")
    with pytest.raises(UserError, match=r"TaskConfig.folder of 'own_reviews' is not set, and .*MPT_JAX_DATA.* not set either"):
        open_task(with_task(data, STARS), "own_reviews", "train", vocabulary)
    with pytest.raises(UserError, match=r"own_tasks has 'mnli_t5', which is the name of another task"):
        open_task(with_task(data, STARS, "mnli_t5"), "mnli_t5", "train", vocabulary)
    tiny_only = dataclasses.replace(with_task(data, STARS), task_modules=("tiny_tasks",))
    with pytest.raises(UserError, match=r"no module of DataConfig.task_modules \(tiny_tasks\) makes tasks of them; add 'tasks'"):
        open_task(tiny_only, "own_reviews", "train", vocabulary)


BAD = {
    "inputs": ("{text", r"TaskConfig.inputs of 'own' is not a template"),
    "target": ("", r"TaskConfig.target of 'own' is empty"),
    "labels": ({"1": "a", "2": "a"}, r"TaskConfig.labels of 'own' gives two values the same word"),
    "metrics": (("acuracy",), r"TaskConfig.metrics of 'own' must be one of .* not 'acuracy'. Did you mean 'accuracy'"),
    "folder": ("gs://bucket/reviews", r"TaskConfig.folder of 'own' is 'gs://bucket/reviews', but must be a local path"),
    "tfds": ("glue/rte", r"TaskConfig.tfds of 'own' must have a version"),
    "splits": ({"dev": "dev"}, r"TaskConfig.splits of 'own' must be one of train, validation, test, not 'dev'"),
}


@pytest.mark.parametrize("field", BAD)
def test_definitions_that_mean_nothing_are_told(data, field):
    value, message = BAD[field]
    with pytest.raises(UserError, match=message):
        with_task(data, dataclasses.replace(STARS, **{field: value}), "own").validate()
    with pytest.raises(UserError, match=r"own_tasks has the name 'a/b'"):
        with_task(data, STARS, "a/b").validate()


RTE = TaskConfig("{sentence1} so {sentence2}", labels={"0": "yes", "1": "no"}, tfds="glue/rte:2.0.0")


def test_a_task_of_tfds_is_that_of_the_same_rows_in_files(tmp_path, folder, data, vocabulary):
    def examples(name: str, count: int) -> list[dict]:
        return [{"sentence1": f"é {name} {i}", "sentence2": "b", "label": i % 2, "idx": i} for i in range(count)]

    splits = {
        "train": examples("train", 5),
        "validation": examples("v", 7),
        "test": [{**row, "label": -1} for row in examples("t", 2)],
    }
    write_tfds(tmp_path / "tfds", "glue/rte:2.0.0", splits)
    write_splits(folder / "own_files", train=splits["train"], validation=splits["validation"])
    labelled = {"train": "train", "validation": "validation"}
    of_tfds = with_task(data, dataclasses.replace(RTE, splits=labelled), "own_tfds")
    of_tfds = dataclasses.replace(of_tfds, tfds_data_dir=str(tmp_path / "tfds"))
    of_files = with_task(data, dataclasses.replace(RTE, tfds=""), "own_files")
    for split, count in (("train", 5), ("validation", 3), ("test", 4)):
        one, other = open_task(of_tfds, "own_tfds", split, vocabulary), open_task(of_files, "own_files", split, vocabulary)
        assert texts(one) == texts(other) and len(one) == count
    sliced = dataclasses.replace(RTE, splits={"train": "train[:2]", "test": "train[2:]"})
    sliced = dataclasses.replace(of_tfds, own_tasks={"own_tfds": sliced})
    assert [len(open_task(sliced, "own_tfds", split, vocabulary)) for split in ("train", "test")] == [2, 3]
    for change, message in (
        ({"splits": {"train": "trian"}}, r"has no split 'trian' \(it has train, validation, test\); name the right one"),
        ({"splits": {"train": "test"}}, r"TFDS glue/rte:2.0.0, test, row 1: 'label' must be one of 0, 1, not -1; correct Task"),
        ({"target": "lable"}, r"TFDS glue/rte:2.0.0, train, row 1: no field 'lable'"),
    ):
        wrong = dataclasses.replace(of_tfds, own_tasks={"own_tfds": dataclasses.replace(RTE, **change)})
        with pytest.raises(UserError, match=message):
            open_task(wrong, "own_tfds", "train", vocabulary)


def test_one_gin_file_is_the_whole_task_and_the_run_repeats_it(tmp_path, folder, monkeypatch, capsys):
    """Trained from a gin file, evaluated and asked from the run's own config.gin; the same definition in config.json."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    backbone = tiny.make(tmp_path / "tiny")
    write_splits(folder / "anywhere", train=rows("the cat", 8), validation=rows("the dog", 8))
    gin = tmp_path / "mine.gin"
    sizes = ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_encoder_layers", "num_decoder_layers")
    gin.write_text(
        "include 'gin/backbones/mini.gin'\ninclude 'gin/methods/prompt_tuning.gin'\n"
        + "".join(f"T5Config.{name} = {getattr(tiny.CONFIG, name)}\n" for name in sizes)
        + f"""
INITIAL_CHECKPOINT_PATH = '{backbone}/model'
MODEL_DIR = '{tmp_path}/run'
MIXTURE_OR_TASK_NAME = 'own_in_gin'
DataConfig.own_tasks = {{'own_in_gin': @TaskConfig()}}
TaskConfig.inputs = 'so {{text}}'
TaskConfig.target = 'stars'
TaskConfig.labels = {{'1': 'no', '5': 'yes'}}
TaskConfig.metrics = ('accuracy', 'f1')
TaskConfig.folder = '{folder}/anywhere'
DataConfig.cache_dir = '{tmp_path}/cache'
TASK_FEATURE_LENGTHS = {{'inputs': 32, 'targets': 4}}
PROMPT_LENGTH = 4
PromptConfig.init_population = 40
BATCH_SIZE = 4
TRAIN_STEPS = 2
TrainConfig.tensorboard = False
"""
    )
    assert cli.main(["train", f"--gin_file={gin}"]) == 0
    gin.unlink()
    run = f"--gin_file={tmp_path}/run/config.gin"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["own_tasks"]["own_in_gin"]["labels"] == {"1": "no", "5": "yes"}
    assert cli.main(["evaluate", run]) == 0
    assert "own_in_gin" in capsys.readouterr().out
    asked = tmp_path / "in.jsonl"
    asked.write_text(json.dumps({"task": "own_in_gin", "text": "the red"}) + "\n" + json.dumps({"inputs": "so the red"}) + "\n")
    files = (f"--gin.InferConfig.input_file={asked}", f"--gin.InferConfig.output_file={tmp_path}/out.jsonl")
    assert cli.main(["infer", run, *files, "--gin.DecodeConfig.method=rank"]) == 0
    by_fields, by_text = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert set(by_fields["scores"]) == {"no", "yes"} and by_fields["scores"] == by_text["scores"]
    assert cli.main(["train", run, "--gin.TaskConfig.labels={'1': 'no', '5': 'yes', '3': 'maybe'}", "--gin.TRAIN_STEPS=4"]) == 2
    assert "holds a run with data.own_tasks=" in capsys.readouterr().err


def test_what_a_study_writes_for_its_runs_has_the_tasks(tmp_path):
    experiment = tiny.experiment(tmp_path, "run")
    tasks = {"own_one": dataclasses.replace(STARS, folder="a"), "own_two": RTE}
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, own_tasks=tasks))
    (tmp_path / "config.gin").write_text(config_text(experiment))
    assert parse([str(tmp_path / "config.gin")]).experiment() == experiment


def test_of_several_tasks_the_one_with_the_mistake_is_told_with_its_line(tmp_path):
    gin = tmp_path / "mine.gin"
    text = "include 'gin/backbones/mini.gin'\ninclude 'gin/methods/prompt_tuning.gin'\nMIXTURE_OR_TASK_NAME = 'one'\n"
    text += "DataConfig.own_tasks = {'one': @one/TaskConfig(), 'two': @two/TaskConfig()}\n"
    gin.write_text(text + "one/TaskConfig.inputs = '{text}'\ntwo/TaskConfig.inputs = 'text'\n")
    with pytest.raises(UserError, match=r"mine.gin:6: TaskConfig.inputs of 'two' must name fields in braces"):
        parse([str(gin)], ["MODEL_DIR=runs/x", "TRAIN_STEPS=1", "PROMPT_LENGTH=4"]).experiment()
