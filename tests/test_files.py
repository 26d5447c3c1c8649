"""Files and folders are written whole or not at all, and as readable as any other."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mpt_jax.files import UNFINISHED, filling, replacing, write_text

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_has_the_mode_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "deep" / "text", "a")
        with replacing(tmp_path / "weights") as temporary:
            save_file({"a": np.ones(3)}, temporary)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    for file in (tmp_path / "deep" / "text", tmp_path / "weights"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_that_fails_stays_what_it_was(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "old")

    def fail() -> None:
        with replacing(tmp_path / "text") as temporary:
            temporary.write_text("new")
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        fail()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("text", "old")]


def test_a_folder_is_filled_at_the_end_and_its_last_entry_last(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    (folder / UNFINISHED / "params").mkdir(parents=True)  # of a call that was killed
    with filling(folder, last="card") as inside:
        for name in ("card", "x", "weights"):
            (inside / name).mkdir()
            (inside / name / "file").touch()
        assert [path.name for path in folder.iterdir()] == [UNFINISHED]
    assert sorted(path.name for path in folder.iterdir()) == ["card", "weights", "x"]
    ages = {name: (folder / name).stat().st_ctime_ns for name in ("card", "weights", "x")}  # renaming changes it
    assert max(ages, key=lambda name: ages[name]) == "card"


def test_a_folder_that_fails_is_left_as_it_was(tmp_path: Path) -> None:

    def fail(folder: Path) -> None:
        with filling(folder, last="card") as inside:
            (inside / "card").touch()
            raise ValueError("on purpose")

    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        with pytest.raises(ValueError, match="on purpose"):
            fail(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_disk_that_takes_no_more_is_told(command: str, tmp_path: Path) -> None:
    """Files of at most a quarter of a MiB, as where a disk is full."""
    script = f"ulimit -f 256; exec {sys.executable} -m mpt_jax {command} embedded:mini {tmp_path}/new"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: The model cannot be written to {tmp_path}/new (") and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert not (tmp_path / "new").exists()
