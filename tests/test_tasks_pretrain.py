"""Span corruption and prefix language modelling: T5's arithmetic, nothing lost, the same every time."""

import dataclasses
import gzip
import itertools

import numpy as np
import pytest
import tensorflow as tf

from mpt_jax.config import DataConfig
from mpt_jax.data.cache import open_task
from mpt_jax.data.vocabulary import Vocabulary
from mpt_jax.errors import UserError
from tasks import features, pretrain

WORDS = "the cat is red and the dog is blue a green bird the food is good and fine".split()


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """400 documents of two paragraphs in a plain and a compressed file."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = ["\n".join(" ".join(rng.choice(WORDS, 12)) for _ in range(2)) for _ in range(400)]
    (folder / "a.txt").write_text("\n\n".join(texts[:100]) + "\n\n\n")
    with gzip.open(folder / "b.txt.gz", "wt") as file:
        file.write("\n" + "\n\n".join(texts[100:]))
    (folder / "notes.md").write_text("no text of the corpus")
    monkeypatch.setenv("MPT_JAX_CORPUS", str(folder))
    return texts


@pytest.fixture
def data(tmp_path):
    return DataConfig("", {"inputs": 32, "targets": 16}, 4, cache_dir=str(tmp_path / "cache"))


def t5_lengths(inputs_length: int, extra: int = 1) -> tuple[int, int]:
    """(tokens, targets) by the published recipe: the longest chunk whose corrupted inputs, with EOS, fit."""

    def lengths(tokens):
        noise = round(tokens * 0.15)
        spans = round(noise / 3.0)
        return tokens - noise + spans + extra, noise + spans + extra

    tokens = inputs_length
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    return tokens, lengths(tokens)[1]


@pytest.mark.parametrize("inputs", [64, 128, 256, 512])
def test_chunks_are_as_long_as_t5s(inputs):
    tokens, targets = t5_lengths(inputs)
    assert pretrain.span_lengths(inputs, targets)[0] == tokens
    if inputs == 512:
        assert (tokens, targets) == (568, 114)  # the well-known numbers of T5's pretraining
    shorter = pretrain.span_lengths(inputs, targets - 5)
    assert shorter[0] < tokens and shorter[1] + shorter[2] + 1 <= targets - 5


def test_too_short_lengths_are_told(corpus, data, vocabulary):
    assert pretrain.span_lengths(3, 3) == (2, 1, 1)
    for task, inputs, targets in (("span_corruption", 32, 2), ("prefix_lm", 32, 1), ("prefix_lm", 1, 16)):
        short = dataclasses.replace(data, lengths={"inputs": inputs, "targets": targets})
        with pytest.raises(UserError, match=f"inputs={inputs}, targets={targets}; give at least"):
            open_task(short, task, "train", vocabulary)


def merged(inputs: list[int], targets: list[int], sentinels: range) -> list[int]:
    """The original chunk, from inputs and targets without their EOS."""
    spans, key = {}, None
    for token in targets:
        if token in sentinels:
            key = token
            spans[key] = []
        else:
            spans[key].append(token)
    return [part for token in inputs for part in (spans[token] if token in sentinels else [token])]


def test_corruption_loses_nothing():
    top, eos, count, width, noise, spans = 999, 1, 300, 40, 9, 3
    chunks = np.arange(count * width, dtype=np.int32).reshape(count, width) % 800 + 2
    inputs, targets = pretrain.corrupt_spans(chunks, noise, spans, top, eos, np.random.default_rng(0))
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs.shape == (count, width - noise + spans + 1) and targets.shape == (count, noise + spans + 1)
    assert (inputs[:, -1] == eos).all() and (targets[:, -1] == eos).all()
    sentinels = range(top - spans + 1, top + 1)
    starts, lengths = [], []
    for chunk, source, target in zip(chunks.tolist(), inputs.tolist(), targets.tolist(), strict=True):
        assert merged(source[:-1], target[:-1], sentinels) == chunk
        assert [token for token in source if token in sentinels] == [999, 998, 997]
        assert [token for token in target if token in sentinels] == [999, 998, 997]
        assert source[0] not in sentinels  # begins with a kept token
        marks = [i for i, token in enumerate(target) if token in sentinels] + [len(target) - 1]
        lengths += [b - a - 1 for a, b in itertools.pairwise(marks)]
        starts.append(source.index(999))
    assert min(lengths) == 1 and np.mean(lengths) == noise / spans and max(lengths) == noise - spans + 1
    assert len(set(starts)) > 15  # the spans lie anywhere


def training_tokens(corpus: list[str], vocabulary: Vocabulary) -> list[int]:
    """Every document but the 200th and the 400th, paragraph after paragraph."""
    texts = [text for number, text in enumerate(corpus) if number % 200 != 199]
    return [token for text in texts for line in text.split("\n") for token in vocabulary.encode(line)]


def test_span_corruption_of_a_corpus(corpus, data, vocabulary):
    cache = open_task(data, "span_corruption", "train", vocabulary)
    held_out = open_task(data, "span_corruption", "validation", vocabulary)
    tokens = training_tokens(corpus, vocabulary)
    width, noise, spans = pretrain.span_lengths(32, 16)
    sentinels = range(vocabulary.vocab_size - 100, vocabulary.vocab_size)
    assert len(cache) >= len(tokens) // width - 1
    chunks = [merged(cache.inputs(i)[:-1].tolist(), cache.targets(i)[:-1].tolist(), sentinels) for i in range(len(cache))]
    joined = [token for chunk in chunks for token in chunk]
    offset = next(i for i in range(width) if tokens[i : i + 60] == joined[:60])
    assert joined == tokens[offset : offset + len(joined)]  # documents run on, in order
    assert {len(cache.inputs(i)) for i in range(len(cache))} == {width - noise + spans + 1} and width - noise + spans + 1 >= 31
    assert cache.truncated == {"inputs": 0, "targets": 0} and cache.labels is None and cache.score([""], [0]) == {}
    assert cache.target_text(0).startswith("<extra_id_0>")
    assert 0 < len(held_out) <= 3


def test_prefix_language_modelling_of_a_corpus(corpus, data, vocabulary):
    cache = open_task(data, "prefix_lm", "train", vocabulary)
    parts = [(cache.inputs(i)[:-1].tolist(), cache.targets(i)[:-1].tolist()) for i in range(len(cache))]
    assert {len(target) for _, target in parts} == {15}  # 16 with EOS
    prefixes = [len(prefix) for prefix, _ in parts]
    assert min(prefixes) <= 3 and max(prefixes) == 31 and np.mean(prefixes) == pytest.approx(16, abs=1.5)
    tokens = training_tokens(corpus, vocabulary)
    joined = [token for prefix, target in parts for token in prefix + target]
    offset = next(i for i in range(40) if tokens[i : i + 60] == joined[:60])
    assert joined == tokens[offset : offset + len(joined)] and len(tokens) - len(joined) < 80


def test_built_again_it_is_the_same(corpus, data, vocabulary, tmp_path):
    first = open_task(data, "prefix_lm", "train", vocabulary)
    again = open_task(dataclasses.replace(data, cache_dir=str(tmp_path / "again")), "prefix_lm", "train", vocabulary)
    assert len(first) == len(again)
    assert all(np.array_equal(first.inputs(i), again.inputs(i)) for i in range(len(first)))


def test_epochs_bring_new_noise_and_examples_are_bounded(data, vocabulary):
    texts = [{"text": " ".join(WORDS[i % 9 :])} for i in range(60)]
    source = features.rows_source({"train": texts})
    for name, changes in (("once", {}), ("twice", {"epochs": 2}), ("bounded", {"epochs": 2, "max_examples": 7})):
        pretrain.register(f"test_spans_{name}", pretrain.span_corruption_pairs, source=source, **changes)
    once, twice, bounded = (open_task(data, f"test_spans_{name}", "train", vocabulary) for name in ("once", "twice", "bounded"))
    n = len(once)
    assert abs(len(twice) - 2 * n) <= 1 and len(bounded) == 7
    assert all(np.array_equal(once.inputs(i), twice.inputs(i)) for i in range(n))
    assert not any(np.array_equal(twice.inputs(i), twice.inputs(n + i)) for i in range(n - 1))
    assert np.array_equal(bounded.inputs(6), once.inputs(6))


def test_missing_corpus_is_told(data, vocabulary, monkeypatch, tmp_path):
    monkeypatch.delenv("MPT_JAX_CORPUS", raising=False)
    with pytest.raises(UserError, match="MPT_JAX_CORPUS, which is not set"):
        open_task(data, "span_corruption", "train", vocabulary)
    monkeypatch.setenv("MPT_JAX_CORPUS", str(tmp_path))
    with pytest.raises(UserError, match=r"has no \.txt or \.txt\.gz files"):
        open_task(data, "span_corruption", "train", vocabulary)


@pytest.mark.parametrize(
    "name, content", [("b.txt.gz", b"\x1f\x8b\x08 cut"), ("a.txt", b"caf\xe9 in Latin-1\n"), ("c.txt.gz", b"plain")]
)
def test_unreadable_text_is_told_by_file(corpus, data, vocabulary, tmp_path, name, content):
    (tmp_path / "corpus" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} cannot be read as UTF-8 text"):
        open_task(data, "span_corruption", "train", vocabulary)


def test_rows_become_tensors():
    rows = [
        {"text": "a", "n": 1, "x": 0.5, "words": ["p", "q"], "idx": {"one": 1, "many": []}},
        {"text": "é", "n": 2**40, "x": 1, "words": [], "idx": {"one": 2, "many": [3]}},
    ]
    dataset = features.rows_dataset(rows)
    assert dataset.element_spec["n"].dtype == tf.int64 and dataset.element_spec["x"].dtype == tf.float32
    first, second = dataset.as_numpy_iterator()
    assert first["words"].tolist() == [b"p", b"q"] and second["words"].tolist() == [] and second["idx"]["many"].tolist() == [3]
    assert second["text"].decode() == "é" and second["n"] == 2**40
    with pytest.raises(ValueError, match="without rows"):
        features.rows_dataset([])
