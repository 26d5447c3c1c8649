"""The results file survives being cut off and written twice, and its means are those that a reader would compute."""

import json
import logging

import numpy as np
import pytest

from mpt_jax.errors import UserError
from mpt_jax.studies import results


def record(method="mpt", task="a", k=4, seed=0, score=50.0, **more) -> dict:
    stage = more.pop("stage", "few_shot" if k else "full")
    run = results.run_id(stage, method, task, k, seed)
    return {"run_id": run, "stage": stage, "method": method, "task": task, "k": k, "seed": seed, "score": score, **more}


def test_round_trip_and_writing_twice_changes_nothing(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    records = [record(seed=0, score=1.5), record(seed=1), record(task="ä", seed=0)]
    assert results.append(path, records[:2]) == 2
    assert results.append(path, records) == 1
    before = path.read_bytes()
    assert results.append(path, records) == 0
    assert path.read_bytes() == before
    assert results.read(path) == records
    assert len(path.read_text().splitlines()) == 3


def test_a_cut_off_last_line_is_ignored_and_then_replaced(tmp_path, caplog):
    path = tmp_path / "results.jsonl"
    results.append(path, [record(seed=0), record(seed=1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with caplog.at_level(logging.WARNING):
        assert [r["seed"] for r in results.read(path)] == [0]
    assert "line 2" in caplog.text
    assert results.append(path, [record(seed=0), record(seed=1), record(seed=2)]) == 2
    assert [r["seed"] for r in results.read(path)] == [0, 1, 2]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(record(seed=0)))
    assert results.append(path, [record(seed=1)]) == 1
    assert [r["seed"] for r in results.read(path)] == [0, 1]


def test_the_later_line_of_a_run_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(record(score=score)) + "\n" for score in (1.0, 2.0)))
    assert [r["score"] for r in results.read(path)] == [2.0]


@pytest.mark.parametrize(
    "line, words",
    [
        ("not json", "is not JSON"),
        ('["a list"]', "not a JSON object"),
        ('{"run_id": "x"}', "'stage'"),
        (json.dumps(record() | {"score": "high"}), "'score'"),
        (json.dumps(record() | {"score": float("nan")}), "'score'"),
        (json.dumps(record() | {"seed": True}), "'seed'"),
        (json.dumps(record(stage="zero_shot")), "does not say what it was trained on"),
        (json.dumps(record() | {"cell": {}}), "'cell'"),
        (json.dumps(record() | {"cell": 3}), "'cell'"),
    ],
)
def test_a_bad_line_names_file_and_line(tmp_path, line, words):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(record()) + "\n" + line + "\n" + json.dumps(record(seed=1)) + "\n")
    with pytest.raises(UserError, match="line 2") as error:
        results.read(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_no_file_and_no_right_to_write_are_told(tmp_path):
    with pytest.raises(UserError, match="run the pipeline first"):
        results.read(tmp_path / "results.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="MODEL_DIR"):
        results.append(tmp_path / "file" / "results.jsonl", [record()])


def test_spread_is_the_sample_standard_deviation():
    values = [61.0, 64.5, 70.25]
    got = results.spread(values)
    np.testing.assert_allclose([got.mean, got.std, got.n], [np.mean(values), np.std(values, ddof=1), 3])
    assert str(got) == "65.2 ± 4.7"
    one = results.spread([70.0])
    assert np.isnan(one.std)
    assert str(one) == "70.0"
    assert results.spread([]) is None


def test_mean_over_targets_spreads_over_seeds_and_leaves_out_incomplete_ones():
    scores = {("a", 0): 60.0, ("b", 0): 80.0, ("a", 1): 50.0, ("b", 1): 60.0, ("a", 2): 90.0}  # seed 2 has no b
    records = [record(task=task, seed=seed, score=score) for (task, seed), score in scores.items()]
    assert results.seed_means(records, "mpt", 4, ["a", "b"]) == {0: 70.0, 1: 55.0}
    mean = results.mean_over_targets(records, "mpt", 4)
    np.testing.assert_allclose([mean.mean, mean.std, mean.n], [62.5, np.std([70, 55], ddof=1), 2])
    assert results.task_score(records, "mpt", 4, "a").n == 3


def test_difference_is_paired_by_seed():
    records = [record(seed=s, score=50.0 + 10 * s) for s in range(3)]
    records += [record("prompt_tuning", seed=s, score=48.0 + 10 * s) for s in (0, 2)]
    gap = results.difference(records, "mpt", "prompt_tuning", 4)
    assert (gap.mean, gap.std, gap.n) == (2.0, 0.0, 2)


def test_source_runs_are_no_targets():
    records = [record(k=16), record(k=4), record(k=0), record("prompt_tuning", "s", 0, stage="teachers")]
    assert results.settings_of(records) == [4, 16, 0]
    assert len(results.targets_of(records)) == 3


def test_reference_needs_every_task():
    records = [record(chance=50.0), record(task="b", chance=None)]
    assert results.reference(records, "chance", ["a"]) == 50.0
    assert results.reference(records, "chance", ["a", "b"]) is None
    assert results.reference(records, "ceiling", ["a"]) is None


def test_a_reference_is_one_that_all_records_agree_on():
    """As on two test splits, whose best constant answers differ."""
    records = [record(chance=50.0), record(seed=1, chance=60.0), record(task="b", chance=40.0)]
    for rows in (records, records[::-1]):
        assert results.reference(rows, "chance", ["a"]) is results.reference(rows, "chance", ["a", "b"]) is None
        assert results.reference(rows, "chance", ["b"]) == 40.0
