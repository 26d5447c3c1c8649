"""Tasks registered with seqio when this package is imported (`DataConfig.task_modules` names it)."""

from tasks import files, mini, mpt_sources, pretrain, sketch

__all__ = ["files", "mini", "mpt_sources", "pretrain", "sketch"]
