"""Tasks registered with seqio when this package is imported (`DataConfig.task_modules` names it)."""

from tasks import c4, files, glue, mini, mixtures, mrqa, nlg, others, pretrain, sketch, superglue

__all__ = ["c4", "files", "glue", "mini", "mixtures", "mrqa", "nlg", "others", "pretrain", "sketch", "superglue"]
