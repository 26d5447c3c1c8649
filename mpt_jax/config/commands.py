"""Configuration of how answers are made, of devices and processes, and of single commands."""

import dataclasses
import math

from mpt_jax.config.checks import check, choice

EXPORT_FORMATS = ("safetensors", "npy", "t5x", "peft", "peft_mpt")
MIN_TEMPERATURE = 1e-4  # logits divided by less may overflow; T5X takes anything below as 0


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
        choice("DecodeConfig.method", self.method, ("generate", "rank"))
        choice("DecodeConfig.label_score", self.label_score, ("sum", "mean"))
        for name in ("batch_size", "num_beams"):
            check(getattr(self, name) > 0, f"DecodeConfig.{name} must be positive, not {getattr(self, name)}")
        for name in ("max_length", "top_k"):
            check(getattr(self, name) >= 0, f"DecodeConfig.{name} must not be negative, not {getattr(self, name)}")
        check(0 <= self.seed < 2**31, f"DecodeConfig.seed must be from 0 to {2**31 - 1}, not {self.seed}")
        check(0 <= self.top_p <= 1, f"DecodeConfig.top_p must be from 0 to 1, not {self.top_p}")
        check(
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
            check(
                has_effect or value == default,
                f"DecodeConfig.{name} is {value!r}, but DecodeConfig.{why}; set {name} to {default!r} or {cure}",
            )
        for name, other in (("temperature", "num_beams"), ("top_k", "top_p")):
            values = getattr(self, name), getattr(self, other)
            check(
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

    num_partitions: int = 1  # size of "model"; 0 = the fewest with which the estimate of `memory.py` fits 9/10 of the memory
    fsdp: int = 1

    def validate(self) -> None:
        check(self.num_partitions >= 0, f"PartitionConfig.num_partitions must not be negative, not {self.num_partitions}")
        check(self.fsdp > 0, f"PartitionConfig.fsdp must be positive, not {self.fsdp}")


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
            check(getattr(self, name) > 0, f"DistributedConfig.{name} must be positive, not {getattr(self, name)}")
        check(self.num_processes >= 0, f"DistributedConfig.num_processes must not be negative, not {self.num_processes}")
        check(self.process_id >= -1, f"DistributedConfig.process_id must be from 0, or -1, not {self.process_id}")


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
    task: str = ""  # the one task of a bank whose prompt is written, or the number of a prompt; "" = the whole bank

    def validate(self) -> None:
        choice("ExportConfig.format", self.format, EXPORT_FORMATS)


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """What the `inspect` command looks for, in the prompts that `export` would write."""

    neighbours: int = 5  # nearest pieces of the vocabulary for each token of a prompt (Lester et al. 2021, §7)
    labels: tuple[str, ...] = ()  # class labels that are looked for among them; () = those that prompts start from
    tokens: int = 20  # of each prompt that are printed; 0 = all. The file has all

    def validate(self) -> None:
        check(
            self.neighbours >= 2,
            f"InspectConfig.neighbours must be 2 or more, for they are compared with each other, not {self.neighbours}",
        )
        check(self.tokens >= 0, f"InspectConfig.tokens must be 0 (all) or more, not {self.tokens}")


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What the `bench` command measures, on random tokens that fill every input and target."""

    steps: int = 20  # timed, of training and of decoding, after those that compile and warm up
    warmup_steps: int = 3
    output_file: str = ""  # JSON; "" = print only

    def validate(self) -> None:
        for name in ("steps", "warmup_steps"):
            check(getattr(self, name) > 0, f"BenchConfig.{name} must be positive, not {getattr(self, name)}")
