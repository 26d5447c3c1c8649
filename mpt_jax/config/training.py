"""Configuration of what is trained, by which loss and optimiser, and for how long."""

import dataclasses
import math
import re

from mpt_jax.config.checks import check, choice
from mpt_jax.errors import UserError

PROMPT_METHODS = ("plain", "mpt", "none")
PROMPT_INITS = ("uniform", "uniform_positive", "vocab", "labels", "text", "file")


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
    # Of "labels": task → its words, which may be given to one without class labels (Lester et al.: ReCoRD, WSC); what stands for
    # every other task; with neither, the task's own labels, the different targets of its training split in the alphabet's order.
    init_labels_of: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    init_labels: tuple[str, ...] = ()
    init_text: str = ""
    init_file: str = ""  # a prompt file, a run's folder or what `export` writes; "PATH#TASK", "PATH#NUMBER": one prompt of a bank
    factor_init: str = "ones"  # "ones" (then P_k starts as P*) or "normal"
    factor_scale: float = 0.02  # standard deviation of "normal"; with "ones", of the noise added to each rank
    factor_source: str = "mean"  # with init="file": the mean of the sources' u, v, or one source's by task name

    def validate(self) -> None:
        choice("PromptConfig.method", self.method, PROMPT_METHODS)
        if self.method == "none":
            return
        choice("PromptConfig.init", self.init, PROMPT_INITS)
        choice("PromptConfig.factor_init", self.factor_init, ("ones", "normal"))
        check(self.rank > 0, f"PromptConfig.rank must be positive, not {self.rank}")
        check(
            0 < self.length <= self.max_length,
            f"PromptConfig.length (PROMPT_LENGTH) must be from 1 to PromptConfig.max_length={self.max_length}, not {self.length}",
        )
        for task, words in self.init_labels_of.items():
            check(bool(words), f"PromptConfig.init_labels_of['{task}'] names no word; give one or more, or leave '{task}' out")
        for init, field in (("text", "init_text"), ("file", "init_file")):
            if self.init == init:
                check(bool(getattr(self, field)), f"PromptConfig.init='{init}' needs PromptConfig.{field}")


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
        choice("LossConfig.normalization", self.normalization, ("sum", "mean"))
        if not re.fullmatch(r"none|last|all|-?[1-9]\d*(,-?[1-9]\d*)*", self.hidden_layers):
            raise UserError(
                "LossConfig.hidden_layers must be 'none', 'last', 'all' or layer numbers like '1,-1', "
                f"not '{self.hidden_layers}'."
            )
        check(0 <= self.label_smoothing < 1, f"LossConfig.label_smoothing must be in [0, 1), not {self.label_smoothing}")
        check(self.temperature > 0, f"LossConfig.temperature must be positive, not {self.temperature}")


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
        choice("OptimizerConfig.name", self.name, ("adafactor", "adamw"))
        choice("OptimizerConfig.schedule", self.schedule, ("constant", "linear"))
        check(self.warmup_steps >= 0, f"OptimizerConfig.warmup_steps must not be negative, not {self.warmup_steps}")
        for pattern, rate in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"OptimizerConfig.rules has '{pattern}', which is not a regular expression: {error}") from None
            check(rate >= 0, f"OptimizerConfig.rules gives '{pattern}' the negative learning rate {rate}")


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
        check(self.log_period > 0, f"TrainConfig.log_period must be positive, not {self.log_period}")
        check(self.num_microbatches > 0, f"TrainConfig.num_microbatches must be positive, not {self.num_microbatches}")
        for name in ("eval_period", "max_eval_examples", "patience", "checkpoint_period"):
            check(getattr(self, name) >= 0, f"TrainConfig.{name} must not be negative, not {getattr(self, name)}")
        check(
            self.spike_factor == 0 or 1 < self.spike_factor < math.inf,
            f"TrainConfig.spike_factor must be 0 (no loss is a spike) or above 1, not {self.spike_factor}",
        )
        check(self.spike_window > 0, f"TrainConfig.spike_window must be positive, not {self.spike_window}")
        check(
            not self.patience or self.eval_period > 0,
            f"TrainConfig.patience is {self.patience}, but TrainConfig.eval_period=0 validates nothing; set one of them",
        )
        choice("TrainConfig.on_bad_step", self.on_bad_step, ("stop", "skip"))
        check(self.max_skipped_steps > 0, f"TrainConfig.max_skipped_steps must be positive, not {self.max_skipped_steps}")
        check(self.steps >= 0, f"TrainConfig.steps (TRAIN_STEPS) must not be negative, not {self.steps}")
        check(bool(self.model_dir), "TrainConfig.model_dir (MODEL_DIR) is empty; give the folder for this run's files")
