"""Tasks from your own files: forms, splits, bad lines, cards."""

import json
import math
import re
from pathlib import Path

import pytest
from task_folders import write_splits

from mpt_jax.data.cache import mixture_tasks, open_task
from mpt_jax.errors import UserError


def write(folder: Path, task: str, **splits: list) -> None:
    """Writes the splits of a task and registers it as a new process would."""
    from tasks import files

    write_splits(folder / task, **splits)
    files.register()


def test_any_rows_with_inputs_and_targets(folder, data, vocabulary):
    rows = [{"inputs": f"the cat {i}", "targets": i % 2, "note": None} for i in range(6)]
    write(folder, "mine_plain", train=rows, validation=rows[:4])
    cache = open_task(data, "files_mine_plain", "train", vocabulary)
    assert cache.text(3) == {"inputs_pretokenized": "the cat 3", "targets_pretokenized": "1"}
    assert cache.score(["1", "1"], [0, 1]) == {"accuracy": 50.0}
    assert mixture_tasks(data, "files_mine_plain") == [("files_mine_plain", 1.0)]


def test_several_answers_and_questions_under_any_name(folder, data, vocabulary, caplog):
    write(folder, "mine_answers", train=[{"inputs": "who", "targets": "Ann", "answers": ["Ann", "Bob"]}], validation=[])
    assert open_task(data, "files_mine_answers", "train", vocabulary).score(["the bob"]) == {"em": 100.0, "f1": 100.0}
    question = {"question": "Who?", "context": "Ann.", "answers": ["Ann"]}
    unanswered = [{**question, "answers": answers} for answers in ([], [" "], {"text": [""]})]
    answered = {**question, "answers": ["", "Ann"]}
    write(folder, "mine_questions", train=[question, *unanswered, answered], validation=unanswered)
    cache = open_task(data, "files_mine_questions", "train", vocabulary)
    assert "3 rows with empty 'answers' are left out" in caplog.text
    assert [cache.target_text(i) for i in range(len(cache))] == ["Ann", "Ann"]
    with pytest.raises(UserError, match=r"validation.jsonl: all 1 rows of the split have empty 'answers'"):
        open_task(data, "files_mine_questions", "validation", vocabulary)
    assert cache.text(0)["inputs_pretokenized"] == "mine_questions question: Who ?  context: Ann . "


@pytest.mark.parametrize("size, expected", [(9_999, (9_999, 150, 151)), (10_000, (9_000, 1_000, 301))])
def test_test_split_by_attempts_rule(folder, size, expected):
    from tasks import files, own

    task = f"mine_{size}"
    write(
        folder,
        task,
        train=[{"inputs": f"train {i}", "targets": "x"} for i in range(size)],
        validation=[{"inputs": f"validation {i}", "targets": "x"} for i in range(301)],
    )

    def read(split: str) -> list[dict]:
        return list(own.split_rows(files.place_of(task), files.GENERIC.columns, split).rows())

    splits = {name: read(name) for name in ("train", "validation", "test")}
    assert tuple(map(len, splits.values())) == expected
    texts = [row["inputs"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == size + 301  # disjoint, and nothing is lost
    assert read("validation") == splits["validation"]
    first = [int(row["inputs"].split()[1]) for row in splits["validation"]]
    assert first != list(range(len(first)))  # a random choice


def test_a_single_row_validates_but_cannot_be_halved(folder, data, vocabulary):
    rows = [{"inputs": "the cat", "targets": "yes"}]
    write(folder, "mine_single", train=rows, validation=rows)
    assert len(open_task(data, "files_mine_single", "validation", vocabulary)) == 1
    with pytest.raises(UserError, match=r"validation.jsonl has one row, which cannot be halved"):
        open_task(data, "files_mine_single", "test", vocabulary)


def write_tsv(folder: Path, task: str, text: str) -> None:
    from tasks import files

    (folder / task).mkdir(exist_ok=True)
    (folder / task / "train.tsv").write_text(text, encoding="utf-8")
    files.register()


def test_tab_separated_rows_are_rows(folder, data, vocabulary):
    write_tsv(folder, "sst2", '\ufefflabel\tsentence\r\n1\tso "good\r\n\r\n0\t1.5\r\n')
    cache = open_task(data, "sst2_attempt", "official_train", vocabulary)
    assert [cache.text(i)["inputs_pretokenized"] for i in range(2)] == ['sst2 sentence: so "good', "sst2 sentence: 1.5"]
    assert [cache.target_text(i) for i in range(2)] == ["1", "0"]
    write_tsv(folder, "stsb", "sentence1\tsentence2\tlabel\na\tb\t3.71\n")
    assert open_task(data, "stsb_t5", "train", vocabulary).target_text(0) == "3.8"
    write_tsv(folder, "mine_table", "question\tcontext\tanswers\nWho?\tAnn.\tAnn\n")
    assert open_task(data, "files_mine_table", "train", vocabulary).score(["ann"]) == {"em": 100.0, "f1": 100.0}


def test_bad_tables_are_named(folder, data, vocabulary):
    for number, (text, message) in enumerate(
        [
            ("inputs\ttargets\na\tb\nc\n", r"train.tsv, line 3: 1 fields between tabs, but line 1 names 2 \(inputs, targets\)"),
            ("inputs\tinputs\na\tb\n", r"train.tsv, line 1: a field name occurs twice"),
            ("a\tb\n", r"train.tsv has no rows"),
            ("a\tb\nc\td\n", r"train.tsv, line 2: no field 'inputs' \(it has a, b\)"),
        ]
    ):
        write_tsv(folder, f"mine_bad_table_{number}", text)
        with pytest.raises(UserError, match=message):
            open_task(data, f"files_mine_bad_table_{number}", "train", vocabulary)
    write(folder, "mine_bad_table_0", train=[{"inputs": "a", "targets": "b"}])
    with pytest.raises(UserError, match=r"There are both .*train.jsonl and .*train.tsv"):
        open_task(data, "files_mine_bad_table_0", "train", vocabulary)


def test_rows_of_infer_need_no_answer(folder, data, vocabulary):
    from mpt_jax.data.rows import tokenise_rows

    question = {"question": "Who?", "context": "Ann.", "answers": {"text": ["Ann"]}}
    write(folder, "squad", train=[question] * 2, validation=[question])
    (tokens,), cut = tokenise_rows(data, "squad_t5", [{"question": "Who?", "context": "Ann."}], vocabulary)
    assert tokens[:-1].tolist() == vocabulary.encode("question: Who ? context: Ann . ") and cut == 0
    row = {"sentence": "so good ", "label": 1}
    write(folder, "sst2", train=[row], validation=[row] * 2)
    for given in (row, {"sentence": "so good "}, {**row, "label": "positive"}):  # the label as a number, none, as a word
        (tokens,), _ = tokenise_rows(data, "sst2_prompt_tuning", [given], vocabulary)
        assert tokens[:-1].tolist() == vocabulary.encode("sentence: so good ")


def test_a_given_test_file_is_the_test_split(folder, data, vocabulary):
    rows = [{"inputs": f"the cat {i}", "targets": "yes"} for i in range(9)]
    write(folder, "mine_three", train=rows[:4], validation=rows[4:6], test=rows[6:])
    for split, expected in (("train", rows[:4]), ("validation", rows[4:6]), ("test", rows[6:])):
        cache = open_task(data, "files_mine_three", split, vocabulary)
        assert [cache.text(i)["inputs_pretokenized"] for i in range(len(cache))] == [row["inputs"] for row in expected]


def test_a_changed_file_is_read_again_and_a_touched_one_is_not(folder, data, vocabulary):
    rows = [{"inputs": "the cat", "targets": "yes"}, {"inputs": "the dog", "targets": "no"}]
    write(folder, "mine_changing", train=rows, validation=rows)
    first = open_task(data, "files_mine_changing", "train", vocabulary)
    built = (first.folder / "meta.json").stat().st_mtime_ns
    (folder / "mine_changing" / "train.jsonl").touch()
    again = open_task(data, "files_mine_changing", "train", vocabulary)
    assert again.folder == first.folder and (again.folder / "meta.json").stat().st_mtime_ns == built
    write(folder, "mine_changing", train=[{"inputs": "the red", "targets": "yes"}, rows[1]])  # of the same size
    assert open_task(data, "files_mine_changing", "train", vocabulary).text(0)["inputs_pretokenized"] == "the red"


def test_another_folder_is_another_cache_and_both_stay(folder, data, vocabulary, tmp_path, monkeypatch):
    write(folder, "mine_twice", train=[{"inputs": "the cat", "targets": "yes"}], validation=[])
    first = open_task(data, "files_mine_twice", "train", vocabulary)
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("MPT_JAX_DATA", str(other))
    write(other, "mine_twice", train=[{"inputs": "the dog", "targets": "yes"}], validation=[])
    assert open_task(data, "files_mine_twice", "train", vocabulary).text(0)["inputs_pretokenized"] == "the dog"
    monkeypatch.setenv("MPT_JAX_DATA", str(folder))
    assert open_task(data, "files_mine_twice", "train", vocabulary).folder == first.folder


BAD = {
    "not JSON": ('{"inputs": "a", "targets"', r"train.jsonl, line 3: not JSON"),
    "not UTF-8": ('{"inputs": "a", "targets": "\udce9"}', r"train.jsonl, line 3: not UTF-8 \(invalid continuation byte\)"),
    "half a character": (r'{"inputs": "a\ud83d", "targets": "b"}', r"train.jsonl, line 3: not JSON .*surrogates not allowed"),
    "not an object": ("[1, 2]", r"train.jsonl, line 3: a JSON object is needed, not \[1, 2\]"),
    "a missing field": ({"inputs": "a", "answer": "b"}, r"line 3: no field 'targets' \(it has inputs, answer\)"),
    "many fields": (dict.fromkeys(map(str, range(90)), "a"), r"line 3: no field 'inputs' \(it has .{80}\); this task needs"),
    "a long value": ({"inputs": ["x" * 90], "targets": "b"}, r"line 3: 'inputs' must be text, not .{80}; correct the line"),
    "a list for text": ({"inputs": ["a"], "targets": "b"}, r"line 3: 'inputs' must be text, not \[\"a\"\]"),
    "null": ({"inputs": "a", "targets": None}, r"line 3: 'targets' must be text that is not empty, not null"),
    "true": ({"inputs": "a", "targets": True}, r"line 3: 'targets' must be text that is not empty, not true"),
    "an empty target": ({"inputs": "a", "targets": " "}, r"line 3: 'targets' must be text that is not empty, not \" \""),
    "a number that is none": ({"inputs": math.nan, "targets": "a"}, r"line 3: 'inputs' must be text, not NaN"),
}
WSC = {"text": "Ann ran .", "label": 0, "span1_text": "Ann", "span1_index": 0, "span2_text": "ran", "span2_index": 1}
MULTIRC = {"paragraph": "p", "question": "q?", "answer": "a", "label": 1, "idx": {"paragraph": 3, "question": 4}}
BAD_ROWS = {
    "sst2": {"sentence": "so good", "label": 1},
    "stsb": {"sentence1": "a", "sentence2": "b", "label": 3.71},
    "wsc": WSC,
    "multirc": MULTIRC,
    "squad": {"question": "Who?", "context": "Ann.", "answers": {"text": ["Ann"]}},
}
BAD_FIELDS = {  # of a dataset of the library: field, value, what is told
    "sst2": [
        ("label", None, r"'label' must be a label, 0 to 1 or one of negative, positive, not null"),
        ("label", True, r"'label' must be .* not true"),
        ("label", 1.0, r"'label' must be .* not 1.0"),
        ("label", 2, r"'label' must be .* not 2"),
        ("label", "good", r"'label' must be .* not \"good\""),
        ("sentence", None, r"'sentence' must be text, not null"),
    ],
    "stsb": [("label", "much", r"'label' must be a number, not \"much\""), ("label", math.inf, "must be a number, not Infinity")],
    "wsc": [("span1_index", -1, r"'span1_index' must be the number of a word, 0 to 999, not -1")],
    "multirc": [
        ("idx", 3, r"'idx' must be an object with paragraph and question, not 3"),
        ("idx", {"paragraph": 1}, r"'idx.question' must be text, not null"),
    ],
    "squad": [
        ("answers", {"answer_start": [3]}, r"'answers.text' must be a text or a list of texts, not null"),
        ("answers", ["a", None], r"'answers' must be a text or a list of texts, not \[\"a\", null\]"),
    ],
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_lines_are_named(folder, data, vocabulary, kind):
    line, message = BAD[kind]
    task = f"mine_bad_{kind.replace(' ', '_').replace('-', '_')}"
    write(folder, task, train=[{"inputs": "a", "targets": "b"}, "", line], validation=[])
    with pytest.raises(UserError, match=message):
        open_task(data, f"files_{task}", "train", vocabulary)


@pytest.mark.parametrize("task", BAD_FIELDS)
def test_bad_fields_are_named(folder, data, vocabulary, task):
    row = BAD_ROWS[task]
    for field, value, message in BAD_FIELDS[task]:
        write(folder, task, train=[row, {**row, field: value}])
        with pytest.raises(UserError, match=rf"{task}/train.jsonl, line 2: .*{message}.*; correct the line") as caught:
            open_task(data, f"{task}_attempt", "official_train", vocabulary)
        assert "\n" not in str(caught.value)


def test_labels_may_be_numbers_or_words(folder, data, vocabulary):
    row = {"premise": "p", "hypothesis": "h"}
    write(folder, "cb", train=[{**row, "label": label} for label in ("neutral", 1, "1")])
    for style, expected in (("attempt", ["2", "1", "1"]), ("t5", ["neutral", "contradiction", "contradiction"])):
        cache = open_task(data, f"cb_{style}", "official_train", vocabulary)
        assert [cache.target_text(i) for i in range(3)] == expected


CARD = {
    "inputs": "{first} or {second}?",
    "target": "winner",
    "labels": {"0": "left", "1": "right"},
    "metrics": ["accuracy", "f1"],
}


def test_a_card_says_what_to_make_of_any_fields(folder, data, vocabulary):
    (folder / "mine_card").mkdir()
    card = folder / "mine_card" / "task.json"
    card.write_text(json.dumps(CARD))
    rows = [{"first": "the cat", "second": i, "winner": i % 2, "more": None} for i in range(4)]
    write(folder, "mine_card", train=rows, validation=rows)
    cache = open_task(data, "files_mine_card", "train", vocabulary)
    assert [cache.text(i)["inputs_pretokenized"] for i in range(2)] == ["the cat or 0?", "the cat or 1?"]
    assert [cache.target_text(i) for i in range(4)] == ["left", "right"] * 2
    scores = cache.score(["left", "right", "right", "right"])
    assert (scores["accuracy"], scores["f1"]) == pytest.approx((75.0, 80.0))
    assert cache.meta["scoring"] is not None  # scores without TensorFlow
    card.write_text(json.dumps({**CARD, "labels": {"0": "l", "1": "r"}}))
    assert open_task(data, "files_mine_card", "train", vocabulary).folder != cache.folder  # it is part of the cache's key
    write(folder, "mine_card", train=[{**rows[0], "winner": 2}])
    with pytest.raises(UserError, match=r"mine_card/train.jsonl, line 1: 'winner' must be one of 0, 1, not 2"):
        open_task(data, "files_mine_card", "train", vocabulary)


BAD_CARDS = {
    "not JSON": ("{", r"task.json cannot be read as JSON"),
    "an unknown key": ({**CARD, "metric": []}, r"has the key 'metric', which means nothing. Did you mean 'metrics'"),
    "no template": ({"target": "x"}, r"needs the key 'inputs'"),
    "a template of no field": ({**CARD, "inputs": "text"}, r"'inputs' must name fields in braces, not 'text'"),
    "an open brace": ({**CARD, "inputs": "{first"}, r"'inputs' is not a template"),
    "an unknown metric": (
        {**CARD, "metrics": ["acuracy"]},
        r"'metrics' must be one of .*, not 'acuracy'. Did you mean 'accuracy'",
    ),
    "a wrong type": ({**CARD, "labels": ["a"]}, r"'labels' must be a dict, not \['a'\]"),
    "no labels for F1": ({"inputs": "{first}", "metrics": ["f1"]}, r"'metrics' has 'f1', which needs .*'labels', two words"),
}


@pytest.mark.parametrize("kind", BAD_CARDS)
def test_bad_cards_are_told(folder, data, vocabulary, caplog, kind):
    card, message = BAD_CARDS[kind]
    task = f"mine_bad_card_{list(BAD_CARDS).index(kind)}"
    (folder / task).mkdir()
    (folder / task / "task.json").write_text(card if isinstance(card, str) else json.dumps(card))
    write(folder, task, train=[{"first": "a"}])
    assert re.search(rf"files_{task} is not there. .*{message}", caplog.text)
    with pytest.raises(UserError, match=rf"'files_{task}' is registered"):
        open_task(data, f"files_{task}", "train", vocabulary)


def test_a_folder_of_a_dataset_of_the_library_has_one_name(folder, data, vocabulary):
    row = {"question1": "a", "question2": "b", "label": 1}
    write(folder, "qqp", train=[row], validation=[row] * 3)
    with pytest.raises(UserError, match=r"No seqio task or mixture 'files_qqp'"):
        open_task(data, "files_qqp", "train", vocabulary)
    assert len(open_task(data, "qqp_t5", "official_train", vocabulary)) == 1
    write(folder, "mine_unknown", train=[{"first": "a"}], validation=[])
    with pytest.raises(UserError, match=r"no field 'inputs' \(it has first\); .* or a file task.json beside it that says what"):
        open_task(data, "files_mine_unknown", "train", vocabulary)


def test_a_folder_that_cannot_be_a_task_is_told(folder, caplog):
    write(folder, "my-task", train=[{"inputs": "a", "targets": "b"}])
    assert "my-task is not read: rename the folder" in caplog.text


def test_missing_things_are_named(folder, data, vocabulary, monkeypatch):
    write(folder, "mine_lonely", train=[{"inputs": "a", "targets": "b"}])
    with pytest.raises(UserError, match=r"'files_mine_lonely' has no split 'validation' \(it has train\)"):
        open_task(data, "files_mine_lonely", "validation", vocabulary)
    with pytest.raises(UserError, match="Did you mean 'files_mine_lonely'"):
        open_task(data, "files_mine_loneyl", "train", vocabulary)
    with pytest.raises(UserError, match=rf"There is no {folder}/q/train\.jsonl .* There are files_.*mine_lonely") as caught:
        open_task(data, "files_q", "train", vocabulary)
    held = re.search(r"There are (files_[^.]*)\.", str(caught.value))[1].split(", ")
    assert all(list(folder.glob(f"{task.removeprefix('files_')}/train.*")) for task in held)
    monkeypatch.setenv("MPT_JAX_DATA", f"{folder}/nowhere")
    for task in ("files_q", "files_rte"):  # one that is not registered, and a well-known name
        with pytest.raises(UserError, match=f"folder {folder}/nowhere"):
            open_task(data, task, "train", vocabulary)
    monkeypatch.setenv("MPT_JAX_DATA", str(folder))
    (folder / "mine_lonely" / "train.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no rows"):
        open_task(data, "files_mine_lonely", "train", vocabulary)
    (folder / "mine_lonely" / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"There is no .*mine_lonely/train\.jsonl"):
        open_task(data, "files_mine_lonely", "train", vocabulary)
    monkeypatch.delenv("MPT_JAX_DATA")
    with pytest.raises(UserError, match="MPT_JAX_DATA, which is not set"):
        open_task(data, "files_mine_lonely", "train", vocabulary)
