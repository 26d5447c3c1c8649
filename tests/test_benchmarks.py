"""The comparison with PEFT, on a tiny model: both sides compute the same, and what a run writes. Speeds are nobody's business."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import against_peft
from benchmarks.prepare import full_batch, write_model, write_set
from benchmarks.results import ratios, summary, title
from benchmarks.settings import Settings, parse
from benchmarks.with_mpt_jax import Ours
from benchmarks.with_peft import Peft
from mpt_jax.errors import UserError
from mpt_jax.models.layers import few_queries

TINY = Settings(size="tiny", batch=4, inputs=40, prompt=4, targets=4, rounds=2, steps=1, host_devices=1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers for it
def test_both_sides_take_the_same_steps_and_decode_the_same_tokens(tmp_path):
    """With padding among inputs and targets, which both must leave out of attention and loss."""
    assert few_queries(TINY.targets, TINY.prompt + TINY.inputs, TINY.architecture.d_kv), "as at the sizes that are measured"
    write_model(TINY, tmp_path)
    batch = full_batch(TINY)
    batch["encoder_tokens"][1, 7:] = 0
    batch["decoder_target_tokens"][2, 3:] = 0
    batch["loss_weights"][2, 3:] = 0
    write_set(tmp_path, "full", [batch], TINY)
    file = str(tmp_path / "batches" / "full" / "000.npz")
    sides = [Ours(TINY, tmp_path), Peft(TINY, tmp_path, compiled=False)]
    ours, theirs = (side.losses(file, 4) for side in sides)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert len(set(np.round(ours, 3))) == 4, "the prompt moves"
    ours, theirs = (np.array(side.decoded(file)) for side in sides)
    np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == (4, 4) and (ours > 1).all(), "no output ends early, so both sides decode as many tokens"


def test_a_run_writes_what_it_measured(tmp_path, capsys):
    file = against_peft.run(dataclasses.replace(TINY, output=str(tmp_path)))
    written = json.loads(file.read_text())
    assert written["settings"]["size"] == "tiny" and written["commit"] and len(written["load"]) == 4
    assert written["contenders"]["eager"]["versions"]["peft"] and written["contenders"]["mpt_jax"]["versions"]["jax"]
    assert written["equal_tokens"] == {"eager": 1.0} and not written["failed"]
    for work in ("train", "decode"):
        for rounds in written["seconds"][work].values():
            assert len(rounds) == TINY.rounds and all(seconds > 0 for [seconds] in rounds)
        assert written["results"][work]["mpt_jax"]["times_as_fast_as"]["peft eager"]["n"] == TINY.rounds
    assert summary(written) in capsys.readouterr().out and "tiny, batch 4" in title(written)


def test_ratios_are_of_turns_in_the_same_round():
    seconds = {"mpt_jax": [[1.0, 1.0], [2.0, 2.0], [1.0, 3.0]], "peft eager": [[2.0, 2.0], [4.0, 8.0], [1.0, 1.0]], "gone": [[]]}
    result = ratios(seconds, 8, "mpt_jax")
    assert set(result) == {"mpt_jax", "peft eager"}, "one that failed has no numbers"
    assert result["mpt_jax"]["times_as_fast_as"]["peft eager"]["rounds"] == [2.0, 3.0, 0.5]
    assert result["mpt_jax"]["times_as_fast_as"]["peft eager"]["median"] == 2.0
    assert result["peft eager"]["examples_per_second"]["rounds"] == [2.0, 0.6667, 4.0]


def test_a_failing_contender_is_told_and_left_out(tmp_path):
    """The folder has no model: the process ends, and is not asked again."""
    comparison = against_peft.Comparison(TINY, tmp_path, tmp_path / "out.json")
    ours, theirs = comparison.entries
    assert comparison.ask(theirs, ("about", {})) is None
    assert "exit code 1" in comparison.report["failed"]["eager"] and str(tmp_path) in comparison.report["failed"]["eager"]
    assert comparison.entries == [ours] and not comparison.workers
    with pytest.raises(UserError, match="No contender is left"):
        comparison.ask(ours, ("about", {}))


def test_the_device_decides_on_defaults():
    assert [(each.size, each.batch, each.inputs, each.dtype) for each in parse(["--device", "gpu"])] == [
        (size, 32, 256, "bfloat16") for size in ("base", "large", "xl")
    ]
    assert parse(["--device=gpu", "--batch=8", "--size=base"])[0].batch == 8
    assert parse([]) == [Settings()]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"size": "huge"}, r"--size is huge, but must be one of tiny, small"),
        ({"contenders": "eager,jax"}, r"--contenders has 'jax', but may have mpt_jax, eager, compile"),
        ({"rounds": 0}, r"--rounds is 0, but must be positive"),
        ({"batch": 3, "host_devices": 2}, r"--batch is 3, which 2 devices cannot share"),
    ],
)
def test_mistakes(wrong, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **wrong).validate()
