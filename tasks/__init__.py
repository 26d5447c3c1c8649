"""Tasks registered with seqio when this package is imported (`DataConfig.task_modules` names it)."""

from tasks import c4, files, glue, mini, mixtures, mrqa, nlg, others, own, pretrain, sketch, superglue

__all__ = ["c4", "files", "glue", "mini", "mixtures", "mrqa", "nlg", "others", "own", "pretrain", "sketch", "superglue"]

register_own = own.register  # of `DataConfig.own_tasks`
