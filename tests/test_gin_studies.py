"""The studies of gin/studies/: their cells are what their axes say, and what is published stands where it can be drawn."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from test_gin_files import trained_by

from mpt_jax import jobs, stages
from mpt_jax.config import BackboneConfig, PipelineConfig
from mpt_jax.gin_bindings import Parsed, parse, parse_cells
from mpt_jax.pipeline import numbers_trained
from mpt_jax.stages import Stage, alone
from mpt_jax.studies.published import is_number, read_published
from mpt_jax.studies.wording import value_label

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "gin" / "studies"
SWEEPS = sorted(
    path.stem for path in STUDIES.glob("*.gin") if any(name == "SweepConfig" for _, name, _ in parse([str(path)]).bindings.fields)
)
SIZES = ("small", "base", "large", "xl", "xxl")
LM_ADAPTED = tuple(f"gin/sizes/lm_adapted_{size}.gin" for size in SIZES)
MINI = "gin/backbones/mini.gin"
MINIS = ("gin/sizes/mini_d16.gin", "gin/sizes/mini_d32.gin", "gin/sizes/mini_d64.gin")
T5_BASE = {"gin_file": ("gin/sizes/t5_base.gin",)}
# What the papers vary (Lester et al. 2021, section 3.2; Wang et al. 2023), and its likes on mini.
AXES = {
    "lester_lengths": {"gin_file": LM_ADAPTED, "PROMPT_LENGTH": (1, 5, 20, 50, 100, 150)},
    "lester_sizes": {"gin_file": LM_ADAPTED},
    "lester_inits": {"gin_file": LM_ADAPTED, "PromptConfig.init": ("uniform", "vocab", "labels")},
    "lester_lm_adaptation": {"gin_file": tuple(f"gin/sizes/span_corruption_{size}.gin" for size in SIZES)},
    "mpt_ablations": T5_BASE | {"PipelineConfig.decompose": (True, False), "PipelineConfig.distill": (True, False)},
    "mpt_sampling": T5_BASE | {"PipelineConfig.source_sampling": ("mpt", "proportional")},
    "mpt_lengths": T5_BASE | {"PROMPT_LENGTH": (100, 200, 300)},
    "mpt_sizes": {"gin_file": tuple(f"gin/sizes/t5_{size}.gin" for size in SIZES[:3])},
    "mpt_ablations_mini": {"PipelineConfig.decompose": (True, False), "PipelineConfig.distill": (True, False)},
    "sizes_mini": {"gin_file": MINIS},
    "mpt_sizes_mini": {"gin_file": MINIS},
    "mpt_sampling_mini": {"PipelineConfig.source_sampling": ("mpt", "proportional")},
}
IN_FIVE_MINUTES = (
    "mpt_ablations_mini",
    "mpt_sampling_mini",
    "mpt_lengths_mini",
    "few_shot_mini",
    "adaptation_mini",
    "inits_mini",
)


def file_of(name: str) -> str:
    return f"gin/studies/{name}.gin"


def read(name: str) -> list[tuple[dict[str, Any], Parsed]]:
    """The cells of a sweep."""
    return list(parse_cells(parse([file_of(name)]).sweep().axes, [file_of(name)]))


def backbone_of(path: str) -> BackboneConfig:
    files = [MINI, path] if Path(path).stem.startswith("mini_") else [path]  # other minis say only what differs
    return parse(files, ["MIXTURE_OR_TASK_NAME=any", "MODEL_DIR=any", "TRAIN_STEPS=1"]).experiment().backbone


def holds(axis: str, value: Any, cell: Parsed) -> bool:
    """Whether a cell has, and has everywhere, what its axis says; of a gin file: its backbone."""
    base = cell.pipeline().base
    if axis == "gin_file":
        return backbone_of(value) == base.backbone
    if axis == "PROMPT_LENGTH":
        return bool(base.prompt.length == value)
    if axis == "INITIAL_CHECKPOINT_PATH":
        return bool(base.backbone.checkpoint == value)
    settings = cell.provenance(PipelineConfig).items()
    values = [setting.value for path, setting in settings if axis == f"{setting.owner}.{path.rpartition('.')[2]}"]
    return values == [value]


@pytest.mark.parametrize("name", SWEEPS)
def test_each_cell_is_what_the_axes_say_and_trains_something_of_its_own(name):
    cells = read(name)
    for axes, cell in cells:
        for axis, value in axes.items():
            assert holds(axis, value, cell), (axis, value)
    points = jobs.collect([cell.pipeline() for _, cell in cells])
    shared = [axes for number, (axes, _) in enumerate(cells) if not any(point.cells == (number,) for point in points)]
    assert all(axes.get("RetrievalConfig.top") == 1 for axes in shared)  # one source's prompt is also its mean


@pytest.mark.parametrize("name", SWEEPS)
def test_every_cell_s_rules_give_each_parameter_a_rate(name):
    """Also where an axis changes what is trained: without decomposition there is no P* but a plain prompt."""
    for job in jobs.plan_jobs([cell.pipeline() for _, cell in read(name)]):
        assert trained_by(job.stage())


def test_mpt_s_studies_share_their_source_training_in_one_folder():
    """T5 1.0 base, 100 tokens, the whole method: with one MODEL_DIR it is trained once for all of them."""
    found = []
    for name in ("mpt_ablations", "mpt_sampling", "mpt_lengths", "mpt_sizes", "frontier"):
        cells = parse_cells(parse([file_of(name)]).sweep().axes, [file_of(name)], ["MODEL_DIR=one"])
        points = jobs.collect([cell.pipeline() for _, cell in cells])
        found.append({point.key for point in points if point.stage.is_source and point.stage.method == "mpt"})
    assert len(set.intersection(*found)) == 1


def test_every_study_has_a_folder_of_its_own():
    folders = [parse([path.as_posix()]).bindings.macros["MODEL_DIR"].value for path in sorted(STUDIES.glob("*.gin"))]
    known = [folder for folder in folders if isinstance(folder, str)]
    assert len(known) > len(SWEEPS) and len(set(known)) == len(known)


@pytest.mark.parametrize("path", sorted((ROOT / "gin" / "sizes").glob("*.gin")), ids=lambda path: path.stem)
def test_a_size_has_the_weights_and_the_width_of_its_name(path):
    size = path.stem.rpartition("_")[2]
    backbone = backbone_of(str(path))
    widths = dict(zip(SIZES, (512, 768, 1024, 2048, 4096), strict=True)) | {"d16": 16, "d32": 32, "d64": 64}
    assert size in re.split("[-_/]", backbone.checkpoint) or (path.stem, backbone.checkpoint) == ("mini_d64", "embedded:mini")
    assert backbone.architecture.d_model == widths[size]
    assert backbone.architecture.tie_embeddings == path.stem.startswith("t5_")  # 1.0


def test_minis_of_other_widths_differ_in_width_only():
    minis = [backbone_of(path).architecture for path in (*MINIS, MINI)]
    assert minis[2] == minis[-1]  # which ships
    for mini in minis:
        assert mini.num_heads * mini.d_kv == mini.d_model and mini.d_ff == 2 * mini.d_model
    alike = [replace(mini, d_model=0, d_kv=0, d_ff=0) for mini in minis]
    assert alike == alike[:1] * len(alike)


@pytest.mark.parametrize("name", AXES)
def test_a_study_varies_what_its_paper_does(name):
    assert parse([file_of(name)]).sweep().axes == AXES[name]


@pytest.mark.parametrize("files", [("studies/mpt_few_shot", "sizes/t5_base"), ("studies/few_shot_mini",)], ids=str)
def test_few_shot_studies_have_the_published_k_and_all_methods(files):
    study = parse([f"gin/{file}.gin" for file in files]).pipeline()
    assert study.k_shots == (4, 16, 32) and set(study.few_shot) == {"mpt", "prompt_tuning", "spot", "model_tuning"}


@pytest.mark.parametrize("name", [name for name in SWEEPS if parse([file_of(name)]).sweep().published])
def test_what_is_published_stands_where_the_axis_has_a_place(name):
    sweep = parse([file_of(name)]).sweep()
    values = sweep.axes[sweep.x]
    labels = {value_label(value) for value in values}
    for curve in read_published(ROOT / sweep.published):
        assert curve.label and curve.source and len(curve.x) == len(curve.y) > 0
        assert all(0 < score < 100 for score in curve.y)
        assert curve.against in ("x", "parameters")
        if curve.against == "parameters":
            assert all(is_number(size) and size > 0 for size in curve.x) and list(curve.x) == sorted(curve.x)
        else:
            assert all(at in values if is_number(at) else value_label(at) in labels for at in curve.x)


def test_every_published_file_is_of_a_study():
    used = {parse([file_of(name)]).sweep().published for name in SWEEPS} - {""}
    assert used == {path.relative_to(ROOT).as_posix() for path in (STUDIES / "published").iterdir()}


def test_published_numbers_of_parameters_are_those_that_are_trained():
    """As printed, with two to four digits: 77.6K, 76.8K and 220M."""
    study = next(cell.pipeline() for axes, cell in read("frontier") if axes["PROMPT_LENGTH"] == 100)
    ours = {stage.method: numbers_trained(alone(stage, 0))[0] for stage in stages.plan(study) if not stage.is_source}
    printed = {curve.label: curve.x[0] for curve in read_published(STUDIES / "published" / "frontier.json")}
    for method, name in (("mpt", "MPT"), ("prompt_tuning", "prompt tuning"), ("model_tuning", "model tuning")):
        assert ours[method] == pytest.approx(printed[f"{name}, published"], rel=0.015)


def work(name: str) -> float:
    """Of a study: examples trained on and decoded, in units of one trained on with 20 + 32 positions."""
    parsed = parse([file_of(name)])
    if name in SWEEPS:
        planned = [job.stage() for job in jobs.plan_jobs([cell.pipeline() for _, cell in read(name)])]
    else:
        planned = stages.plan(parsed.pipeline())

    def units(stage: Stage) -> float:
        sizes = {run.task: parsed.pipeline().max_test_examples for run in stage.runs}
        return stage.cost(sizes) * (stage.experiment.prompt_length + 32) / (20 + 32)

    return sum(map(units, planned))


@pytest.mark.parametrize("name", IN_FIVE_MINUTES)
def test_a_study_on_mini_is_short(name):
    """Some five minutes, as the demo."""
    assert work(name) < 1.1 * work("demo")


def test_the_table_of_fields_has_all():
    text = (ROOT / "docs" / "studies" / "README.md").read_text()
    table = text[text.index("# The fields of a study") : text.index("# Sweeps")]
    named = {name for line in table.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named == {field.name for field in fields(PipelineConfig)} - {"base"}


def test_the_table_of_studies_has_all():
    text = (ROOT / "docs" / "studies" / "README.md").read_text(encoding="utf-8")
    preparing = {"pretrain_mini", "continue_mini"}  # of mini itself
    assert {path.name for path in STUDIES.glob("*.gin") if path.stem not in preparing} <= set(text.replace("`", " ").split())


def test_published_files_are_lists_that_people_can_read():
    for path in (STUDIES / "published").iterdir():
        assert isinstance(json.loads(path.read_text(encoding="utf-8")), list)
        assert all(len(line) <= 160 for line in path.read_text(encoding="utf-8").splitlines()), path
