"""Pretraining objectives, one file each: what is done to the tokens of packed rows, and the loss as (sum, count).

A file holds two classes: `Config` and `Objective`; torch is imported inside functions only. Packing, order, seeking and sharding
are those of `engine.data`. A package that is installed beside this one brings objectives of its own by the entry point
`bothways.objectives`.

Shapes: L tokens of a piece or a row, B rows.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import BeforeValidator, SerializeAsAny

from engine.config import Strict
from engine.errors import UserError
from engine.models.families import require
from engine.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    import torch

    Batch = dict[str, torch.Tensor]
    Parts = dict[str, tuple[torch.Tensor, torch.Tensor]]

BESIDE = "beside_"
"""Begins the names of position_ids and segments of a second side of packed rows."""
DEFAULT = "mlm"
"""What a recipe that names no objective gets."""
REGISTRY = Registry("objective", __name__, __path__, "bothways.objectives", DEFAULT)


class ObjectiveConfig(Strict):
    """Base of an objective's section: `type` names its file."""

    type: str


class Frame(NamedTuple):
    """The special tokens that stand around what a packed row holds."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    pieces: bool = True
    """They stand around every piece that a document was cut into, not around the document alone."""
    between: int | None = None
    """Stands between the parts of a piece, where an objective makes two of it."""


class Piece(NamedTuple):
    """A part of a document that fits a packed row, and what its frame puts around it: lists of tokens."""

    before: list[int]
    tokens: np.ndarray
    after: list[int]
    between: list[int]
    sentences: np.ndarray
    """Places in `tokens`, above 0, where a sentence begins; none where the objective does not ask for sentences."""
    elsewhere: Callable[[int, np.random.Generator], np.ndarray | None]
    """Returns so many tokens of another document, from the beginning of a sentence where one is near; None: none is as long."""


class Objective(abc.ABC):
    """One pretraining objective."""

    head: ClassVar[str]
    """The class of transformers with the heads that it trains, as in AutoModelForMaskedLM."""
    operation: ClassVar[str | None] = None
    """What its families must be able to do, of engine.models.families.OPERATIONS; None: any architecture may do."""
    says: ClassVar[str]
    """The objective in words."""
    scores: ClassVar[str] = "scores the vocabulary"
    """What the head does."""
    companion: ClassVar[str] = ""
    """Name of a model that learns beside it (engine/models/companions.py); "": none does."""
    special_tokens: ClassVar[tuple[str, ...]]
    """What its tokenizer must have."""
    sentences: ClassVar[bool] = False
    """It asks where sentences begin."""
    columns: ClassVar[dict[str, int | None]]
    """{column of a packed row that `corrupt` gives: what stands where there is no token}; None: the padding token."""
    beside: ClassVar[dict[str, int | None]] = {}
    """The same of a second side, where what is read and what is written differ: a batch of it is as wide as its longest row. The
    names of its position_ids and segments begin with BESIDE."""
    added_tokens: ClassVar[tuple[str, ...]] = ()
    """Special tokens that a vocabulary gets that is learnt for it."""

    @classmethod
    @abc.abstractmethod
    def of_tokenizer(cls, config: Any, tokenizer: Any) -> Objective:
        """Returns the objective for the tokens of a transformers tokenizer."""

    @classmethod
    def require(cls, tokenizer: Any) -> None:
        """Raises UserError when the tokenizer lacks a special token that the rows are made with."""
        missing = [name for name in cls.special_tokens if getattr(tokenizer, name) is None]
        if missing:
            raise UserError(
                f"{tokenizer.name_or_path}: this tokenizer has no {', '.join(missing)}, which {cls.says} needs: "
                "name them in its tokenizer_config.json"
            )

    @classmethod
    def require_family(cls, model_type: str | None) -> None:
        """Raises UserError when models of an architecture cannot learn it."""
        if cls.operation is not None:
            require(model_type, cls.operation)

    @classmethod
    def frame(cls, tokenizer: Any, language: str | None = None) -> Frame:
        """Returns what stands around the tokens of a document, as an encoder's tokenizer has it; of a language: a token of it,
        where an objective tags texts with theirs."""
        return Frame((tokenizer.cls_token_id,), (tokenizer.sep_token_id,))

    def arrange(self, piece: Piece, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the tokens of a piece with their frame, shape (L,), and columns that `corrupt` does not give."""
        import numpy as np

        return np.concatenate([piece.before, piece.tokens, piece.after]).astype(np.int64), {}

    def row_lengths(self, lengths: np.ndarray) -> np.ndarray:
        """Returns how many tokens of a row pieces of so many take, with their frame: it grows with their length."""
        return lengths

    def longest(self, length: int, framed: int) -> int:
        """Returns how many tokens a text has, at most, that fits rows of `length` tokens with `framed` more around it."""
        import numpy as np

        text = length - framed
        while self.row_lengths(np.asarray(text + framed + 1)) <= length:
            text += 1
        return text

    def make(self, piece: Piece, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns all columns of a piece; those of one side are as long as each other."""
        tokens, columns = self.arrange(piece, rng)
        return {**columns, **self.corrupt(tokens, rng)}

    @abc.abstractmethod
    def corrupt(self, tokens_L: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns columns of one piece of a document, with what its frame adds, each of shape (L,): a pure function."""

    @classmethod
    def accompany(cls, config: Any, model: Any, path: Path | str | None) -> bool:
        """Adds its `companion` to a model, in place, and returns whether that begins at random.

        Args:
            config: section of the objective.
            model: with nothing beside it.
            path: directory or hub id that the model was loaded from, which may hold the companion; None: the model is new.
        """
        return False

    @classmethod  # noqa: B027 - most heads are right as they are
    def adapt(cls, model: Any) -> None:
        """Changes a new model's heads before it has weights worth keeping, in place."""

    def remarks(self, tokens_N: np.ndarray) -> list[str]:
        """Returns what its user should know about the text, of which these are tokens, a line each."""
        return []

    def begin(self, model: Any, tokens_N: np.ndarray) -> None:  # noqa: B027 - most objectives know nothing
        """Sets what a new model can know from tokens of the text before its first step, in place."""

    @abc.abstractmethod
    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Returns the scores that the loss is made of."""

    @abc.abstractmethod
    def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (summed loss, number of targets) of packed rows: `columns`, position_ids and segments, each (B, L) int64, and
        what `placed` gives."""

    def measure(self, model: Any, batch: Batch) -> Parts:
        """Returns what held-out rows are judged by, `loss` among it, as (sum, number): an average is shown of each."""
        return {"loss": self.loss(model, batch)}

    def placed(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns what packed rows hold beside their columns, of any shape: where that stands which a loss picks out of them.

        It is found beside the step before: a GPU would have to be waited for.
        """
        return {}

    @abc.abstractmethod
    def count(self, arrays: dict[str, np.ndarray]) -> int:
        """Returns the number of targets of packed rows."""

    @classmethod
    def sides(cls, config: Any, length: int) -> tuple[int, ...]:
        """Returns how many tokens each side has of rows of `length` tokens that hold one piece each."""
        return (length,)

    @classmethod
    @abc.abstractmethod
    def made_up_loss(cls, config: Any, model: Any, rows: int, length: int) -> torch.Tensor:
        """Returns a loss of rows of `length` tokens that mean nothing: `bothways plan` measures what it takes."""


AnyObjective = Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(REGISTRY.validate)]
"""The section of any installed objective; only the file that it names is imported."""


def default_objective() -> ObjectiveConfig:
    """Returns the section of a recipe that says nothing."""
    return REGISTRY.validate({})


def objective_class(config: ObjectiveConfig) -> type[Objective]:
    """Returns the objective that a section names."""
    return REGISTRY.module(config.type).Objective
