"""Whether a study can be planned at all, from its configuration alone; and which of its stages its methods need."""

from collections.abc import Iterator, Sequence

from mpt_jax.config import PROMPT_INITS, PipelineConfig, StageConfig, nearest
from mpt_jax.errors import UserError
from mpt_jax.studies.results import METHODS

SOURCE_SAMPLING = ("mpt", "proportional")
MEASURES = ("loss", "average_token", "per_token")  # of RetrievalConfig.by
GIVEN = ("file", "text")  # of PromptConfig.init: a prompt that is no random start
USES = ("best", "average", "mixture")  # of RetrievalConfig.use
STARTS = tuple(init for init in PROMPT_INITS if init != "file")  # of StageConfig.init
FROM_SOURCES = "its prompts start from a source training's"
NO_START = {"mpt": FROM_SOURCES, "spot": FROM_SOURCES, "model_tuning": "it trains no prompt"}  # a target's method → why


def check(cfg: PipelineConfig) -> None:
    """UserError, which names the field, for a study that cannot be planned."""
    for field in ("sources", "targets", "seeds", "full_seeds", "source_seeds", "k_shots"):
        values = getattr(cfg, field)
        if field == "sources" and not values and not needs_source(cfg) and not needs_teachers(cfg):
            continue
        if len(set(values)) < len(values) or not values:
            raise UserError(f"PipelineConfig.{field} must list different values, at least one, not {values}.")
    if any(k < 0 for k in cfg.k_shots):
        raise UserError(f"PipelineConfig.k_shots must not be negative (0 = all examples), not {cfg.k_shots}.")
    if needs_source(cfg) and len(cfg.sources) < 2:
        raise UserError(f"PipelineConfig.sources must name two tasks or more for MPT, not {cfg.sources}.")
    for field, seeds in (("seeds", cfg.seeds), ("full_seeds", cfg.full_seeds), ("source_seeds", cfg.source_seeds)):
        if any(not 0 <= seed < 2**31 for seed in seeds):
            raise UserError(f"PipelineConfig.{field} must be from 0 to {2**31 - 1}, not {seeds}.")
    for k in cfg.k_shots:
        field, seeds = ("seeds", cfg.seeds) if k else ("full_seeds", cfg.full_seeds)
        if len(cfg.source_seeds) > len(seeds):
            raise UserError(
                f"PipelineConfig.source_seeds has {len(cfg.source_seeds)} source trainings, but PipelineConfig.{field} only "
                f"{len(seeds)} seeds to start from them; give as many, or fewer source trainings."
            )
    for k in cfg.k_shots:
        field = "few_shot" if k else "full_data"
        methods = getattr(cfg, field)
        for method in methods:
            if method not in METHODS:
                raise UserError(
                    f"PipelineConfig.{field} has no method '{method}'; it has {', '.join(METHODS)}.{nearest(method, METHODS)}"
                )
        if not methods:
            raise UserError(
                f"PipelineConfig.{field} is empty but PipelineConfig.k_shots has {k}; name a method or leave {k} out."
            )
    if cfg.source_sampling not in SOURCE_SAMPLING:
        raise UserError(
            f"PipelineConfig.source_sampling must be one of {', '.join(SOURCE_SAMPLING)}, not '{cfg.source_sampling}'."
            f"{nearest(cfg.source_sampling, SOURCE_SAMPLING)}"
        )
    for field, zero in (("bank_size", "no limit"), ("max_test_examples", "all")):
        if getattr(cfg, field) < 0:
            raise UserError(f"PipelineConfig.{field} must not be negative (0 = {zero}), not {getattr(cfg, field)}.")
    if cfg.claim_timeout <= 0:
        raise UserError(f"PipelineConfig.claim_timeout must be positive, not {cfg.claim_timeout}.")
    if any(uses(cfg, "spot", k) for k in cfg.k_shots):
        _check_retrieval(cfg)
    _check_stages(cfg)
    _check_own(cfg)
    for target, tasks in cfg.zero_shot.items():
        _check_zero_shot(cfg, target, tasks)


def _check_stages(cfg: PipelineConfig) -> None:
    for where, settings, may_be_untrained in _stages(cfg):
        if not settings.rules:
            raise UserError(f'StageConfig.rules of {where} is empty; give a rate for each parameter, such as ((".*", 0.3),).')
        if settings.steps < 0 or (settings.steps == 0 and not may_be_untrained):
            why = "must not be negative" if settings.steps else "is 0, so that its prompts would stay untrained"
            raise UserError(f"StageConfig.steps of {where} {why}; give the number of steps.")


def _stages(cfg: PipelineConfig) -> Iterator[tuple[str, StageConfig, bool]]:
    """(field, its value, whether it may have no steps) of every stage that the study needs.

    Without steps MPT and SPoT score what they transfer, model tuning the backbone as it is, prompt tuning a prompt that is given.
    """
    if needs_teachers(cfg):
        yield "PipelineConfig.teacher", cfg.teacher, False
    if needs_source(cfg):
        yield "PipelineConfig.source", cfg.source, False
    for field in dict.fromkeys("few_shot" if k else "full_data" for k in cfg.k_shots):
        for method, settings in getattr(cfg, field).items():
            yield f"PipelineConfig.{field}['{method}']", settings, method != "prompt_tuning" or cfg.base.prompt.init in GIVEN
    if any(uses(cfg, "spot", k) for k in cfg.k_shots):
        for name in cfg.retrieval.trainings:
            yield f"RetrievalConfig.stages['{name}']", cfg.retrieval.stages[name], False


def _check_own(cfg: PipelineConfig) -> None:
    """What a stage may have of its own."""

    def look(where: str, stage: StageConfig, why_not: str = "") -> None:
        if stage.warmup_steps < -1:
            raise UserError(
                f"{where} has the StageConfig.warmup_steps {stage.warmup_steps}; it must be 0 or more, or -1, which stands for "
                "OptimizerConfig.warmup_steps."
            )
        if stage.init not in ("", *STARTS):
            raise UserError(
                f"{where} has the StageConfig.init '{stage.init}'; it must be one of {', '.join(STARTS)}, or '', which "
                f"stands for PromptConfig.init.{nearest(stage.init, STARTS)}"
            )
        if stage.init and why_not:
            raise UserError(f"{where} has the StageConfig.init '{stage.init}', but {why_not}; clear it.")

    for field in ("teacher", "source"):
        look(f"PipelineConfig.{field}", getattr(cfg, field))
    for name, stage in cfg.retrieval.stages.items():
        look(f"RetrievalConfig.stages['{name}']", stage)
    for field in ("few_shot", "full_data"):
        for method, stage in getattr(cfg, field).items():
            look(f"PipelineConfig.{field}['{method}']", stage, NO_START.get(method, ""))


def _check_retrieval(cfg: PipelineConfig) -> None:
    retrieval = cfg.retrieval
    for field, known in (("by", MEASURES), ("use", USES)):
        if (value := getattr(retrieval, field)) not in known:
            raise UserError(f"RetrievalConfig.{field} must be one of {', '.join(known)}, not '{value}'.{nearest(value, known)}")
    if retrieval.max_examples < 0:
        raise UserError(f"RetrievalConfig.max_examples must not be negative (0 = all), not {retrieval.max_examples}.")
    count = len(cfg.sources)
    if not 0 <= retrieval.top <= count:
        raise UserError(
            f"RetrievalConfig.top must be from 0 (all) to {count}, the number of PipelineConfig.sources, not {retrieval.top}."
        )
    for name in (name for name in retrieval.trainings if name not in retrieval.stages):
        why = f"by='{retrieval.by}'" if name == "embedding" else f"use='{retrieval.use}'"
        raise UserError(
            f"RetrievalConfig.{why} takes a training that RetrievalConfig.stages lacks; add '{name}': @StageConfig() to it."
        )
    if unknown := sorted(retrieval.stages.keys() - {"embedding", "mixture"}):
        raise UserError(f"RetrievalConfig.stages has '{unknown[0]}'; it may have 'embedding' and 'mixture'.")
    several = retrieval.use == "best" and (retrieval.top or count) > 1
    few = [k for k in cfg.k_shots if k and uses(cfg, "spot", k)]
    if several and (few or not cfg.base.train.eval_period):
        why = f"few-shot runs (k = {few[0]}) have no" if few else "TrainConfig.eval_period=0 makes no"
        raise UserError(
            f"RetrievalConfig.use='best' of several sources chooses among runs by their validation score, but {why} validation; "
            "give RetrievalConfig.top=1 or use='average' or 'mixture'"
            + (", or leave SPoT to k_shots=(0,)." if few else ", or an eval_period.")
        )


def _check_zero_shot(cfg: PipelineConfig, target: str, tasks: Sequence[str]) -> None:
    if target not in cfg.targets:
        raise UserError(
            f"PipelineConfig.zero_shot has '{target}', which is none of PipelineConfig.targets, {', '.join(cfg.targets)}; its "
            f"keys are the tasks that are trained on.{nearest(target, cfg.targets)}"
        )
    field = f"PipelineConfig.zero_shot['{target}']"
    if not tasks:
        raise UserError(f"{field} names no task; give one or more, or leave '{target}' out.")
    if again := [task for n, task in enumerate(tasks) if task in tasks[:n]]:
        raise UserError(f"{field} has '{again[0]}' twice; give each task once.")
    if target in tasks:
        raise UserError(f"{field} has '{target}' itself, which its runs are trained and scored on anyway; leave it out there.")


def uses(cfg: PipelineConfig, method: str, k: int) -> bool:
    """Whether the study trains targets by the method with k examples per class (0 = all)."""
    return method in (cfg.few_shot if k else cfg.full_data)


def needs_source(cfg: PipelineConfig) -> bool:
    """Whether a method starts from MPT's source training."""
    return any(uses(cfg, "mpt", k) for k in cfg.k_shots)


def needs_teachers(cfg: PipelineConfig) -> bool:
    """Whether a prompt for each source task is trained, to start from or to distil."""
    spot = any(uses(cfg, "spot", k) for k in cfg.k_shots)
    return spot or (cfg.distill and needs_source(cfg))
