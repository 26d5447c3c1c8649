"""The studies for a T5 against gin/methods/, which says where each value is from: what a paper fixes is the same in both."""

import dataclasses
from typing import Any

import pytest
from test_gin_studies import STUDIES, file_of

from mpt_jax import stages
from mpt_jax.config import Experiment, LossConfig, OptimizerConfig, PipelineConfig, StageConfig
from mpt_jax.data.build import check_split
from mpt_jax.gin_bindings import parse, parse_cells

ALL = sorted(path.stem for path in STUDIES.glob("*.gin") if parse([str(path)]).root is PipelineConfig)
LESTER = [name for name in ALL if name.startswith("lester_")]
MPT = ["mpt_superglue", "mpt_ablations", "mpt_sampling", "mpt_lengths", "mpt_sizes", "mpt_few_shot", "frontier"]
LM_ADAPTED, T5_BASE = "gin/sizes/lm_adapted_base.gin", "gin/sizes/t5_base.gin"
# Lester et al. 2021, section 3.2, of the two tasks of SuperGLUE that have no class labels.
WORDS = {"record": ("commonsense", "reasoning", "reading", "comprehension"), "wsc": ("commonsense", "pronoun", "resolution")}


def study_of(name: str, size: str = "") -> PipelineConfig:
    """A study, at one size; where its cells differ in more than that, the first."""
    files = [file_of(name), *([size] if size else [])]
    parsed = parse(files)
    if any(owner == "SweepConfig" for _, owner, _ in parsed.bindings.fields) and not size:
        return next(parse_cells(parsed.sweep().axes, files))[1].pipeline()
    return parse([*files, LM_ADAPTED]).pipeline() if name.startswith("lester_") and not size else parsed.pipeline()


def method_of(name: str, size: str) -> Experiment:
    """A single run of gin/methods/."""
    asked = {"mpt_source": "TEACHER_PROMPTS_PATH", "mpt_target": "INITIAL_PROMPT_PATH"}
    flags = ["MODEL_DIR=any", *([f"{asked[name]}=any"] if name in asked else [])]
    flags += ["MIXTURE_OR_TASK_NAME=any"] if name != "mpt_source" else []
    flags += ["TRAIN_STEPS=1"] if name == "mpt_target" else []
    return parse([size, f"gin/methods/{name}.gin"], flags).experiment()


def trained(name: str, size: str) -> dict[tuple[str, str], Experiment]:
    """(kind, method) → what a study trains, its first part."""
    found: dict[tuple[str, str], Experiment] = {}
    for stage in stages.plan(study_of(name, size)):
        found.setdefault((stage.kind, stage.method), stage.experiment)
    return found


def without(config: LossConfig | OptimizerConfig, *fields: str) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in fields}


@pytest.mark.parametrize("name", LESTER)
def test_lester_et_al_s_prompts_are_trained_as_by_the_method_s_file(name):
    experiment, method = trained(name, LM_ADAPTED)["full", "prompt_tuning"], method_of("prompt_tuning", LM_ADAPTED)
    assert experiment.loss == method.loss and experiment.loss.z_loss == 1e-4
    assert experiment.optimizer == method.optimizer
    assert experiment.train.steps == method.train.steps == 30_000
    assert experiment.data.batch_size == method.data.batch_size * len(experiment.data.streams)
    assert experiment.data.lengths["inputs"] == 512


@pytest.mark.parametrize("name", [name for name in LESTER if "model_tuning" in study_of(name, LM_ADAPTED).full_data])
def test_lester_et_al_s_models_are_tuned_as_by_the_method_s_file(name):
    experiment, method = trained(name, LM_ADAPTED)["full", "model_tuning"], method_of("model_tuning", LM_ADAPTED)
    assert (experiment.loss, experiment.optimizer) == (method.loss, method.optimizer)
    assert experiment.train.steps == method.train.steps
    assert experiment.data.batch_size == method.data.batch_size
    assert experiment.data.batch_size * experiment.data.lengths["inputs"] == 2**16


@pytest.mark.parametrize("name", MPT)
def test_mpt_is_trained_as_by_the_method_s_files(name):
    """But for its learning rates, whose pattern also fits a prompt without u and v."""
    found = trained(name, T5_BASE)
    source, method = found["source", "mpt"], method_of("mpt_source", T5_BASE)
    assert without(source.loss, "teachers") == without(method.loss, "teachers")
    assert without(source.optimizer, "rules") == without(method.optimizer, "rules")
    assert (source.prompt.init, source.prompt.init_scale) == (method.prompt.init, method.prompt.init_scale) == ("uniform", 0.5)
    assert (source.train.steps, source.data.batch_size) == (method.train.steps, method.data.batch_size)
    assert source.optimizer.warmup_steps == source.train.steps // 10
    target = method_of("mpt_target", T5_BASE)
    teachers = found["teachers", "prompt_tuning"]
    assert (teachers.prompt.init, teachers.optimizer.warmup_steps) == ("vocab", 500)  # ATTEMPT's prompt tuning
    for (kind, how), experiment in found.items():
        if how == "prompt_tuning":
            assert experiment.prompt.init == "vocab"
        if kind == "full":
            assert without(experiment.optimizer, "rules") == without(target.optimizer, "rules"), how


@pytest.mark.parametrize("name", ALL)
def test_warm_ups_are_a_small_part_of_a_stage(name):
    for stage in stages.plan(study_of(name, T5_BASE if name == "mpt_few_shot" else "")):
        assert stage.experiment.optimizer.warmup_steps <= 0.1 * stage.experiment.train.steps, stage.title


@pytest.mark.parametrize("name", LESTER)
def test_every_task_that_starts_from_labels_has_some(name):
    """Those of the task library that write a label of the dataset have them; for others the study gives the paper's words."""
    from tasks import library, mixtures  # noqa: F401  (registers the datasets)

    for axes, cell in _cells(name):
        for stage in stages.plan(cell):
            prompt = stage.experiment.prompt
            if prompt.method == "none" or prompt.init != "labels":
                continue
            for run in stage.runs:
                dataset, style = library.REGISTERED[run.task]
                has_labels = bool(dataset.classes) and dataset.formats[style].target == dataset.label
                assert has_labels or prompt.init_labels_of[run.task] == WORDS[dataset.name], (axes, run.task)


def _cells(name: str) -> list[tuple[dict[str, Any], PipelineConfig]]:
    parsed = parse([file_of(name)])
    if any(owner == "SweepConfig" for _, owner, _ in parsed.bindings.fields):
        return [(axes, cell.pipeline()) for axes, cell in parse_cells(parsed.sweep().axes, [file_of(name)])]
    return [({}, study_of(name, LM_ADAPTED))]


@pytest.mark.parametrize("name", ALL)
def test_every_task_of_a_study_is_registered_and_has_the_splits_that_it_needs(name, monkeypatch):
    """As TFDS has them, which is not asked: the library knows. Tasks that are only scored need the test split alone."""
    monkeypatch.delenv("MPT_JAX_DATA", raising=False)
    study = study_of(name, T5_BASE if name == "mpt_few_shot" else "")
    data = study.base.data
    needed = {data.train_split, study.test_split, *([data.eval_split] if study.base.train.eval_period else [])}
    for task in (*study.sources, *study.targets):
        for split in needed:
            check_split(data, task, split)
    for task in (task for tasks in study.zero_shot.values() for task in tasks):
        check_split(data, task, study.test_split)
    if "domain_shift" in name:
        assert study.zero_shot


def test_the_studies_that_are_compared_are_all_that_have_these_methods():
    assert {"lester_lengths", "lester_sizes", "lester_domain_shift", "lester_domain_shift_qa", *MPT} <= set(ALL)
    assert StageConfig(1, 1, ()).warmup_steps < 0 and not StageConfig(1, 1, ()).init  # else a study's own would be another's
