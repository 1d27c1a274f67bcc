"""The whole recipe: which kinds of stage there are, and the stages of a recipe in an order that works."""

from __future__ import annotations

from typing import Any, NamedTuple

from engine.config import ModelRef, Recipe, Strict, references
from engine.corpus import CorpusConfig
from engine.errors import did_you_mean
from engine.finetune import FinetuneConfig
from engine.pretrain import PretrainConfig
from engine.seeds import KEY
from engine.select import SelectConfig
from engine.stages.stage import Stage
from export.compress.distill import DistillConfig
from export.compress.factorize import FactorizeConfig
from export.compress.prune import PruneConfig
from export.compress.quantize import QuantizeConfig
from export.export import ExportConfig


class Kind(NamedTuple):
    """A kind of stage."""

    module: str
    """Its entry point: `python -m MODULE RECIPE --stage NAME`."""
    config: type[Strict]
    """Class of its section."""
    trains: bool
    """It has a section `train`."""
    gives: str
    """What its directory holds."""
    spread: bool = True
    """Started by `accelerate launch`, on as many processes as its section says."""


KINDS = {
    "corpus": Kind("engine.corpus", CorpusConfig, False, "a corpus"),
    "pretrain": Kind("engine.pretrain", PretrainConfig, True, "a pretrained model"),
    "finetune": Kind("engine.finetune", FinetuneConfig, True, "a fine-tuned model"),
    "distill": Kind("export.compress.distill", DistillConfig, True, "a fine-tuned model"),
    "select": Kind("engine.select", SelectConfig, False, "a fine-tuned model", False),
    "prune": Kind("export.compress.prune", PruneConfig, False, "a fine-tuned model", False),
    "factorize": Kind("export.compress.factorize", FactorizeConfig, False, "a fine-tuned model", False),
    "quantize": Kind("export.compress.quantize", QuantizeConfig, False, "an int8 graph", False),
    "export": Kind("export.export", ExportConfig, False, "a bundle", False),
}
TAKES = {
    ("finetune", "model"): ("a fine-tuned model", "a pretrained model"),
    ("pretrain", "model"): ("a pretrained model",),
    ("pretrain", "tokenizer.model"): ("a fine-tuned model", "a pretrained model", "a corpus"),
    ("pretrain", "corpus"): ("a corpus",),
    ("corpus", "tokenizer.model"): ("a fine-tuned model", "a pretrained model", "a corpus"),
    ("export", "model"): ("a fine-tuned model", "an int8 graph"),
}
"""What a key that names a stage can use; the others take a fine-tuned model."""


def load_stages(recipe: Recipe) -> list[Stage[Any]]:
    """Validates every section and returns the stages in the recipe's order, which is the order of running.

    Raises:
        UserError: an unknown kind, a bad section, or a stage that reads itself or a later one.
    """
    for name, parts in recipe.seeded.items():
        kind = recipe.stages[parts[0]][0]
        if kind in KINDS and not (KINDS[kind].trains and KINDS[kind].gives == "a fine-tuned model"):
            where = f"stages.{name}.{kind}.{KEY}"
            raise recipe.error(where, f"{where}: only stages that train a model for a task choose among seeds: leave it out")
    stages: dict[str, Stage[Any]] = {}
    for name, (kind, _) in recipe.stages.items():
        if kind not in KINDS:
            raise recipe.error(f"stages.{name}.{kind}", f"unknown kind of stage '{kind}'{did_you_mean(kind, list(KINDS))}")
        stage = Stage(recipe, name, KINDS[kind].config)
        for key, reference in references(stage.config):
            if isinstance(reference, ModelRef) and reference in recipe.stages:
                problem = _problem(stage, key, stages.get(reference), reference)
                if problem:
                    raise recipe.error(f"stages.{name}.{kind}.{key}", f"stages.{name}.{kind}.{key}: {problem}")
        stages[name] = stage
    return list(stages.values())


def _problem(stage: Stage[Any], key: str, source: Stage[Any] | None, reference: str) -> str | None:
    if source is None:
        return "a stage cannot read itself" if reference == stage.name else f"stage '{reference}' comes later: move it up"
    gives, takes = KINDS[source.kind].gives, TAKES.get((stage.kind, key.partition("[")[0]), ("a fine-tuned model",))
    if gives not in takes:
        return f"stage '{reference}' ({source.kind}) gives {gives}; {' or '.join(takes)} is needed"
    theirs, ours = (getattr(each.config, "task", None) for each in (source, stage))
    if theirs is not None and ours is not None and theirs.type != ours.type and stage.kind != "finetune":
        return f"stage '{reference}' does the task '{theirs.type}', not '{ours.type}'"
    return None
