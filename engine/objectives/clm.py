"""Next-token prediction on packed rows (GPT, Radford et al. 2018).

Shapes: L tokens of a piece.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from engine import objectives
from engine.objectives import Frame, _tokens


class Config(objectives.ObjectiveConfig):
    """Next-token prediction (GPT)."""

    type: Literal["clm"] = "clm"


class Objective(_tokens.Objective):
    """Every token of a document is predicted from those before it, and so is its end."""

    head = "AutoModelForCausalLM"
    operation = "next"
    says = "next-token prediction"
    special_tokens = ("eos_token",)

    @classmethod
    def of_tokenizer(cls, config: Config, tokenizer: Any) -> Objective:
        return cls()

    @classmethod
    def frame(cls, tokenizer: Any, language: str | None = None) -> Frame:
        """Returns that of whole documents: where one is cut, nothing begins or ends."""
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return Frame((begin,), (tokenizer.eos_token_id,), pieces=False)

    def corrupt(self, tokens_L: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns input_ids, which are the tokens, and labels, those behind each of them; the last has none."""
        return {"input_ids": tokens_L, "labels": np.append(tokens_L[1:], _tokens.IGNORED)}

    @classmethod
    def share(cls, config: Config) -> float:
        return 1.0
