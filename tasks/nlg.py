"""Generation: from data (E2E, WebNLG, the others of GEM's that SPoT trains on) and summaries.

SPoT's code (`prompt_tuning/spot/data/gem.py`, `summarization.py`) writes the dataset's name in front, which is the format `_t5`
here where T5 has no such task; where T5 has one (`summarize: {article}`, without a name), SPoT's is `_spot`. Prompt tuning's is
without a name. ATTEMPT has none of them. MPT's E2E and WebNLG formats are not public.
"""

import functools
from typing import Any

from tasks import library, preprocessors, reading, splits

_COLUMNS: dict[str, Any] = {"target": reading.TARGET, "references": reading.TEXTS}
GEM = "SPoT's format, of TFDS' `gem` version"


def _gem(
    name: str,
    field: str,
    rows: dict[str, int],
    *,
    kind: reading.Kind = reading.TEXT,
    columns: reading.Columns | None = None,
    tfds: str = "",
    front: str = "",
    inputs: str = "",
    prepare: library.Preprocessor = preprocessors.with_references,
    metrics: tuple[str, ...] = ("bleu",),
    training_examples: int = 0,
    protocol: splits.Protocol | None = None,
    **more: Any,
) -> library.Dataset:
    """A dataset of GEM: rows with one target to train on, and all right texts in `references` to test on.

    Args:
      field: what the text is made of; of the kind `kind`, unless `columns` has all fields.
      front: the name in front in SPoT's format; default `name`, which is TFDS' too.
      inputs: the template without the name; default the field alone.
    """
    template = inputs or f"{{{field}}}"
    common: dict[str, Any] = {
        "target": "target",
        "postprocess": "with_answers",
        "carry": ("answers",),
        "metrics": metrics,
        "prepare": prepare,
        "training_examples": training_examples,
    }
    return library.Dataset(
        name=name,
        tfds=f"gem/{tfds or name}:1.1.0",
        columns=columns or {field: kind, **_COLUMNS},
        formats={
            "t5": library.Format(f"{front or name} {template}", **common),
            "prompt_tuning": library.Format(template, **common),
        },
        rows=rows,
        protocol=protocol or splits.own(),
        source=more.pop("source", GEM),
        **more,
    )


def _summaries(
    name: str, tfds: str, document: str, summary: str, rows: dict[str, int], spot: str = "", source: str = ""
) -> library.Dataset:
    """A dataset of summaries; `spot` is the format with SPoT's text, "" for none."""
    common: dict[str, Any] = {"target": summary, "metrics": ("rouge",)}
    plain = f"summarize: {{{document}}}"
    formats = {"t5": plain, "prompt_tuning": plain} | ({spot: f"{name} {plain}"} if spot else {})
    return library.Dataset(
        name=name,
        tfds=tfds,
        columns={document: reading.TEXT, summary: reading.TARGET},
        formats={style: library.Format(text, **common) for style, text in formats.items()},
        rows=rows,
        protocol=splits.own() if "validation" in rows else splits.held_out(test="test"),
        source=source,
    )


def _sizes(train: int, validation: int, test: int) -> dict[str, int]:
    return {"train": train, "validation": validation, "test": test}


MANUAL = "TFDS asks for a manual download"
DATASETS = library.table_of(
    _gem(
        "e2e_nlg",
        "meaning_representation",
        _sizes(33_525, 4_299, 4_693),
        group="meaning_representation",
        source=f"{GEM}, which is the cleaned one (Dušek et al. 2019); the challenge's own has 42,061 / 4,672 / 4,693 rows",
        aliases={"human_reference": "target"},
    ),
    _gem(
        "webnlg",
        "input",
        _sizes(0, 0, 0),
        kind=reading.TEXTS,
        tfds="web_nlg_en",
        front="web_nlg_en",
        prepare=functools.partial(preprocessors.joined, field="input"),
        training_examples=35_426,
        group="input",
        source=f"{GEM}; releases differ in size",
        aliases={"mtriple_set": "input", "text": "target"},
    ),
    _gem(
        "common_gen",
        "concepts",
        {"train": 67_389, "validation": 993},
        kind=reading.TEXTS,
        prepare=functools.partial(preprocessors.joined, field="concepts"),
        protocol=splits.held_out(),
        source=f"{GEM}; its test split has no references; 1,000 training rows are held out, by ATTEMPT's rule",
    ),
    _gem(
        "dart",
        "tripleset",
        _sizes(62_659, 2_768, 5_097),
        kind=reading.TEXTS,
        prepare=functools.partial(preprocessors.joined, field="tripleset"),
    ),
    _gem(
        "schema_guided_dialog",
        "context",
        _sizes(164_982, 10_000, 10_000),
        columns={"prompt": reading.TEXT, "context": reading.TEXTS, **_COLUMNS},
        inputs="prompt: {prompt} context: {context}",
        prepare=functools.partial(preprocessors.joined, field="context"),
    ),
    _gem(
        "wiki_auto",
        "source",
        {"train": 483_801, "validation": 20_000, "test_asset": 359, "test_turk": 359},
        tfds="wiki_auto_asset_turk",
        front="wiki_auto_asset_turk",
        inputs="simplify: {source}",
        protocol=splits.own(test="test_asset"),
    ),
    _gem(
        "gem_xsum",
        "document",
        _sizes(23_206, 1_117, 1_166),
        tfds="xsum",
        front="xsum",
        inputs="summarize: {document}",
        metrics=("rouge",),
        source=f"{GEM}, a part of `xsum`",
    ),
    _gem(
        "wiki_lingua",
        "document",
        _sizes(99_020, 13_823, 28_614),
        columns={
            "source_aligned": {"en": reading.TEXT},
            "target_aligned": {"en": reading.TARGET},
            "references": reading.TEXTS,
        },
        tfds="wiki_lingua_english_en",
        front="wiki_lingua_english_en",
        inputs="summarize: {document}",
        prepare=preprocessors.wiki_lingua,
        metrics=("rouge",),
    ),
    _summaries("xsum", "xsum:1.1.0", "document", "summary", _sizes(204_045, 11_332, 11_334), source=MANUAL),
    _summaries("cnn_dailymail", "cnn_dailymail:3.4.0", "article", "highlights", _sizes(287_113, 13_368, 11_490), spot="spot"),
    _summaries(
        "samsum", "samsum:1.0.0", "dialogue", "summary", _sizes(14_732, 818, 819), "t5", source=f"SPoT's format; {MANUAL}"
    ),
    _summaries("aeslc", "aeslc:1.0.0", "email_body", "subject_line", _sizes(14_436, 1_960, 1_906), "t5", "SPoT's format"),
    _summaries(
        "billsum",
        "billsum:3.0.0",
        "text",
        "summary",
        {"train": 18_949, "test": 3_269},
        "t5",
        "SPoT's format; without a validation split, 1,000 training rows are held out",
    ),
    _summaries("gigaword", "gigaword:1.2.0", "document", "summary", _sizes(3_803_957, 189_651, 1_951), "t5", "SPoT's format"),
    _summaries("multi_news", "multi_news:2.1.0", "document", "summary", _sizes(44_972, 5_622, 5_622), "t5", "SPoT's format"),
    _summaries(
        "newsroom",
        "newsroom:1.0.0",
        "text",
        "summary",
        _sizes(995_041, 108_837, 108_862),
        "t5",
        f"SPoT's format; {MANUAL}",
    ),
)

library.register_all(DATASETS)
