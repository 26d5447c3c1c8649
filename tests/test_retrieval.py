"""What SPoT starts from: the ranking of the sources and what is made of the first of them; and MPT without decomposition."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import study
import tiny

from mpt_jax import jobs, setup, study_checks, transfer
from mpt_jax.config import RetrievalConfig, StageConfig, SweepConfig
from mpt_jax.errors import UserError
from mpt_jax.evaluate import examined, run_evaluate
from mpt_jax.gin_bindings import parse
from mpt_jax.pipeline import chosen_groups, run_pipeline
from mpt_jax.prompts.files import load_prompts
from mpt_jax.stages import plan
from mpt_jax.studies import results
from mpt_jax.studies.tables import start_table
from mpt_jax.sweep import Cell, run_sweep
from mpt_jax.train import TrainResult

SHORT = StageConfig(2, 4, study.PLAIN)
STAGES = {"embedding": SHORT, "mixture": SHORT}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make_attentive(tmp_path_factory.mktemp("retrieval"))


def spot(folder, run, seeds=(0,), retrieval=None, **changes):
    """SPoT on all examples of two targets, validated after every step; labels are ranked, so that few scores are 0."""
    cfg = study.pipeline(folder, run, k_shots=(0,), full_seeds=seeds, full_data={"spot": SHORT}, **changes)
    base = tiny.replace(cfg.base, train={"eval_period": 1}, decode={"method": "rank"})
    return dataclasses.replace(cfg, base=base, retrieval=retrieval or RetrievalConfig(stages=STAGES))


def finished(folder, run, seeds=(0,), **settings):
    """(configuration, the results of its SPoT runs, the folder of its SPoT stage) of a study that is done."""
    cfg = spot(folder, run, seeds, RetrievalConfig(stages=STAGES, **settings))
    run_pipeline(cfg)
    records = results.select(results.read(folder / run / "results.jsonl"), method="spot")
    return cfg, records, plan(cfg)[-1].folder


def teachers_of(folder, run):
    params, meta = load_prompts(folder / run / "runs" / "teachers")
    return dict(zip(meta["tasks"], params["prompt"], strict=True))


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_weights_are_shares_of_the_similarities_or_of_the_likelihoods():
    values = np.array([[0.6, 0.2, 0.2], [0.5, -0.1, -0.3], [-0.1, -0.2, -0.3]])
    expected = [[0.6, 0.2, 0.2], [1, 0, 0], [1 / 3] * 3]
    np.testing.assert_allclose(transfer.average_weights(values, "per_token"), expected)
    likelihoods = np.array([[0.5, 0.3, 0.2], [0.01, 0.002, 0.001]])
    weights = transfer.average_weights(-np.log(likelihoods), "loss")
    np.testing.assert_allclose(weights, likelihoods / likelihoods.sum(axis=1, keepdims=True))


def test_the_best_of_all_sources_is_the_one_with_the_best_validation_score(folder):
    """SPoT's oracle: a run from every source."""
    cfg, records, where = finished(folder, "oracle", (0, 1, 2), top=0)
    teachers, (start, _) = teachers_of(folder, "oracle"), load_prompts(where / "start.safetensors")
    trained, meta = load_prompts(where)
    assert meta["tasks"] == ["tiny_mood"] * 6 + ["tiny_animal"] * 6
    assert not np.array_equal(trained["prompt"][0], trained["prompt"][1])
    for n, record in enumerate(records):
        order = sorted(record["source_losses"], key=record["source_losses"].get)
        for place, source in enumerate(order):
            np.testing.assert_array_equal(start["prompt"][2 * n + place], teachers[source])
        scores = meta["scores"][2 * n : 2 * n + 2]
        assert record["tried"] == dict(zip(order, scores, strict=True))
        assert record["group"] == 2 * n + int(scores[1] > scores[0])
        assert record["started_from"] == order[record["group"] - 2 * n]
    base = parse([str(where / "config.gin")]).experiment()
    again = run_evaluate(tiny.replace(base, data={"eval_split": "validation"}, train={"max_eval_examples": 6}))
    assert [again["tasks"][record["group"]]["score"] for record in records] == [record["score"] for record in records]
    before = (folder / "oracle" / "results.jsonl").read_bytes()
    run_pipeline(cfg)
    assert (folder / "oracle" / "results.jsonl").read_bytes() == before


def test_losses_are_of_as_many_training_examples_as_configured(folder):
    """All of them by default, for there are 64; of two, those of a run of their own, whatever the order of the rest."""
    by_size = {size: finished(folder, f"examples{size}", max_examples=size) for size in (0, 2, 64, 256)}
    losses = {size: [record["source_losses"] for record in records] for size, (_, records, _) in by_size.items()}
    assert losses[0] == losses[64] == losses[256] != losses[2]
    cfg, _, _ = by_size[2]
    backbone = setup.open_backbone(cfg.base, setup.mesh_of(cfg.base))
    vocabulary = setup.open_vocabulary(cfg.base, backbone)
    prompts = load_prompts(folder / "examples2" / "runs" / "teachers")[0]["prompt"]
    for run, found in zip(plan(cfg)[-1].runs, losses[2], strict=True):
        cache = setup.open_caches(cfg.base, [run.task], "train", vocabulary)[0]
        rows = examined(len(cache), 2)
        expected = transfer.prompt_losses(backbone, np.asarray(prompts), cache, rows, tiny.LENGTHS, batch_size=2)
        np.testing.assert_allclose(list(found.values()), expected, rtol=1e-5)


def test_of_several_tries_the_one_with_the_best_validation_score_is_scored():
    stage = plan(spot(Path("f"), "x", seeds=(0, 1), retrieval=RetrievalConfig(top=2)))[-1]
    scores = np.array([50.0, 60.0, 70.0, 65.0, 10.0, 10.0, 20.0, 30.0])
    assert chosen_groups(stage, TrainResult({}, Path("f"), [], scores, 0.0)) == [1, 2, 4, 7]


@pytest.mark.parametrize("by", ["average_token", "per_token"])
def test_an_average_is_weighted_by_the_similarity_to_a_prompt_of_the_targets_own(folder, by):
    _, records, where = finished(folder, f"average-{by}", by=by, top=2, use="average")
    teachers, (start, _) = teachers_of(folder, f"average-{by}"), load_prompts(where / "start.safetensors")
    own, meta = load_prompts(where / "embedding")
    assert meta["tasks"] == list(study.TARGETS) and meta["steps"] == 2
    for n, record in enumerate(records):
        mine, expected = own["prompt"][n], {}
        for source, prompt in teachers.items():
            if by == "average_token":
                expected[source] = cosine(mine.mean(axis=0), prompt.mean(axis=0))
            else:
                expected[source] = float(np.mean([[cosine(a, b) for b in prompt] for a in mine]))
        np.testing.assert_allclose(
            [record["source_similarities"][source] for source in expected], list(expected.values()), atol=1e-5
        )
        order = sorted(expected, key=expected.get, reverse=True)
        assert record["started_from"] == " + ".join(order)
        weights = np.maximum([expected[source] for source in order], 0)
        weights = weights / weights.sum() if weights.sum() else np.full(2, 0.5)
        mean = sum(weight * teachers[source] for weight, source in zip(weights, order, strict=True))
        np.testing.assert_allclose(start["prompt"][n], mean, rtol=1e-4, atol=1e-5)


def test_a_mixture_is_a_prompt_trained_on_the_chosen_sources_and_the_target(folder):
    cfg = spot(folder, "mixture", retrieval=RetrievalConfig(top=0, use="mixture", stages=STAGES))
    cfg = dataclasses.replace(cfg, k_shots=(2,), seeds=(0, 3), few_shot={"spot": SHORT})
    run_pipeline(cfg)
    where = plan(cfg)[-1].folder
    trained, _ = load_prompts(where / "mixture")
    start, _ = load_prompts(where / "start.safetensors")
    np.testing.assert_array_equal(start["prompt"], trained["prompt"])
    streams = parse([str(where / "config.gin")]).experiment().data.streams
    assert [(s.task, s.k_shot, s.seed) for s in streams] == [(t, 2, s) for t in study.TARGETS for s in (0, 3)]
    config = json.loads((where / "mixture" / "config.json").read_text())
    for n, stream in enumerate(streams):
        own = [s for s in config["data"]["streams"] if s["group"] == n]
        assert sorted((s["task"], s["k_shot"]) for s in own) == sorted(
            [*((source, 0) for source in study.SOURCES), (stream.task, 2)]
        )
        assert {s["seed"] for s in own} == {stream.seed}
    assert config["data"]["batch_size"] == SHORT.batch_size * len(streams) * 3
    (table,) = [start_table(results.select(results.read(folder / "mixture" / "results.jsonl"), method="spot"), {})]
    assert "a prompt trained on the target's examples and those of the 2 source tasks" in table.caption
    assert "tiny_colour + tiny_mood × " in " ".join(cell.text for row in table.rows for cell in row) or (
        "tiny_mood + tiny_colour × " in " ".join(cell.text for row in table.rows for cell in row)
    )


@pytest.mark.parametrize(
    ("retrieval", "changes", "sentence"),
    [
        ({"by": "lose"}, {}, r"RetrievalConfig.by must be one of loss, average_token, per_token, not 'lose'"),
        ({"use": "mean"}, {}, r"RetrievalConfig.use must be one of best, average, mixture, not 'mean'"),
        ({"top": 3}, {}, r"RetrievalConfig.top must be from 0 \(all\) to 2, the number of PipelineConfig.sources, not 3"),
        ({"by": "per_token", "stages": {}}, {}, r"by='per_token' takes a training .* lacks; add 'embedding': @StageConfig\(\)"),
        ({"use": "mixture", "stages": {}}, {}, r"use='mixture' takes a training .* lacks; add 'mixture': @StageConfig\(\)"),
        ({"max_examples": -1}, {}, r"RetrievalConfig.max_examples must not be negative \(0 = all\), not -1"),
        ({"by": "per_token", "stages": {"embedding": dataclasses.replace(SHORT, steps=0)}}, {}, r"\['embedding'\] is 0"),
        ({"stages": {"mixtures": SHORT}}, {}, r"stages has 'mixtures'; it may have 'embedding' and 'mixture'"),
        ({"top": 0}, {"eval_period": 0}, r"TrainConfig.eval_period=0 makes no validation; give RetrievalConfig.top=1 or"),
        ({"top": 2}, {"k_shots": (0, 2)}, r"few-shot runs \(k = 2\) have no validation; .* leave SPoT to k_shots=\(0,\)"),
    ],
)
def test_a_retrieval_that_cannot_be_is_told_before_anything_is_trained(retrieval, changes, sentence):
    cfg = spot(Path("f"), "x", retrieval=RetrievalConfig(**({"stages": STAGES} | retrieval)))
    if "eval_period" in changes:
        cfg = dataclasses.replace(cfg, base=tiny.replace(cfg.base, train=changes))
    else:
        cfg = dataclasses.replace(cfg, few_shot={"spot": SHORT}, **changes)
    with pytest.raises(UserError, match=sentence):
        plan(cfg)


def test_cells_of_other_retrievals_are_other_points_in_other_banks():
    def cell(**settings):
        return spot(Path("f"), "x", retrieval=RetrievalConfig(**({"stages": STAGES} | settings)))

    cells = [cell(), cell(top=2), cell(stages={}), cell(use="average", top=2), cell(by="per_token")]
    cells.append(cell(use="average"))  # the mean of one prompt
    cells.append(cell(by="per_token", max_examples=9))  # of which only losses are
    banks = [job for job in jobs.plan_jobs(cells) if not job.points[0].stage.is_source]
    # what is not used of `stages` makes no difference; each bank has the two targets
    assert [(len(job.points), job.points[0].cells) for job in banks] == [(2, (0, 2, 5)), (2, (1,)), (2, (3,)), (2, (4, 6))]
    assert [job.stage().tries for job in banks] == [1, 2, 1, 1]
    longer = cell(by="per_token", stages={"embedding": StageConfig(3, 4, study.PLAIN)})
    assert len({point.key for job in jobs.plan_jobs([cells[4], longer]) for point in job.points}) == 1 + 4


def test_a_bank_s_size_counts_all_that_its_runs_try():
    cfg = dataclasses.replace(spot(Path("f"), "x", seeds=(0, 1), retrieval=RetrievalConfig(top=2)), bank_size=2)
    stages = [stage for stage in plan(cfg) if stage.method == "spot"]
    assert [len(stage.runs) for stage in stages] == [1] * 4
    assert [len(stage.trainings[-1].data.streams) for stage in stages] == [2] * 4
    assert [len(job.points) for job in jobs.plan_jobs([cfg]) if not job.points[0].stage.is_source] == [1] * 4


def test_all_that_a_retrieval_trains_is_checked_and_counted():
    """A mixture of two sources and the target has three streams of four examples each, for each of two runs."""
    cfg = spot(Path("f"), "x", retrieval=RetrievalConfig("per_token", 2, "mixture", STAGES))
    stage = plan(cfg)[-1]
    assert [one.data.batch_size for one in stage.trainings] == [8, 24, 8]
    assert stage.cost({}) == 2 * (8 + 24 + 8)
    for change in ({"rules": (("(", 0.3),)}, {"steps": -1}, {"batch_size": 0}, {"optimizer": "adamx"}):
        for kind in STAGES:
            wrong = STAGES | {kind: dataclasses.replace(SHORT, **change)}
            with pytest.raises(UserError):
                plan(dataclasses.replace(cfg, retrieval=dataclasses.replace(cfg.retrieval, stages=wrong)))


def test_every_measure_and_use_is_known_everywhere():
    assert set(study_checks.MEASURES) == {"loss", *transfer.SIMILARITIES}
    captions = set()
    for by in study_checks.MEASURES:
        for use in study_checks.USES:
            record = {"task": "t", "k": 0, "stage": "full", "method": "spot", "started_from": "s", "seed": 0}
            captions.add(start_table([record | {"config": {"retrieval": {"by": by, "top": 2, "use": use}}}], {}).caption)
    assert len(captions) == 9


def test_a_sweep_s_points_have_the_results_of_their_own_runs(folder):
    """Where several prompts are tried for a run, its prompt's number in the bank is not the run's."""
    base = spot(folder, "swept", seeds=(0, 1))
    cells = [Cell({"top": top}, dataclasses.replace(base, retrieval=RetrievalConfig(top=top))) for top in (1, 2)]
    run_sweep(SweepConfig(axes={"top": (1, 2)}), cells)
    planned = jobs.plan_jobs([cell.study for cell in cells])
    for point in (point for job in planned for point in job.points if not point.stage.is_source):
        (record,) = json.loads((folder / "swept" / "points" / f"{point.key}.json").read_text())
        assert (record["run_id"],) == point.stage.run_ids
        assert ("tried" in record) == (point.stage.tries == 2)
    assert len(results.select(results.read(folder / "swept" / "results.jsonl"), method="spot")) == 2 * 4


def test_without_decomposition_sources_share_one_plain_prompt_that_targets_start_from(folder):
    few = {"mpt": StageConfig(1, 4, study.PLAIN)}
    cfg = study.pipeline(
        folder, "whole", k_shots=(2,), few_shot=few, decompose=False, source=StageConfig(2, 8, study.PLAIN, "adamw")
    )
    run_pipeline(cfg)
    source, meta = load_prompts(folder / "whole" / "runs" / "source")
    assert source["prompt"].shape == (1, 4, 16) and meta["tasks"] == list(study.SOURCES) and set(meta["groups"]) == {0}
    stage = plan(cfg)[-1]
    untrained = tiny.replace(stage.experiment, train={"steps": 1, "model_dir": str(folder / "frozen")})
    start = transfer.run_training(tiny.replace(untrained, optimizer={"rules": ((".*", 0.0),)})).params["prompt"]
    np.testing.assert_array_equal(start, np.repeat(source["prompt"], 4, axis=0))
    records = results.select(results.read(folder / "whole" / "results.jsonl"), method="mpt", stage="few_shot")
    assert {(record["params_trained"], record["params_shared"]) for record in records} == {(4 * 16, 0)}
