"""Configuration of whole studies and of grids of them."""

import dataclasses
from typing import Any

from mpt_jax.config.checks import check
from mpt_jax.config.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """Length and speed of one stage of the pipeline; what it does not name comes from the method's own defaults."""

    steps: int
    batch_size: int  # of each stream of a bank; in MPT's source training, of all streams together
    rules: tuple[tuple[str, float], ...]
    optimizer: str = "adafactor"
    warmup_steps: int = -1  # -1 = OptimizerConfig.warmup_steps
    # How its prompts start, as PromptConfig.init, which "" stands for. Of teachers, source training, prompt tuning and what SPoT
    # trains besides; the targets' prompts of MPT and SPoT start from others.
    init: str = ""


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """Which of the teachers' prompts SPoT starts a target from (Vu et al. 2022, sections 3 and 5)."""

    # What ranks the sources: "loss", of their prompts on the target's training examples, before any training there; or a
    # similarity to a prompt that is trained on these examples first: "average_token" or "per_token" (`inspect` prints both).
    by: str = "loss"
    top: int = 1  # of the ranked sources that are used; 0 = all
    # What is made of them. "best": each of them is tried, and the run with the best validation score taken (all of them: SPoT's
    # oracle). "average": the mean of their prompts, weighted by similarity (those below 0 count for nothing) or by exp(-loss).
    # "mixture": a prompt that is trained on their examples and the target's, mixed in equal parts.
    use: str = "best"
    # The trainings that this takes: "embedding", of the prompts that similarities are taken with; "mixture" (batch_size is of
    # each task).
    stages: dict[str, StageConfig] = dataclasses.field(default_factory=dict)
    # Most of the target's training examples that the loss is of, a fixed random part; 0 = all. Each source's prompt reads them.
    max_examples: int = 256

    @property
    def trainings(self) -> tuple[str, ...]:
        """Those of `stages` that it takes."""
        return tuple(name for name, taken in (("embedding", self.by != "loss"), ("mixture", self.use == "mixture")) if taken)


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
    # Target → tasks of the same labels that its runs are scored on besides, without training on them (Lester et al. 2021,
    # section 5). They need the test split alone; their scores are in a table of their own and in no mean.
    zero_shot: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    source_sampling: str = (
        "mpt"  # of MPT's source training: "mpt" (K random tasks a step) or "proportional" (all, by their sizes)
    )
    distill: bool = True
    decompose: bool = True  # False: MPT's sources share one plain prompt, without u and v, and targets start from that
    retrieval: RetrievalConfig = RetrievalConfig()
    test_split: str = "test"
    max_test_examples: int = 0  # per task; 0 = all
    bank_size: int = 0  # most prompts trained side by side on the targets, but all that one run tries; 0 = no limit
    keep_models: bool = False  # keep the weights of model tuning after they are scored, each as large as the backbone
    claim_timeout: int = 300  # seconds without a sign of life after which another `pipeline` call may go on with the study


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A grid of studies: the gin files' `PipelineConfig` with every combination of the axes' values."""

    # What --gin.NAME=VALUE may set → its values: {"PROMPT_LENGTH": (1, 20, 100)}; "gin_file": files that are read besides
    axes: dict[str, tuple[Any, ...]]
    x: str = ""  # the axis along which the report's curves run; "" = the first with numbers
    published: str = ""  # JSON file of published curves to draw beside them (docs/studies/README.md); "" = none
    claim_timeout: int = 300  # seconds without a sign of life after which another job takes over the points of one

    def validate(self) -> None:
        check(bool(self.axes), "SweepConfig.axes is empty; name what is to vary, or run the study with `pipeline`")
        for name, values in self.axes.items():
            check(bool(values), f"SweepConfig.axes['{name}'] has no values; give one or more, or leave the axis out")
            again = [value for n, value in enumerate(values) if value in values[:n]]
            check(not again, f"SweepConfig.axes['{name}'] has {again[:1]} twice; give each value once")
        check(
            not self.x or self.x in self.axes,
            f"SweepConfig.x is '{self.x}', which is no axis; there are {', '.join(self.axes)}",
        )
        check(self.claim_timeout > 0, f"SweepConfig.claim_timeout must be positive, not {self.claim_timeout}")
