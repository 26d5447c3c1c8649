"""What a user is told by one sentence instead of a traceback."""

import errno

# What the system says of a file and the user can mend.
MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


class UserError(Exception):
    """A mistake in what the user gave: one sentence with what is wrong, the value, the key or file, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def sentence(error: BaseException) -> str | None:
    """What the command line says of an error in place of a traceback; None of a bug, and of what is no error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in MENDABLE:
        return f"{error.strerror}: {error.filename or 'while writing a file'}. Mend that and run the same command again."
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):  # JAX's: of an allocation or of the compiler
        reason = " ".join(str(error).partition("RESOURCE_EXHAUSTED:")[2].split())[:200].rstrip(" .")
        return (
            f"A device has not the memory for this ({reason}); raise TrainConfig.num_microbatches or "
            "PartitionConfig.num_partitions, set T5Config.remat='full', or lower BATCH_SIZE or, where it decodes, "
            "DecodeConfig.batch_size; `plan` tells beforehand what a run needs."
        )
    return None
