"""What a comparison runs: sizes, shapes, numerics, and how often each side takes its turn."""

import argparse
import dataclasses
import os
from typing import Any

from mpt_jax.config import T5Config
from mpt_jax.errors import UserError

# T5 1.1 (t5x examples/t5/t5_1_1), and one for tests: d_model, d_kv, heads, d_ff, layers of each stack, vocabulary.
SIZES = {
    "tiny": (16, 8, 2, 32, 2, 256),
    "small": (512, 64, 6, 1024, 8, 32128),
    "base": (768, 64, 12, 2048, 12, 32128),
    "large": (1024, 64, 16, 2816, 24, 32128),
    "xl": (2048, 64, 32, 5120, 24, 32128),
}
CONTENDERS = ("mpt_jax", "eager", "compile")  # PEFT as it is, and with its model given to torch.compile
WORK = ("train", "decode")
WAYS = ("trimmed", "sorted", "packed")
EMBEDDED = "embedded"


@dataclasses.dataclass(frozen=True)
class Settings:
    """One comparison. Fields that the device decides on have its value in `BY_DEVICE`."""

    device: str = "cpu"  # or "gpu"
    size: str = "small"  # of T5 1.1; several with commas, one after the other
    batch: int = 8  # examples of a step
    inputs: int = 128  # T; with tasks, the most tokens of an input
    prompt: int = 100  # P
    targets: int = 16  # L; with tasks, the most tokens of a target
    dtype: str = "float32"  # of weights and activations, or "bfloat16"; the prompt and its optimiser are float32
    remat: str = "none"  # T5Config.remat of mpt_jax; PEFT keeps everything
    attention: str = "sdpa"  # of transformers, its default, or "eager"
    contenders: str = "mpt_jax,eager"
    work: str = "train,decode"
    rounds: int = 15  # timed; in each, every contender takes one turn
    steps: int = 2  # timed, of a turn (decodings, where it decodes); one more before them is not
    tasks: str = ""  # of `python -m mpt_jax tasks`, with commas: their lengths instead of full rows, one run each; training only
    ways: str = "trimmed,sorted,packed"  # with tasks: how mpt_jax lays out a batch (docs/speed.md)
    batches: int = 16  # with tasks: of a round; they are also what a sorted window sorts
    vocabulary: str = EMBEDDED  # with tasks: a SentencePiece file, or that of the embedded backbone
    threads: int = len(os.sched_getaffinity(0))  # cores of each contender, on a CPU
    host_devices: int = 2  # on a CPU: devices that share mpt_jax's batch, a core each, as `make demo` has it; 1: one of all cores
    apart: bool = False  # start each turn's process anew, for models that do not fit beside one another
    learning_rate: float = 0.03  # AdamW on both sides
    weight_decay: float = 0.01
    seed: int = 0
    output: str = "benchmarks/results"  # folder of the JSON files

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.contenders.split(","))

    @property
    def architecture(self) -> T5Config:
        d_model, d_kv, heads, d_ff, layers, vocabulary = SIZES[self.size]
        numerics: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.dtype, "remat": self.remat}
        return T5Config(vocabulary, d_model, d_kv, heads, d_ff, layers, layers, **numerics)

    def validate(self) -> None:
        """UserError for a value that no run can have."""
        for name, known in (("size", tuple(SIZES)), ("device", tuple(BY_DEVICE)), ("dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} is {getattr(self, name)}, but must be one of {', '.join(known)}.")
        for name, known in (("contenders", CONTENDERS), ("work", WORK), ("ways", WAYS)):
            for part in getattr(self, name).split(","):
                if part not in known:
                    raise UserError(f"--{name} has '{part}', but may have {', '.join(known)} with commas between.")
        for name in ("batch", "inputs", "prompt", "targets", "rounds", "steps", "batches", "threads", "host_devices"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, but must be positive.")
        if self.batch % self.host_devices and self.device == "cpu":
            raise UserError(f"--batch is {self.batch}, which {self.host_devices} devices cannot share; set --host_devices=1.")


BY_DEVICE: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu": {
        "size": "base,large,xl",
        "batch": 32,
        "inputs": 256,
        "dtype": "bfloat16",
        "contenders": ",".join(CONTENDERS),
        "steps": 10,
        "host_devices": 1,
    },
}


def parse(arguments: list[str]) -> list[Settings]:
    """Settings of the command line, one for each size: a flag for each field, `--device` first deciding on the defaults."""
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", default="cpu", choices=tuple(BY_DEVICE))
    chosen = device.parse_known_args(arguments)[0].device
    defaults = Settings(**{"device": chosen} | BY_DEVICE[chosen])
    parser = argparse.ArgumentParser(
        "python -m benchmarks.against_peft", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for field in dataclasses.fields(Settings):
        default = getattr(defaults, field.name)
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true", help="see benchmarks/settings.py")
        else:
            parser.add_argument(f"--{field.name}", type=type(default), default=default, help="see benchmarks/settings.py")
    given = Settings(**vars(parser.parse_args(arguments)))
    return [dataclasses.replace(given, size=size) for size in given.size.split(",")]
