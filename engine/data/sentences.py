"""Where sentences begin, by their signs: full stops, question and exclamation marks, line breaks, HTML's too."""

from __future__ import annotations

import re

BORDER = re.compile(r"(?:<br\s*/?>)+|\n+|(?<=[.!?])\s+|(?<=[。！？])(?=.)")


def sentences_of(text: str) -> list[str]:
    """Cuts a text into its sentences; order kept."""
    return [part.strip() for part in BORDER.split(text) if part.strip()]


def sentence_starts(text: str) -> list[int]:
    """Returns the characters behind which a sentence ends and another begins."""
    return [match.end() for match in BORDER.finditer(text)]
