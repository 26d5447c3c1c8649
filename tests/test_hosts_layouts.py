"""Weights cut over several processes ("fsdp", and "model" with it), and packed rows: all compute what one device does."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from hosts import assert_alike, lines, losses, results, scoring, training, write_rows

from mpt_jax.models.t5 import count_parameters

FSDP = {"partition": {"fsdp": 2}}
BOTH = {"partition": {"num_partitions": 2, "fsdp": 2}}
MODEL = {"method": "none", "rate": 0.01, "train": {"checkpoint_period": 4}}
PACKED = {"pack": True, "train": {"checkpoint_period": 4}}
LOADS = [{"do": "load"}, {"do": "load", "dtype": "int8"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.make(tmp_path_factory.mktemp("layouts"))
    write_rows(folder / "in.jsonl")
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """Two processes with one device each. The second run of each kind repeats the first one."""
    jobs = [training("fsdp", **FSDP), training("fsdp_again", **FSDP)]
    jobs += [training("tuned", **MODEL, **FSDP), training("tuned_again", **MODEL, **FSDP)]
    jobs += [training("tuned_begun_by_two", 4, **MODEL, **FSDP), training("packed", **PACKED)]
    jobs += [scoring("evaluate", "fsdp", **FSDP), *(load | FSDP for load in LOADS)]
    return results(2, folder, jobs)


@pytest.fixture(scope="module")
def one(folder, two):
    jobs = [training("one"), training("one_packed", **PACKED), training("one_tuned", **MODEL)]
    jobs += [training("tuned_begun_by_two", **MODEL), *LOADS, scoring("evaluate", "one")]
    jobs += [scoring("evaluate", "one_packed"), scoring("infer", "one_packed")]
    return results(1, folder, jobs)


@pytest.fixture(scope="module")
def four(folder, one):
    """Four processes with one device each, two of which hold a model together; each has a quarter of it."""
    jobs = [training("four", **PACKED, **BOTH), scoring("evaluate", "four", **BOTH), scoring("infer", "four", **BOTH)]
    return results(4, folder, [*jobs, *(load | BOTH for load in LOADS)])


def state(folder, run):
    """The arrays of the run's last checkpoint, by path."""
    path = folder / run / "checkpoints" / "8" / "state"
    with ocp.StandardCheckpointer() as reader:
        shapes = reader.metadata(path).item_metadata
        return reader.restore(path, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), dict(shapes)))


def assert_same_state(folder, run, other, tolerance):
    """To a part of each leaf's largest number; 0 = bit for bit."""
    ours, theirs = state(folder, run), state(folder, other)
    assert ours.keys() == theirs.keys()
    assert ours["step"] == 8
    for path, expected in theirs.items():
        if tolerance and expected.dtype == np.float32:
            most = tolerance * np.nanmax(np.abs(expected), initial=0)
            np.testing.assert_allclose(ours[path], expected, rtol=0, atol=most, err_msg=path)
        else:
            np.testing.assert_array_equal(ours[path], expected, err_msg=path)


def test_fsdp_over_two_processes_trains_a_prompt_as_one_does(folder, two, one):
    """The prompt starts from the embedding, of which each process has a half."""
    assert_alike(two[0], one[0])
    assert_same_state(folder, "fsdp", "one", 1e-5)
    assert two[1] == two[0]
    assert_same_state(folder, "fsdp_again", "fsdp", 0)


def test_fsdp_over_two_processes_tunes_a_model_as_one_does(folder, two, one):
    """Its checkpoint, written in halves, is read back by one process."""
    assert losses(two[2]) == pytest.approx(losses(one[2]), abs=2e-6)
    assert_same_state(folder, "tuned", "one_tuned", 1e-5)
    assert two[3] == two[2]
    assert_same_state(folder, "tuned_again", "tuned", 0)
    assert losses(one[3]) == pytest.approx(losses(one[2]), abs=2e-6)
    assert_same_state(folder, "tuned_begun_by_two", "one_tuned", 1e-5)


def test_two_processes_train_on_packed_rows_as_one_does(folder, two, one):
    """Each makes its share of the rows; and packed rows are those of padded ones."""
    assert losses(two[5]) == pytest.approx(losses(one[1]), abs=2e-6)
    assert losses(two[5]) == pytest.approx(losses(one[0]), abs=2e-6)
    assert_same_state(folder, "packed", "one_packed", 1e-5)


def test_packed_rows_and_a_model_cut_both_ways_over_four_processes(folder, one, four):
    assert losses(four[0]) == pytest.approx(losses(one[1]), abs=2e-6)
    assert_same_state(folder, "four", "one_packed", 1e-5)


def test_each_example_is_scored_once(folder, two, one, four):
    """Though processes that hold a model together answer the same rows. What is gathered, all processes have."""
    for found, expected in ((two[6], one[6]), (four[1], one[7])):
        assert found["tasks"] == expected["tasks"]
        assert [row["examples"] for row in found["tasks"]] == [20, 20]
    answers = [lines(folder / run / "out.jsonl") for run in ("four", "one_packed")]
    for answer, other in zip(*answers, strict=True):
        assert (answer["inputs"], answer["prediction"]) == (other["inputs"], other["prediction"])
        for label, score in other["scores"].items():
            assert answer["scores"][label] == pytest.approx(score, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_process_reads_its_own_part_of_the_backbone_and_the_first_one_all(two, one, four, dtype):
    """int8 kernels are looked over before, for their scales, which are those of whole kernels: again each its own part."""
    int8, total = dtype == "int8", count_parameters(tiny.CONFIG)
    for loads, count in ((one[4:6], 1), (two[7:9], 2), (four[3:5], 4)):
        found = loads[int8]
        again = found["kernels"] if int8 else [0] * count
        assert found["read"] == [n + more for n, more in zip([total, *found["held"][1:]], again, strict=True)]
        assert max(found["held"]) < 1.1 * total / count, "what is whole on each device is little"
        assert all(found["right"])
        assert found["fingerprint"] == one[4]["fingerprint"]
