"""What objectives share that let a decoder write what an encoder reads: both sides packed, each document's with each other's.

Shapes: B rows, L tokens of a row of one side, M tokens of the decoder that are scored, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.objectives import BESIDE, Frame, _tokens
from engine.objectives._tokens import IGNORED

if TYPE_CHECKING:
    import torch

    Batch = dict[str, torch.Tensor]


class Objective(_tokens.Objective):
    """The columns are input_ids of the encoder; decoder_input_ids and labels of the decoder, one token apart. `sides` are the
    encoder's and the decoder's.

    Where the decoder begins is the model's own: a fixed token, or, as mBART has it, the last of the text, its language.
    """

    head = "AutoModelForSeq2SeqLM"
    operation = "rewritten"
    special_tokens: ClassVar[tuple[str, ...]] = ("eos_token", "pad_token")
    around: tuple[int, int]
    """How many tokens stand before and after a text."""

    @classmethod
    def frame(cls, tokenizer: Any, language: str | None = None) -> Frame:
        """Returns what the tokenizer puts around a text."""
        return _tokens.frame_of(tokenizer)

    def split(self, tokens_L: np.ndarray) -> list[np.ndarray]:
        """Returns what stands before a text, the text, and what stands after it."""
        return np.split(tokens_L, [self.around[0], len(tokens_L) - self.around[1]])

    @staticmethod
    def columns_of(source: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the columns of a piece, given what the encoder reads and what the decoder writes."""
        return {"input_ids": source, "decoder_input_ids": np.roll(target, 1), "labels": target}

    def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy over the decoder's tokens.

        Args:
            model: an encoder and a decoder of a family that takes packed rows.
            batch: input_ids, and position_ids and segments of their side, each (B, L) int64; decoder_input_ids and labels, and
                position_ids and segments of theirs; those of the side that does not say how long rows are begin with BESIDE.

        Returns:
            (summed loss, number of the decoder's tokens), two scalars.
        """
        return _tokens.token_loss(model, self.hidden(model, batch), batch)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Returns the scores of the decoder's tokens, shape (M, V)."""
        return _tokens.token_logits(model, self.hidden(model, batch), batch)

    @classmethod
    def hidden(cls, model: Any, batch: Batch) -> torch.Tensor:
        """Returns the decoder's last hidden states, shape (B, L, H)."""
        from engine.models.attention import packed_decoder
        from engine.models.families import family_of
        from engine.models.pooling import decoder_start

        encoder, decoder = cls.prefixes()
        segments, positions = batch[f"{decoder}segments"], batch[f"{decoder}position_ids"]
        ids = batch["decoder_input_ids"]
        if not family_of(model.config.model_type).decoder_wraps:
            ids = ids.masked_fill((positions == 0) & (segments > 0), decoder_start(model.config))
        source = (batch["input_ids"], batch[f"{encoder}segments"], batch[f"{encoder}position_ids"])
        return packed_decoder(model, source, (ids, segments, positions))

    @classmethod
    def prefixes(cls) -> tuple[str, str]:
        """Returns how the names of the encoder's and of the decoder's position_ids and segments begin."""
        return (BESIDE, "") if "labels" in cls.columns else ("", BESIDE)

    @classmethod
    def made_up_loss(cls, config: Any, model: Any, rows: int, length: int) -> torch.Tensor:
        import torch

        ids = [torch.zeros(rows, size, dtype=torch.int64) for size in cls.sides(config, length)]
        encoder, decoder = cls.prefixes()
        names = {"input_ids": 0, f"{encoder}segments": 0, f"{encoder}position_ids": 0}
        names |= {"decoder_input_ids": 1, f"{decoder}segments": 1, f"{decoder}position_ids": 1}
        hidden = cls.hidden(model, {name: ids[side] for name, side in names.items()})
        return _tokens.cross_entropy(model, hidden.flatten(0, 1), ids[1].flatten())


ENCODER: dict[str, int | None] = {"input_ids": None}
DECODER: dict[str, int | None] = {"decoder_input_ids": None, "labels": IGNORED}
"""The columns of each side, as `engine.objectives.Objective.columns` has them."""
