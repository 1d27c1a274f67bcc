"""The projection of hidden states on the vocabulary."""

from __future__ import annotations

import torch
from torch.nn import functional


class VocabularyProjection(torch.nn.Linear):
    """A linear layer that adds its bias in float32.

    Under autocast a bias is rounded to the 8 bits of bf16; that of a vocabulary, which begins as the log frequencies of the
    tokens, is several times as large as the scores that it is added to.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns float32 scores: (…, hidden) to (…, vocabulary)."""
        return functional.linear(input, self.weight).float() + self.bias
