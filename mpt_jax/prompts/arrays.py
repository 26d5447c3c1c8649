"""The files that prompts lie in: safetensors, NumPy arrays, and prompt-tuning's layout of the latter.

Google's prompt-tuning keeps each saved prompt as `numpy_checkpoints/checkpoint_<step>/encoder.prompt.prompt.prompt`, which
is `numpy.save`'s format without its suffix (`prompt_tuning/train/utils.py`, `Checkpointer.save_numpy`); that path is also
what `prompts.np_load.path` wants there.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.lib import format as numpy_format
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mpt_jax.errors import UserError
from mpt_jax.files import replacing

T5X_NAME = "encoder.prompt.prompt.prompt"

Arrays = dict[str, np.ndarray]


def read_tensors(file: Path) -> tuple[Arrays, dict[str, str]]:
    """(tensors, metadata) of a safetensors file; UserError when it is none or not whole."""
    try:
        with safe_open(file, framework="numpy") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The prompt file {file} is not a complete safetensors file ({error}) or a NumPy array; write it anew "
            "(pickled files, such as .pt and .bin, are never read)."
        ) from None


def write_tensors(file: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    """Write a safetensors file whole; UserError where that is impossible."""
    with whole_file(file) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary, metadata=metadata)


def is_array(file: Path) -> bool:
    """Whether a file has the first bytes of a NumPy array, or claims to be one by its name."""
    with file.open("rb") as stream:
        head = stream.read(len(numpy_format.MAGIC_PREFIX))
    return head == numpy_format.MAGIC_PREFIX or file.suffix == ".npy" or file.name == T5X_NAME


def read_array(file: Path) -> np.ndarray:
    """The one prompt [1,P,D] of a NumPy file that holds [P,D] or [1,P,D].

    Raises:
      UserError: no array, a pickled one, or another shape.
    """
    try:
        with file.open("rb") as stream:
            array = numpy_format.read_array(stream, allow_pickle=False)  # a pickle could run anything
    except Exception as error:  # the header is Python, and NumPy lets through what a damaged one raises
        reason = " ".join(str(error).split())  # NumPy's may have several lines
        raise UserError(f"{file} is not a complete NumPy array ({reason}); write it with numpy.save, without pickling.") from None
    if array.ndim not in (2, 3) or (array.ndim == 3 and len(array) != 1):
        raise UserError(f"The array in {file} has shape {array.shape}; a prompt is [P,D] or [1,P,D], one to a file.")
    return array.reshape(1, *array.shape[-2:])


def write_array(file: Path, prompt: np.ndarray) -> None:
    """Write [P,D] as float32, as `numpy.save` does; UserError where that is impossible."""
    with whole_file(file) as temporary, open(temporary, "wb") as stream:
        numpy_format.write_array(stream, np.ascontiguousarray(prompt, np.float32), allow_pickle=False)


def t5x_file(folder: Path, step: int) -> Path:
    """Where prompt-tuning keeps the prompt of a step in its MODEL_DIR `folder`."""
    return folder / "numpy_checkpoints" / f"checkpoint_{step}" / T5X_NAME


def find_t5x(folder: Path) -> Path | None:
    """The prompt below a MODEL_DIR of prompt-tuning, or in one of its `checkpoint_<step>`; None where there is none.

    Raises:
      UserError: several steps, of which only the user knows the best.
    """
    if (folder / T5X_NAME).is_file():
        return folder / T5X_NAME
    files = folder.glob(f"numpy_checkpoints/checkpoint_*/{T5X_NAME}")
    # A save that was cut off leaves checkpoint_<step>.tmp-<time>, a repeated one checkpoint_<step>.backup-<time>.
    steps = {int(path.parent.name[11:]): path for path in files if re.fullmatch(r"checkpoint_\d+", path.parent.name)}
    if len(steps) > 1:
        raise UserError(
            f"{folder / 'numpy_checkpoints'} has the prompts of the steps {', '.join(map(str, sorted(steps)))}; "
            "give the folder of one, checkpoint_<step>."
        )
    return next(iter(steps.values()), None)


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """`files.replacing`; UserError when the file cannot be written."""
    try:
        with replacing(file) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise UserError(f"The prompt file {file} cannot be written: {error}; choose a folder that you may write to.") from None
