"""Pretraining tasks over plain text: T5's span corruption, and the prefix language modelling of LM adaptation.

The text is every `*.txt` and `*.txt.gz` of the folder that the environment variable MPT_JAX_CORPUS names: a paragraph a line, a
blank line between documents. Every 200th document is for validation. Documents are tokenised, concatenated and cut into
full-length examples, a new cut with new noise each epoch, everything from fixed seeds: what the token cache stores are finished
(inputs, targets) pairs.

`register` makes such tasks of other text, too: of any seqio source whose rows have `text` (lines = paragraphs).
"""

import functools
import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mpt_jax.errors import UserError
from tasks import features

VARIABLE = "MPT_JAX_CORPUS"
VALIDATION_EVERY = 200
NOISE_DENSITY, MEAN_SPAN = 0.15, 3.0  # Raffel et al. 2020, §3.3.4
BLOCK = 1024  # examples that are made at a time
MAX_SENTINELS = 100

Pair = tuple[list[np.ndarray], list[np.ndarray]]
Epoch = Callable[[np.ndarray, np.random.Generator], Iterator[Pair]]  # blocks of examples from a text's tokens


# ---------------------------------------------------------------- objectives on token arrays


def span_lengths(inputs_length: int, targets_length: int) -> tuple[int, int, int]:
    """(tokens, noise tokens, spans) of the longest chunk whose corrupted inputs and targets fit, EOS included.

    After T5's `random_spans_helper`, which leaves the targets' length free.
    """

    def plan(tokens: int) -> tuple[int, int]:
        noise = min(max(round(tokens * NOISE_DENSITY), 1), tokens - 1)
        return noise, max(round(noise / MEAN_SPAN), 1)

    best = None
    for tokens in range(2, 2 * (inputs_length + targets_length)):
        noise, spans = plan(tokens)
        if tokens - noise + spans + 1 <= inputs_length and noise + spans + 1 <= targets_length and spans <= MAX_SENTINELS:
            best = tokens, noise, spans
    if best is None:
        raise UserError(
            f"Span corruption does not fit TASK_FEATURE_LENGTHS inputs={inputs_length}, targets={targets_length}; "
            "give at least 3 tokens to each."
        )
    return best


def corrupt_spans(
    chunks: np.ndarray, noise: int, spans: int, top: int, eos: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Span corruption of equally long chunks [N, C]: (inputs [N, C - noise + spans + 1], targets [N, noise + spans + 1]).

    `noise` tokens of each chunk lie in `spans` random spans (T5's `random_spans_noise_mask`); the k-th span becomes sentinel
    `top` - k in the inputs, and follows it in the targets. Both end in EOS.
    """
    count, width = chunks.shape
    # Alternately kept and noise, beginning with kept: lengths [N, 2 · spans].
    lengths = np.stack([_random_segments(count, width - noise, spans, rng), _random_segments(count, noise, spans, rng)], 2)
    starts = np.cumsum(lengths.reshape(count, -1), axis=1)[:, :-1]
    edges = np.zeros((count, width), np.int64)
    np.put_along_axis(edges, starts, 1, axis=1)
    segment = np.cumsum(edges, axis=1)  # 0 kept, 1 noise, 2 kept, ...
    is_noise = segment % 2 == 1
    first = edges == 1
    sentinel = (top - segment // 2).astype(np.int32)
    end = np.full((count, 1), eos, np.int32)

    inputs = np.where(is_noise, sentinel, chunks)[~is_noise | first].reshape(count, -1)
    begins_noise = np.where(is_noise & first)  # row-major: span by span within each row
    pairs = np.stack([sentinel, chunks], 2).astype(np.int32)  # a span's first token brings its sentinel along
    keep = np.stack([np.zeros_like(is_noise), is_noise], 2)
    keep[begins_noise[0], begins_noise[1], 0] = True
    targets = pairs[keep].reshape(count, -1)
    return np.concatenate([inputs.astype(np.int32), end], 1), np.concatenate([targets, end], 1)


def _random_segments(count: int, items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """`count` random ways to cut `items` into `segments` parts of one or more, all equally likely: lengths [count, segments]."""
    cuts = np.argsort(rng.random((count, items - 1)), axis=1)[:, : segments - 1] + 1
    edges = np.concatenate([np.zeros((count, 1), np.int64), np.sort(cuts, axis=1), np.full((count, 1), items)], 1)
    return np.diff(edges, axis=1)


def span_corruption_pairs(lengths: dict[str, int], top: int, eos: int) -> Epoch:
    """Span corruption of a text. UserError when `lengths` are too short for it."""
    width, noise, spans = span_lengths(lengths["inputs"], lengths["targets"])

    def epoch(tokens: np.ndarray, rng: np.random.Generator) -> Iterator[Pair]:
        offset = int(rng.integers(min(width, max(len(tokens) - width, 0) + 1)))
        count = (len(tokens) - offset) // width
        chunks = tokens[offset : offset + count * width].reshape(count, width)
        for start in range(0, count, BLOCK):
            inputs, targets = corrupt_spans(chunks[start : start + BLOCK], noise, spans, top, eos, rng)
            yield list(inputs), list(targets)

    return epoch


def prefix_lm_pairs(lengths: dict[str, int], top: int, eos: int) -> Epoch:
    """Prefix language modelling (Lester et al. 2021 §3.1): a prefix of random length → the next L - 1 tokens.

    UserError when `lengths` are too short for it.
    """
    longest, answer = lengths["inputs"] - 1, lengths["targets"] - 1
    if min(longest, answer) < 1:
        raise UserError(
            f"Prefix language modelling does not fit TASK_FEATURE_LENGTHS inputs={longest + 1}, targets={answer + 1}; "
            "give at least 2 tokens to each."
        )

    def epoch(tokens: np.ndarray, rng: np.random.Generator) -> Iterator[Pair]:
        position = int(rng.integers(min(longest, max(len(tokens) - answer - 1, 0) + 1)))
        inputs: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        while position + answer < len(tokens):
            prefix = min(int(rng.integers(1, longest + 1)), len(tokens) - position - answer)
            inputs.append(np.append(tokens[position : position + prefix], np.int32(eos)))
            targets.append(np.append(tokens[position + prefix : position + prefix + answer], np.int32(eos)))
            position += prefix + answer
            if len(inputs) == BLOCK:
                yield inputs, targets
                inputs, targets = [], []
        if inputs:
            yield inputs, targets

    return epoch


# ---------------------------------------------------------------- as seqio preprocessors


def pairs(
    dataset: tf.data.Dataset,
    sequence_length: dict[str, int],
    output_features: dict[str, seqio.Feature],
    objective: Callable[[dict[str, int], int, int], Epoch],
    epochs: int,
    max_examples: int | None,
    seed: int,
) -> tf.data.Dataset:
    """Preprocessor: rows with `text` → tokenised (inputs, targets) of `objective`, `epochs` times, at most `max_examples`."""
    vocabulary = output_features["inputs"].vocabulary
    # Out here: TensorFlow would turn a UserError in the generator into one of its own.
    pairs_of = objective(sequence_length, vocabulary.vocab_size - 1, vocabulary.eos_id)

    def generate() -> Iterator[dict[str, tf.RaggedTensor]]:
        tokens = _tokenise(dataset, vocabulary.tokenizer)
        left = max_examples if max_examples is not None else -1
        for epoch in range(epochs):
            rng = np.random.default_rng([seed, epoch])
            for inputs, targets in pairs_of(tokens, rng):
                if left == 0:
                    return
                if left > 0:
                    inputs, targets = inputs[:left], targets[:left]
                    left -= len(inputs)
                yield {"inputs": _ragged(inputs), "targets": _ragged(targets)}

    spec = tf.RaggedTensorSpec(shape=(None, None), dtype=tf.int32, ragged_rank=1)
    blocks = tf.data.Dataset.from_generator(generate, output_signature={"inputs": spec, "targets": spec})
    return blocks.unbatch().map(lambda x: {name: tf.ensure_shape(value, (None,)) for name, value in x.items()})


def _tokenise(dataset: tf.data.Dataset, processor: Any) -> np.ndarray:
    """All tokens of the rows' paragraphs, one after the other, int32 (as T5: nothing between documents)."""
    parts = []
    for texts in dataset.batch(256).as_numpy_iterator():
        paragraphs = [line for text in texts["text"] for line in text.decode("utf-8", "replace").split("\n") if line.strip()]
        for ids in processor.encode(paragraphs, num_threads=os.cpu_count() or 1):
            parts.append(np.array(ids, np.int32))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _ragged(rows: list[np.ndarray]) -> tf.RaggedTensor:
    return tf.RaggedTensor.from_row_lengths(np.concatenate(rows), [len(row) for row in rows])


# ---------------------------------------------------------------- the corpus


class CorpusSource(seqio.FunctionDataSource):
    """Documents of `$MPT_JAX_CORPUS` as rows {"text": paragraphs joined by newlines}."""

    environment = (VARIABLE,)

    def __init__(self) -> None:
        super().__init__(lambda split, shuffle_files=False, seed=None: _corpus_dataset(split), splits=("train", "validation"))

    def data_files(self, split: str) -> list[str]:
        return [str(path) for path in corpus_files()]


def corpus_files() -> list[Path]:
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise UserError(
            f"Pretraining reads the folder named by the environment variable {VARIABLE}, which is not set; "
            "set it to a folder of .txt files."
        )
    files = sorted(path for pattern in ("*.txt", "*.txt.gz") for path in Path(folder).expanduser().glob(pattern))
    if not files:
        raise UserError(f"{VARIABLE}={folder} has no .txt or .txt.gz files; put text there, a paragraph a line.")
    return files


def documents(files: Iterable[Path]) -> Iterator[str]:
    """Documents of the files, in order: non-blank lines joined by newlines. UserError names a file that cannot be read."""
    for path in files:
        try:
            with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
                lines: list[str] = []
                for line in file:
                    if line.strip():
                        lines.append(line.strip())
                    elif lines:
                        yield "\n".join(lines)
                        lines = []
                if lines:
                    yield "\n".join(lines)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as UTF-8 text ({error}); restore or remove it.") from None


def _corpus_dataset(split: str) -> tf.data.Dataset:
    # Read here, not in the generator, where TensorFlow would turn a UserError into one of its own.
    texts = [
        text
        for number, text in enumerate(documents(corpus_files()))
        if (number % VALIDATION_EVERY == VALIDATION_EVERY - 1) == (split == "validation")
    ]
    return tf.data.Dataset.from_generator(
        lambda: ({"text": text} for text in texts), output_signature={"text": tf.TensorSpec((), tf.string)}
    )


def register(
    name: str,
    objective: Callable[[dict[str, int], int, int], Epoch],
    source: seqio.DataSource | None = None,
    epochs: int = 1,
    max_examples: int | None = None,
    seed: int = 0,
) -> None:
    """Registers a pretraining task `name` over `source` (default: the corpus).

    `objective` is `span_corruption_pairs` or `prefix_lm_pairs`; `epochs` passes over the text are stored, each with noise of its
    own, `max_examples` of them at the most.
    """
    seqio.TaskRegistry.add(
        name,
        source=source or CorpusSource(),
        preprocessors=[functools.partial(pairs, objective=objective, epochs=epochs, max_examples=max_examples, seed=seed)],
        output_features=features.output_features(),
        metric_fns=[],
    )


register("span_corruption", span_corruption_pairs)
register("prefix_lm", prefix_lm_pairs, seed=1)
