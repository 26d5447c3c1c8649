"""Where arrays lie, and that it makes no difference to what is computed."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec

from mpt_jax.config import PartitionConfig
from mpt_jax.errors import UserError
from mpt_jax.partitioning import check_batch_size, make_mesh, partition_spec

ROOT = Path(__file__).parent.parent


def test_eight_devices_compute_what_one_does():
    """Batch over 8, and batch over 2 with the model over 4: losses of two steps to 1e-5, whole batches or microbatches, decoded
    tokens exactly."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "eight_devices.py")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_mesh_axis_of_one_device_and_trailing_dimensions_are_not_named():
    """XLA names a result's place in this shortest way; another name for the same place would compile the second step anew."""
    mesh = make_mesh(PartitionConfig(1), jax.devices()[:1])
    assert partition_spec(("vocab", "embed"), (64, 8), mesh) == PartitionSpec()


class FakeMesh:
    shape = {"data": 2, "fsdp": 1, "model": 4}  # noqa: RUF012


@pytest.mark.parametrize(
    "axes, shape, expected",
    [
        (("vocab", "embed"), (32128, 512), ("model",)),
        (("layers", "embed", "mlp"), (8, 512, 1024), (None, None, "model")),
        (("layers", "joined_kv", "embed"), (8, 384, 512), (None, "model")),
        (("heads", "relpos_buckets"), (6, 32), ()),  # 6 heads on 4 devices: whole
        (("heads", "mlp"), (8, 8), ("model",)),  # a mesh axis is used once
        (("embed",), (512,), ()),
    ],
)
def test_logical_axes_become_mesh_axes(axes, shape, expected):
    assert partition_spec(axes, shape, FakeMesh()) == PartitionSpec(*expected)


def test_mistakes():
    with pytest.raises(UserError, match=r"num_partitions is 3, which does not divide the 8 devices"):
        make_mesh(PartitionConfig(3), jax.devices() * 8)
    with pytest.raises(UserError, match=r"\(BATCH_SIZE; .* times its prompts\) is 5, which cannot be shared evenly by 2 devices"):
        check_batch_size(5, FakeMesh())
    with pytest.raises(
        UserError, match=r"is 6, which cannot be cut into .*=2 equal parts that are shared evenly by 2 devices; .* 4,"
    ):
        check_batch_size(6, FakeMesh(), 2)
