"""What objectives share that judge pairs of texts beside masked tokens: BERT's next sentence, ALBERT's order of sentences.

Shapes: B rows, L tokens a row, P pairs in the batch.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.objectives import Frame, Piece, _tokens, mlm
from engine.objectives._tokens import IGNORED

if TYPE_CHECKING:
    import torch

    from engine.objectives import Parts


class Objective(mlm.Objective):
    """Masked tokens, and for every piece of a document, cut in two where a sentence begins, what became of its second part.

    The label stands at the piece's first token, from whose hidden state it is scored. A pair counts as many targets as tokens of
    its piece are predicted on average: both losses weigh the same, however rows are spread over ranks and micro batches.
    """

    head = "AutoModelForPreTraining"
    operation = "pairs"
    sentences = True
    columns = {**mlm.Objective.columns, "token_type_ids": 0, "pair_labels": IGNORED, "pair_tokens": 0}

    @classmethod
    def frame(cls, tokenizer: Any, language: str | None = None) -> Frame:
        """Returns what stands around a pair, and between its parts."""
        return Frame((tokenizer.cls_token_id,), (tokenizer.sep_token_id,), between=tokenizer.sep_token_id)

    @abc.abstractmethod
    def changed(
        self, first: np.ndarray, second: np.ndarray, piece: Piece, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns both parts of a pair that is to be told from a real one, as many tokens in all; None where there is none."""

    def arrange(self, piece: Piece, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the tokens of a pair, half of them changed, with token_type_ids, pair_labels and pair_tokens.

        A label is 0 for the text as it was and 1 for a changed one, as transformers has it; a piece of one token has none.
        """
        places = piece.sentences if len(piece.sentences) else np.arange(1, len(piece.tokens))
        cut = int(rng.choice(places)) if len(places) else len(piece.tokens)
        parts, label = (piece.tokens[:cut], piece.tokens[cut:]), 0 if len(places) else IGNORED
        if len(places) and rng.random() < 0.5:
            other = self.changed(*parts, piece, rng)
            parts, label = (parts, 0) if other is None else (other, 1)
        tokens = np.concatenate([piece.before, parts[0], piece.between, parts[1], piece.after]).astype(np.int64)
        columns = {name: np.full(len(tokens), self.columns[name]) for name in ("token_type_ids", "pair_labels", "pair_tokens")}
        columns["token_type_ids"][len(tokens) - len(parts[1]) - len(piece.after) :] = 1
        columns["pair_labels"][0], columns["pair_tokens"][0] = label, len(tokens)
        return tokens, columns

    def placed(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**super().placed(arrays), "pairs": _tokens.chosen(arrays["pair_labels"])}

    def logits(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the scores of the pairs, and those of the predicted tokens, one behind the other."""
        import torch

        hidden = _tokens.hidden_of(model, batch)
        return torch.cat([_pair_scores(model, hidden, batch).flatten(), _tokens.token_logits(model, hidden, batch).flatten()])

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.measure(model, batch)["loss"]

    def measure(self, model: Any, batch: dict[str, torch.Tensor]) -> Parts:
        """Returns loss, the loss of masked tokens alone, and the percentage of pairs that were told right."""
        import torch
        from torch.nn import functional

        hidden = _tokens.hidden_of(model, batch)
        masked, count = _tokens.token_loss(model, hidden, batch)
        labels_P, weights_P = (_tokens.picked(batch[name], batch["pairs"]) for name in ("pair_labels", "pair_tokens"))
        scores_P2 = _pair_scores(model, hidden, batch).float()
        each_P = functional.cross_entropy(scores_P2, labels_P, reduction="none")
        pairs = (each_P * weights_P).sum() * self.config.mask
        right = (100.0 * (scores_P2.argmax(-1) == labels_P).sum(), torch.tensor(len(labels_P)))
        return {"loss": (masked + pairs, count), "masked_loss": (masked, count), "pair_accuracy": right}


def _pair_scores(model: Any, hidden_BLH: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the scores of the pairs, shape (P, 2)."""
    from engine.models.families import family_of

    scores = _tokens.picked(hidden_BLH, batch["pairs"])
    for name in family_of(model.config.model_type).pair_head:
        scores = model.get_submodule(name)(scores)
    return scores
