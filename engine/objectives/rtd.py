"""Replaced-token detection on packed rows (ELECTRA, arXiv:2003.10555).

Shapes: L tokens of a piece or a row, B rows, M masked tokens in the batch, V vocabulary.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from engine.config import Fraction
from engine.errors import UserError
from engine.objectives import _tokens, mlm
from engine.objectives._tokens import CHUNK_SCORES

if TYPE_CHECKING:
    import torch

    from engine.objectives import Batch, Parts

GENERATOR_HEAD = "AutoModelForMaskedLM"
DRAW_BITS = 30
"""Draws, and probabilities, in units of 2 to minus this: sums of integers are the same in any order, on any device."""
SAMPLED_SCORES = CHUNK_SCORES // 4
"""Scores of the vocabulary from which tokens are drawn at once."""


class Config(mlm.Config):
    """Which tokens a small generator has replaced, which learns to predict masked ones (ELECTRA, arXiv:2003.10555)."""

    type: Literal["rtd"] = "rtd"  # type: ignore[assignment]
    replace_by_mask: Fraction = 1.0
    """Share of the chosen tokens that the generator reads as [MASK]; all of them are replaced by what it draws."""
    replace_by_random: Fraction = 0.0
    """Share of the chosen tokens that the generator reads as a random token; the rest stay as they are."""
    generator: float = Field(0.25, gt=0, le=1)
    """Heads, hidden size and neurons of the generator, as a share of the discriminator's: a quarter to a half (section 3.2)."""
    weight: float = Field(50.0, gt=0)
    """Of the loss of a token that is judged, beside that of one that is predicted (the paper's λ, table 6)."""


class Objective(mlm.Objective):
    """A generator predicts masked tokens; the model tells, for every token of the text with its draws in it, whether it is one.

    Both have the table of tokens, positions and types in common, with the normalization behind it, as in the paper's code. The
    loss is that of the generator and `weight` times that of the discriminator, each averaged over its tokens: all but padding are
    judged, special ones too, and count as many targets as are predicted of them on average, however rows are spread over ranks
    and micro batches. A draw that hits the token of the text is not replaced.

    The column `draws` holds a uniform number for each token, with which one is drawn: it depends on seed, epoch and piece alone.
    """

    head = "AutoModelForPreTraining"
    operation = "replaced"
    says = "replaced-token detection"
    scores = "tells replaced tokens"
    companion = "generator"
    config: Config
    columns = {**mlm.Objective.columns, "draws": 0}

    @classmethod
    def accompany(cls, config: Config, model: Any, path: Path | str | None) -> bool:
        from engine.models import auto_class, load_model
        from engine.models.companions import attach
        from engine.models.families import family_of

        attention, own = model.config._attn_implementation, path / cls.companion if isinstance(path, Path) else None
        if own is None or not own.is_dir():
            smaller = _smaller(model.config, config.generator)
            attach(model, cls.companion, auto_class(GENERATOR_HEAD).from_config(smaller, attn_implementation=attention))
            return True
        attach(model, cls.companion, load_model(own, GENERATOR_HEAD, attention))
        there, here = (tuple(part.get_input_embeddings().weight.shape) for part in (model.generator, model))
        if there != here:
            raise UserError(
                f"{own}: its table of tokens is {there}, that of the model {here}: remove it, and it begins at random"
            )
        family = family_of(model.config.model_type)
        wide, asked = (
            getattr(about, family.hidden) for about in (model.generator.config, _smaller(model.config, config.generator))
        )
        if "generator" in config.model_fields_set and wide != asked:
            raise UserError(
                f"objective.generator={config.generator:g} makes a generator of {asked} features, that of {own} has {wide}: "
                "leave it out, and it stays as it is"
            )
        return False

    @classmethod
    def adapt(cls, model: Any) -> None:
        """Lets both networks have the embeddings of the model, and the generator score the vocabulary with them."""
        from engine.models.families import family_of

        generator = model.generator
        super().adapt(generator)
        setattr(generator.base_model, shared := family_of(model.config.model_type).embeddings, getattr(model.base_model, shared))
        generator.get_output_embeddings().weight = model.get_input_embeddings().weight

    def begin(self, model: Any, tokens_N: np.ndarray) -> None:
        super().begin(model.generator, tokens_N)

    def corrupt(self, tokens_L: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns input_ids (masked), labels and draws, each of shape (L,)."""
        return {**super().corrupt(tokens_L, rng), "draws": rng.integers(0, 2**DRAW_BITS, len(tokens_L))}

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Returns, for every masked token, how surely it is replaced, were it that of the text, and the generator's score of that
        token, shape (M, 2): nothing is drawn, so that rounding cannot change what is scored."""
        import torch

        labels_M = _tokens.picked(batch["labels"], batch["predicted"])
        scores_MV = super().logits(model.generator, batch)
        judged_BL = _detector_scores(model, batch, _put(batch["input_ids"], batch["predicted"], labels_M))
        judged_M, guessed_M = _tokens.picked(judged_BL, batch["predicted"]), scores_MV.gather(1, labels_M[:, None])[:, 0]
        return torch.stack([judged_M.float(), guessed_M.float()], 1)

    def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of both networks.

        Args:
            model: the discriminator, with a `generator`.
            batch: input_ids, position_ids, segments, labels, draws, each (B, L) int64; segment 0 is padding; predicted (M,),
                places in the flattened rows.

        Returns:
            (summed loss, number of masked tokens), two scalars.
        """
        return self.measure(model, batch)["loss"]

    def measure(self, model: Any, batch: Batch) -> Parts:
        """Returns loss; the loss of the generator for a masked token; that of the discriminator for any token; the percentage of
        tokens that it told right, and of the replaced ones that it found."""
        hidden_BLH = _tokens.hidden_of(model.generator, batch)
        masked, count = _tokens.token_loss(model.generator, hidden_BLH, batch)
        ids_BL, replaced_BL = replaced_tokens(model.generator, hidden_BLH, batch)
        scores_BL, real_BL = _detector_scores(model, batch, ids_BL), batch["segments"] > 0
        judged, tokens = _binary(scores_BL, replaced_BL, real_BL), real_BL.sum()
        right_BL = ((scores_BL > 0) == replaced_BL) & real_BL
        return {
            "loss": (masked + self.config.weight * self.config.mask * judged, count),
            "masked_loss": (masked, count),
            "replaced_loss": (judged, tokens),
            "replaced_accuracy": (100.0 * right_BL.sum(), tokens),
            "replaced_recall": (100.0 * (right_BL & replaced_BL).sum(), replaced_BL.sum()),
        }

    @classmethod
    def made_up_loss(cls, config: Config, model: Any, rows: int, length: int) -> torch.Tensor:
        import torch

        ids = torch.zeros(rows, length, dtype=torch.int64)
        predicted_M = torch.zeros(int(np.ceil(rows * length * cls.share(config))), dtype=torch.int64)
        names = ("input_ids", "labels", "segments", "position_ids", "draws")
        batch = {**dict.fromkeys(names, ids), "predicted": predicted_M}
        hidden_BLH = _tokens.hidden_of(model.generator, batch)
        masked, _ = _tokens.token_loss(model.generator, hidden_BLH, batch)
        ids_BL, replaced_BL = replaced_tokens(model.generator, hidden_BLH, batch)
        return masked + _binary(_detector_scores(model, batch, ids_BL), replaced_BL, ids == 0)


def replaced_tokens(generator: Any, hidden_BLH: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the text with what the generator draws in the place of masked tokens, and which tokens are others than those of the
    text, both of shape (B, L); no gradient goes through a draw.

    Args:
        hidden_BLH: last hidden states of the generator.
        batch: see `Objective.loss`.
    """
    import torch

    from engine.models.attention import vocabulary_scores

    at_M = batch["predicted"]
    labels_M, draws_M = (_tokens.picked(batch[name], at_M) for name in ("labels", "draws"))
    with torch.no_grad():
        hidden_MH = _tokens.picked(hidden_BLH.detach(), at_M)
        size = max(1, SAMPLED_SCORES // generator.config.vocab_size)
        parts = zip(hidden_MH.split(size), draws_M.split(size), strict=True)
        drawn_M = torch.cat([drawn(vocabulary_scores(generator, hidden), draws) for hidden, draws in parts])
    same_BL = torch.zeros_like(batch["labels"], dtype=torch.bool)
    return _put(batch["input_ids"], at_M, drawn_M), _put(same_BL, at_M, drawn_M != labels_M)


def drawn(scores_MV: torch.Tensor, draws_M: torch.Tensor) -> torch.Tensor:
    """Returns tokens drawn from the softmax of scores, shape (M,): the inverse of its distribution function at the draws.

    Args:
        scores_MV: of the vocabulary.
        draws_M: uniform, in units of 2 to minus DRAW_BITS.
    """
    import torch

    shares_MV = (scores_MV.float().softmax(-1) * 2**DRAW_BITS).to(torch.int32)
    ends_MV = shares_MV.cumsum(-1, dtype=torch.int32)
    below_M1 = (draws_M[:, None] * ends_MV[:, -1:].long()) >> DRAW_BITS
    return torch.searchsorted(ends_MV, below_M1.to(torch.int32), right=True)[:, 0]


def _put(values_BL: torch.Tensor, at_M: torch.Tensor, new_M: torch.Tensor) -> torch.Tensor:
    """Returns values with others at places of the flattened rows, shape (B, L)."""
    return values_BL.flatten().index_copy(0, at_M, new_M).view_as(values_BL)


def _detector_scores(model: Any, batch: Batch, ids_BL: torch.Tensor) -> torch.Tensor:
    """Returns how surely each token is a replaced one, in logits, shape (B, L)."""
    from engine.models.families import family_of

    scores = _tokens.hidden_of(model, {**batch, "input_ids": ids_BL})
    for name in family_of(model.config.model_type).replaced_head:
        scores = model.get_submodule(name)(scores)
    return scores


def _binary(scores_BL: torch.Tensor, replaced_BL: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
    """Returns the summed cross entropy of the tokens that are real."""
    from torch.nn import functional

    each_BL = functional.binary_cross_entropy_with_logits(scores_BL.float(), replaced_BL.float(), reduction="none")
    return (each_BL * real_BL).sum()


def _smaller(config: Any, share: float) -> Any:
    """Returns the configuration of a generator: as many layers and as wide a table of tokens, a share of what else is wide."""
    from engine.models.families import STRUCTURE_KEY, family_of

    family, smaller = family_of(config.model_type), copy.deepcopy(config)
    heads = max(1, round(getattr(config, family.stacks[0].heads) * share))
    setattr(smaller, family.stacks[0].heads, heads)
    setattr(smaller, family.hidden, heads * max(1, round(getattr(config, family.hidden) * share / heads)))
    for key in family.neurons:
        setattr(smaller, key, max(1, round(getattr(config, key) * share)))
    if hasattr(smaller, STRUCTURE_KEY):
        delattr(smaller, STRUCTURE_KEY)  # of a model that lost heads: they are counted per layer
    return smaller
