"""Configuration of the examples: streams, tasks of one's own, lengths, batches."""

import dataclasses
import math
import re
import string
from collections.abc import Callable

from mpt_jax.config.checks import check, check_local, choice
from mpt_jax.config.training import PromptConfig
from mpt_jax.errors import UserError

OFFICIAL = "official_"  # how the names of a dataset's own splits begin, beside those of a paper's protocol
NUMBER_METRICS = ("pearson", "spearman")
TASK_METRICS = ("accuracy", "f1", "f1_macro", "matthews_correlation", *NUMBER_METRICS, "squad", "bleu", "rouge")
TASK_SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """One stream of training examples and the prompt that it trains.

    A stream's number is its `task_id`. Streams of one `group` share a plain prompt, or MPT's shared prompt P*;
    MPT's u, v are always the stream's own. Groups are independent of one another, and may differ in the last three fields.
    """

    task: str
    group: int = 0
    k_shot: int = 0  # 0 = all training examples; k = k examples of each class (of the whole set where there are no classes)
    seed: int = 0  # chooses the k examples, their order and the prompt's initialisation
    length: int = 0  # of the prompt, at most PromptConfig.length, which 0 stands for; a shorter one is masked on the left
    init: str = ""  # "" = PromptConfig.init
    rate_factor: float = 1.0  # on the learning rates of OptimizerConfig.rules

    def validate(self, prompt: "PromptConfig") -> None:
        where = f"DataConfig.streams has a stream of '{self.task}'"
        check(
            prompt.method != "none" or (self.length, self.init, self.rate_factor) == (0, "", 1.0),
            f"{where} with a length, init or rate_factor of its own, but PromptConfig.method='none' trains no prompt; clear them",
        )
        check(
            0 <= self.length <= prompt.length,
            f"{where} with the length {self.length}, but it must be from 1 to PromptConfig.length (PROMPT_LENGTH) "
            f"{prompt.length}, or 0, which stands for that",
        )
        check(
            not self.init or "file" not in (self.init, prompt.init),
            f"{where} with the init '{self.init}' beside PromptConfig.init='{prompt.init}', but all of a bank starts from a "
            "file or nothing; clear the stream's",
        )
        dataclasses.replace(prompt, init=self.init or prompt.init).validate()
        check(0 < self.rate_factor < math.inf, f"{where} with the rate_factor {self.rate_factor}; it must be positive")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A task of your own: where its rows are, how a row becomes text, and how answers are scored (docs/tasks.md).

    Rows are those of a folder of train.jsonl, validation.jsonl and, if there is one, test.jsonl (or .tsv), or of a TFDS dataset.
    """

    inputs: str  # a template with the fields of a row in braces: "premise: {premise} hypothesis: {hypothesis}"
    target: str = "label"  # the field that is to be written
    labels: dict[str, str] = dataclasses.field(default_factory=dict)  # the word for each value of `target`; {} = as it is
    metrics: tuple[str, ...] = ("accuracy",)  # of TASK_METRICS; "f1" takes the second of `labels` for the positive one
    folder: str = ""  # "" = the folder of the task's name in the one that MPT_JAX_DATA names
    tfds: str = ""  # TFDS' name, "glue/rte:2.0.0", instead of a folder
    # {} = train, validation and test, if they are there; else these alone, by the names of the files or of TFDS' splits:
    # {"train": "train[:90%]", "validation": "train[90%:]", "test": "validation"}
    splits: dict[str, str] = dataclasses.field(default_factory=dict)

    def validate(self, of: Callable[[str], str] = lambda field: f"TaskConfig.{field}") -> None:
        """UserError for a field with a value that means nothing; `of` is how its name is told."""
        self._check_template(of)
        for name in self.metrics:
            choice(of("metrics"), name, TASK_METRICS)
        check(bool(self.metrics), f"{of('metrics')} is empty; name at least one of {', '.join(TASK_METRICS)}")
        check(bool(self.target), f"{of('target')} is empty; name the field that is to be written")
        words = list(self.labels.values())
        check(len(set(words)) == len(words), f"{of('labels')} gives two values the same word; give each its own")
        check(all(word.strip() for word in words), f"{of('labels')} has an empty word; give each value one")
        for name in {"f1", "f1_macro"} & set(self.metrics):
            check(len(words) > 1, f"{of('metrics')} has '{name}', which needs {of('labels')}, two words at least; give them")
        check(
            not (words and self.target in self.fields()),
            f"{of('inputs')} names '{self.target}', which is to be written and not to be read; take it out",
        )
        of_numbers = set(self.metrics) & set(NUMBER_METRICS)
        check(
            not of_numbers or (of_numbers == set(self.metrics) and not words),
            f"{of('metrics')} has {' and '.join(NUMBER_METRICS)}, which compare numbers; take no others and no labels beside",
        )
        check_local(of("folder"), self.folder)
        check(not (self.folder and self.tfds), f"{of('folder')} and tfds are both set; keep the one that has the rows")
        check(
            not self.tfds or bool(re.fullmatch(r"[\w/.-]+:\d+\.\d+\.\d+", self.tfds)),
            f"{of('tfds')} must have a version, such as 'glue/rte:2.0.0', not '{self.tfds}'",
        )
        for name in self.splits:
            choice(of("splits"), name, TASK_SPLITS)

    def fields(self) -> list[str]:
        """The fields that `inputs` names. ValueError where its braces do not match."""
        return list(dict.fromkeys(field for _, field, _, _ in string.Formatter().parse(self.inputs) if field is not None))

    def _check_template(self, of: Callable[[str], str]) -> None:
        try:
            fields = self.fields()
        except ValueError as error:
            raise UserError(
                f"{of('inputs')} is not a template ({error}); write fields in braces, braces themselves twice."
            ) from None
        check(
            bool(fields) and "" not in fields,
            f"{of('inputs')} must name fields in braces, not {self.inputs!r}; write {{text}}, for instance",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on. `mixture` is a registered seqio task or mixture; `streams` overrides it for banks."""

    mixture: str
    lengths: dict[str, int]  # {"inputs": T, "targets": L}
    batch_size: int  # examples per step, over all streams and devices
    streams: tuple[StreamConfig, ...] = ()
    task_modules: tuple[str, ...] = ("tasks",)  # imported to register tasks with seqio
    own_tasks: dict[str, TaskConfig] = dataclasses.field(default_factory=dict)  # by name; registered beside those of the modules
    tfds_data_dir: str = ""  # where TFDS finds and puts its datasets, also gs://…; "" = TFDS_DATA_DIR, else ~/tensorflow_datasets
    train_split: str = "train"
    eval_split: str = "validation"
    cache_dir: str = "~/.cache/mpt_jax"
    sampling: str = "proportional"  # "proportional" (seqio's rates), "bank" (equal shares) or "mpt" (K random tasks)
    with_replacement: bool = False  # of "mpt" sampling's K tasks, as the published code draws them
    trim_lengths: tuple[
        int, ...
    ] = ()  # shorter input lengths that a batch is trimmed to where its examples fit; each is compiled
    sort_window: int = 1  # "proportional": the examples of so many batches are sorted by length into them, so that trimming pays
    # Several examples, each with its own prompt, share a row: positions {"inputs": S, "targets": L} of an encoder's and a
    # decoder's row, prompts included; {} = one row each. The steps are those of unpacked training, with fewer positions; but
    # dropout (one mask for all positions of a row, as T5X has it) drops alike for the examples of a row. Nothing is trimmed then.
    pack_lengths: dict[str, int] = dataclasses.field(default_factory=dict)
    pack_rows: tuple[int, ...] = ()  # numbers of rows that a packed batch is padded up to, each is compiled; () = by eighths
    seed: int = 0

    def validate(self) -> None:
        choice("DataConfig.sampling", self.sampling, ("proportional", "bank", "mpt"))
        check(self.sort_window > 0, f"DataConfig.sort_window must be positive, not {self.sort_window}")
        check(
            self.sort_window == 1 or (self.sampling == "proportional" and not self.pack_lengths),
            f"DataConfig.sort_window is {self.sort_window}, but only unpacked batches of sampling='proportional' are sorted; "
            "set it to 1",
        )
        check(
            all(length > 0 for length in self.trim_lengths), f"DataConfig.trim_lengths must be positive, not {self.trim_lengths}"
        )
        check(self.batch_size > 0, f"DataConfig.batch_size must be positive, not {self.batch_size}")
        for name, task in self.own_tasks.items():
            check(
                bool(re.fullmatch(r"[\w.]+", name)),
                f"DataConfig.own_tasks has the name '{name}'; give it one of letters, digits, _ and .",
            )
            task.validate(f"TaskConfig.{{}} of '{name}'".format)
        for name in ("inputs", "targets"):
            check(
                self.lengths.get(name, 0) > 0,
                f"DataConfig.lengths (TASK_FEATURE_LENGTHS) must give a positive length for '{name}', not {self.lengths}",
            )
        if self.pack_lengths:
            self._check_packing()
        else:
            check(
                not self.pack_rows,
                f"DataConfig.pack_rows is {self.pack_rows}, but nothing is packed; set DataConfig.pack_lengths or clear it",
            )

    def _check_packing(self) -> None:
        for name in ("inputs", "targets"):
            check(
                self.pack_lengths.get(name, 0) >= self.lengths[name],
                f"DataConfig.pack_lengths must give the positions of a row for '{name}', at least the {self.lengths[name]} of "
                f"DataConfig.lengths (TASK_FEATURE_LENGTHS), not {self.pack_lengths}",
            )
        check(min(self.pack_rows, default=1) > 0, f"DataConfig.pack_rows must be positive, not {self.pack_rows}")
