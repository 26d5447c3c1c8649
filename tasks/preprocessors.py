"""From the fields of a dataset to `inputs` and `targets`.

A format is a template of the inputs, such as "mnli hypothesis: {hypothesis} premise: {premise}", and a field for the targets.
Where a dataset's fields need more than that, a preprocessor of this file goes before and makes the fields that the template
names. Sources: T5's `t5/data/preprocessors.py` (and Raffel et al. 2020, appendix D), prompt-tuning's `prompt_tuning/data/` and
`prompt_tuning/spot/data/`, ATTEMPT's `attempt/data/tasks.py`.
"""

import functools
import string
from collections.abc import Sequence
from typing import Any

import seqio
import tensorflow as tf

Fields = dict[str, Any]

# ---------------------------------------------------------------- the template


def text_to_text(
    dataset: tf.data.Dataset,
    inputs: str,
    target: str = "label",
    classes: Sequence[str] = (),
    labels: Sequence[str] = (),
    carry: Sequence[str] = (),
    collapse: bool = False,
) -> tf.data.Dataset:
    """Preprocessor: `inputs` from its template, `targets` from the field `target`, and the fields `carry` as they are.

    Args:
      classes: with them, the target is a label, by its number or its word among these.
      labels: what is written for each label instead of its number.
      collapse: runs of spaces in `inputs` become one (T5's `_string_join`).
    """

    def example(x: Fields) -> Fields:
        text = fill(inputs, x)
        written = label_text(x[target], classes, labels) if classes else as_text(x[target])
        made = {"inputs": tf.strings.regex_replace(text, r"\s+", " ") if collapse else text, "targets": written}
        return made | {name: x[name] for name in carry}

    return dataset.map(example, num_parallel_calls=tf.data.AUTOTUNE)


def fill(template: str, x: Fields) -> tf.Tensor:
    """The template with the fields that it names in braces."""
    parts = []
    for literal, field, _, _ in string.Formatter().parse(template):
        parts.append(tf.constant(literal))
        if field is not None:
            parts.append(as_text(x[field]))
    return tf.strings.join(parts)


def as_text(value: tf.Tensor) -> tf.Tensor:
    """A scalar as text."""
    return value if value.dtype == tf.string else tf.strings.as_string(value)


def label_text(label: tf.Tensor, classes: Sequence[str], labels: Sequence[str]) -> tf.Tensor:
    """What is written for a label, given by its number or word: one of `labels`, or its number; <unk> for none (T5's `glue`)."""
    numbers = [str(number) for number in range(len(classes))]
    same = tf.equal(as_text(label), tf.constant([*numbers, *classes]))
    written = tf.constant([*(labels or numbers)] * 2)
    return tf.where(tf.reduce_any(same), written[tf.argmax(same)], "<unk>")


# ---------------------------------------------------------------- questions

# T5's `_pad_punctuation` sets ASCII punctuation apart (its first versions: letters with accents, too); ATTEMPT's all but letters,
# digits, marks and underscores.
ASCII_PUNCTUATION = r"([[:punct:]])"
ALL_PUNCTUATION = r"([^_\s\pN\pL\pM])"
SEPARATOR = r" \\n "  # of several texts in one, as it stands in SPoT's code, backslashes and all


def pad_punctuation(text: tf.Tensor, punctuation: str) -> tf.Tensor:
    """Spaces round punctuation; runs of spaces become one."""
    return tf.strings.regex_replace(tf.strings.regex_replace(text, punctuation, r" \1 "), r"\s+", " ")


def questions(dataset: tf.data.Dataset, punctuation: str) -> tf.data.Dataset:
    """Extractive questions of SQuAD or MRQA: `question`, `context`, `answers`, the first `answer` and `id`."""

    def answers_of(x: Fields) -> tf.Tensor:
        return x["answers"]["text"] if isinstance(x["answers"], dict) else x["answers"]

    def example(x: Fields) -> Fields:
        answers = tf.strings.strip(pad_punctuation(answers_of(x), punctuation))  # as the model is taught to write them
        texts = {name: pad_punctuation(x[name], punctuation) for name in ("question", "context")}
        return texts | {"answers": answers, "answer": answers[0], "id": x["qid"] if "qid" in x else x["id"]}

    answered = dataset.filter(lambda x: tf.size(answers_of(x)) > 0)
    return answered.map(example, num_parallel_calls=tf.data.AUTOTUNE)


def record(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """ReCoRD: a copy of the example for each right `answer`; highlights joined to the passage, entities in a list."""

    def copies(x: Fields) -> tf.data.Dataset:
        passage = tf.strings.regex_replace(x["passage"], r"(\.|\?|\!|\"|\')\n@highlight\n", r"\1 ")
        passage = tf.strings.regex_replace(passage, r"\n@highlight\n", ". ")
        made = {"query": x["query"], "passage": passage, "entities": tf.strings.reduce_join(x["entities"], separator=", ")}
        made |= {"answers": x["answers"], "id": _joined(x["idx"], ("passage", "query"))}
        return tf.data.Dataset.from_tensor_slices(x["answers"]).map(lambda answer: made | {"answer": answer})

    return dataset.filter(lambda x: tf.size(x["answers"]) > 0).flat_map(copies)


@seqio.map_over_dataset
def multirc(x: Fields) -> Fields:
    """MultiRC without markup; `group` joins the answers of one question."""

    def plain(text: tf.Tensor) -> tf.Tensor:
        return tf.strings.regex_replace(tf.strings.regex_replace(text, "<br>", " "), "</?b>", "")

    texts = {name: plain(x[name]) for name in ("question", "answer", "paragraph")}
    return texts | {"label": x["label"], "group": _joined(x["idx"], ("paragraph", "question"))}


def _joined(numbers: Fields, names: tuple[str, ...]) -> tf.Tensor:
    return tf.strings.join([as_text(numbers[name]) for name in names], "-")


# ---------------------------------------------------------------- WSC


@seqio.map_over_dataset
def wsc_spans(x: Fields) -> Fields:
    """Marks both spans in the text, `* span *` and `# span #` (T5's `wsc`, ATTEMPT)."""
    text = _mark(x["text"], x["span1_text"], x["span1_index"], "*")
    # Marks round the first span push the second one two words on.
    shift = 2 * tf.cast(x["span1_index"] < x["span2_index"], x["span2_index"].dtype)
    return {"text": _mark(text, x["span2_text"], x["span2_index"] + shift, "#"), "label": x["label"]}


def _mark(text: tf.Tensor, span: tf.Tensor, index: tf.Tensor, mark: str) -> tf.Tensor:
    """`mark span mark` where `span` starts at word number `index`."""
    pattern = tf.strings.join([r"^((?:\S+\s){", as_text(index), r"})(", _literal(span), ")"])
    return tf.strings.regex_replace(text, pattern, rf"\1{mark} \2 {mark}")


@seqio.map_over_dataset
def wsc_pronoun(x: Fields) -> Fields:
    """Marks the pronoun in the text, `*he*`; the target is the noun that is asked about (T5's `wsc_simple`).

    T5 writes out the two texts of `wsc.fixed` whose index does not lead to the bare pronoun. Here the first word from the index
    on that begins with the pronoun is marked, and what follows it in that word is set apart: the same for those two.
    """
    words = tf.strings.split(x["text"], " ")
    pattern = tf.strings.join([r"^(\W*)(", _literal(x["span2_text"]), r")(\W.*|)$"])
    after = tf.range(tf.size(words)) >= tf.cast(x["span2_index"], tf.int32)
    is_pronoun = tf.logical_and(after, tf.strings.regex_full_match(words, pattern))
    marked = tf.strings.strip(tf.strings.regex_replace(words, pattern, r"\1*\2* \3"))
    first = tf.equal(tf.cumsum(tf.cast(is_pronoun, tf.int32)), 1) & is_pronoun
    text = tf.strings.reduce_join(tf.where(first, marked, words), separator=" ")
    return {"text": text, "referent": x["span1_text"], "label": x["label"]}


def _literal(text: tf.Tensor) -> tf.Tensor:
    return tf.strings.regex_replace(text, r"([[:punct:]])", r"\\\1")


def true_only(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The rows with label 1: T5 and Lester et al. (§3) train WSC on right referents only."""
    return dataset.filter(lambda x: tf.equal(as_text(x["label"]), "1"))


# ---------------------------------------------------------------- numbers and generated texts


def similarity(dataset: tf.data.Dataset, step: float = 0.2) -> tf.data.Dataset:
    """STS-B: the label, 0 to 5, as the text `score`, rounded to multiples of `step` (T5's `stsb`)."""
    steps = round(1 / step)

    def example(x: Fields) -> Fields:
        score = tf.round(tf.cast(x["label"], tf.float64) * steps) / steps
        return {**x, "score": tf.strings.as_string(score, precision=1)}

    return dataset.map(example, num_parallel_calls=tf.data.AUTOTUNE)


@seqio.map_over_dataset
def with_references(x: Fields) -> Fields:
    """`answers`: all right texts, `references` where there are any, else the target alone."""
    alone = tf.expand_dims(x["target"], 0)
    return {**x, "answers": tf.cond(tf.size(x["references"]) > 0, lambda: x["references"], lambda: alone)}


def joined(dataset: tf.data.Dataset, field: str) -> tf.data.Dataset:
    """GEM: a list as one text, separated as SPoT's code does it, and all right texts."""
    one_text = dataset.map(lambda x: {**x, field: tf.strings.reduce_join(x[field], separator=SEPARATOR)})
    return with_references(one_text)


@seqio.map_over_dataset
def aligned_summaries(x: Fields) -> Fields:
    """WikiLingua: the English texts of a pair of languages."""
    return {"document": x["source_aligned"]["en"], "target": x["target_aligned"]["en"], "references": x["references"]}


def wiki_lingua(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return with_references(aligned_summaries(dataset))


# ---------------------------------------------------------------- sentiment


def emotions(dataset: tf.data.Dataset, names: Sequence[str]) -> tf.data.Dataset:
    """GoEmotions: `emotions`, the names of all flags that are set, in the order of the alphabet, in one text (SPoT)."""
    ordered = sorted(names)

    def example(x: Fields) -> Fields:
        given = tf.boolean_mask(tf.constant(ordered), tf.stack([x[name] for name in ordered]))
        return {"comment_text": x["comment_text"], "emotions": tf.strings.reduce_join(given, separator=SEPARATOR)}

    return dataset.map(example, num_parallel_calls=tf.data.AUTOTUNE)


@seqio.map_over_dataset
def polarity(x: Fields) -> Fields:
    """Sentiment140: the label of a polarity of 0, 2 or 4."""
    return {"text": x["text"], "label": x["polarity"] // 2}


squad_ascii = functools.partial(questions, punctuation=ASCII_PUNCTUATION)
squad_all = functools.partial(questions, punctuation=ALL_PUNCTUATION)
tenths = functools.partial(similarity, step=0.1)  # ATTEMPT's rounding of STS-B
