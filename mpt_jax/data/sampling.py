"""Which examples make up the batch of a step: a pure function of (seed, step), so that resuming needs no iterator state.

Three ways, `DataConfig.sampling`:

"bank"          every stream gets B / N examples; each stream goes through its own examples epoch by epoch.
"proportional"  streams share the batches by their mixing rates, in a fixed interleaving; each goes through epochs.
"mpt"           each step draws K from {2, ..., N}, then K streams, then B // K examples of each; what remains of the batch goes
                to one of them (Wang et al. 2023 §3; with replacement and by rates as in the code of DPT, which derives from MPT).
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from mpt_jax.config import DataConfig, StreamConfig
from mpt_jax.data import fingerprint
from mpt_jax.data.cache import TokenCache, mixture_tasks
from mpt_jax.data.layout import Batch, Examples, Packing, assemble, assemble_packed, row_counts
from mpt_jax.errors import UserError

CYCLE = 1 << 16  # of "proportional": rates are met exactly up to 1/65,536 and the order repeats after so many examples

logger = logging.getLogger("mpt_jax")


@dataclasses.dataclass(frozen=True, eq=False)
class StreamData:
    """The examples of one stream: rows of a cache that may be drawn, and what decides on their order."""

    cache: TokenCache
    rows: np.ndarray  # int64, rows of the cache
    seed: int = 0
    rate: float = 1.0
    k_shot: int = 0

    @property
    def task(self) -> str:
        return self.cache.task


def stream_data(cache: TokenCache, k_shot: int = 0, seed: int = 0, rate: float = 1.0) -> StreamData:
    """A stream of all examples of a cache (k_shot=0) or of the k-shot choice that `seed` makes."""
    return StreamData(cache, k_shot_rows(cache, k_shot, seed), seed, rate, k_shot)


def stream_configs(data: DataConfig) -> list[tuple[StreamConfig, float]]:
    """The streams of a run with their rates: `data.streams`, or one for each task of the mixture (all of group 0)."""
    if data.streams:
        return [(stream, 1.0) for stream in data.streams]
    return [(StreamConfig(task), rate) for task, rate in mixture_tasks(data, data.mixture)]


def k_shot_rows(cache: TokenCache, k: int, seed: int) -> np.ndarray:
    """Rows of a k-shot training set, sorted, int64: k of each class, or k in all where the task has no classes; 0 = every row.

    The choice depends on (task, seed) alone, and a smaller k is contained in a larger one.
    """
    if k == 0:
        return np.arange(len(cache))
    if scarce := scarce_classes(cache, k):
        _warn_scarce(cache.task, k, tuple(scarce.items()))
    labels = cache.labels
    groups = {"": np.arange(len(cache))}
    if labels is not None:
        array = np.array(labels)
        groups = {name: np.flatnonzero(array == name) for name in sorted(set(labels))}
    chosen = [_rng("k_shot", cache.task, seed, name).permutation(rows)[:k] for name, rows in groups.items()]
    return np.sort(np.concatenate(chosen))


def scarce_classes(cache: TokenCache, k: int) -> dict[str, int]:
    """The classes with fewer than k examples, and how many they have; a task without classes counts as one, named ""."""
    sizes = {"": len(cache)} if cache.labels is None else collections.Counter(cache.labels)
    return {name: size for name, size in sorted(sizes.items()) if size < k}


@functools.cache  # a study chooses the same examples for every method and seed: once is enough
def _warn_scarce(task: str, k: int, scarce: tuple[tuple[str, int], ...]) -> None:
    found = ", ".join(f"{size} examples of class '{name}'" if name else f"{size} examples" for name, size in scarce)
    logger.warning("%s has only %s; all are taken for k = %d", task, found, k)


class Loader:
    """Batches of a run. `task_ids[b]` is the position of the example's stream in `streams`.

    Args:
      streams: N streams, N >= 1.
      sampling: "bank", "proportional" or "mpt" (see the top of this file).
      batch_size: B, over all streams and devices.
      lengths: {"inputs": T, "targets": L}.
      seed: of the order of examples and of "mpt"'s draws.
      with_replacement: of "mpt": streams are drawn by rate, with replacement, instead of without and evenly.
      trim_lengths: input lengths below T that a batch is trimmed to, the smallest that holds it; () = always T.
      sort_window: of "proportional": so many batches share their examples sorted by length, in a random order of the batches.
      packing: packs the examples of a batch into rows, instead of trimming it; None = one row each.
      shard: (index, count): makes that one of `count` equal runs of a batch's rows; all shards have the same shapes.

    Raises:
      UserError: the batch cannot be divided as `sampling` or `shard` demands.
    """

    def __init__(
        self,
        streams: Sequence[StreamData],
        sampling: str,
        batch_size: int,
        lengths: dict[str, int],
        seed: int = 0,
        with_replacement: bool = False,
        trim_lengths: Sequence[int] = (),
        sort_window: int = 1,
        packing: Packing | None = None,
        shard: tuple[int, int] = (0, 1),
    ):
        n = len(streams)
        if n == 0 or any(len(stream.rows) == 0 for stream in streams):
            raise UserError("DataConfig.mixture gives no examples to train on; name a task that has some.")
        if sampling == "bank" and batch_size % n:
            raise UserError(
                f"DataConfig.batch_size (BATCH_SIZE) {batch_size} cannot be shared evenly by the {n} streams of sampling='bank'; "
                f"set it to a multiple of {n}."
            )
        if sampling == "mpt" and batch_size < n:
            raise UserError(
                f"DataConfig.batch_size (BATCH_SIZE) {batch_size} is smaller than the {n} tasks that a step of "
                f"sampling='mpt' may draw; set it to {n} or more."
            )
        if batch_size % shard[1]:
            raise UserError(
                f"DataConfig.batch_size (BATCH_SIZE) {batch_size} cannot be shared evenly by {shard[1]} hosts; "
                f"set it to a multiple of {shard[1]}."
            )
        self.streams, self.sampling, self.batch_size, self.lengths = list(streams), sampling, batch_size, dict(lengths)
        self.seed, self.with_replacement = seed, with_replacement
        self.trim_lengths = sorted({t for t in trim_lengths if 0 < t < lengths["inputs"]} | {int(lengths["inputs"])})
        self.sort_window, self.packing, self.shard = sort_window, packing, shard
        self._caches = [stream.cache for stream in self.streams]
        self._rates = np.array([stream.rate for stream in self.streams], np.float64)
        self._rates /= self._rates.sum()
        self._order = functools.lru_cache(maxsize=2 * n)(self._epoch_order)
        self._window = functools.lru_cache(maxsize=2)(self._sorted_window)

    def batch(self, step: int) -> Batch:
        """The batch of `step` (0, 1, ...), or this shard of it.

        Returns the arrays of `shapes.BATCH_SHAPES` or, packed, `shapes.PACKED_SHAPES`, and `example_ids`, the rows in the caches.
        """
        examples = Examples(self._caches, *self.draw(step))
        if self.packing is not None:
            return assemble_packed(examples, self.lengths, self.packing, self.shard)
        longest = min(examples.counts("inputs").max(), self.lengths["inputs"])  # of all shards
        trimmed = next(t for t in self.trim_lengths if t >= longest)
        index, share = self.shard[0], self.batch_size // self.shard[1]
        return assemble(examples.take(slice(index * share, (index + 1) * share)), {**self.lengths, "inputs": trimmed})

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(stream [B], row in its cache [B]) of the batch of `step`, int32."""
        if self.sampling == "mpt":
            task_ids, rows = self._draw_mpt(step)
        elif self.sampling == "bank":
            task_ids, rows = self._rows(*self._bank(step))
        elif self.sort_window > 1:
            task_ids, rows = (part[step % self.sort_window] for part in self._window(step // self.sort_window))
        else:
            task_ids, rows = self._rows(*self._proportional(step, 1))
        return task_ids.astype(np.int32), rows.astype(np.int32)

    def batches(self, start: int, stop: int, depth: int = 2) -> Iterator[Batch]:
        """Batches of steps start, ..., stop - 1, made `depth` ahead by a thread."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=depth)
        stopped = threading.Event()

        def put(item: Batch | BaseException) -> None:
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def work() -> None:
            try:
                for step in range(start, stop):
                    if stopped.is_set():
                        return
                    put(self.batch(step))
            except BaseException as error:  # handed to the consumer, who raises it
                put(error)

        threading.Thread(target=work, name="mpt_jax-loader", daemon=True).start()
        try:
            for _ in range(start, stop):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()

    def _bank(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        each = self.batch_size // len(self.streams)
        positions = np.arange(step * each, (step + 1) * each)
        return np.repeat(np.arange(len(self.streams)), each), np.tile(positions, len(self.streams))

    def _sorted_window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The `sort_window` batches of a window, [batches, B] each: streams and rows, alike in length within a batch."""
        task_ids, rows = self._rows(*self._proportional(window * self.sort_window, self.sort_window))
        order = np.argsort(Examples(self._caches, task_ids, rows).counts("inputs"), kind="stable")
        order = _rng("window", "", self.seed, window).permutation(order.reshape(self.sort_window, self.batch_size))
        return task_ids[order], rows[order]

    def _proportional(self, step: int, batches: int) -> tuple[np.ndarray, np.ndarray]:
        slots = np.arange(step * self.batch_size, (step + batches) * self.batch_size)
        cycles, slots = np.divmod(slots, CYCLE)
        stream, rank, quota = self._cycle
        return stream[slots], cycles * quota[stream[slots]] + rank[slots]

    @functools.cached_property
    def _cycle(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One period of "proportional": (stream [CYCLE], how many of it came before [CYCLE], examples per period [N])."""
        n = len(self.streams)
        if n == 1:
            return np.zeros(CYCLE, np.int64), np.arange(CYCLE), np.array([CYCLE])
        exact = self._rates * CYCLE
        quota = np.maximum(np.floor(exact).astype(np.int64), 1)  # no task is starved
        largest_rest_first = np.argsort(-(exact - quota), kind="stable")
        quota[largest_rest_first[: max(CYCLE - int(quota.sum()), 0)]] += 1
        quota[np.argmax(quota)] -= int(quota.sum()) - CYCLE
        # The j-th example of a stream with quota q is due at (j + 1/2) / q of the period: streams interleave evenly.
        stream = np.repeat(np.arange(n), quota)
        rank = np.concatenate([np.arange(q) for q in quota])
        order = np.argsort((rank + 0.5) / quota[stream], kind="stable")
        return stream[order], rank[order], quota

    def _draw_mpt(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        rng = _rng("mpt", "", self.seed, step)
        n = len(self.streams)
        k = int(rng.integers(min(2, n), n + 1))
        drawn = rng.choice(n, size=k, replace=self.with_replacement, p=self._rates if self.with_replacement else None)
        counts = np.full(k, self.batch_size // k)
        counts[rng.integers(k)] += self.batch_size % k
        task_ids, rows = [], []
        for stream in np.unique(drawn):  # a stream drawn twice is one larger draw without repeats
            count, pool = int(counts[drawn == stream].sum()), self.streams[stream].rows
            rows.append(rng.choice(pool, size=count, replace=count > len(pool)))
            task_ids.append(np.full(count, stream))
        return np.concatenate(task_ids), np.concatenate(rows)

    def _rows(self, task_ids: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(streams, rows in their caches) from (streams, positions in what they yield over all epochs)."""
        rows = np.empty(len(positions), np.int64)
        for n in np.unique(task_ids).tolist():
            own = np.flatnonzero(task_ids == n)
            epochs, places = np.divmod(positions[own], len(self.streams[n].rows))
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                rows[own[now]] = self._order(n, epoch)[places[now]]
        return task_ids, rows

    def _epoch_order(self, stream: int, epoch: int) -> np.ndarray:
        """The stream's rows in the order of an epoch; does not depend on the stream's number."""
        data = self.streams[stream]
        return _rng("epoch", data.task, self.seed, f"{data.seed} {data.k_shot} {epoch}").permutation(data.rows.astype(np.int32))


def make_loader(
    data: DataConfig,
    streams: Sequence[StreamData],
    prompt_length: int = 0,
    row_multiple: int = 1,
    shard: tuple[int, int] = (0, 1),
) -> Loader:
    """The loader that a run's `DataConfig` asks for.

    Args:
      prompt_length: P, for which packed rows leave room; 0 without prompts.
      row_multiple: packed batches have a multiple of so many rows (the devices that share them, times microbatches).
      shard: see `Loader`.
    """
    packing = None
    if rows := data.pack_lengths:
        counts = row_counts(data.batch_size, row_multiple, data.pack_rows)
        packing = Packing(rows["inputs"], rows["targets"], prompt_length, counts)
    return Loader(
        streams,
        data.sampling,
        data.batch_size,
        data.lengths,
        data.seed,
        data.with_replacement,
        data.trim_lengths,
        data.sort_window,
        packing,
        shard,
    )


def _rng(purpose: str, task: str, seed: int, what: object) -> np.random.Generator:
    return np.random.default_rng(int(fingerprint.digest(purpose, task, str(seed), str(what)), 16))
