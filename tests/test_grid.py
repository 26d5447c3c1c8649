"""A sweep's report: which runs a curve shows, what its numbers are, and that the page holds them; from records alone."""

import json
import statistics

import numpy as np
import pytest
from matplotlib import colors

from mpt_jax.errors import UserError
from mpt_jax.studies import curves, grid, page, results, series, tables
from mpt_jax.studies.looks import look
from mpt_jax.studies.published import Drawing, Published, drawing_of, read_published
from mpt_jax.studies.report import write_report
from mpt_jax.studies.wording import value_label

LENGTHS, RANKS, TASKS, SEEDS = (1, 20, 100), (1, 4), ("t_a", "t_b"), (0, 1, 2)


def score_of(length, rank, method, task, seed):
    base = 50 + 10 * np.log10(length) + seed + (5 if task == "t_a" else 0)
    return float(base + (rank if method == "mpt" else 0))


def records(methods=("mpt", "prompt_tuning"), lengths=LENGTHS, seeds=SEEDS):
    """Prompt tuning knows no rank, so its runs are the same in both cells of a length."""
    found = []
    for length in lengths:
        for rank in RANKS:
            for method in methods:
                for task in TASKS:
                    for seed in seeds:
                        own = rank if method == "mpt" else 0
                        found.append(
                            {
                                "run_id": f"PROMPT_LENGTH={length}, PromptConfig.rank={rank}: {method}/{task}/{seed}",
                                "stage": "full",
                                "method": method,
                                "task": task,
                                "k": 0,
                                "seed": seed,
                                "score": score_of(length, rank, method, task, seed),
                                "cell": {"PROMPT_LENGTH": length, "PromptConfig.rank": rank},
                                "folder": f"runs/{method}-{length}-{own}",
                                "group": TASKS.index(task) * len(seeds) + seed,
                                "params_trained": 16 * length + own * (length + 16),
                                "seconds": 1.0,
                                "chance": 40.0,
                                "config": {"prompt": {"length": length}},
                            }
                        )
    return found


def write_results(folder, runs, **sweep):
    """As a sweep does."""
    lines = [runs[0] | {"sweep": sweep}, *runs[1:]]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def looks_of_legend(figure):
    """label → (colour, marker), of what a figure's legend shows."""
    (legend,) = figure.legends
    handles = zip(legend.get_texts(), legend.legend_handles, strict=True)
    return {text.get_text(): (handle.get_color(), handle.get_marker()) for text, handle in handles}


def looks_of_means(axis):
    """(colour, marker) of what a panel shows with error bars → the heights, in the order of the places."""
    lines = [bar.lines[0] for bar in axis.containers]
    return {(line.get_color(), line.get_marker()): [float(y) for y in line.get_ydata()] for line in lines}


def at_k(k, runs):
    """The runs from k examples, which score less."""
    return [r | {"stage": "few_shot", "k": k, "run_id": f"{r['run_id']}/{k}", "score": r["score"] - 100 / k} for r in runs]


def means_of(runs, x):
    """label → the means along x, of one k."""
    axes = series.axes_of(runs)
    return {
        one.label: [statistics.fmean(r["score"] for r in mine if r["cell"][x] == value) for value in axes[x]]
        for one, mine in series.series_of(runs, x).items()
    }


def test_an_axis_without_effect_on_a_method_makes_no_curve_of_its_own():
    found = series.series_of(records(), "PROMPT_LENGTH")
    assert [one.label for one in found] == ["MPT, rank 1", "MPT, rank 4", "Prompt tuning"]
    runs = len(LENGTHS) * len(TASKS) * len(SEEDS)
    assert [len(group) for group in found.values()] == [runs] * 3  # what cells share is counted once


def test_runs_with_equal_scores_are_different_runs_where_they_lie_apart():
    chosen = [r | {"score": 50.0} for r in records(("mpt",))]
    assert len(series.series_of(chosen, "PROMPT_LENGTH")) == 2


def test_table_has_the_means_over_targets_and_their_spread_over_seeds():
    table = grid.grid_table(records(), "PROMPT_LENGTH")
    row = next(row for row in table.rows if row[1].text == "MPT, rank 4" and row[2].value == 20)
    by_seed = [statistics.fmean(score_of(20, 4, "mpt", task, seed) for task in TASKS) for seed in SEEDS]
    assert row[3].value == pytest.approx(statistics.fmean(by_seed))
    assert f"± {statistics.stdev(by_seed):.1f}" in row[3].text
    assert (row[4].value, row[5].value, row[6].value) == (3, 16 * 20 + 4 * 36, 6)
    assert len(table.rows) == 3 * len(LENGTHS)


def test_a_point_without_all_targets_has_no_mean_and_the_rest_has():
    part = [
        r
        for r in records()
        if not (r["method"] == "mpt" and r["cell"] == {"PROMPT_LENGTH": 20, "PromptConfig.rank": 4} and r["task"] == "t_b")
    ]
    table = grid.grid_table(part, "PROMPT_LENGTH")
    texts = {(row[1].text, row[2].value): row[3].text for row in table.rows}
    assert texts["MPT, rank 4", 20] == "–" and "–" not in texts["MPT, rank 1", 20]
    figure = curves.score_by_axis(part, "PROMPT_LENGTH")
    drawn, looks = looks_of_means(figure.axes[0]), looks_of_legend(figure)
    for label, means in means_of(records(), "PROMPT_LENGTH").items():
        np.testing.assert_allclose(drawn[looks[label]], [means[0], means[2]] if label == "MPT, rank 4" else means)


def test_the_curves_are_the_means_on_a_log_axis_where_it_spans_more_than_tenfold():
    figure = curves.score_by_axis(records(("prompt_tuning",)), "PROMPT_LENGTH")
    axis = figure.axes[0]
    assert axis.get_xscale() == "log" and [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "20", "100"]
    drawn = axis.containers[0].lines[0]
    means = [statistics.fmean(score_of(n, 1, "prompt_tuning", task, seed) for task in TASKS for seed in SEEDS) for n in LENGTHS]
    np.testing.assert_allclose(np.asarray(drawn.get_ydata(), float), means)
    narrow = curves.score_by_axis(records(("prompt_tuning",), lengths=(1, 4)), "PROMPT_LENGTH")
    assert narrow.axes[0].get_xscale() == "linear"


def test_axes_of_words_and_files_stand_side_by_side():
    changed = [
        r | {"cell": {"gin_file": f"gin/backbones/t5_{'small' if r['cell']['PROMPT_LENGTH'] == 1 else 'base'}.gin"}}
        for r in records(("mpt",), lengths=(1, 20))
    ]
    figure = curves.score_by_axis(changed, "gin_file")
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["t5_small", "t5_base"]


@pytest.mark.parametrize(("widths", "joined"), [((64, 96), True), ((64, 64), False)], ids=["two sizes", "one size"])
def test_a_line_joins_numbers_and_sizes_but_no_words(widths, joined):
    def runs():
        for name, width in zip(("small", "large"), widths, strict=True):
            for record in records(lengths=(20,)):
                architecture = {"backbone": {"architecture": {"d_model": width}}}
                yield record | {"cell": {"gin_file": f"{name}.gin"}, "config": architecture, "folder": f"runs/{name}"}

    (axis,) = curves.score_by_axis(list(runs()), "gin_file").axes
    assert [bar.lines[0].get_linestyle() != "None" for bar in axis.containers] == [joined] * 2


def test_a_rate_on_an_axis_is_read_as_a_number():
    """As results.jsonl has StageConfig.rules = ((".*", 0.3),)."""
    rates = [[[".*", 0.3]], [[".*", 1.0]]]
    runs = [
        r | {"cell": r["cell"] | {"StageConfig.rules": rate}, "folder": f"{rate}"} for r in records(("mpt",)) for rate in rates
    ]
    labels = [one.label for one in series.series_of(runs, "PROMPT_LENGTH")]
    assert labels == ["MPT, rank 1, rules 0.3", "MPT, rank 1, rules 1.0", "MPT, rank 4, rules 0.3", "MPT, rank 4, rules 1.0"]
    assert {row[2].text for row in grid.grid_table(runs, "StageConfig.rules").rows} == {"0.3", "1.0"}


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([[["shared", 0.1], ["task_.*", 0.03]], [[".*", 0.3]]], ["shared 0.1 + task_.* 0.03", "0.3"]),
        (["@mpt/StageConfig()", "@few/mpt/StageConfig()"], ["mpt", "few/mpt"]),
        ([{"mpt": "@a/StageConfig()", "spot": "@b/StageConfig()"}, {"mpt": "@c/StageConfig()"}], ["mpt a + spot b", "mpt c"]),
        ([["t_a", "t_b"], ["t_a"], []], ["t_a + t_b", "t_a", "none"]),
        (["@StageConfig()", "vocab"], ["StageConfig", "vocab"]),
    ],
    ids=["rules", "stages", "stages by method", "tasks", "words"],
)
def test_a_value_reads_the_same_everywhere(values, labels):
    """In sentences, tables, ticks and legends, along x and beside it; and as a person would write it."""
    axis = "tuning/StageConfig.rules"
    runs = [r | {"cell": r["cell"] | {axis: value}, "folder": f"{value}"} for r in records(("mpt",)) for value in values]
    beside = [one.label for one in series.series_of(runs, "PROMPT_LENGTH")]
    assert beside[: len(labels)] == [f"MPT, rank 1, rules {label}" for label in labels]
    (picture, *_) = (block for block in grid.build_grid(runs, Drawing(axis)) if isinstance(block, page.Picture))
    assert [tick.get_text().replace("\n", " ") for tick in picture.figure.axes[0].get_xticklabels()] == labels
    about, *_ = (block.lines[0] for block in grid.build_grid(runs) if isinstance(block, page.Text))
    texts = [about, *grid.grid_findings(runs, axis)]
    assert all(label in text for label in labels for text in texts)
    assert dict.fromkeys(row[2].text for row in grid.grid_table(runs, axis).rows) == dict.fromkeys(labels)
    assert dict.fromkeys(row[2].text for row in tables.run_table(runs).rows) == dict.fromkeys(labels)
    written = json.dumps(beside) + json.dumps(texts)
    assert not any(mark in written for mark in ("((", "[[", "StageConfig()", "{"))


BY_RANK = [r | {"folder": r["run_id"]} for r in records()]  # prompt tuning knows ranks, too


@pytest.mark.parametrize(
    ("few", "full", "alone"),
    [
        (records(), [r for r in records(("mpt",)) if r["cell"]["PromptConfig.rank"] == 4], {"MPT, rank 4"}),
        (BY_RANK, [r for r in BY_RANK if r["method"] == "prompt_tuning"], {"Prompt tuning, rank 1", "Prompt tuning, rank 4"}),
    ],
    ids=["one of a method's curves", "one of the methods"],
)
def test_a_legend_is_true_of_all_panels(few, full, alone):
    """Where the panels do not have the same curves: with k = 16 there are all, with all examples there are a few."""
    figure = curves.score_by_axis([*at_k(16, few), *full], "PROMPT_LENGTH")
    looks, at_16, at_all = looks_of_legend(figure), means_of(at_k(16, few), "PROMPT_LENGTH"), means_of(few, "PROMPT_LENGTH")
    assert set(looks) == {*at_16, "chance"} and alone < set(at_16)
    for axis, expected in zip(figure.axes, (at_16, {label: at_all[label] for label in alone}), strict=False):
        drawn = looks_of_means(axis)
        assert set(drawn) == {looks[label] for label in expected}
        for label, means in expected.items():
            np.testing.assert_allclose(drawn[looks[label]], means)


def test_a_method_looks_the_same_in_every_panel():
    figure = curves.score_by_axis([*at_k(16, records(("prompt_tuning",))), *records()], "PROMPT_LENGTH")
    expected = [(look("mpt").color, "o"), ("#D55E00", "v"), (look("prompt_tuning").color, "s")]
    assert [list(looks_of_means(axis)) for axis in figure.axes] == [expected[2:], expected]


def test_a_label_is_the_same_while_a_sweep_is_not_finished():
    """One rank of MPT has no results yet, neither at any length nor at one; prompt tuning, which knows none, has both."""
    axes = {"PROMPT_LENGTH": LENGTHS, "PromptConfig.rank": RANKS}
    for left_out in (LENGTHS, LENGTHS[1:]):
        part = [r for r in records() if not (r["method"] == "mpt" and r["cell"]["PROMPT_LENGTH"] in left_out)]
        part += [r for r in records(("mpt",)) if r["cell"]["PROMPT_LENGTH"] in left_out and r["cell"]["PromptConfig.rank"] == 1]
        labels = {one.label for one in series.series_of(part, "PROMPT_LENGTH", axes)}
        assert {"MPT, rank 1", "Prompt tuning"} <= labels <= {"MPT, rank 1", "MPT, rank 4", "Prompt tuning"}
    drawing = Drawing("PROMPT_LENGTH", axes)
    part = [r for r in records() if r["method"] == "prompt_tuning" or r["cell"]["PromptConfig.rank"] == 1]
    blocks = grid.build_grid(part, drawing)
    (texts, *_) = (block.lines for block in blocks if isinstance(block, page.Text) and "by prompt length" in block.lines[0])
    assert any(text.startswith("all examples, MPT, rank 1, by") for text in texts)
    tables = [block for block in blocks if isinstance(block, page.Table)]
    assert [{row[1].text for row in table.rows} for table in tables] == [{"MPT, rank 1", "Prompt tuning"}] * 2
    (picture, *_) = (block for block in blocks if isinstance(block, page.Picture))
    assert set(looks_of_legend(picture.figure)) == {"MPT, rank 1", "Prompt tuning", "chance"}


def test_sentences_name_the_highest_and_what_is_no_worse():
    (text,) = grid.grid_findings(records(("prompt_tuning",)), "PROMPT_LENGTH")
    assert "highest at 100." in text and "± 1.0 at 20" in text
    flat = [r | {"score": 60.0 + r["seed"]} for r in records(("prompt_tuning",))]
    assert "within one standard deviation of 20 and 100" in next(iter(grid.grid_findings(flat, "PROMPT_LENGTH")))


def test_no_highest_is_named_among_means_over_different_seeds():
    """Of three seeds at 1 and 20, and of one of them, which has the same score in all three places, at 100."""
    runs = [r | {"score": 50.0 + 10 * r["seed"]} for r in records(("prompt_tuning",))]
    (same,) = grid.grid_findings(runs, "PROMPT_LENGTH")
    assert "; highest at 1, within one standard deviation of 20 and 100." in same
    part = [r for r in runs if r["cell"]["PROMPT_LENGTH"] < 100 or r["seed"] == 0]
    (text,) = grid.grid_findings(part, "PROMPT_LENGTH")
    assert (
        "60.0 ± 10.0 at 1, 60.0 ± 10.0 at 20, 50.0 at 100; no highest is named, for the means are not over the same seeds."
        in text
    )
    swapped = [r for r in runs if (r["seed"] == 0) == (r["cell"]["PROMPT_LENGTH"] == 1)]  # as many, but others
    assert "highest at" not in next(iter(grid.grid_findings([r for r in swapped if r["seed"] < 2], "PROMPT_LENGTH")))


@pytest.mark.parametrize("ranks", [(1,), (1, 4)])
def test_no_two_curves_look_alike(ranks):
    """Neither where each method has one, nor where one method has several."""
    runs = [r for r in records() if r["cell"]["PromptConfig.rank"] in ranks]
    (axis,) = curves.score_by_axis(runs, "PROMPT_LENGTH").axes
    lines = [line for line in axis.get_lines() if line.get_linestyle() != "None" and len(line.get_xdata()) > 2]
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines]
    assert len(set(looks)) == len(looks) == len(ranks) + 1


def with_ranks(number):
    """One method with so many curves."""
    for r in records(("prompt_tuning",), lengths=(1, 20), seeds=(0,)):
        for rank in range(number) if r["cell"]["PromptConfig.rank"] == RANKS[0] else ():
            own = {"run_id": f"{r['run_id']}/{rank}", "folder": f"runs/{rank}", "score": r["score"] + rank}
            yield r | own | {"cell": r["cell"] | {"PromptConfig.rank": rank}}


@pytest.mark.parametrize("number", [3, 12, 65])
def test_curves_look_alike_only_where_the_caption_says_so(number):
    """Colour and marker tell them apart, for there are no lines between words; without colour, marker and line do."""
    runs = list(with_ranks(number))
    (picture, *_) = (block for block in grid.build_grid(runs) if isinstance(block, page.Picture))
    lines = [bar.lines[0] for bar in picture.figure.axes[0].containers]
    assert len(lines) == number
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == min(number, 64)
    told = "There are 64 looks for 65 series, so that some look alike."
    assert (told in picture.caption) == (number > 64) == ("look alike" in picture.caption)
    moved = np.log([float(line.get_xdata()[0]) for line in lines]) / np.log(20)
    assert max(abs(moved)) <= 0.05  # of the axis' width: a mark stands at its value, and beside the others as far as that allows
    looks = curves.looks_of(list(series.series_of(runs, "PROMPT_LENGTH"))).values()
    assert number > 32 or len({(one.marker, one.line) for one in looks}) == number


def test_a_run_that_several_cells_share_is_counted_once(tmp_path):
    """Prompt tuning knows no rank; along the ranks it has one score."""
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    text = (write_report(tmp_path).parent / "report.md").read_text()
    runs = len(LENGTHS) * len(TASKS) * len(SEEDS) * (len(RANKS) + 1)
    assert f"{runs} runs" in text and f"{runs:,} in all" in text  # a second each
    tuned = [text for text in grid.grid_findings(records(), "PromptConfig.rank") if "Prompt tuning" in text]
    assert len(tuned) == len(LENGTHS) and all(text.endswith(", whatever rank is.") for text in tuned)
    assert not any("whatever" in text for text in grid.grid_findings(records(), "PROMPT_LENGTH"))


def test_what_is_not_above_chance_is_marked_in_sentences_and_tables():
    """Two standard errors of 200 examples of each of two tasks are 4.9 points; of one task alone they are 6.9."""
    low = {1: 44.0, 20: 46.0, 100: 60.0}
    runs = [r | {"score": low[r["cell"]["PROMPT_LENGTH"]], "num_examples": 200} for r in records(("prompt_tuning",))]
    text, note = grid.grid_findings(runs)
    assert "44.0 ± 0.0 † at 1, 46.0 ± 0.0 at 20, 60.0 ± 0.0 at 100" in text and "n = 3 seeds" in text
    assert note.startswith("† is not above chance, 40.0")
    for table, weak in ((grid.grid_table(runs, "PROMPT_LENGTH"), (1,)), (grid.by_task_table(runs, "PROMPT_LENGTH"), (1, 20))):
        found = {row[2].text for row in table.rows if any(cell.weak for cell in row)}
        assert found == {str(value) for value in weak} and "† is not above chance" in table.caption
    assert not any("†" in text for text in grid.grid_findings([r | {"chance": None} for r in runs]))


def of_two_splits(small=40.0, large=60.0):
    """Prompt tuning on two test splits, along the axis or beside it, whose best constant answers differ."""
    axis = "PipelineConfig.max_test_examples"
    for r in records(("prompt_tuning",), lengths=(1, 20)):
        yield r | {
            "cell": {axis: r["cell"]["PROMPT_LENGTH"], "PromptConfig.rank": r["cell"]["PromptConfig.rank"]},
            "score": 52.0 + r["seed"] / 10,
            "chance": small if r["cell"]["PROMPT_LENGTH"] == 1 else large,
            "num_examples": 2000,
        }


@pytest.mark.parametrize("x", ["PipelineConfig.max_test_examples", "PromptConfig.rank"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_score_is_held_against_the_chance_of_its_own_cell(x, turned):
    """Whichever cell comes last in the file."""
    runs = list(of_two_splits())[:: -1 if turned else 1]
    for table in (grid.grid_table(runs, x), grid.by_task_table(runs, x)):
        weak = {f"{row[1].text} {row[2].text}": any(cell.weak for cell in row) for row in table.rows}
        assert len(weak) > 1 and all(marked == (" 20" in name) for name, marked in weak.items())
    *sentences, note = grid.grid_findings(runs, x)
    assert sum(text.count("†") for text in sentences) == 1
    assert note.startswith("† is not above chance, which is not the same in all cells, by more than 2 standard errors")


def test_a_line_of_chance_is_one_that_all_cells_have():
    def lines(runs):
        (picture, *_) = (block for block in grid.build_grid(runs) if isinstance(block, page.Picture))
        return [line for line in picture.figure.axes[0].lines if len(set(line.get_ydata())) == 1 < len(line.get_ydata())], picture

    drawn, picture = lines(list(of_two_splits(large=40.0)))
    assert 40.0 in [line.get_ydata()[0] for line in drawn] and "chance" in looks_of_legend(picture.figure)
    assert "chance" not in picture.caption
    drawn, picture = lines(list(of_two_splits()))
    assert not {40.0, 50.0, 60.0} & {line.get_ydata()[0] for line in drawn} and "chance" not in looks_of_legend(picture.figure)
    assert "No line for chance, which is not the same in all cells." in picture.caption


def test_the_page_has_every_run_with_its_configuration_and_a_published_curve(tmp_path):
    curve = [{"label": "Theirs", "source": "A paper, Table 1", "x": [1, 100], "y": [40, 60]}]
    write_results(tmp_path, records(), x="PROMPT_LENGTH", published=curve)
    html = write_report(tmp_path).read_text()
    assert html.count("prompt.length = 20") == 2 * 2 * 2 * 3
    assert "Published, in grey and dashed with hollow marks: Theirs (A paper, Table 1)." in html
    assert 'src="http' not in html and 'href="http' not in html
    assert (tmp_path / "figures" / "score_by_axis.png").stat().st_size > 1000
    text = (tmp_path / "report.md").read_text()
    assert "A sweep over prompt length (1, 20, 100) and rank (1, 4): 6 cells, 72 results." in text


def frontier_of(runs, **drawing):
    (found,) = (
        block
        for block in grid.build_grid(runs, Drawing("PROMPT_LENGTH", **drawing))
        if isinstance(block, page.Picture) and block.name == "parameters"
    )
    return found


def test_what_parameters_buy_has_the_series_of_the_other_picture():
    """Each mark at its numbers and its mean, and looks that tell the ranks apart."""
    picture = frontier_of(records())
    (axis,) = picture.figure.axes
    looks, drawn = looks_of_legend(picture.figure), looks_of_means(axis)
    assert looks == looks_of_legend(curves.score_by_axis(records(), "PROMPT_LENGTH")) and len(set(looks.values())) == 4
    for label, means in means_of(records(), "PROMPT_LENGTH").items():
        np.testing.assert_allclose(sorted(drawn[looks[label]]), means)
    sizes = sorted(float(x) for bar in axis.containers for x in bar.lines[0].get_xdata())
    np.testing.assert_allclose(sizes, sorted({r["params_trained"] for r in records()}))
    assert not any(bar.lines[0].get_linestyle() != "None" for bar in axis.containers)


def test_what_parameters_buy_says_how_it_was_measured():
    picture = frontier_of(records())
    (axis,) = picture.figure.axes
    assert axis.get_title(loc="left") == "all examples (n = 3 seeds)"
    assert (
        "mean of 2 targets" in picture.caption
        and "error bars of one standard deviation over seeds (none where n = 1)" in picture.caption
    )
    assert [line.get_ydata()[0] for line in axis.lines if len(set(line.get_xdata())) == 2] == [40.0]  # chance
    assert "No line for chance" in frontier_of([r | {"chance": float(r["cell"]["PROMPT_LENGTH"])} for r in records()]).caption


def test_runs_that_the_axis_does_not_change_are_one_mark():
    """Model tuning has no prompt, so that it has no length."""
    tuned = [
        r | {"method": "model_tuning", "folder": "runs/tuned", "params_trained": 5000, "score": 70.0 + r["seed"]}
        for r in records(("prompt_tuning",))
    ]
    (axis,) = frontier_of([*records(), *tuned]).figure.axes
    marks = [float(x) for bar in axis.containers for x in bar.lines[0].get_xdata()]
    assert sum(abs(x - 5000) < 500 for x in marks) == 1


def test_marks_of_one_size_stand_side_by_side():
    changed = [r | {"params_trained": 100 if r["method"] == "mpt" else 5000} for r in records()]  # six and three marks
    (axis,) = frontier_of(changed).figure.axes
    marks = sorted(float(x) for bar in axis.containers for x in bar.lines[0].get_xdata())
    assert len(set(marks)) == len(marks) == 3 * len(LENGTHS)
    near = [abs(np.log(x / (100 if x < 1000 else 5000))) for x in marks]
    assert max(near) < 0.05 * np.log(50)


@pytest.mark.parametrize("runs", [records(("prompt_tuning",)), [r | {"params_trained": 64} for r in records()]])
def test_published_numbers_of_parameters_are_drawn_beside_one_method_or_size(runs):
    """Else they would vanish, without a word."""
    theirs = Published("Theirs", "A paper", (5000,), (61.0,), "parameters")
    assert curves.parameter_frontier(runs, "PROMPT_LENGTH") is None
    picture = frontier_of(runs, published=(theirs,))
    assert "Theirs (A paper)" in picture.caption and "Theirs" in looks_of_legend(picture.figure)
    assert [5000] in [list(line.get_xdata()) for line in picture.figure.axes[0].lines]


def test_every_run_of_a_sweep_is_listed_with_the_values_of_its_cell():
    """Axes first; numbers are sorted as numbers, and a study, which has no axes, has none here."""
    runs = [r | {"cell": r["cell"] | {"PromptConfig.init": "vocab"}} for r in records()]
    table = tables.run_table(runs)
    assert table.columns[:4] == ("prompt length", "rank", "init", "stage")
    assert all(len(row) == len(table.columns) for row in table.rows)
    cells = [row[:3] for row in table.rows]
    assert [tuple(cell.value for cell in row) for row in cells] == [(*list(r["cell"].values())[:2], None) for r in runs]
    assert {row[2].text for row in cells} == {"vocab"} and {row[0].text for row in cells} == {"1", "20", "100"}
    (plain,) = tables.run_table([{name: value for name, value in runs[0].items() if name != "cell"}]).rows
    assert len(plain) == len(table.columns) - 3
    (shifted, *_) = tables.zero_shot_table([r | {"stage": "zero_shot", "trained_on": "t_c"} for r in runs]).rows
    assert [cell.value for cell in shifted[:3]] == [1.0, 1.0, None]


def test_a_published_number_that_stands_alone_is_seen_and_its_source_named():
    """A line of one point shows nothing: each published curve has marks."""
    published = [Published("One", "A paper", (20,), (44.0,), against) for against in ("x", "parameters")]
    figures = (
        curves.score_by_axis(records(), "PROMPT_LENGTH", published[:1]),
        curves.parameter_frontier(records(), "PROMPT_LENGTH", published[1:]),
    )
    for figure in figures:
        (line,) = (line for line in figure.axes[0].lines if list(line.get_ydata()) == [44.0])
        assert list(line.get_xdata()) == [20] and line.get_marker() not in ("None", "", None)
    blocks = grid.build_grid(records(), Drawing("PROMPT_LENGTH", published=tuple(published)))
    texts = [block.caption for block in blocks if isinstance(block, page.Picture)]
    assert all("with hollow marks: One (A paper)." in text for text in texts) and len(texts) == 2


def test_published_curves_are_as_the_caption_says():
    """All of them grey, dashed and hollow, and none like another; one may have the name of a series."""
    names = [f"Theirs {n}" for n in range(12)] + ["Prompt tuning"]
    theirs = tuple(Published(name, f"Paper {n}", (1, 20), (44.0 + n, 45.0 + n)) for n, name in enumerate(names))
    blocks = grid.build_grid(records(), Drawing("PROMPT_LENGTH", published=theirs))
    (picture, *_) = (block for block in blocks if isinstance(block, page.Picture))
    each = "; ".join(f"{name} (Paper {n})" for n, name in enumerate(names))
    assert f" Published, in grey and dashed with hollow marks: {each}." in picture.caption
    (axis,) = picture.figure.axes
    lines = [line for line in axis.lines if list(line.get_xdata()) == [1, 20]]
    assert {line.get_linestyle() for line in lines} == {"--"} and {line.get_markerfacecolor() for line in lines} == {"none"}
    shades = [colors.to_rgb(line.get_color()) for line in lines]
    assert all(max(shade) == min(shade) > colors.to_rgb(look("model_tuning").color)[0] for shade in shades)
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == len(names)
    legend = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert (
        sorted(legend) == sorted([*means_of(records(), "PROMPT_LENGTH"), *names, "chance"]) and legend.count("Prompt tuning") == 2
    )


def test_a_long_legend_leaves_the_picture_its_height():
    published = [Published(f"A method that was published {n}", "A paper", (2**n,), (44.0,), "parameters") for n in range(9)]

    def height(number: int) -> float:
        """Of the axes, in inches."""
        figure = curves.parameter_frontier(records(), "PROMPT_LENGTH", published[:number])
        figure.draw_without_rendering()
        return figure.axes[0].get_position().height * figure.get_figheight()

    assert height(9) == pytest.approx(height(1), rel=0.1)


SIZES = [f"gin/sizes/{size}.gin" for size in ("small", "base", "large")]


def by_size(sizes=SIZES):
    """Prompt tuning by size, of the sizes that have results."""
    runs = records(("prompt_tuning",), lengths=LENGTHS[:1])
    return [r | {"cell": {"gin_file": size}, "folder": f"runs/{size}"} for size in sizes for r in runs]


def test_published_curves_stand_at_their_ticks_also_while_sizes_have_no_results():
    """An axis of words has its places from the sweep's values; a value that it has not stands nowhere."""
    curve = Published("Theirs", "A paper", ("small", "base", "large"), (1.0, 2.0, 3.0))
    for done in (SIZES, SIZES[1:], SIZES[:1], SIZES[2:]):
        (axis,) = curves.score_by_axis(by_size(done), "gin_file", [curve], {"gin_file": SIZES}).axes
        ticks = dict(zip((tick.get_text() for tick in axis.get_xticklabels()), axis.get_xticks(), strict=True))
        assert list(ticks) == ["small", "base", "large"]
        (theirs,) = (line for line in axis.lines if list(line.get_ydata()) == [1, 2, 3])
        assert list(theirs.get_xdata()) == [ticks[label] for label in curve.x]
        ours = np.asarray(axis.containers[0].lines[0].get_xdata(), float)
        np.testing.assert_allclose(ours, [ticks[value_label(size)] for size in done], atol=0.1)


def test_a_published_point_without_a_place_is_left_out_and_named():
    published = (Published("Theirs", "A paper", ("small", "huge"), (1.0, 2.0)), Published("Others", "B", ("tiny",), (3.0,)))
    (picture, *_) = (
        b for b in grid.build_grid(by_size(), Drawing("gin_file", {"gin_file": SIZES}, published)) if isinstance(b, page.Picture)
    )
    assert "Left out, for gin file has no such value here: Theirs at huge; Others at tiny." in picture.caption
    drawn = [list(line.get_ydata()) for line in picture.figure.axes[0].lines]
    assert [1.0] in drawn and not any(y in line for line in drawn for y in (2.0, 3.0))
    assert curves.place_of("small", (1, 4)) is curves.place_of(0, (1, 20)) is None  # a word, and 0 on a log scale
    assert curves.place_of(2, (1, 20)) == 2.0 and curves.place_of(4, ("auto", 4)) == 1.0


def test_an_x_that_the_results_do_not_have_gives_way_to_an_axis_of_theirs(tmp_path):
    """Where two sweeps share a folder, say, and one of them has been written over by hand or by an older version."""
    write_results(tmp_path, records(), x="PromptConfig.init", axes={"PromptConfig.init": ["vocab"]})
    assert "by prompt length" in (write_report(tmp_path).parent / "report.md").read_text()
    assert next(iter(grid.grid_findings(records(), "PromptConfig.init"))).count("by prompt length") == 1


@pytest.mark.parametrize("sweep", [1, {"x": 3}, {"axes": [1]}, {"axes": {"a": 1}}, {"colour": 1}, {"published": [{"label": 1}]}])
def test_a_damaged_drawing_is_told_with_its_file(tmp_path, sweep):
    with pytest.raises(UserError, match=r'results.jsonl has a "sweep" that cannot be drawn .* command again writes it anew'):
        drawing_of([{"sweep": sweep}], tmp_path / "results.jsonl")


def test_a_mean_that_no_cell_has_is_told():
    """Where cells have different targets; their scores are in the table by target."""
    runs = [r for r in records(("prompt_tuning",), lengths=(1, 20)) if (r["task"] == "t_a") == (r["cell"]["PROMPT_LENGTH"] == 1)]
    texts = [line for block in grid.build_grid(runs) if isinstance(block, page.Text) for line in block.lines]
    assert "No cell has been scored on every target yet, so there is no mean." in texts


@pytest.mark.parametrize(
    "text",
    [
        "[{]",
        "{}",
        "[1]",
        '[{"label": "a"}]',
        '[{"label": "a", "source": "b", "x": 1, "y": [2]}]',
        '[{"label": "a", "source": "b", "x": [1, 2], "y": [2]}]',
        '[{"label": "a", "source": "b", "x": [], "y": []}]',
        '[{"label": "a", "source": "b", "x": [1], "y": ["2"]}]',
        '[{"label": "a", "source": "b", "x": [1], "y": [NaN]}]',
        '[{"label": "a", "source": "b", "x": [1], "y": [2], "against": "params"}]',
        '[{"label": "a", "source": "b", "x": ["small"], "y": [2], "against": "parameters"}]',
        '[{"label": "a", "source": "b", "x": [1], "y": [2], "colour": "red"}]',
    ],
)
def test_a_published_file_that_is_none_is_named(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match=r"SweepConfig.published is .*p.json, which is no list of"):
        read_published(tmp_path / "p.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_published(tmp_path / "q.json")


def test_a_result_without_a_score_is_named_by_its_line(tmp_path):
    bad = dict(records()[0])
    del bad["score"]
    (tmp_path / "results.jsonl").write_text(json.dumps(bad) + "\n")
    with pytest.raises(UserError, match=r"results.jsonl, line 1 has 'score': None where a result has a float"):
        results.read(tmp_path / "results.jsonl")


def test_cells_show_their_detail_only_on_the_page():
    table = page.Table("t", ("run",), ((page.Cell("open", detail="a < b"),),))
    assert "<details><summary>open</summary><pre>a &lt; b</pre></details>" in page.to_html("t", [table])
    assert "a < b" not in page.to_markdown("t", [table], "figures")


def test_an_axis_matters_where_no_two_of_its_values_share_a_seed():
    """As in an unfinished sweep, or along an axis of seeds."""
    found = [r for r in records(("prompt_tuning",)) if r["seed"] == SEEDS[LENGTHS.index(r["cell"]["PROMPT_LENGTH"]) % len(SEEDS)]]
    assert not any("whatever" in text for text in grid.grid_findings(found, "PROMPT_LENGTH"))


def test_numbers_on_an_axis_are_drawn_by_size():
    """Also those that came to a sweep later."""
    late = records(lengths=(LENGTHS[-1], *LENGTHS[:-1]))
    assert series.axes_of(late)["PROMPT_LENGTH"] == sorted(LENGTHS)
    (axis,) = curves.score_by_axis(late, "PROMPT_LENGTH").axes
    drawn = [line.get_xdata() for line in axis.get_lines() if len(line.get_xdata()) == len(LENGTHS)]
    assert drawn and all(list(xs) == sorted(xs) for xs in drawn)


def test_an_unfinished_sweep_says_so(tmp_path):
    write_results(tmp_path, records(), axes={"PROMPT_LENGTH": [*LENGTHS, 999]}, missing=12, failed=4)
    text = (write_report(tmp_path).parent / "report.md").read_text()
    assert "999" in text and "It is not finished: 12 points without a result, 4 of them failed" in text
    write_results(tmp_path, records())
    assert "not finished" not in (write_report(tmp_path).parent / "report.md").read_text()
