"""`make load-memory`: peak host memory of loading a T5 1.1 large from float32 files, in bfloat16 and on one CPU device.

Writes random weights as a Hugging Face folder and as a T5X checkpoint (3 GB each) and imports the first as ours, loads each in a
process of its own and prints by how much its resident memory rose at most, next to the size of the weights. Linux only;
minutes. `SIZE=small` is quick.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import t5x_reference as t5x

from mpt_jax.checkpoint.backbone import load_backbone
from mpt_jax.checkpoint.export_hf import export_hf
from mpt_jax.config import BackboneConfig, T5Config
from mpt_jax.convert import run_import
from mpt_jax.models.t5 import count_parameters, param_shapes

SIZES = {
    "large": T5Config(32128, 1024, 64, 16, 2816, 24, 24, param_dtype="bfloat16"),
    "small": T5Config(32128, 512, 64, 6, 1024, 8, 8, param_dtype="bfloat16"),
}
KINDS = ("hf", "checkpoint_1100000", "own")
MOST_LEAVES = 4  # of the largest as float32, while a backbone is imported: itself, and its chunks on their way to files
MOST = 1.15  # of the weights' own size, without the process as it was before


def chunks(shape):
    """T5X's choice: the longest axis is halved until a chunk has 64 MiB."""
    shape = list(shape)
    while np.prod(shape) > 2**24:
        longest = int(np.argmax(shape))
        shape[longest] //= 2
    return shape


def write(config, folder):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), param_shapes(config))
    export_hf(params, config, folder / "hf")
    t5x.write_legacy(folder / "checkpoint_1100000", t5x.target_of(params), chunks=chunks)


def status(field):
    """MiB, from /proc: VmRSS is resident now, VmHWM was resident at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def load(config, checkpoint):
    np.asarray(jax.numpy.zeros(8))  # JAX and the shapes of the model are there before anything is measured
    weights = 2 * count_parameters(config) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, began = status("VmRSS"), time.perf_counter()
    backbone = load_backbone(BackboneConfig(str(checkpoint), config, __file__))
    seconds, rise, after = time.perf_counter() - began, status("VmHWM") - before, status("VmRSS") - before
    assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(backbone.params))
    print(
        f"{checkpoint.name}: weights {weights:.0f} MiB, peak {rise:.0f} MiB ({rise / weights:.1%}), after {after:.0f} MiB, "
        f"{seconds:.0f} s, fingerprint {backbone.fingerprint}",
        flush=True,
    )
    if config == SIZES["large"]:  # of a small model, one leaf is a fifth
        assert rise <= MOST * weights, f"more than {MOST:.0%} of the weights"


def convert(config, folder):
    """Imports the Hugging Face folder: how far memory rises is told, too."""
    np.asarray(jax.numpy.zeros(8))
    Path("/proc/self/clear_refs").write_text("5")
    before, began = status("VmRSS"), time.perf_counter()
    run_import(str(folder / "hf"), str(folder / "own"))
    seconds, rise = time.perf_counter() - began, status("VmHWM") - before
    largest = max(leaf.size for leaf in jax.tree.leaves(param_shapes(config))) * 4 / 2**20
    print(f"import: peak {rise:.0f} MiB ({rise / largest:.1f} leaves of {largest:.0f} MiB), {seconds:.0f} s", flush=True)
    if config == SIZES["large"]:
        assert rise <= MOST_LEAVES * largest, f"more than {MOST_LEAVES} of the largest leaf"


def main():
    config = SIZES[os.environ.get("SIZE", "large")]
    if len(sys.argv) == 3:
        {"write": write, "import": convert, "load": load}[sys.argv[1]](config, Path(sys.argv[2]))
        return
    folder = Path(tempfile.mkdtemp())
    try:
        for step in ("write", "import"):
            subprocess.run([sys.executable, __file__, step, str(folder)], check=True)
        for kind in KINDS:
            subprocess.run([sys.executable, __file__, "load", str(folder / kind)], check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
