"""The `inspect` command: what the prompts of a run are near to, as a table, as `inspect.json` and as a picture."""

import json
import textwrap
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpt_jax import setup
from mpt_jax.checkpoint.folder import FREE_IN_A_RUN, RunFolder, differences
from mpt_jax.config import Experiment, to_dict
from mpt_jax.data.vocabulary import Vocabulary
from mpt_jax.errors import UserError
from mpt_jax.files import replacing
from mpt_jax.prompts import compose
from mpt_jax.prompts.files import FILE_NAME
from mpt_jax.studies import figures, interpret
from mpt_jax.studies.wording import counted, task_labels

RESULT_FILE = "inspect.json"
PICTURE_FILE = Path("figures", "similarity.png")
MEASURES = {"average_token": "average tokens", "per_token": "pairs of tokens, mean"}
MAX_PIXELS = 16_000  # of the picture's longer side
COLUMNS = 100
UNKNOWN = "–"

Result = dict[str, Any]


class Prompt(NamedTuple):
    """One composed prompt of a bank; a plain prompt that several streams share is one."""

    name: str
    tasks: list[str]
    stream: int  # its first
    seed: int
    score: float | None
    tokens: np.ndarray  # [P,D], P its own length


class Words(NamedTuple):
    """What tokens are compared with."""

    vocabulary: Vocabulary
    embedding: np.ndarray  # [V,D] of the vocabulary's ids
    neighbours: int
    labels: dict[str, list[int]]  # the ids of each class label's pieces


def run_inspect(experiment: Experiment) -> Result:
    """Looks at the prompts of MODEL_DIR or, where it holds no run, of `PromptConfig.init_file`.

    Prints a table for each prompt, writes `<MODEL_DIR>/inspect.json` and, for several prompts, `figures/similarity.png`.

    Returns:
        What is in the file.

    Raises:
        UserError: no prompt, or one that does not fit the backbone; more neighbours than the vocabulary has pieces; a folder that
            cannot be written.
    """
    experiment.validate()
    if experiment.prompt.method == "none":
        raise UserError("PromptConfig.method='none' trains no prompt to inspect, but a model; give the MODEL_DIR of a prompt.")
    trained = setup.open_trained(experiment, setup.mesh_of(experiment))
    vocabulary = setup.open_vocabulary(experiment, trained.backbone)
    words = open_words(experiment, trained.backbone.params["token_embedder"]["embedding"], vocabulary)
    bank = prompts_of(trained.meta, np.asarray(trained.trainable["prompt"]))
    starts, why = find_starts(experiment, trained, vocabulary)
    result: Result = {
        "source": trained.source,
        "backbone": trained.backbone.fingerprint,
        "neighbours": words.neighbours,
        "pieces": {
            "count": len(words.embedding),
            "norm": float(np.linalg.norm(words.embedding, axis=1).mean()),
            "purity_of_random_pieces": float(interpret.mean_pair_cosine(words.embedding)),
            "purity_of_random_directions": interpret.purity_of_random_directions(words.embedding, words.neighbours),
        },
        "labels": {label: vocabulary.pieces(ids) for label, ids in words.labels.items()},
        "no_drift_because": why,
        "prompts": [describe(prompt, None if starts is None else starts[prompt.stream], words) for prompt in bank],
    }
    if len(bank) > 1:
        result["similarity"] = similarity(bank)
    folder = RunFolder(experiment.train.model_dir)
    folder.write(RESULT_FILE, result)
    print("\n".join(_table(result, experiment.inspect.tokens, folder.path / RESULT_FILE)))
    if len(bank) > 1:
        picture = folder.path / PICTURE_FILE
        _draw(result["similarity"], picture)
        print(f"Similarities: {picture}")
    print(f"Everything: {folder.path / RESULT_FILE}")
    return result


def open_words(experiment: Experiment, embedding: Any, vocabulary: Vocabulary) -> Words:
    """The pieces and labels to look for; `embedding` [V,D] is the backbone's, whose ids above the vocabulary's are left out.

    A piece of a label that shows no character, such as the space before it, says nothing of the label and is left out.

    Raises:
        UserError: more neighbours than pieces.
    """
    rows = np.asarray(embedding, np.float32)[: vocabulary.vocab_size]
    cfg = experiment.inspect
    if cfg.neighbours > len(rows):
        raise UserError(f"InspectConfig.neighbours is {cfg.neighbours}, but the vocabulary has {len(rows)} pieces; give fewer.")
    texts, labels = cfg.labels, {}
    if not texts and "labels" in (experiment.prompt.init, *(stream.init for stream in experiment.data.streams)):
        started = setup.init_labels(experiment, setup.find_streams(experiment), vocabulary)
        texts = tuple(dict.fromkeys(label for group in started for label in group))
    texts = texts or experiment.prompt.init_labels
    for label in texts:
        ids = vocabulary.encode(label)
        labels[label] = [n for n, piece in zip(ids, vocabulary.pieces(ids), strict=True) if piece.strip("▁ ")]
    return Words(vocabulary, rows, cfg.neighbours, labels)


def prompts_of(meta: Mapping[str, Any], composed: np.ndarray) -> list[Prompt]:
    """The different prompts of a bank, without the zeros before the shorter ones.

    Args:
        meta: of `load_prompts`.
        composed: [N,P,D], of all streams.
    """
    groups, tasks = list(meta["groups"]), list(meta["tasks"])
    of_each = [[n] for n in range(len(groups))]  # streams; MPT's u and v are a stream's own
    if meta["method"] == "plain":
        of_each = [[n for n, group in enumerate(groups) if group == one] for one in range(max(groups) + 1)]
    held = [list(dict.fromkeys(tasks[n] for n in streams)) for streams in of_each]
    names = [(one[0] or "prompt") + (f" + {len(one) - 1} more" if len(one) > 1 else "") for one in held]
    lengths = [meta["lengths"][groups[first]] for first, *_ in of_each]
    both = list(zip(names, lengths, strict=True))
    several = {name for name, length in both if any(name == other and length != its for other, its in both)}
    names = [f"{name}, {counted(length, 'token')}" if name in several else name for name, length in both]
    counts = Counter(names)
    prompts = []
    for name, length, own, (first, *_) in zip(names, lengths, held, of_each, strict=True):
        group = groups[first]
        tokens = composed[first, -length:]
        unique = name if counts[name] == 1 else f"{name} #{first}"  # of several seeds of a task, as PATH#NUMBER has it
        prompts.append(Prompt(unique, own, first, meta["seeds"][group], meta["scores"][group], tokens))
    return prompts


def find_starts(experiment: Experiment, trained: setup.Trained, vocabulary: Vocabulary) -> tuple[np.ndarray | None, str]:
    """(the composed prompts [N,P,D] that the run in MODEL_DIR started from, "") or (None, why they are not known).

    They are drawn again from the run's seeds, or read again from the file that it started from.
    """
    folder = RunFolder(experiment.train.model_dir)
    if trained.source != str(folder.path / FILE_NAME):
        return None, f"MODEL_DIR {folder.path} holds no run"
    now = json.loads(json.dumps(to_dict(experiment)))
    then = folder.config()
    if not then:
        return None, f"MODEL_DIR {folder.path} has no config.json that says how the run began"
    for name, before, after in differences(then, now, FREE_IN_A_RUN):
        if name.startswith(("prompt.", "data.streams", "train.seed")):
            return None, f"the run had {name}={before!r}, but now it is {after!r}"
    meta = trained.meta
    try:
        streams = setup.find_streams(experiment)
        params = setup.initial_trainable(experiment, streams, trained.backbone, vocabulary)
    except UserError as error:  # a source prompt that has been moved, say; the rest can be told
        return None, str(error)
    ours = (streams.tasks, streams.groups, streams.seeds, streams.lengths(experiment.prompt.length))
    if ours != tuple(tuple(meta[key]) for key in ("tasks", "groups", "seeds", "lengths")):
        return None, f"{trained.source} does not hold the prompts that this configuration trains"
    return np.asarray(compose(experiment.prompt.method, params, streams.groups)), ""


def describe(prompt: Prompt, start: np.ndarray | None, words: Words) -> Result:
    """Everything about one prompt, as JSON has it.

    Args:
        start: [≥P,D] that it started from, its last P tokens; None where this is not known.
    """
    own = None if start is None else start[-len(prompt.tokens) :]
    nearest, cosines = interpret.nearest_pieces(prompt.tokens, words.embedding, words.neighbours)
    purity = interpret.mean_pair_cosine(words.embedding[nearest])
    unknown = np.full(len(prompt.tokens), np.nan)
    start_cosine, moved = (unknown, unknown) if own is None else interpret.drift(prompt.tokens, own)
    norms = np.linalg.norm(prompt.tokens, axis=1)
    tokens = [
        {
            "token": n + 1,
            "norm": float(norms[n]),
            "start_cosine": _number(start_cosine[n]),
            "moved": _number(moved[n]),
            "purity": float(purity[n]),
            "labels": [label for label, ids in words.labels.items() if interpret.tokens_near(nearest[n : n + 1], ids)[0]],
            "nearest": [
                {"piece": piece, "id": int(i), "cosine": float(cosine)}
                for piece, i, cosine in zip(words.vocabulary.pieces(nearest[n]), nearest[n], cosines[n], strict=True)
            ],
        }
        for n in range(len(prompt.tokens))
    ]
    before = None if own is None else interpret.nearest_pieces(own, words.embedding, words.neighbours)[0]
    return {
        "name": prompt.name,
        "tasks": prompt.tasks,
        "seed": prompt.seed,
        "score": prompt.score,
        "length": len(tokens),
        "norm": float(norms.mean()),
        "start_cosine": _number(np.mean(start_cosine)),
        "moved": _number(np.mean(moved)),
        "purity": float(purity.mean()),
        "purity_at_start": None if before is None else float(interpret.mean_pair_cosine(words.embedding[before]).mean()),
        "different_nearest_pieces": len(np.unique(nearest[:, 0])),
        "any_label": count_tokens(set().union(*words.labels.values()), nearest, before),
        "labels": {label: count_tokens(ids, nearest, before) for label, ids in words.labels.items()},
        "tokens": tokens,
    }


def count_tokens(pieces: Collection[int], nearest: np.ndarray, before: np.ndarray | None) -> dict[str, int | None]:
    """How many tokens have one of the pieces among their nearest: now, at the start, and still (both); the persistence of labels.

    Args:
        pieces: ids.
        nearest: [P,k] ids now.
        before: [P,k] ids at the start; None where that is not known, and neither are the last two numbers.
    """
    now = interpret.tokens_near(nearest, pieces)
    then = None if before is None else interpret.tokens_near(before, pieces)
    return {
        "tokens": int(now.sum()),
        "at_start": None if then is None else int(then.sum()),
        "still": None if then is None else int((now & then).sum()),
    }


def similarity(bank: Sequence[Prompt]) -> Result:
    """Both of SPoT's similarities between the prompts of a bank, as JSON has them."""
    tokens = [prompt.tokens for prompt in bank]
    matrices = {
        "average_token": interpret.average_token_similarity(tokens),
        "per_token": interpret.per_token_similarity(tokens),
    }
    return {"prompts": [prompt.name for prompt in bank], **{name: matrix.tolist() for name, matrix in matrices.items()}}


def _number(value: Any) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


# --------------------------------------------------------------------------------------------------------- what is printed


def _table(result: Result, shown: int, path: Path) -> Iterator[str]:
    """The lines that a person reads: a legend, a table for each prompt, which of them are alike."""
    pieces = result["pieces"]
    yield f"{result['source']}, on the backbone {result['backbone']}"
    random, directions = (pieces[f"purity_of_random_{what}"] for what in ("pieces", "directions"))
    by_chance = f"It is {random:.2f} among random pieces and {directions:.2f} among the nearest of random directions."
    legend = [
        "start: a token's cosine with the token that it started as; moved: how far it is from there, in norms of its start.",
        f"purity: mean cosine among its {result['neighbours']} nearest pieces. {by_chance}",
    ]
    if result["no_drift_because"]:
        legend.append(f"Where the prompts started is not known: {result['no_drift_because'].rstrip('.')}.")
    if not result["labels"]:
        legend.append("No class labels are looked for; InspectConfig.labels=('yes', 'no') names some.")
    for text in legend:
        yield textwrap.fill(text, COLUMNS, break_on_hyphens=False)
    for prompt in result["prompts"]:
        yield ""
        yield from _prompt_lines(prompt, result, shown or prompt["length"], path)
    yield ""
    if "similarity" in result:
        yield from _alike(result["similarity"])
        yield ""


def _prompt_lines(prompt: Result, result: Result, shown: int, path: Path) -> Iterator[str]:
    score = "" if prompt["score"] is None else f", validation score {prompt['score']:.2f}"
    yield f"{prompt['name']}: {counted(prompt['length'], 'token')}, seed {prompt['seed']}{score}"
    if len(prompt["tasks"]) > 1:
        yield textwrap.fill(f"tasks: {', '.join(prompt['tasks'])}", COLUMNS, initial_indent="  ", subsequent_indent="  ")
    yield f"{'token':>7}{'start':>7}{'moved':>7}{'purity':>8}  nearest pieces, each with its cosine"
    for token in prompt["tokens"][:shown]:
        near = "  ".join(f"{one['piece']} {one['cosine']:.2f}" for one in token["nearest"])
        yield f"{token['token']:>7}{_cell(token['start_cosine'])}{_cell(token['moved'])}{token['purity']:>8.2f}  {near}"
    left = prompt["length"] - shown
    if left > 0:
        yield f"{'…':>7}  {counted(left, 'more token')} in {path} (InspectConfig.tokens=0 prints all)"
    before = "" if prompt["purity_at_start"] is None else f"  purity at the start {prompt['purity_at_start']:.2f}"
    yield f"{'mean':>7}{_cell(prompt['start_cosine'])}{_cell(prompt['moved'])}{prompt['purity']:>8.2f}{before}"
    yield (
        f"  norm {prompt['norm']:.3g} on the mean (pieces: {result['pieces']['norm']:.3g}); "
        f"{counted(prompt['different_nearest_pieces'], 'different piece')} as the nearest"
    )
    for label, found in prompt["labels"].items():
        yield f"  label '{label}' ({' '.join(result['labels'][label]) or 'no piece'}): {_counted(found)}"
    if len(prompt["labels"]) > 1:
        yield f"  any label: {_counted(prompt['any_label'])}"


def _counted(found: Mapping[str, int | None]) -> str:
    text = f"among the nearest of {counted(found['tokens'] or 0, 'token')}"
    if found["at_start"] is not None:
        text += (
            f"; at the start of {found['at_start']}, of which {found['still']} still"
            if found["at_start"]
            else "; at the start of none"
        )
    return text


def _cell(value: float | None) -> str:
    return f"{UNKNOWN:>7}" if value is None else f"{value:>7.2f}"


def _alike(similarities: Result) -> Iterator[str]:
    """For each prompt the other one that is most similar to it, by both measures."""
    names = similarities["prompts"]
    yield "The most similar other prompt, by the cosine of"
    rows = [("", *MEASURES.values())]
    for n, name in enumerate(names):
        cells = []
        for measure in MEASURES:
            row = similarities[measure][n]
            other = max((i for i in range(len(names)) if i != n), key=lambda i: row[i])
            cells.append(f"{names[other]} {row[other]:.2f}")
        rows.append((name, *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield "Prompts of one seed also share their start, and short trainings keep them near it: compare those of different seeds."


def _draw(similarities: Result, path: Path) -> None:
    panels = {title: np.asarray(similarities[measure]) for measure, title in MEASURES.items()}
    figure = figures.similarity_heatmap(panels, list(task_labels(similarities["prompts"]).values()))
    dots = min(2 * figures.PAGE_PIXELS, int(MAX_PIXELS / max(figure.get_size_inches())))
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(figures.to_png(figure, dots))
    except OSError as error:
        raise UserError(f"Cannot write {path} ({error.strerror}); give a MODEL_DIR that you may write to.") from None
