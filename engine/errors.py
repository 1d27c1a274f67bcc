"""What a user can mend: one clear line and a fixed exit status, never a traceback."""

USER_ERROR = 2
"""Exit status of every command whose input has to be changed before it can succeed."""
PREEMPTED = 75
"""Exit status of a run that was asked to stop and can go on later (EX_TEMPFAIL: run it again)."""

NODE_FAILED = 76
"""Exit status of a run that lost another node or the link to it: running it again may help."""


class UserError(Exception):
    """Bad input. The message is one line that names the file, line or key and the fix."""


def did_you_mean(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """Returns `: did you mean 'x'?`, or the list of what is known when nothing is close and the list is short."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f": did you mean '{near[0]}'?"
    return f" (known: {', '.join(sorted(known))})" if len(known) <= 20 else ""


_FULL = ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122", "file write failed", "unexpected pos")


def disk_full(error: BaseException) -> bool:
    """True when `error` says that a disk or a quota is full, whichever library raised it.

    torch, safetensors and shutil.copytree hide the number of the error in their text.
    """
    import errno

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error) for sign in _FULL)
