"""`key=value` on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from engine.errors import UserError

LAYOUT = ("--layout", "quoting=none")
"""The option that says how files are laid out, with an example."""


def pairs(settings: Sequence[str], option: str, example: str) -> dict[str, Any]:
    """Returns {key: value} of `key=value` texts; a value that is a mapping or a list is JSON.

    Args:
        option, example: for the message.

    Raises:
        UserError: one that is none.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise UserError(f"{option} {key}: write it as key=value, as in {option} {example}")
        try:
            found[key] = json.loads(value) if value.startswith(("{", "[")) else value
        except json.JSONDecodeError as error:
            raise UserError(f"{option} {setting}: not valid JSON: {error.msg}") from None
    return found
