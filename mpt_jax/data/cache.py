"""The tokenised cache of one split of one task: built once by seqio, then memory-mapped without TensorFlow.

    <cache_dir>/<task>/<split>-<key>/<variant>/   inputs.npy, targets.npy (int32, all examples in a row), *_offsets.npy,
                                                  text.jsonl (fields as text), labels.npy, meta.json

`key` names what is asked for (task, split, lengths, vocabulary); `variant` names what it was made from (source code of the
task, data files, environment variables). Opening checks both without importing a task; a stale or missing cache is built by
`mpt_jax/data/build.py` in a temporary folder and moved into place in one step, so that a killed build leaves nothing behind.
"""

import dataclasses
import importlib
import itertools
import json
import logging
import mmap
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpt_jax.config import DataConfig
from mpt_jax.data import fingerprint
from mpt_jax.data.vocabulary import Vocabulary
from mpt_jax.errors import UserError
from mpt_jax.metrics import invalid_rate

FORMAT = 2  # of the files and of what the builder puts in them; a change makes every cache stale
MAX_CLASSES, RECURRENCE = 32, 4  # a split with at most so many different targets, so frequent on average, is a classification
PERCENTILES = (50, 90, 99, 100)  # of the lengths, that a cache knows
LABEL_TYPES = (str, int, np.integer)  # of a postprocessed label
SCORING_MODULE = "mpt_jax.metrics"  # functions that live here are stored by name and need no seqio to score

logger = logging.getLogger("mpt_jax")
_told: set[Path] = set()  # caches whose truncation this process has reported


def open_task(data: DataConfig, task: str, split: str, vocabulary: Vocabulary) -> "TokenCache":
    """The cache of `task`/`split`, built first when it is missing or stale.

    Raises:
      UserError: unknown task (with the nearest name), missing split, bad data file, unwritable cache folder.
    """
    folder = _folder_of(data, task, split, vocabulary)
    cache = _open_fresh(folder, data, vocabulary)
    if cache is None:
        from mpt_jax.data import build  # loads TensorFlow

        build.build_task(data, task, split, vocabulary, folder)
        cache = _open_fresh(folder, data, vocabulary)
        if cache is None:
            raise UserError(f"The token cache of '{task}' in '{folder}' changed while it was built; run the command again.")
    if cache.folder not in _told:
        _told.add(cache.folder)
        cut = {name: count for name, count in cache.truncated.items() if count}
        what = " and ".join(f"{count:,} {name} longer than {cache.lengths[name]} tokens" for name, count in cut.items())
        if cut:
            logger.warning("%s/%s: %s of %s examples were cut to the length", task, split, what, f"{len(cache):,}")
    return cache


def require_splits(data: DataConfig, tasks: Iterable[str], splits: Iterable[str], vocabulary: Vocabulary) -> None:
    """That each task has each split, before the first of their caches is built, which may take long.

    Raises:
      UserError: as `open_task` for an unknown task and a missing split.
    """
    pairs = itertools.product(dict.fromkeys(tasks), dict.fromkeys(splits))
    missing = [pair for pair in pairs if _open_fresh(_folder_of(data, *pair, vocabulary), data, vocabulary) is None]
    if missing:
        from mpt_jax.data import build  # loads TensorFlow

        for task, split in missing:
            build.check_split(data, task, split)


def _folder_of(data: DataConfig, task: str, split: str, vocabulary: Vocabulary) -> Path:
    """The folder of a cache's variants."""
    asked: list[Any] = [task, split, lengths_of(data), vocabulary.fingerprint, list(data.task_modules)]
    if task in data.own_tasks:
        asked.append(dataclasses.asdict(data.own_tasks[task]))
    return cache_root(data) / task / f"{split}-{fingerprint.digest(str(FORMAT), json.dumps(asked))}"


def mixture_tasks(data: DataConfig, name: str) -> list[tuple[str, float]]:
    """(task, rate) of each task of a seqio mixture in the order of its registration; a task's own name gives [(name, 1.0)].

    The answer is kept beside the token caches, so that a second run needs no seqio.
    """
    if name in data.own_tasks:
        return [(name, 1.0)]
    folder = cache_root(data) / "_mixtures"
    path = folder / f"{fingerprint.digest(str(FORMAT), name, *data.task_modules)}.json"
    try:
        stored = json.loads(path.read_text())
        if stored["name"] == name and fingerprint.fresh(stored["depends"]):
            return [(task, float(rate)) for task, rate in stored["tasks"]]
    except (OSError, ValueError, KeyError):
        pass
    from mpt_jax.data import build  # loads TensorFlow

    return build.resolve_mixture(data, name, path)


def cache_root(data: DataConfig) -> Path:
    return Path(data.cache_dir).expanduser()


def lengths_of(data: DataConfig) -> dict[str, int]:
    return {name: int(data.lengths[name]) for name in ("inputs", "targets")}


class LabelSet(NamedTuple):
    """The different targets of a classification, sorted by text."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]  # of each label as of a target: with EOS if the task has it, at most L


class TokenCache:
    """Examples of one split, in the order of the seqio task; arrays are views of memory-mapped files.

    Attributes:
      task, split: names.
      lengths: {"inputs": T, "targets": L}; no example is longer.
      truncated: {"inputs": n, "targets": n}, how many examples were cut.
      percentiles: {"inputs": {"50": n, …}, "targets": …}, of the lengths before anything was cut, in tokens.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], vocabulary: Vocabulary, data: DataConfig | None = None):
        self.folder, self.meta, self.vocabulary, self._data = folder, meta, vocabulary, data
        self.task: str = meta["task"]
        self.split: str = meta["split"]
        self.lengths: dict[str, int] = meta["lengths"]
        self.truncated: dict[str, int] = meta["truncated"]
        self.percentiles: dict[str, dict[str, int]] = meta["percentiles"]
        self._tokens = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("inputs", "targets")}
        self._offsets = {name: np.load(folder / f"{name}_offsets.npy", mmap_mode="r") for name in ("inputs", "targets", "text")}
        self._labels = None if meta["labels"] is None else np.load(folder / "labels.npy")
        with (folder / "text.jsonl").open("rb") as file:  # opened now: a rebuild may unlink the files of an open cache
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return int(self.meta["examples"])

    def __repr__(self) -> str:
        return f"TokenCache({self.task}/{self.split}, {len(self)} examples)"

    def inputs(self, i: int) -> np.ndarray:
        """Tokens of example i, int32 [<= T]."""
        return self._row("inputs", i)

    def targets(self, i: int) -> np.ndarray:
        """Target tokens of example i, int32 [<= L]."""
        return self._row("targets", i)

    def token_counts(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Number of "inputs" or "targets" tokens of the examples `rows` (default: all), int64.

        Raises:
          IndexError: there is no such example.
        """
        offsets = self._offsets[name]
        if rows is None:
            return np.diff(offsets)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"examples {rows.min()} to {rows.max()} of {len(self)} in {self.task}/{self.split}")
        return offsets[rows + 1] - offsets[rows]

    def flat(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """All "inputs" or "targets" tokens in one row, int32, and where in it each example begins, int64 [examples + 1]."""
        return self._tokens[name], self._offsets[name]

    def text(self, i: int) -> dict[str, Any]:
        """Example i's fields other than tokens: `inputs_pretokenized`, `targets_pretokenized` and whatever the task carries."""
        start, stop = self._bounds("text", i)
        return json.loads(self._text[start:stop]) if stop > start else {}

    def target_text(self, i: int) -> str:
        """The target as the task wrote it, or its tokens decoded if the task keeps no text."""
        text = self.text(i).get("targets_pretokenized")
        return text if text is not None else self.vocabulary.decode(self.targets(i))

    @property
    def labels(self) -> list[str] | None:
        """The target of every example where the task is a classification (few different targets that recur), else None."""
        names = self.meta["labels"]
        return None if self._labels is None else [names[k] for k in self._labels]

    @property
    def label_texts(self) -> tuple[str, ...]:
        """The different `labels`, sorted; () where the task is no classification."""
        return tuple(self.meta["labels"] or ())

    @property
    def why_no_labels(self) -> str:
        """What to tell of a task that is no classification by this split."""
        return (
            f"its {len(self)} targets of the split '{self.split}' are not few ones that recur (at most {MAX_CLASSES} different "
            f"ones, each {RECURRENCE} times on average)"
        )

    @cached_property
    def label_set(self) -> LabelSet:
        """The labels that `DecodeConfig.method="rank"` chooses from.

        Raises:
          UserError: the task is no classification by this split (see `labels`); two labels have the same tokens.
        """
        if self._labels is None:
            raise UserError(
                f"Task '{self.task}' has no label set to rank: {self.why_no_labels}; set DecodeConfig.method='generate'."
            )
        examples = np.unique(self._labels, return_index=True)[1]  # one for each label
        labels = LabelSet(self.label_texts, tuple(tuple(self.targets(int(i)).tolist()) for i in examples))
        known: dict[tuple[int, ...], str] = {}
        for text, tokens in zip(*labels, strict=True):
            if (other := known.setdefault(tokens, text)) != text:
                raise UserError(
                    f"Task '{self.task}' has the labels '{other}' and '{text}', which cannot be told apart to rank them, since "
                    f"both are the tokens {list(tokens)}; raise the targets' length ({self.lengths['targets']}) in "
                    "TASK_FEATURE_LENGTHS, or take a vocabulary that has their pieces."
                )
        return labels

    @property
    def has_metrics(self) -> bool:
        """Whether the task can be scored; tasks for pretraining have no metrics."""
        return bool(self._scoring[1])

    def score(
        self,
        predictions: list[str],
        indices: list[int] | np.ndarray | None = None,
        labels: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """The task's own `postprocess_fn` and `metric_fns` on decoded predictions of the examples `indices` (default: all).

        Targets and predictions are postprocessed as seqio does: `fn(text, example=fields, is_target=bool)`. Of a classification
        there is `metrics.INVALID` besides, the percentage of predictions that are none of the `labels` (default: the different
        targets of this split); not where predictions are made into numbers, which have no labels but a scale.
        """
        rows = range(len(self)) if indices is None else [int(i) for i in indices]
        if len(predictions) != len(rows):
            raise ValueError(f"{len(predictions)} predictions for {len(rows)} examples of {self.task}/{self.split}")
        postprocess, metrics, convert = self._scoring
        examples = [convert(self.text(i)) for i in rows]
        targets = [postprocess(self.target_text(i), example=ex, is_target=True) for i, ex in zip(rows, examples, strict=True)]
        decoded = [postprocess(p, example=ex, is_target=False) for p, ex in zip(predictions, examples, strict=True)]
        scores: dict[str, float] = {}
        for metric in metrics:
            scores |= {name: float(value) for name, value in metric(targets, decoded).items()}
        names = labels if labels is not None else self.meta["labels"]
        if names is None or not scores or not all(isinstance(prediction, LABEL_TYPES) for prediction in decoded):
            return scores
        valid = [[postprocess(name, example=ex, is_target=False) for name in names] for ex in examples]
        return scores | invalid_rate(valid, decoded)

    @cached_property
    def _scoring(self) -> tuple[Any, list[Any], Any]:
        stored = self.meta["scoring"]
        if stored is not None:
            postprocess = load_function(stored["postprocess"]) if stored["postprocess"] else _unchanged
            return postprocess, [load_function(spec) for spec in stored["metrics"]], lambda example: example
        from mpt_jax.data import registry  # the task scores with functions of its own: loads seqio

        assert self._data is not None
        return registry.scoring_functions(self._data, self.task)

    def _bounds(self, name: str, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)} in {self.task}/{self.split}")
        offsets = self._offsets[name]
        return int(offsets[i]), int(offsets[i + 1])

    def _row(self, name: str, i: int) -> np.ndarray:
        start, stop = self._bounds(name, i)
        return self._tokens[name][start:stop]


def function_spec(function: Any) -> dict[str, Any] | None:
    """JSON that names a function of `mpt_jax.metrics` or a functools.partial of one; None for anything else."""
    kwargs: dict[str, Any] = {}
    if isinstance(function, partial):
        if function.args:
            return None
        function, kwargs = function.func, function.keywords
    name = getattr(function, "__qualname__", "")
    if getattr(function, "__module__", "") != SCORING_MODULE or "<" in name or "." in name:
        return None
    try:
        return {"name": name, "kwargs": json.loads(json.dumps(kwargs))}
    except TypeError:
        return None


def load_function(spec: dict[str, Any]) -> Any:
    """The function that `function_spec` named."""
    function = getattr(importlib.import_module(SCORING_MODULE), spec["name"])
    return partial(function, **spec["kwargs"]) if spec["kwargs"] else function


def _open_fresh(folder: Path, data: DataConfig, vocabulary: Vocabulary) -> TokenCache | None:
    for meta_path in sorted(folder.glob("[!.]*/meta.json")):
        try:
            meta = json.loads(meta_path.read_text())
            whole = all((meta_path.parent / name).stat().st_size == size for name, size in meta["sizes"].items())
            if whole and fingerprint.fresh(meta["depends"]):
                return TokenCache(meta_path.parent, meta, vocabulary, data)
        except (OSError, ValueError, KeyError):
            continue  # cut short by a full disk or a crash: as good as missing
    return None


def _unchanged(text: str, example: Any = None, is_target: bool = False) -> str:
    return text
