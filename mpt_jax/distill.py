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
from mpt_jax.prompted_t5 import Output, batch_prompts, encoder_mask, forward
from mpt_jax.prompts.base import Prompt, number_of_groups

Batch = dict[str, jax.Array]
Aux = dict[str, jax.Array]
LossFn = Callable[..., tuple[jax.Array, Aux]]  # (trainable, frozen, batch, key, amounts=None), see `make_loss`


class Amounts(NamedTuple):
    """What the sums of a batch are divided by, [G] float32 of each group.

    They are counted in the batch's integer arrays and weights, so that they are known before anything of it is computed.
    """

    tokens: jax.Array  # sum of the targets' weights
    encoder: jax.Array  # positions where hidden states are compared
    decoder: jax.Array


class Distillation(NamedTuple):
    """Terms per position; those that the configuration leaves out are None.

    Of hidden states, the squared distance: the mean over width and layers, 0 where nothing is compared.
    """

    kl: jax.Array | None  # [B,L] KL(teacher‖student), times the target's weight
    encoder: jax.Array | None  # [B,S]
    decoder: jax.Array | None  # [B,L]


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
        both = _compared(student.encoder_mask, teacher.encoder_mask, batch)
        shared = both.shape[1]
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


def count_amounts(frozen: Any, batch: Batch, prompt_module: Prompt | None, groups: tuple[int, ...]) -> Amounts:
    """The amounts of a batch; of hidden states, none without teachers. `frozen` is that of the loss."""
    num_groups, (encoder_ids, decoder_ids) = number_of_groups(groups), _group_ids(batch, groups)
    weights = batch["loss_weights"].astype(jnp.float32)
    tokens = group_sum(weights, decoder_ids, num_groups)
    if prompt_module is None or "teacher" not in frozen:
        return Amounts(tokens, jnp.zeros(num_groups), jnp.zeros(num_groups))
    student = encoder_mask(batch, prompt_module.length, prompt_module.mask(batch["task_ids"]))
    teacher = encoder_mask(batch, frozen["teacher"].shape[-2])
    encoder = group_sum(_compared(student, teacher, batch), encoder_ids, num_groups)
    return Amounts(tokens, encoder, group_sum(weights > 0, decoder_ids, num_groups))


def make_loss(model: T5, prompt_module: Prompt | None, cfg: LossConfig, groups: tuple[int, ...]) -> LossFn:
    """The loss of every run: `loss_fn(trainable, frozen, batch, key, amounts=None) -> (loss, aux)`.

    `trainable` is the prompt module's parameters, with `frozen["backbone"]` the model's; or, without a prompt module,
    `{"backbone": params}`. `frozen["teacher"]` [N,P,D], when there, holds each stream's teacher prompt and switches
    distillation on. `key` drives the student's dropout; None switches it off. The teacher has none. `amounts` are what
    `count_amounts` counts in this batch (None: it does) or in a larger one, of which this batch is a part; the parts' losses,
    aux and gradients then add up to the larger one's.

    The loss is the sum over groups of CE + λ (KL + hidden), each summed or averaged within the group, so groups do not
    influence one another. Hidden distances are means over positions and width (encoder's plus decoder's); under "sum"
    they are multiplied by the group's number of target tokens, so that λ means the same under both normalizations.

    aux has arrays [G] without gradient: "loss", its parts "ce", "kl", "hidden" (not multiplied by λ), "tokens" (the sum
    of weights) and "correct" (of these, those where the most probable token is the target).
    """
    num_groups = number_of_groups(groups)

    def loss_fn(
        trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None, amounts: Amounts | None = None
    ) -> tuple[jax.Array, Aux]:
        params = trainable["backbone"] if prompt_module is None else frozen["backbone"]
        prompt = prompt_mask = None
        if prompt_module is not None:
            prompt, prompt_mask = batch_prompts(prompt_module, trainable, model, params, batch)
        teacher_prompts = frozen.get("teacher")
        hidden = "none" if teacher_prompts is None else _hidden_needed(cfg)
        student = forward(model, params, batch, prompt, prompt_mask=prompt_mask, dropout_key=key, hidden=hidden)

        whole = count_amounts(frozen, batch, prompt_module, groups) if amounts is None else amounts
        encoder_ids, group_ids = _group_ids(batch, groups)
        targets, weights = batch["decoder_target_tokens"], batch["loss_weights"].astype(jnp.float32)
        per_token = cross_entropy(student.logits, targets, weights, z_loss=cfg.z_loss, label_smoothing=cfg.label_smoothing)
        ce = group_reduce(per_token, whole.tokens, group_ids, cfg.normalization)
        tokens = group_sum(weights, group_ids, num_groups)
        likeliest = target_logits(student.logits, targets) >= student.logits.max(axis=-1)
        correct = group_sum(likeliest * weights, group_ids, num_groups)
        kl = distance = jnp.zeros(num_groups)
        if teacher_prompts is not None:
            _check_lengths(prompt, teacher_prompts, batch)
            teacher = forward(model, params, batch, teacher_prompts[batch["task_ids"]], hidden=hidden)
            terms = distillation(student, teacher, batch, cfg)
            if terms.kl is not None:
                kl = group_reduce(terms.kl, whole.tokens, group_ids, cfg.normalization)
            for part, ids, amount in (
                (terms.encoder, encoder_ids, whole.encoder),
                (terms.decoder, group_ids, whole.decoder),
            ):
                if part is not None:
                    mean = safe_divide(group_sum(part, ids, num_groups), amount)
                    distance = distance + (mean if cfg.normalization == "mean" else mean * whole.tokens)
        loss = ce + cfg.distill_weight * (kl + distance)
        aux = {"loss": loss, "ce": ce, "kl": kl, "hidden": distance, "tokens": tokens, "correct": correct}
        return loss.sum(), jax.lax.stop_gradient(aux)

    return loss_fn


def _group_ids(batch: Batch, groups: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The group of each row [B] or, packed, of each position of the encoder [B,S] and of the decoder [B,L]."""
    of_examples = jnp.asarray(groups)[batch["task_ids"]]
    return of_positions(of_examples, batch.get("encoder_segments")), of_positions(of_examples, batch.get("decoder_segments"))


def _compared(student_mask: jax.Array, teacher_mask: jax.Array, batch: Batch) -> jax.Array:
    """Encoder positions whose states are compared, bool [B,S] of the shorter of both; matched from the right."""
    shared = min(student_mask.shape[1], teacher_mask.shape[1])
    return student_mask[:, -shared:] & teacher_mask[:, -shared:] & _with_targets(batch)[:, -shared:]


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


def _distance(pairs: list[tuple[jax.Array, jax.Array]], mask: jax.Array) -> jax.Array:
    """Squared distance [B,S] averaged over width and layers, at the positions of mask [B,S]."""
    squares = [jnp.square(s.astype(jnp.float32) - t.astype(jnp.float32)).mean(axis=-1) for s, t in pairs]
    # where, not a product: an infinite or NaN state of a masked position must not reach the loss
    return jnp.where(mask, sum(squares) / len(squares), 0.0)
