"""The published splits: PyTorch's permutation, the published counts, and what is made of local folders and of TFDS."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from task_folders import write_splits

from mpt_jax.data.cache import open_task
from mpt_jax.errors import UserError

# Training, validation and test rows that the tables of MPT, DePT and ULPT (arXiv 2502.04501, Table 4) count.
PUBLISHED = {
    "mnli": (392_702, 9_832, 9_815),
    "qqp": (362_846, 1_000, 40_430),  # the table prints 40,431; GLUE has 40,430 validation rows
    "qnli": (103_743, 1_000, 5_463),
    "sst2": (66_349, 1_000, 872),
    "stsb": (5_749, 750, 750),
    "mrpc": (3_668, 204, 204),
    "glue_rte": (2_490, 138, 139),
    "cola": (8_551, 521, 522),
    "multirc": (27_243, 2_424, 2_424),
    "boolq": (9_427, 1_635, 1_635),
    "wic": (5_428, 319, 319),
    "wsc": (554, 52, 52),
    "cb": (250, 28, 28),
    "nq": (103_071, 1_000, 12_836),
    "hotpotqa": (71_928, 1_000, 5_901),
    "searchqa": (116_384, 1_000, 16_980),
    "newsqa": (73_160, 1_000, 4_212),
    "winogrande": (39_398, 1_000, 1_267),
    "yelp_polarity": (100_000, 1_000, 38_000),
    "scitail": (23_596, 652, 652),
    "paws": (49_401, 8_000, 8_000),
}


def write(folder: Path, dataset: str, **sizes: int) -> None:
    """Files of a dataset with the fields `sentence` and `label`, so many rows in each split; every row is another one."""
    splits = {split: [{"sentence": f"{split} {i}", "label": i % 2} for i in range(size)] for split, size in sizes.items()}
    write_splits(folder / dataset, **splits)


def numbers(cache) -> list[tuple[str, int]]:
    """(file, row) of each example."""
    found = [re.fullmatch(r"\w+ sentence: (\w+) (\d+)", cache.text(i)["inputs_pretokenized"]) for i in range(len(cache))]
    return [(match[1], int(match[2])) for match in found]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 56, 277, 1_043, 10_000, 67_349])
@pytest.mark.parametrize("seed", [42, 0])
def test_permutation_is_torchs(n, seed):
    import torch

    from tasks import splits

    expected = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_array_equal(splits.permutation(n, seed), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    from tasks import mixtures, splits

    dataset = mixtures.DATASETS[name]
    assert tuple(splits.counts(dataset.protocol, dataset.rows).values()) == PUBLISHED[name]
    assert list(dataset.protocol) == ["train", "validation", "test"]


def test_counts_are_those_of_the_rows_that_are_chosen():
    from tasks import mixtures, splits

    for dataset in mixtures.DATASETS.values():
        # Smaller, for time: the protocol is the same.
        rows = {name: size and size // 10 + 2_000 for name, size in dataset.rows.items()}
        sizes = splits.counts(dataset.protocol, rows)
        for split, size in sizes.items():
            part = dataset.protocol[split]
            assert len(splits.chosen(part, rows[part.official])) == size, (dataset.name, split)


@pytest.mark.parametrize("protocol", ["halved", "held_out", "own"])
def test_splits_of_one_file_are_disjoint_and_whole(protocol):
    from tasks import splits

    for size in (1_001, 2_345):
        found: dict[str, list[int]] = {}
        for part in getattr(splits, protocol)().values():
            found.setdefault(part.official, []).extend(splits.chosen(part, size).tolist())
        for rows in found.values():
            assert sorted(rows) == list(range(size))


def test_rows_are_those_that_attempt_takes(folder, data, vocabulary):
    """Of a small dataset halves of the validation file by torch.randperm; of a large one, 1,000 training rows."""
    import torch

    def order(n: int) -> list[int]:
        return torch.randperm(n, generator=torch.Generator().manual_seed(42)).tolist()

    write(folder, "cola", train=3, validation=11)
    halves = {split: numbers(open_task(data, "cola_attempt", split, vocabulary)) for split in ("train", "validation", "test")}
    assert halves["train"] == [("train", i) for i in range(3)]
    assert halves["validation"] == [("validation", i) for i in sorted(order(11)[:5])]
    assert halves["test"] == [("validation", i) for i in sorted(order(11)[5:])]
    write(folder, "sst2", train=1_200, validation=5)
    held = {split: numbers(open_task(data, "sst2_attempt", split, vocabulary)) for split in ("train", "validation", "test")}
    assert held["validation"] == [("train", i) for i in sorted(order(1_200)[:1_000])]
    assert held["train"] == [("train", i) for i in sorted(order(1_200)[1_000:])]
    assert held["test"] == [("validation", i) for i in range(5)]
    for split, file in (("official_train", ("train", 1_200)), ("official_validation", ("validation", 5))):
        assert numbers(open_task(data, "sst2_attempt", split, vocabulary)) == [(file[0], i) for i in range(file[1])]


def test_formats_of_one_dataset_have_the_same_rows(folder, data, vocabulary):
    write(folder, "cola", train=3, validation=11)
    t5, attempt = (open_task(data, f"cola_{style}", "test", vocabulary) for style in ("t5", "attempt"))
    assert numbers(t5) == numbers(attempt) and t5.target_text(0) != attempt.target_text(0)


def test_counts_other_than_the_published_ones_are_told(folder, data, vocabulary, caplog):
    write(folder, "cola", train=3, validation=11)
    open_task(data, "cola_attempt", "validation", vocabulary)
    assert "cola/validation.jsonl has 11 rows; the published split has 1,043" in caplog.text
    assert "are halves of" not in caplog.text  # the published protocol


@pytest.mark.parametrize(
    "dataset, sizes, expected",
    [
        ("sst2", {"train": 700, "validation": 9}, {"train": 700, "validation": 4, "test": 5}),  # too few to hold 1,000 out
        ("yelp_polarity", {"train": 1_500, "validation": 9}, {"train": 1_500, "validation": 4, "test": 5}),  # no test file
    ],
)
def test_without_the_files_of_the_protocol_validation_is_halved_and_told(
    folder, data, vocabulary, caplog, dataset, sizes, expected
):
    write(folder, dataset, **sizes)
    for file in (folder / dataset).iterdir():
        file.write_text(file.read_text().replace('"sentence"', '"sentence"' if dataset == "sst2" else '"text"'))
    caches = {split: open_task(data, f"{dataset}_attempt", split, vocabulary) for split in expected}
    assert {split: len(cache) for split, cache in caches.items()} == expected
    assert set(numbers(caches["validation"])).isdisjoint(numbers(caches["test"]))
    assert f"{dataset}: validation and test are halves of the validation file, not the published splits" in caplog.text


def test_too_few_rows_to_hold_out_and_nothing_to_halve(folder, data, vocabulary):
    write(folder, "imdb", train=900, test=3)
    for file in (folder / "imdb").iterdir():
        file.write_text(file.read_text().replace("sentence", "text"))
    with pytest.raises(
        UserError, match=r"imdb/train.jsonl has no more rows than the 1,000 that are held out.*add a validation file"
    ):
        open_task(data, "imdb_t5", "train", vocabulary)


def test_a_test_file_with_labels_is_official(folder, data, vocabulary, caplog):
    write(folder, "cola", train=3, validation=10, test=4)
    with pytest.raises(
        UserError, match=r"no split 'official_test' \(it has train, validation, test, official_train, official_val"
    ):
        open_task(data, "cola_attempt", "official_test", vocabulary)  # GLUE's test labels are secret
    row = {"premise": "p", "hypothesis": "h"}
    labels = {"train": (0, 1), "validation": (0, 1, 0), "test": (1, -1, 0)}
    write_splits(folder / "scitail", **{split: [{**row, "label": label} for label in given] for split, given in labels.items()})
    assert len(open_task(data, "scitail_t5", "official_test", vocabulary)) == 2
    assert "scitail/test.jsonl: 1 rows with label -1 are left out" in caplog.text
    assert len(open_task(data, "scitail_t5", "test", vocabulary)) == 2  # of validation: the protocol's


def test_wsc_is_trained_on_right_referents_only(folder, data, vocabulary):
    rows = [{"text": "Ann said she ran .", "span1_text": "Ann", "span1_index": 0, "span2_text": "she", "span2_index": 2}] * 4
    labelled = [{**row, "label": number % 2} for number, row in enumerate(rows)]
    write_splits(folder / "wsc", train=labelled, validation=labelled)
    sizes = {"train": 2, "official_train": 2, "validation": 2, "official_validation": 4}
    assert {split: len(open_task(data, "wsc_t5", split, vocabulary)) for split in sizes} == sizes
    assert len(open_task(data, "wsc_attempt", "train", vocabulary)) == 4
    cache = open_task(data, "wsc_t5", "official_validation", vocabulary)
    # Labels 0, 1, 0, 1: naming the noun is right for the second and the fourth.
    assert cache.score(["Ann", "ann", "Bob", "the Ann"])["accuracy"] == 75.0


def test_references_of_one_input_are_one_example_to_test_on(folder, data, vocabulary):
    rows = [{"meaning_representation": mr, "human_reference": f"{mr} {n}"} for n in range(3) for mr in ("cat", "dog")]
    write_splits(folder / "e2e_nlg", train=rows, validation=rows, test=rows)
    assert len(open_task(data, "e2e_nlg_t5", "train", vocabulary)) == 6
    cache = open_task(data, "e2e_nlg_t5", "test", vocabulary)
    assert [cache.text(i)["answers"] for i in range(len(cache))] == [[f"{mr} {n}" for n in range(3)] for mr in ("cat", "dog")]


def test_where_the_rows_come_from_is_told_and_counts(folder, data, vocabulary, caplog):
    """A folder wins over TFDS as soon as it is there; without it, the error says what to do."""
    from tasks import glue, library

    # A configuration that TFDS does not have fails at once, without a network.
    library.register(dataclasses.replace(glue.DATASETS["cola"], tfds="glue/no_such:2.0.0"), "attempt", name="cola_nowhere")
    library.register(dataclasses.replace(glue.DATASETS["cola"], tfds=""), "attempt", name="cola_local")
    with pytest.raises(
        UserError, match=r"dataset 'glue/no_such:2.0.0' of 'cola' could not be read .* a folder cola of .*MPT_JAX_DATA"
    ):
        open_task(data, "cola_nowhere", "train", vocabulary)
    with pytest.raises(UserError, match=r"TFDS does not have 'cola'; put its files into a folder cola .*MPT_JAX_DATA"):
        open_task(data, "cola_local", "train", vocabulary)
    write(folder, "cola", train=3, validation=11)
    caplog.set_level("INFO", "mpt_jax")
    first = open_task(data, "cola_nowhere", "train", vocabulary)
    assert f"cola/train: 3 rows of {folder / 'cola' / 'train.jsonl'}" in caplog.text
    write(folder, "cola", train=4, validation=11)
    second = open_task(data, "cola_nowhere", "train", vocabulary)
    assert (len(first), len(second)) == (3, 4) and first.folder != second.folder


def test_rows_of_tfds_are_chosen_by_the_same_numbers():
    import tensorflow as tf

    from tasks import library, splits

    for part in splits.held_out().values():
        numbers_ = splits.chosen(part, 1_234)
        rows = library.select(tf.data.Dataset.range(1_234), numbers_, 1_234)
        assert list(rows.as_numpy_iterator()) == numbers_.tolist()
    rows = tf.data.Dataset.from_tensor_slices({"label": tf.constant([1, -1, 0], tf.int64)})
    assert [row["label"] for row in library.labelled(rows).as_numpy_iterator()] == [1, 0]
