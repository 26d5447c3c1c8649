"""MPT's distillation (Wang et al. 2023), and the complete loss of a training step.

L = CE + λ (KL + hidden). The teacher is another prompt on the same frozen backbone; nothing is differentiated through it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax.config import LossConfig
from mpt_jax.errors import UserError
from mpt_jax.losses import cross_entropy, group_reduce, group_sum, of_positions, safe_divide, target_logits
from mpt_jax.models.t5 import T5
from mpt_jax.prompted_t5 import Output, batch_prompts, forward
from mpt_jax.prompts.base import Prompt, number_of_groups

Batch = dict[str, jax.Array]
Aux = dict[str, jax.Array]
LossFn = Callable[[Any, Any, Batch, jax.Array | None], tuple[jax.Array, Aux]]


class Distance(NamedTuple):
    """Squared distance of hidden states at each position: the mean over width and layers."""

    squares: jax.Array  # [B,S], 0 where nothing is compared
    compared: jax.Array  # [B,S] float32, 1 where it is


class Distillation(NamedTuple):
    """Terms per position; those that the configuration leaves out are None."""

    kl: jax.Array | None  # [B,L] KL(teacher‖student), times the target's weight
    encoder: Distance | None
    decoder: Distance | None


def distillation(student: Output, teacher: Output, batch: Batch, cfg: LossConfig) -> Distillation:
    """How far the student is from the teacher; all zero when they are equal.

    KL compares softmax(logits / τ) on target positions (without the factor τ² that some add, so λ = 0.9 at τ ≠ 1 means
    the formula of the paper). Hidden states are compared where both have an unmasked position: encoder positions are
    matched from the right, so that text meets text when the teacher's prompt has another length; decoder positions are
    those with a target. An example without any target (a row that fills up a batch) counts nowhere. A stack's top layer is
    its output after the final norm, the others are the outputs of its blocks (the hidden states that transformers reports).
    The teacher gets no gradient.
    """
    teacher = jax.lax.stop_gradient(teacher)
    weights = batch["loss_weights"].astype(jnp.float32)
    kl = encoder = decoder = None
    if cfg.distill_logits:
        kl = kl_divergence(teacher.logits, student.logits, cfg.temperature) * weights
    if cfg.hidden_layers != "none" and cfg.distill_encoder:
        shared = min(student.encoder_mask.shape[1], teacher.encoder_mask.shape[1])
        both = student.encoder_mask[:, -shared:] & teacher.encoder_mask[:, -shared:]
        both = both & _with_targets(batch)[:, -shared:]
        encoder = _distance(
            [(s[..., -shared:, :], t[..., -shared:, :]) for s, t in _layers(student, teacher, "encoder", cfg.hidden_layers)], both
        )
    if cfg.hidden_layers != "none" and cfg.distill_decoder:
        decoder = _distance(_layers(student, teacher, "decoder", cfg.hidden_layers), weights > 0)
    return Distillation(kl, encoder, decoder)


def kl_divergence(teacher_logits: jax.Array, student_logits: jax.Array, temperature: float) -> jax.Array:
    """Σ_v p (log p - log q) of p = softmax(teacher / τ), q = softmax(student / τ): [...,V] → [...], float32."""
    log_p = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def make_loss(model: T5, prompt_module: Prompt | None, cfg: LossConfig, groups: tuple[int, ...]) -> LossFn:
    """The loss of every run: `loss_fn(trainable, frozen, batch, key) -> (loss, aux)`.

    `trainable` is the prompt module's parameters, with `frozen["backbone"]` the model's; or, without a prompt module,
    `{"backbone": params}`. `frozen["teacher"]` [N,P,D], when there, holds each stream's teacher prompt and switches
    distillation on. `key` drives the student's dropout; None switches it off. The teacher has none.

    The loss is the sum over groups of CE + λ (KL + hidden), each summed or averaged within the group, so groups do not
    influence one another. Hidden distances are means over positions and width (encoder's plus decoder's); under "sum"
    they are multiplied by the group's number of target tokens, so that λ means the same under both normalizations.

    aux has arrays [G] without gradient: "loss", its parts "ce", "kl", "hidden" (not multiplied by λ), "tokens" (the sum
    of weights) and "correct" (of these, those where the most probable token is the target).
    """
    num_groups = number_of_groups(groups)

    def loss_fn(trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Aux]:
        params = trainable["backbone"] if prompt_module is None else frozen["backbone"]
        prompt = None
        if prompt_module is not None:
            prompt = batch_prompts(prompt_module, trainable, model, params, batch)
        teacher_prompts = frozen.get("teacher")
        hidden = "none" if teacher_prompts is None else _hidden_needed(cfg)
        student = forward(model, params, batch, prompt, dropout_key=key, hidden=hidden)

        groups_of_examples = jnp.asarray(groups)[batch["task_ids"]]
        group_ids = of_positions(groups_of_examples, batch.get("decoder_segments"))
        targets, weights = batch["decoder_target_tokens"], batch["loss_weights"].astype(jnp.float32)
        per_token = cross_entropy(student.logits, targets, weights, z_loss=cfg.z_loss, label_smoothing=cfg.label_smoothing)
        ce = group_reduce(per_token, weights, group_ids, num_groups, cfg.normalization)
        tokens = group_sum(weights, group_ids, num_groups)
        likeliest = target_logits(student.logits, targets) >= student.logits.max(axis=-1)
        correct = group_sum(likeliest * weights, group_ids, num_groups)
        kl = distance = jnp.zeros(num_groups)
        if teacher_prompts is not None:
            _check_lengths(prompt, teacher_prompts, batch)
            teacher = forward(model, params, batch, teacher_prompts[batch["task_ids"]], hidden=hidden)
            terms = distillation(student, teacher, batch, cfg)
            if terms.kl is not None:
                kl = group_reduce(terms.kl, weights, group_ids, num_groups, cfg.normalization)
            encoder_groups = of_positions(groups_of_examples, batch.get("encoder_segments"))
            for part, ids in ((terms.encoder, encoder_groups), (terms.decoder, group_ids)):
                if part is not None:
                    mean = safe_divide(*(group_sum(value, ids, num_groups) for value in part))
                    distance = distance + (mean if cfg.normalization == "mean" else mean * tokens)
        loss = ce + cfg.distill_weight * (kl + distance)
        aux = {"loss": loss, "ce": ce, "kl": kl, "hidden": distance, "tokens": tokens, "correct": correct}
        return loss.sum(), jax.lax.stop_gradient(aux)

    return loss_fn


def _check_lengths(prompt: jax.Array | None, teachers: jax.Array, batch: Batch) -> None:
    """UserError where packed rows leave room for the student's prompts and the teachers' are of another length."""
    if "encoder_segments" in batch and prompt is not None and prompt.shape[-2] != teachers.shape[-2]:
        raise UserError(
            f"LossConfig.teachers has prompts of {teachers.shape[-2]} tokens, but DataConfig.pack_lengths packs examples with "
            f"room for PromptConfig.length (PROMPT_LENGTH) {prompt.shape[-2]}; make them equal, or clear pack_lengths."
        )


def _with_targets(batch: Batch) -> jax.Array:
    """Whether an encoder position's example has any target: bool [B,1], packed [B,S]."""
    counted, segments = batch["loss_weights"] > 0, batch.get("decoder_segments")
    if segments is None:
        return counted.any(axis=1, keepdims=True)
    examples = jnp.arange(1, batch["task_ids"].shape[1] + 1)[None, None]
    having = (counted[..., None] & (segments[..., None] == examples)).any(axis=1)  # [B,E]
    return of_positions(having, batch["encoder_segments"])


def _hidden_needed(cfg: LossConfig) -> str:
    """What `forward` is to return."""
    if not (cfg.distill_encoder or cfg.distill_decoder):
        return "none"
    return cfg.hidden_layers if cfg.hidden_layers in ("none", "last") else "all"


def _layers(student: Output, teacher: Output, stack: str, which: str) -> list[tuple[jax.Array, jax.Array]]:
    """Pairs of hidden states [B,S,D] to compare.

    Raises:
        UserError: the stack has no such layer.
    """
    tops = getattr(student, f"{stack}_output"), getattr(teacher, f"{stack}_output")
    if which == "last":
        return [tops]
    blocks = getattr(student, f"{stack}_hidden"), getattr(teacher, f"{stack}_hidden")
    depth = len(blocks[0])
    numbers = range(1, depth + 1) if which == "all" else [int(number) for number in which.split(",")]
    if wrong := [number for number in numbers if abs(number) > depth]:
        raise UserError(f"LossConfig.hidden_layers is '{which}', but the {stack} has no layer {wrong[0]}: it has {depth}.")
    indices = sorted({number - 1 if number > 0 else depth + number for number in numbers})
    return [tops if index == depth - 1 else (blocks[0][index], blocks[1][index]) for index in indices]


def _distance(pairs: list[tuple[jax.Array, jax.Array]], mask: jax.Array) -> Distance:
    """Squared distance averaged over width and layers, at the positions of mask [B,S]."""
    squares = [jnp.square(s.astype(jnp.float32) - t.astype(jnp.float32)).mean(axis=-1) for s, t in pairs]
    # where, not a product: an infinite or NaN state of a masked position must not reach the loss
    mean = jnp.where(mask, sum(squares) / len(squares), 0.0)
    return Distance(mean, mask.astype(jnp.float32))
