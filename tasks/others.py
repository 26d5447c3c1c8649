"""Other labelled texts: MPT's "Others", natural language inference, sentiment, topics, kinds of question.

T5's own code has none of these. What SPoT's code has (SNLI, ANLI, DocNLI, IMDB, Yelp, Sentiment140, GoEmotions) is written as
there; the rest by T5's rule for GLUE, the fields in order of the alphabet and labels as words. ATTEMPT's code has WinoGrande,
Yelp, SciTail, PAWS and SNLI; the rest is written in its manner.
"""

import functools
from typing import Any

from tasks import library, preprocessors, reading, splits

NLI = ("entailment", "neutral", "contradiction")
TOPICS = ("World", "Sports", "Business", "Sci/Tech")
QUESTIONS = ("DESC", "ENTY", "ABBR", "HUM", "NUM", "LOC")
SENTIMENT = ("negative", "positive")
EMOTIONS = tuple(
    "admiration amusement anger annoyance approval caring confusion curiosity desire disappointment disapproval disgust "
    "embarrassment excitement fear gratitude grief joy love nervousness optimism pride realization relief remorse sadness "
    "surprise neutral".split()
)
OURS = "formats by the general rules: neither T5, SPoT nor ATTEMPT has this one"


def _answer_as_label(row: dict[str, Any]) -> dict[str, Any]:
    """WinoGrande in Hugging Face's form: `answer` is "1" or "2", empty where there is none."""
    if "answer" not in row or "label" in row:
        return row
    return row | {"label": {"": -1, "1": 0, "2": 1}.get(str(row["answer"]), row["answer"])}


def _coarse_as_word(row: dict[str, Any]) -> dict[str, Any]:
    """TREC in Hugging Face's form: `coarse_label`, which counts the classes in another order."""
    words = dict(enumerate(("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")))
    return row | {"label-coarse": words.get(row["coarse_label"], row["coarse_label"])} if "coarse_label" in row else row


def _labels_as_flags(row: dict[str, Any]) -> dict[str, Any]:
    """GoEmotions in Hugging Face's form: `text`, and the numbers of its emotions in `labels`."""
    if not isinstance(row.get("labels"), list):
        return row
    return row | {name: number in row["labels"] for number, name in enumerate(EMOTIONS)}


def _winogrande() -> library.Dataset:
    words = ("option1", "option2")
    formats = library.classification(
        "winogrande", "option1 option2 sentence", words, "winogrande sentence=sentence option0=option1 option1=option2"
    )
    # ATTEMPT's code writes the first option twice.
    formats["attempt_published"] = library.Format("winogrande sentence: {sentence} option0: {option1} option1: {option1}")
    return library.Dataset(
        name="winogrande",
        tfds="winogrande:1.2.0",
        columns=library.label_columns("sentence option1 option2", words),
        formats=formats,
        rows={"train": 40_398, "validation": 1_267},
        protocol=splits.held_out(),
        classes=words,
        source="`train` is `train_xl`; the words of its T5 format are ours",
        convert=_answer_as_label,
        tfds_splits={"train": "train_xl"},
    )


def _anli(number: int, rows: tuple[int, int, int]) -> library.Dataset:
    name = f"anli_r{number}"
    return library.Dataset(
        name=name,
        tfds=f"anli/r{number}:0.1.0",
        columns=library.label_columns("hypothesis context", NLI),
        formats=library.classification(
            name, "hypothesis context", NLI, f"{name} premise=context hypothesis=hypothesis", collapse=True
        ),
        rows=dict(zip(("train", "validation", "test"), rows, strict=True)),
        protocol=splits.own(),
        classes=NLI,
        source="SPoT's format; the dataset's own splits",
        aliases={"premise": "context"},
    )


_GOEMOTIONS: dict[str, Any] = {
    "target": "emotions",
    "prepare": functools.partial(preprocessors.emotions, names=EMOTIONS),
    "collapse": True,
}

DATASETS = library.table_of(
    _winogrande(),
    library.Dataset(
        name="yelp_polarity",
        tfds="yelp_polarity_reviews:0.2.0",
        columns=library.label_columns("text", SENTIMENT),
        formats=library.classification(
            "yelp_polarity",
            "text",
            SENTIMENT,
            "yelp_polarity sentence=text",
            t5_name="yelp_polarity_reviews",
            collapse=True,
        ),
        rows={"train": 560_000, "test": 38_000},
        protocol=splits.held_out(test="test", limit=100_000),
        classes=SENTIMENT,
        source="SPoT's format; 100,000 rows are trained on, as in the published tables",
    ),
    library.Dataset(
        name="scitail",
        tfds="sci_tail:1.0.0",
        columns=library.label_columns("premise hypothesis", ("entailment", "neutral")),
        formats=library.classification(
            "scitail", "hypothesis premise", ("entailment", "neutral"), "scitail premise=premise hypothesis=hypothesis"
        ),
        rows={"train": 23_596, "validation": 1_304, "test": 2_126},
        protocol=splits.halved(),
        classes=("entailment", "neutral"),
        source="T5's rule; ATTEMPT halves the validation split though there is a test split",
        aliases={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
    ),
    library.Dataset(
        name="paws",
        tfds="paws_wiki:1.1.0",
        columns=library.label_columns("sentence1 sentence2", ("different", "paraphrase")),
        formats=library.classification("paws", "sentence1 sentence2", ("different", "paraphrase")),
        rows={"train": 49_401, "validation": 8_000, "test": 8_000},
        protocol=splits.own(),
        classes=("different", "paraphrase"),
        source="T5's rule, words of ours",
    ),
    library.Dataset(
        name="snli",
        tfds="snli:1.1.0",
        columns=library.label_columns("premise hypothesis", NLI),
        formats=library.classification(
            "snli", "hypothesis premise", NLI, "snli premise=premise hypothesis=hypothesis", collapse=True
        ),
        rows={"train": 550_152, "validation": 10_000, "test": 10_000},
        protocol=splits.held_out(test="test"),
        classes=NLI,
        source="SPoT's format; counts include rows with label -1, which are left out after the split is made",
    ),
    _anli(1, (16_946, 1_000, 1_000)),
    _anli(2, (45_460, 1_000, 1_000)),
    _anli(3, (100_459, 1_200, 1_200)),
    library.Dataset(
        name="doc_nli",
        tfds="doc_nli:1.0.0",
        columns=library.label_columns("premise hypothesis", ("not_entailment", "entailment")),
        formats=library.classification(
            "doc_nli",
            "hypothesis premise",
            ("not_entailment", "entailment"),
            "doc_nli premise=premise hypothesis=hypothesis",
            collapse=True,
        ),
        rows={"train": 942_314, "validation": 234_258, "test": 267_086},
        protocol=splits.own(),
        classes=("not_entailment", "entailment"),
        source="SPoT's format; the dataset's own splits",
    ),
    library.Dataset(
        name="imdb",
        tfds="imdb_reviews/plain_text:1.0.0",
        columns=library.label_columns("text", SENTIMENT),
        formats=library.classification("imdb", "text", SENTIMENT, t5_name="imdb_reviews", collapse=True),
        rows={"train": 25_000, "test": 25_000},
        protocol=splits.held_out(test="test"),
        classes=SENTIMENT,
        source="SPoT's format; ATTEMPT's rule for large datasets",
    ),
    library.Dataset(
        name="sentiment140",
        tfds="sentiment140:1.0.0",
        columns={"text": reading.TEXT, "polarity": reading.number_of(0, 2, 4)},
        formats=library.classification(
            "sentiment140", "text", ("negative", "neutral", "positive"), prepare=preprocessors.polarity, collapse=True
        ),
        rows={"train": 1_600_000, "test": 498},
        protocol=splits.held_out(test="test"),
        classes=("negative", "neutral", "positive"),
        source="SPoT's format; ATTEMPT's rule for large datasets; no training row is neutral",
        aliases={"sentiment": "polarity"},
    ),
    library.Dataset(
        name="goemotions",
        tfds="goemotions:0.1.0",
        columns={"comment_text": reading.TEXT, **dict.fromkeys(EMOTIONS, reading.FLAG)},
        formats={
            "t5": library.Format("goemotions comment: {comment_text}", **_GOEMOTIONS),
            "prompt_tuning": library.Format("comment: {comment_text}", **_GOEMOTIONS),
        },
        rows={"train": 43_410, "validation": 5_426, "test": 5_427},
        protocol=splits.own(),
        source="SPoT's format: all emotions of a comment are the target",
        aliases={"text": "comment_text"},
        convert=_labels_as_flags,
    ),
    library.Dataset(
        name="ag_news",
        tfds="ag_news_subset:1.0.0",
        columns=library.label_columns("title description", TOPICS),
        formats=library.classification("ag_news", "description title", TOPICS, "ag_news title=title description=description"),
        rows={"train": 120_000, "test": 7_600},
        protocol=splits.held_out(test="test"),
        classes=TOPICS,
        source=OURS,
    ),
    library.Dataset(
        name="trec",
        tfds="trec:1.0.0",
        columns={"text": reading.TEXT, "label-coarse": reading.label(QUESTIONS)},
        formats=library.classification("trec", "text", QUESTIONS, metrics=("accuracy", "f1_macro"), target="label-coarse"),
        rows={"train": 5_452, "test": 500},
        protocol=splits.held_out(test="test"),
        classes=QUESTIONS,
        label="label-coarse",
        source=f"{OURS}; without a validation split, 1,000 training rows are held out; `label-coarse` is numbered as in TFDS, "
        "`coarse_label` as in Hugging Face",
        convert=_coarse_as_word,
    ),
)

library.register_all(DATASETS)
