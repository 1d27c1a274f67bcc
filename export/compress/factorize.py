"""Low-rank factorisation: a matrix becomes the product of two thin ones, from its singular value decomposition.

The best approximation of rank r in the Frobenius norm keeps the r largest singular values (Eckart and Young 1936); each of the
two factors takes the square root of them. A rank is given, or follows from the share of the squared singular values that stays.
Embedding tables are factorised as in ALBERT (arXiv:1909.11942). Recovery training is a `distill` stage whose student is the
factorised model.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from pydantic import Field, model_validator

from engine.config import Fraction, ModelRef, Strict
from engine.data.splits import DataConfig
from engine.stages.stage import Stage, stage_main
from engine.tasks import AnyTask
from export.compress.smaller import publish_model

Rank = Annotated[int, Field(ge=1)] | Annotated[Fraction, Field(gt=0, lt=1)]
"""A whole number: the rank. A share (`90%`, 0.9): the smallest rank that keeps so much of the squared singular values."""


class FactorizeConfig(Strict):
    """Section of a `factorize` stage."""

    model: ModelRef
    """What to factorise: a stage or a model directory that was fine-tuned. Prune first: factorised matrices are not pruned."""
    task: AnyTask
    data: DataConfig
    """Validation and test rows measure the loss of accuracy."""
    attention: Rank | None = None
    """Query, key, value and output matrices of every layer; None: as they are."""
    ffn: Rank | None = None
    """The two matrices of every feed-forward part."""
    embeddings: Rank | None = None
    """The table of the tokens."""
    max_length: int = Field(128, ge=4)

    @model_validator(mode="after")
    def _something_to_factorize(self) -> FactorizeConfig:
        if self.attention is None and self.ffn is None and self.embeddings is None:
            raise ValueError("give attention, ffn or embeddings a rank or a share: otherwise nothing is factorised")
        return self


def run(stage: Stage[FactorizeConfig]) -> None:
    """Runs one factorisation stage."""
    config = stage.config
    path = stage.recipe.find_model(config.model)
    stage.inputs  # noqa: B018 - missing inputs show before anything heavy is loaded
    from engine.data.rows import prepare_for_model
    from engine.models import size_of
    from engine.models.fitting import load_finished
    from engine.models.structure import factorize

    started = time.monotonic()
    data = prepare_for_model(config, stage.recipe, path, 1)
    model = load_finished(path, data.task)
    before = size_of(model)["parameters"]
    found = factorize(model, config.attention, config.ffn, config.embeddings)
    stage.begin()
    after = publish_model(stage, data, model, started, factors=[factor._asdict() for factor in found])
    print(f"  {described(found)}; {before:,} parameters became {after:,}", flush=True)


def described(found: list[Any]) -> str:
    """Says how many matrices were factorised, and which were left as they are."""
    done = [factor for factor in found if factor.rank]
    ranks = sorted({factor.rank for factor in done})
    spread = f" of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
    left = len(found) - len(done)
    kept = f"; {left} left as they are: two factors would be no smaller" if left else ""
    return f"{len(done)} matrices are products{spread}{kept}"


def main() -> None:
    """Entry point of `python -m export.compress.factorize RECIPE --stage NAME`."""
    stage_main("export.compress.factorize", FactorizeConfig, run)


if __name__ == "__main__":
    main()
