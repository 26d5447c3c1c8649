"""What gin files and flags mean, and that nothing wrong in them is swallowed."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from mpt_jax import resolve
from mpt_jax.config import Experiment, PipelineConfig, StageConfig, StreamConfig
from mpt_jax.errors import UserError
from mpt_jax.gin_bindings import Parsed, parse, parse_cells
from mpt_jax.gin_text import config_text, gin_literal

MINI = "gin/backbones/mini.gin"
FLAGS = ("MIXTURE_OR_TASK_NAME=a_task", "MODEL_DIR=/tmp/run", "TRAIN_STEPS=7")
STUDY = """
include "gin/backbones/mini.gin"
MIXTURE_OR_TASK_NAME = ""
MODEL_DIR = "/tmp/study"
TRAIN_STEPS = 0
PipelineConfig:
  sources = ("a", "b")
  targets = ["c"]          # a list is as good as a tuple
  few_shot = {"mpt": @few/mpt/StageConfig(), "spot": @few/spot/StageConfig()}
  full_data = {"mpt": @full/StageConfig()}
PipelineConfig.teacher = @teacher/StageConfig()
PipelineConfig.source = @source/StageConfig()
StageConfig.rules = ((".*", 0.3),)
StageConfig.steps = 10
StageConfig.batch_size = 8
few/StageConfig.batch_size = 4
few/mpt/StageConfig.steps = 100
few/mpt/StageConfig.rules = (("shared", 1), ("task_.*", 0.5))
teacher/StageConfig.optimizer = "adamw"
source/StageConfig.steps = %SOURCE_STEPS
SOURCE_STEPS = 33
"""


def write(folder: Path, text: str, name: str = "study.gin") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def parse_text(folder: Path, text: str, *flags: str) -> Parsed:
    return parse([write(folder, text)], flags)


def mini(*flags: str) -> Parsed:
    return parse([MINI], [*FLAGS, *flags])


def message(action: typing.Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


def test_macros_reach_the_fields_of_the_experiment():
    config = mini("BATCH_SIZE=5", "RANDOM_SEED=3", "PROMPT_LENGTH=9").experiment()
    assert (config.data.mixture, config.train.model_dir, config.train.steps) == ("a_task", "/tmp/run", 7)
    assert (config.data.batch_size, config.data.seed, config.train.seed, config.prompt.length) == (5, 3, 3, 9)
    assert config.backbone.architecture.d_kv == 16
    assert config.loss == Experiment.__dataclass_fields__["loss"].default


def test_later_files_and_then_flags_win_and_a_file_is_read_once(tmp_path):
    first = write(tmp_path, f'include "{MINI}"\nTRAIN_STEPS = 1\nPROMPT_LENGTH = 1\nBATCH_SIZE = 1\n', "first.gin")
    second = write(tmp_path, f'include "{MINI}"\nPROMPT_LENGTH = 2\nBATCH_SIZE = 2\n', "second.gin")
    config = parse([first, second], [*FLAGS[:2], "BATCH_SIZE=3"]).experiment()
    # The second include of mini.gin (and with it of base.gin) does not undo what stands between.
    assert (config.train.steps, config.prompt.length, config.data.batch_size) == (1, 2, 3)


def backbones_of(axis: tuple[str, ...], files: list[str], *flags: str) -> dict[str, tuple[str, int]]:
    """Checkpoint and width of the cells of an axis of gin files."""
    cells = parse_cells({"gin_file": axis}, files, [*FLAGS, *flags])
    found = {values["gin_file"]: cell.experiment().backbone for values, cell in cells}
    return {name: (backbone.checkpoint, backbone.architecture.d_model) for name, backbone in found.items()}


SMALLER = "gin/sizes/mini_d32.gin"


@pytest.mark.parametrize("given", [[MINI, SMALLER], [SMALLER, MINI], [MINI, "gin/methods/prompt_tuning.gin", SMALLER]], ids=str)
def test_a_file_on_an_axis_is_read_last_also_where_it_was_given_before(given):
    models = {MINI: ("embedded:mini", 64), SMALLER: ("runs/mini_d32/5", 32)}
    assert backbones_of((MINI, SMALLER), given) == models
    assert backbones_of((SMALLER, MINI), given) == models


def test_what_a_file_on_an_axis_includes_resets_nothing(tmp_path):
    """It is read once, as everywhere: base.gin, that all files include, has defaults of what the study has set."""
    file = write(tmp_path, f'include "{MINI}"\nPROMPT_LENGTH = 7\nBATCH_SIZE = 5\n')
    ((_, cell),) = parse_cells({"gin_file": (MINI,)}, [file], FLAGS)
    config = cell.experiment()
    assert (config.prompt.length, config.data.batch_size, config.train.model_dir) == (7, 5, "/tmp/run")


def test_a_cell_of_another_model_than_its_file_s_is_refused(tmp_path):
    """Where the file has its model from another that was read before, and something else has changed that since."""
    on_axis = write(tmp_path, f'include "{MINI}"\nPROMPT_LENGTH = 3\n', "short.gin")
    other = write(tmp_path, "INITIAL_CHECKPOINT_PATH = 'scratch'\n", "other.gin")
    deep = write(tmp_path, f'include "{MINI}"\nT5Config.num_decoder_layers = 6\n', "deep.gin")
    for given, had, has in (
        ([MINI, SMALLER], r"T5Config.d_model = 64 from \S+mini.gin:\d+", "mini_d32.gin:4 sets 32"),
        ([MINI, other], r"INITIAL_CHECKPOINT_PATH = 'embedded:mini' from \S+mini.gin:\d+", "other.gin:1 sets 'scratch'"),
        ([deep], r"T5Config.num_decoder_layers = 2 from \S+mini.gin:\d+", "deep.gin:2 sets 6"),
    ):
        text = message(lambda given=given: backbones_of((on_axis,), given))
        assert re.match(rf"SweepConfig.axes\['gin_file'\] has {on_axis}, which has {had}, but \S*{has} after that;", text), text
    # A flag is meant for all cells.
    assert backbones_of((on_axis,), [MINI], "T5Config.d_model=96") == {on_axis: ("embedded:mini", 96)}


def test_scopes_take_the_most_specific_binding(tmp_path):
    config = parse_text(tmp_path, STUDY).pipeline()
    assert config.targets == ("c",)
    assert config.few_shot["mpt"] == StageConfig(100, 4, (("shared", 1.0), ("task_.*", 0.5)), "adafactor")
    assert config.few_shot["spot"] == StageConfig(10, 4, ((".*", 0.3),), "adafactor")
    assert config.full_data == {"mpt": StageConfig(10, 8, ((".*", 0.3),), "adafactor")}
    assert config.teacher.optimizer == "adamw"
    assert config.source.steps == 33


def test_whole_numbers_become_floats_where_floats_are_meant(tmp_path):
    rate = parse_text(tmp_path, STUDY).pipeline().few_shot["mpt"].rules[0][1]
    assert isinstance(rate, float)


def test_streams_are_objects_in_a_tuple(tmp_path):
    text = f"""include "{MINI}"
DataConfig.streams = (@a/StreamConfig(), @b/StreamConfig())
a/StreamConfig.task = "x"
b/StreamConfig:
  task = "y"
  group = 1
"""
    streams = parse([write(tmp_path, text)], FLAGS).experiment().data.streams
    assert streams == (StreamConfig("x"), StreamConfig("y", 1))


def test_provenance_names_file_and_line_flag_or_default(tmp_path):
    parsed = parse([MINI, write(tmp_path, "\nPromptConfig.rank = 2\n")], FLAGS)
    origins = {path: setting.origin for path, setting in parsed.provenance().items()}
    assert origins["train.steps"] == "--gin.TRAIN_STEPS"
    assert origins["prompt.rank"] == f"{tmp_path}/study.gin:2"
    assert origins["prompt.init"] == "default"
    file, line, macro = re.fullmatch(r"(.*):(\d+) \((\w+)\)", origins["data.batch_size"]).groups()
    assert macro == "BATCH_SIZE"
    assert Path(file).read_text().splitlines()[int(line) - 1].startswith("BATCH_SIZE = ")
    assert len(origins) == sum(len(dataclasses.fields(c)) for c in _parts(Experiment)) - len(_parts(Experiment)) + 1


def _parts(cls: type) -> list[type]:
    """`cls` and the configurations that it is made of."""
    hints = typing.get_type_hints(cls).values()
    return [cls, *(part for hint in hints if dataclasses.is_dataclass(hint) for part in _parts(hint))]


@pytest.mark.parametrize("kind", ["experiment", "pipeline"])
def test_config_gin_alone_gives_the_same_configuration(tmp_path, kind):
    if kind == "experiment":
        flags = ['OptimizerConfig.rules=(("shared", 0.3), ("task_.*", %RATE))', "RATE=0.4", "PromptConfig.init_text='it\\'s'"]
        parsed, root = mini(*flags), Experiment
    else:
        parsed, root = parse_text(tmp_path, STUDY, "PipelineConfig.distill=False"), PipelineConfig
    text = parsed.config_gin(root)
    again = parse([write(tmp_path, text, "config.gin")])
    assert again.root is root
    assert again.resolve().config == parsed.resolve(root).config
    assert again.config_gin() == text.replace("  # default", "")
    # Every field of every object stands there, so that a default that changes later changes nothing; but no processes.
    assert all((f"{owner}." in text) == (owner != "DistributedConfig") for _, _, owner in parsed.provenance(root).values())
    # Macros still work as flags.
    assert parse([str(tmp_path / "config.gin")], ["PROMPT_LENGTH=3"]).resolve().settings is not None


def test_a_configuration_is_written_as_a_gin_file(tmp_path):
    """An experiment with streams, and a pipeline with dicts of stages, come back as they were."""
    streams = tuple(StreamConfig(f"task_{n}", n, 4, n) for n in range(3))
    experiment = mini("PromptConfig.init_text='it\\'s'").experiment()
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, streams=streams))
    assert parse([write(tmp_path, config_text(experiment))]).experiment() == experiment
    pipeline = parse_text(tmp_path, STUDY).pipeline()
    assert parse([write(tmp_path, config_text(pipeline))]).pipeline() == pipeline


def test_gin_literal_is_read_back(tmp_path):
    values = [(), (1,), {"a": 1}, "it's", 'say "hi"', "line\nbreak", 1e-05, -3, True, tuple(f"a long item {n}" for n in range(9))]
    for value in values:
        file = write(tmp_path, f"X = {gin_literal(value)}\n", "value.gin")
        assert parse([file]).bindings.macros["X"].value == value


@pytest.mark.parametrize(
    "flag, value",
    [
        ("MODEL_DIR=/tmp/x", "/tmp/x"),  # as a shell delivers it
        ("MODEL_DIR='/tmp/x'", "/tmp/x"),  # as T5X wants it
        ("MODEL_DIR=runs/a b", "runs/a b"),
        ("MODEL_DIR=runs/it's", "runs/it's"),
        ("MODEL_DIR=a = b", "a = b"),
        ("MODEL_DIR=x#sst2", "x#sst2"),
    ],
)
def test_a_flag_that_is_no_literal_is_a_string(flag, value):
    assert mini(flag).experiment().train.model_dir == value


WRONG_FLAGS = {
    # An unknown name, with the nearest valid one.
    "TRAIN_STEP=5": ("--gin.TRAIN_STEP", "Did you mean 'TRAIN_STEPS'?"),
    "PromptConfg.length=5": ("--gin.PromptConfg.length", "Did you mean 'PromptConfig'?"),
    "PromptConfig.lenght=5": ("PromptConfig has no field 'lenght'", "Did you mean 'length'?"),
    "PromptConfig.rank=%RNAK": ("the macro RNAK is not defined", "--gin.PromptConfig.rank"),
    "LEARNING_RATE=0.3": ("nothing uses the macro LEARNING_RATE", "OptimizerConfig.rules"),
    "DROPOUT_RATE=0.1": ("nothing uses the macro DROPOUT_RATE", "T5Config.dropout_rate"),
    "PromptConfig=5": ("PromptConfig is a configuration, not a macro",),
    "Prompt-Length=5": ("'Prompt-Length' is not a name",),
    "TRAIN_STEPS": ("--gin.TRAIN_STEPS=VALUE",),
    # A wrong type.
    "TRAIN_STEPS=2.5": ("--gin.TRAIN_STEPS", "TrainConfig.steps (TRAIN_STEPS) must be a whole number, not 2.5"),
    "TRAIN_STEPS=ten": ("must be a whole number, not 'ten'",),
    "TRAIN_STEPS=True": ("must be a whole number, not True",),
    "MODEL_DIR=5": ("must be a string in quotes, not 5; type \"--gin.MODEL_DIR='5'\".",),
    "TrainConfig.tensorboard=true": ("must be True or False, not 'true'",),
    "LossConfig.z_loss=None": ("must be a number, not None",),
    "DataConfig.task_modules=('tasks')": ("must be a tuple such as ('name',), not 'tasks'",),
    "OptimizerConfig.rules=(('.*', 0.3))": ("must be a tuple such as ('name', 0.3), not '.*'",),
    "OptimizerConfig.rules=(('.*', 0.3, 1),)": ("must be a tuple such as ('name', 0.3)",),
    "TASK_FEATURE_LENGTHS={'inputs': '9', 'targets': 4}": ("must be a whole number, not '9'",),
    "TASK_FEATURE_LENGTHS={1: 9}": ("must be a dict such as {'name': 4}",),
    "Experiment.train=@DataConfig()": ("Experiment.train must be @SCOPE/TrainConfig(), not @DataConfig()",),
    "Experiment.train=@TrainConfig": ("write @TrainConfig() with its parentheses",),
    "Experiment.train=@TraiConfig()": ("Did you mean 'TrainConfig'?",),
    "MODEL_DIR=%MODEL_DIR": ("defined by itself",),
    "PromptConfig.init_labels=('a',": ("('a', is not a value that gin can read",),
    # No effect.
    "few/PromptConfig.length=5": ("nothing uses @few/PromptConfig()",),
    "PipelineConfig.distill=False": ("--gin.PipelineConfig.distill has no effect here",),
    # A value that the configuration refuses, with its place.
    "MODEL_DIR=gs://bucket/run": ("--gin.MODEL_DIR: TrainConfig.model_dir (MODEL_DIR) is 'gs://bucket/run'", "rsync"),
    "InferConfig.output_file=gs://bucket/out": ("--gin.InferConfig.output_file: ", "gs://bucket/out", "rsync"),
    "PROMPT_LENGTH=-1": ("--gin.PROMPT_LENGTH: PromptConfig.length (PROMPT_LENGTH) must be from 1 to",),
    "PromptConfig.method=mtp": ("--gin.PromptConfig.method: ", "Did you mean 'mpt'?"),
}


@pytest.mark.parametrize("flag", WRONG_FLAGS)
def test_a_wrong_flag_is_named(flag):
    text = message(lambda: mini(flag).experiment())
    for part in WRONG_FLAGS[flag]:
        assert part in text


WRONG_LINES = {
    "PromptConfig.lenght = 5": ("Did you mean 'length'?",),
    "PROMPT_LENGHT = 5": ("nothing uses the macro PROMPT_LENGHT", "Did you mean 'PROMPT_LENGTH'?"),
    "PromptConfig.length = 'a'": ("must be a whole number",),
    "PromptConfig.length = ": ("Unable to parse value",),
    "PromptConfig.init_labels = ('a',": ("is not closed",),
    "PromptConfig.init_text = 'a": (),
    "PromptConfig.init = vocab": ("vocab is not a value; a string needs quotes",),
    "PromptConfig length = 4": ("Couldn't parse statement",),
    "import tasks.sketch": ("name modules that register tasks in DataConfig.task_modules",),
    "include 'nowhere.gin'": ("there is no gin file 'nowhere.gin'",),
    "include 'backbones/minni.gin'": ("Did you mean 'gin/backbones/mini.gin'?",),
    "few/PromptConfig.length = 5": ("nothing uses @few/PromptConfig()",),
    "PromptConfig.rank = %gin.REQUIRED": ("PromptConfig.rank (asked for at ", "--gin.PromptConfig.rank=VALUE"),
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_line_is_named_by_file_and_number(tmp_path, line):
    file = write(tmp_path, f'# a comment\ninclude "{MINI}"\n\n{line}\n')
    text = message(lambda: parse([file], FLAGS).experiment())
    assert re.search(rf"{re.escape(file)}:[45]\b", text), text
    for part in WRONG_LINES[line]:
        assert part in text


def test_a_misspelt_scope_is_named(tmp_path):
    text = message(parse_text(tmp_path, STUDY + "few/mtp/StageConfig.steps = 3\n").pipeline)
    assert "nothing uses @few/mtp/StageConfig()" in text
    assert "Did you mean 'few/mpt'?" in text


def test_required_macros_are_asked_for_together():
    text = message(parse([MINI]).experiment)
    for name in ("MIXTURE_OR_TASK_NAME", "TRAIN_STEPS", "MODEL_DIR"):
        assert re.search(rf"{name} \(asked for at \S*gin/base.gin:\d+\)", text)
        assert f"--gin.{name}=VALUE" in text


def test_an_architecture_hides_no_other_missing_value():
    text = message(parse(["gin/methods/mpt_source.gin"]).experiment)
    for name in ("INITIAL_CHECKPOINT_PATH", "MODEL_DIR", "TEACHER_PROMPTS_PATH", "T5Config.vocab_size", "gin/backbones"):
        assert name in text


def test_undefined_macros_are_told_together():
    text = message(mini("PromptConfig.rank=%RNAK", "PromptConfig.init=%INIT").experiment)
    assert "the macro RNAK is not defined" in text and "the macro INIT is not defined" in text


def test_a_missing_backbone_is_explained():
    assert "gin/backbones" in message(parse(["gin/base.gin"], [*FLAGS, "INITIAL_CHECKPOINT_PATH=scratch"]).experiment)


def test_a_flag_that_a_file_overrides_is_an_error(tmp_path):
    file = write(tmp_path, f'include "{MINI}"\nTrainConfig.steps = 100\n')
    text = message(parse([file], FLAGS).experiment)
    assert "--gin.TRAIN_STEPS has no effect here: TrainConfig.steps is bound at" in text


def test_required_asks_again_for_a_value_that_an_included_file_gave(tmp_path):
    """A study that starts from another checkpoint than the one it builds on must not fall back to that one."""
    file = write(tmp_path, f'include "{MINI}"\nINITIAL_CHECKPOINT_PATH = %gin.REQUIRED\n')
    assert "INITIAL_CHECKPOINT_PATH (asked for at" in message(parse([file], FLAGS).experiment)


def test_includes_are_found_beside_the_file_and_in_search_paths(tmp_path):
    write(tmp_path, "PROMPT_LENGTH = 4\n", "beside.gin")
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", "BATCH_SIZE = 6\n", "elsewhere.gin")
    file = write(tmp_path, f'include "{MINI}"\ninclude "beside.gin"\ninclude "elsewhere.gin"\n')
    config = parse([file], FLAGS, [str(tmp_path / "more")]).experiment()
    assert (config.prompt.length, config.data.batch_size) == (4, 6)
    message(lambda: parse([file], FLAGS))


def test_bundled_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (MINI, "backbones/mini.gin"):
        assert parse([name], FLAGS).experiment().backbone.architecture.d_kv == 16


def test_one_parse_leaves_nothing_for_the_next():
    mini("PROMPT_LENGTH=3").experiment()
    assert mini().experiment().prompt.length == 100


def test_every_annotation_of_the_configuration_can_be_filled():
    """A new field of a type that `resolve.py` has no rule for fails here, not at a user's."""
    for cls in resolve.CLASSES.values():
        for hint in resolve.type_hints(cls).values():
            assert "SCOPE" in resolve.example(hint) or eval(resolve.example(hint)) is not None
            assert resolve.describe(hint)
