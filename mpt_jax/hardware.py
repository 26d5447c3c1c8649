"""Accelerators that a job may be planned for: what one device holds and how fast it is at best.

TPUs: the "System architecture" tables of Cloud TPU's documentation (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e), whose
"bidirectional bandwidth per chip" is that of four links in a two-dimensional torus and of six in a three-dimensional one; v3's
link is from Table 4 of Jouppi et al. 2023, "TPU v4". GPUs: the makers' data sheets, dense bfloat16 without sparsity.
"""

import difflib
import math
from typing import NamedTuple

from mpt_jax.errors import UserError

GIB = 2**30
# Of the compute peak, what a program is likely to reach; less for small models. Well tuned decoder-only programs in JAX reach
# 46-67 % on v5e and 53-59 % on v4 (MaxText's tables), NVIDIA's T5X 26-37 % on A100 and H100.
OF_TPUS, OF_GPUS = 0.45, 0.3


class Device(NamedTuple):
    """One device as JAX counts them: a core of TPU v3, a chip of TPU v4 and later, a GPU.

    Attributes:
        memory: bytes that a program can use. Of a TPU, what its compiler gives a program.
        flops: peak in bfloat16, per second.
        bandwidth: of the memory, bytes per second.
        efficiency: the part of `flops` that is likely.
        link: of one link to a neighbour of its slice, bytes per second in one direction; not known of GPUs.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    efficiency: float
    link: float = math.inf
    per_chip: int = 1  # devices of a chip


TPUS = {
    "v3": Device("TPU v3 core", 15.48 * GIB, 61.5e12, 450e9, OF_TPUS, 70e9, per_chip=2),
    "v4": Device("TPU v4", 30.75 * GIB, 275e12, 1228e9, OF_TPUS, 50e9),
    "v5e": Device("TPU v5e", 15.75 * GIB, 197e12, 819e9, OF_TPUS, 50e9),
    "v5p": Device("TPU v5p", 95.74 * GIB, 459e12, 2765e9, OF_TPUS, 100e9),
    "v6e": Device("TPU v6e", 31.25 * GIB, 918e12, 1640e9, OF_TPUS, 100e9),
}
# A tenth of a GPU's memory is left to CUDA, cuDNN and fragmentation.
GPUS = {
    "l4": Device("L4 24 GB", 0.9 * 24e9, 121e12, 300e9, OF_GPUS),
    "a100-40gb": Device("A100 40 GB", 0.9 * 40e9, 312e12, 1555e9, OF_GPUS),
    "a100": Device("A100 80 GB", 0.9 * 80e9, 312e12, 2039e9, OF_GPUS),
    "h100": Device("H100 SXM 80 GB", 0.9 * 80e9, 989e12, 3350e9, OF_GPUS),
    "h200": Device("H200 141 GB", 0.9 * 141e9, 989e12, 4800e9, OF_GPUS),
    "b200": Device("B200 180 GB", 0.9 * 180e9, 2250e12, 7700e9, OF_GPUS),
}


class Slice(NamedTuple):
    """Devices that run one program. `topology` is libtpu's name of a TPU slice, "" for GPUs."""

    device: Device
    size: int  # how many
    topology: str


def _example(kind: str) -> str:
    return f"{kind}:2x2x1" if kind in ("v4", "v5p") else f"{kind}:2x4" if kind in TPUS else f"{kind}:8"


def find_slice(name: str) -> Slice:
    """`v5e:2x4`, `v4:2x2x4` … (a TPU slice by its shape in chips) or `h100:8` (GPUs of one kind; `h100` is one).

    Raises:
        UserError: no such device, or a shape that is none.
    """
    kind, _, shape = name.lower().partition(":")
    parts = shape.split("x") if shape else ["1"]
    known = [*TPUS, *GPUS]
    if kind not in known:
        close = difflib.get_close_matches(kind, known, n=1)
        hint = f"Did you mean {_example(close[0])}?" if close else f"There are {', '.join(known)}, such as v5e:2x4 or h100:8."
        raise UserError(f"--topology={name} names no device that is known here. {hint}")
    if not all(part.isdecimal() and int(part) for part in parts) or (kind in TPUS) != (len(parts) > 1):
        raise UserError(f"--topology={name} is no shape of {kind}; write it like {_example(kind)}.")
    device = (TPUS | GPUS)[kind]
    chips = math.prod(int(part) for part in parts)
    return Slice(device, chips * device.per_chip, f"{kind}:{shape}" if kind in TPUS else "")


# What JAX calls a device (`device_kind`), in lower case.
_KINDS = {
    "tpu v3": "v3",
    "tpu v4": "v4",
    "tpu v5 lite": "v5e",
    "tpu v5e": "v5e",
    "tpu v5": "v5p",
    "tpu v5p": "v5p",
    "tpu v6 lite": "v6e",
    "tpu v6e": "v6e",
    "nvidia l4": "l4",
    "nvidia a100-sxm4-40gb": "a100-40gb",
    "nvidia a100-pcie-40gb": "a100-40gb",
    "nvidia a100-sxm4-80gb": "a100",
    "nvidia a100 80gb pcie": "a100",
    "nvidia h100 80gb hbm3": "h100",
    "nvidia h200": "h200",
    "nvidia b200": "b200",
}


def device_of(kind: str) -> Device | None:
    """The device that JAX names so; None for one that is not in the tables (a CPU, an H100 with PCIe)."""
    known = _KINDS.get(kind.lower())
    return (TPUS | GPUS)[known] if known else None
