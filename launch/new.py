"""`bothways new`: a commented recipe that runs, from a look at the data."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

from engine.config import Recipe, load_recipe, package_path
from engine.data.columns import Proposal, Table, read_table
from engine.data.sources import SourceConfig
from engine.errors import UserError
from engine.models import positions_of
from engine.models.facts import ModelFiles
from engine.problems import load_section
from engine.tasks import REGISTRY
from launch.check import check_recipe
from launch.recipe import load_stages
from launch.show import flow

LATIN, OTHER = "sentence-transformers/all-MiniLM-L6-v2", "intfloat/multilingual-e5-small"
"""Small encoders of the hub, for texts in Latin letters and for others."""
TOKENS_PER_WORD, TOKENS_PER_CHARACTER = 1.5, 1.0
"""Estimates where no tokenizer is at hand, rather too many: of words in Latin letters, and of other scripts."""
LONGEST = 512
"""Tokens that most encoders take."""
FEW_ROWS = 1000
"""With fewer rows than these, more of them are held out and epochs are more."""


def new_recipe(data: str, target: Path | None, task: str | None, model: str | None, columns: list[str]) -> tuple[Path, list[str]]:
    """Writes a recipe for a data file, once it has passed `bothways check`.

    Args:
        data: a file, a pattern or `hub:NAME`.
        target: where to; None: into the working directory, named after the data.
        task: its type; None: the one that the columns suggest.
        model: what to fine-tune; None: a small encoder of the hub.
        columns: `key=column` of the task that shall not be guessed, as in `label=stars`.

    Returns:
        (the recipe, what was seen in the data: a fact a line).

    Raises:
        UserError: no task fits the columns, the recipe is there already, or the data cannot be used.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(data.rstrip("/")).name.partition(".")[0]).strip("-_") or "new"
    target = target or Path(f"{name}.yaml")
    if target.exists():
        raise UserError(f"{target}: is there already: remove it, or name another file (--output)")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such directory")
    table = read_table(load_section(SourceConfig, {"path": data}, "--data"), Recipe.here())
    kind, proposal = propose(table, task, columns)
    chosen = model or _model_for(table, proposal)
    size, measured = longest(table, proposal, chosen)
    length = f"{size}  # {measured}"
    text = render(name, _beside(data, target), table, kind, proposal, _beside(chosen, target), length)
    part = target.with_name(f".{target.name}.tmp")
    try:
        part.write_text(text, encoding="utf-8")
        recipe = load_recipe(part)
        check_recipe(recipe, load_stages(recipe))
        part.rename(target)
    except UserError as error:
        raise UserError(str(error).replace(str(part), str(target))) from None
    finally:
        part.unlink(missing_ok=True)
    seen = [f"{key} is column '{column}': {proposal.seen.get(key, '')}" for key, column in proposal.section.items()]
    return target, [*table.described, f"task: {kind}", *seen]


def propose(table: Table, task: str | None, columns: list[str]) -> tuple[str, Proposal]:
    """Returns (type of the task, how it reads the table).

    Raises:
        UserError: no task, or not the one that was named, can be made of these columns.
    """
    given = dict(pair.partition("=")[::2] for pair in columns)
    for key, column in given.items():
        if not key or not column:
            raise UserError(f"--column {key}: write it as key=column, as in --column label=stars")
    found: dict[str, Proposal] = {}
    for name in [task] if task else sorted(REGISTRY.known()):
        config = REGISTRY.module(name).Config
        unknown = next((key for key in given if key not in config.model_fields), None)
        if unknown and task:
            raise UserError(f"--column {unknown}: the task '{task}' has no such key")
        proposal = None if unknown else config.propose(table, given)
        if proposal is not None:
            found[name] = proposal
    if not found:
        wanted = f"the task {task}" if task else "any task"
        fix = "name them, as in --column text=review --column label=stars"
        raise UserError(f"{table.source.shown}: no columns for {wanted}: {table.shown}: {fix}")
    best = max(found, key=lambda name: found[name].fit)
    return best, found[best]


def render(name: str, data: str, table: Table, kind: str, proposal: Proposal, model: str, length: str) -> str:
    """Returns the recipe as YAML with comments."""
    few = table.complete and table.rows < FEW_ROWS
    share, epochs, batch = ("20%", 10, 16) if few else ("10%", 3, 32)
    missing = _missing(table, proposal)
    source = flow({"path": data, "missing": "drop"}) if missing else flow(data)
    rows = f"{table.rows:,} rows" if table.complete else f"the first {table.rows:,} rows"
    lines = [
        *(f"# {line}" for line in table.described),
        f"# What follows was seen in {rows}; change what is wrong. Everything else has a default: `bothways check FILE --show`.",
        f"name: {flow(name)}",
        "seed: 1",
        "stages:",
        "  teacher:",
        "    finetune:",
        f"      model: {flow(model)}  # a directory or a hub id; every weight is trained",
        "      task:",
        f"        type: {flow(kind)}",
        *(f"        {key}: {flow(value)}{_comment(proposal.seen.get(key))}" for key, value in proposal.section.items()),
        *([f"        # {proposal.advice}"] if proposal.advice else []),
        "      data:",
        f"        train: {source}{_comment(missing)}",
        f"        validation: {share}  # held out by a hash of the text; chooses the best weights",
        f"        test: {share}  # judged once, at the end",
        f"      max_length: {length}",
        f"      train: {{epochs: {epochs}, batch_size: {batch}, learning_rate: 5e-5, early_stopping: {{patience: 2}}}}",
        "  # A student with fewer layers that learns from the teacher's scores; then read it below in place of the teacher.",
        "  # student:",
        "  #   distill: {teacher: teacher, student: {layers: 3}, train: {epochs: 4, learning_rate: 2e-4}}",
        "  int8:",
        "    quantize: {model: teacher}  # task, data and max_length are the teacher's",
        "  engine:",
        "    export: {model: int8, baseline: teacher}",
    ]
    return "\n".join(lines) + "\n"


def longest(table: Table, proposal: Proposal, model: str) -> tuple[int, str]:
    """Returns (max_length, what it follows from): 99 % of the rows fit, as far as the model reaches."""
    rows = list(zip(*(table.columns[name].sample for name in proposal.texts), strict=False))
    directory = _directory(model)
    reach = LONGEST
    if directory is not None:
        reach = positions_of(ModelFiles(directory).config) or LONGEST
    counted = None if directory is None else _count(directory, rows)
    sizes = sorted(counted or [sum(map(_estimate, row)) + len(row) + 1 for row in rows])
    size = sizes[min(len(sizes) - 1, math.ceil(0.99 * len(sizes)))]
    how = "by its tokenizer" if counted else "estimated"
    return min(reach, LONGEST, max(16, -(-size // 16) * 16)), f"99 % of {len(sizes):,} rows have at most {size} tokens, {how}"


def _count(directory: Path, rows: list[tuple[str, ...]]) -> list[int] | None:
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [len(encoding) for encoding in tokenizer.encode_batch([row if len(row) > 1 else row[0] for row in rows])]


def _estimate(text: str) -> int:
    return math.ceil(TOKENS_PER_WORD * len(text.split())) if _latin(text) else math.ceil(TOKENS_PER_CHARACTER * len(text))


def _latin(text: str) -> bool:
    """True when most letters are Latin ones."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter < "\u0250" for letter in letters) * 2 >= len(letters)


def _model_for(table: Table, proposal: Proposal) -> str:
    return LATIN if _latin("".join(text for name in proposal.texts for text in table.columns[name].sample[:200])) else OTHER


def _directory(model: str) -> Path | None:
    """Returns the directory that a model's name means from the working directory, None for a hub id."""
    path = package_path(model) if model.startswith("package:") else Path(model)
    return path if (path / "config.json").is_file() else None


def _beside(reference: str, target: Path) -> str:
    """Returns a path of the working directory as the recipe has to write it; hub ids and packages as they are."""
    is_path = ":" not in reference and (Path(reference).exists() or any(mark in reference for mark in "*?["))
    return os.path.relpath(reference, target.parent) if is_path and not Path(reference).is_absolute() else reference


def _missing(table: Table, proposal: Proposal) -> str:
    """Says how many rows lack what the task needs."""
    lacking = max(table.rows - table.columns[str(name)].filled for name in proposal.section.values() if name in table.columns)
    return f"about {lacking:,} rows lack a cell: left out" if lacking else ""


def _comment(text: Any) -> str:
    return f"  # {' '.join(str(text).split())}" if text else ""
