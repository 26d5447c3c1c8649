"""The `tasks` command: which tasks there are, and what one of them looks like to a model. Plain text, at most 100 columns."""

import textwrap
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from mpt_jax.checkpoint.backbone import find_vocabulary
from mpt_jax.config import BackboneConfig, DataConfig, nearest
from mpt_jax.data.cache import PERCENTILES, TokenCache, open_task
from mpt_jax.data.registry import Entry, catalogue
from mpt_jax.data.vocabulary import Vocabulary, check_vocabulary, load_vocabulary
from mpt_jax.errors import UserError

COLUMNS = 100
EXAMPLES = 3
LINES = 4  # of a text or of its tokens
SHOWN_SPLITS = 3  # names in the list; the others are counted
UNKNOWN = "–"


def run_tasks(data: DataConfig, backbone: BackboneConfig, name: str = "") -> None:
    """Prints the task or mixture `name` or, where none has this very name, a list of those that contain it; "" lists all.

    For a task the token caches of `DataConfig.train_split` and `eval_split` are built, as a run would.

    Raises:
        UserError: a module of `DataConfig.task_modules`, a name, a split or a vocabulary that is not there; data that cannot be
            read.
    """
    entries = catalogue(data)
    found = [entry for entry in entries if entry.name == name] or [entry for entry in entries if name in entry.name]
    if not found:
        names = [entry.name for entry in entries]
        raise UserError(
            f"No task or mixture has '{name}' in its name.{nearest(name, names)} `python -m mpt_jax tasks` lists all of "
            f"{', '.join(data.task_modules)} (DataConfig.task_modules)."
        )
    if found[0].name != name:
        lines = _listed(found)
    elif found[0].members:
        lines = _mixture(found[0])
    else:
        lines = _task(found[0], data, _open_vocabulary(backbone))
    print("\n".join(line.rstrip() for line in lines))


def _open_vocabulary(backbone: BackboneConfig) -> Vocabulary:
    vocabulary = load_vocabulary(find_vocabulary(backbone))
    check_vocabulary(vocabulary, backbone.architecture)
    return vocabulary


def _listed(entries: Sequence[Entry]) -> list[str]:
    rows = [("task or mixture", "source", "splits", "metrics")]
    for entry in entries:
        more = len(entry.splits) - SHOWN_SPLITS
        splits = " ".join([*entry.splits[:SHOWN_SPLITS], *([f"+{more}"] if more > 0 else [])])
        last = f"{len(entry.members)} tasks" if entry.members else ", ".join(entry.metrics)
        rows.append((entry.name, entry.source, splits or UNKNOWN, last or UNKNOWN))
    mixtures = sum(bool(entry.members) for entry in entries)
    counts = f"{len(entries) - mixtures} tasks, {mixtures} mixtures"
    return [*_table(rows), "", f"{counts}; {UNKNOWN} is not known or none. `python -m mpt_jax tasks NAME` shows one of them."]


def _mixture(entry: Entry) -> list[str]:
    total = sum(entry.members.values())
    rows = [("task", "rate", "share")]
    rows += [(task, f"{rate:,.6g}", f"{100 * rate / total:.1f}%") for task, rate in entry.members.items()]
    return [f"{entry.name}, a mixture of {len(entry.members)} tasks", "", *_table(rows, right=(1, 2))]


def _task(entry: Entry, data: DataConfig, vocabulary: Vocabulary) -> list[str]:
    asked = list(dict.fromkeys((data.train_split, data.eval_split)))
    splits = [split for split in asked if split in entry.splits or not entry.splits] or asked[:1]
    caches = [open_task(data, entry.name, split, vocabulary) for split in splits]
    limits = " and ".join(f"{limit} {name}" for name, limit in caches[0].lengths.items())
    facts = [
        ("source", entry.source),
        ("splits", " ".join(entry.splits) or UNKNOWN),
        ("metrics", ", ".join(entry.metrics) or UNKNOWN),
        ("tokens", f"{vocabulary.path.name}, {vocabulary.vocab_size:,} ids; at most {limits} (TASK_FEATURE_LENGTHS)"),
        ("cache", str(caches[0].folder.parent.parent)),
    ]
    lines = [entry.name, *_table(facts), "", *_lengths(caches), ""]
    if any(cache.labels for cache in caches):
        lines += [*_labels(caches), ""]
    for row in _rows_to_show(caches[0]):
        lines += [*_example(caches[0], row, vocabulary), ""]
    return lines[:-1]


def _lengths(caches: Sequence[TokenCache]) -> list[str]:
    rows = [("split", "examples", "length of", *(f"{q}%" for q in PERCENTILES), "cut")]
    for cache in caches:
        for name, lengths in cache.percentiles.items():
            first = (cache.split, f"{len(cache):,}") if name == "inputs" else ("", "")
            share = f"{100 * cache.truncated[name] / len(cache):.2f}%"
            rows.append((*first, name, *(f"{lengths[str(q)]:,}" for q in PERCENTILES), share))
    return [
        "Lengths in tokens before anything is cut (90%: nine in ten are no longer), and how many are cut:",
        *_table(rows, right=(1, 3, 4, 5, 6, 7)),
    ]


def _labels(caches: Sequence[TokenCache]) -> list[str]:
    """The share of each label in each split; a split that is no classification by itself has none."""
    known = [cache for cache in caches if cache.labels]
    counts = [Counter(cache.labels) for cache in known]
    rows = [("label", *(cache.split for cache in known))]
    for label in sorted(set().union(*counts)):
        shares = (100 * count[label] / len(cache) for count, cache in zip(counts, known, strict=True))
        rows.append((_one_line(label), *(f"{share:.1f}%" for share in shares)))
    return _table(rows, right=range(1, len(known) + 1))


def _rows_to_show(cache: TokenCache) -> list[int]:
    """The first example of each of several labels or, without labels, random ones that are always the same."""
    if cache.labels:
        return sorted(int(row) for row in np.unique(cache.labels, return_index=True)[1])[:EXAMPLES]
    return sorted(np.random.default_rng(0).permutation(len(cache))[:EXAMPLES].tolist())


def _example(cache: TokenCache, row: int, vocabulary: Vocabulary) -> list[str]:
    fields, lines = cache.text(row), [f"Example {row} of {cache.split}"]
    for name, tokens in (("inputs", cache.inputs(row)), ("targets", cache.targets(row))):
        text = fields.get(f"{name}_pretokenized")
        shown = vocabulary.decode(tokens.tolist()) if text is None else text
        lines += _block(name, shown)
        lines += _block(f"{len(tokens)} token{'s' if len(tokens) > 1 else ''}", " ".join(vocabulary.pieces(tokens)))
    return lines


def _block(title: str, text: str) -> list[str]:
    """The text under a title, in a few lines."""
    indent = " " * 14
    lines = textwrap.wrap(
        _one_line(text),
        COLUMNS,
        initial_indent=f"  {title:<{len(indent) - 2}}",
        subsequent_indent=indent,
        max_lines=LINES,
        placeholder=" …",
    )
    return lines or [f"  {title}"]


def _one_line(text: str) -> str:
    return text.replace("\n", " ⏎ ")


def _table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """The rows in columns; what does not fit into the last one goes on below it. `right` names columns of numbers."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    left = sum(widths[:-1]) + 2 * (len(widths) - 1)
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        last = (
            textwrap.wrap(row[-1], max(COLUMNS - left, 20), break_long_words=False)
            if len(cells[-1]) > COLUMNS - left
            else cells[-1:]
        )
        lines += ["  ".join([*cells[:-1], last[0]]), *(" " * left + more for more in last[1:])]
    return lines
