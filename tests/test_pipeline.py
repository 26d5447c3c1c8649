"""A study from end to end on a tiny T5; its plan; and what a second, an interrupted and an extended call do."""

import dataclasses
import json
import os
import shutil
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import study
import tiny

from mpt_jax import cli, setup, stages, transfer
from mpt_jax.claims import ClaimLost, Claims
from mpt_jax.config import RetrievalConfig, StageConfig
from mpt_jax.errors import UserError
from mpt_jax.evaluate import examined, run_evaluate
from mpt_jax.gin_bindings import parse
from mpt_jax.pipeline import Clock, numbers_trained, reference_of, reference_scores, run_pipeline
from mpt_jax.prompts.files import load_prompts, save_prompts
from mpt_jax.stages import Run
from mpt_jax.studies import results
from mpt_jax.studies.report import write_report
from tasks import sketch

FEW = {"k_shots": (2,)}

# ---------------------------------------------------------------------------------------------------------------- the plan


def test_plan_has_every_run_once_and_in_order():
    plan = stages.plan(study.pipeline(Path("f")))
    few = [("few_shot", "mpt", 4), ("few_shot", "prompt_tuning", 4), ("few_shot", "spot", 4)] + [
        ("few_shot", "model_tuning", 1)
    ] * 4
    full = [("full", "mpt", 2), ("full", "prompt_tuning", 2), ("full", "spot", 2)] + [("full", "model_tuning", 1)] * 2
    expected = [("teachers", "prompt_tuning", 2), ("source", "mpt", 2), *few, *full]
    assert [(stage.kind, stage.method, len(stage.runs)) for stage in plan] == expected
    names = [name for stage in plan for name in stage.run_ids]
    assert len(set(names)) == len(names) == 2 + 2 + 16 + 8
    assert len({stage.folder for stage in plan}) == len(plan)
    assert len({stage.title for stage in plan}) == 10


def test_stages_are_banks_of_the_right_size_and_speed():
    cfg = study.pipeline(Path("f"))
    by_name = {stage.folder.name: stage for stage in stages.plan(cfg)}
    mpt = by_name["few_shot-k2-mpt"]
    assert [(s.task, s.group, s.k_shot, s.seed) for s in mpt.experiment.data.streams] == [
        ("tiny_mood", 0, 2, 0),
        ("tiny_mood", 1, 2, 1),
        ("tiny_animal", 2, 2, 0),
        ("tiny_animal", 3, 2, 1),
    ]
    assert (mpt.experiment.data.batch_size, mpt.batch_per_run, mpt.experiment.data.sampling) == (16, 4, "bank")
    assert mpt.experiment.optimizer.rules == study.MPT
    source = by_name["source"]
    assert (source.experiment.data.batch_size, source.experiment.data.sampling, source.experiment.optimizer.name) == (
        8,
        "mpt",
        "adamw",
    )
    assert source.experiment.loss.teachers == str(by_name["teachers"].folder)
    assert {s.group for s in source.experiment.data.streams} == {0}
    assert mpt.experiment.prompt.init_file == str(source.folder / "prompts.safetensors")
    assert by_name["few_shot-k2-spot"].experiment.prompt.init_file.endswith("few_shot-k2-spot/start.safetensors#*")
    assert all(stage.experiment.loss.teachers == "" for stage in by_name.values() if stage is not source)
    tuned = by_name["full-model_tuning-tiny_animal-seed0"].experiment
    assert (tuned.prompt.method, tuned.optimizer.factored, tuned.optimizer.scale_by_parameter) == ("none", True, True)
    assert not by_name["full-prompt_tuning"].experiment.optimizer.factored


def test_trained_weights_are_in_float32():
    """A frozen backbone need not be, and is not in the other stages."""
    cfg = study.pipeline(Path("f"))
    half = dataclasses.replace(tiny.CONFIG, param_dtype="bfloat16")
    cfg = dataclasses.replace(cfg, base=tiny.replace(cfg.base, backbone={"architecture": half}))
    dtypes = {(s.method == "model_tuning", s.experiment.backbone.architecture.param_dtype) for s in stages.plan(cfg)}
    assert dtypes == {(True, "float32"), (False, "bfloat16")}


def test_few_shot_runs_select_nothing_and_full_ones_do():
    cfg = study.pipeline(Path("f"))
    cfg = dataclasses.replace(cfg, base=tiny.replace(cfg.base, train={"eval_period": 7}))
    periods = {stage.kind: stage.experiment.train.eval_period for stage in stages.plan(cfg)}
    assert periods == {"teachers": 7, "source": 7, "few_shot": 0, "full": 7}


def test_short_stages_tell_their_loss_often_enough_and_long_ones_as_configured():
    few = {"prompt_tuning": StageConfig(60, 4, study.PLAIN), "spot": StageConfig(5, 4, study.PLAIN)}
    cfg = study.pipeline(Path("f"), **FEW, few_shot=few, teacher=StageConfig(3000, 4, study.PLAIN))
    cfg = dataclasses.replace(cfg, base=tiny.replace(cfg.base, train={"log_period": 25}))
    periods = {(s.kind, s.method): s.experiment.train.log_period for s in stages.plan(cfg)}
    assert periods == {("teachers", "prompt_tuning"): 25, ("few_shot", "prompt_tuning"): 5, ("few_shot", "spot"): 1}


def test_only_needed_stages_are_planned():
    def kinds(**changes):
        return [stage.kind for stage in stages.plan(study.pipeline(Path("f"), **FEW, **changes))]

    few = study.pipeline(Path("f")).few_shot
    assert kinds(few_shot={"prompt_tuning": few["prompt_tuning"]}) == ["few_shot"]
    assert kinds(few_shot={"mpt": few["mpt"]}, distill=False) == ["source", "few_shot"]
    assert kinds(few_shot={"spot": few["spot"]}) == ["teachers", "few_shot"]
    plain = stages.plan(study.pipeline(Path("f"), **FEW, few_shot={"mpt": few["mpt"]}, distill=False))
    assert plain[0].experiment.loss.teachers == ""


def test_bank_size_splits_a_stage():
    plan = [
        s
        for s in stages.plan(study.pipeline(Path("f"), **FEW, bank_size=3))
        if s.method == "prompt_tuning" and s.kind == "few_shot"
    ]
    assert [len(stage.runs) for stage in plan] == [3, 1]
    assert [stage.experiment.data.batch_size for stage in plan] == [12, 4]
    assert [stage.folder.name for stage in plan] == ["few_shot-k2-prompt_tuning-part1", "few_shot-k2-prompt_tuning-part2"]
    whole = next(s for s in stages.plan(study.pipeline(Path("f"), **FEW)) if s.method == "prompt_tuning" and s.kind == "few_shot")
    assert [name for stage in plan for name in stage.run_ids] == list(whole.run_ids)
    assert stages.run_config(plan[1], 0, "f") | {"train": 0} == stages.run_config(whole, 3, "f") | {"train": 0}


def test_target_seeds_start_from_the_source_trainings_in_turn():
    cfg = study.pipeline(Path("f"), **FEW, seeds=(0, 1, 2), source_seeds=(0, 5))
    plan = stages.plan(cfg)
    sources = [stage for stage in plan if stage.kind in ("teachers", "source")]
    assert [(stage.kind, stage.folder.name, stage.runs[0].seed) for stage in sources] == [
        ("teachers", "teachers", 0),
        ("source", "source", 0),
        ("teachers", "teachers-seed5", 5),
        ("source", "source-seed5", 5),
    ]
    assert sources[3].experiment.loss.teachers == str(sources[2].folder)
    assert sources[2].experiment.data != sources[0].experiment.data
    for method, kind in (("mpt", "source"), ("spot", "teachers")):
        parts = [stage for stage in plan if stage.kind == "few_shot" and stage.method == method]
        assert [{run.seed for run in part.runs} for part in parts] == [{0, 2}, {1}]
        assert [Path(part.start).parent.name for part in parts] == [kind, f"{kind}-seed5"]
        assert len({part.folder for part in parts}) == 2
    prompt_tuning = [stage for stage in plan if stage.kind == "few_shot" and stage.method == "prompt_tuning"]
    assert len(prompt_tuning) == 1 and not prompt_tuning[0].start
    names = [name for stage in plan for name in stage.run_ids]
    assert len(names) == len(set(names))


def test_source_trainings_are_called_by_the_seed_that_they_record(capsys):
    cfg = study.pipeline(Path("f"), **FEW, source_seeds=(0, 5))
    cfg = dataclasses.replace(cfg, base=tiny.replace(cfg.base, data={"seed": 100}))
    plan = stages.plan(cfg)
    sources = [stage for stage in plan if stage.kind == "source"]
    assert [(stage.folder.name, stage.runs[0].seed) for stage in sources] == [("source", 100), ("source-seed105", 105)]
    clock = Clock(plan, plan)
    for stage in sources:
        clock.begin(stage)
    first, second = capsys.readouterr().err.splitlines()
    assert "MPT source training (seed 100)" in first and "MPT source training (seed 105)" in second


def test_results_from_another_source_training_are_refused():
    cfg = study.pipeline(Path("f"), **FEW)
    more = dataclasses.replace(cfg, source_seeds=(0, 5))
    for method in ("mpt", "spot"):
        one, two = (
            next(s for s in stages.plan(c) if s.kind == "few_shot" and s.method == method and Run("tiny_mood", 1) in s.runs)
            for c in (cfg, more)
        )
        recorded = stages.run_config(one, one.runs.index(Run("tiny_mood", 1)), "f")
        planned = stages.run_config(two, two.runs.index(Run("tiny_mood", 1)), "f")
        with pytest.raises(UserError, match=r"with prompt\.init_file='.*/prompts\.safetensors', but now it is '.*-seed5/"):
            stages.check_same(recorded, planned, "f", "a run")


def test_an_extended_study_has_only_the_new_runs_left():
    cfg = study.pipeline(Path("f"), **FEW)
    done = {name for stage in stages.plan(cfg) for name in stage.run_ids}
    assert stages.remaining(cfg, stages.plan(cfg), done) == []
    more = dataclasses.replace(cfg, seeds=(0, 1, 2))
    left = stages.remaining(more, stages.plan(more), done)
    assert {run.seed for stage in left for run in stage.runs} == {2}
    assert {stage.kind for stage in left} == {"few_shot"}
    assert not {stage.folder for stage in left} & {stage.folder for stage in stages.plan(cfg)}


def test_a_stage_has_a_warm_up_and_a_start_of_its_own():
    """Where it names none it has the run's; a prompt that starts from a source training's has no other start."""
    cfg = study.pipeline(Path("f"))
    cfg = dataclasses.replace(cfg, base=tiny.replace(cfg.base, optimizer={"warmup_steps": 7}))
    source = dataclasses.replace(cfg.source, warmup_steps=3, init="uniform")
    tuned = {"prompt_tuning": dataclasses.replace(cfg.full_data["prompt_tuning"], init="uniform_positive", warmup_steps=0)}
    changed = dataclasses.replace(cfg, source=source, full_data=cfg.full_data | tuned)
    found = {(stage.kind, stage.method): stage.experiment for stage in stages.plan(changed)}
    for (kind, method), experiment in found.items():
        warm_up = {"source": 3, "full": 0 if method == "prompt_tuning" else 7}.get(kind, 7)
        assert experiment.optimizer.warmup_steps == warm_up, (kind, method)
        if method in ("mpt", "spot") and kind != "source":
            assert experiment.prompt.init == "file"
    assert found["source", "mpt"].prompt.init == "uniform"
    assert found["full", "prompt_tuning"].prompt.init == "uniform_positive"
    assert found["few_shot", "prompt_tuning"].prompt.init == found["teachers", "prompt_tuning"].prompt.init == "vocab"
    recorded = stages.run_config(stages.plan(cfg)[1], 0, "f")
    with pytest.raises(UserError, match=r"with prompt\.init='vocab', but now it is 'uniform'"):
        stages.check_same(recorded, stages.run_config(stages.plan(changed)[1], 0, "f"), "f", "a run")


def test_what_spot_trains_besides_has_the_run_s_warm_up_and_not_that_of_spot_s_stage():
    cfg = study.pipeline(Path("f"), **FEW)
    cfg = dataclasses.replace(cfg, base=tiny.replace(cfg.base, optimizer={"warmup_steps": 7}))
    steps = StageConfig(2, 4, study.PLAIN)
    for embedding, expected in (
        (steps, (7, "vocab")),
        (dataclasses.replace(steps, warmup_steps=1, init="uniform"), (1, "uniform")),
    ):
        retrieval = RetrievalConfig(by="per_token", top=1, stages={"embedding": embedding})
        few = {"spot": dataclasses.replace(steps, warmup_steps=2)}
        (spot,) = [
            one for one in stages.plan(dataclasses.replace(cfg, few_shot=few, retrieval=retrieval)) if one.method == "spot"
        ]
        besides, runs = spot.trainings
        assert (besides.optimizer.warmup_steps, besides.prompt.init) == expected
        assert (runs.optimizer.warmup_steps, runs.prompt.init) == (2, "file")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"few_shot": {"mtp": StageConfig(1, 1, study.PLAIN)}}, "Did you mean 'mpt'"),
        ({"few_shot": {}}, "few_shot is empty"),
        (
            {"source": StageConfig(1, 1, study.MPT, "adamw", warmup_steps=-2)},
            r"source has the StageConfig.warmup_steps -2; .* -1",
        ),
        (
            {"teacher": StageConfig(1, 1, study.PLAIN, init="unifrom")},
            r"teacher has the StageConfig.init 'unifrom'.* 'uniform'\?",
        ),
        (
            {"few_shot": {"mpt": StageConfig(1, 1, study.MPT, init="vocab")}},
            r"few_shot\['mpt'\] has the StageConfig.init 'vocab', but its prompts start from a source training",
        ),
        (
            {"few_shot": {"model_tuning": StageConfig(1, 1, study.PLAIN, init="vocab")}},
            r"few_shot\['model_tuning'\] has the StageConfig.init 'vocab', but it trains no prompt",
        ),
        ({"targets": ("tiny_mood", "tiny_mood")}, "PipelineConfig.targets"),
        ({"seeds": ()}, "PipelineConfig.seeds"),
        ({"source_seeds": (1, 1)}, "PipelineConfig.source_seeds"),
        ({"source_seeds": (0, 1, 2)}, r"3 source trainings, but PipelineConfig\.seeds only 2 seeds to start from them"),
        ({"seeds": (-1,)}, r"PipelineConfig\.seeds must be from 0 to \d+, not \(-1,\)"),
        ({"k_shots": (-1,)}, "k_shots"),
        ({"sources": ("tiny_mood",)}, "PipelineConfig.sources"),
        ({"bank_size": -1}, "bank_size"),
        ({"teacher": StageConfig(0, 4, study.PLAIN)}, r"StageConfig.steps of PipelineConfig.teacher is 0, so that its prompts"),
        ({"source": StageConfig(-1, 4, study.MPT)}, r"StageConfig.steps of PipelineConfig.source must not be negative"),
        (
            {"few_shot": {"prompt_tuning": StageConfig(0, 4, study.PLAIN)}},
            r"StageConfig.steps of PipelineConfig.few_shot\['prompt_tuning'\] is 0",
        ),
        ({"few_shot": {"spot": StageConfig(1, 4, ())}}, r"StageConfig.rules of PipelineConfig.few_shot\['spot'\] is empty"),
        ({"max_test_examples": -1}, r"max_test_examples must not be negative \(0 = all\), not -1"),
    ],
)
def test_mistakes_are_told_before_anything_runs(changes, words):
    with pytest.raises(UserError, match=words):
        stages.plan(study.pipeline(Path("f"), **(FEW | changes)))


def test_what_is_transferred_or_given_may_be_scored_without_a_step():
    given = {name: StageConfig(0, 4, study.MPT if name == "mpt" else study.PLAIN) for name in ("mpt", "spot", "model_tuning")}
    cfg = study.pipeline(Path("f"), **(FEW | {"few_shot": given}))
    assert {stage.experiment.train.steps for stage in stages.plan(cfg) if not stage.is_source} == {0}
    base = tiny.replace(cfg.base, prompt={"init": "text", "init_text": "is it good"})
    text = {"prompt_tuning": StageConfig(0, 4, study.PLAIN)}
    assert stages.plan(dataclasses.replace(cfg, base=base, few_shot=text))


def test_numbers_trained_match_the_paper():
    """T5-base, 100 tokens: 76,800 for a prompt, 77,668 with u and v (methods of Wang et al. 2023: 77.6K)."""
    base = tiny.experiment(Path("f"), "r", prompt={"length": 100}, architecture=dataclasses.replace(tiny.CONFIG, d_model=768))
    assert numbers_trained(base) == (76_800, 0)
    assert numbers_trained(tiny.replace(base, prompt={"method": "mpt"})) == (77_668, 76_800)


def test_documented_chance_agrees_with_the_tasks():
    documented = reference_scores(("tasks",))
    assert {f"sketch_{name}": (task.chance, task.ceiling) for name, task in sketch.TASKS.items()} == {
        name: (scores["chance"], scores["ceiling"]) for name, scores in documented.items() if name.startswith("sketch_")
    }


# --------------------------------------------------------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def config(folder):
    return study.pipeline(folder, **FEW)


@pytest.fixture(scope="module")
def finished(folder, config) -> Path:
    """A study that has run to its end; tests that change it work on a copy."""
    run_pipeline(config)
    return folder / "study"


@pytest.fixture
def copy(folder, finished):
    """The finished study, moved nowhere: tests may break it and it is put back."""
    spare = folder / "spare"
    shutil.copytree(finished, spare)
    yield finished
    shutil.rmtree(finished)
    spare.rename(finished)


def stamps(folder: Path, kinds=("*.safetensors", "metrics.jsonl", "finished.json")) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for kind in kinds for path in (folder / "runs").rglob(kind)}


def test_results_have_one_whole_line_per_run(finished, config):
    records = results.read(finished / "results.jsonl")
    assert [r["run_id"] for r in records] == [name for stage in stages.plan(config) for name in stage.run_ids]
    assert len((finished / "results.jsonl").read_text().splitlines()) == len(records) == 4 + 16
    for record in records:
        assert 0 <= record["score"] <= 100
        assert record["score"] == record["metrics"]["accuracy"] and 0 <= record["metrics"]["invalid"] <= 100
        assert record["num_examples"] == 6
        assert {"jax", "flax", "mpt_jax"} <= record["versions"].keys()
        assert record["config"]["data"]["batch_size"] == record["batch"]
        assert record["config"]["train"]["model_dir"] == record["folder"]
        assert (finished / record["folder"] / "metrics.jsonl").exists()
        assert record["chance"] > 0  # of the majority class
        assert record["selection_split"] is None
    by_method = {r["method"]: r["params_trained"] for r in records if r["stage"] == "few_shot"}
    assert by_method["mpt"] == by_method["spot"] + 4 + 16
    assert by_method["prompt_tuning"] == by_method["spot"] == 4 * 16
    assert by_method["model_tuning"] > 1000


def test_the_report_is_there(finished):
    for name in ("report.html", "report.md", "figures/scores.png", "figures/training_curves.png", "figures/task_vectors.png"):
        assert (finished / name).stat().st_size > 1000


def test_mpt_starts_from_the_source_run_and_spot_from_its_choice(finished):
    records = [r for r in results.read(finished / "results.jsonl") if r["method"] == "spot"]
    teachers, meta = load_prompts(finished / "runs" / "teachers")
    start, _ = load_prompts(finished / "runs" / "few_shot-k2-spot" / "start.safetensors")
    for n, record in enumerate(records):
        assert record["started_from"] == min(record["source_losses"], key=record["source_losses"].get)
        np.testing.assert_array_equal(start["prompt"][n], teachers["prompt"][meta["tasks"].index(record["started_from"])])
    config = json.loads((finished / "runs" / "few_shot-k2-mpt" / "config.json").read_text())
    assert config["prompt"]["init_file"] == str(finished / "runs" / "source" / "prompts.safetensors")


def test_each_run_can_be_used_by_its_config_gin(finished, config, tmp_path):
    for stage in stages.plan(config):
        assert parse([str(stage.folder / "config.gin")]).experiment() == stage.experiment
    (tmp_path / "in.jsonl").write_text('{"task": "tiny_animal", "inputs": "the cat"}\n')
    files = {"InferConfig.input_file": tmp_path / "in.jsonl", "InferConfig.output_file": tmp_path / "out.jsonl"}
    files |= {"ExportConfig.output": tmp_path / "prompts.safetensors"}
    run = f"--gin_file={finished}/runs/few_shot-k2-mpt/config.gin"
    for command in ("infer", "export"):
        assert cli.main([command, run, *(f"--gin.{name}={value}" for name, value in files.items())]) == 0
    assert "prediction" in (tmp_path / "out.jsonl").read_text()
    assert load_prompts(tmp_path / "prompts.safetensors")[1]["tasks"] == ["tiny_mood"] * 2 + ["tiny_animal"] * 2
    tuned = f"--gin_file={finished}/runs/few_shot-k2-model_tuning-tiny_mood-seed0/config.gin"
    experiment = parse([tuned.partition("=")[2]]).experiment()
    with pytest.raises(UserError, match="PipelineConfig.keep_models"):
        run_evaluate(experiment)


def test_tuned_models_are_dropped_once_scored(finished):
    assert not list((finished / "runs").glob("*model_tuning*/model"))
    assert list((finished / "runs").glob("*model_tuning*/metrics.jsonl"))


def test_a_second_call_redoes_nothing(finished, config):
    before, lines = stamps(finished), (finished / "results.jsonl").read_bytes()
    run_pipeline(config)
    assert stamps(finished) == before
    assert (finished / "results.jsonl").read_bytes() == lines


def test_an_interrupted_study_goes_on_where_it_stopped(copy, config):
    """Stopped while the last stages' results were being written: their lines are cut, one stage's folder is not there."""
    path = copy / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    scores = {r["run_id"]: r["score"] for r in results.read(path)}
    path.write_text("".join(lines[:-9]) + lines[-9][:50])
    shutil.rmtree(copy / "runs" / "few_shot-k2-spot")
    for tuned in (copy / "runs").glob("*model_tuning*"):
        shutil.rmtree(tuned)
    before = stamps(copy)
    run_pipeline(config)
    after = stamps(copy)
    assert before.items() <= after.items()
    records = results.read(path)
    assert len(path.read_text().splitlines()) == len(records) == len(lines)
    assert {r["run_id"]: r["score"] for r in records} == scores


def test_more_seeds_train_only_the_new_runs(copy, config):
    before = stamps(copy)
    few = {"prompt_tuning": config.few_shot["prompt_tuning"]}
    run_pipeline(dataclasses.replace(config, few_shot=few, seeds=(0, 1, 2)))
    assert before.items() <= stamps(copy).items()
    records = [r for r in results.read(copy / "results.jsonl") if r["stage"] == "few_shot"]
    assert len(records) == 16 + 2
    assert sorted({r["seed"] for r in records if r["method"] == "prompt_tuning"}) == [0, 1, 2]


def test_results_of_another_study_are_refused_and_kept(finished, config):
    lines = (finished / "results.jsonl").read_bytes()
    longer = config.few_shot | {"mpt": dataclasses.replace(config.few_shot["mpt"], steps=3)}
    with pytest.raises(UserError, match=r"few_shot/k2/mpt/tiny_mood/seed0 with train.steps=2, but now it is 3"):
        run_pipeline(dataclasses.replace(config, few_shot=longer))
    assert (finished / "results.jsonl").read_bytes() == lines


@pytest.mark.parametrize("left", [0, 1])
def test_another_backbone_is_refused(copy, config, left):
    """Whether or not anything is left to train."""
    path = copy / "results.jsonl"
    lines = [json.loads(line) | {"backbone": "0" * 16} for line in path.read_text().splitlines()]
    lines = lines[: len(lines) - left]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="0000000000000000"):
        run_pipeline(config)


@pytest.mark.parametrize("left", [0, 1])
def test_results_on_other_data_are_refused(copy, config, left):
    path = copy / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = lines[: len(lines) - left]
    lines[0]["data"] = "0" * 16
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"teachers/kall/prompt_tuning/tiny_colour/seed0 on other training or test examples of"):
        run_pipeline(config)


@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 2)])
def test_results_that_were_scored_in_another_way_are_refused(finished, config, seeds):
    """Whether or not anything is left to train; a larger limit that changes nothing is none."""
    lines = (finished / "results.jsonl").read_bytes()
    for changes, words in (
        (
            {"max_test_examples": 3},
            r"/kall/prompt_tuning/tiny_colour/seed0 on 6 test examples, but now, with .*_examples=3, it would be on 3;",
        ),
        ({"test_split": "train"}, r"on the split 'validation', but PipelineConfig\.test_split is 'train' now"),
        ({"test_split": "nonexistent"}, "has no split 'nonexistent'"),
    ):
        with pytest.raises(UserError, match=words):
            run_pipeline(dataclasses.replace(config, seeds=seeds, **changes))
    assert (finished / "results.jsonl").read_bytes() == lines


def test_a_study_is_done_by_one_call_at_a_time(finished, config):
    with Claims(finished / "claims", 60) as claims:
        assert claims.take("study")
        with pytest.raises(UserError, match=rf"Process {os.getpid()} on .* is at work on the study in MODEL_DIR .*; wait until"):
            run_pipeline(config)
    run_pipeline(config)
    assert list((finished / "claims").iterdir()) == []


def test_a_call_that_has_lost_its_study_stops_at_the_next_step(folder):
    few = {"prompt_tuning": StageConfig(500, 4, study.PLAIN)}
    cfg = study.pipeline(folder, "lost", **FEW, few_shot=few)
    claim = folder / "lost" / "claims" / "study.json"

    def take_over() -> None:
        while not list((folder / "lost").glob("runs/*/metrics.jsonl")):
            time.sleep(0.05)
        claim.write_text(json.dumps({"host": "elsewhere", "pid": 7, "token": "theirs"}))

    thread = threading.Thread(target=take_over, daemon=True)
    thread.start()
    with pytest.raises(ClaimLost, match="process 7 on elsewhere has taken over"):
        run_pipeline(dataclasses.replace(cfg, claim_timeout=1))
    thread.join()
    assert not (folder / "lost" / "results.jsonl").exists() and not list((folder / "lost").glob("runs/*/finished.json"))
    assert json.loads(claim.read_text())["token"] == "theirs"


def test_seconds_are_those_of_all_calls(copy, config):
    """Stopped between a stage's training and its results: what the training took is not lost."""
    mark = copy / "runs" / "few_shot-k2-mpt" / "finished.json"
    assert json.loads(mark.read_text())["seconds"] > 0
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"seconds": 4000.0}))
    path = copy / "results.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "few_shot/k2/mpt" not in line))
    run_pipeline(config)
    seconds = [record["seconds"] for record in results.read(path) if record["run_id"].startswith("few_shot/k2/mpt")]
    assert len(seconds) == 4 and all(1000 <= one < 1100 for one in seconds)


def test_a_stage_that_diverges_says_what_to_delete(folder):
    """Until results of its like are there; then only another folder helps."""
    few = {"prompt_tuning": StageConfig(2, 4, ((".*", float("inf")),))}
    cfg = study.pipeline(folder, "diverged", **FEW, few_shot=few, bank_size=2)
    stage = folder / "diverged" / "runs" / "few_shot-k2-prompt_tuning-part1"
    advice = r"Lower the learning rate in PipelineConfig\.few_shot\['prompt_tuning'\]\.rules and "
    with pytest.raises(UserError, match=rf"not finite at step \d .*{advice}delete {stage}\."):
        run_pipeline(cfg)
    first = {"run_id": "few_shot/k9/prompt_tuning/x/seed0", "stage": "few_shot", "method": "prompt_tuning", "task": "x", "k": 9}
    results.append(folder / "diverged" / "results.jsonl", [first | {"seed": 0, "score": 1.0}])
    with pytest.raises(UserError, match=rf"{advice}give another MODEL_DIR, for .*diverged has few_shot/k9"):
        run_pipeline(cfg)


def test_a_misspelt_target_is_told_before_training(folder, config):
    wrong = study.pipeline(folder, "misspelt", **FEW, targets=("tiny_moood",))
    with pytest.raises(UserError, match=r"Did you mean 'tiny_mood'\? .*PipelineConfig\.sources, PipelineConfig\.targets or"):
        run_pipeline(wrong)
    assert not (folder / "misspelt" / "runs").exists()


def test_a_missing_test_split_is_told_before_any_cache_is_built(folder):
    cfg = study.pipeline(folder, "no_test", **FEW, targets=("tiny_mood", "tiny_word"))
    cfg = dataclasses.replace(cfg, base=tiny.replace(cfg.base, data={"cache_dir": str(folder / "no_cache_yet")}))
    with pytest.raises(UserError, match="'tiny_word' has no split 'validation'"):
        run_pipeline(cfg)
    assert not (folder / "no_cache_yet" / "tiny_mood").exists()


def test_a_study_may_rank(folder):
    """Targets with 2 and 3 labels in one bank; a target without labels is told before anything is trained."""
    few = {"prompt_tuning": StageConfig(1, 4, study.PLAIN)}
    cfg = study.pipeline(folder, "ranked", **FEW, few_shot=few, seeds=(0,))
    cfg = dataclasses.replace(cfg, base=tiny.replace(cfg.base, decode={"method": "rank"}))
    run_pipeline(cfg)
    records = results.read(folder / "ranked" / "results.jsonl")
    [stage] = stages.plan(cfg)
    test = tiny.replace(stage.experiment, train={"max_eval_examples": cfg.max_test_examples})
    assert [record["score"] for record in records] == [row["score"] for row in run_evaluate(test)["tasks"]]
    wrong = tiny.replace(cfg.base, train={"model_dir": str(folder / "unranked")})
    with pytest.raises(UserError, match=r"Task 'tiny_free' has no label set to rank"):
        run_pipeline(dataclasses.replace(cfg, base=wrong, targets=("tiny_mood", "tiny_free")))
    assert not (folder / "unranked" / "runs").exists()


def test_results_say_where_a_class_has_fewer_than_k_examples(folder, caplog):
    """64 examples of 2 or 3 classes have no 40 of each; the report says so, the log once for each task."""
    few = {"prompt_tuning": StageConfig(1, 4, study.PLAIN)}
    run_pipeline(study.pipeline(folder, "scarce", k_shots=(40,), few_shot=few, sources=study.SOURCES[:1]))
    for record in results.read(folder / "scarce" / "results.jsonl"):
        assert len(record["scarce"]) == {"tiny_mood": 2, "tiny_animal": 3}[record["task"]]
        assert sum(record["scarce"].values()) == 64
    assert sum("all are taken for k = 40" in message for message in caplog.messages) == 2
    assert "fewer than k = 40" in (folder / "scarce" / "report.md").read_text()


def test_chance_is_what_the_best_single_label_scores(folder, config):
    """Of the examples that are scored and by the task's own metrics, here CB's; what is documented comes first."""
    backbone = setup.open_backbone(config.base, setup.mesh_of(config.base))
    vocabulary = setup.open_vocabulary(config.base, backbone)
    verdict, free, silent = (
        setup.open_caches(config.base, [task], "validation", vocabulary)[0]
        for task in ("tiny_verdict", "tiny_free", "tiny_no_metric")
    )
    for size in (0, 7):
        labels = [verdict.target_text(int(i)) for i in examined(len(verdict), size)]
        most = max(labels.count(label) for label in labels) / len(labels)
        f1 = 2 * most / (most + 1) / len(set(labels))
        got = reference_of({}, verdict, size)
        assert got == {"chance": pytest.approx(100 * (most + f1) / 2), "ceiling": None}
    assert reference_of({"chance": 12, "ceiling": 90}, verdict, 0) == {"chance": 12, "ceiling": 90}
    assert reference_of({}, free, 0)["chance"] is reference_of({}, silent, 0)["chance"] is None


def test_the_report_can_be_rebuilt_from_the_results_alone(finished, tmp_path):
    shutil.copy(finished / "results.jsonl", tmp_path)
    assert "MPT" in write_report(tmp_path).read_text()


# ------------------------------------------------------------------------------------------------------------ SPoT's choice


def test_prompt_losses_do_not_depend_on_the_batch(folder, config):
    """A partly filled last batch counts its own examples only, and every token counts the same."""
    backbone = setup.open_backbone(config.base, setup.mesh_of(config.base))
    vocabulary = setup.open_vocabulary(config.base, backbone)
    cache = setup.open_caches(config.base, ["tiny_colour"], "train", vocabulary)[0]
    prompts = np.asarray(jax.random.normal(jax.random.key(0), (3, 4, tiny.CONFIG.d_model)))
    rows = np.arange(5)
    together = transfer.prompt_losses(backbone, prompts, cache, rows, tiny.LENGTHS, batch_size=4)
    alone = [transfer.prompt_losses(backbone, prompts, cache, rows[i : i + 1], tiny.LENGTHS, batch_size=4) for i in rows]
    tokens = np.array([[len(cache.targets(int(i)))] for i in rows])
    np.testing.assert_allclose(together, (np.array(alone) * tokens).sum(0) / tokens.sum(), rtol=1e-5)
    assert len(set(together.tolist())) == 3


def test_a_part_of_the_test_set_has_all_labels():
    """Generated and published files often alternate their labels, so that every n-th row may have one and the same."""
    for classes in (2, 3):
        labels = np.arange(600) % classes
        for size in (60, 150, 200, 300):
            rows = examined(600, size)
            assert len(set(rows.tolist())) == size
            assert np.bincount(labels[rows], minlength=classes).min() > 0.7 * size / classes


def test_a_choice_for_another_study_is_not_read_back(copy, config):
    start = copy / "runs" / "few_shot-k2-spot" / "start.safetensors"
    params, meta = load_prompts(start)
    path = copy / "results.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"spot"' not in line))
    for change in ({"tasks": ["x"] * 4}, {"seeds": [0, 7, 0, 7]}, {"teachers": "0" * 16}):
        save_prompts(start, params, meta | change)
        with pytest.raises(UserError, match=rf"was made with other {next(iter(change))} than .*; delete {start.parent}, or"):
            run_pipeline(config)
