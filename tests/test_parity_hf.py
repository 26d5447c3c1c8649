"""Our T5 computes what Hugging Face's computes: encoder, every layer, logits, loss, decoded tokens and labels' likelihoods."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hf_reference import CONFIGS, V1_0, V1_1, random_hf_model, save_hf_model

from mpt_jax.checkpoint.backbone import Backbone
from mpt_jax.checkpoint.import_hf import import_hf
from mpt_jax.config import DecodeConfig, PromptConfig, T5Config
from mpt_jax.data.cache import LabelSet
from mpt_jax.decoding import Generated, beam, greedy
from mpt_jax.models import T5
from mpt_jax.predict import rank_labels
from mpt_jax.prompts import build_prompt

RELATIVE_BOUND = 1e-4  # of the reference's standard deviation; a wrong norm epsilon, gelu or wi order is beyond it


def load_both(config: T5Config, tmp_path: Any, seed: int = 0) -> tuple[Any, T5, Any]:
    hf_model = random_hf_model(config, seed)
    ours, params = import_hf(save_hf_model(hf_model, tmp_path))
    assert ours == config
    return hf_model, T5(ours), params


def random_batch(config: T5Config, batch: int, length: int, target_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and targets padded with 0 to many lengths, one row full."""
    rng = np.random.default_rng(7)
    inputs = rng.integers(2, config.vocab_size, (batch, length))
    targets = rng.integers(1, config.vocab_size, (batch, target_length))
    for row in range(batch):
        inputs[row, length - row * 5 % length :] = 0
        targets[row, target_length - row % target_length :] = 0
    return inputs, targets, (inputs > 0).astype(np.int32)


def assert_close(ours: Any, reference: Any, what: str) -> None:
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape
    error = np.abs(ours - reference).max() / reference.std()
    assert error < RELATIVE_BOUND, f"{what}: {error:.2e} standard deviations"


def run_hf(model: Any, inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """HF's forward pass with the output of every block (its `hidden_states` have the last one only after the norm)."""
    blocks: dict[str, list[np.ndarray]] = {"encoder": [], "decoder": []}
    hooks = [
        block.register_forward_hook(
            lambda module, args, output, name=name: blocks[name].append(
                (output[0] if isinstance(output, tuple) else output).numpy()
            )
        )
        for name in blocks
        for block in getattr(model, name).block
    ]
    with torch.no_grad():
        labels = torch.tensor(np.where(targets > 0, targets, -100))
        out = model(input_ids=torch.tensor(inputs), attention_mask=torch.tensor(mask), labels=labels)
    for hook in hooks:
        hook.remove()
    return {
        **{name: np.stack(values) for name, values in blocks.items()},
        "encoded": out.encoder_last_hidden_state.numpy(),
        "logits": out.logits.numpy(),
        "loss": float(out.loss),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_transformers(name: str, tmp_path: Any) -> None:
    config = CONFIGS[name]
    hf_model, model, params = load_both(config, tmp_path)
    inputs, targets, mask = random_batch(config, batch=3, length=19, target_length=7)
    reference = run_hf(hf_model, inputs, targets, mask)

    @jax.jit
    def run(inputs: jax.Array, decoder_inputs: jax.Array, mask: jax.Array) -> Any:
        variables = {"params": params}
        x = model.apply(variables, inputs, method="embed")
        encoded = model.apply(variables, x, mask, return_hidden=True, method="encode")
        return encoded, model.apply(variables, decoder_inputs, encoded.output, mask, return_hidden=True, method="decode")

    decoder_inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    encoded, decoded = run(inputs, decoder_inputs, mask)
    assert_close(encoded.output, reference["encoded"], "encoder output")
    for part, hidden in (("encoder", encoded.hidden), ("decoder", decoded.hidden)):
        for layer, (ours, theirs) in enumerate(zip(hidden, reference[part], strict=True)):
            assert_close(ours, theirs, f"{part} layer {layer}")
    assert_close(decoded.logits, reference["logits"], "logits")
    losses = optax.softmax_cross_entropy_with_integer_labels(decoded.logits, targets)[targets > 0]
    assert abs(float(losses.mean()) - reference["loss"]) < RELATIVE_BOUND * float(losses.std())


@pytest.mark.parametrize("config", [V1_1, V1_0], ids=["v1.1", "v1.0"])
def test_long_inputs_equal_transformers(config: T5Config, tmp_path: Any) -> None:
    """Beyond max_distance = 128 positions, in the encoder and in the decoder."""
    hf_model, model, params = load_both(config, tmp_path)
    inputs, targets, mask = random_batch(config, batch=2, length=300, target_length=150)
    reference = run_hf(hf_model, inputs, targets, mask)
    logits = jax.jit(lambda inputs, targets: model.apply({"params": params}, inputs, targets))(
        inputs, np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    )
    assert_close(logits, reference["logits"], "logits")


@pytest.mark.parametrize("config", [V1_1, V1_0], ids=["v1.1", "v1.0"])
def test_gradient_of_the_encoder_s_input_equals_transformers(config: T5Config, tmp_path: Any) -> None:
    """What trains a prompt: the loss differentiated by the embeddings that the encoder is given."""
    hf_model, model, params = load_both(config, tmp_path)
    _, targets, mask = random_batch(config, batch=3, length=19, target_length=7)
    x = np.random.default_rng(5).standard_normal((*mask.shape, config.d_model), np.float32)
    embeddings = torch.tensor(x, requires_grad=True)
    labels = torch.tensor(np.where(targets > 0, targets, -100))
    hf_model(inputs_embeds=embeddings, attention_mask=torch.tensor(mask), labels=labels).loss.backward()
    assert embeddings.grad is not None

    def loss(x: jax.Array) -> jax.Array:
        encoded = model.apply({"params": params}, x, mask, method="encode").output
        decoder_inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        logits = model.apply({"params": params}, decoder_inputs, encoded, mask, method="decode").logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses, where=targets > 0) / np.sum(targets > 0)

    assert_close(jax.jit(jax.grad(loss))(x), embeddings.grad, "gradient")


def until_eos(tokens: Any) -> list[int]:
    """A generated row up to and with its first EOS, without padding."""
    row = [int(token) for token in tokens]
    return row[: row.index(1) + 1] if 1 in row else row


@pytest.mark.parametrize(
    ("name", "num_beams", "length_penalty"),
    [
        ("v1.1", 1, 1.0),
        ("v1.1", 4, 1.0),
        ("v1.1-1-3-buckets", 4, 0.0),
        ("v1.0", 1, 1.0),
        ("v1.0", 4, 1.0),
        ("v1.0-3-1", 4, 1.0),
        ("v1.0-3-1", 3, 2.0),
    ],
)
def test_decoding_equals_transformers(name: str, num_beams: int, length_penalty: float, tmp_path: Any) -> None:
    config, steps = CONFIGS[name], 9
    hf_model, model, params = load_both(config, tmp_path, seed=1)
    inputs, _, mask = random_batch(config, batch=48, length=26, target_length=12)
    generated = hf_model.generate(
        input_ids=torch.tensor(inputs),
        attention_mask=torch.tensor(mask),
        num_beams=num_beams,
        length_penalty=length_penalty,
        max_new_tokens=steps,
        do_sample=False,
        use_cache=config.num_decoder_layers <= config.num_encoder_layers,  # transformers' cache has the encoder's depth
        return_dict_in_generate=True,
        output_scores=True,
    )

    @jax.jit
    def decode(inputs: jax.Array, mask: jax.Array) -> Generated:
        variables = {"params": params}
        encoded = model.apply(variables, model.apply(variables, inputs, method="embed"), mask, method="encode").output
        if num_beams == 1:
            return greedy(model, params, encoded, mask, steps)
        return beam(model, params, encoded, mask, steps, num_beams, length_penalty)

    ours = decode(inputs, mask)
    if num_beams == 1:
        per_step = hf_model.compute_transition_scores(generated.sequences, generated.scores, normalize_logits=True).numpy()
        scores = np.array(
            [row[: len(until_eos(ids))].sum() for row, ids in zip(per_step, generated.sequences[:, 1:], strict=True)]
        )
    else:
        lengths = np.array([len(until_eos(row)) for row in generated.sequences[:, 1:]])
        scores = generated.sequences_scores.numpy() * lengths**length_penalty
    theirs = [until_eos(row) for row in generated.sequences[:, 1:]]
    assert [until_eos(row) for row in ours.tokens] == theirs
    lengths = [len(row) for row in theirs]
    assert min(lengths) < steps, "no row ended early: the test shows less than it should"
    for row, length in zip(np.asarray(ours.tokens), lengths, strict=True):
        assert not row[length:].any()
    np.testing.assert_allclose(ours.scores, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [V1_1, V1_0], ids=["v1.1", "v1.0"])
def test_label_scores_equal_transformers_log_likelihood(config: T5Config, tmp_path: Any) -> None:
    """Two prompts and two label sets in batches of three, padded; transformers sees one example and label at a time."""
    hf_model, model, params = load_both(config, tmp_path)
    rng = np.random.default_rng(2)
    prompts = rng.standard_normal((2, 5, config.d_model)).astype(np.float32)
    module = build_prompt(PromptConfig(length=5), (0, 1), config.d_model)
    inputs = [rng.integers(2, config.vocab_size, size).astype(np.int32) for size in (4, 17, 9, 30)]
    sets = LabelSet(("a", "b"), ((7, 1), (8, 9, 10, 1))), LabelSet(("c", "d", "e"), ((11, 1), (12, 13, 1), (14,)))
    task_ids, labels = [0, 1, 1, 0], [sets[0], sets[0], sets[1], sets[1]]

    def likelihood(tokens: np.ndarray, task: int, label: tuple[int, ...]) -> float:
        with torch.no_grad():
            embedded = torch.cat([torch.tensor(prompts[task]), hf_model.shared(torch.tensor(tokens))])[None]
            logits = hf_model(inputs_embeds=embedded, labels=torch.tensor([label])).logits[0]
        return float(logits.log_softmax(-1)[range(len(label)), list(label)].sum())

    lengths, decode = {"inputs": 32, "targets": 6}, DecodeConfig(method="rank", batch_size=3)
    found = rank_labels(
        Backbone(model, params, "", tmp_path),
        module,
        {"prompt": prompts},
        inputs,
        task_ids,
        labels,
        lengths=lengths,
        decode=decode,
    )
    for row, (tokens, task, label_set) in enumerate(zip(inputs, task_ids, labels, strict=True)):
        expected = [likelihood(tokens, task, label) for label in label_set.tokens]
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)
