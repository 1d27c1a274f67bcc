"""Strict typed configuration: an unknown key is an error with a suggestion, a reference knows how to be found.

A recipe is a YAML file. Every stage's section is validated by a `Strict` class that lives beside the code that
reads it; this module knows none of them. What a stage does not say it takes from the stage before: see engine/inheritance.py.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, core_schema

from engine.errors import UserError, did_you_mean
from engine.inheritance import INHERITED, Inheritance, inherit
from engine.problems import worst_problem
from engine.recipe_yaml import AS_WRITTEN, RecipeLoader, key_lines
from engine.seeds import SeedsError, expand_seeds
from engine.training.zero_files import find_zero_config


class Strict(BaseModel):
    """Base of every configuration class: frozen, typed, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    hint = did_you_mean(str(key), list(cls.model_fields))
                    context = {"message": f"unknown key '{key}'{hint}", "key": str(key)}
                    raise PydanticCustomError("unknown_key", "{message}", context)
        return data


def _fraction(value: Any) -> Any:
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


Fraction = Annotated[float, BeforeValidator(_fraction), Field(ge=0.0, le=1.0)]
"""A share between 0 and 1; `6%` and `0.06` are the same."""


HUB = "hub:"
"""Begins the name of a data set of the Hugging Face hub."""
SAVED_DATA = ("dataset_dict.json", "state.json", "seq.in")
"""A directory that holds one of these is a data set, as `datasets` saves it, or as ATIS and SNIPS are laid out."""


def is_data(path: Path) -> bool:
    """Says whether a directory is a data set, see SAVED_DATA."""
    return any((path / name).is_file() for name in SAVED_DATA)


CORPUS_FILE = "corpus/corpus.json"
"""In the directory of a corpus: which shards there are."""


class _Reference(str):
    """A string that names something outside the recipe."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema(min_length=1))


class ModelRef(_Reference):
    """A stage of the same recipe, a directory, `package:NAME/path`, or a hub id."""


class TokenizerRef(ModelRef):
    """A ModelRef of which the tokenizer is taken: its directory needs no model."""


class CorpusRef(TokenizerRef):
    """A `corpus` stage of the same recipe, or the directory of one of an earlier run: tokens, and their tokenizer."""


class FileRef(_Reference):
    """A file, or several by a pattern (`*`, `?`, `[…]`, `**`): a path relative to the recipe, or `package:NAME/path`.

    `hub:OWNER/NAME` is a data set of the Hugging Face hub.
    """


class ZeroRef(_Reference):
    """A DeepSpeed JSON: the name of a file in ds_configs/ (zero0 … zero3) or a path (relative to the recipe)."""


def references(config: Any, where: str = "") -> Iterator[tuple[str, _Reference]]:
    """Yields (dotted key, reference) for every file or model that a validated section names."""
    if isinstance(config, _Reference):
        yield where, config
    elif isinstance(config, BaseModel):
        for name in type(config).model_fields:
            yield from references(getattr(config, name), f"{where}.{name}".lstrip("."))
    elif isinstance(config, (list, tuple)):
        for index, item in enumerate(config):
            yield from references(item, f"{where}[{index}]")
    elif isinstance(config, dict):
        for key, item in config.items():
            yield from references(item, f"{where}.{key}")


def package_path(reference: str) -> Path:
    """Finds `package:NAME/path` inside an installed Python package, without importing it.

    Raises:
        UserError: the package is not installed or has no such file.
    """
    package, _, inner = reference.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{reference}: no Python package '{package}' is installed: pip install it, or name a path")
    for root in spec.submodule_search_locations:
        if (Path(root) / inner).exists():
            return Path(root) / inner
    raise UserError(f"{reference}: the package '{package}' is installed but has no '{inner}'")


JOBS = "jobs"
"""Directory of a run's batch jobs, beside those of its stages."""
STAGE_FILE = "stage.json"
"""The record of a finished stage, in its directory."""


class Recipe:
    """A recipe file as read: its name, its seed and the raw section of every stage, in order."""

    def __init__(self, path: Path, data: dict[str, Any], lines: dict[str, int], runs: Path) -> None:
        self.path = path
        self.runs = runs
        self.seeded: dict[str, list[str]] = {}
        """{stage that says `seeds`: the stages of its seeds}."""
        self._lines = lines
        allowed = ["name", "seed", "stages"]
        for key in data:
            if key not in allowed:
                raise self.error(key, f"unknown key '{key}'{did_you_mean(key, allowed)}")
        self.name = data.get("name", path.stem)
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise self.error("name", "name must be letters, digits, '.', '_' or '-': it names a directory")
        self.seed = data.get("seed", 0)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise self.error("seed", f"seed must be a whole number of at least 0, not {self.seed!r}")
        stages = data.get("stages")
        if not isinstance(stages, dict) or not stages:
            raise self.error("stages", "a recipe needs stages: a mapping of stage name to {kind: section}")
        self.stages: dict[str, tuple[str, dict[str, Any]]] = {}
        for name, body in stages.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise self.error(f"stages.{name}", f"stage name '{name}' must be letters, digits, '_' or '-'")
            if name == JOBS:
                raise self.error(f"stages.{name}", f"no stage can be called '{JOBS}': the records of batch jobs lie there")
            if not isinstance(body, dict) or len(body) != 1:
                raise self.error(f"stages.{name}", f"stage '{name}' must hold exactly one kind, as in '{name}: {{finetune: …}}'")
            kind, section = next(iter(body.items()))
            if not isinstance(section, dict):
                raise self.error(f"stages.{name}.{kind}", f"'{kind}' must be a mapping of keys to values")
            self.stages[name] = (kind, section)
        try:
            self.stages, self.seeded = expand_seeds(self.stages, self.seed)
        except SeedsError as error:
            kind = self.stages[error.stage][0]
            raise self.error(f"stages.{error.stage}.{kind}.seeds", f"stages.{error.stage}.{kind}.{error}") from None
        self.inherited: dict[str, Inheritance] = inherit(self.stages, self._recorded_section)

    @classmethod
    def here(cls) -> Recipe:
        """Returns a recipe that finds what a command line names: relative paths start at the working directory."""
        return cls(Path("here.yaml"), {"stages": {"data": {"data": {}}}}, {}, Path("runs"))

    def error(self, key: str, message: str) -> UserError:
        """A UserError that names the recipe, the line of `key` (or of its nearest parent) and the message."""
        parts = key.split(".")
        if len(parts) > 1 and parts[0] == "stages":
            parts[1] = self.owner(parts[1])
        probe = ".".join(parts)
        while probe and probe not in self._lines:
            probe = probe.rpartition(".")[0]
        line = f":{self._lines[probe]}" if probe else ""
        return UserError(f"{self.path}{line}: {message}")

    def owner(self, stage: str) -> str:
        """Returns the stage of the file that says what `stage` is: itself, or for that of one seed the one with the `seeds`."""
        return next((name for name, parts in self.seeded.items() if stage in parts), stage)

    def directory(self, stage: str) -> Path:
        """Where the finished stage lies: `runs/<recipe>/<stage>`."""
        return self.runs / self.name / stage

    def section(self, stage: str, config: type[Section]) -> Section:
        """Validates the section of `stage`, with what it inherits.

        Raises:
            UserError: one line: file, line, key, what is wrong and the fix.
        """
        kind, _ = self.stages[stage]
        where = f"stages.{stage}.{kind}"
        try:
            return config.model_validate(self.full_section(stage, list(config.model_fields)))
        except ValidationError as error:
            worst = worst_problem(error)
            key = ".".join([where, *worst.key])
            why = self._why_missing(stage, worst.key) if worst.missing else ""
            raise self.error(".".join([where, *worst.line]), f"{key}: {worst.message}{why}") from None

    def full_section(self, stage: str, known: list[str] | None = None) -> dict[str, Any]:
        """Returns the raw section of `stage` with what it inherits behind it.

        Args:
            known: the keys that its kind has; what it passes on without having it stays out. None: all.
        """
        inherited = self.inherited[stage].values
        return {**self.stages[stage][1], **{key: value for key, value in inherited.items() if known is None or key in known}}

    def _why_missing(self, stage: str, parts: list[str]) -> str:
        """Returns why nothing could be inherited where something is missing."""
        inheritance = self.inherited[stage]
        if not parts or parts[0] not in INHERITED:
            return ""
        if len(parts) == 1 and parts[0] not in self.stages[stage][1]:
            return f" and nothing can be inherited: {inheritance.reason}"
        origin = inheritance.offered.get(parts[0])
        if origin is None:
            return ""
        return f" ('{parts[0]}' is inherited as a whole or not at all: say all of it here, or change it in {origin})"

    def _recorded_section(self, reference: str) -> dict[str, Any] | None:
        """Returns the section in the stage.json of the directory that `reference` names, None where there is none."""
        try:
            record = json.loads((self._path(reference) / STAGE_FILE).read_text(encoding="utf-8"))
            return record["section"] if isinstance(record["section"], dict) else None
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None  # whether it is a model at all is seen when it is looked for

    def find(self, reference: _Reference, key: str) -> Path | str | list[Path]:
        """Returns what `reference` names: a path, the paths of a pattern, or a hub id unchanged.

        Args:
            reference: a validated reference.
            key: dotted key where it stands, for the line of an error.

        Raises:
            UserError: there is nothing by that name.
        """
        try:
            if isinstance(reference, ZeroRef):
                return self.find_zero(reference)
            return self.find_model(reference) if isinstance(reference, ModelRef) else self.find_data(reference)
        except UserError as error:
            raise self.error(key, f"{error}{self._inherited_from(key)}") from None

    def _inherited_from(self, key: str) -> str:
        """Returns who says `stages.NAME.KIND.…` where that stage does not say it itself."""
        parts = key.split(".")
        inheritance = self.inherited.get(parts[1]) if len(parts) > 3 else None
        origin = inheritance.origins.get(parts[3]) if inheritance else None
        return f" ('{parts[3]}' is inherited from {origin})" if origin else ""

    def find_file(self, reference: str) -> Path:
        """Returns the one existing file that a FileRef names; raises UserError when there is none, or several."""
        found = self.find_data(reference)
        if not isinstance(found, Path) or found.is_dir():
            raise UserError(f"{reference}: one file is needed here, by its path")
        return found

    def find_data(self, reference: str) -> Path | str | list[Path]:
        """Returns what a FileRef names: one path, the sorted paths of a pattern, or a name on the hub unchanged.

        Relative paths start at the recipe's directory. A directory is one of SAVED_DATA.

        Raises:
            UserError: there is no such file.
        """
        if reference.startswith(HUB):
            return str(reference)
        path = self._path(reference)
        if not path.exists() and glob.has_magic(str(reference)):
            found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
            if not found:
                raise UserError(f"{path}: no file of that pattern (relative paths start at the recipe's directory)")
            return found
        if not path.exists():
            raise UserError(f"{path}: no such file (relative paths start at the recipe's directory)")
        if path.is_dir() and not is_data(path):
            raise UserError(f"{path}: a directory where a file is needed")
        return path

    def find_zero(self, reference: str) -> Path:
        """Returns the DeepSpeed JSON that a ZeroRef names.

        Raises:
            UserError: there is none.
        """
        return find_zero_config(reference, self.path.parent)

    def find_model(self, reference: str) -> Path | str:
        """Returns the directory that a ModelRef names, or the hub id unchanged.

        Raises:
            UserError: nothing by that name, or a directory without a model in it, or a corpus, where one is needed.
        """
        if reference in self.stages:
            return self.directory(reference)
        path = self._path(reference)
        if not path.exists():
            # A hub id is `owner/name`; anything else was meant as a path or as a stage.
            if re.fullmatch(r"[\w.-]+/[\w.-]+", reference) and not reference.startswith("."):
                return reference
            known = did_you_mean(reference, list(self.stages))
            raise UserError(f"model '{reference}' is no stage of this recipe, no directory and no hub id (owner/name){known}")
        if isinstance(reference, CorpusRef) and not (path / CORPUS_FILE).is_file():
            raise UserError(f"{path}: no corpus (no {CORPUS_FILE}): a corpus stage makes one")
        if not isinstance(reference, TokenizerRef) and not (path / "config.json").is_file():
            raise UserError(f"{path}: not a model directory (no config.json)")
        return path

    def _path(self, reference: str) -> Path:
        if reference.startswith("package:"):
            return package_path(reference)
        return self.path.parent / Path(reference).expanduser()


Section = TypeVar("Section", bound=Strict)


def load_recipe(path: str | Path, overrides: list[str] | None = None, runs: str | Path = "runs") -> Recipe:
    """Reads a recipe and applies `a.b=c` overrides (values are YAML).

    Raises:
        UserError: unreadable file, broken YAML, an override of a stage that does not exist.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        lines = dict(key_lines(yaml.compose(text, Loader=RecipeLoader)))
        data = yaml.load(text, Loader=RecipeLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping with name and stages")
    for override in overrides or []:
        _apply(data, override)
    return Recipe(path, data, lines, Path(runs))


def _apply(data: dict[str, Any], override: str) -> None:
    """Sets one `a.b.c=value`; a leading `stages.` and the stage's kind may be left out (`teacher.train.epochs=2`)."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write it as key=value, as in --set teacher.train.epochs=2")
    parts = key.split(".")
    stages = data.get("stages")
    if parts[0] not in ("name", "seed", "stages"):
        parts = ["stages", *parts]
    if parts[0] == "stages" and isinstance(stages, dict) and len(parts) > 2:
        if parts[1] not in stages:
            raise UserError(f"--set {override}: no stage '{parts[1]}'{did_you_mean(parts[1], list(stages))}")
        body = stages[parts[1]]
        if isinstance(body, dict) and len(body) == 1 and parts[2] not in body:
            parts.insert(2, next(iter(body)))
    target = data
    for part in parts[:-1]:
        inner = target.get(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override}: '{part}' holds a value, not a mapping")
        target[part] = dict(inner)  # a YAML alias shares one mapping with what it stands for
        target = target[part]
    try:
        if parts[-1] in AS_WRITTEN:
            target[parts[-1]] = yaml.load(f"{parts[-1]}: {text}", Loader=RecipeLoader)[parts[-1]]
        else:
            target[parts[-1]] = text if len(parts) > 1 and parts[-2] in AS_WRITTEN else yaml.load(text, Loader=RecipeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"--set {override}: the value is not valid YAML") from None
