"""How the examples of a batch lie in its arrays: each in a row of its own, or several packed into a row.

A packed row of the encoder is [prompt of a | text of a | prompt of b | text of b | … | padding], that of the decoder
[targets of a | targets of b | … | padding]; `encoder_segments` and `decoder_segments` say which position belongs to which
example. A segment has no gaps, so that distances within it are those of a row of its own.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpt_jax.data.cache import TokenCache

Batch = dict[str, np.ndarray]

MORE_ROWS = 1.125  # from one number of rows that is compiled to the next


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Example b is row `rows[b]` of `caches[task_ids[b]]`."""

    caches: Sequence[TokenCache]
    task_ids: np.ndarray  # int [B]
    rows: np.ndarray  # int [B]

    def take(self, which: slice | np.ndarray) -> "Examples":
        return Examples(self.caches, self.task_ids[which], self.rows[which])

    def counts(self, name: str) -> np.ndarray:
        """Number of "inputs" or "targets" tokens of each example, int64 [B]."""
        counts = np.zeros(len(self.rows), np.int64)
        for n in np.unique(self.task_ids):
            own = self.task_ids == n
            counts[own] = self.caches[n].token_counts(name, self.rows[own])
        return counts

    def write(self, name: str, into: np.ndarray, starts: np.ndarray, most: int) -> np.ndarray:
        """Writes the first `most` tokens of each example into the array from position `starts[b]` of it, as one long row.

        Returns:
          how many tokens each example got [B].
        """
        flat, counts = into.reshape(-1), np.minimum(self.counts(name), most)
        for n in np.unique(self.task_ids):
            own = self.task_ids == n
            tokens, offsets = self.caches[n].flat(name)
            flat[ranges(starts[own], counts[own])] = tokens[ranges(offsets[self.rows[own]], counts[own])]
        return counts


class Packing(NamedTuple):
    """The shape of packed batches.

    Attributes:
      inputs: S, positions of an encoder row, prompts included.
      targets: positions of a decoder row.
      prompt_length: P, 0 without prompts.
      row_counts: ascending numbers of rows that a batch is padded up to; the last holds any batch.
    """

    inputs: int
    targets: int
    prompt_length: int
    row_counts: tuple[int, ...]

    @property
    def segments(self) -> int:
        """E, examples that may share a row."""
        return min(self.inputs // max(self.prompt_length, 1), self.targets)


def assemble(examples: Examples, lengths: dict[str, int]) -> Batch:
    """Pads examples to lengths {"inputs": T, "targets": L}; longer ones are cut (caches of the same lengths have none).

    Returns the arrays of `shapes.BATCH_SHAPES`, and `example_ids` [B] int32, the rows in the caches.
    """
    b, t, length = len(examples.rows), int(lengths["inputs"]), int(lengths["targets"])
    encoder, targets = np.zeros((b, t), np.int32), np.zeros((b, length), np.int32)
    examples.write("inputs", encoder, np.arange(b) * t, t)
    counts = examples.write("targets", targets, np.arange(b) * length, length)
    shifted = np.zeros_like(targets)
    shifted[:, 1:] = targets[:, :-1]
    return {
        "encoder_tokens": encoder,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
        "loss_weights": (np.arange(length) < counts[:, None]).astype(np.float32),
        "task_ids": np.asarray(examples.task_ids, np.int32),
        "example_ids": np.asarray(examples.rows, np.int32),
    }


def assemble_packed(examples: Examples, lengths: dict[str, int], packing: Packing, shard: tuple[int, int] = (0, 1)) -> Batch:
    """Packs examples into the next of `packing.row_counts` rows.

    Returns the arrays of `shapes.PACKED_SHAPES`, and `example_ids` [rows,E] int32, -1 where a row has fewer examples; of shard
    (index, count) only its rows. The longest example must fit into a row.
    """
    p, most_inputs, most_targets = packing.prompt_length, int(lengths["inputs"]), int(lengths["targets"])
    sizes = np.stack([
        p + np.minimum(examples.counts("inputs"), most_inputs),
        np.minimum(examples.counts("targets"), most_targets),
        np.ones(len(examples.rows), np.int64),
    ], axis=1)  # fmt: skip
    row, start, used = first_fit(sizes, np.array([packing.inputs, packing.targets, packing.segments]))
    number = next(count for count in packing.row_counts if count >= used)
    share = number // shard[1]
    row = row - shard[0] * share
    own = np.flatnonzero((row >= 0) & (row < share))
    examples, row, start, sizes = examples.take(own), row[own], start[own], sizes[own]

    encoder, encoder_segments = np.zeros((2, share, packing.inputs), np.int32)
    targets, decoder_segments = np.zeros((2, share, packing.targets), np.int32)
    encoder_starts, decoder_starts = row * packing.inputs + start[:, 0], row * packing.targets + start[:, 1]
    examples.write("inputs", encoder, encoder_starts + p, most_inputs)
    examples.write("targets", targets, decoder_starts, most_targets)
    segment = start[:, 2] + 1
    encoder_segments.reshape(-1)[ranges(encoder_starts, sizes[:, 0])] = np.repeat(segment, sizes[:, 0])
    decoder_segments.reshape(-1)[ranges(decoder_starts, sizes[:, 1])] = np.repeat(segment, sizes[:, 1])
    shifted = np.zeros_like(targets)
    shifted[:, 1:] = np.where(decoder_segments[:, 1:] == decoder_segments[:, :-1], targets[:, :-1], 0)
    task_ids = np.zeros((share, packing.segments), np.int32)
    example_ids = np.full((share, packing.segments), -1, np.int32)
    task_ids[row, start[:, 2]], example_ids[row, start[:, 2]] = examples.task_ids, examples.rows
    return {
        "encoder_tokens": encoder,
        "encoder_segments": encoder_segments,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
        "decoder_segments": decoder_segments,
        "loss_weights": (decoder_segments > 0).astype(np.float32),
        "task_ids": task_ids,
        "example_ids": example_ids,
    }


def first_fit(sizes: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """First-fit decreasing: the largest example first, each into the first row with enough room in every respect.

    Args:
      sizes: int [B,C], what each example takes of the C capacities; none takes more than there is.
      capacity: int [C], of a row.

    Returns:
      (row [B], where in the row the example starts [B,C], how many rows are used)
    """
    order = np.argsort(-(sizes / capacity).max(axis=1), kind="stable")
    whole, least = capacity.tolist(), sizes.min(axis=0).tolist()
    free: list[list[int]] = []
    open_rows: list[int] = []  # those that the smallest example would still fit into
    found = []
    for size in sizes[order].tolist():
        row = next((row for row in open_rows if all(map(operator.ge, free[row], size))), len(free))
        if row == len(free):
            free.append(whole)
            open_rows.append(row)
        found.append([row, *map(operator.sub, whole, free[row])])
        free[row] = list(map(operator.sub, free[row], size))
        if not all(map(operator.ge, free[row], least)):
            open_rows.remove(row)
    placed = np.empty((len(sizes), 1 + len(whole)), np.int64)
    placed[order] = found
    return placed[:, 0], placed[:, 1:], len(free)


def row_counts(batch_size: int, multiple: int, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """The numbers of rows that packed batches may have: multiples of `multiple`, of which the last holds a row per example.

    `wanted` ones come before the last; () = each about an eighth above the one before, so that few are ever met (and compiled)
    and little is padded.
    """
    most = -(-batch_size // multiple) * multiple
    counts = {-(-count // multiple) * multiple for count in wanted}
    count = multiple
    while not wanted and count < most:
        counts.add(count)
        count += max(int(count * (MORE_ROWS - 1)) // multiple, 1) * multiple
    return (*sorted(count for count in counts if count < most), most)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], …, starts[0] + counts[0] - 1, starts[1], …: int64 [sum of counts]."""
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
