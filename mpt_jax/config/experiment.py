"""The configuration of one run."""

import dataclasses

from mpt_jax.config.checks import check, check_local
from mpt_jax.config.commands import (
    BenchConfig,
    DecodeConfig,
    DistributedConfig,
    ExportConfig,
    InferConfig,
    InspectConfig,
    PartitionConfig,
)
from mpt_jax.config.data import OFFICIAL, DataConfig
from mpt_jax.config.model import BackboneConfig
from mpt_jax.config.training import LossConfig, OptimizerConfig, PromptConfig, TrainConfig


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
        check(
            not (self.prompt.method == "none" and self.backbone.architecture.param_dtype == "int8"),
            "T5Config.param_dtype is 'int8', but PromptConfig.method='none' trains the weights; set it to 'float32'",
        )
        check(
            not (self.backbone.checkpoint == "scratch" and self.backbone.architecture.param_dtype == "int8"),
            "T5Config.param_dtype is 'int8', but BackboneConfig.checkpoint='scratch' draws weights to train; set it to 'float32'",
        )
        self._check_splits()
        for stream in self.data.streams:
            stream.validate(self.prompt)
        check(
            not (self.loss.teachers and self.prompt.method == "none"),
            "LossConfig.teachers is set, but PromptConfig.method='none' trains no prompt; clear one of them",
        )
        shorter = [stream.length for stream in self.data.streams if stream.length not in (0, self.prompt_length)]
        check(
            not (self.data.pack_lengths and shorter),
            f"DataConfig.pack_lengths packs prompts of one length, but DataConfig.streams asks for other ones, {shorter}; "
            "clear one of the two",
        )
        check(
            not (shorter and (self.optimizer.factored or self.optimizer.scale_by_parameter)),
            f"OptimizerConfig.factored and scale_by_parameter take means over whole prompts, but DataConfig.streams has "
            f"shorter ones, {shorter}, than PromptConfig.length (PROMPT_LENGTH) {self.prompt_length}; set both to False",
        )
        longest = self.prompt_length + self.data.lengths["inputs"]
        check(
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
        check(
            not self.train.eval_period or official[0] == official[1],
            f"DataConfig.train_split is '{self.data.train_split}' and DataConfig.eval_split '{self.data.eval_split}', which may "
            f"share rows; take both with '{OFFICIAL}' or both without, or set TrainConfig.eval_period to 0",
        )
