"""Three seqio tasks of a few words, for tests that need a whole run. Every answer can be read off the input."""

import random

import seqio

from mpt_jax import metrics
from tasks import features

COLOURS = ("red", "blue", "green")
GOOD, BAD = ("good", "fine", "sweet"), ("bad", "poor", "sour")


def _colour(rng: random.Random) -> dict[str, str]:
    colour = rng.choice(COLOURS)
    return {"inputs": f"the {rng.choice(('cat', 'dog', 'bird'))} is {colour}", "targets": colour}


def _mood(rng: random.Random) -> dict[str, str]:
    good = rng.random() < 0.5
    words = " and ".join(rng.choice(GOOD if good else BAD) for _ in range(rng.randint(1, 3)))
    return {"inputs": f"the food is {words}", "targets": "yes" if good else "no"}


def _taste(rng: random.Random) -> dict[str, str]:
    good = rng.random() < 0.5
    word = rng.choice(GOOD if good else BAD)
    return {"inputs": f"the {rng.choice(('cat', 'dog'))} is {word}", "targets": "yes" if good else "no"}


def _animal(rng: random.Random) -> dict[str, str]:
    animal = rng.choice(("cat", "dog", "bird"))
    return {"inputs": f"a {rng.choice(COLOURS)} {animal}", "targets": animal}


def _rows(make, split: str, size: int) -> list[dict[str, str]]:
    rng = random.Random(f"{make.__name__} {split}")
    return [make(rng) for _ in range(size)]


def _label(row: dict) -> dict:
    """The format of a task with a `label` field of its own, for `infer`."""
    return {"inputs": seqio.preprocessors.tf.strings.join(["the food is ", row["word"]]), "targets": row["label"]}


for _name, _make in (("tiny_colour", _colour), ("tiny_mood", _mood), ("tiny_animal", _animal)):
    seqio.TaskRegistry.add(
        _name,
        source=features.rows_source({split: _rows(_make, split, size) for split, size in (("train", 64), ("validation", 20))}),
        preprocessors=[*features.TOKENIZE],
        output_features=features.output_features(),
        metric_fns=[metrics.accuracy],
    )

seqio.TaskRegistry.add(
    "tiny_word",
    source=features.rows_source({"train": [{"word": "good", "label": "yes"}, {"word": "bad", "label": "no"}] * 8}),
    preprocessors=[seqio.map_over_dataset(_label), *features.TOKENIZE],
    output_features=features.output_features(),
    metric_fns=[metrics.accuracy],
)

seqio.TaskRegistry.add(  # scored as CB is
    "tiny_verdict",
    source=features.rows_source({split: _rows(_colour, split, size) for split, size in (("train", 64), ("validation", 20))}),
    preprocessors=[*features.TOKENIZE],
    output_features=features.output_features(),
    metric_fns=[metrics.f1_macro, metrics.accuracy],
)

seqio.TaskRegistry.add(  # no classification: few of its targets recur
    "tiny_free",
    source=features.rows_source(
        {
            split: [{"inputs": f"copy {a} {b}", "targets": f"{a} {b}"} for a in (*GOOD, *BAD) for b in COLOURS]
            for split in ("train", "validation")
        }
    ),
    preprocessors=[*features.TOKENIZE],
    output_features=features.output_features(),
    metric_fns=[metrics.accuracy],
)


def _nan(targets, predictions):
    """As of a correlation of predictions that are all alike."""
    return {"pearson": float("nan")}


def _bug(targets: list[str], predictions: list[str]) -> dict[str, float]:
    raise TypeError("a bug in a metric")


for _name, _metric in (("tiny_bug", _bug), ("tiny_nan", _nan)):
    seqio.TaskRegistry.add(
        _name,
        source=features.rows_source({split: _rows(_mood, split, 16) for split in ("train", "validation")}),
        preprocessors=[*features.TOKENIZE],
        output_features=features.output_features(),
        metric_fns=[_metric],
    )

seqio.TaskRegistry.add(  # as those for pretraining
    "tiny_no_metric",
    source=features.rows_source({split: _rows(_mood, split, 8) for split in ("train", "validation")}),
    preprocessors=[*features.TOKENIZE],
    output_features=features.output_features(),
)

# Of the labels of tiny_mood. One has a test split alone, one has only one label to test on.
_tastes = {name: _rows(_taste, name, 24) for name in ("train", "validation")}
_good = [row for row in _tastes["validation"] if row["targets"] == "yes"]
for _name, _splits in {
    "tiny_taste": _tastes,
    "tiny_taste_unseen": {"validation": _rows(_taste, "unseen", 24)},
    "tiny_taste_good": _tastes | {"validation": _good},
}.items():
    seqio.TaskRegistry.add(
        _name,
        source=features.rows_source(_splits),
        preprocessors=[*features.TOKENIZE],
        output_features=features.output_features(),
        metric_fns=[metrics.accuracy],
    )

seqio.MixtureRegistry.add("tiny", ["tiny_colour", "tiny_mood", "tiny_animal"], default_rate=1)
