"""Regression, the training half: one or several numbers for a text or a pair of texts.

The model gives standardised numbers, (number - mean) / standard deviation over the training rows; answers are in the unit of the
data.

Shapes: B rows, K numbers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from engine.answers import Row
from engine.answers.regression import OUTPUT, columns_of, number, numbers_of
from engine.data.cells import Cell, missing
from engine.errors import UserError
from engine.tasks import FACTS, Facts
from engine.tasks._texts import NumbersTask, TextConfig, cell_of, labels_as_settings, weighted

if TYPE_CHECKING:
    import torch

    from engine.tasks import Batch


Finite = Annotated[float, Field(allow_inf_nan=False)]


class Config(TextConfig):
    """One or several numbers for a text, or for a pair of texts."""

    type: Literal["regression"]
    label: str | list[str] = "label"
    """Column of the number, or columns of several."""
    loss: Literal["mse", "huber"] = "mse"
    """Squared error of the standardised numbers; `huber` grows only linearly beyond `delta`, so that outliers pull less."""
    delta: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Of `huber`, in standard deviations."""
    bounds: tuple[Finite, Finite] | None = None
    """Smallest and largest number that is answered, as in [0, 5] for scores that end there; None: any."""
    metric: Literal["pearson", "spearman", "rmse", "mae"] = "pearson"
    """Chooses the best weights."""

    @field_validator("label")
    @classmethod
    def _columns_once(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and len(set(value)) < len(value)):
            raise ValueError("label names no column, or one of them twice")
        return value

    @field_validator("bounds")
    @classmethod
    def _in_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError(f"bounds: {value[0]:g} is not below {value[1]:g}: write the smaller one first")
        return value

    @property
    def truths(self) -> dict[str, Cell]:
        return dict.fromkeys(columns_of(self.label), cell_of(_filled))


def _filled(value: Any) -> float | None:
    """Returns the number of a cell; None for an empty one and for `nan`, what a missing one looks like after a detour by text."""
    return None if missing(value) or (isinstance(value, str) and value.strip().lower() == "nan") else number(value)


class Task(NumbersTask):
    """The regression task. Facts: `mean` and `sd` of each column."""

    says = "a regression model"

    @classmethod
    def learn(cls, config: Config, rows: Sequence[Row]) -> Facts:
        """Returns mean and standard deviation of each column over the training rows.

        Raises:
            UserError: a column that holds only one number.
        """
        columns = list(config.truths)
        kind = np.dtype((np.float64, (len(columns),)))
        values_NK = np.fromiter((numbers_of(row, columns) for row in rows), dtype=kind, count=len(rows))
        for column, values_N in zip(columns, values_NK.T, strict=True):
            if values_N.max() == values_N.min():
                raise UserError(f"column '{column}' holds only the number {values_N[0]:g}: there is nothing to learn from it")
        return {"mean": values_NK.mean(axis=0).tolist(), "sd": values_NK.std(axis=0).tolist()}

    @classmethod
    def recall(cls, config: Config, model: Any) -> Facts:
        kept, columns = getattr(model, FACTS, None) or {}, list(config.truths)
        if model.num_labels != len(columns):
            raise UserError(f"the model gives {model.num_labels} numbers, and task.label names {len(columns)}: {columns}")
        if kept.get("type") == config.type:
            return {"mean": kept["mean"], "sd": kept["sd"]}
        if getattr(model, "problem_type", None) == "regression":
            # Somebody else's model: its numbers are those of its data.
            return {"mean": [0.0] * len(columns), "sd": [1.0] * len(columns)}
        raise UserError("the model is none of regression (its configuration has no mean and deviation): fine-tune it first")

    def settings(self) -> dict[str, Any]:
        return {**labels_as_settings(list(self.config.truths)), "problem_type": "regression", **self.kept}

    def target_of(self, row: Row) -> list[float] | None:
        values_K = self.answers.truth(row)
        return None if values_K is None else ((values_K - self.answers.mean_K) / self.answers.sd_K).tolist()

    def loss_of(self, outputs: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared or Huber error of a row, its mean over the numbers: (sum over labelled rows, their number)."""
        from torch.nn import functional

        own_BK, true_BK = outputs[OUTPUT], batch["labels"]
        if self.config.loss == "huber":
            errors_BK = functional.huber_loss(own_BK, true_BK, reduction="none", delta=self.config.delta)
        else:
            errors_BK = functional.mse_loss(own_BK, true_BK, reduction="none")
        return weighted(errors_BK.mean(dim=1), batch)

    def imitation(self, outputs: Batch, teacher: Batch, temperature: float) -> torch.Tensor:
        """Σ over rows of the mean squared difference to the teacher's standardised numbers; the temperature is not used."""
        return ((outputs[OUTPUT] - teacher[OUTPUT].float()) ** 2).mean(dim=1).sum()
