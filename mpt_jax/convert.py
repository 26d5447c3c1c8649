"""Whole backbones from one form into another: the `import` command, and `export` with two paths."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from mpt_jax.checkpoint import storage
from mpt_jax.checkpoint.backbone import Opened, open_checkpoint, own_vocabulary
from mpt_jax.checkpoint.export_hf import CONFIG, write_hf
from mpt_jax.checkpoint.leaves import reason
from mpt_jax.checkpoint.own import CARD, stored_dtype, write_own
from mpt_jax.data.vocabulary import BYTES, check_vocabulary, load_vocabulary
from mpt_jax.errors import UserError
from mpt_jax.files import UNFINISHED, filling
from mpt_jax.models.t5 import count_parameters


def run_import(source: str, target: str, vocabulary: str = "") -> None:
    """The `import` command: any checkpoint → a sharded Orbax backbone of ours with its card, one leaf at a time.

    Args:
        source: what INITIAL_CHECKPOINT_PATH takes. Its architecture is what it says or, of T5X's, what it shows.
        target: a new local folder.
        vocabulary: a SentencePiece file or "bytes", in place of the source's own.

    Raises:
        UserError: no such checkpoint, one that is damaged or no T5; a vocabulary of another model; a target that is not empty, in
            a bucket or cannot be written.
    """
    folder = _new_folder(target)
    opened, words = _open(source, vocabulary)
    dtype = stored_dtype(opened.leaves)
    with _writing(folder, last=CARD) as inside:
        card = write_own(inside, opened.config, opened.leaves, source, words, opened.assumed)
    _tell(f"{target}: {_describe(opened, dtype)}, fingerprint {card.fingerprint}", opened)
    if not words:
        print("It has no vocabulary: give one in BackboneConfig.vocabulary, or import it again with --vocabulary=FILE.")


def run_export_model(source: str, target: str, vocabulary: str = "") -> None:
    """The `export` command with two paths: any checkpoint → a Hugging Face folder, in `stored_dtype`.

    Raises:
        UserError: as `run_import`.
    """
    folder = _new_folder(target)
    opened, words = _open(source, vocabulary)
    dtype = stored_dtype(opened.leaves)
    with _writing(folder, last=CONFIG) as inside:
        write_hf(opened.leaves, opened.config, inside, dtype=dtype, vocabulary=words)
    _tell(f"{target}: {_describe(opened, dtype)}, a Hugging Face folder" + ("" if words else " without tokenizer"), opened)


def _open(source: str, given: str) -> tuple[Opened, str]:
    """The checkpoint, and the vocabulary that was given or lies in it: a local file, "bytes" or "".

    Raises:
        UserError: as `open_checkpoint` and `own_vocabulary`; no such vocabulary, or one of another model.
    """
    try:
        opened = open_checkpoint(source)
        words = given or own_vocabulary(opened)
    except UserError as error:  # which calls the path by its name in gin
        raise UserError(str(error).replace(storage.CHECKPOINT, "SRC")) from None
    if given not in ("", BYTES):
        words = str(storage.local_copy(given, "--vocabulary"))
    if words:
        check_vocabulary(load_vocabulary(words), opened.config)
    return opened, words


def _new_folder(target: str) -> Path:
    """The local folder to write, as an absolute path. UserError for one in a bucket and for one that holds something."""
    if storage.is_remote(target):
        raise UserError(
            f"{target} is in a bucket, but a model is written locally; give a local folder, then copy it: gcloud storage cp -r."
        )
    folder = Path(target).expanduser().absolute()
    if folder.is_dir() and any(entry.name != UNFINISHED for entry in folder.iterdir()):
        raise UserError(f"{target} is not empty; give a new folder for the model.")
    return folder


@contextlib.contextmanager
def _writing(folder: Path, last: str) -> Iterator[Path]:
    """`files.filling`. UserError where the folder cannot be written."""
    try:
        with filling(folder, last) as inside:
            yield inside
    except (OSError, SafetensorError) as error:
        raise UserError(f"The model cannot be written to {folder} ({reason(error)}); choose another folder.") from None


def _tell(done: str, opened: Opened) -> None:
    print(done)
    if opened.assumed:
        print(f"Assumed, since a T5X checkpoint does not say: {opened.assumed}.")


def _describe(opened: Opened, dtype: str) -> str:
    """One line: the kind and size of the model, and what its weights became."""
    config, stored = opened.config, sorted({str(leaf.dtype) for leaf in opened.leaves.values()} - {dtype})
    kind = "T5 1.0" if config.tie_embeddings else "T5 1.1"
    layers = f"{config.num_encoder_layers} + {config.num_decoder_layers} layers"
    how = "rounded from" if "float64" in stored else "from"
    weights = dtype + (f" ({how} {', '.join(stored)})" if stored else "")
    return f"{kind}, {count_parameters(config):,} parameters, {layers} of width {config.d_model}, {weights}"
