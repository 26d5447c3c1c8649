"""The whole configuration of a run, as frozen dataclasses.

gin (`gin_bindings.py`) only fills these; nothing else in the package knows that gin exists. Every field is a number or a
name that a user may want to change; `validate` is called once, before anything is loaded, and names the field that is wrong.
"""

import dataclasses
import difflib
import math
import re
import string
from collections.abc import Callable, Iterable
from typing import Any

from mpt_jax.errors import UserError

DTYPES = ("float32", "bfloat16")
PROMPT_METHODS = ("plain", "mpt", "none")
PROMPT_INITS = ("uniform", "uniform_positive", "vocab", "labels", "text", "file")
OFFICIAL = "official_"  # how the names of a dataset's own splits begin, beside those of a paper's protocol
EXPORT_FORMATS = ("safetensors", "npy", "t5x", "peft", "peft_mpt")
NUMBER_METRICS = ("pearson", "spearman")
TASK_METRICS = ("accuracy", "f1", "f1_macro", "matthews_correlation", *NUMBER_METRICS, "squad", "bleu", "rouge")
TASK_SPLITS = ("train", "validation", "test")
MIN_TEMPERATURE = 1e-4  # logits divided by less may overflow; T5X takes anything below as 0


NUMERICS = ("dropout_rate", "dtype", "param_dtype", "remat")  # of T5Config; the other fields are the architecture


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Architecture and numerics of a T5 (sizes: Raffel et al. 2020; 1.1: t5x `examples/t5/t5_1_1`)."""

    vocab_size: int
    d_model: int
    d_kv: int
    num_heads: int
    d_ff: int
    num_encoder_layers: int
    num_decoder_layers: int
    activation: str = "gated-gelu"  # "gated-gelu" (T5 1.1) or "relu" (T5 1.0)
    tie_embeddings: bool = False  # T5 1.0: logits from the embedding, scaled by d_model**-0.5
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    norm_epsilon: float = 1e-6
    dropout_rate: float = 0.0  # T5X fine-tunes with 0.1
    dtype: str = "float32"  # of activations; norms, softmax and logits are always float32
    param_dtype: str = "float32"  # of the weights in memory; "int8" for the kernels of a frozen model, a byte and a scale each
    remat: str = "none"  # "none", "full" (store only each layer's input) or "dots" (also keep matrix products)

    def validate(self) -> None:
        for name in ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_encoder_layers", "num_decoder_layers"):
            _check(getattr(self, name) > 0, f"T5Config.{name} must be positive, not {getattr(self, name)}")
        _choice("T5Config.activation", self.activation, ("gated-gelu", "relu"))
        _choice("T5Config.dtype", self.dtype, DTYPES)
        _choice("T5Config.param_dtype", self.param_dtype, (*DTYPES, "int8"))
        _choice("T5Config.remat", self.remat, ("none", "full", "dots"))
        _check(0 <= self.dropout_rate < 1, f"T5Config.dropout_rate must be in [0, 1), not {self.dropout_rate}")


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Where the frozen T5 comes from."""

    # "embedded:mini", a T5X checkpoint, a Hugging Face folder, what `import` wrote, a run that tuned a model, or "scratch"
    checkpoint: str
    architecture: T5Config
    vocabulary: str = ""  # SentencePiece file or "bytes" (ByT5); "" takes what lies beside the weights (T5X's have none)
    mimetic_heads: int = 0  # "scratch" only: heads of each attention that start by attending to equal tokens (`mimetic`)


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
        _check(
            prompt.method != "none" or (self.length, self.init, self.rate_factor) == (0, "", 1.0),
            f"{where} with a length, init or rate_factor of its own, but PromptConfig.method='none' trains no prompt; clear them",
        )
        _check(
            0 <= self.length <= prompt.length,
            f"{where} with the length {self.length}, but it must be from 1 to PromptConfig.length (PROMPT_LENGTH) "
            f"{prompt.length}, or 0, which stands for that",
        )
        _check(
            not self.init or "file" not in (self.init, prompt.init),
            f"{where} with the init '{self.init}' beside PromptConfig.init='{prompt.init}', but all of a bank starts from a "
            "file or nothing; clear the stream's",
        )
        dataclasses.replace(prompt, init=self.init or prompt.init).validate()
        _check(0 < self.rate_factor < math.inf, f"{where} with the rate_factor {self.rate_factor}; it must be positive")


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
            _choice(of("metrics"), name, TASK_METRICS)
        _check(bool(self.metrics), f"{of('metrics')} is empty; name at least one of {', '.join(TASK_METRICS)}")
        _check(bool(self.target), f"{of('target')} is empty; name the field that is to be written")
        words = list(self.labels.values())
        _check(len(set(words)) == len(words), f"{of('labels')} gives two values the same word; give each its own")
        _check(all(word.strip() for word in words), f"{of('labels')} has an empty word; give each value one")
        for name in {"f1", "f1_macro"} & set(self.metrics):
            _check(len(words) > 1, f"{of('metrics')} has '{name}', which needs {of('labels')}, two words at least; give them")
        _check(
            not (words and self.target in self.fields()),
            f"{of('inputs')} names '{self.target}', which is to be written and not to be read; take it out",
        )
        of_numbers = set(self.metrics) & set(NUMBER_METRICS)
        _check(
            not of_numbers or (of_numbers == set(self.metrics) and not words),
            f"{of('metrics')} has {' and '.join(NUMBER_METRICS)}, which compare numbers; take no others and no labels beside",
        )
        check_local(of("folder"), self.folder)
        _check(not (self.folder and self.tfds), f"{of('folder')} and tfds are both set; keep the one that has the rows")
        _check(
            not self.tfds or bool(re.fullmatch(r"[\w/.-]+:\d+\.\d+\.\d+", self.tfds)),
            f"{of('tfds')} must have a version, such as 'glue/rte:2.0.0', not '{self.tfds}'",
        )
        for name in self.splits:
            _choice(of("splits"), name, TASK_SPLITS)

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
        _check(
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
        _choice("DataConfig.sampling", self.sampling, ("proportional", "bank", "mpt"))
        _check(self.sort_window > 0, f"DataConfig.sort_window must be positive, not {self.sort_window}")
        _check(
            self.sort_window == 1 or (self.sampling == "proportional" and not self.pack_lengths),
            f"DataConfig.sort_window is {self.sort_window}, but only unpacked batches of sampling='proportional' are sorted; "
            "set it to 1",
        )
        _check(
            all(length > 0 for length in self.trim_lengths), f"DataConfig.trim_lengths must be positive, not {self.trim_lengths}"
        )
        _check(self.batch_size > 0, f"DataConfig.batch_size must be positive, not {self.batch_size}")
        for name, task in self.own_tasks.items():
            _check(
                bool(re.fullmatch(r"[\w.]+", name)),
                f"DataConfig.own_tasks has the name '{name}'; give it one of letters, digits, _ and .",
            )
            task.validate(f"TaskConfig.{{}} of '{name}'".format)
        for name in ("inputs", "targets"):
            _check(
                self.lengths.get(name, 0) > 0,
                f"DataConfig.lengths (TASK_FEATURE_LENGTHS) must give a positive length for '{name}', not {self.lengths}",
            )
        if self.pack_lengths:
            self._check_packing()
        else:
            _check(
                not self.pack_rows,
                f"DataConfig.pack_rows is {self.pack_rows}, but nothing is packed; set DataConfig.pack_lengths or clear it",
            )

    def _check_packing(self) -> None:
        for name in ("inputs", "targets"):
            _check(
                self.pack_lengths.get(name, 0) >= self.lengths[name],
                f"DataConfig.pack_lengths must give the positions of a row for '{name}', at least the {self.lengths[name]} of "
                f"DataConfig.lengths (TASK_FEATURE_LENGTHS), not {self.pack_lengths}",
            )
        _check(min(self.pack_rows, default=1) > 0, f"DataConfig.pack_rows must be positive, not {self.pack_rows}")


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """The prompt: its method, size and start. `none` tunes the whole model."""

    method: str = "plain"
    length: int = 100
    max_length: int = 1000
    rank: int = 1  # of MPT's Hadamard factors U_k V_kᵀ
    per_task: bool = False  # one group per task of the mixture (teachers) instead of one for all (SPoT)
    init: str = "vocab"
    init_scale: float = 0.5  # of "uniform" (±scale, Lester et al.) and "uniform_positive" ([0, scale), as T5X's gin does)
    init_population: int = 5000  # "vocab" and the rest of "labels" draw from the ids below this
    init_labels: tuple[
        str, ...
    ] = ()  # of "labels"; () = those of the stream's own task, the different targets of its training split
    init_text: str = ""
    init_file: str = ""  # a prompt file, a run's folder or what `export` writes; "PATH#TASK" chooses one prompt of a bank
    factor_init: str = "ones"  # "ones" (then P_k starts as P*) or "normal"
    factor_scale: float = 0.02  # standard deviation of "normal"; with "ones", of the noise added to each rank
    factor_source: str = "mean"  # with init="file": the mean of the sources' u, v, or one source's by task name

    def validate(self) -> None:
        _choice("PromptConfig.method", self.method, PROMPT_METHODS)
        if self.method == "none":
            return
        _choice("PromptConfig.init", self.init, PROMPT_INITS)
        _choice("PromptConfig.factor_init", self.factor_init, ("ones", "normal"))
        _check(self.rank > 0, f"PromptConfig.rank must be positive, not {self.rank}")
        _check(
            0 < self.length <= self.max_length,
            f"PromptConfig.length (PROMPT_LENGTH) must be from 1 to PromptConfig.max_length={self.max_length}, not {self.length}",
        )
        for init, field in (("text", "init_text"), ("file", "init_file")):
            if self.init == init:
                _check(bool(getattr(self, field)), f"PromptConfig.init='{init}' needs PromptConfig.{field}")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Cross-entropy over target tokens (T5X `losses.py`) and, with `teachers`, MPT's distillation."""

    z_loss: float = 0.0  # T5X prompt runs: 1e-4
    label_smoothing: float = 0.0
    normalization: str = "sum"  # over tokens: "sum" (T5X) or "mean" (Hugging Face, MPT); always within a group
    teachers: str = ""  # prompt file or run folder with one prompt per source task; "" = no distillation
    distill_weight: float = 0.9  # λ
    temperature: float = 1.0  # τ
    distill_logits: bool = True
    hidden_layers: str = "last"  # hidden states compared: "none", "last", "all" or layers like "1,-1" (1 = lowest, -1 = top)
    distill_encoder: bool = True
    distill_decoder: bool = True

    def validate(self) -> None:
        _choice("LossConfig.normalization", self.normalization, ("sum", "mean"))
        if not re.fullmatch(r"none|last|all|-?[1-9]\d*(,-?[1-9]\d*)*", self.hidden_layers):
            raise UserError(
                "LossConfig.hidden_layers must be 'none', 'last', 'all' or layer numbers like '1,-1', "
                f"not '{self.hidden_layers}'."
            )
        _check(0 <= self.label_smoothing < 1, f"LossConfig.label_smoothing must be in [0, 1), not {self.label_smoothing}")
        _check(self.temperature > 0, f"LossConfig.temperature must be positive, not {self.temperature}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adafactor as T5X runs it (`t5x/adafactor.py`, prompt-tuning's gin) or AdamW as MPT-derived code does."""

    name: str = "adafactor"
    rules: tuple[tuple[str, float], ...] = ((".*", 0.3),)  # (regex over a parameter's whole path, peak learning rate)
    schedule: str = "constant"  # after warm-up: "constant" or "linear" (to 0 at the last step)
    warmup_steps: int = 0
    weight_decay: float = 1e-5  # Adafactor: not multiplied by the learning rate; AdamW: multiplied, as in PyTorch
    clip_norm: float = 0.0  # global norm of each group's gradient; 0 = off
    decay_rate: float = 0.8  # Adafactor's β2 exponent
    decay_offset: int = (
        0  # steps the preconditioner counts as already taken are its negative: T5X prompts on a 1.1M-step model = -1_100_000
    )
    factored: bool = False  # factored second moments, for model tuning
    scale_by_parameter: bool = False  # multiply the step by the parameter's RMS, for model tuning
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def validate(self) -> None:
        _choice("OptimizerConfig.name", self.name, ("adafactor", "adamw"))
        _choice("OptimizerConfig.schedule", self.schedule, ("constant", "linear"))
        for pattern, rate in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"OptimizerConfig.rules has '{pattern}', which is not a regular expression: {error}") from None
            _check(rate >= 0, f"OptimizerConfig.rules gives '{pattern}' the negative learning rate {rate}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the run and what is written on the way."""

    steps: int
    model_dir: str
    seed: int = 0
    log_period: int = 50  # steps; a pipeline's short stages tell their loss more often
    eval_period: int = 500  # 0 = no validation, what was trained last is the result; else the best of each group by its score
    max_eval_examples: int = 0  # of each task's split; 0 = all
    patience: int = 0  # validations in a row without a better score after which a group is trained no more; 0 = to the end
    checkpoint_period: int = 500  # 0 = none: a run that is stopped begins again
    keep_checkpoints: int = 2
    tensorboard: bool = True
    # Parts of a batch that a step computes one after the other (T5X's `trainer.num_microbatches`): the memory of one, the result
    # of the batch, but that each part draws its own dropout masks. BATCH_SIZE is a multiple of this times the devices that share
    # the batch.
    num_microbatches: int = 1  # 1 = the whole batch at once
    # A step whose loss or gradient is not finite never changes a prompt. Nor does one whose loss is a spike: above `spike_factor`
    # times the median of the last `spike_window` good steps, of each group for itself. The run then stops, or goes on without it.
    spike_factor: float = 0.0  # 0 = no loss is a spike
    spike_window: int = 32  # steps; in the first ones nothing is a spike
    on_bad_step: str = "stop"  # or "skip"
    max_skipped_steps: int = 10  # in a row, of one group; one more stops the run

    def validate(self) -> None:
        _check(self.log_period > 0, f"TrainConfig.log_period must be positive, not {self.log_period}")
        _check(self.num_microbatches > 0, f"TrainConfig.num_microbatches must be positive, not {self.num_microbatches}")
        for name in ("eval_period", "max_eval_examples", "patience", "checkpoint_period"):
            _check(getattr(self, name) >= 0, f"TrainConfig.{name} must not be negative, not {getattr(self, name)}")
        _check(
            self.spike_factor == 0 or 1 < self.spike_factor < math.inf,
            f"TrainConfig.spike_factor must be 0 (no loss is a spike) or above 1, not {self.spike_factor}",
        )
        _check(self.spike_window > 0, f"TrainConfig.spike_window must be positive, not {self.spike_window}")
        _check(
            not self.patience or self.eval_period > 0,
            f"TrainConfig.patience is {self.patience}, but TrainConfig.eval_period=0 validates nothing; set one of them",
        )
        _choice("TrainConfig.on_bad_step", self.on_bad_step, ("stop", "skip"))
        _check(self.max_skipped_steps > 0, f"TrainConfig.max_skipped_steps must be positive, not {self.max_skipped_steps}")
        _check(self.steps >= 0, f"TrainConfig.steps (TRAIN_STEPS) must not be negative, not {self.steps}")
        _check(bool(self.model_dir), "TrainConfig.model_dir (MODEL_DIR) is empty; give the folder for this run's files")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How predictions are made in `evaluate`, `infer` and validation.

    "generate"  writes a text: the likeliest token each time, beam search (`num_beams`) or sampling (`temperature`)
    "rank"      chooses the label with the highest log-probability, of all different targets in the task's training split
    """

    method: str = "generate"
    batch_size: int = 64  # examples; of each, all beams are decoded side by side or, with "rank", four labels at a time
    max_length: int = 0  # of "generate": 0 = the task's target length
    num_beams: int = 1
    length_penalty: float = 1.0  # beams are compared by log-probability / length**length_penalty
    temperature: float = 0.0  # 0 = the likeliest token; above, tokens are drawn, at 1 with the model's own probabilities
    top_k: int = 0  # draw from the k likeliest tokens; 0 = from all
    top_p: float = 0.0  # draw from the fewest likeliest tokens with so much probability together; 0 = from all
    seed: int = 0  # of the draws; an example's depend on this and on its number in its split or file
    label_score: str = "sum"  # of "rank": the "sum" of a label's token log-probabilities (T5X) or their "mean"

    def validate(self) -> None:
        _choice("DecodeConfig.method", self.method, ("generate", "rank"))
        _choice("DecodeConfig.label_score", self.label_score, ("sum", "mean"))
        for name in ("batch_size", "num_beams"):
            _check(getattr(self, name) > 0, f"DecodeConfig.{name} must be positive, not {getattr(self, name)}")
        for name in ("max_length", "top_k"):
            _check(getattr(self, name) >= 0, f"DecodeConfig.{name} must not be negative, not {getattr(self, name)}")
        _check(0 <= self.seed < 2**31, f"DecodeConfig.seed must be from 0 to {2**31 - 1}, not {self.seed}")
        _check(0 <= self.top_p <= 1, f"DecodeConfig.top_p must be from 0 to 1, not {self.top_p}")
        _check(
            self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf,
            f"DecodeConfig.temperature must be 0 (the likeliest token) or at least {MIN_TEMPERATURE}, not {self.temperature}",
        )
        self._check_together()

    def _check_together(self) -> None:
        """UserError for a field that is set but has no effect beside the others."""
        ranks, draws = self.method == "rank", self.temperature > 0
        generating = (not ranks, "method='rank' chooses among all labels", "method to 'generate'")
        sampling = (draws, "temperature=0 draws nothing", "temperature to 1, say")
        effects = {
            **dict.fromkeys(("temperature", "num_beams", "max_length"), generating),
            **dict.fromkeys(("top_k", "top_p", "seed"), sampling),
            "label_score": (ranks, "method='generate' scores no labels", "method to 'rank'"),
            "length_penalty": (self.num_beams > 1, "num_beams=1 leaves no beams to compare", "num_beams to 4, say"),
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, (has_effect, why, cure) in effects.items():
            value, default = getattr(self, name), defaults[name]
            _check(
                has_effect or value == default,
                f"DecodeConfig.{name} is {value!r}, but DecodeConfig.{why}; set {name} to {default!r} or {cure}",
            )
        for name, other in (("temperature", "num_beams"), ("top_k", "top_p")):
            values = getattr(self, name), getattr(self, other)
            _check(
                defaults[name] == values[0] or defaults[other] == values[1],
                f"DecodeConfig.{name} is {values[0]} and DecodeConfig.{other} is {values[1]}, but only one can have effect; "
                f"set {name} to {defaults[name]} or {other} to {defaults[other]}",
            )


@dataclasses.dataclass(frozen=True)
class PartitionConfig:
    """The mesh data × fsdp × model: all devices share the batch, but those along "model" compute an example together.

    `num_partitions` cuts every layer's computation (tensor parallelism: results are summed over the link in every layer);
    `fsdp` only cuts where the weights lie, and each layer's are fetched whole before it is computed (T5X's
    `parameter_partitioning_dims=2`; the batch must be large enough to be shared). All devices that are left go to "data".
    """

    num_partitions: int = 1  # size of "model"; 0 = the fewest with which the estimate of `memory.py` fits the devices' memory
    fsdp: int = 1

    def validate(self) -> None:
        _check(self.num_partitions >= 0, f"PartitionConfig.num_partitions must not be negative, not {self.num_partitions}")
        _check(self.fsdp > 0, f"PartitionConfig.fsdp must be positive, not {self.fsdp}")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Where the processes of a job find one another (docs/hosts.md), for whom JAX does not find it out by itself.

    What is not given is looked for in the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
    and then in what a TPU pod, SLURM, Open MPI or Kubernetes tells. It belongs to a call, and config.gin does not keep it.
    """

    coordinator_address: str = ""  # HOST:PORT of process 0
    num_processes: int = 0  # 0 = found out; 1 = this process is alone, whatever its environment says
    process_id: int = -1  # from 0; -1 = found out
    initialization_timeout: int = 300  # seconds for all processes to come together
    barrier_timeout: int = 3600  # seconds that processes wait for one another later, as for process 0 to build token caches
    heartbeat_timeout: int = 100  # seconds after which a process that is not heard of is taken for dead

    def validate(self) -> None:
        for name in ("initialization_timeout", "barrier_timeout", "heartbeat_timeout"):
            _check(getattr(self, name) > 0, f"DistributedConfig.{name} must be positive, not {getattr(self, name)}")
        _check(self.num_processes >= 0, f"DistributedConfig.num_processes must not be negative, not {self.num_processes}")
        _check(self.process_id >= -1, f"DistributedConfig.process_id must be from 0, or -1, not {self.process_id}")


@dataclasses.dataclass(frozen=True)
class InferConfig:
    """Files of the `infer` command: JSONL with `task` and the task's input fields (or `inputs`) in, JSONL out."""

    input_file: str = ""
    output_file: str = ""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What the `export` command writes of the prompts in MODEL_DIR or, where it holds none, in `PromptConfig.init_file`.

    "safetensors"  one prompt file of ours, MPT's factors and all metadata kept
    "npy"          [P,D] float32
    "t5x"          the same in the folders of Google's prompt-tuning, numpy_checkpoints/checkpoint_<step>/
    "peft"         an adapter folder, PROMPT_TUNING
    "peft_mpt"     an adapter folder, MULTITASK_PROMPT_TUNING: one group of MPT as its factors

    All but "safetensors" and "peft_mpt" hold composed prompts. All can be `PromptConfig.init_file`.
    """

    format: str = "safetensors"
    output: str = ""  # the file ("safetensors", "npy") or folder; for a bank in more than one piece, the folder of the pieces
    task: str = ""  # the one task of a bank whose prompt is written; "" = the whole bank

    def validate(self) -> None:
        _choice("ExportConfig.format", self.format, EXPORT_FORMATS)


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """What the `inspect` command looks for, in the prompts that `export` would write."""

    neighbours: int = 5  # nearest pieces of the vocabulary for each token of a prompt (Lester et al. 2021, §7)
    labels: tuple[str, ...] = ()  # class labels that are looked for among them; () = PromptConfig.init_labels
    tokens: int = 20  # of each prompt that are printed; 0 = all. The file has all

    def validate(self) -> None:
        _check(
            self.neighbours >= 2,
            f"InspectConfig.neighbours must be 2 or more, for they are compared with each other, not {self.neighbours}",
        )
        _check(self.tokens >= 0, f"InspectConfig.tokens must be 0 (all) or more, not {self.tokens}")


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What the `bench` command measures, on random tokens that fill every input and target."""

    steps: int = 20  # timed, of training and of decoding, after those that compile and warm up
    warmup_steps: int = 3
    output_file: str = ""  # JSON; "" = print only

    def validate(self) -> None:
        for name in ("steps", "warmup_steps"):
            _check(getattr(self, name) > 0, f"BenchConfig.{name} must be positive, not {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training run, or the evaluation of one."""

    backbone: BackboneConfig
    data: DataConfig
    train: TrainConfig
    prompt: PromptConfig = PromptConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    decode: DecodeConfig = DecodeConfig()
    partition: PartitionConfig = PartitionConfig()
    distributed: DistributedConfig = DistributedConfig()
    infer: InferConfig = InferConfig()
    export: ExportConfig = ExportConfig()
    inspect: InspectConfig = InspectConfig()
    bench: BenchConfig = BenchConfig()

    def validate(self) -> None:
        self.backbone.architecture.validate()
        for part in (
            self.data,
            self.train,
            self.prompt,
            self.loss,
            self.optimizer,
            self.decode,
            self.partition,
            self.distributed,
            self.export,
            self.inspect,
            self.bench,
        ):
            part.validate()
        for field, path in {
            "TrainConfig.model_dir (MODEL_DIR)": self.train.model_dir,
            "DataConfig.cache_dir": self.data.cache_dir,
            "PromptConfig.init_file (INITIAL_PROMPT_PATH)": self.prompt.init_file,
            "LossConfig.teachers (TEACHER_PROMPTS_PATH)": self.loss.teachers,
            "InferConfig.input_file": self.infer.input_file,
            "InferConfig.output_file": self.infer.output_file,
            "ExportConfig.output": self.export.output,
        }.items():
            check_local(field, path)
        _check(
            not (self.prompt.method == "none" and self.backbone.architecture.param_dtype == "int8"),
            "T5Config.param_dtype is 'int8', but PromptConfig.method='none' trains the weights; set it to 'float32'",
        )
        _check(
            not (self.backbone.checkpoint == "scratch" and self.backbone.architecture.param_dtype == "int8"),
            "T5Config.param_dtype is 'int8', but BackboneConfig.checkpoint='scratch' draws weights to train; set it to 'float32'",
        )
        self._check_splits()
        for stream in self.data.streams:
            stream.validate(self.prompt)
        _check(
            not (self.loss.teachers and self.prompt.method == "none"),
            "LossConfig.teachers is set, but PromptConfig.method='none' trains no prompt; clear one of them",
        )
        shorter = [stream.length for stream in self.data.streams if stream.length not in (0, self.prompt_length)]
        _check(
            not (self.data.pack_lengths and shorter),
            f"DataConfig.pack_lengths packs prompts of one length, but DataConfig.streams asks for other ones, {shorter}; "
            "clear one of the two",
        )
        _check(
            not (shorter and (self.optimizer.factored or self.optimizer.scale_by_parameter)),
            f"OptimizerConfig.factored and scale_by_parameter take means over whole prompts, but DataConfig.streams has "
            f"shorter ones, {shorter}, than PromptConfig.length (PROMPT_LENGTH) {self.prompt_length}; set both to False",
        )
        longest = self.prompt_length + self.data.lengths["inputs"]
        _check(
            not self.data.pack_lengths or self.data.pack_lengths["inputs"] >= longest,
            f"DataConfig.pack_lengths gives {self.data.pack_lengths.get('inputs')} positions to a row, but an example may take "
            f"{longest}, {self.prompt_length} of its prompt and {self.data.lengths['inputs']} of its text; set 'inputs' to "
            f"{longest} or more",
        )

    @property
    def prompt_length(self) -> int:
        """P, 0 where the model itself is tuned."""
        return 0 if self.prompt.method == "none" else self.prompt.length

    def _check_splits(self) -> None:
        """UserError for a training split of the dataset's own rows that is validated on rows held out of the same ones."""
        official = [split.startswith(OFFICIAL) for split in (self.data.train_split, self.data.eval_split)]
        _check(
            not self.train.eval_period or official[0] == official[1],
            f"DataConfig.train_split is '{self.data.train_split}' and DataConfig.eval_split '{self.data.eval_split}', which may "
            f"share rows; take both with '{OFFICIAL}' or both without, or set TrainConfig.eval_period to 0",
        )


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """Length and speed of one stage of the pipeline; what it does not name comes from the method's own defaults."""

    steps: int
    batch_size: int  # of each stream of a bank; in MPT's source training, of all streams together
    rules: tuple[tuple[str, float], ...]
    optimizer: str = "adafactor"


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """MPT from end to end: teachers → source training with distillation → every target by every method.

    `base` supplies everything that the stages share (backbone, lengths, prompt length, seed, folder); `few_shot` and
    `full_data` map "mpt", "prompt_tuning", "spot" and "model_tuning" to their stage. A 0 in `k_shots` stands for all examples.
    """

    base: Experiment
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    teacher: StageConfig
    source: StageConfig
    few_shot: dict[str, StageConfig] = dataclasses.field(default_factory=dict)  # method → stage
    full_data: dict[str, StageConfig] = dataclasses.field(default_factory=dict)
    k_shots: tuple[int, ...] = (4, 16, 32)
    seeds: tuple[int, ...] = (0, 1, 2)
    full_seeds: tuple[int, ...] = (0,)
    # Source trainings; the targets' seeds start from them in turn. They count from RANDOM_SEED: with 100, (0, 1) train with the
    # seeds 100 and 101, which the log and results.jsonl name; in runs/source and runs/source-seed101, the latter by its seed.
    source_seeds: tuple[int, ...] = (0,)
    source_sampling: str = (
        "mpt"  # of MPT's source training: "mpt" (K random tasks a step) or "proportional" (all, by their sizes)
    )
    distill: bool = True
    test_split: str = "test"
    max_test_examples: int = 0  # per task; 0 = all
    bank_size: int = 0  # most prompts trained side by side on the targets, where memory is short; 0 = no limit
    keep_models: bool = False  # keep the weights of model tuning after they are scored, each as large as the backbone


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A grid of studies: the gin files' `PipelineConfig` with every combination of the axes' values."""

    # What --gin.NAME=VALUE may set → its values: {"PROMPT_LENGTH": (1, 20, 100)}; "gin_file": files that are read besides
    axes: dict[str, tuple[Any, ...]]
    x: str = ""  # the axis along which the report's curves run; "" = the first with numbers
    published: str = ""  # JSON file of published curves to draw beside them (docs/studies/README.md); "" = none
    claim_timeout: int = 300  # seconds without a sign of life after which another job takes over the points of one

    def validate(self) -> None:
        _check(bool(self.axes), "SweepConfig.axes is empty; name what is to vary, or run the study with `pipeline`")
        for name, values in self.axes.items():
            _check(bool(values), f"SweepConfig.axes['{name}'] has no values; give one or more, or leave the axis out")
            again = [value for n, value in enumerate(values) if value in values[:n]]
            _check(not again, f"SweepConfig.axes['{name}'] has {again[:1]} twice; give each value once")
        _check(
            not self.x or self.x in self.axes,
            f"SweepConfig.x is '{self.x}', which is no axis; there are {', '.join(self.axes)}",
        )
        _check(self.claim_timeout > 0, f"SweepConfig.claim_timeout must be positive, not {self.claim_timeout}")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dicts, lists and scalars, ready for JSON."""
    return dataclasses.asdict(config)


def nearest(name: str, names: Iterable[str]) -> str:
    """' Did you mean X?' for the closest of `names`, or '' when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_local(field: str, path: str) -> None:
    """UserError for the path of a bucket where a local one is needed: only backbones and vocabularies are read from gs://."""
    if re.match(r"[a-z][a-z0-9+.-]*://", path):
        raise UserError(
            f"{field} is '{path}', but must be a local path; copy to and from a bucket with: "
            "gcloud storage rsync --recursive FROM TO (on a TPU: ./run_tpu.sh copy -- FROM TO)."
        )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message + ".")


def _choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{field} must be one of {', '.join(choices)}, not '{value}'.{nearest(str(value), choices)}")
