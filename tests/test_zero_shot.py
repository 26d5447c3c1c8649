"""Runs that are scored on tasks that they were not trained on: by the same prompt, and in no mean of the targets."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import study
import tiny
from test_report import study as made_up
from test_results import record

from mpt_jax import jobs, stages
from mpt_jax.checkpoint.backbone import find_vocabulary
from mpt_jax.config import StreamConfig, SweepConfig
from mpt_jax.data.vocabulary import load_vocabulary
from mpt_jax.errors import UserError
from mpt_jax.evaluate import run_evaluate
from mpt_jax.pipeline import check_study, run_pipeline
from mpt_jax.studies import page, report, results, tables
from mpt_jax.studies.findings import findings
from mpt_jax.studies.report import write_report
from mpt_jax.study_data import check_data
from mpt_jax.sweep import Cell, run_sweep

ZERO_SHOT = {"tiny_mood": ("tiny_taste", "tiny_taste_unseen")}
METHODS = ("mpt", "prompt_tuning", "model_tuning")


def config(folder: Path, run: str, methods=METHODS, **changes):
    """k = 2, one seed, two targets of which one is scored on two more tasks; labels are ranked, so that few scores are 0."""
    few = {method: study.pipeline(folder).few_shot[method] for method in methods}
    more = {"k_shots": (2,), "few_shot": few, "seeds": (0,), "zero_shot": ZERO_SHOT, "max_test_examples": 0} | changes
    cfg = study.pipeline(folder, run, **more)
    return dataclasses.replace(cfg, base=tiny.replace(cfg.base, decode={"method": "rank"}))


# ------------------------------------------------------------------------------------------------------- what is not allowed


@pytest.mark.parametrize(
    ("zero_shot", "words"),
    [
        (
            {"tiny_moood": ("tiny_taste",)},
            r"'tiny_moood', which is none of .*targets, tiny_mood, tiny_animal; .* 'tiny_mood'",
        ),
        ({"tiny_mood": ()}, r"zero_shot\['tiny_mood'\] names no task"),
        ({"tiny_mood": ("tiny_taste", "tiny_colour", "tiny_taste")}, r"zero_shot\['tiny_mood'\] has 'tiny_taste' twice"),
        ({"tiny_mood": ("tiny_mood",)}, r"zero_shot\['tiny_mood'\] has 'tiny_mood' itself"),
    ],
)
def test_mistakes_are_told_by_the_plan(zero_shot, words):
    with pytest.raises(UserError, match=words):
        stages.plan(config(Path("f"), "r", zero_shot=zero_shot))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make_attentive(tmp_path_factory.mktemp("zero_shot"))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("tiny_colour", r"has 'tiny_colour', whose labels are blue, green, red, but those of 'tiny_mood' are no, yes; give"),
        ("tiny_no_metric", r"A study scores 'tiny_no_metric', a task without metrics"),
        ("tiny_word", r"'tiny_word' has no split 'validation'"),
        ("tiny_tast", r"Did you mean 'tiny_taste'\? .*PipelineConfig\.zero_shot"),
    ],
)
def test_tasks_that_do_not_fit_are_told_before_anything_is_trained(folder, task, words):
    cfg = config(folder, "unfit", zero_shot={"tiny_mood": (task,)})
    with pytest.raises(UserError, match=words):
        run_pipeline(cfg)
    with pytest.raises(UserError, match=words):
        run_sweep(SweepConfig(axes={"PROMPT_LENGTH": (4,)}), [Cell({"PROMPT_LENGTH": 4}, cfg)])
    assert not (folder / "unfit" / "runs").exists()


def test_labels_are_those_of_the_training_split_where_there_is_one(folder):
    """A small test split may lack one. Where no label is known on one side, nothing is compared."""

    def check(targets, zero_shot):
        cfg = config(folder, "labels", targets=targets, zero_shot=zero_shot)
        check_data(cfg, load_vocabulary(find_vocabulary(cfg.base.backbone)))

    check(("tiny_mood", "tiny_taste_good"), {"tiny_mood": ("tiny_taste_good",)})
    check(("tiny_mood",), {"tiny_mood": ("tiny_taste_good",)})  # of which only the test split is looked at: it has "yes" alone
    check(("tiny_mood", "tiny_free"), {"tiny_mood": ("tiny_free",), "tiny_free": ("tiny_mood",)})


# ----------------------------------------------------------------------------------------------------------------- a study


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    run_pipeline(config(folder, "study", keep_models=True))
    return folder / "study"


def scores(folder: Path) -> dict[str, float]:
    return {r["run_id"]: r["score"] for r in results.read(folder / results.RESULTS_FILE)}


def test_each_run_of_a_target_is_scored_on_its_other_tasks(finished):
    records = results.read(finished / results.RESULTS_FILE)
    runs = {r["run_id"]: r for r in results.runs_of(records)}
    others = results.zero_shot_of(records)
    assert len(records) == len(runs) + len(others) == len({r["run_id"] for r in records})
    assert {(r["method"], r["trained_on"], r["task"]) for r in others} == {
        (method, "tiny_mood", task) for method in METHODS for task in ZERO_SHOT["tiny_mood"]
    }
    assert not any("trained_on" in r for r in runs.values())
    for r in others:
        own = runs[r["run_id"].partition("/zero_shot/")[0]]
        assert (own["task"], own["seed"], own["k"]) == ("tiny_mood", r["seed"], r["k"])
        same = ("config", "folder", "group", "params_trained", "steps", "batch", "backbone", "split", "method")
        assert {name: r[name] for name in same} == {name: own[name] for name in same}
        assert r["num_examples"] == 24 and own["num_examples"] == 20
        assert r["data"] != own["data"] and r["seconds"] is None


def evaluated(folder: Path, cfg, method: str, task: str, prompt_of: str = "tiny_mood") -> float:
    """What the `evaluate` command makes of a prompt of the method's bank, or of the model tuned on tiny_mood, on a task."""
    stage = next(s for s in stages.plan(cfg) if not s.is_source and s.method == method and s.runs[0].task == "tiny_mood")
    data = {"mixture": task, "streams": (StreamConfig(task),), "eval_split": "validation"}
    experiment = tiny.replace(stage.experiment, data=data, train={"max_eval_examples": 0})
    if method != "model_tuning":
        prompt = {"method": "plain", "init": "file", "init_file": f"{stage.folder}#{prompt_of}"}
        experiment = tiny.replace(experiment, prompt=prompt, train={"model_dir": str(folder / "evaluated" / method)})
    return run_evaluate(experiment)["score"]


@pytest.mark.parametrize("method", METHODS)
def test_the_score_is_that_of_evaluate(folder, finished, method):
    cfg = config(folder, "study", keep_models=True)
    (got,) = results.select(results.read(finished / results.RESULTS_FILE), method=method, task="tiny_taste")
    assert got["score"] == pytest.approx(evaluated(folder, cfg, method, "tiny_taste"))
    if method != "model_tuning":  # else another prompt could not be told from the right one
        assert got["score"] != pytest.approx(evaluated(folder, cfg, method, "tiny_taste", "tiny_animal"))


def test_other_tasks_leave_a_run_and_its_own_score_as_they_are(folder, finished):
    run_pipeline(config(folder, "without", zero_shot={}))
    own = scores(folder / "without")
    assert own == {name: score for name, score in scores(finished).items() if "/zero_shot/" not in name}


def test_the_report_and_the_log_keep_them_apart(finished, folder, capsys):
    write_report(finished)
    text = (finished / "report.md").read_text()
    section = text.split("## Zero-shot on other tasks")[1].split("\n## ")[0]
    assert section.count("| mood | taste |") == section.count("| mood | taste unseen |") == 1
    run_pipeline(config(folder, "study", keep_models=True))
    assert "all 10 runs are in" in capsys.readouterr().err


def test_a_second_call_redoes_nothing(folder, finished):
    def state():
        files = [path for kind in ("*.safetensors", "metrics.jsonl", "finished.json") for path in (finished / "runs").rglob(kind)]
        return {path: path.stat().st_mtime_ns for path in files}, (finished / results.RESULTS_FILE).read_bytes()

    before = state()
    run_pipeline(config(folder, "study", keep_models=True))
    assert state() == before


def test_a_tuned_model_is_scored_before_its_weights_are_dropped(folder):
    run_pipeline(config(folder, "dropped", methods=("model_tuning",), targets=("tiny_mood",)))
    assert not list((folder / "dropped" / "runs").glob("*/model"))
    assert len(results.zero_shot_of(results.read(folder / "dropped" / results.RESULTS_FILE))) == 2


def test_a_study_that_was_cut_off_while_results_were_written_goes_on(folder):
    """Wherever the last write ends: a run counts as done when its own score is there, and that is written after its others."""
    cfg = config(folder, "cut", methods=("prompt_tuning",))
    run_pipeline(cfg)
    path = folder / "cut" / results.RESULTS_FILE
    whole, lines = scores(folder / "cut"), path.read_text().splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if "/zero_shot/" in line)
    for end in range(first, len(lines)):
        path.write_text("".join(lines[:end]) + lines[end][:40])
        run_pipeline(cfg)
        assert scores(folder / "cut") == pytest.approx(whole)


def test_more_seeds_are_scored_on_the_other_tasks_and_old_runs_are_not_touched(folder):
    cfg = config(folder, "grown", methods=("prompt_tuning",))
    run_pipeline(cfg)
    before = (folder / "grown" / results.RESULTS_FILE).read_text()
    run_pipeline(dataclasses.replace(cfg, seeds=(0, 1)))
    after = (folder / "grown" / results.RESULTS_FILE).read_text()
    assert after.startswith(before)
    new = [json.loads(line) for line in after.removeprefix(before).splitlines()]
    assert sorted((r["task"], r["seed"]) for r in new) == [
        (task, 1) for task in ("tiny_animal", "tiny_mood", "tiny_taste", "tiny_taste_unseen")
    ]


def test_another_task_for_runs_that_are_done_is_refused_in_a_sentence(folder, finished):
    """Not silently left out: the report would lack it for some runs and not say so."""
    more = {"tiny_mood": (*ZERO_SHOT["tiny_mood"], "tiny_free")}
    words = r"holds the result of few_shot/k2/mpt/tiny_mood/seed0, which was not scored on 'tiny_free', .*another MODEL_DIR"
    with pytest.raises(UserError, match=words):
        check_study(config(folder, "study", zero_shot=more))
    fewer = config(folder, "study", zero_shot={"tiny_mood": ZERO_SHOT["tiny_mood"][:1]})
    planned, recorded = check_study(fewer)
    assert stages.remaining(fewer, planned, set(recorded)) == []


def test_results_on_other_test_examples_are_refused(folder, finished):
    path = finished / results.RESULTS_FILE
    whole = path.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    wrong = next(line for line in lines if line["stage"] == results.ZERO_SHOT)
    wrong["data"] = "0" * 16
    try:  # the last run is left to do, so that the tasks are opened
        path.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
        with pytest.raises(UserError, match=rf"{wrong['run_id']} on other training or test examples of the task"):
            run_pipeline(config(folder, "study", keep_models=True))
    finally:
        path.write_text(whole)


# ----------------------------------------------------------------------------------------------------------------- a sweep


def cells(folder: Path, run: str, zero_shot=ZERO_SHOT) -> list[Cell]:
    made = []
    for length in (2, 4):
        cfg = config(folder, run, methods=("prompt_tuning", "model_tuning"), zero_shot=zero_shot)
        made.append(
            Cell({"PROMPT_LENGTH": length}, dataclasses.replace(cfg, base=tiny.replace(cfg.base, prompt={"length": length})))
        )
    return made


def test_cells_that_score_other_tasks_share_no_point(folder):
    """Runs that are scored on the same tasks do."""
    keys = {
        name: {(p.stage.method, p.stage.runs[0].task): p.key for p in jobs.collect([cells(folder, "s", zero_shot)[0].study])}
        for name, zero_shot in {"all": ZERO_SHOT, "one": {"tiny_mood": ("tiny_taste",)}, "none": {}}.items()
    }
    for method in ("prompt_tuning", "model_tuning"):
        assert len({keys[name][method, "tiny_mood"] for name in keys}) == 3
        assert len({keys[name][method, "tiny_animal"] for name in keys}) == 1
    mixed = [cells(folder, "s", zero_shot)[0].study for zero_shot in (ZERO_SHOT, {})]
    for job in jobs.plan_jobs(mixed):
        assert len({json.dumps(point.stage.zero_shot) for point in job.points}) == 1


def test_a_sweep_has_them_for_each_cell_and_out_of_its_curves(folder):
    sweep = SweepConfig(axes={"PROMPT_LENGTH": (2, 4)})
    run_sweep(sweep, cells(folder, "sweep"))
    text = (folder / "sweep" / results.RESULTS_FILE).read_bytes()
    records = results.read(folder / "sweep" / results.RESULTS_FILE)
    assert len(records) == 2 * 2 * (2 + 2)
    for r in results.zero_shot_of(results.select(records, method="prompt_tuning")):
        assert (r["trained_on"], r["config"]["data"]["mixture"]) == ("tiny_mood", "tiny_mood")
        assert r["cell"]["PROMPT_LENGTH"] == r["config"]["prompt"]["length"]
    run_sweep(sweep, cells(folder, "sweep"))
    assert (folder / "sweep" / results.RESULTS_FILE).read_bytes() == text
    markdown = (folder / "sweep" / "report.md").read_text()
    section = markdown.split("## Zero-shot on other tasks")[1].split("\n## ")[0]
    assert "| prompt length | k | trained on | scored on |" in section
    for length, task in itertools.product((2, 4), ("taste", "taste unseen")):
        assert section.count(f"| {length} | 2 | mood | {task} |") == 1
    without = cells(folder, "sweep_without", {})
    run_sweep(sweep, without)
    plain = (folder / "sweep_without" / "report.md").read_text()
    assert scores(folder / "sweep_without").items() <= scores(folder / "sweep").items()
    numbers = [untimed(part.split("## Numbers")[1].split("\n## ")[0]) for part in (plain, markdown)]
    assert numbers[0] == numbers[1]


def untimed(text: str) -> list[str]:
    """The rows of a table without the last column, which is of time."""
    return [line.rsplit("|", 2)[0] for line in text.splitlines() if line.startswith("|")]


# ---------------------------------------------------------------------------------------------------------------- the report


def shifted(method: str, seed: int, score: float, k: int = 0, task: str = "x_b", trained_on: str = "x_a", **more) -> dict:
    own = record(method, trained_on, k, seed, score, chance=50.0, num_examples=100, seconds=None, **more)
    return own | {
        "run_id": results.zero_shot_id(own["run_id"], task),
        "task": task,
        "trained_on": trained_on,
        "stage": results.ZERO_SHOT,
    }


def pair(ours: tuple[float, ...], theirs: tuple[float, ...], **more) -> list[dict]:
    return [
        shifted(method, seed, score, **more)
        for method, values in (("prompt_tuning", ours), ("model_tuning", theirs))
        for seed, score in enumerate(values)
    ]


def markdown(records) -> str:
    return page.to_markdown("t", report.build(records, command=""), "figures")


def without_time(text: str) -> list[str]:
    return [line for line in text.splitlines() if "Written " not in line and "Every run" not in line]


def test_they_change_nothing_but_their_own_section():
    """Targets' tables, means, sentences and sources are those of a report without them; the pictures are of the same records."""
    rows = made_up()
    others = [
        shifted(method, seed, 99.0, k=k, started_from="s1", params_trained=5, steps=9, scarce={"no": 1})
        for method in ("mpt", "prompt_tuning", "spot")
        for k in (4, 0)
        for seed in range(3)
    ]
    plain, both = markdown(rows), markdown([*others, *rows])
    before, _, rest = both.partition("## Zero-shot on other tasks")
    assert without_time(before + "## " + rest.split("\n## ", 1)[1]) == without_time(plain)


def test_the_table_has_the_numbers():
    rows = [
        *pair((80.0, 84.0, 88.0), (70.0, 71.0, 69.0)),
        *pair((52.0, 50.0), (51.0, 53.0, 49.0), trained_on="x_b", task="x_a", k=4),
    ]
    table = tables.zero_shot_table(rows)
    methods = ("Prompt tuning", "Model tuning", "prompt − model tuning")
    assert table.columns == ("k", "trained on", "scored on", "seeds", *methods, "chance", "test examples")
    texts = [tuple(cell.text for cell in row) for row in table.rows]
    assert texts == [
        ("4", "b", "a", "2–3", "51.0 ± 1.4 †", "51.0 ± 2.0 †", "−1.0 ± 2.8", "50.0", "100"),
        ("all", "a", "b", "3", "84.0 ± 4.0", "70.0 ± 1.0", "+14.0 ± 4.6", "50.0", "100"),
    ]


def test_a_source_task_is_not_called_unseen():
    rows = [shifted(method, 0, 60.0, task=task) for method in ("mpt", "prompt_tuning") for task in ("s1", "x_b")]
    assert "But MPT starts from prompts of the source tasks, s1 among them." in markdown([*made_up(), *rows])
    rows = [row for row in rows if row["method"] != "mpt" or row["task"] != "s1"]
    assert "source tasks, s1" not in markdown([*made_up(), *rows])


def test_a_sentence_says_what_is_beyond_the_spread_and_only_that():
    rows = pair((80.0, 84.0, 88.0), (70.0, 71.0, 69.0))
    rows += pair((60.0, 80.0, 70.0), (65.0, 70.0, 72.0), task="x_c")  # within the spread
    rows += pair((10.0, 10.5, 10.0), (40.0, 40.0, 40.5), task="x_d")  # both not above chance
    (sentence,) = [text for text in findings([*made_up(), *rows]) if "zero-shot" in text]
    assert sentence == (
        "all examples, zero-shot: prompt tuning is 14.0 points above model tuning on b (trained on a; standard deviation over 3 "
        "seeds 4.6)."
    )
    one = pair((80.0,), (70.0,))
    assert not [text for text in findings([*made_up(), *one]) if "zero-shot" in text]
    assert not [text for text in findings(made_up()) if "zero-shot" in text]
