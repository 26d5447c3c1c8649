"""Mixtures of tasks: MPT's six sources, and those of SPoT (Vu et al. 2022), with examples-proportional mixing.

SPoT trains on the datasets' own splits: set DataConfig.train_split to "official_train" with its mixtures, and eval_split to
"official_validation", or TrainConfig.eval_period to 0 where a member has none (imdb, sentiment140, yelp_polarity, billsum, C4).
Which datasets its paper counts to each is not printed in full; members follow its code (`prompt_tuning/spot/data/`), and
`docs/tasks.md` says where one is ours or is missing. Another cap or temperature, or other members, is a mixture of your own:

    mixtures.register("my_mixture", ["mnli_t5", "snli_t5"], cap=10_000, temperature=2.0)
"""

from collections.abc import Iterable

import seqio

from mpt_jax.config import OFFICIAL, nearest
from mpt_jax.errors import UserError
from tasks import glue, library, mrqa, nlg, others, splits, superglue

MPT_CAP = 2**18
SPOT_CAP = 2**19

DATASETS: dict[str, library.Dataset] = {**glue.DATASETS, **superglue.DATASETS, **mrqa.DATASETS, **others.DATASETS, **nlg.DATASETS}

MPT_SOURCES = ("mnli", "qnli", "qqp", "sst2", "squad", "record")
SPOT: dict[str, tuple[str, ...]] = {
    "glue": ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "glue_rte"),
    "nli": ("anli_r1", "anli_r2", "anli_r3", "cb", "doc_nli", "mnli", "qnli", "glue_rte", "snli"),
    "paraphrase": ("mrpc", "qqp", "paws", "stsb"),
    "sentiment": ("goemotions", "imdb", "sentiment140", "yelp_polarity"),
    "mrqa": ("mrqa_squad", "nq", "hotpotqa", "newsqa", "searchqa", "triviaqa"),
    "superglue": ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"),
    "nlg": ("common_gen", "dart", "e2e_nlg", "schema_guided_dialog", "webnlg", "wiki_auto", "gem_xsum", "wiki_lingua"),
    "summarization": (
        *("aeslc", "billsum", "cnn_dailymail", "gigaword", "multi_news", "newsroom", "samsum", "gem_xsum", "wiki_lingua"),
    ),
}


def spot_task(name: str) -> str:
    """The task of a dataset in SPoT's format, which is mostly T5's."""
    return f"{name}_spot" if "spot" in DATASETS[name].formats else f"{name}_t5"


def examples(dataset: library.Dataset, format_name: str, split: str) -> int:
    """Training examples of a split, `train` or `official_train`, as published.

    Where examples are not rows (ReCoRD has one for each answer), `train` is taken to have as many for a row as the whole.
    """
    rows = dataset.rows["train"]
    official = dataset.formats[format_name].training_examples or rows
    if split.startswith(OFFICIAL):
        return official
    return splits.counts(dataset.protocol, dataset.rows)["train"] * official // rows


def proportional(sizes: Iterable[int], cap: int, temperature: float = 1.0) -> list[float]:
    """Mixing rates min(size, cap)^(1 / temperature) (Raffel et al. 2020, §3.5.2)."""
    if temperature <= 0:
        raise ValueError(f"the temperature of a mixture must be positive, not {temperature}")
    return [float(min(size, cap)) ** (1 / temperature) for size in sizes]


def register(name: str, tasks: Iterable[str], cap: int, temperature: float = 1.0, split: str = "train") -> None:
    """Registers a mixture of tasks of the library with rates proportional to their training examples.

    Raises:
      UserError: a task that the library has not registered, or whose number of training examples is not known.
    """
    members = []
    for task in tasks:
        if task not in library.REGISTERED:
            raise UserError(f"The mixture '{name}' names '{task}', which the library has not.{nearest(task, library.REGISTERED)}")
        dataset, format_name = library.REGISTERED[task]
        official = dataset.formats[format_name].training_examples and split.startswith(OFFICIAL)
        if not (official or dataset.rows.get("train")):
            raise UserError(
                f"The mixture '{name}' names '{task}', of which no number of training examples is known; register it with "
                "seqio.MixtureRegistry.add and rates of your own."
            )
        members.append((dataset, format_name, task))
    rates = proportional((examples(dataset, style, split) for dataset, style, _ in members), cap, temperature)
    seqio.MixtureRegistry.add(name, [(task, rate) for (_, _, task), rate in zip(members, rates, strict=True)])


register("mpt_sources", [f"{name}_attempt" for name in MPT_SOURCES], MPT_CAP)
for _name, _members in SPOT.items():
    register(f"spot_{_name}", map(spot_task, _members), SPOT_CAP, split="official_train")
_all = dict.fromkeys(name for members in SPOT.values() for name in members)
_rates = proportional((examples(DATASETS[name], "t5", "official_train") for name in _all), SPOT_CAP)
seqio.MixtureRegistry.add(
    "spot_all", [*((spot_task(name), rate) for name, rate in zip(_all, _rates, strict=True)), ("c4_span_corruption", SPOT_CAP)]
)
