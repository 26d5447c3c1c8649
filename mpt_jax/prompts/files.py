"""Prompt files: a trained prompt alone, as one `.safetensors` file with its provenance. Other tools' are read, too.

Tensors (float32): `prompt` [G,P,D] of a plain prompt (a file of another tool may hold one [P,D]), or `shared` [G,P,D],
`task_u` [N,P,R], `task_v` [N,R,D] of MPT. Metadata (safetensors keeps strings, so everything but names is JSON):

    method      "plain" or "mpt"
    tasks       task name of each stream, list of N
    groups      group of each stream, list of N
    seeds       seed of each group, list of G
    scores      best validation score of each group, list of G, null where there is none
    selection_split  the split that these scores are of (missing or null where there are none, or it is not known)
    backbone    fingerprint of the backbone that it was trained on, "" when unknown
    length, d_model
    lengths     length of each group's prompt, list of G; shorter ones than `length` have zeros before their tokens

A prompt may also lie in a NumPy array, in prompt-tuning's folder (`arrays.py`) or in a PEFT adapter's (`peft.py`).
"""

import json
import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpt_jax.config import nearest
from mpt_jax.errors import UserError
from mpt_jax.prompts import peft
from mpt_jax.prompts.arrays import Arrays, find_t5x, is_array, read_array, read_tensors, write_tensors
from mpt_jax.prompts.base import bank_axis, has_tokens

logger = logging.getLogger("mpt_jax")

FILE_NAME = "prompts.safetensors"  # in a run's folder
LEAVES = {"plain": ("prompt",), "mpt": ("shared", "task_u", "task_v")}
TEXT_KEYS = ("method", "backbone")

Meta = dict[str, Any]


def save_prompts(path: str | Path, params: dict[str, Any], meta: Meta) -> Path:
    """Write a prompt file; it appears whole or not at all.

    Args:
      path: the file; its folder is made.
      params: a prompt module's parameters.
      meta: as described above; `method`, `length` and `d_model` are filled in from `params`, further JSON values are kept.

    Returns:
      The path.

    Raises:
      UserError: when the file cannot be written.
    """
    path = Path(path).expanduser()
    arrays = {name: np.asarray(value, np.float32) for name, value in params.items()}
    write_tensors(path, arrays, metadata_text(meta | _shape_of(_method_of(arrays, path), arrays)))
    return path


def metadata_text(meta: Meta) -> dict[str, str]:
    """`meta` as safetensors keeps it."""
    return {key: value if key in TEXT_KEYS else json.dumps(value) for key, value in meta.items() if key != "path"}


def load_prompts(path: str | Path) -> tuple[Arrays, Meta]:
    """Read a prompt file.

    Args:
      path: the file, or a folder: a run's with `prompts.safetensors`, else a PEFT adapter's, else one of prompt-tuning. Any
        may be followed by `#TASK` for the prompt of one task of the bank (of several of that task the `best_stream`), by
        `#NUMBER` for that of a stream, or by `#*`, which is the whole bank.

    Returns:
      (params as float32 NumPy arrays, meta as Python values; `meta["path"]` is the file). Missing metadata is filled in:
      unnamed tasks "", every plain prompt its own stream.

    Raises:
      UserError: no such file, a truncated file, missing or unknown tensors, numbers that float32 cannot hold, shapes that
        contradict one another, no such task.
    """
    file, task = _locate(path)
    arrays, text = _read(file)
    try:
        meta: Meta = {key: value if key in TEXT_KEYS else json.loads(value) for key, value in text.items()}
    except json.JSONDecodeError:
        meta = {key: value for key, value in text.items() if key in TEXT_KEYS}  # metadata of another tool
    method = _method_of(arrays, file)
    params = {name: _float32(name, value, file) for name, value in arrays.items()}
    if meta.get("method", method) != method:
        raise UserError(f"The prompt file {file} says method '{meta['method']}' but holds '{method}' tensors; write it anew.")
    meta = _complete(meta | _shape_of(method, params), params, file)
    return (params, meta) if task in ("", "*") else choose_task(params, meta, task)


def choose_task(params: Arrays, meta: Meta, task: str) -> tuple[Arrays, Meta]:
    """The bank of one stream: the `best_stream` of `task` or, where that is no task's name but a number, the stream's."""
    tasks = meta["tasks"]
    if task.isdecimal() and task not in tasks:
        if int(task) >= len(tasks):
            raise UserError(f"{meta['path']} has no prompt {task}; it has {len(tasks)}, numbered from 0.")
        return choose_stream(params, meta, int(task))
    stream = best_stream(meta, task)
    if stream is None:
        names = sorted(set(tasks))
        held = ", ".join(filter(None, names)) or "prompts without a task's name"
        raise UserError(f"{meta['path']} has no prompt for '{task}'; it has {held}.{nearest(task, names)}")
    return choose_stream(params, meta, stream)


def choose_stream(params: Arrays, meta: Meta, stream: int) -> tuple[Arrays, Meta]:
    """The bank of one stream, by its number."""
    group = meta["groups"][stream]
    index = {"stream": stream, "group": group}
    chosen = {name: value[index[bank_axis(name)]][None] for name, value in params.items()}
    length = meta["lengths"][group]
    chosen = {name: value[:, -length:] if has_tokens(name) else value for name, value in chosen.items()}
    by_group = {key: [meta[key][group]] for key in ("seeds", "scores", "lengths")}
    picked: Meta = {"tasks": [meta["tasks"][stream]], "groups": [0], "length": length} | by_group
    if isinstance(meta.get("k_shots"), list) and len(meta["k_shots"]) == len(meta["tasks"]):
        picked["k_shots"] = [meta["k_shots"][stream]]
    return chosen, meta | picked


def best_stream(meta: Meta, task: str) -> int | None:
    """Of the streams of `task` that with the best score, the first where there are no scores; None where there is no stream.

    Where there are several, it says which one it takes.
    """
    scores = {n: meta["scores"][meta["groups"][n]] for n, name in enumerate(meta["tasks"]) if name == task}
    best = max(scores, key=lambda n: -np.inf if scores[n] is None else scores[n], default=None)
    if best is not None and len(scores) > 1:
        group, score = meta["groups"][best], scores[best]
        why = "the first, as none has a score" if score is None else f"the best by validation score, {score:.2f}"
        logger.info(
            "%s has %d prompts for %s; prompt %d is taken (%d tokens, seed %s), %s",
            *(meta["path"], len(scores), task, best, meta["lengths"][group], meta["seeds"][group], why),
        )
    return best


def check_prompts(meta: Meta, *, d_model: int, backbone: str = "", length: int = 0, max_length: int = 0) -> None:
    """UserError with both values when a loaded prompt does not fit: its width, backbone fingerprint or length.

    Args:
      meta: of `load_prompts`.
      d_model: width of the model.
      backbone: the model's fingerprint; "" leaves it unchecked, as does a file that does not know its own.
      length: the length that is wanted; 0 = any.
      max_length: the greatest length that is allowed; 0 = any.
    """
    path = meta["path"]
    if meta["d_model"] != d_model:
        raise UserError(
            f"The prompt in {path} has width {meta['d_model']} but the backbone's d_model is {d_model}; "
            "use the backbone that it was trained on."
        )
    if backbone and meta["backbone"] and meta["backbone"] != backbone:
        raise UserError(
            f"The prompt in {path} was trained on the backbone {meta['backbone']} but this one is {backbone}; "
            "set INITIAL_CHECKPOINT_PATH to the checkpoint that it was trained on."
        )
    if max_length and meta["length"] > max_length:
        raise UserError(
            f"The prompt in {path} has {meta['length']} tokens but PromptConfig.max_length is {max_length}; "
            "raise it or use a shorter prompt."
        )
    if length and meta["length"] != length:
        raise UserError(
            f"The prompt in {path} has {meta['length']} tokens but PROMPT_LENGTH is {length}; "
            f"set PROMPT_LENGTH = {meta['length']}."
        )


def _locate(path: str | Path) -> tuple[Path, str]:
    """(existing file, task, number, "*" or "") of PATH, PATH#TASK."""
    whole, task = Path(path).expanduser(), ""
    if not whole.exists() and "#" in str(path):
        before, _, task = str(whole).rpartition("#")
        whole = Path(before)
    file = _in_folder(whole) if whole.is_dir() else whole
    if not file.is_file():
        hint = "check the path."
        if file.name == peft.MODEL_NAME:
            hint = "save the adapter with safe_serialization=True."
        elif whole.is_dir():
            hint = f"the folder has no {FILE_NAME}; has its run finished?"
        raise UserError(f"There is no prompt file {file}; {hint}")
    return file, task


def _in_folder(folder: Path) -> Path:
    """The prompt file of a folder, by the names that each tool gives; of a finished run it is the run's own."""
    own = folder / FILE_NAME
    if not own.is_file() and (folder / peft.CONFIG_NAME).is_file():
        return folder / peft.MODEL_NAME
    return own if own.is_file() else find_t5x(folder) or own


def _read(file: Path) -> tuple[Arrays, dict[str, str]]:
    """(params, metadata) of a file of any kind."""
    if file.name == peft.MODEL_NAME:
        arrays, text = peft.read_peft(file.parent)
    elif is_array(file):
        arrays, text = {"prompt": read_array(file)}, {}
    else:
        arrays, text = read_tensors(file)
    if set(arrays) == {"prompt"} and arrays["prompt"].ndim == 2:
        arrays["prompt"] = arrays["prompt"][None]
    return arrays, {key: value for key, value in text.items() if key != "format"}  # "pt" of other tools says nothing


def _float32(name: str, array: np.ndarray, file: Path) -> np.ndarray:
    """A leaf as float32; UserError unless it is a bank of matrices of finite floating-point numbers."""
    if array.ndim != 3 or not array.size:
        raise UserError(f"The prompt file {file} holds '{name}' of shape {array.shape}, not matrices; write it anew.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"The prompt file {file} holds '{name}' of dtype {array.dtype}; write it as float32.")
    with np.errstate(over="ignore"):
        cast = np.asarray(array, np.float32)
    if bad := int((~np.isfinite(cast)).sum()):
        raise UserError(f"The prompt file {file} holds '{name}' with {bad} numbers that are no finite float32; write it anew.")
    return cast


def _method_of(params: dict[str, Any], path: Path) -> str:
    for method, leaves in LEAVES.items():
        if set(params) == set(leaves):
            return method
    wanted = " or ".join(", ".join(leaves) for leaves in LEAVES.values())
    raise UserError(f"The prompt file {path} holds the tensors {', '.join(sorted(params)) or 'none'}; a prompt is {wanted}.")


def _shape_of(method: str, params: dict[str, Any]) -> Meta:
    first = params[LEAVES[method][0]]
    return {"method": method, "length": int(first.shape[-2]), "d_model": int(first.shape[-1])}


def _complete(meta: Meta, params: Arrays, file: Path) -> Meta:
    """`meta` with every key, checked against the tensors' bank axes."""
    groups_held = params[LEAVES[meta["method"]][0]].shape[0]
    streams = params["task_u"].shape[0] if meta["method"] == "mpt" else _length(meta.get("groups"), groups_held)
    filled: Meta = {
        "tasks": [""] * streams,
        "groups": list(range(groups_held)) if streams == groups_held else [0] * streams,
        "seeds": [0] * groups_held,
        "scores": [None] * groups_held,
        "lengths": [meta["length"]] * groups_held,
        "backbone": "",
        "path": str(file),
    } | meta
    expected = {"tasks": streams, "groups": streams, "seeds": groups_held, "scores": groups_held, "lengths": groups_held}
    shapes = {name: value.shape for name, value in params.items()}
    fits = all(isinstance(filled[key], list) and len(filled[key]) == size for key, size in expected.items())
    fits = fits and sorted(set(filled["groups"])) == [*range(groups_held)]
    fits = fits and all(isinstance(length, int) and 0 < length <= meta["length"] for length in filled["lengths"])
    if fits and meta["method"] == "mpt":
        (_, length, width), (n_u, p_u, r_u), (n_v, r_v, d_v) = (shapes[name] for name in LEAVES["mpt"])
        fits = (n_u, p_u, r_u, d_v) == (n_v, length, r_v, width)
    if not fits:
        raise UserError(f"The prompt file {file} contradicts itself: tensors {shapes}, metadata {meta}; write it anew.")
    return filled


def _length(value: Any, default: int) -> int:
    return len(value) if isinstance(value, list) else default
