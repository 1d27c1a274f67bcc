"""How likely a pretrained language model finds a text: the sum of the log-probabilities of its tokens.

A model that reads from left to right gives each token's from those before it; one that reads both sides gives a
pseudo-log-likelihood, where each token in turn is hidden and predicted from all others (Salazar et al. 2020, arXiv:1910.14659).
Special tokens stand around a text as its tokenizer puts them, and are never scored.

Shapes: N texts, R rows that go through the model, B rows of a batch, L tokens, M scored tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine.answers._batches import MASK
from engine.data.batches import batches_of_tokens
from engine.errors import UserError
from engine.models.facts import ModelFiles
from engine.models.families import family_of

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 8192
"""Tokens that go through the model at once."""
SCORES = 2**25
"""Scores of the vocabulary that are made at once, 128 MiB of them."""
BOTH_SIDES, LEFT_TO_RIGHT, PERMUTED = "masked", "next", "permuted"
"""What a model predicts, by the names of `engine.models.families.OPERATIONS`."""
CLASSES = {
    "ForMaskedLM": BOTH_SIDES,
    "ForPreTraining": BOTH_SIDES,
    "ForCausalLM": LEFT_TO_RIGHT,
    "LMHeadModel": LEFT_TO_RIGHT,
}
"""How the names of transformers' classes with a head for the vocabulary end → what they predict."""
HEADS = {BOTH_SIDES: "AutoModelForMaskedLM", LEFT_TO_RIGHT: "AutoModelForCausalLM", PERMUTED: "AutoModelForCausalLM"}
SAYS = {
    BOTH_SIDES: "pseudo-log-likelihood: each token masked in turn (arXiv:1910.14659)",
    LEFT_TO_RIGHT: "log-likelihood: each token given those before it",
    PERMUTED: "pseudo-log-likelihood: each token hidden in turn, predicted from all others",
}


def kind_of(path: Path) -> str | None:
    """Returns what the model of a directory predicts, a key of HEADS; None where it has no head for the vocabulary.

    Raises:
        UserError: it has one, and gives a text alone no likelihood.
    """
    config = ModelFiles(path).config
    name, model_type = str((config.get("architectures") or [""])[0]), config.get("model_type")
    family = family_of(model_type)
    if name.endswith(("ForConditionalGeneration", *CLASSES)) and (config.get("is_encoder_decoder") or len(family.stacks) == 2):
        raise UserError(
            f"{path}: a {name} writes a text from another one, and gives a text alone no likelihood: "
            "judge it by its loss on held-out rows (stage.json), or by a task it is fine-tuned for"
        )
    kind = next((kind for end, kind in CLASSES.items() if name.endswith(end)), None)
    if kind != LEFT_TO_RIGHT:
        return kind
    if family.two_streams:
        return PERMUTED
    if family.stacks and not (family.causal or config.get("is_decoder")):
        raise UserError(
            f"{path}: a {name} without is_decoder in its config.json sees the tokens that it should predict: set it to true"
        )
    return kind


class Text(NamedTuple):
    """One text as the model reads it."""

    ids_L: np.ndarray
    types_L: np.ndarray
    """Token types."""
    first: int
    last: int
    """The tokens of the text, which are scored: from `first` up to, without, `last`."""
    unknown: int
    """So many of them are unknown to the vocabulary."""
    truncated: bool
    """It was longer."""
    characters: int
    bytes: int
    """Of what was not cut off, in UTF-8."""

    @property
    def tokens(self) -> int:
        """How many are scored."""
        return self.last - self.first


class LanguageModel:
    """A pretrained model with its tokenizer, in float32 on every device; on the GPU where there is one.

    Args:
        path: its directory.
        max_length: tokens of a text, special ones included.

    Raises:
        UserError: it cannot be loaded, has fewer positions or no likelihood, or its tokenizer lacks the mask.
    """

    def __init__(self, path: Path, max_length: int) -> None:
        import torch

        from engine.models import check_length, load_model, load_tokenizer

        kind = kind_of(path)
        if kind is None:
            raise UserError(f"{path}: config.json names no language model")
        self.kind, self.max_length = kind, max_length
        self.tokenizer: Any = load_tokenizer(path)
        if kind == BOTH_SIDES and self.tokenizer.mask_token_id is None:
            raise UserError(f"{path}: its tokenizer has no mask_token, which hides a token: name it in tokenizer_config.json")
        model: Any = load_model(path, HEADS[kind])
        check_length(max_length, model.config, "max_length", path)
        self.model: Any = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.known_head = bool(family_of(self.model.config.model_type).vocabulary_head)
        """Only the states of scored tokens go through the head for the vocabulary; else those of all tokens do."""

    @property
    def pseudo(self) -> bool:
        """A token is predicted from both sides: the numbers are no probabilities of texts."""
        return self.kind != LEFT_TO_RIGHT

    @property
    def says(self) -> str:
        """What its numbers are, in words."""
        return SAYS[self.kind]

    def encode(self, texts: Sequence[str]) -> list[Text]:
        """Returns texts as tokens; those that are too long lose their end.

        One that reads from left to right begins with the token that begins or ends a document, where its tokenizer puts none.
        """
        return list(starmap(self._text, zip(texts, self.tokenizer(list(texts)).encodings, strict=True)))

    def _text(self, text: str, encoding: Any) -> Text:
        special_L = np.array(encoding.special_tokens_mask, dtype=bool)
        ids_L, types_L = np.array(encoding.ids, dtype=np.int64), np.array(encoding.type_ids, dtype=np.int64)
        own = np.flatnonzero(~special_L)
        first, count = (int(own[0]), len(own)) if len(own) else (0, 0)
        before, after, begin = slice(0, first), slice(first + count, None), []
        if self.kind == LEFT_TO_RIGHT and not first:
            begin = [self._begin()]
        room = self.max_length - (len(ids_L) - count) - len(begin)
        if room < 1:
            raise UserError(f"--max-length {self.max_length} leaves no room for a text beside its special tokens: raise it")
        kept = slice(first, first + min(count, room))
        cut = count > room
        ids = np.concatenate([begin, ids_L[before], ids_L[kept], ids_L[after]]).astype(np.int64)
        types = np.concatenate([[0] * len(begin), types_L[before], types_L[kept], types_L[after]]).astype(np.int64)
        unknown = int((ids_L[kept] == self.tokenizer.unk_token_id).sum())
        read = text[: encoding.offsets[kept.stop - 1][1]] if cut else text
        start = first + len(begin)
        return Text(ids, types, start, start + min(count, room), unknown, cut, len(read), len(read.encode()))

    def _begin(self) -> int:
        tokenizer = self.tokenizer
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if begin is None:
            raise UserError(
                f"{tokenizer.name_or_path}: nothing stands before the first token, which is then predicted from nothing: "
                "name a bos_token in tokenizer_config.json"
            )
        return int(begin)

    def work(self, texts: Sequence[Text]) -> int:
        """Returns how many tokens have to go through the model: what `log_likelihoods` counts up to."""
        return sum(len(each.ids_L) * (1 if self.kind == LEFT_TO_RIGHT else each.tokens) for each in _different(texts).values())

    def log_likelihoods(
        self, texts: Sequence[Text], advance: Callable[[int], Any] = lambda tokens: None, batch_tokens: int = BATCH_TOKENS
    ) -> np.ndarray:
        """Returns the (pseudo-)log-likelihood of each text in nats, summed over its tokens in float64, shape (N,).

        Equal texts go through the model once, and get the same number.

        Args:
            advance: is told how many tokens of `work` are done.
            batch_tokens: go through the model at once, padding included.
        """
        import torch

        from engine.evaluate import evaluating

        unique = _different(texts)
        own = list(unique.values())
        found = np.zeros(len(own))
        text_R, place_R = self._rows(own)
        length_R = np.array([len(each.ids_L) for each in own])[text_R]
        with torch.no_grad(), evaluating(self.model):
            # The longest come first: a batch that does not fit the memory shows at once.
            for rows in reversed(batches_of_tokens(length_R, self._budget(batch_tokens))):
                owner_M, scores_M = self._batch([own[text] for text in text_R[rows]], place_R[rows])
                np.add.at(found, text_R[rows][owner_M], scores_M)
                advance(int(length_R[rows].sum()))
        by_text = dict(zip(unique, found, strict=True))
        return np.array([by_text[_key(each)] for each in texts])

    def _rows(self, texts: Sequence[Text]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the text of each row that goes through the model and the place that it predicts, -1 for all, each (R,)."""
        if self.kind == LEFT_TO_RIGHT:
            return np.arange(len(texts)), np.full(len(texts), -1)
        text_R = np.repeat(np.arange(len(texts)), [each.tokens for each in texts])
        return text_R, np.concatenate([np.arange(each.first, each.last) for each in texts])

    def _budget(self, batch_tokens: int) -> int:
        """Returns how many tokens a batch has: fewer where the model scores the vocabulary at every one of them."""
        return batch_tokens if self.known_head else min(batch_tokens, max(1, SCORES // self.model.config.vocab_size))

    def _batch(self, texts: Sequence[Text], place_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (row of the batch, log-probability) of each scored token, each of shape (M,)."""
        import torch

        lengths_B = np.array([len(each.ids_L) for each in texts])
        shape = (len(texts), int(lengths_B.max()))
        ids_BL, types_BL = np.full(shape, self.tokenizer.pad_token_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, each in enumerate(texts):
            ids_BL[row, : len(each.ids_L)], types_BL[row, : len(each.ids_L)] = each.ids_L, each.types_L
        mask_BL = (np.arange(shape[1]) < lengths_B[:, None]).astype(np.int64)
        if self.kind == LEFT_TO_RIGHT:
            row_M = np.repeat(np.arange(len(texts)), [each.tokens for each in texts])
            place_M = np.concatenate([np.arange(each.first, each.last) for each in texts])
        else:
            row_M, place_M = np.arange(len(texts)), place_B
        labels_M = ids_BL[row_M, place_M]
        if self.kind == BOTH_SIDES:
            ids_BL[row_M, place_M] = self.tokenizer.mask_token_id
        seen_M = place_M - 1 if self.kind == LEFT_TO_RIGHT else place_M
        device = self.model.device
        arrays = {"input_ids": ids_BL, MASK: mask_BL, "token_type_ids": types_BL}
        taken = {*self.tokenizer.model_input_names, "input_ids", MASK}
        inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items() if name in taken}
        at_M, labels = (torch.from_numpy(array).to(device) for array in (row_M * shape[1] + seen_M, labels_M))
        return row_M, self._log_probabilities(inputs, at_M, labels)

    def _log_probabilities(self, inputs: dict[str, torch.Tensor], at_M: torch.Tensor, labels_M: torch.Tensor) -> np.ndarray:
        """Returns the log-probability of each label from the state at its place in the flattened rows, shape (M,)."""
        import torch
        from torch.nn.functional import cross_entropy

        from engine.models.attention import vocabulary_scores

        model = self.model
        if not self.known_head:
            scores_MV = model(**inputs).logits.flatten(0, 1)[at_M]
            return -cross_entropy(scores_MV.float(), labels_M, reduction="none").double().cpu().numpy()
        if self.kind == PERMUTED:
            hidden_MH = self._query_stream(inputs, at_M)
        else:
            hidden_MH = model.base_model(**inputs)[0].flatten(0, 1)[at_M]
        size = max(1, SCORES // model.config.vocab_size)
        losses = [
            cross_entropy(vocabulary_scores(model, hidden).float(), labels, reduction="none")
            for hidden, labels in zip(hidden_MH.split(size), labels_M.split(size), strict=True)
        ]
        return -torch.cat(losses).double().cpu().numpy()

    def _query_stream(self, inputs: dict[str, torch.Tensor], at_M: torch.Tensor) -> torch.Tensor:
        """Returns the states that predict one token of each row, which no other token sees, shape (B, H)."""
        import torch

        from engine.models.attention import permuted_inputs

        ids_BL, segments_BL = inputs["input_ids"], inputs[MASK]
        order_BL = torch.full_like(ids_BL, -1)
        order_BL.view(-1)[at_M] = 0
        given = permuted_inputs(segments_BL, order_BL, (at_M % ids_BL.shape[1])[:, None], self.model.dtype)
        taken = {name: tensor for name, tensor in inputs.items() if name != MASK}  # segments hide the padding
        hidden_BH: torch.Tensor = self.model.base_model(**taken, use_mems=False, **given)[0][:, 0]
        return hidden_BH


def _key(text: Text) -> bytes:
    return text.ids_L.tobytes()


def _different(texts: Sequence[Text]) -> dict[bytes, Text]:
    """Returns the texts that differ in their tokens."""
    return {_key(each): each for each in texts}
