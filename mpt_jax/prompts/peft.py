"""PEFT adapters that are soft prompts: folders of `adapter_config.json` and `adapter_model.safetensors`.

    PROMPT_TUNING            prompt_embeddings [P,D]
    MULTITASK_PROMPT_TUNING  the same, P*, and prefix_task_cols [N,P,R], prefix_task_rows [N,R,D]: MPT's u and v; its number
                             in N is what PEFT calls a `task_id`

PEFT makes a sequence-to-sequence model's adapter with two submodules unless told otherwise: 2P rows, the second half for the
decoder. Ours have one. Read in peft 0.21.2: `peft_model.py` (PeftModelForSeq2SeqLM), `tuners/multitask_prompt_tuning/model.py`.
"""

import json
import logging
from pathlib import Path
from typing import Any

from mpt_jax.config import nearest
from mpt_jax.errors import UserError
from mpt_jax.prompts.arrays import Arrays, read_tensors, whole_file, write_tensors

CONFIG_NAME = "adapter_config.json"
MODEL_NAME = "adapter_model.safetensors"
# Our parameters under PEFT's names.
LEAVES = {
    "PROMPT_TUNING": {"prompt_embeddings": "prompt"},
    "MULTITASK_PROMPT_TUNING": {"prompt_embeddings": "shared", "prefix_task_cols": "task_u", "prefix_task_rows": "task_v"},
}

logger = logging.getLogger("mpt_jax")


def write_peft(folder: Path, params: Arrays, metadata: dict[str, str], base_model: str) -> None:
    """Write the parameters of one plain prompt, or of one group of MPT, as an adapter that PEFT loads as it is.

    Args:
      folder: of the adapter; it is made.
      params: `prompt` [1,P,D], or `shared` [1,P,D], `task_u` [N,P,R] and `task_v` [N,R,D]; float32.
      metadata: ours, kept in the safetensors file, where PEFT does not look; unknown keys in its own file make it warn.
      base_model: path or name of the backbone, "" = none that PEFT could load.

    Raises:
      UserError: the folder cannot be written.
    """
    kind = next(kind for kind, leaves in LEAVES.items() if set(leaves.values()) == set(params))
    _, length, width = params[LEAVES[kind]["prompt_embeddings"]].shape
    config: dict[str, Any] = {
        "peft_type": kind,
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "token_dim": width,
    }
    if kind == "MULTITASK_PROMPT_TUNING":
        config |= {"num_tasks": len(params["task_u"]), "num_ranks": params["task_u"].shape[-1]}
    tensors = {theirs: params[ours] for theirs, ours in LEAVES[kind].items()}
    tensors["prompt_embeddings"] = tensors["prompt_embeddings"][0]
    write_tensors(folder / MODEL_NAME, tensors, {"format": "pt"} | metadata)
    with whole_file(folder / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_peft(folder: Path) -> tuple[Arrays, dict[str, str]]:
    """(our parameters, metadata) of an adapter's folder. Of one with two submodules the encoder's rows only, which it logs.

    Without our metadata, the streams of MPT are called by their `task_id`s, "0", "1", …

    Raises:
      UserError: an adapter of another kind, or one whose two files disagree.
    """
    config = _read_config(folder / CONFIG_NAME)
    tensors, metadata = read_tensors(folder / MODEL_NAME)
    kind = config["peft_type"]
    if set(tensors) != set(LEAVES[kind]):
        raise UserError(
            f"{folder / MODEL_NAME} holds the tensors {', '.join(sorted(tensors)) or 'none'}, but {kind} has "
            f"{', '.join(LEAVES[kind])}; save the adapter anew."
        )
    length: Any = config.get("num_virtual_tokens")
    # What each tensor has of the encoder's P rows, and the decoder's P after them.
    lengths = {tensors["prompt_embeddings"].shape[:1]}
    if "prefix_task_cols" in tensors:
        lengths.add(tensors["prefix_task_cols"].shape[1:2])
    submodules = next((n for n in (1, 2) if isinstance(length, int) and lengths == {(n * length,)}), None)
    if submodules is None or config.get("num_transformer_submodules") not in (None, submodules):
        raise UserError(
            f"{folder / CONFIG_NAME} says num_virtual_tokens={length} and num_transformer_submodules="
            f"{config.get('num_transformer_submodules')}, but {MODEL_NAME} has the shapes "
            f"{ {name: array.shape for name, array in tensors.items()} }; save the adapter anew."
        )
    params = {ours: tensors[theirs] for theirs, ours in LEAVES[kind].items()}
    base = LEAVES[kind]["prompt_embeddings"]
    params[base] = params[base][None, :length]
    if "task_u" in params:
        params["task_u"] = params["task_u"][:, :length]
        metadata = {"tasks": json.dumps([str(n) for n in range(len(params["task_u"]))])} | metadata
    if submodules == 2:
        logger.warning(_half_note(kind), folder, length, 2 * length)
    return params, metadata


def _half_note(kind: str) -> str:
    if kind == "PROMPT_TUNING":
        return "%s was made with two submodules: PEFT puts only the first %d of its %d rows before a T5's input; these are taken"
    return (
        "%s was made with two submodules: the first %d of its %d rows are the encoder's prompt and are taken; the decoder's, "
        "which PEFT's generate() drops, is left out"
    )


def _read_config(file: Path) -> dict[str, Any]:
    """adapter_config.json of a prompt; UserError when it is of something else."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not the configuration of a PEFT adapter ({error}); save the adapter anew.") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in tuple(LEAVES):  # whatever JSON has there
        raise UserError(f"{file} says peft_type={kind!r}; only {' and '.join(LEAVES)} are prompts.{nearest(str(kind), LEAVES)}")
    if config.get("task_type") not in (None, "SEQ_2_SEQ_LM"):
        raise UserError(f"{file} says task_type={config['task_type']!r}; a prompt of a T5 has SEQ_2_SEQ_LM.")
    return config
