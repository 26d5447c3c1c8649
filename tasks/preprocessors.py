"""From the fields of a dataset to `inputs` and `targets`, in the formats of ATTEMPT and MPT.

`inputs` is the task's name and then `field: text` for each field; `targets` is the label's number as a digit, as both papers'
code has it (words such as "entailment" come easier to a language model: a task of your own may use them). Two slips of that
code are not copied: WinoGrande gets both options (ATTEMPT writes the first twice) and STS-B scores are rounded to steps of 0.2,
so scores on these two are not strictly comparable with published ones.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import seqio
import tensorflow as tf

from mpt_jax import metrics

FIELDS = {
    "ag_news": ("title", "description"),
    "boolq": ("question", "passage"),
    "cb": ("premise", "hypothesis"),
    "cola": ("sentence",),
    "copa": ("premise", "choice1", "choice2"),
    "glue_rte": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "paws": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("premise", "hypothesis"),
    "scitail": ("premise", "hypothesis"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wic": ("sentence1", "sentence2", "word"),
    "winogrande": ("sentence", "option1", "option2"),
    "yelp_polarity": ("text",),
}

Fields = dict[str, tf.Tensor]
Columns = dict[str, Any]


def labelled(task: str) -> functools.partial:
    """Preprocessor of a classification task of `FIELDS`: `inputs` and `targets`."""
    return functools.partial(_labelled, task=task, fields=FIELDS[task])


def _labelled(dataset: tf.data.Dataset, task: str, fields: tuple[str, ...]) -> tf.data.Dataset:
    return dataset.map(
        lambda x: {"inputs": _join(task, {name: x[name] for name in fields}), "targets": _text(x["label"])},
        num_parallel_calls=tf.data.AUTOTUNE,
    )


@seqio.map_over_dataset
def stsb(x: Fields) -> Fields:
    """Similarity from 0 to 5 as text, in steps of 0.2."""
    score = tf.round(tf.cast(x["label"], tf.float64) * 5) / 5
    texts = {name: x[name] for name in FIELDS["stsb"]}
    return {"inputs": _join("stsb", texts), "targets": tf.strings.as_string(score, precision=1)}


@seqio.map_over_dataset
def wsc(x: Fields) -> Fields:
    """Marks the two spans in the text: `* span *` and `# span #` (T5's `wsc_simple` marks a pronoun only)."""
    text = _mark(x["text"], x["span1_text"], x["span1_index"], "*")
    # Marks round the first span push the second one two words on.
    shift = 2 * tf.cast(x["span1_index"] < x["span2_index"], x["span2_index"].dtype)
    text = _mark(text, x["span2_text"], x["span2_index"] + shift, "#")
    return {"inputs": _join("wsc", {"text": text}), "targets": _text(x["label"])}


@seqio.map_over_dataset
def multirc(x: Fields) -> Fields:
    """One answer to a question on a paragraph; `group` joins the answers of one question."""
    paragraph = tf.strings.regex_replace(tf.strings.regex_replace(x["paragraph"], "<br>", " "), "</?b>", "")
    texts = {"question": x["question"], "answer": x["answer"], "paragraph": paragraph}
    group = tf.strings.join([_text(x["idx"][name]) for name in ("paragraph", "question")], "-")
    return {"inputs": _join("multirc", texts), "targets": _text(x["label"]), "group": group}


def squad(task: str = "squad") -> functools.partial:
    """Preprocessor of extractive questions: `question: ... context: ...`, punctuation set apart; target: the first answer."""
    return functools.partial(_squad, task=task)


def _squad(dataset: tf.data.Dataset, task: str) -> tf.data.Dataset:
    def example(x: Fields) -> Fields:
        answers = tf.strings.strip(_space_punctuation(x["answers"]["text"]))  # as the model is taught to write them
        texts = {"question": _space_punctuation(x["question"]), "context": _space_punctuation(x["context"])}
        return {"inputs": _join(task, texts), "targets": answers[0], "answers": answers, "id": x["id"]}

    answered = dataset.filter(lambda x: tf.size(x["answers"]["text"]) > 0)
    return answered.map(example, num_parallel_calls=tf.data.AUTOTUNE)


def record(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """ReCoRD: fill the @placeholder of a query with an entity of a passage; one copy of the example for each right answer."""

    def copies(x: Fields) -> tf.data.Dataset:
        passage = tf.strings.regex_replace(x["passage"], r"(\.|\?|\!|\"|\')\n@highlight\n", r"\1 ")
        passage = tf.strings.regex_replace(passage, r"\n@highlight\n", ". ")
        entities = tf.strings.reduce_join(x["entities"], separator=", ")
        inputs = _join("record", {"query": x["query"], "entities": entities, "passage": passage})
        ident = tf.strings.join([_text(x["idx"][name]) for name in ("passage", "query")], "-")
        return tf.data.Dataset.from_tensor_slices(x["answers"]).map(
            lambda answer: {"inputs": inputs, "targets": answer, "answers": x["answers"], "id": ident}
        )

    return dataset.filter(lambda x: tf.size(x["answers"]) > 0).flat_map(copies)


@dataclasses.dataclass(frozen=True)
class Format:
    """How a well-known task reads and scores. `columns` are the fields that are needed, each with its kind (`files.KINDS`)."""

    preprocessor: Callable[..., Any]
    columns: Columns
    metric_fns: tuple[Callable[..., Any], ...] = (metrics.accuracy,)
    postprocess_fn: Callable[..., Any] = metrics.strip


_LABEL_METRICS = {
    "cb": (metrics.f1_macro, metrics.accuracy),
    "cola": (metrics.matthews_correlation,),
    "mrpc": (metrics.f1, metrics.accuracy),
    "qqp": (metrics.f1, metrics.accuracy),
}
_MULTIRC: Columns = dict.fromkeys(("paragraph", "question", "answer"), "text")
_MULTIRC |= {"label": "label", "idx": {"paragraph": "text", "question": "text"}}
_RECORD: Columns = {"passage": "text", "query": "text", "entities": "texts", "answers": "texts"}
_RECORD |= {"idx": {"passage": "text", "query": "text"}}
_WSC: Columns = {"text": "text", "label": "label"}
_WSC |= {"span1_text": "text", "span1_index": "position", "span2_text": "text", "span2_index": "position"}


def known_format(task: str) -> Format | None:
    """The format of a task with a well-known name, else None."""
    texts = dict.fromkeys(FIELDS.get(task, ()), "text")
    if task == "stsb":
        return Format(stsb, texts | {"label": "number"}, (metrics.pearson, metrics.spearman), metrics.number)
    if task in FIELDS:
        return Format(labelled(task), texts | {"label": "label"}, _LABEL_METRICS.get(task, (metrics.accuracy,)))
    if task == "squad":
        return squad_format(task)
    special = {
        "multirc": Format(multirc, _MULTIRC, (metrics.multirc,), metrics.with_group),
        "record": Format(record, _RECORD, (metrics.record,), metrics.with_answers),
        "wsc": Format(wsc, _WSC),
    }
    return special.get(task)


def squad_format(task: str) -> Format:
    """The format of extractive question answering under the name `task`."""
    columns = {"question": "text", "context": "text", "answers": {"text": "texts"}, "id": "text"}
    return Format(squad(task), columns, (metrics.squad,), metrics.with_answers)


def format_of(task: str) -> Format:
    """The format of a task that is known."""
    form = known_format(task)
    if form is None:
        raise ValueError(f"no format is known for '{task}'")
    return form


KNOWN = (*FIELDS, "multirc", "record", "squad", "wsc")


def _text(value: tf.Tensor) -> tf.Tensor:
    return value if value.dtype == tf.string else tf.strings.as_string(value)


def _join(task: str, texts: Fields) -> tf.Tensor:
    parts = [tf.constant(task)]
    for name, text in texts.items():
        parts += [tf.constant(f"{name}:"), text]
    return tf.strings.join(parts, " ")


def _space_punctuation(text: tf.Tensor) -> tf.Tensor:
    """Spaces round everything but letters, digits, marks and underscores; runs of spaces become one."""
    return tf.strings.regex_replace(tf.strings.regex_replace(text, r"([^_\s\pN\pL\pM])", r" \1 "), r"\s+", " ")


def _mark(text: tf.Tensor, span: tf.Tensor, index: tf.Tensor, mark: str) -> tf.Tensor:
    """`mark span mark` where `span` starts at word number `index`."""
    literal = tf.strings.regex_replace(span, r"([[:punct:]])", r"\\\1")
    pattern = tf.strings.join([r"^((?:\S+\s){", tf.strings.as_string(index), r"})(", literal, ")"])
    return tf.strings.regex_replace(text, pattern, rf"\1{mark} \2 {mark}")
