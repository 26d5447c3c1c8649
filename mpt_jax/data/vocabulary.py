"""The vocabulary of a T5, without TensorFlow: SentencePiece's, or ByT5's bytes.

The same ids and texts as `seqio.SentencePieceVocabulary(path, extra_ids=100)`: pad 0, EOS 1, unknown 2, and 100 sentinels
`<extra_id_0>` ... `<extra_id_99>` on top of the pieces, the first of them with the highest id (Raffel et al. 2020). A file that
has the sentinels itself, as mT5's, gets no others. Bytes are as in `seqio.ByteVocabulary`, three ids above their value.
"""

import functools
import hashlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from mpt_jax.config import T5Config
from mpt_jax.errors import UserError

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
EXTRA_IDS = 100
PADDING = 128  # T5's embeddings are padded to a multiple of this
BYTES = "bytes"  # in BackboneConfig.vocabulary, the name of ByT5's
FILE_NAMES = ("sentencepiece.model", "spiece.model")  # as which it lies beside weights: ours (and mini's), Hugging Face's


class SentencePieceVocabulary:
    """Text ↔ token ids. Encoding adds no EOS; decoding stops at EOS.

    Raises:
      UserError: the file is missing, is no SentencePiece model, or does not have pad 0, EOS 1, unknown 2.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser()
        try:
            self._model = self.path.read_bytes()
        except OSError as error:
            raise UserError(
                f"Cannot read the vocabulary '{self.path}' ({error.strerror}); "
                "give a SentencePiece model in BackboneConfig.vocabulary."
            ) from None
        self._processor, self._extra_ids = _load(self._model, self.path)
        specials = (self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id())
        if specials != (PAD_ID, EOS_ID, UNK_ID):
            raise UserError(
                f"The vocabulary '{self.path}' has (pad, EOS, unknown) = {specials}, but a T5 needs (0, 1, 2); "
                "train it with these ids."
            )

    @property
    def vocab_size(self) -> int:
        """Number of ids, sentinels included; a model's V is this or more (T5 pads 32,100 to 32,128)."""
        return self._processor.get_piece_size()

    @property
    def extra_ids(self) -> int:
        """How many sentinels the file does not have itself: 100, or 0 of mT5's."""
        return self._extra_ids

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, 16 hex digits."""
        return hashlib.sha256(self._model).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first EOS; ids outside the vocabulary (a padded softmax has them) read as unknown."""
        size, clean = self.vocab_size, []
        for token in ids:
            token = int(token)
            if token == EOS_ID:
                break
            clean.append(token if 0 <= token < size else UNK_ID)
        return self._processor.decode(clean)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each token as SentencePiece writes it: "▁" for a space, "</s>" for EOS."""
        return [self._processor.id_to_piece(int(token)) for token in ids]

    def seqio(self) -> Any:
        """The same vocabulary as a `seqio.SentencePieceVocabulary`; loads TensorFlow."""
        import seqio

        return seqio.SentencePieceVocabulary(str(self.path), extra_ids=self._extra_ids)


class ByteVocabulary:
    """UTF-8 bytes as token ids (Xue et al. 2022, ByT5). Encoding adds no EOS; decoding stops at EOS."""

    path = Path(BYTES)
    vocab_size = 3 + 256  # ByT5's models have 125 unused ids above
    fingerprint = BYTES

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first EOS; ids that are no bytes, and bytes that are no UTF-8, are left out, as seqio does."""
        values = itertools.takewhile(lambda token: token != EOS_ID, map(int, ids))
        return bytes(token - 3 for token in values if 3 <= token < self.vocab_size).decode(errors="ignore")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each token as the ASCII character that it is, else "<0xE2>"; "▁" for a space, "</s>" for EOS."""
        special = {PAD_ID: "<pad>", EOS_ID: "</s>", UNK_ID: "<unk>", 3 + ord(" "): "▁"}
        return [special.get(int(n)) or (chr(n - 3) if 33 <= n - 3 < 127 else f"<0x{n - 3:02X}>") for n in ids]

    def seqio(self) -> Any:
        """The same vocabulary as a `seqio.ByteVocabulary`; loads TensorFlow."""
        import seqio

        return seqio.ByteVocabulary()


Vocabulary = SentencePieceVocabulary | ByteVocabulary


def load_vocabulary(source: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary "bytes", or that of a SentencePiece file. UserError as `SentencePieceVocabulary`."""
    return ByteVocabulary() if str(source) == BYTES else SentencePieceVocabulary(source)


def check_vocabulary(vocabulary: Vocabulary, config: T5Config) -> None:
    """UserError when the model has fewer embeddings than the vocabulary has ids, or so many more that it is another model's."""
    unused = config.vocab_size - vocabulary.vocab_size
    if not 0 <= unused < PADDING:
        how = "fewer than" if unused < 0 else f"{unused} more than"
        raise UserError(
            f"The model has T5Config.vocab_size={config.vocab_size}, {how} the {vocabulary.vocab_size} ids (sentinels included) "
            f"of '{vocabulary.path}'; set BackboneConfig.vocabulary to the file that goes with the model."
        )


def _load(model: bytes, path: Path) -> tuple[sentencepiece.SentencePieceProcessor, int]:
    try:
        return _with_sentinels(model)
    except Exception as error:  # protobuf and SentencePiece raise their own kinds
        raise UserError(f"'{path}' is not a SentencePiece model ({error}); give the .model file of the backbone.") from None


@functools.lru_cache(maxsize=8)
def _with_sentinels(model: bytes) -> tuple[sentencepiece.SentencePieceProcessor, int]:
    """(the model with sentinels, how many of them were added)."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    user_defined = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    has_them = any(piece.piece.lstrip("▁") == "<extra_id_0>" for piece in proto.pieces)
    added = 0 if has_them else EXTRA_IDS
    for number in reversed(range(added)):
        proto.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=user_defined)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return processor, added
