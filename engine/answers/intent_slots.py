"""Intent and slots, the answering half: of one sentence scores of intents, and of tags for the first token of each word, in; the
intent with its probability, and the slots with their characters, out.

Shapes: N rows, M windows, I intents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.answers import Answer, Arrays, Metric, Row, tagging
from engine.answers._metrics import class_counts
from engine.answers._words import Encoded, Words
from engine.answers.classification import label_of, softmax

INTENT = "intent"
"""What the graph calls the scores of the intents, shape (M, I)."""
PREFIX = "intent:"
"""Begins the names of the intents among a model's classes; no tag begins so."""


class Answers(tagging.Answers):
    """An intent for a text, and its slots as entities.

    Facts: those of tagging, whose `labels` are the tags, then the intents behind PREFIX; `intent`, the column; `intent_names`
    instead of the data's.
    """

    METRICS = {
        "exact": Metric("exact", counted=True),
        "intent_accuracy": Metric("intent_accuracy", counted=True),
        "slot_f1": Metric("slot_f1"),
    }
    SCORES = "slots"

    def __init__(self, facts: dict[str, Any], tokenizer: Any) -> None:
        super().__init__(facts, tokenizer)
        self.intents = intents_among(facts["labels"])
        if not self.intents:
            raise ValueError("labels must hold intents")

    @staticmethod
    def tags_among(labels: list[str]) -> list[str]:
        return [label for label in labels if not label.startswith(PREFIX)]

    @property
    def metric(self) -> Metric:
        return self.METRICS[self.facts["metric"]]

    def read(self, outputs: Arrays, texts: Sequence[Words], encoded: Sequence[Encoded]) -> list[Answer]:
        """Returns {"intent", "score", "entities"} of each row: the mean scores of its windows decide."""
        if not encoded:
            return []
        windows_N = np.array([len(each.windows) for each in encoded])
        sums_NI = np.add.reduceat(outputs[INTENT], tagging.first_windows(encoded), axis=0)
        shares_NI = softmax(sums_NI / windows_N[:, None])
        found = super().read(outputs, texts, encoded)
        return [{**self._intent(share_I), **slots} for share_I, slots in zip(shares_NI, found, strict=True)]

    def _intent(self, share_I: np.ndarray) -> Answer:
        best = int(share_I.argmax())
        return {"intent": self.intents[best], "score": round(float(share_I[best]), 6)}

    def intent(self, row: Row) -> str | None:
        """Returns the name of a row's intent, None for an unlabelled row."""
        return label_of(row, self.facts["intent"], self.facts["intent_names"])

    def right(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        """Says of every row whether its intent and all of its slots are right, or the intent where that chooses, shape (N,)."""
        intents_N = self._intents_right(answers, rows)
        return intents_N if self.metric.name == "intent_accuracy" else intents_N & (super().wrongness(answers, rows) == 0)

    def _intents_right(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        return np.array([answer["intent"] == self.intent(row) for answer, row in zip(answers, rows, strict=True)], dtype=bool)

    def metrics(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, float]:
        """Returns, in percent, the share of rows with the right intent and exactly the right slots (`exact`), and with the right
        intent; precision, recall and F1 of slots as those of entities; and the number of examples."""
        slots = super().metrics(answers, rows)
        examples = slots.pop("examples")
        intents_N, wrong_N = self._intents_right(answers, rows), super().wrongness(answers, rows)
        return {
            "exact": 100.0 * float((intents_N & (wrong_N == 0)).mean()),
            "intent_accuracy": 100.0 * float(intents_N.mean()),
            **{f"slot_{name}": value for name, value in slots.items()},
            "examples": examples,
        }

    def table(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        """Returns precision, recall, F1 in percent and the number of each type of slot, then of each intent behind PREFIX."""
        truth, given = [str(self.intent(row)) for row in rows], [answer["intent"] for answer in answers]
        names = [*self.intents, *sorted(set(truth) - set(self.intents))]
        number = {name: index for index, name in enumerate(names)}
        truth_N, given_N = (np.array([number[name] for name in each], dtype=np.int64) for each in (truth, given))
        counts = class_counts(given_N, truth_N, len(names))
        return {**super().table(answers, rows), **counts.table([f"{PREFIX}{name}" for name in names])}

    def confusion(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, Any]:
        """Returns that of the types of slots, and behind them that of the intents with PREFIX."""
        slots = super().confusion(answers, rows)
        pairs = Counter((str(self.intent(row)), answer["intent"]) for answer, row in zip(answers, rows, strict=True))
        names = sorted({name for pair in pairs for name in pair})
        number = {name: len(slots["labels"]) + index for index, name in enumerate(names)}
        counts = sorted([number[true], number[given], count] for (true, given), count in pairs.items())
        return {"labels": [*slots["labels"], *(f"{PREFIX}{name}" for name in names)], "counts": [*slots["counts"], *counts]}

    off_by = "wrong slots, and the intent"

    def wrongness(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        """Returns how many slots are missed or made up, and 1 more for a wrong intent, shape (N,)."""
        return super().wrongness(answers, rows) + ~self._intents_right(answers, rows)

    def agreement(self, answers: list[Answer], others: list[Answer]) -> float:
        """Returns the mean over rows of the F1 of one model's slots against the other's; 0 where their intents differ."""
        same = [one["intent"] == other["intent"] for one, other in zip(answers, others, strict=True)]
        return float(np.mean(np.array(same) * self.alike(answers, others)))

    def record(self, answer: Answer, row: Row) -> dict[str, Any]:
        """Returns {"id", "text", "intent", "predicted_intent", "label", "prediction"}; slots are [start, end, type]."""
        found = super().record(answer, row)
        return {**found, "intent": self.intent(row), "predicted_intent": answer["intent"]}

    def pieces(self, answer: Answer, row: Row) -> list[tuple[str, str | None]]:
        """Returns the intent, then the text in pieces, each with the type of its slot or None."""
        return [(f"{answer['intent']}: ", None), *super().pieces(answer, row)]

    def explained(self, answer: Answer, row: Row) -> dict[str, Any]:
        """Returns the text twice, with what is true and with what was answered marked in it, the intent before it."""
        found = super().explained(answer, row)
        found["true"]["pieces"].insert(0, (f"{self.intent(row)}: ", None))
        return found

    def line(self, answer: Answer) -> str:
        """Returns the intent, its score and the slots."""
        return f"{answer['intent']}\t{answer['score']:.4f}\t{super().line(answer)}"


def intents_among(labels: Sequence[str]) -> list[str]:
    """Returns the names of the intents among a model's classes."""
    return [label.removeprefix(PREFIX) for label in labels if label.startswith(PREFIX)]
