"""Extractive questions: SQuAD, MRQA 2019's six in-domain sets and, to test on only, its six out-of-domain sets.

The latter are Lester et al.'s Table 1 (trained on SQuAD): `official_test` is all that they have. ATTEMPT reads its MRQA sets with
the class of SQuAD, whose name is therefore in front of each. It writes the printed list of all answers where a file has a list;
here it is the first answer.
"""

from typing import Any

from tasks import library, preprocessors, reading, splits

QUESTION = "question: {question} context: {context}"
_SCORED: dict[str, Any] = {"target": "answer", "postprocess": "with_answers", "metrics": ("squad",), "carry": ("answers", "id")}
FORMATS = {  # T5 has no name in front of SQuAD
    "t5": library.Format(QUESTION, prepare=preprocessors.squad_ascii, collapse=True, **_SCORED),
    "prompt_tuning": library.Format(QUESTION, prepare=preprocessors.squad_ascii, collapse=True, **_SCORED),
    "attempt": library.Format(f"squad {QUESTION}", prepare=preprocessors.squad_all, **_SCORED),
}
_COLUMNS = {"question": reading.TEXT, "context": reading.TEXT, "answers": reading.TEXTS, "qid": reading.TEXT}
SQUAD_COLUMNS = {"question": reading.TEXT, "context": reading.TEXT, "answers": {"text": reading.TEXTS}, "id": reading.TEXT}


def _in_domain(name: str, tfds: str, train: int, validation: int) -> library.Dataset:
    return library.Dataset(
        name=name,
        tfds=f"mrqa/{tfds}:1.0.0",
        columns=_COLUMNS,
        formats=FORMATS,
        rows={"train": train, "validation": validation},
        protocol=splits.held_out(),
        aliases={"id": "qid"},
    )


def _out_of_domain(name: str, tfds: str, test: int) -> library.Dataset:
    return library.Dataset(
        name=name,
        tfds=f"mrqa/{tfds}:1.0.0",
        columns=_COLUMNS,
        formats={style: FORMATS[style] for style in ("t5", "prompt_tuning")},
        rows={"test": test},
        protocol={"test": splits.Part("test")},
        aliases={"id": "qid"},
    )


DATASETS = library.table_of(
    library.Dataset(
        name="squad",
        tfds="squad/v1.1:3.0.0",
        columns=SQUAD_COLUMNS,
        formats=FORMATS,
        rows={"train": 87_599, "validation": 10_570},
        protocol=splits.held_out(),
    ),
    _in_domain("mrqa_squad", "squad", 86_588, 10_507),
    _in_domain("nq", "natural_questions", 104_071, 12_836),
    _in_domain("hotpotqa", "hotpot_qa", 72_928, 5_901),
    _in_domain("newsqa", "news_qa", 74_160, 4_212),
    _in_domain("searchqa", "search_qa", 117_384, 16_980),
    _in_domain("triviaqa", "trivia_qa", 61_688, 7_785),
    _out_of_domain("textbookqa", "textbook_qa", 1_503),
    _out_of_domain("bioasq", "bio_asq", 1_504),
    _out_of_domain("race", "race", 674),
    _out_of_domain("relation_extraction", "relation_extraction", 2_948),
    _out_of_domain("duorc", "duo_rc", 1_501),
    _out_of_domain("drop", "drop", 1_503),
)

library.register_all(DATASETS)
