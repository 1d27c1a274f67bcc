"""Pretraining objectives, one file each. An objective corrupts tokens and gives the loss as (sum, count)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from engine.config import Fraction, Strict


class MlmConfig(Strict):
    """Masked language modelling (BERT, arXiv:1810.04805)."""

    type: Literal["mlm"] = "mlm"
    mask: float = Field(0.15, gt=0, lt=1)
    """Share of the ordinary tokens that the model has to predict."""
    replace_by_mask: Fraction = 0.8
    """Share of the chosen tokens that become [MASK]."""
    replace_by_random: Fraction = 0.1
    """Share of the chosen tokens that become a random token; the rest stay as they are."""

    @model_validator(mode="after")
    def _shares_add_up(self) -> MlmConfig:
        if self.replace_by_mask + self.replace_by_random > 1:
            raise ValueError("replace_by_mask + replace_by_random is above 1: lower one of them")
        return self
