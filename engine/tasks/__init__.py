"""The training half of every task, one file each: its section of the recipe, examples, loss, and what a student imitates.

A file holds two classes: `Config` and `Task`; torch is imported inside functions only, so that a recipe is checked without it.
Its answering half, of the same name, lies in `engine.answers`. A package that is installed beside this one brings tasks of its
own by the entry points `bothways.tasks` and `bothways.answers`.

Shapes: N rows, B rows of a batch.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, SerializeAsAny

from engine.answers import MODEL, Row, answering
from engine.config import Strict
from engine.data.cells import Cell
from engine.errors import UserError
from engine.models import TOKEN_INPUTS
from engine.models.facts import class_names, token_rules
from engine.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    import torch

    from engine.data.columns import Proposal, Table

    Batch = dict[str, torch.Tensor]

REGISTRY = Registry("task", __name__, __path__, "bothways.tasks")
Example = dict[str, Any]
"""An encoded row; holds at least `input_ids`."""
Facts = dict[str, Any]
"""What a task has to know beside its section, JSON-able: learnt from the training rows, or read from a fine-tuned model."""
FACTS = "bothways_task"
"""config.json key of the task and of those facts that transformers has no entry for."""


@dataclass(frozen=True)
class Graph:
    """A part of a model that an engine runs: `run(name, arrays)` of the answering half."""

    inputs: list[str]
    """Names in order; each int64 of shape (batch, length)."""
    outputs: list[str]
    """Names in order, float32."""
    forward: Callable[[Any, Batch], Batch]
    """(model, inputs by name) → outputs by name."""
    of_tokens: frozenset[str] = frozenset()
    """Outputs of shape (batch, length, …), with a value for each token: 0 at padding, whatever the model gives there."""
    averaged: frozenset[str] = frozenset()
    """Outputs of the same shape in `forward` of which the graph gives the mean over real tokens, (batch, …)."""

    def run(self, model: Any, batch: Batch, mask_BL: torch.Tensor | None) -> Batch:
        """Returns the outputs.

        Args:
            mask_BL: 1 for real tokens.
        """
        outputs = self.forward(model, batch)
        if mask_BL is not None:
            for name in self.of_tokens:
                shape = (*mask_BL.shape, *(1,) * (outputs[name].ndim - 2))
                outputs[name] = outputs[name].masked_fill(mask_BL.reshape(shape) == 0, 0.0)
        for name in self.averaged:
            outputs[name] = token_mean(outputs[name], mask_BL)
        return outputs


def token_mean(values_BLF: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
    """Returns the mean over the real tokens of each row, shape (B, F); 0 of a row without one.

    Args:
        mask_BL: 1 for real tokens; None: all are.
    """
    if mask_BL is None:
        return values_BLF.mean(dim=1)
    weight_BL1 = mask_BL[..., None].to(values_BLF.dtype)
    return (values_BLF * weight_BL1).sum(dim=1) / weight_BL1.sum(dim=1).clamp(min=1.0)


class TaskConfig(Strict):
    """Base of a task's section: `type` names its file."""

    type: str

    @property
    def columns(self) -> dict[str, Cell]:
        """The columns that every row must fill, and what is made of their cells."""
        raise NotImplementedError

    @property
    def split_by(self) -> str:
        """The column whose hash decides to which split a row belongs."""
        return next(iter(self.columns))

    def classes_of(self, row: Row) -> list[Any]:
        """Returns the classes of a row, none where the task has none: shares leave every class a row to train on."""
        return []

    def check_length(self, max_length: int) -> None:
        """Raises UserError when the task cannot be done with rows of `max_length` tokens."""

    def check_rows(self, rows: Sequence[Row], complete: bool) -> None:
        """Looks at the training rows, or at the first of them.

        Args:
            complete: no others will follow.

        Raises:
            UserError: rows that are meant for another task.
        """

    @classmethod
    def propose(cls, table: Table, given: dict[str, str]) -> Proposal | None:
        """Returns how the task would read a file, None when its columns do not look like it: for `bothways new`.

        Args:
            given: {key of the section: column} that are not to be guessed.
        """
        return None

    def class_name(self, name: str) -> str:
        """Returns what the task calls a class of a model that comes with names of its own."""
        return name

    def unlabelled(self, text: str) -> Row:
        """Returns a row that holds a text alone, for a teacher to label.

        Raises:
            UserError: the task needs more than one text.
        """
        raise UserError(f"task.type={self.type}: rows of this task are more than one text: leave transfer out")


class Task(abc.ABC):
    """One task's training half.

    Args:
        config: its section.
        facts: from `learn` or `recall`.
        tokenizer: a fast tokenizer of transformers; it is saved beside the model.
        max_length: longer rows are cut to this many tokens, which `truncated` counts, or make several examples: `windows` counts
            those beyond the first.
    """

    head: ClassVar[str]
    """The class of transformers that makes the model, as in AutoModelForSequenceClassification."""
    says: ClassVar[str]
    """What a fine-tuned model of the task is, as in "a classifier"."""
    aligned: ClassVar[bool] = False
    """Its outputs stand for tokens: a student must then read with its teacher's tokenizer."""

    def __init__(self, config: Any, facts: Facts, tokenizer: Any, max_length: int) -> None:
        self.config, self.facts, self.tokenizer, self.max_length = config, facts, tokenizer, max_length
        self.truncated = self.windows = 0
        self.answers: Any = answering(config.type)({**config.model_dump(mode="json"), **facts}, limited(tokenizer, max_length))

    @classmethod
    @abc.abstractmethod
    def learn(cls, config: Any, rows: Sequence[Row]) -> Facts:
        """Returns what the training rows tell.

        Raises:
            UserError: nothing can be learnt from them.
        """

    @classmethod
    def in_order(cls, facts: Facts, own: list[str]) -> Facts:
        """Returns the facts with the classes in the order of a model that is fine-tuned, where it has the same ones.

        The rows of its head then go on meaning what they mean.

        Args:
            own: its classes, as the task calls them.
        """
        return facts

    @classmethod
    @abc.abstractmethod
    def recall(cls, config: Any, model: Any) -> Facts:
        """Returns the same from the configuration of a fine-tuned model, where `settings` left it."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """Returns the entries of the model's configuration: the size of its head, and what `recall` reads."""

    @property
    def kept(self) -> dict[str, Any]:
        """The entry of `settings` with the task and its facts as they are, but the labels, which have entries of their own."""
        return {FACTS: {"type": self.config.type, **{key: value for key, value in self.facts.items() if key != "labels"}}}

    def know(self, chosen: Facts) -> None:
        """Takes facts that were chosen with a trained model, see `Answers.choose`."""
        self.facts, self.answers = {**self.facts, **chosen}, self.answers.knowing(chosen)

    @property
    def inputs(self) -> list[str]:
        """Names of the model's inputs, in order."""
        return [name for name in TOKEN_INPUTS if name in self.tokenizer.model_input_names]

    outputs: list[str]
    """Names of the tensors that `named` gives."""

    @abc.abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Tokenizes rows in order, one example or several for each; a row without its truth is a row for a teacher.

        Raises:
            UserError: a truth that the task cannot take; names file and line of a row that was read from one.
        """

    @abc.abstractmethod
    def collate(self, examples: list[Example]) -> Batch:
        """Pads examples to the longest: the model's inputs and the targets."""

    def begin(self, examples: Sequence[Example]) -> None:  # noqa: B027 - most tasks have nothing to look for
        """Looks at the encoded training rows before anything is trained, for what only the loss has to know."""

    def groups(self, examples: Sequence[Example]) -> np.ndarray | None:
        """Returns a group of each training row, shape (N,), of which every epoch draws equally many; -1: each such row once.

        None, the default: every row once.
        """
        return None

    @abc.abstractmethod
    def count(self, batch: Batch) -> float:
        """Returns the number of valid targets, or the sum of their weights: what `loss` counts."""

    def sizes(self, batch: Batch) -> torch.Tensor:
        """Returns how many things `imitation` compares in each row, labelled or not, float32 of shape (B,); by default one."""
        import torch

        return torch.ones(len(batch["input_ids"]), device=batch["input_ids"].device)

    def places(self, batch: Batch) -> torch.Tensor:
        """Returns how many places the `lesson` of each row has where the task is `aligned`, shape (B,); by default its size."""
        return self.sizes(batch)

    def forward(self, model: Any, batch: Batch, **options: Any) -> Any:
        """Returns what the model returns."""
        return model(**{name: batch[name] for name in self.inputs}, **options)

    @abc.abstractmethod
    def named(self, output: Any) -> Batch:
        """Returns the tensors of `outputs` from what `forward` returned, float32."""

    @abc.abstractmethod
    def loss_of(self, outputs: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss as (sum over valid targets, number of valid targets)."""

    @property
    def notes(self) -> list[str]:
        """What is to be said of what was learnt from the rows, a fact a line."""
        return []

    @property
    def graphs(self) -> dict[str, Graph]:
        """The parts that are exported, by name; by default one, the whole model."""
        return {MODEL: Graph(self.inputs, self.outputs, lambda model, batch: self.named(self.forward(model, batch)))}

    def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `loss_of` for a batch."""
        return self.loss_of(self.named(self.forward(model, batch)), batch)

    @classmethod
    def made_up_loss(cls, model: Any, rows: int, length: int) -> torch.Tensor:
        """Returns a loss of rows of `length` tokens that mean nothing: `bothways plan` measures what it takes."""
        import torch

        ids = torch.zeros(rows, length, dtype=torch.int64)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().sum()

    def lesson(self, outputs: Batch, batch: Batch, temperature: float) -> Batch:
        """Returns what a student imitates, float32, from the outputs of a teacher, and of itself; by default the outputs.

        A task that is `aligned` gives a tensor with so many places a row as `places` says, shape (B, T, …), 0 behind them.
        """
        return outputs

    @abc.abstractmethod
    def imitation(self, outputs: Batch, teacher: Batch, temperature: float) -> torch.Tensor:
        """Returns how far a student's lesson is from its teacher's, summed over what `sizes` counts, in the unit of the loss."""


def limited(tokenizer: Any, max_length: int) -> Any:
    """Returns a copy of a transformers tokenizer's inside (`tokenizers.Tokenizer`) that truncates to `max_length` and pads.

    Raises:
        UserError: it has no padding token.
    """
    from tokenizers import Tokenizer

    from engine.answers._texts import limit

    inside = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    try:
        limit(inside, max_length, tokenizer.pad_token, tokenizer.truncation_side)
    except KeyError:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer has no padding token: name one (pad_token)") from None
    return inside


AnyTask = Annotated[SerializeAsAny[TaskConfig], BeforeValidator(REGISTRY.validate)]
"""The section of any installed task; only the file that it names is imported."""


def task_class(config: TaskConfig) -> type[Task]:
    """Returns the training half that a section names."""
    return REGISTRY.module(config.type).Task


def own_classes(config: TaskConfig, about: Any) -> list[str] | None:
    """Returns the classes of a model as the task calls them, from its configuration; None when its head is for something else."""
    names = class_names(about.to_dict(), task_class(config).head.removeprefix("AutoModel"))
    return names and [config.class_name(name) for name in names]


def task_of_model(config: TaskConfig, model: Path | str, max_length: int) -> Task:
    """Returns the task as a fine-tuned model does it: its tokenizer, its labels.

    Raises:
        UserError: the model's positions do not reach max_length.
    """
    from engine.models import check_length, load_tokenizer, read_config

    about = read_config(model)
    check_length(max_length, about, "max_length", model)
    chosen = task_class(config)
    return chosen(config, chosen.recall(config, about), load_tokenizer(model), max_length)


def with_tokenizer_of(task: Task, model: Path | str) -> Task:
    """Returns the task as another model reads it: the same task where its tokens and its inputs are the same.

    Raises:
        UserError: the model's positions do not reach max_length, or it has no tokenizer.
    """
    from engine.models import check_length, load_tokenizer, read_config

    tokenizer = load_tokenizer(model)
    check_length(task.max_length, read_config(model), "max_length", model)
    own = type(task)(task.config, task.facts, tokenizer, task.max_length)
    return task if own.inputs == task.inputs and reads_alike(tokenizer, task.tokenizer) else own


def reads_alike(one: Any, other: Any) -> bool:
    """True when two tokenizers of transformers give the same ids to every text."""
    rules = [token_rules(json.loads(tokenizer.backend_tokenizer.to_str())) for tokenizer in (one, other)]
    return rules[0] == rules[1]
