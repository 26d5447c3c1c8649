"""Prompts for other tools: the `export` command writes what MODEL_DIR holds, or a prompt file, in another form.

A bank becomes several files in every form but our own, for a NumPy array and a PROMPT_TUNING adapter hold one prompt. MPT's
factors stay together only where PEFT can hold them: one shared prompt P*, with the u and v of all its tasks.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from mpt_jax import setup
from mpt_jax.config import Experiment
from mpt_jax.errors import UserError
from mpt_jax.prompts import compose
from mpt_jax.prompts.arrays import Arrays, t5x_file, write_array
from mpt_jax.prompts.files import check_prompts, choose_stream, choose_task, load_prompts, metadata_text, save_prompts
from mpt_jax.prompts.peft import MODEL_NAME, write_peft

Meta = dict[str, Any]


def run_export(experiment: Experiment) -> Path:
    """The `export` command: writes the prompts as `ExportConfig` says, without loading the backbone.

    Returns:
        `ExportConfig.output`.

    Raises:
        UserError: no prompt in MODEL_DIR or of another width than the backbone; no such task; a form that cannot hold the prompt;
            an output that cannot be written, or is there already.
    """
    experiment.validate()
    cfg = experiment.export
    if experiment.prompt.method == "none":
        raise UserError(
            "PromptConfig.method='none' trains no prompt to export, but a model; it is in "
            f"{Path(experiment.train.model_dir) / 'model'}, a Hugging Face folder."
        )
    if not cfg.output:
        raise UserError("ExportConfig.output is not set; give the path of the file or folder to write.")
    params, meta = load_prompts(setup.find_prompts(experiment))
    check_prompts(meta, d_model=experiment.backbone.architecture.d_model)
    if cfg.task:
        params, meta = choose_task(params, meta, cfg.task)
    if cfg.format == "peft_mpt" and meta["method"] != "mpt":
        raise UserError(
            f"ExportConfig.format is 'peft_mpt', but {meta['path']} holds prompts of the method '{meta['method']}'; use 'peft'."
        )
    output = Path(cfg.output).expanduser()
    parts = {"": (params, meta)} if cfg.format == "safetensors" else split(params, meta, factored=cfg.format == "peft_mpt")
    _check_free(output, meta["path"], is_file="" in parts and cfg.format in ("safetensors", "npy"))
    paths = {name: output / (f"{name}.npy" if name and cfg.format == "npy" else name) for name in parts}
    for name, (one, its_meta) in parts.items():
        path = paths[name]
        _write(cfg.format, path, one, its_meta, _base_model(experiment))
        task_id = "{}=" if cfg.format == "peft_mpt" else ""  # what PEFT's forward pass asks for
        print(f"{', '.join(task_id.format(n) + task for n, task in enumerate(its_meta['tasks'])) or 'prompt'}: {path}")
    first = next(iter(parts))
    print(_how_to_start(cfg.format, paths[first], parts[first][1]))
    return output


def _check_free(output: Path, source: str, *, is_file: bool) -> None:
    """UserError unless nothing is there, or for a folder an empty one: an export is not written over anything."""
    if output.exists() and output.samefile(source):
        raise UserError(f"ExportConfig.output '{output}' is what is to be exported; give another path.")
    if is_file and output.is_dir():
        raise UserError(f"ExportConfig.output '{output}' is a folder; give the path of the file to write.")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"ExportConfig.output '{output}' is there already; give a new path, or delete it first.")


def _how_to_start(form: str, path: Path, meta: Meta) -> str:
    """How another run starts from the (first) prompt that was written."""
    method = "mpt_target" if meta["method"] == "mpt" and form in ("safetensors", "peft_mpt") else "spot"
    first = meta["tasks"][0] if meta["tasks"][0] and meta["tasks"].count(meta["tasks"][0]) == 1 else "0"
    start = f"{path}#{first}" if len(set(meta["groups"])) > 1 else str(path)  # of several, one is chosen
    return (
        f"A run starts from it with --gin_file=gin/methods/{method}.gin --gin.PROMPT_LENGTH={meta['length']} "
        f"--gin.INITIAL_PROMPT_PATH={shlex.quote(start)}"
    )


def split(params: Arrays, meta: Meta, factored: bool) -> dict[str, tuple[Arrays, Meta]]:
    """{file name: (params, meta)} of the parts of a bank that a form with one prompt writes one by one.

    What is a single part, though it may have several streams, is called "": a prompt that its tasks share and, with `factored`,
    one group of MPT. Else each stream is a part, called by its task (of what a file name allows), with the stream's number
    where that is not enough.
    """
    whole = meta["method"] == "plain" or factored
    if len(meta["tasks"]) == 1 or (whole and max(meta["groups"]) == 0):
        return {"": (params, meta)}
    names = [re.sub(r"\W", "_", task) for task in meta["tasks"]]
    names = [name if name and names.count(name) == 1 else f"{name or 'prompt'}-{n}" for n, name in enumerate(names)]
    return {name: choose_stream(params, meta, n) for n, name in enumerate(names)}


def _file_of(form: str, path: Path, meta: Meta) -> Path:
    """The file with the prompt itself."""
    steps = meta.get("steps")
    numbered = t5x_file(path, steps if isinstance(steps, int) else 0)
    return numbered if form == "t5x" else path / MODEL_NAME if form.startswith("peft") else path


def _write(form: str, path: Path, params: Arrays, meta: Meta, base_model: str) -> None:
    """One part of a bank, or with "safetensors" the whole."""
    file = _file_of(form, path, meta)
    if form == "safetensors":
        save_prompts(file, params, meta)
    elif form == "peft_mpt":
        write_peft(path, params, metadata_text(meta), base_model)
    else:
        prompt = np.asarray(compose(meta["method"], params, tuple(meta["groups"])))[:1]  # the same for all tasks of a part
        if form == "peft":
            write_peft(path, {"prompt": prompt}, metadata_text(meta | {"method": "plain"}), base_model)
        else:
            write_array(file, prompt[0])


def _base_model(experiment: Experiment) -> str:
    """The backbone's folder where PEFT could load it, "" where only we can."""
    folder = Path(experiment.backbone.checkpoint).expanduser()
    return str(folder) if (folder / "config.json").is_file() and any(folder.glob("*model*")) else ""
