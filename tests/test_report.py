"""The report: everything from the results file alone, one file, nothing hidden."""

import html.parser
import itertools
import json
import re
import shlex

import numpy as np
import pytest
from matplotlib import colors
from test_results import record

from mpt_jax import cli, metrics
from mpt_jax.errors import UserError
from mpt_jax.studies import chance, figures, page, report, results, runs, wording
from mpt_jax.studies.findings import findings

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


def test_one_target_is_no_mean():
    rows = [row for row in study() if row["task"] != "x_b"]
    text = page.to_markdown("t", report.build(rows), "figures")
    assert "k = 4, x a: MPT 74.0 ± 1.0" in text
    assert "mean of 1" not in text and "last column" not in text and "over the targets" not in text and "1 targets" not in text
    assert "| 4 | MPT | 3 | **74.0 ± 1.0** |\n" in text


def test_counts_agree_with_their_nouns():
    assert wording.counted(1, "run") == "1 run" and wording.counted(2000, "run") == "2,000 runs"
    assert [wording.listing(list("abc")[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert wording.seeds_note([results.spread([1.0])]) == "n = 1 seed"
    assert wording.seeds_note([results.spread([1.0]), None, results.spread([1.0, 2.0])]) == "n = 1–2 seeds"


def guesses(seeds: int, chance: float, size: int, generator: np.random.Generator) -> list[float]:
    """Scores of seeds that throw dice."""
    return (100 * generator.binomial(size, chance / 100, seeds) / size).tolist()


def one_word(seeds: int, chance: float, size: int, generator: np.random.Generator) -> list[float]:
    """Scores of seeds that each say the same word always: what a test split has of it, or of the other words."""
    share = 100 * generator.binomial(size, chance / 100) / size
    return np.where(generator.random(seeds) < 0.5, share, 2 * chance - share).tolist()


@pytest.mark.parametrize("guesser", [guesses, one_word])
@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("level, size", [(50.0, 600), (33.3, 150), (12.0, 28)])
def test_guessing_is_not_above_chance_and_knowing_is(guesser, seeds, level, size):
    rows, generator = [record(chance=level, num_examples=size)], np.random.default_rng(0)
    above = [chance.above(rows, results.spread(guesser(seeds, level, size, generator)), ["a"]) for _ in range(2000)]
    assert np.mean(above) < 0.05
    margin = 4 * np.sqrt(level * (100 - level) / size)
    assert chance.above(rows, results.spread([level + margin] * seeds), ["a"])
    assert chance.below(rows, results.spread([level - margin] * seeds), ["a"])


def test_a_guessers_correlation_is_not_above_chance():
    """Its chance is 0, but it is not always 0: Matthews' of random answers on 522 examples."""
    rows = [record(chance=0.0, num_examples=522, metrics={"matthews_correlation": 1.0})]
    generator, above = np.random.default_rng(0), []
    for _ in range(400):
        targets, answers = generator.integers(0, 2, (2, 522)).astype(str).tolist()
        above.append(chance.above(rows, results.spread([*metrics.matthews_correlation(targets, answers).values()]), ["a"]))
    assert np.mean(above) < 0.05
    assert chance.above(rows, results.spread([20.0]), ["a"])


def test_the_mean_of_guessed_targets_is_not_above_chance():
    """Also where the targets differ in chance and size; and nothing is said where one target's chance is not known."""
    levels, generator = {"a": (50.0, 600), "b": (33.3, 150), "c": (12.0, 60)}, np.random.default_rng(1)
    rows = [record(task=task, chance=level, num_examples=size) for task, (level, size) in levels.items()]
    above = []
    for _ in range(2000):
        scores = [100 * generator.binomial(size, level / 100, 1) / size for level, size in levels.values()]
        above.append(chance.above(rows, results.spread(np.mean(scores, axis=0).tolist()), list(levels)))
    assert np.mean(above) < 0.05
    assert chance.above(rows, results.spread([60.0, 61.0, 62.0]), list(levels))
    assert chance.above([*rows, record(task="d")], results.spread([60.0]), [*levels, "d"]) is None


def test_scores_at_chance_are_marked_and_never_bold():
    """All methods guess on a; on b one is above chance and others are at zero."""
    more = {"chance": 50.0, "num_examples": 100}
    scores = {"mpt": (52.0, 80.0), "prompt_tuning": (56.0, 0.0), "spot": (51.0, 0.0)}
    rows = [
        record(method, task, 4, seed, score + seed, **more)
        for method, pair in scores.items()
        for task, score in zip("ab", pair, strict=True)
        for seed in (0, 1, 2)
    ]
    text = page.to_markdown("t", report.build(rows), "figures")
    assert "| 4 | MPT | 3 | 53.0 ± 1.0 † | **81.0 ± 1.0** | **67.0 ± 1.0** |" in text
    assert "| 4 | Prompt tuning | 3 | 57.0 ± 1.0 † | 1.0 ± 1.0 † | 29.0 ± 1.0 † |" in text
    assert "it is below on a (−4.0, neither above chance). No method is above chance on a (50.0)." in text
    assert "Not above chance on the mean: Prompt tuning and SPoT." in text
    assert "† is not above chance" in text and "a score may lie below chance" in text
    for row in rows:
        row["score"] = 0.0
    text = page.to_markdown("t", report.build(rows), "figures")
    assert "**" not in text and "No method is above chance on a (50.0) and b (50.0). No method's mean is above chance." in text


def test_nothing_is_said_of_chance_where_it_is_not_known():
    rows = [{name: value for name, value in row.items() if name != "chance"} for row in study()]
    text = page.to_markdown("t", report.build(rows), "figures")
    assert "above chance" not in text and "†" not in text and "No chance level is known for a and b." in text
    for row in rows:
        row["score"] = 0.0
    assert "**" not in page.to_markdown("t", report.build(rows), "figures")


def test_classes_with_fewer_than_k_examples_are_told_once():
    rows = [row | {"scarce": {"no": 9} if row["task"] == "x_a" and row["k"] > 9 else {}} for row in study(ks=(4, 16, 32))]
    text = page.to_markdown("t", report.build(rows), "figures")
    assert text.count("a has only 9 training examples of class 'no', fewer than k = 16 and k = 32") == 1
    assert "b has only" not in text


def test_a_target_that_was_a_source_is_named():
    def notes(rows: list[dict]) -> str:
        return page.to_markdown("t", report.build(rows), "figures")

    too = "a was a source, too: MPT and SPoT start from all training examples of it"
    assert too in notes([*study(), record("prompt_tuning", "x_a", 0, 0, 81.0, stage="teachers")])
    assert "source, too" not in notes(study())


def test_the_top_says_what_was_run_on_what():
    config = {
        "backbone": {"checkpoint": "embedded:mini"},
        "optimizer": {"name": "adamw", "rules": [["u|v", 0.4], ["shared", 0.3]]},
    }
    rows = [row | {"config": config, "backbone": "0123", "seconds": 2.0} for row in study(ks=(4,))]
    text = page.to_markdown("t", report.build(rows), "figures")
    assert "20 runs on the T5 `embedded:mini` (fingerprint `0123`), which stays frozen; made with" in text
    assert "| few shot | MPT | 6 | 10 | – | 300 | – | 2.0 | AdamW u\\|v 0.4, shared 0.3 |" in text
    assert "40 in all" in text
    tuned = [*rows, record("model_tuning", "x_a", 4, 0, 50.0, backbone="0123")]
    assert "frozen except in model tuning" in page.to_markdown("t", report.build(tuned), "figures")


def test_the_footer_has_the_command_that_writes_the_report_again(tmp_path):
    folder = tmp_path / "a study's folder"
    folder.mkdir()
    write(folder, study(ks=(4,)))
    markdown = report.write_report(folder).with_suffix(".md")
    command = re.search(r"To write it again: `(.*)`", markdown.read_text())[1]
    markdown.unlink()
    python, dash_m, package, *arguments = shlex.split(command)
    assert (python, dash_m, package) == ("python", "-m", "mpt_jax")
    assert cli.main(arguments) == 0
    assert markdown.exists()


def test_sizes_of_the_test_split_are_told():
    rows = [row | {"num_examples": 600, "split": "test"} for row in study(ks=(4,))]
    text = page.to_markdown("t", report.build(rows), "figures")
    assert (
        "(n = 3 seeds, 600 test examples each, chance 50.0)" in text and "the split `test`: 600 examples of each target" in text
    )
    rows = [row | {"num_examples": 28 if row["task"] == "x_b" else 600} for row in rows]
    text = page.to_markdown("t", report.build(rows), "figures")
    assert "28–600 test examples each" in text and "the split `test`; examples: a 600, b 28" in text


def test_mpt_below_prompt_tuning_is_said():
    rows = study(ks=(4,))
    for row in rows:
        row["score"] += 20.0 * (row["method"] == "prompt_tuning")
    assert "16.5 points below prompt tuning" in next(findings(rows))


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
    curves = runs.read_curves(rows, tmp_path)
    assert curves == {"targets, k = 4": {"mpt": [([1, 2, 3], [2.0, 3.0, 4.0]), ([1, 3], [5.0, 15.0])]}}
    assert figures.training_curves(curves) is not None


def test_methods_can_be_told_apart_without_colour():
    for field in ("marker", "hatch", "line"):
        assert len({str(getattr(figures.look(method), field)) for method in results.METHODS}) == len(results.METHODS)


# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0, of linear sRGB.
SEEN_BY = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(color: str, eye) -> np.ndarray:
    """CIELAB (D65) of an sRGB colour as an eye sees it."""
    rgb = np.array(colors.to_rgb(color))
    linear = np.clip(np.array(eye) @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear / to_xyz.sum(1), 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", SEEN_BY)
def test_methods_have_colours_that_all_eyes_tell_apart(eye):
    """A distance of 2.3 in CIELAB is just seen; this is more than six times that."""
    for one, other in itertools.combinations(results.METHODS, 2):
        seen = [lab(figures.look(method).color, SEEN_BY[eye]) for method in (one, other)]
        assert np.linalg.norm(seen[0] - seen[1]) > 15, (one, other)


def dots(figure) -> list[np.ndarray]:
    """For each bar, its seeds' dots: centre x, y and diameter in pixels [n, 3]."""
    figure.draw_without_rendering()
    lines = [(axis, line) for axis in figure.axes for line in axis.lines if line.get_markerfacecolor() == "white"]
    size = figure.dpi / 72
    return [
        np.column_stack(
            [axis.transData.transform(line.get_xydata()), np.full(len(line.get_xdata()), line.get_markersize() * size)]
        )
        for axis, line in lines
    ]


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_every_seed_is_a_dot_and_none_covers_another(seeds):
    """Also where all seeds score the same."""
    rows = [row | {"score": 60.0} for row in study(ks=(4, 16), seeds=tuple(range(seeds)))]
    for figure, bars in ((figures.scores_by_method(rows), 2 * 3), (figures.scores_by_task(rows, 4), 2 * 3)):
        found = dots(figure)
        assert [len(group) for group in found] == [seeds] * bars
        for group in found:
            assert (np.diff(group[:, 0]) > 1.15 * group[1:, 2]).all()


def test_the_dots_are_the_seeds_means():
    figure = figures.scores_by_method(study(ks=(4,)))
    axis = figure.axes[0]
    found = [line.get_ydata().tolist() for line in axis.lines if line.get_markerfacecolor() == "white"]
    assert found == [[65.5, 66.5, 67.5], [62.0, 63.0, 64.0], [66.0, 67.0, 68.0]]


def test_scores_on_other_tasks_have_a_picture_for_each_k():
    pairs = (("x_a", "x_b", 60.0), ("x_b", "x_a", 70.0))
    shifted = [
        record("prompt_tuning", new, k, seed, score + k + seed, stage=results.ZERO_SHOT, trained_on=old)
        for k in (4, 0)
        for old, new, score in pairs
        for seed in (0, 1, 2)
    ]
    figure = figures.zero_shot_scores(shifted, 4)
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a\n→ b", "b\n→ a"]
    dots_of = [line.get_ydata().tolist() for line in axis.lines if line.get_markerfacecolor() == "white"]
    assert dots_of == [[64.0, 65.0, 66.0], [74.0, 75.0, 76.0]]
    blocks = report.build([*study(), *shifted])
    assert {"zero_shot", "zero_shot_k4"} <= {block.name for block in blocks if isinstance(block, page.Picture)}


def test_methods_stand_side_by_side_at_each_k_of_a_log_scale():
    figure = figures.few_shot_curves(study(ks=(4, 16, 32)))
    figure.draw_without_rendering()
    for axis in figure.axes[:3]:
        assert axis.get_xticks().tolist() == [2.0, 4.0, 5.0]
        assert [label.get_text() for label in axis.get_xticklabels()] == ["4", "16", "32"]
        lines = [bar.lines[0] for bar in axis.containers]
        places = np.sort([axis.transData.transform(line.get_xydata())[:, 0] for line in lines], axis=0)
        assert (np.diff(places, axis=0) > 1.2 * lines[0].get_markersize() * figure.dpi / 72).all()


@pytest.mark.parametrize("tasks, panels", [(0, 0), (1, 0), (2, 1), (3, 2)])
def test_two_task_vectors_have_nothing_to_show_without_their_mean(tasks, panels):
    vectors = {f"x_{n}": np.random.default_rng(n).normal(size=(3, 4)) for n in range(tasks)}
    figure = figures.task_vector_heatmap(vectors)
    assert panels == (0 if figure is None else sum(bool(axis.get_title(loc="left")) for axis in figure.axes))
    caption = [block for block in report.build(study(), task_vectors=vectors) if isinstance(block, page.Picture)][-1].caption
    assert ("(left)" in caption) == (tasks > 2)


def test_pictures_have_two_pixels_for_each_of_the_page(tmp_path):
    write(tmp_path, study(ks=(4,)))
    html_width = int(re.search(r'alt="scores" style="width:(\d+)px', report.write_report(tmp_path).read_text())[1])
    width = int.from_bytes((tmp_path / "figures" / "scores.png").read_bytes()[16:20])
    assert abs(width - 2 * html_width) <= 2


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
