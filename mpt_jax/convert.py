"""Whole backbones from one form into another: the `import` command, and `export` with two paths."""

from pathlib import Path

from mpt_jax.checkpoint import storage
from mpt_jax.checkpoint.backbone import Opened, open_checkpoint
from mpt_jax.checkpoint.export_hf import write_hf
from mpt_jax.checkpoint.own import stored_dtype, write_own
from mpt_jax.config import T5Config
from mpt_jax.data.vocabulary import check_vocabulary, load_vocabulary
from mpt_jax.errors import UserError
from mpt_jax.models.t5 import count_parameters


def run_import(source: str, target: str, vocabulary: str = "") -> None:
    """The `import` command: any checkpoint → a sharded Orbax backbone of ours with its card, one leaf at a time.

    Args:
        source: what INITIAL_CHECKPOINT_PATH takes. Its architecture is what it says or, of T5X's, what it shows.
        target: a new folder, local or gs://.
        vocabulary: a SentencePiece file or "bytes", in place of the source's own.

    Raises:
        UserError: no such checkpoint, one that is damaged or no T5; a vocabulary of another model; a folder that is not empty.
    """
    opened = open_checkpoint(source)
    words = _vocabulary(opened, vocabulary)
    card = write_own(target, opened.config, opened.leaves, source, words)
    print(f"{target}: {_describe(opened.config)}, {card.dtype}, fingerprint {card.fingerprint}")
    if not words:
        print("It has no vocabulary: give one in BackboneConfig.vocabulary, or import it again with --vocabulary=FILE.")


def run_export_model(source: str, target: str, vocabulary: str = "") -> None:
    """The `export` command with two paths: any checkpoint → a Hugging Face folder, in the dtype that it is stored in.

    Raises:
        UserError: as `run_import`; a target in a bucket.
    """
    if storage.is_remote(target):
        raise UserError(f"A Hugging Face folder is written locally, not to {target}; copy it with gcloud storage afterwards.")
    folder = Path(target).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{target} is not empty; give a new folder for the model.")
    opened = open_checkpoint(source)
    words, dtype = _vocabulary(opened, vocabulary), stored_dtype(opened.leaves)
    write_hf(opened.leaves, opened.config, folder, dtype=dtype, vocabulary=words)
    print(f"{target}: {_describe(opened.config)}, {dtype}, a Hugging Face folder" + ("" if words else " without tokenizer"))


def _vocabulary(opened: Opened, given: str) -> str:
    """What was given, or lies in the checkpoint, as `Opened.vocabulary`. UserError where it is of another model."""
    words = str(storage.local_copy(given)) if given and given != "bytes" else given or opened.vocabulary
    if words:
        check_vocabulary(load_vocabulary(words), opened.config)
    return words


def _describe(config: T5Config) -> str:
    kind = "T5 1.0" if config.tie_embeddings else "T5 1.1"
    layers = f"{config.num_encoder_layers} + {config.num_decoder_layers} layers"
    return f"{kind}, {count_parameters(config):,} parameters, {layers} of width {config.d_model}"
