"""Extractive question answering, the training half: scores of tokens as the beginning and as the end of the answer.

The first token of a window stands for "no answer" (arXiv:1810.04805).
A context that is longer than a window becomes several examples, windows that overlap; one that does not hold the whole answer is
learnt as "no answer".

Shapes: B examples, L tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from engine.answers import Row
from engine.answers._quotes import Place, Quote, place_of, quotes_of, right_answers
from engine.answers._spans import NONE, Encoded, Window, inside, tokens_of
from engine.answers.question_answering import END, START
from engine.data.cells import Cell, text_cell
from engine.data.columns import Proposal
from engine.data.sources import placed
from engine.errors import UserError
from engine.tasks import FACTS, Example, Facts, TaskConfig
from engine.tasks._texts import TextTask, cell_of, file_of

if TYPE_CHECKING:
    import torch

    from engine.data.columns import Table
    from engine.tasks import Batch

LESSON = "log_probabilities"
NAMES = {
    "question": ("question", "query"),
    "context": ("context", "passage", "paragraph", "text"),
    "answers": ("answers", "answer"),
}
"""What columns are called, for `bothways new`."""


class Config(TaskConfig):
    """The part of a context that answers a question."""

    type: Literal["question_answering"]
    question: str = "question"
    """Column of the question."""
    context: str = "context"
    """Column of the text in which the answer stands."""
    answers: str = "answers"
    """Column of a list of right answers, each with `text` and `answer_start`, as SQuAD has them; an empty list: there is none."""
    unanswerable: bool | Literal["auto"] = "auto"
    """Questions may have no answer (SQuAD 2.0), and then get none where "no answer" scores higher by a threshold, which is chosen
    on validation rows; `auto`: where a training row has none."""
    stride: int | None = Field(None, ge=0)
    """Tokens that neighbouring windows of a long context share; None: a quarter of max_length."""
    max_answer: int = Field(30, ge=1)
    """Longest answer that is given, in tokens."""
    n_best: int = Field(5, ge=1)
    """Answers that are given with their scores, the best one among them."""
    metric: Literal["f1", "exact_match"] = "f1"
    """Chooses the best weights and the threshold."""

    @property
    def columns(self) -> dict[str, Cell]:
        return {self.question: text_cell, self.context: text_cell, self.answers: cell_of(_as_given)}

    @property
    def split_by(self) -> str:
        """Questions on one context stay together."""
        return self.context

    def quotes(self, row: Row) -> list[tuple[Quote, Place]]:
        """Returns the right answers of a labelled row with their places; one that stands beside its place is found.

        Raises:
            UserError: an answer that does not stand in the context, or none where all questions have one.
        """
        try:
            found = [(quote, place_of(quote, row[self.context])) for quote in right_answers(row, row[self.answers])]
        except ValueError as error:
            raise UserError(f"{_named(row)}{error}") from None
        if not found and self.unanswerable is False:
            raise UserError(f"{_named(row)}has no answer: leave it out, or let questions have none (task.unanswerable: true)")
        return found

    def check_length(self, max_length: int) -> None:
        if self.stride is not None and self.stride >= max_length:
            raise UserError(f"task.stride={self.stride}: windows of max_length={max_length} tokens cannot share as many")

    def check_rows(self, rows: Sequence[Row], complete: bool) -> None:
        """Looks for the answers of the training rows in their contexts.

        Raises:
            UserError: one that is not there; names file, line and question.
        """
        for row in rows:
            with placed(row):
                self.quotes(row)

    @classmethod
    def propose(cls, table: Table, given: dict[str, str]) -> Proposal | None:
        found = {key: table.column(name).name for key, name in given.items()}
        for key, names in NAMES.items():
            there = next((name for name in table.columns if name.lower() in names and name not in found.values()), None)
            if key not in found and there is not None:
                found[key] = there
        if not found.keys() >= NAMES.keys():
            return None
        cells = (table.columns[found[key]].raw for key in NAMES)
        try:
            rows = [(str(context), quotes_of(answers)) for _, context, answers in zip(*cells, strict=False)]
        except ValueError:
            return None
        quotes = [each for _, each in rows]
        if 2 * sum(all(quote.text in context for quote in each) for context, each in rows) < len(rows):
            return None  # answers of another kind, as yes and no
        without = sum(not each for each in quotes)
        words = [f"{table.columns[found[key]].mean_words:.0f} words on average" for key in ("question", "context")]
        told = f"{without:,} of {len(quotes):,} questions have none" if without else "they stand in the contexts"
        seen = dict(zip(NAMES, [*words, told], strict=True))
        return Proposal({key: found[key] for key in NAMES}, seen, [found["question"], found["context"]], fit=3.0)


def _as_given(value: Any) -> Any:
    """Returns a cell of answers as it is, when it can be read."""
    quotes_of(value)
    return value


def _named(row: Row) -> str:
    """Returns how a message about a question begins."""
    return f"question {row['id']}: " if row.get("id") is not None else ""


class Task(TextTask):
    """The task of finding answers.

    Facts: `may_be_none`; `threshold`, chosen once it is trained; `moved`: training answers that stood beside their places.
    """

    head = "AutoModelForQuestionAnswering"
    says = "a model that finds answers"
    aligned = True
    outputs = [START, END]

    def __init__(self, config: Config, facts: Facts, tokenizer: Any, max_length: int) -> None:
        try:
            super().__init__(config, facts, tokenizer, max_length)
        except ValueError as error:
            raise UserError(f"task.type={config.type}: {error}") from None

    @classmethod
    def learn(cls, config: Config, rows: Sequence[Row]) -> Facts:
        """Returns whether questions may have no answer.

        Raises:
            UserError: no row has one, or one does not stand where it should.
        """
        moved = answered = without = 0
        for row in rows:
            with placed(row):
                found = config.quotes(row)
            answered, without = answered + bool(found), without + (not found)
            moved += sum(quote.start not in (None, place.start) for quote, place in found)
        if not answered:
            raise UserError(f"{file_of(rows)}column '{config.answers}' holds no answer: there is nothing to learn")
        may_be_none = without > 0 if config.unanswerable == "auto" else config.unanswerable
        return {"may_be_none": may_be_none, "threshold": 0.0, "moved": moved}

    @classmethod
    def recall(cls, config: Config, model: Any) -> Facts:
        kept = getattr(model, FACTS, None) or {}
        facts = {"may_be_none": False, "threshold": 0.0, "moved": 0}
        if kept.get("type") == config.type:
            facts |= {key: kept[key] for key in ("may_be_none", "threshold")}
        return facts if config.unanswerable == "auto" else {**facts, "may_be_none": config.unanswerable}

    def settings(self) -> dict[str, Any]:
        return {"num_labels": 2, **self.kept}

    @property
    def notes(self) -> list[str]:
        moved = self.facts["moved"]
        found = [f"{moved:,} answers stood up to a few characters beside answer_start: found there"] if moved else []
        return [*found, "questions may have no answer" if self.facts["may_be_none"] else "every question has an answer"]

    def target_of(self, row: Row) -> Place | None:
        """Returns the place of the most frequent answer, of equally frequent ones the first.

        (0, 0) stands for no answer, None for a row without its truth.

        Raises:
            UserError: see `Config.quotes`; or it has no answer where all training rows have one.
        """
        if row.get(self.config.answers) is None:
            return None
        found = self.config.quotes(row)
        if not found and not self.facts["may_be_none"]:
            raise UserError(
                f"{_named(row)}has no answer, and all training rows have one: leave it out, or set task.unanswerable: true"
            )
        return Counter(place for _, place in found).most_common(1)[0][0] if found else Place(0, 0)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Tokenizes rows in order, an example for each window.

        Returns:
            {"input_ids", "token_type_ids", "context": places of its first token and behind the last one, "label": places of the
            first and of the last token of the answer, -100 for a row without its truth, "id"}.
        """
        examples = []
        rows = list(rows)
        for row, encoded in zip(rows, self.answers.encode(rows), strict=True):
            with placed(row):
                labels = self._labels(row, encoded)
            self.truncated += encoded.cut
            self.windows += len(encoded.windows) - 1
            name = self.answers.identity(row)
            examples += [_example(window, label, name) for window, label in zip(encoded.windows, labels, strict=True)]
        return examples

    def _labels(self, row: Row, encoded: Encoded) -> list[list[int]]:
        """Returns the places of the answer's first and last token in each window, twice `NONE` where it is not in it."""
        place = self.target_of(row)
        if place is None:
            return [[int(self.missing)] * 2] * len(encoded.windows)
        if place == (0, 0):
            return [[NONE, NONE]] * len(encoded.windows)
        try:
            tokens = tokens_of(encoded, place)
        except ValueError as error:
            raise UserError(
                f"{_named(row)}the answer '{row[self.config.context][slice(*place)]:.40}' {error}: leave it out"
            ) from None
        return [list(inside(window, *tokens) or (NONE, NONE)) for window in encoded.windows]

    def collate(self, examples: list[Example]) -> Batch:
        """Pads examples to the longest: the inputs (B, L); context, labels (B, 2)."""
        import torch

        pairs = {
            name: np.array([example[key] for example in examples], dtype=np.int64)
            for name, key in (("context", "context"), ("labels", "label"))
        }
        return {name: torch.from_numpy(array) for name, array in {**self.padded(examples), **pairs}.items()}

    def count(self, batch: Batch) -> float:
        return int((batch["labels"][:, 0] >= 0).sum())

    def places(self, batch: Batch) -> torch.Tensor:
        return batch["attention_mask"].sum(dim=1)

    def named(self, output: Any) -> Batch:
        """Returns the scores of every token as beginning and as end, shape (B, L) each, float32."""
        return {START: output.start_logits.float(), END: output.end_logits.float()}

    @property
    def graphs(self) -> dict[str, Any]:
        return {name: replace(graph, of_tokens=frozenset(self.outputs)) for name, graph in super().graphs.items()}

    def loss_of(self, outputs: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy of the first and of the last token, their mean: (sum over labelled windows in nats, their number)."""
        from torch.nn import functional

        logits_BL2, labels_B2 = _of_context(outputs, batch), batch["labels"]
        return functional.cross_entropy(logits_BL2, labels_B2, reduction="sum") / 2, (labels_B2[:, 0] >= 0).sum()

    @classmethod
    def made_up_loss(cls, model: Any, rows: int, length: int) -> torch.Tensor:
        import torch

        ids = torch.zeros(rows, length, dtype=torch.int64)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return output.start_logits.float().sum() + output.end_logits.float().sum()

    def lesson(self, outputs: Batch, batch: Batch, temperature: float) -> Batch:
        """Returns the logarithm of the softened probability of every token as beginning and as end, (B, L, 2).

        It is 0 for what is neither context nor "no answer".
        """
        logits_BL2 = _of_context(outputs, batch)
        found_BL2 = (logits_BL2 / temperature).log_softmax(dim=1)
        return {LESSON: found_BL2.masked_fill(logits_BL2.isinf(), 0.0)}

    def imitation(self, outputs: Batch, teacher: Batch, temperature: float) -> torch.Tensor:
        """Σ over windows of T² × KL(teacher ‖ student) of the softened beginning and end, their mean (arXiv:1503.02531)."""
        from torch.nn import functional

        own_BL2, target_BL2 = outputs[LESSON], teacher[LESSON].float()
        return temperature**2 * functional.kl_div(own_BL2, target_BL2, reduction="sum", log_target=True) / 2


def _example(window: Window, label: list[int], name: str) -> Example:
    size = sum(window.encoding.attention_mask)
    return {
        "input_ids": window.encoding.ids[:size],
        "token_type_ids": window.encoding.type_ids[:size],
        "context": [window.first, window.end],
        "label": label,
        "id": name,
    }


def _of_context(outputs: Batch, batch: Batch) -> torch.Tensor:
    """Returns the scores as beginning and as end, shape (B, L, 2): -inf for what is neither context nor "no answer"."""
    import torch

    logits_BL2 = torch.stack([outputs[START], outputs[END]], dim=2)
    place_L, context_B2 = torch.arange(logits_BL2.shape[1], device=logits_BL2.device), batch["context"]
    inside_BL = (place_L >= context_B2[:, :1]) & (place_L < context_B2[:, 1:]) | (place_L == NONE)
    return logits_BL2.masked_fill(~inside_BL[..., None], float("-inf"))
