"""What is found by its file name: a folder of modules, and the modules of installed packages (entry points)."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from engine.errors import UserError, did_you_mean


class Registry:
    """The modules of one kind, each with a class `Config` that validates a section whose `type` is the module's name.

    Args:
        what: the kind in words, as in "task".
        package: of the folder; files that begin with an underscore do not count.
        paths: where the folder lies.
        group: of the entry points, name → module.
        default: the `type` of a section that names none; None: it must.
    """

    def __init__(self, what: str, package: str, paths: Any, group: str, default: str | None = None) -> None:
        self.what, self.package, self.paths, self.group, self.default = what, package, paths, group, default

    def own(self) -> dict[str, str]:
        """Returns {name: module} of the folder."""
        names = [info.name for info in pkgutil.iter_modules(self.paths) if not info.name.startswith("_")]
        return {name: f"{self.package}.{name}" for name in names}

    def known(self) -> dict[str, str]:
        """Returns {name: module} of the folder and of installed packages."""
        return {point.name: point.value for point in importlib.metadata.entry_points(group=self.group)} | self.own()

    def module(self, name: str) -> Any:
        """Imports the module of a name.

        Raises:
            UserError: there is none.
        """
        found = self.own().get(name) or self.known().get(name)
        if found is None:
            raise UserError(f"unknown {self.what} '{name}'{did_you_mean(name, list(self.known()))}")
        try:
            return importlib.import_module(found)
        except ImportError as error:
            raise UserError(f"{self.what} '{name}' cannot be imported from {found}: {error}") from None

    def validate(self, value: Any) -> Any:
        """Validates a section by the class that its `type` names; anything that is no mapping is given back as it is."""
        if not isinstance(value, dict):
            return value
        name = value.get("type", self.default)
        if not isinstance(name, str):
            raise self._wrong_type("missing" if name is None else "string_type", name)
        try:
            chosen = self.module(name).Config
        except UserError as error:
            raise self._wrong_type(PydanticCustomError("unknown_type", "{message}", {"message": str(error)}), name) from None
        return chosen.model_validate({**value, "type": name})

    def _wrong_type(self, kind: Any, name: Any) -> ValidationError:
        return ValidationError.from_exception_data(self.what, [{"type": kind, "loc": ("type",), "input": name}])
