"""What a user can mend: one clear line and a fixed exit status, never a traceback."""

USER_ERROR = 2
"""Exit status of every command whose input has to be changed before it can succeed."""


class UserError(Exception):
    """Bad input. The message is one line that names the file, line or key and the fix."""


def did_you_mean(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """Returns `: did you mean 'x'?`, or the list of what is known when nothing is close."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f": did you mean '{near[0]}'?" if near else f" (known: {', '.join(sorted(known))})"
