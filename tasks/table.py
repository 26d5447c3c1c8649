"""The tables of `docs/tasks.md`, from what is registered: `python -m tasks.table` writes them into the file."""

from pathlib import Path

from tasks import glue, library, mixtures, mrqa, nlg, others, splits, superglue

DOCUMENT = Path(__file__).parent.parent / "docs" / "tasks.md"
BEGIN, END = "<!-- made by python -m tasks.table -->\n", "<!-- end -->\n"
GROUPS = {"GLUE": glue, "SuperGLUE": superglue, "Questions": mrqa, "Others": others, "Generation": nlg}


def tables() -> str:
    """The tables of the datasets by group and of the mixtures, in Markdown."""
    parts = [f"### {title}\n\n{_table(module.DATASETS)}" for title, module in GROUPS.items()]
    return "\n".join([*parts, f"### Members of the mixtures\n\n{_mixtures()}"])


def _table(datasets: dict[str, library.Dataset]) -> str:
    lines = [
        "| dataset | formats | train / validation / test | official | metrics | TFDS | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for dataset in datasets.values():
        sizes = splits.counts(dataset.protocol, dataset.rows)
        protocol = " / ".join(f"{sizes[name]:,}" if name in sizes else "–" for name in ("train", "validation", "test"))
        official = ", ".join(f"{name} {size:,}" if size else name for name, size in dataset.rows.items())
        metrics = ", ".join(next(iter(dataset.formats.values())).metrics)
        formats = ", ".join(dataset.formats)
        lines.append(
            f"| `{dataset.name}` | {formats} | {protocol} | {official} | {metrics} | `{dataset.tfds}` | {dataset.source} |"
        )
    return "\n".join(lines) + "\n"


def _mixtures() -> str:
    rows = {"mpt_sources": mixtures.MPT_SOURCES} | {f"spot_{name}": members for name, members in mixtures.SPOT.items()}
    return (
        "\n".join(["| mixture | datasets |", "|---|---|", *(f"| `{name}` | {', '.join(rows[name])} |" for name in rows)]) + "\n"
    )


def with_tables(document: str) -> str:
    """The document with its tables made anew."""
    before, _, rest = document.partition(BEGIN)
    return before + BEGIN + "\n" + tables() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
