"""How a sweep's cells become points and jobs: each run once, together where it can be, the same however the sweep is extended."""

import dataclasses
from pathlib import Path

import pytest
import study
import tiny

from mpt_jax import jobs
from mpt_jax.config import StageConfig
from mpt_jax.stages import plan, run_config


def cell(rate=0.3, mpt=False, prompt=None, **changes):
    """A study of prompt tuning (and MPT) with k = 2 in a folder of its own."""
    few = {"prompt_tuning": StageConfig(3, 4, ((".*", rate),))} | (
        {"mpt": study.pipeline(Path("f")).few_shot["mpt"]} if mpt else {}
    )
    config = study.pipeline(Path("f"), k_shots=(2,), few_shot=few, **changes)
    return dataclasses.replace(config, base=tiny.replace(config.base, prompt=prompt or {}))


def banks(cells):
    return [job for job in jobs.plan_jobs(cells) if not job.points[0].stage.is_source]


def test_lengths_starts_and_rates_share_a_bank_and_are_what_each_alone_would_be():
    cells = [
        cell(prompt={"length": length, "init": init}, rate=rate)
        for length in (2, 4)
        for init, rate in (("uniform", 0.3), ("vocab", 0.1))
    ]
    (job,) = banks(cells)
    assert len(job.points) == 4 * 4  # two tasks of two seeds each
    stage = job.stage()
    assert stage.experiment.prompt.length == 4 and stage.experiment.data.batch_size == 16 * 4
    stage.experiment.validate()
    for n, point in enumerate(job.points):
        (number,) = point.cells
        (single,) = plan(cells[number])
        index = single.runs.index(stage.runs[n])
        mine, theirs = (run_config(one, place, "f") | {"train": 0} for one, place in ((stage, n), (single, index)))
        assert mine == theirs


def test_what_a_bank_cannot_have_of_its_own_makes_another():
    base = cell()
    steps = dataclasses.replace(base, few_shot={"prompt_tuning": StageConfig(5, 4, study.PLAIN)})
    loss = dataclasses.replace(base, base=tiny.replace(base.base, loss={"z_loss": 1e-4}))
    assert len(banks([base, steps, loss])) == 3
    assert [len(job.points) for job in banks([dataclasses.replace(base, bank_size=3)])] == [3, 1]


def test_cells_share_what_does_not_depend_on_their_axis():
    """MPT's rank is nothing to prompt tuning or to the teachers, but to the source training and to MPT's targets."""
    cells = [cell(mpt=True, prompt={"rank": rank}) for rank in (1, 2)]
    points = jobs.collect(cells)
    by_kind: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for point in points:
        by_kind.setdefault((point.stage.kind, point.stage.method), set()).add(point.cells)
    assert by_kind == {
        ("teachers", "prompt_tuning"): {(0, 1)},
        ("source", "mpt"): {(0,), (1,)},
        ("few_shot", "mpt"): {(0,), (1,)},
        ("few_shot", "prompt_tuning"): {(0, 1)},
    }


def test_sources_come_before_what_starts_from_them_and_are_found_in_their_folders():
    cells = [cell(mpt=True, prompt={"length": length}) for length in (2, 4)]
    planned = jobs.plan_jobs(cells)
    known: dict[str, jobs.Point] = {}
    for job in planned:
        assert job.needs <= known.keys()
        for point in job.points:
            known[point.key] = point
    for job in planned:
        stage = job.stage()
        if stage.kind == "source":
            (teacher,) = (known[key] for key in job.needs)
            assert stage.experiment.loss.teachers == str(teacher.stage.folder)
        elif stage.method == "mpt":
            sources = [known[key] for key in job.needs]
            assert stage.experiment.prompt.init_file in {f"{source.stage.folder}/prompts.safetensors" for source in sources}
            assert {source.stage.experiment.prompt.length for source in sources} == {stage.experiment.prompt.length}
    assert len({str(job.stage().folder) for job in planned}) == len(planned)


def test_a_point_keeps_its_key_when_the_sweep_grows_or_free_settings_change():
    small = {point.key for point in jobs.collect([cell()])}
    grown = jobs.collect([cell(seeds=(0, 1, 2)), cell(rate=0.1)])
    assert small < {point.key for point in grown}
    elsewhere = cell()
    elsewhere = dataclasses.replace(
        elsewhere, base=tiny.replace(elsewhere.base, train={"log_period": 2}, decode={"batch_size": 3})
    )
    assert {point.key for point in jobs.collect([elsewhere])} == small
    other = cell()
    other = dataclasses.replace(other, base=tiny.replace(other.base, data={"seed": 9}))
    assert not {point.key for point in jobs.collect([other])} & small


def test_a_stage_s_own_warm_up_and_start_make_other_points_of_its_kind_alone():
    base = cell(mpt=True)
    before = {point.key: point.stage for point in jobs.collect([base])}
    for change in ({"warmup_steps": 1}, {"init": "uniform"}):
        source = dataclasses.replace(base, source=dataclasses.replace(base.source, **change))
        new = [point.stage for point in jobs.collect([source]) if point.key not in before]
        assert {(stage.kind, stage.method) for stage in new} == {
            ("source", "mpt"),
            ("few_shot", "mpt"),
        }  # and what starts from it
        few = {"prompt_tuning": dataclasses.replace(base.few_shot["prompt_tuning"], **change)}
        tuned = dataclasses.replace(base, few_shot=base.few_shot | few)
        new = [point.stage for point in jobs.collect([tuned]) if point.key not in before]
        assert {(stage.kind, stage.method) for stage in new} == {("few_shot", "prompt_tuning")} and len(new) == 4
    named = dataclasses.replace(base, source=dataclasses.replace(base.source, warmup_steps=0, init="vocab"))
    assert {point.key for point in jobs.collect([named])} == set(before)  # the run's own, named


def test_what_is_scored_in_another_way_is_another_point_in_another_bank():
    cells = [cell(max_test_examples=size, test_split=split) for size, split in ((6, "test"), (7, "test"), (6, "validation"))]
    assert [job.points[0].cells for job in banks(cells)] == [(0,), (1,), (2,)]
    assert len({point.key for job in banks(cells) for point in job.points}) == 3 * 4


@pytest.mark.parametrize("chosen", [(0,), (1, 2), (3, 0)])
def test_a_part_of_a_job_is_trained_in_a_folder_of_its_own(chosen):
    (job,) = banks([cell()])
    part = job.only([job.points[n].key for n in chosen])
    assert [point.key for point in part.points] == [job.points[n].key for n in sorted(chosen)]
    assert part.stage().folder != job.stage().folder and len(part.stage().runs) == len(chosen)
    assert part.stage() == job.only([job.points[n].key for n in chosen]).stage()
