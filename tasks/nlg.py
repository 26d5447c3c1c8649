"""Generation from data (E2E, WebNLG) and summarisation (XSum, CNN/DailyMail, SAMSum).

T5's and prompt-tuning's format of summaries is `summarize: {article}`, without a name; E2E, WebNLG and SAMSum are written as in
SPoT's code. ATTEMPT has none of them. MPT's E2E and WebNLG formats are not public.
"""

from typing import Any

from tasks import library, preprocessors, reading, splits

_SCORED: dict[str, Any] = {"target": "target", "postprocess": "with_answers", "carry": ("answers",)}
_COLUMNS: dict[str, Any] = {"target": reading.TARGET, "references": reading.TEXTS}
SPOT = "SPoT's format, of TFDS' `gem` version"


def _data_to_text(name: str, field: str, kind: reading.Kind, prepare: library.Preprocessor, **more: Any) -> library.Dataset:
    common: dict[str, Any] = {
        **_SCORED,
        "metrics": ("bleu",),
        "prepare": prepare,
        "training_examples": more.pop("training_examples", 0),
    }
    return library.Dataset(
        name=name,
        columns={field: kind, **_COLUMNS},
        formats={
            "t5": library.Format(f"{more.pop('front')} {{{field}}}", **common),
            "prompt_tuning": library.Format(f"{{{field}}}", **common),
        },
        protocol=splits.own(),
        group=field,
        **more,
    )


def _summaries(
    name: str, tfds: str, document: str, summary: str, rows: tuple[int, int, int], front: str = "", source: str = ""
) -> library.Dataset:
    common: dict[str, Any] = {"target": summary, "metrics": ("rouge",)}
    return library.Dataset(
        name=name,
        tfds=tfds,
        columns={document: reading.TEXT, summary: reading.TARGET},
        formats={
            "t5": library.Format(f"{front}summarize: {{{document}}}", **common),
            "prompt_tuning": library.Format(f"summarize: {{{document}}}", **common),
        },
        rows=dict(zip(("train", "validation", "test"), rows, strict=True)),
        protocol=splits.own(),
        source=source,
    )


DATASETS = library.table_of(
    _data_to_text(
        "e2e_nlg",
        "meaning_representation",
        reading.TEXT,
        preprocessors.with_references,
        front="e2e_nlg",
        tfds="gem/e2e_nlg:1.1.0",
        rows={"train": 42_061, "validation": 4_672, "test": 4_693},
        source=f"{SPOT}, which is cleaned; counts are those of the challenge (a row for each reference)",
        aliases={"human_reference": "target"},
    ),
    _data_to_text(
        "webnlg",
        "input",
        reading.TEXTS,
        preprocessors.webnlg,
        front="web_nlg_en",
        tfds="gem/web_nlg_en:1.1.0",
        rows={"train": 0, "validation": 0, "test": 0},
        training_examples=35_426,
        source=f"{SPOT}; releases differ in size",
        aliases={"mtriple_set": "input", "text": "target"},
    ),
    _summaries("xsum", "xsum:1.1.0", "document", "summary", (204_045, 11_332, 11_334), source="TFDS asks for a manual download"),
    _summaries("cnn_dailymail", "cnn_dailymail:3.4.0", "article", "highlights", (287_113, 13_368, 11_490)),
    _summaries(
        "samsum",
        "samsum:1.0.0",
        "dialogue",
        "summary",
        (14_732, 818, 819),
        front="samsum ",
        source="SPoT's format; TFDS asks for a manual download",
    ),
)

library.register_all(DATASETS)
