"""Intent and slots, the training half: one encoder, one linear layer whose classes are tags of words and intents of the sentence.

The scores of the tags are those of tagging. Those of the intents are the mean over all tokens, which is a linear layer on the
mean of the encoder's outputs: it needs no token that stands for the sentence, so every family of encoders will do. Learning both
at once follows Chen et al. 2019 (arXiv:1902.10909).

Shapes: B examples, L tokens, W words of the longest, C tags, I intents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from engine.answers import Row
from engine.answers._marks import are_tags, listed
from engine.answers._schemes import OUTSIDE
from engine.answers.classification import label_of
from engine.answers.intent_slots import INTENT, PREFIX, intents_among
from engine.data.cells import Cell, label_cell, refuse_scores
from engine.data.columns import Proposal
from engine.data.sources import placed
from engine.errors import UserError, did_you_mean
from engine.tasks import FACTS, Example, Facts, Graph, tagging, token_mean
from engine.tasks._tags import TagsConfig
from engine.tasks._texts import file_of, keys_as_text

if TYPE_CHECKING:
    import torch

    from engine.data.columns import Table
    from engine.tasks import Batch

INTENTS = ("intent", "intents", "intent_label", "intent_name")
"""Names of columns that data sets have, likelier ones first."""


class Config(TagsConfig):
    """What a sentence asks for, and the parts of it that say with what."""

    type: Literal["intent_slots"]
    text: str = "tokens"
    """Column of the text, or of a list of its words."""
    label: str = "slots"
    """Column of the slots: a list of tags, one for each word, or of spans [start, end, type] of characters."""
    intent: str = "intent"
    """Column of the intent."""
    intent_names: dict[str, str] = {}
    """Names to show instead of the file's intents, as in {PlayMusic: play}; `names` are for slots."""
    intent_weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """What the intent counts in the loss: each word counts its slot once, and the intent of its sentence so often."""
    unseen: Literal["refuse", "miss"] = "refuse"
    """A slot or an intent that no training row has: name the first one and stop, or learn nothing from its row, in which it is
    judged as missed."""
    metric: Literal["exact", "intent_accuracy", "slot_f1"] = "exact"
    """Chooses the best weights. `exact`: the share of sentences whose intent and slots are all right."""

    _intents = field_validator("intent_names", mode="before")(lambda value: keys_as_text(value))

    @property
    def columns(self) -> dict[str, Cell]:
        return {**super().columns, self.intent: label_cell}

    def classes_of(self, row: Row) -> list[str]:
        intent = label_of(row, self.intent, self.intent_names)
        return [*super().classes_of(row), *([] if intent is None else [PREFIX + intent])]

    def class_name(self, name: str) -> str:
        if not name.startswith(PREFIX):
            return super().class_name(name)
        own = name.removeprefix(PREFIX)
        return PREFIX + self.intent_names.get(own, own)

    def source_of(self, rows: Sequence[Row]) -> str | None:
        """Returns the scheme of the tags of rows; see `TagsConfig.source_of`.

        Raises:
            UserError: the tags mark no slots.
        """
        found = super().source_of(rows)
        tags = {tag for row in rows if are_tags(row[self.label]) for tag in self.called(row[self.label])}
        if found is None and tags - {OUTSIDE}:
            raise UserError(f"{file_of(rows)}column '{self.label}' holds tags that mark no slots, as B-city, I-city and O do")
        return found or "bio"

    def check_rows(self, rows: Sequence[Row], complete: bool) -> None:
        """Looks at slots and intents of the training rows; raises as that of tagging, and for intents that are scores."""
        super().check_rows(rows, complete)
        intents = {str(row[self.intent]) for row in rows}
        refuse_scores(intents, self.intent, file_of(rows))
        unused = next((name for name in self.intent_names if name not in intents), None)
        if complete and unused is not None:
            hint = did_you_mean(unused, sorted(intents))
            raise UserError(f"{file_of(rows)}task.intent_names: '{unused}' is no intent of column '{self.intent}'{hint}")

    @classmethod
    def propose(cls, table: Table, given: dict[str, str]) -> Proposal | None:
        named = table.column(given["intent"]).name if "intent" in given else None
        intent = named or next((name for wanted in INTENTS for name in table.columns if name.lower() == wanted), None)
        found = tagging.Config.propose(table, {key: name for key, name in given.items() if key != "intent"})
        if intent is None or found is None or table.columns[intent].nested:
            return None
        label, text = found.section["label"], found.section["text"]
        config = cls(type="intent_slots", text=text, label=label, intent=intent)
        try:
            config.source_of([{label: listed(value)} for value in table.columns[label].raw])
        except UserError:
            return None
        seen = {**found.seen, "intent": f"{len(table.columns[intent].values)} intents"}
        return Proposal({**found.section, "intent": intent}, seen, found.texts, fit=found.fit + 1, advice=found.advice)


class Task(tagging.Task):
    """The task of intent and slots. Facts: those of tagging; `labels`: the tags, then the intents behind PREFIX."""

    says = "a model of intents and slots"

    def __init__(self, config: Any, facts: Facts, tokenizer: Any, max_length: int) -> None:
        super().__init__(config, facts, tokenizer, max_length)
        self.outputs = [INTENT, *self.outputs]

    @classmethod
    def learn(cls, config: Any, rows: Sequence[Row]) -> Facts:
        """Returns the tags and the intents of the training rows, and how tags mark slots.

        Raises:
            UserError: there are no slots, or fewer than two intents; see `Config.check_rows`.
        """
        facts = super().learn(config, rows)
        intents = sorted({str(label_of(row, config.intent, config.intent_names)) for row in rows})
        if len(intents) < 2:
            raise UserError(f"{file_of(rows)}column '{config.intent}' holds only the intent {intents}: two are needed at least")
        return {**facts, "labels": [*facts["labels"], *(PREFIX + intent for intent in intents)]}

    @classmethod
    def in_order(cls, facts: Facts, own: list[str]) -> Facts:
        tags = len(facts["labels"]) - len(intents_among(facts["labels"]))
        return super().in_order(facts, own) if not intents_among(own[:tags]) else facts

    @classmethod
    def recall(cls, config: Any, model: Any) -> Facts:
        if (getattr(model, FACTS, None) or {}).get("type") != config.type:
            raise UserError(
                "the model's classes (id2label) are not intents and slots that this task has learnt: fine-tune it first"
            )
        return super().recall(config, model)

    @property
    def notes(self) -> list[str]:
        intents = self.answers.intents
        shown = ", ".join(intents[: tagging.SHOWN]) + (f", … ({len(intents)})" if len(intents) > tagging.SHOWN else "")
        return [f"intents {shown}", *super().notes]

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Tokenizes rows as tagging does; "intent" of an example: its id, -100 for a row without.

        A row with what no training row has is one without its truth where the section says so.
        """
        return super().encode([self._learnable(row) for row in rows] if self.config.unseen == "miss" else rows)

    def _learnable(self, row: Row) -> Row:
        with placed(row):
            try:
                self.target_of(row)
                self.intent_of(row)
            except tagging.UnseenError:
                return {key: value for key, value in row.items() if key not in (self.config.label, self.config.intent)}
        return row

    def beside(self, row: Row) -> Example:
        return {"intent": self.intent_of(row)}

    def intent_of(self, row: Row) -> int:
        """Returns the id of a row's intent, -100 for a row without.

        Raises:
            UnseenError: an intent that training never saw.
        """
        name = self.answers.intent(row)
        if name is None:
            return int(self.missing)
        if name not in self.answers.intents:
            raise tagging.UnseenError(f"intent '{name}' is none of the training rows{did_you_mean(name, self.answers.intents)}")
        return self.answers.intents.index(name)

    def collate(self, examples: list[Example]) -> Batch:
        """Pads examples as tagging does; intents (B,)."""
        import torch

        return {**super().collate(examples), "intents": torch.tensor([example["intent"] for example in examples])}

    def named(self, output: Any) -> Batch:
        """Returns the scores of the intents of every token, (B, L, I), and what tagging gives, float32."""
        return {INTENT: output.logits[..., len(self.answers.tags) :].float(), **super().named(output)}

    @property
    def graphs(self) -> dict[str, Graph]:
        return {name: replace(graph, averaged=frozenset({INTENT})) for name, graph in super().graphs.items()}

    def loss_of(self, outputs: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ over labelled words of the loss of its slot and the weighted cross entropy of its sentence's intent; their number."""
        from torch.nn import functional

        total, count = super().loss_of(outputs, batch)
        intents_BI = token_mean(outputs[INTENT], batch["attention_mask"])
        losses_B = functional.cross_entropy(intents_BI, batch["intents"], reduction="none")
        return total + self.config.intent_weight * (losses_B * self.sizes(batch)).sum(), count

    def lesson(self, outputs: Batch, batch: Batch, temperature: float) -> Batch:
        """Returns, for each word, what tagging's student imitates and the logarithms of the intents' probabilities, (B, W, I)."""
        import torch

        found = super().lesson(outputs, batch, temperature)
        inside_BW1 = (torch.arange(batch["firsts"].shape[1], device=batch["words"].device) < batch["words"][:, None])[..., None]
        intents_BI = (token_mean(outputs[INTENT], batch["attention_mask"]) / temperature).log_softmax(dim=1)
        return {**found, INTENT: intents_BI[:, None] * inside_BW1}

    def imitation(self, outputs: Batch, teacher: Batch, temperature: float) -> torch.Tensor:
        """Σ over words of T² × KL(teacher ‖ student) of the slots and, weighted, of the intents; see `lesson`."""
        from torch.nn import functional

        intents = functional.kl_div(outputs[INTENT], teacher[INTENT].float(), reduction="sum", log_target=True)
        return super().imitation(outputs, teacher, temperature) + self.config.intent_weight * temperature**2 * intents
