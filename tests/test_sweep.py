"""A sweep from end to end on the tiny setting: what it leaves, and what a second, a killed and a parallel call do."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import study
import tiny

from mpt_jax import cli, plan
from mpt_jax.board import Board
from mpt_jax.config import StageConfig, SweepConfig
from mpt_jax.errors import UserError
from mpt_jax.gin_bindings import parse_cells
from mpt_jax.gin_text import config_text
from mpt_jax.hardware import find_slice
from mpt_jax.jobs import plan_jobs
from mpt_jax.pipeline import check_study
from mpt_jax.progress import read_history
from mpt_jax.studies import results
from mpt_jax.sweep import Cell, _Worker, check_sweep, run_sweep
from mpt_jax.sweep_cost import cost_of, describe

LENGTHS = (2, 4)
SWEEP = SweepConfig(axes={"PROMPT_LENGTH": LENGTHS})
ROOT = Path(__file__).parent.parent
WHERE = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}}  # of another process


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("sweep"))


def cells_of(folder: Path, run: str, lengths=LENGTHS, **changes) -> list[Cell]:
    """Studies of MPT and prompt tuning, k = 2, two targets and two seeds, for each length."""
    few = {method: study.pipeline(folder).few_shot[method] for method in ("mpt", "prompt_tuning")}
    cells = []
    for length in lengths:
        config = study.pipeline(folder, run, **{"k_shots": (2,), "few_shot": few} | changes)
        config = dataclasses.replace(config, base=tiny.replace(config.base, prompt={"length": length}))
        cells.append(Cell({"PROMPT_LENGTH": length}, config))
    return cells


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    run_sweep(SWEEP, cells_of(folder, "whole"))
    return folder / "whole"


def scores(folder: Path) -> dict[str, float]:
    return {record["run_id"]: record["score"] for record in results.read(folder / "results.jsonl")}


def test_there_is_a_result_for_every_cell_run_and_source(finished):
    records = results.read(finished / "results.jsonl")
    assert len(records) == 2 * (2 + 2 + 4 + 4) == len(scores(finished))
    for record in records:
        length = record["cell"]["PROMPT_LENGTH"]
        assert record["run_id"].startswith(f"PROMPT_LENGTH={length}: ")
        assert record["config"]["prompt"]["length"] == length
        extra = length + 16 if record["method"] == "mpt" else 0
        assert record["params_trained"] == 16 * length + extra
    banks = list((finished / "runs").glob("few_shot-prompt_tuning-*"))
    assert len(banks) == 1  # both lengths side by side
    for name in ("report.html", "report.md", "figures/score_by_axis.png", "figures/parameters.png"):
        assert (finished / name).stat().st_size > 500


def test_a_point_of_a_mixed_bank_is_what_a_study_of_its_length_trains(folder, finished):
    """The losses of each prompt, for its own length alone."""
    run_sweep(SWEEP, cells_of(folder, "alone", lengths=(2,)))
    apart = {r["run_id"]: r for r in results.read(folder / "alone" / "results.jsonl")}
    checked = 0
    for record in results.read(finished / "results.jsonl"):
        other = apart.get(record["run_id"])
        if other is None:
            continue
        histories = [read_history(root / r["folder"]) for root, r in ((finished, record), (folder / "alone", other))]
        losses = [
            [line["losses"][r["group"]] for line in h]
            for h, r in zip(histories, (record, other), strict=True)
            if "losses" in h[0]
        ]
        if len(losses) == 2:
            np.testing.assert_allclose(*losses, rtol=1e-4)
            checked += 1
    assert checked == 2 + 4 + 4  # all but the source training, whose streams share one group


def test_a_second_call_redoes_nothing_and_a_larger_sweep_only_what_is_new(folder, finished):
    before = {path: path.stat().st_mtime_ns for kind in ("points", "runs") for path in (finished / kind).rglob("*.json*")}
    text = (finished / "results.jsonl").read_bytes()
    run_sweep(SWEEP, cells_of(folder, "whole"))
    assert (finished / "results.jsonl").read_bytes() == text
    assert {path: path.stat().st_mtime_ns for path in before} == before
    copy = folder / "larger"
    shutil.copytree(finished, copy)
    # A copied sweep's paths name the folder that it was made in; so the larger one runs where it is.
    spare = folder / "spare"
    finished.rename(spare)
    copy.rename(finished)
    try:
        run_sweep(SWEEP, cells_of(folder, "whole", seeds=(0, 1, 2)))
        grown = scores(finished)
        old = {record["run_id"]: record["score"] for record in map(json.loads, text.decode().splitlines())}
        assert old.items() <= grown.items() and len(grown) == len(old) + 2 * 2 * 2
    finally:
        shutil.rmtree(finished)
        spare.rename(finished)


def test_a_point_that_diverges_does_not_stop_the_rest(folder):
    """The points of its bank are trained one by one; the call ends with a sentence, and the next one tries it again."""
    cells = []
    for rate in (1e-6, 1.0):
        few = {"prompt_tuning": StageConfig(6, 4, ((".*", rate),))}
        config = study.pipeline(folder, "failing", k_shots=(2,), few_shot=few, targets=("tiny_mood",), seeds=(0,))
        config = dataclasses.replace(config, base=tiny.replace(config.base, train={"spike_factor": 1.001, "spike_window": 1}))
        cells.append(Cell({"rate": rate}, config))
    with pytest.raises(UserError, match=r"1 of 2 points failed; the first, few_shot/k2/prompt_tuning/tiny_mood/seed0, 4 tokens"):
        run_sweep(dataclasses.replace(SWEEP, axes={"rate": (1e-6, 1.0)}), cells)
    (record,) = results.read(folder / "failing" / "results.jsonl")
    assert record["cell"] == {"rate": 1e-6}
    (failure,) = (folder / "failing" / "failures").iterdir()
    assert "times its running median" in json.loads(failure.read_text())["error"]
    assert list((folder / "failing" / "claims").iterdir()) == []


def test_what_starts_from_a_failed_source_fails_and_the_rest_is_done(folder):
    wild = StageConfig(2, 8, (("shared", float("inf")), ("task_.*", float("inf"))), "adamw")
    cells = cells_of(folder, "orphans", lengths=(4,), source=wild)
    with pytest.raises(UserError, match="5 of 10 points failed; the first, MPT source training"):
        run_sweep(SWEEP, cells)
    methods = {record["method"] for record in results.read(folder / "orphans" / "results.jsonl")}
    assert methods == {"prompt_tuning"}
    errors = [json.loads(path.read_text())["error"] for path in (folder / "orphans" / "failures").iterdir()]
    assert sum(error.startswith("What it starts from has failed") for error in errors) == 4


def one_run_cells(folder: Path, run: str, targets=("tiny_mood",)) -> list[Cell]:
    """Two cells of other learning rates, in a bank each."""
    cells = []
    for rate in (0.1, 0.3):
        few = {"prompt_tuning": StageConfig(1, 4, ((".*", rate),))}
        config = study.pipeline(folder, run, k_shots=(2,), few_shot=few, targets=targets, seeds=(0,), bank_size=1)
        cells.append(Cell({"rate": rate}, config))
    return cells


def test_a_file_that_cannot_be_written_fails_its_point_and_the_rest_is_done(folder):
    cells = one_run_cells(folder, "unwritable")
    job, _ = plan_jobs([cell.study for cell in cells])
    (job.stage().folder / "config.gin").mkdir(parents=True)
    with pytest.raises(UserError, match=r"1 of 2 points failed; the first, .*: .*config.gin"):
        run_sweep(dataclasses.replace(SWEEP, axes={"rate": (0.1, 0.3)}), cells)
    (record,) = results.read(folder / "unwritable" / "results.jsonl")
    assert record["cell"] == {"rate": 0.3} and (record["sweep"]["missing"], record["sweep"]["failed"]) == (1, 1)
    assert list((folder / "unwritable" / "claims").iterdir()) == []


def test_a_bug_ends_the_call_and_gives_its_claims_back(folder):
    """Here one in the metric of a task: it is no failed point, which would look like a matter of the point."""
    with pytest.raises(TypeError, match="a bug in a metric"):
        run_sweep(dataclasses.replace(SWEEP, axes={"rate": (0.1, 0.3)}), one_run_cells(folder, "buggy", ("tiny_bug",)))
    for name in ("claims", "failures", "points"):
        assert list((folder / "buggy" / name).iterdir()) == []


def test_cells_with_different_targets_share_a_bank_and_each_is_scored_on_its_own(folder):
    """Each run's score is that of the same sweep's cell alone."""
    few = {"prompt_tuning": StageConfig(2, 4, study.PLAIN)}
    axis = "PipelineConfig.targets"
    cells = [
        Cell({axis: targets}, study.pipeline(folder, "targets", k_shots=(2,), few_shot=few, targets=targets, seeds=(0,)))
        for targets in (("tiny_mood",), ("tiny_animal", "tiny_mood"))
    ]
    report = run_sweep(dataclasses.replace(SWEEP, axes={axis: tuple(cell.axes[axis] for cell in cells)}), cells)
    records = results.read(folder / "targets" / "results.jsonl")
    assert [(record["cell"][axis], record["task"]) for record in records] == [
        (["tiny_mood"], "tiny_mood"),
        (["tiny_animal", "tiny_mood"], "tiny_mood"),
        (["tiny_animal", "tiny_mood"], "tiny_animal"),
    ]
    assert len({record["folder"] for record in records}) == 1
    alone = study.pipeline(folder, "target", k_shots=(2,), few_shot=few, targets=("tiny_animal",), seeds=(0,))
    run_sweep(dataclasses.replace(SWEEP, axes={"one": (1,)}), [Cell({"one": 1}, alone)])
    assert results.read(folder / "target" / "results.jsonl")[0]["score"] == records[2]["score"]
    assert "tiny_animal" in report.with_suffix(".md").read_text()  # the mean over targets lacks one of them in a cell


def gin_study(folder: Path, run: str, **changes) -> Path:
    """A gin file of the same sweep without MPT, in two banks, for calls of the command."""
    few = {"prompt_tuning": study.pipeline(folder).few_shot["prompt_tuning"]}
    config = cells_of(folder, run, lengths=(4,), **{"few_shot": few, "bank_size": 4} | changes)[0].study
    text = config_text(config).replace("PromptConfig.length = 4", "PromptConfig.length = %PROMPT_LENGTH")
    path = folder / f"{run}.gin"
    path.write_text(f"PROMPT_LENGTH = 4\nSweepConfig.axes = {{'PROMPT_LENGTH': {LENGTHS}}}\n{text}")
    return path


def call(gin: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mpt_jax", "sweep", f"--gin_file={gin}", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **WHERE)


def test_two_calls_share_a_sweep_and_one_that_is_killed_is_replaced(folder, finished):
    """Scores are those of one undisturbed call."""
    gin = gin_study(folder, "shared")
    with call(gin) as first:
        deadline = time.monotonic() + 120
        while not list((folder / "shared").glob("claims/*.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert list((folder / "shared" / "claims").glob("*.json")), "killed too late: nothing was claimed"
    with call(gin) as one, call(gin) as other:
        errors = [process.communicate(timeout=480)[1] for process in (one, other)]
        assert [one.returncode, other.returncode] == [0, 0], errors
    found = scores(folder / "shared")
    assert len(found) == 8 and found.items() <= scores(finished).items()
    assert list((folder / "shared" / "claims").iterdir()) == []
    parsed = list(parse_cells({"PROMPT_LENGTH": LENGTHS}, [str(gin)]))
    for number, (_, cell) in enumerate(parsed):
        again = (folder / "shared" / "cells" / f"{number:03d}" / "config.gin").read_text()
        assert again == cell.config_gin(type(cell.pipeline()))


def test_dry_run_names_points_jobs_and_cost_and_trains_nothing(folder, capsys):
    gin = gin_study(folder, "dry")
    assert cli.main(["sweep", f"--gin_file={gin}", "--dry-run", "--topology=h100"]) == 0
    out = capsys.readouterr().out
    assert "2 cells, 8 points, in 2 jobs" in out
    assert "2 tokens" in out and "4 tokens" in out and "H100" in out
    assert not (folder / "dry").exists()


def test_the_cost_of_a_bank_is_that_of_its_examples(folder):
    """Two prompts of equal length cost twice what one does, and steps multiply."""
    (cell,) = cells_of(folder, "cost", lengths=(4,))
    (bank,) = [
        job
        for job in plan_jobs([cell.study])
        if job.points[0].stage.method == "prompt_tuning" and not job.points[0].stage.is_source
    ]
    one, two = (cost_of(bank.only([point.key for point in bank.points[:n]]).stage().experiment).flops for n in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.01)
    assert describe([cell], folder / "cost", "").count("\n") > 5


def test_a_dry_run_tells_what_plan_tells_and_what_does_not_fit(folder, monkeypatch):
    """Time and memory of a bank are those of the same run as `plan` has them; a job that is too large for a device is counted."""
    (cell,) = cells_of(folder, "there", lengths=(4,))
    (*_, bank) = [job.stage().experiment for job in plan_jobs([cell.study])]
    bank = tiny.replace(bank, data={"batch_size": 16})
    planned, found = plan.make_plan(bank, "h100:2"), find_slice("h100:2")
    cost = cost_of(bank, found)
    assert cost.memory == planned.estimate.total
    assert cost.seconds == pytest.approx(bank.train.steps * plan.time_of(planned, planned.train_work, None).likely)
    assert describe([cell], folder / "there", "h100").endswith("and it has 67.06: all jobs fit.")

    one = find_slice("h100")
    needs = sorted(cost_of(job.stage().experiment, one).memory for job in plan_jobs([cell.study]))
    assert needs[-2] < needs[-1]
    tight = one._replace(device=one.device._replace(memory=needs[-2]))
    monkeypatch.setattr("mpt_jax.sweep_cost.find_slice", lambda _: tight)
    assert f"1 of {len(needs)} jobs would NOT fit" in describe([cell], folder / "there", "h100")


def test_an_axis_that_changes_nothing_is_refused(folder, capsys):
    """A study's stages have their own steps. An axis of which only some methods know is none of these."""
    gin = gin_study(folder, "idle")
    assert cli.main(["sweep", f"--gin_file={gin}", "--gin.SweepConfig.axes={'TrainConfig.steps': (3, 5)}"]) == 2
    assert "SweepConfig.axes['TrainConfig.steps'] changes nothing that this study trains" in capsys.readouterr().err
    assert not (folder / "idle").exists()
    axes = "--gin.SweepConfig.axes={'PROMPT_LENGTH': (2, 4), 'TrainConfig.steps': (3, 5)}"
    assert cli.main(["sweep", f"--gin_file={gin}", axes, "--dry-run"]) == 2


def test_a_dry_run_lists_all_jobs_where_no_mesh_holds_one(folder, monkeypatch):
    (cell,) = cells_of(folder, "nowhere", lengths=(4,))
    free = cell._replace(
        study=dataclasses.replace(cell.study, base=tiny.replace(cell.study.base, partition={"num_partitions": 0}))
    )
    tight = find_slice("h100")._replace(device=find_slice("h100").device._replace(memory=1000))
    monkeypatch.setattr("mpt_jax.sweep_cost.find_slice", lambda _: tight)
    number = len(plan_jobs([free.study]))
    assert f"{number} of {number} jobs would NOT fit" in describe([free], folder / "nowhere", "h100")


def test_a_job_that_would_be_refused_does_not_fit(folder):
    """Where nobody chose the mesh a tenth of the memory is left; what fits no mesh is told of one that can share the batch."""
    (cell,) = cells_of(folder, "refused", lengths=(4,))
    trainings = [job.stage().experiment for job in plan_jobs([cell.study])]
    bank = next(one for one in trainings if one.prompt.method != "none")
    free = tiny.replace(bank, partition={"num_partitions": 0})
    needed = cost_of(bank, find_slice("h100")).memory

    def tight(devices, memory):
        found = find_slice(f"h100:{devices}")
        return found._replace(device=found.device._replace(memory=memory))

    assert cost_of(bank, tight(1, needed / 0.95)).fits and not cost_of(bank, tight(1, needed * 0.95)).fits
    assert cost_of(free, tight(1, needed / 0.85)).fits and not cost_of(free, tight(1, needed / 0.95)).fits
    few = tiny.replace(free, data={"batch_size": 4})
    assert not cost_of(few, tight(8, 1000)).fits  # with the model whole on each of eight, four rows cannot be shared


CURVES = [{"label": "Theirs", "source": "A paper", "x": [2, 4], "y": [40, 60]}]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_published_curves_are_read_before_anything_is_trained(folder, capsys, more):
    """Beside the gin file that names them, from whatever folder the command is called."""
    gin = gin_study(folder, "published")
    given = [f"--gin_file={gin}", *more]
    assert cli.main(["sweep", *given, "--gin.SweepConfig.published=gin/studies/published/superglue_by_siz.json"]) == 2
    error = capsys.readouterr().err
    assert "--gin.SweepConfig.published: there is no json file" in error and "superglue_by_size.json" in error
    gin.write_text(gin.read_text() + "SweepConfig.published = 'theirs.json'\n")
    (folder / "theirs.json").write_text(json.dumps([CURVES[0] | {"y": [40]}]))
    assert cli.main(["sweep", *given]) == 2
    assert "theirs.json, which is no list of" in capsys.readouterr().err
    assert not (folder / "published").exists()
    if more:
        (folder / "theirs.json").write_text(json.dumps(CURVES))
        assert cli.main(["sweep", *given]) == 0


def test_a_report_needs_no_other_file_than_its_results(folder, finished, tmp_path, monkeypatch):
    """It is moved, read from elsewhere, and its file of published curves is gone."""
    path = folder / "gone.json"
    path.write_text(json.dumps(CURVES))
    config = dataclasses.replace(SWEEP, x="PROMPT_LENGTH", published=str(path))
    run_sweep(config, cells_of(folder, "whole"))
    path.unlink()
    shutil.copytree(finished, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "--model_dir=moved"]) == 0
    assert "with hollow marks: Theirs (A paper)." in (tmp_path / "moved" / "report.md").read_text()
    run_sweep(SWEEP, cells_of(folder, "whole"))


def test_the_results_say_all_values_of_the_axes(finished):
    """Those of cells without results, too, which an unfinished sweep's picture has ticks for."""
    (first, *rest) = results.read(finished / "results.jsonl")
    assert first["sweep"]["axes"] == {"PROMPT_LENGTH": list(LENGTHS)} and not any("sweep" in record for record in rest)


def test_cells_of_a_larger_grid_do_not_stay(folder, finished):
    gin = gin_study(folder, "smaller")
    for number in ("000", "002", "017", "notes"):
        (folder / "smaller" / "cells" / number).mkdir(parents=True)
    for kind in ("points", "runs"):
        shutil.copytree(finished / kind, folder / "smaller" / kind)
    assert cli.main(["sweep", f"--gin_file={gin}"]) == 0
    assert sorted(path.name for path in (folder / "smaller" / "cells").iterdir()) == ["000", "001", "notes"]


def test_a_call_that_is_refused_for_its_data_leaves_nothing(folder, capsys):
    gin = gin_study(folder, "refused")
    assert cli.main(["sweep", f"--gin_file={gin}", "--gin.PipelineConfig.test_split='nowhere'"]) == 2
    assert "nowhere" in capsys.readouterr().err and not (folder / "refused").exists()


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ("{}", "SweepConfig.axes is empty"),
        ("{'PROMPT_LENGTH': ()}", r"SweepConfig.axes\['PROMPT_LENGTH'\] has no values"),
        ("{'PROMPT_LENGTH': (2, 4, 2)}", r"SweepConfig.axes\['PROMPT_LENGTH'\] has \[2\] twice"),
        ("{'PROMPT_LENTGH': (2,)}", "nothing uses the macro PROMPT_LENTGH. Did you mean 'PROMPT_LENGTH'"),
        ("{'PromptConfig.rnk': (2,)}", "PromptConfig has no field 'rnk'. Did you mean 'rank'"),
        ("{'PROMPT_LENGTH': ('a',)}", "must be a whole number, not 'a'"),
        ("{'MODEL_DIR': ('a', 'b')}", "nothing uses the macro MODEL_DIR"),
        ("{'TrainConfig.model_dir': ('a', 'b')}", "gives the cells several MODEL_DIRs"),
        ("{'PROMPT_LENGTH': (0,)}", "must be from 1 to"),
    ],
)
def test_axes_that_cannot_be_are_told(folder, capsys, axes, sentence):
    gin = gin_study(folder, "wrong")
    assert cli.main(["sweep", f"--gin_file={gin}", f"--gin.SweepConfig.axes={axes}"]) == 2
    import re

    assert re.search(sentence, capsys.readouterr().err)
    assert not (folder / "wrong").exists()


def test_folders_of_other_things_are_refused(folder, tmp_path):
    cells = cells_of(folder, "taken")
    (folder / "taken").mkdir()
    (folder / "taken" / "results.jsonl").write_text("")
    with pytest.raises(UserError, match="holds a study, not a sweep"):
        run_sweep(SWEEP, cells)
    (folder / "taken" / "points").mkdir()
    with pytest.raises(UserError, match="holds a sweep, not a study"):
        check_study(cells[0].study)


KILLED_AT_RESULTS = """
import os, signal, sys
from mpt_jax.cli import main
def kill(event, arguments):
    if event == "os.rename" and "/points/" in str(arguments[1]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
main(["sweep", f"--gin_file={sys.argv[1]}"])
"""


def test_a_kill_while_results_are_written_loses_no_point(folder, capsys):
    """A tuned model is there until its results are; and where it is gone without them, it is trained again."""
    few = {"model_tuning": study.pipeline(folder).few_shot["model_tuning"]}
    gin = gin_study(folder, "cut", few_shot=few, targets=("tiny_mood",), seeds=(0,))
    gin.write_text(f"{gin.read_text()}SweepConfig.axes = {{'PipelineConfig.max_test_examples': (4, 5)}}\n")
    command = [sys.executable, "-c", KILLED_AT_RESULTS, str(gin)]
    assert subprocess.run(command, **WHERE).returncode == -signal.SIGKILL
    assert list((folder / "cut" / "points").glob("*.json")) == []
    (model,) = (folder / "cut").glob("runs/*/model")
    assert (model / "model.safetensors").exists()
    (mark,) = (folder / "cut").glob("runs/*/finished.json")
    shutil.rmtree(model)  # as an earlier version left it
    assert cli.main(["sweep", f"--gin_file={gin}"]) == 0, capsys.readouterr().err
    assert len(scores(folder / "cut")) == 2 and mark.exists() and not model.exists()


def test_what_another_call_tries_again_is_neither_given_up_nor_reported_as_failed(folder):
    cells = cells_of(folder, "helped", lengths=(4,))
    jobs, (root, drawing) = plan_jobs([cell.study for cell in cells]), check_sweep(SWEEP, cells)
    (source,) = (point.key for job in jobs for point in job.points if point.stage.kind == "source")
    (orphans,) = (job for job in jobs if source in job.needs)
    with Board(root, 60) as ours, Board(root, 60) as theirs:
        worker = _Worker(cells, jobs, ours, root, drawing)
        worker.failed[source] = "out of memory"
        assert theirs.take([source]) == [source]
        assert not worker._try(orphans)
        assert list((root / "failures").iterdir()) == [] and worker.failed.keys() == {source}
        theirs.fail(source, "the source", "out of memory")
        assert worker._try(orphans)
        assert len(list((root / "failures").iterdir())) == 1 + len(orphans.points) == len(worker.failed)
        for key in (point.key for job in jobs for point in job.points):
            assert theirs.take([key]) == [key]
            theirs.finish(key, [{"run_id": key}])
        assert worker.work() == {}


def test_what_another_call_gave_up_meanwhile_is_not_tried_here(folder):
    """Also by a call that never waited: it was at work on something else."""
    cells = cells_of(folder, "given_up", lengths=(4,))
    jobs, (root, drawing) = plan_jobs([cell.study for cell in cells]), check_sweep(SWEEP, cells)
    (first, *_) = [job for job in jobs if not job.needs]
    with Board(root, 60) as ours, Board(root, 60) as theirs:
        old = first.points[0].key
        assert theirs.take([old]) == [old]
        theirs.fail(old, "a point", "of an earlier call")
        worker = _Worker(cells, jobs, ours, root, drawing)
        worker._look()
        assert worker.failed == {}  # which this call tries again
        assert theirs.take(point.key for point in first.points) == [point.key for point in first.points]
        for point in first.points:
            theirs.fail(point.key, "a point", "of a call beside this one")
        worker._look()
        assert set(worker.failed) == {point.key for point in first.points}
        assert not worker._try(first) and first not in worker._left()


def test_an_axis_of_what_gin_files_say_is_told_in_their_words(folder):
    """Its values are references and macros, of which results hold the text, the same for cells and for the whole axis."""
    gin = gin_study(folder, "words")
    told = [f"{{'prompt_tuning': @{scope}/StageConfig()}}" for scope in ("few_shot_prompt_tuning", "longer")]
    longer = "longer/StageConfig:\n  steps = 2\n  batch_size = 4\n  rules = (('.*', %RATE),)\n"
    axis = f"SweepConfig.axes = {{'PipelineConfig.few_shot': ({', '.join(told)})}}\n"
    gin.write_text(f"{gin.read_text()}\nRATE = 0.1\n{longer}{axis}")
    assert cli.main(["sweep", f"--gin_file={gin}"]) == 0
    records = results.read(folder / "words" / "results.jsonl")
    assert records[0]["sweep"]["axes"] == {"PipelineConfig.few_shot": told}
    assert {record["cell"]["PipelineConfig.few_shot"] for record in records} == set(told)
    assert (folder / "words" / "figures" / "score_by_axis.png").stat().st_size > 500


def test_a_score_that_is_no_number_fails_its_point(folder):
    cells = one_run_cells(folder, "nan", ("tiny_nan",))
    with pytest.raises(UserError, match=r"No point of the sweep was done; 2 of 2 points failed; .* has 'score': nan"):
        run_sweep(dataclasses.replace(SWEEP, axes={"rate": (0.1, 0.3)}), cells)
    assert list((folder / "nan" / "points").iterdir()) == []


def test_a_task_without_metrics_is_refused_before_anything_is_trained(folder):
    cells = one_run_cells(folder, "unscored", ("tiny_no_metric",))
    with pytest.raises(UserError, match="A study scores 'tiny_no_metric', a task without metrics"):
        run_sweep(dataclasses.replace(SWEEP, axes={"rate": (0.1, 0.3)}), cells)
    assert not (folder / "unscored" / "runs").exists()


def test_results_of_other_weights_under_the_same_path_are_refused(tmp_path):
    folder = tiny.make(tmp_path)
    few = {"prompt_tuning": study.pipeline(folder).few_shot["prompt_tuning"]}

    def cells(**changes) -> list[Cell]:
        return cells_of(
            folder, "swapped", **{"few_shot": few, "seeds": (0,), "targets": ("tiny_mood",), "lengths": (4,)} | changes
        )

    run_sweep(SWEEP, cells())
    before = (folder / "swapped" / "results.jsonl").read_bytes()
    tiny.make_attentive(folder)
    for changes in ({}, {"seeds": (0, 1)}, {"lengths": LENGTHS}):
        with pytest.raises(
            UserError, match=r"holds the result of few_shot/k2/.* on the backbone \w{16}, but .*/model is \w{16}; give"
        ):
            run_sweep(SWEEP, cells(**changes))
    assert (folder / "swapped" / "results.jsonl").read_bytes() == before
    run_sweep(SWEEP, cells(targets=("tiny_animal",)))  # of which nothing is done
