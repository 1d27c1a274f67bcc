"""What pydantic finds wrong, in one line that names the key."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from engine.errors import UserError


class Problem(NamedTuple):
    """The error that tells most of a section."""

    key: list[str]
    """Parts of the key that is wrong."""
    line: list[str]
    """Parts of the key on whose line it stands."""
    message: str
    missing: bool
    """Something is not there that is needed."""


def worst_problem(error: ValidationError) -> Problem:
    """Returns the error that tells most: unions report every branch they tried, the deepest is the one the user meant."""
    worst = max(error.errors(), key=lambda item: (item["type"] == "unknown_key", len(item["loc"])))
    key = [str(part) for part in worst["loc"] if not str(part).startswith("function-")]
    message = re.sub(r"^Value error, ", "", worst["msg"])
    given = worst.get("input")
    shown = f" (given: {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    line = [*key, worst["ctx"]["key"]] if worst["type"] == "unknown_key" else key
    missing = worst["type"].startswith(("missing", "union_tag"))
    return Problem(key, line, f"{message[:1].lower()}{message[1:]}{shown}", missing)


Config = TypeVar("Config", bound=BaseModel)


def load_section(config: type[Config], raw: dict[str, Any], where: str) -> Config:
    """Validates what a command line says as a recipe's section would be.

    Args:
        where: the option or argument that says it, for messages.

    Raises:
        UserError: one line: what is wrong and the fix.
    """
    try:
        return config.model_validate(raw)
    except ValidationError as error:
        worst = worst_problem(error)
        raise UserError(f"{where}: {''.join(f'{part}: ' for part in worst.key)}{worst.message}") from None
