"""The `tasks` command tells what the registry and the token caches hold, within 100 columns."""

import re

import numpy as np
import pytest
import tiny

from mpt_jax import cli
from mpt_jax.browse import COLUMNS, run_tasks
from mpt_jax.config import DataConfig
from mpt_jax.data.cache import open_task
from mpt_jax.data.vocabulary import ByteVocabulary, load_vocabulary
from mpt_jax.errors import UserError

MODULES = "--gin.DataConfig.task_modules=('tiny_tasks',)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("browse"))


@pytest.fixture
def show(folder, capsys):
    """show(name, **changes of the data's configuration) → the lines that are printed."""
    config = tiny.experiment(folder, "x")

    def lines(name: str, **changes) -> list[str]:
        run_tasks(tiny.replace(config, data=changes).data, config.backbone, name)
        out = capsys.readouterr().out
        assert "\033" not in out
        lines = out.splitlines()
        assert max(map(len, lines)) <= COLUMNS and lines == [line.rstrip() for line in lines]
        return lines

    return lines


def test_a_part_of_a_name_lists_what_has_it(show):
    header, *rows, blank, count = show("tiny_")
    names = [row.split()[0] for row in rows]
    assert names == sorted(names) and {"tiny_colour", "tiny_free", "tiny_no_metric"} <= set(names) and not blank
    assert f"{len(names)} tasks, 0 mixtures" in count
    colour = rows[names.index("tiny_colour")]
    assert re.fullmatch(r"tiny_colour +generated +train validation +accuracy", colour)
    assert rows[names.index("tiny_no_metric")].endswith("–")
    for title, cell in (("source", "generated"), ("splits", "train validation"), ("metrics", "accuracy")):
        assert header.index(title) == colour.index(cell)


def test_a_mixture_shows_its_rates(show):
    lines = show("tiny")
    assert lines[0] == "tiny, a mixture of 3 tasks"
    assert [line.split() for line in lines[3:]] == [[task, "1", "33.3%"] for task in tiny.TASKS]


@pytest.mark.parametrize("length", [5, 24])
def test_a_task_shows_what_its_caches_hold(show, folder, length):
    lengths = {"inputs": length, "targets": 6}
    text = "\n".join(show("tiny_mood", lengths=lengths))
    config = tiny.replace(tiny.experiment(folder, "x"), data={"lengths": lengths})
    cache = open_task(config.data, "tiny_mood", "train", load_vocabulary(config.backbone.vocabulary))
    sizes = [len(cache.vocabulary.encode(cache.text(i)["inputs_pretokenized"])) + 1 for i in range(64)]
    expected = [str(int(np.percentile(sizes, q, method="inverted_cdf"))) for q in (50, 90, 99, 100)]
    share = f"{100 * np.mean([size > length for size in sizes]):.2f}%"
    found = re.search(r"^train +64 +inputs +(.*)$", text, re.MULTILINE)
    assert found and found[1].split() == [*expected, share]
    assert (share == "100.00%") == (length == 5)
    yes = 100 * np.mean([label == "yes" for label in cache.labels])
    assert re.search(rf"^yes +{yes:.1f}% +\d+\.\d%$", text, re.MULTILINE)
    shown = [int(row) for row in re.findall(r"^Example (\d+) of train$", text, re.MULTILINE)]
    assert {cache.target_text(row) for row in shown} == {"yes", "no"}
    pieces = " ".join(cache.vocabulary.pieces(cache.inputs(shown[0])))
    assert pieces.endswith("</s>") and pieces in " ".join(text.split())
    assert cache.text(shown[0])["inputs_pretokenized"] in " ".join(text.split())


def test_a_task_without_labels_shows_examples_all_the_same(show):
    lines = show("tiny_free")
    assert sum(line.startswith("Example") for line in lines) == 3 and not any(line.startswith("label") for line in lines)
    assert "metrics  –" in show("tiny_no_metric")


def test_no_gin_file_is_needed(capsys, tmp_path):
    """The embedded mini's vocabulary and lengths; flags change what they change in a run."""
    flags = [MODULES, f"--gin.DataConfig.cache_dir={tmp_path}", "--gin.TASK_FEATURE_LENGTHS={'inputs': 9, 'targets': 3}"]
    assert cli.main(["tasks", "tiny_colour", *flags]) == 0
    assert "4,096 ids; at most 9 inputs and 3 targets" in capsys.readouterr().out


def test_mistakes(capsys, folder):
    for arguments, message in (
        (["tiny_color", MODULES], r"No task or mixture has 'tiny_color' in its name\. Did you mean 'tiny_colour'\?"),
        (["tiny", "colour"], "tasks takes one NAME, not tiny colour"),
        (["x", "--gin.DataConfig.task_modules=('no_such',)"], "names 'no_such', which cannot be imported"),
        (["tiny_colour", MODULES, "--gin.DataConfig.train_split=rain", "--gin.DataConfig.eval_split=rain"], "no split 'rain'"),
        (["tiny_colour", MODULES, "--gin.INITIAL_CHECKPOINT_PATH=nowhere"], "'nowhere' .* does not exist"),
    ):
        assert cli.main(["tasks", *arguments]) == 2
        error = capsys.readouterr().err
        assert re.search(f"^error: .*{message}.*\n$", error), error
    with pytest.raises(UserError, match="No task or mixture has 'zzz'"):
        run_tasks(DataConfig("", tiny.LENGTHS, 4, task_modules=("tiny_tasks",)), tiny.experiment(folder, "x").backbone, "zzz")


def test_bytes_are_shown_as_characters():
    vocabulary = ByteVocabulary()
    assert vocabulary.pieces([*vocabulary.encode("a é~"), 1]) == ["a", "▁", "<0xC3>", "<0xA9>", "~", "</s>"]
