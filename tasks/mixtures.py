"""Mixtures of tasks: MPT's six sources, and those of SPoT (Vu et al. 2022), with examples-proportional mixing.

SPoT trains on the datasets' own splits: set DataConfig.train_split to "official_train" with its mixtures. Which datasets its
paper counts to each is not printed in full; members follow its code (`prompt_tuning/spot/data/`), and `docs/tasks.md` says where
one is ours or is missing. Another cap or temperature, or other members, is a mixture of your own:

    mixtures.register("my_mixture", ["mnli_t5", "snli_t5"], cap=10_000, temperature=2.0)
"""

from collections.abc import Iterable

import seqio

from tasks import glue, library, mrqa, nlg, others, splits, superglue

MPT_CAP = 2**18
SPOT_CAP = 2**19

DATASETS: dict[str, library.Dataset] = {**glue.DATASETS, **superglue.DATASETS, **mrqa.DATASETS, **others.DATASETS, **nlg.DATASETS}

MPT_SOURCES = ("mnli", "qnli", "qqp", "sst2", "squad", "record")
SPOT: dict[str, tuple[str, ...]] = {
    "glue": ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "glue_rte"),
    "nli": ("anli_r1", "anli_r2", "anli_r3", "cb", "doc_nli", "mnli", "qnli", "glue_rte", "snli"),
    "paraphrase": ("mrpc", "qqp", "paws", "stsb"),
    "sentiment": ("sst2", "imdb", "yelp_polarity"),
    "mrqa": ("mrqa_squad", "nq", "hotpotqa", "newsqa", "searchqa", "triviaqa"),
    "superglue": ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"),
    "nlg": ("e2e_nlg", "webnlg", "xsum"),
    "summarization": ("cnn_dailymail", "samsum", "xsum"),
}


def examples(dataset: library.Dataset, format_name: str, split: str) -> int:
    """Training examples of a split, `train` or `official_train`, as published."""
    official = dataset.formats[format_name].training_examples or dataset.rows["train"]
    return official if split.startswith(splits.OFFICIAL) else splits.counts(dataset.protocol, dataset.rows)["train"]


def proportional(sizes: Iterable[int], cap: int, temperature: float = 1.0) -> list[float]:
    """Mixing rates min(size, cap)^(1 / temperature) (Raffel et al. 2020, §3.5.2)."""
    if temperature <= 0:
        raise ValueError(f"the temperature of a mixture must be positive, not {temperature}")
    return [float(min(size, cap)) ** (1 / temperature) for size in sizes]


def register(name: str, tasks: Iterable[str], cap: int, temperature: float = 1.0, split: str = "train") -> None:
    """Registers a mixture of tasks of the library, `<dataset>_<format>`, with rates proportional to their training examples."""
    members = []
    for task in tasks:
        format_name = next(
            style for style in ("prompt_tuning", "attempt_published", "attempt", "t5") if task.endswith(f"_{style}")
        )
        members.append((DATASETS[task.removesuffix(f"_{format_name}")], format_name, task))
    rates = proportional((examples(dataset, style, split) for dataset, style, _ in members), cap, temperature)
    seqio.MixtureRegistry.add(name, [(task, rate) for (_, _, task), rate in zip(members, rates, strict=True)])


register("mpt_sources", [f"{name}_attempt" for name in MPT_SOURCES], MPT_CAP)
for _name, _members in SPOT.items():
    register(f"spot_{_name}", [f"{name}_t5" for name in _members], SPOT_CAP, split="official_train")
_all = dict.fromkeys(name for members in SPOT.values() for name in members)
_rates = proportional((examples(DATASETS[name], "t5", "official_train") for name in _all), SPOT_CAP)
seqio.MixtureRegistry.add(
    "spot_all", [*((f"{name}_t5", rate) for name, rate in zip(_all, _rates, strict=True)), ("c4_span_corruption", SPOT_CAP)]
)
