"""The report: everything from the results file alone, one file, nothing hidden."""

import html.parser
import json
import re

import numpy as np
import pytest
from test_results import record

from mpt_jax.errors import UserError
from mpt_jax.studies import figures, page, report, results

SCORES = {"mpt": {"a": 70.0, "b": 55.0}, "prompt_tuning": {"a": 60.0, "b": 58.0}, "spot": {"a": 66.0, "b": 60.0}}


def study(ks=(4, 16, 0), seeds=(0, 1, 2)) -> list[dict]:
    """MPT is above prompt tuning on target a and below it on b."""
    more = {"chance": 50.0, "ceiling": 100.0, "params_trained": 300, "steps": 10, "versions": {"jax": "0.10.2"}}
    rows = [record("prompt_tuning", "s1", 0, 0, 81.0, stage="teachers"), record("mpt", "s1", 0, 0, 79.5, stage="source")]
    for k in ks:
        for method, by_task in SCORES.items():
            for task, score in by_task.items():
                for seed in seeds if k else seeds[:1]:
                    start = {"started_from": "s1"} if method == "spot" else {}
                    rows.append(record(method, f"x_{task}", k, seed, score + k + (seed - 1), **more, **start))
    return rows


def write(folder, records) -> None:
    (folder / results.RESULTS_FILE).write_text("".join(json.dumps(r) + "\n" for r in records))


class Reader(html.parser.HTMLParser):
    """Checks that tags close and collects what a browser would load."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.rows, self.alts = [], [], 0, []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.loads += [attributes[name] for name in ("src", "href", "srcset", "action") if name in attributes]
        self.rows += tag == "tr"
        if tag == "img":
            self.alts.append(attributes["alt"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_needs_the_results_file_alone_and_loads_nothing(tmp_path):
    write(tmp_path, study())
    path = report.write_report(tmp_path)
    text = path.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.loads
    assert all(source.startswith("data:image/svg+xml;base64,") for source in reader.loads)
    assert not re.search(r"@import|url\(|https?://", re.sub(r"base64,[^\"]*", "", text))
    assert all(reader.alts)
    pictures = sorted(p.name for p in (tmp_path / "figures").iterdir())
    assert pictures == ["few_shot_curves.png", "scores.png", "scores_full.png"]
    assert all((tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    markdown = (tmp_path / "report.md").read_text()
    assert all(f"figures/{name}" in markdown for name in pictures)
    assert "training curves" in markdown  # says that they are not there
    assert "task vectors are not shown" in markdown


def test_tables_hold_the_numbers_and_do_not_hide_a_loss(tmp_path):
    write(tmp_path, study())
    report.write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "| 4 | MPT | 3 | **74.0 ± 1.0** | 59.0 ± 1.0 | 66.5 ± 1.0 |" in markdown
    assert "| all | Prompt tuning | 1 | 59.0 | 57.0 | 58.0 |" in markdown  # one seed: no spread
    assert "MPT is 3.5 points above prompt tuning from scratch" in markdown
    assert "it is below on b (−3.0)" in markdown
    assert "one seed: no spread can be given" in markdown
    assert "|  | chance |  | 50.0 | 50.0 | 50.0 |" in markdown
    assert "| s1 | 81.0 | 79.5 | −1.5 |" in markdown
    assert "s1 × 3" in markdown  # SPoT's choices


def test_several_source_trainings_are_in_the_spread():
    one = page.to_markdown("t", report.build(study()), "figures")
    assert "one source training whatever the seed" in one and "themselves (one training)" in one
    rows = [
        *study(),
        record("mpt", "s1", 0, 1, 75.5, stage="source"),
        record("prompt_tuning", "s1", 0, 1, 83.0, stage="teachers"),
    ]
    two = page.to_markdown("t", report.build(rows), "figures")
    assert "start from 2 source trainings in turn" in two and "themselves (2 trainings with different seeds)" in two
    assert "| s1 | 82.0 ± 1.4 | 77.5 ± 2.8 | −4.5 |" in two


def test_mpt_below_prompt_tuning_is_said():
    rows = study(ks=(4,))
    for row in rows:
        row["score"] += 20.0 * (row["method"] == "prompt_tuning")
    assert "16.5 points below prompt tuning" in next(report.findings(rows))


def test_an_unfinished_study_has_a_report(tmp_path):
    for records in (study()[:1], study(ks=(4,))[:3], study(ks=(0,), seeds=(0,))):
        write(tmp_path, records)
        report.write_report(tmp_path)


def test_names_are_escaped(tmp_path):
    write(tmp_path, [record(task="<script>|", method="new & better", seed=0)])
    text = report.write_report(tmp_path).read_text()
    assert "<script>|" not in text
    Reader().feed(text)
    assert "\\|" in (tmp_path / "report.md").read_text()


def test_bad_and_empty_results_are_errors(tmp_path):
    with pytest.raises(UserError, match="run the pipeline first"):
        report.write_report(tmp_path)
    write(tmp_path, [])
    with pytest.raises(UserError, match="no result yet"):
        report.write_report(tmp_path)
    (tmp_path / results.RESULTS_FILE).write_text("{]\n{}\n")
    with pytest.raises(UserError, match="line 1"):
        report.write_report(tmp_path)


def test_selection_on_the_scored_split_is_admitted():
    rows = [row | {"split": "validation", "selection_split": "validation"} for row in study(ks=(0,))]
    text = page.to_markdown("t", report.build(rows), "figures")
    assert "a little too high" in text
    assert "a little too high" not in page.to_markdown("t", report.build(study(ks=(0,))), "figures")


def test_curves_come_from_each_runs_own_group(tmp_path):
    folder = tmp_path / "runs" / "bank"
    folder.mkdir(parents=True)
    lines = [{"kind": "train", "step": s, "loss": 2.0, "losses": [1.0 + s, None if s == 2 else 5.0 * s]} for s in (1, 2, 3)]
    lines.append({"kind": "validation", "step": 3, "score": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        record(seed=0, folder="runs/bank", group=0),
        record(seed=1, folder="runs/bank", group=1),
        record(seed=2, folder="gone"),
    ]
    curves = report.read_curves(rows, tmp_path)
    assert curves == {"targets, k = 4": {"mpt": [([1, 2, 3], [2.0, 3.0, 4.0]), ([1, 3], [5.0, 15.0])]}}
    assert figures.training_curves(curves) is not None


def test_cosine_similarity():
    rows = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    expected = np.array([[1, 1, 0, -1, 0], [1, 1, 0, -1, 0], [0, 0, 1, 0, 0], [-1, -1, 0, 1, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_allclose(figures.cosine_similarity(rows), expected)


def test_methods_can_be_told_apart_without_colour():
    for field in ("marker", "hatch", "line"):
        assert len({str(getattr(figures.look(method), field)) for method in results.METHODS}) == len(results.METHODS)


def test_bars_start_at_zero_and_the_same_study_gives_the_same_picture():
    axes = figures.scores_by_method(study()).axes
    assert all(axis.get_ylim()[0] == 0 for axis in axes)
    assert figures.to_svg(figures.scores_by_method(study())) == figures.to_svg(figures.scores_by_method(study()))


@pytest.mark.parametrize("ks", [(4,), (4, 16), (4, 16, 0), (4, 16, 32, 0)])
def test_a_legend_is_not_cut_off(ks):
    rows = [
        *study(ks=ks),
        *(record("model_tuning", f"x_{task}", k, seed, 50.0) for k in ks for task in "ab" for seed in (0, 1, 2)),
    ]
    for figure in (figures.scores_by_method(rows), figures.scores_by_task(rows, ks[0])):
        figure.draw_without_rendering()
        box, page_ = figure.legends[0].get_window_extent(), figure.bbox
        assert page_.x0 <= box.x0 and box.x1 <= page_.x1
