"""Trains the SentencePiece vocabulary of the embedded T5, `mini`.

    MPT_JAX_CORPUS=FOLDER python -m tasks.mini_vocabulary sentencepiece.model

The one that ships was made before the exercises were last changed, and `make mini` keeps it: of one made now, 25 of 3,996 pieces
differ.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from tasks import pretrain, sketch_exercises, sketch_text

PIECES = 3996  # + 100 sentinels = 4096
ENGLISH_CHARACTERS = 8_000_000  # of the corpus


def train_vocabulary(path: Path) -> None:
    """Trains mini's SentencePiece model: unigram, case-folding, ids 0 pad, 1 EOS, 2 unknown."""

    def lines() -> Iterator[str]:
        rng, characters = random.Random(0), 0
        for document in pretrain.documents(pretrain.corpus_files()):
            if rng.random() < 0.15:
                characters += len(document)
                yield from (paragraph[:1500] for paragraph in document.split("\n"))
            if characters > ENGLISH_CHARACTERS:
                break
        yield from sketch_text.text(11, 40_000)
        for exercise in sketch_exercises.exercises(12, 20_000):
            yield from exercise.values()

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(),
        model_prefix=str(path.with_suffix("")),
        vocab_size=PIECES,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=0.9995,
        user_defined_symbols=["___"],
        minloglevel=1,
    )


if __name__ == "__main__":
    train_vocabulary(Path(sys.argv[1]))
