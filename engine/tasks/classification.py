"""Text classification: a softmax over labels on top of the pooled first token.

Shapes: B rows, L tokens, C classes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from engine.data.readers import Row
from engine.data.sources import PlacedRow
from engine.errors import UserError, did_you_mean
from engine.models import check_length, load_tokenizer, read_config
from engine.tasks import ClassificationConfig

Example = dict[str, Any]


class Classification:
    """The classification task.

    Args:
        config: columns.
        labels: class names in the order of their ids.
        tokenizer: a fast tokenizer of transformers.
        max_length: longer rows are cut to this many tokens; `truncated` counts them.
    """

    head = "classification"

    def __init__(self, config: ClassificationConfig, labels: list[str], tokenizer: Any, max_length: int) -> None:
        self.config = config
        self.labels = labels
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncated = 0

    @staticmethod
    def find_labels(rows: list[Row], config: ClassificationConfig) -> list[str]:
        """Returns the sorted labels of the training rows.

        Raises:
            UserError: fewer than two, numbers that are scores, or `names` for labels that are not there.
        """
        config.check_labels({str(row[config.label]) for row in rows}, complete=True)
        labels = sorted({str(config.label_of(row)) for row in rows})
        if len(labels) < 2:
            raise UserError(f"column '{config.label}' holds only the label {labels}: a classifier needs at least two")
        return labels

    @classmethod
    def of_model(cls, config: ClassificationConfig, model: Path | str, max_length: int) -> Classification:
        """Returns the task as a fine-tuned model does it: its tokenizer, its labels.

        Raises:
            UserError: the model's positions do not reach max_length.
        """
        about = read_config(model)
        check_length(max_length, about, "max_length", model)
        labels = [about.id2label[index] for index in range(about.num_labels)]
        return cls(config, labels, load_tokenizer(model), max_length)

    @property
    def inputs(self) -> list[str]:
        """Names of the model's inputs, in order."""
        names = ["input_ids", "attention_mask", "token_type_ids"]
        return [name for name in names if name in self.tokenizer.model_input_names]

    def encode(self, rows: list[Row]) -> list[Example]:
        """Tokenizes rows in order.

        Returns:
            {"input_ids", "token_type_ids", "label", "id"} of each row; "label" is None for an unlabelled row.

        Raises:
            UserError: a label that training never saw; names file and line of a row that was read from one.
        """
        config = self.config
        texts = [str(row[config.text]) for row in rows]
        pairs = [str(row[config.text_pair]) for row in rows] if config.text_pair else None
        encoded = self.tokenizer(texts, pairs, truncation=False, add_special_tokens=True, verbose=False)
        self.truncated += sum(len(ids) > self.max_length for ids in encoded["input_ids"])
        if any(len(ids) > self.max_length for ids in encoded["input_ids"]):
            encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length)
        number = {label: index for index, label in enumerate(self.labels)}
        examples = []
        for index, row in enumerate(rows):
            label = config.label_of(row)
            if label is not None and label not in number:
                where = f"{row.path}:{row.line}: " if isinstance(row, PlacedRow) else ""
                raise UserError(f"{where}label '{label}' is not among the training labels{did_you_mean(label, self.labels)}")
            key = "\t".join([texts[index], *([pairs[index]] if pairs else [])])
            ids = encoded["input_ids"][index]
            examples.append(
                {
                    "input_ids": ids,
                    "token_type_ids": encoded["token_type_ids"][index] if "token_type_ids" in encoded else [0] * len(ids),
                    "label": None if label is None else number[label],
                    "id": hashlib.sha256(key.encode()).hexdigest()[:16],
                }
            )
        return examples

    def collate(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Pads examples to the longest: input_ids, attention_mask, token_type_ids (B, L); labels (B,), -100 if none."""
        length = max(len(example["input_ids"]) for example in examples)
        ids = np.full((len(examples), length), self.tokenizer.pad_token_id, dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, example in enumerate(examples):
            size = len(example["input_ids"])
            ids[row, :size] = example["input_ids"]
            types[row, :size] = example["token_type_ids"]
            mask[row, :size] = 1
        labels = [-100 if example["label"] is None else example["label"] for example in examples]
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": np.asarray(labels)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def logits(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the class scores before the softmax, shape (B, C), float32."""
        return model(**{name: batch[name] for name in self.inputs}).logits.float()

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy: (sum over labelled rows, number of labelled rows)."""
        logits_BC = self.logits(model, batch)
        return functional.cross_entropy(logits_BC, batch["labels"], reduction="sum"), (batch["labels"] >= 0).sum()

    def metrics(self, logits_NC: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
        """Returns accuracy and macro F1 in percent, mean loss in nats, and the number of examples."""
        from torchmetrics.functional.classification import multiclass_f1_score

        logits, labels = torch.from_numpy(logits_NC), torch.from_numpy(labels_N)
        predicted = logits.argmax(dim=1)
        f1 = multiclass_f1_score(predicted, labels, num_classes=len(self.labels), average="macro")
        return {
            "accuracy": 100.0 * float((predicted == labels).double().mean()),
            "f1_macro": 100.0 * float(f1),
            "loss": float(functional.cross_entropy(logits, labels)),
            "examples": len(labels),
        }

    def predictions(self, examples: list[Example], logits_NC: np.ndarray) -> list[dict[str, Any]]:
        """Returns one record per example: id, label, prediction, scores (softmax)."""
        scores = torch.from_numpy(logits_NC).softmax(dim=1).numpy()
        return [
            {
                "id": example["id"],
                "label": self.labels[example["label"]],
                "prediction": self.labels[int(row.argmax())],
                "scores": [round(float(score), 6) for score in row],
            }
            for example, row in zip(examples, scores, strict=True)
        ]
