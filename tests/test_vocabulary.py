"""Vocabularies beside T5's own: bytes, and a file that has the sentinels itself."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import seqio
import tiny

from mpt_jax.checkpoint.export_hf import export_hf
from mpt_jax.data.vocabulary import BYTES, check_vocabulary, load_vocabulary
from mpt_jax.errors import UserError
from mpt_jax.evaluate import run_evaluate
from mpt_jax.models import init_params
from mpt_jax.train import run_training

BYT5 = dataclasses.replace(tiny.CONFIG, vocab_size=384)


@pytest.mark.parametrize("text", ["", "A word.", "naïve – 東京\n", "\x00\x7f"])
def test_bytes_are_seqio_s(text: str) -> None:
    ours, theirs = load_vocabulary(BYTES), seqio.ByteVocabulary()
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == theirs.vocab_size


@pytest.mark.parametrize("ids", [[80, 81, 1, 82], [0, 2, 80, 259, 383], [3 + 0xE6, 3 + 0x9D, 80], [1], []])
def test_ids_that_are_no_text_decode_as_seqio_s(ids: list[int]) -> None:
    assert load_vocabulary(BYTES).decode(ids) == seqio.ByteVocabulary().decode(ids)


def test_a_byt5_is_trained_and_evaluated(tmp_path: Path) -> None:
    """A Hugging Face folder says by its tokenizer that it reads bytes; caches, training and scores follow."""
    tiny.make(tmp_path)
    export_hf(init_params(BYT5, jax.random.key(1)), BYT5, tmp_path / "model", vocabulary=BYTES)
    (tmp_path / "model" / "spiece.model").unlink()
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())["tokenizer_class"] == "ByT5Tokenizer"
    experiment = tiny.experiment(tmp_path, "run", steps=2, architecture=BYT5)
    experiment = tiny.replace(experiment, backbone={"vocabulary": ""}, data={"lengths": {"inputs": 80, "targets": 12}})
    result = run_training(experiment)
    assert np.isfinite([record["loss"] for record in result.history if record["kind"] == "train"]).all()
    assert 0 <= run_evaluate(experiment)["score"] <= 100


def test_sentinels_of_the_file_are_not_added_again(tmp_path: Path) -> None:
    """mT5's file has them among its pieces; the ids are those of the same vocabulary whose file has none."""
    plain = tiny.make_vocabulary(tmp_path / "plain.model")
    tiny.with_sentinels(plain, tmp_path / "whole.model")
    left, right = load_vocabulary(plain), load_vocabulary(tmp_path / "whole.model")
    assert left.vocab_size == right.vocab_size == right.seqio().vocab_size
    text = "the food is <extra_id_0> good <extra_id_99>"
    assert left.encode(text) == right.encode(text) == right.seqio().encode(text)


def test_bytes_of_another_model_are_refused() -> None:
    check_vocabulary(load_vocabulary(BYTES), BYT5)
    with pytest.raises(UserError, match=r"vocab_size=32128, 31869 more than the 259 ids .* of 'bytes'"):
        check_vocabulary(load_vocabulary(BYTES), dataclasses.replace(BYT5, vocab_size=32128))
