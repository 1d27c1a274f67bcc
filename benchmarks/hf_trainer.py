"""Fine-tuning by Hugging Face's Trainer, the peer of our own: `python -m benchmarks.hf_trainer PADDING …`.

Prints {"seconds": of training alone, "accuracy": on the dev rows} as JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

PADDINGS = ("padded", "dynamic", "grouped")
"""To the longest length there may be; to the longest row of a batch; the same with rows of similar length together."""


def read(path: Path, columns: list[str], rows: int | None = None) -> tuple[list[list[str]], list[str]]:
    """Returns the columns of text, each as a list, and the labels of a file of GLUE, the first `rows` of them."""
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        lines: list[dict[str, Any]] = [json.loads(line) for line in file] if path.suffix == ".jsonl" else list(table)
    return [[line[column] for line in lines[:rows]] for column in columns], [str(line["label"]) for line in lines[:rows]]


def main() -> None:
    """Trains and evaluates."""
    parser = argparse.ArgumentParser("python -m benchmarks.hf_trainer", description=__doc__)
    parser.add_argument("padding", choices=PADDINGS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--column", action="append", required=True, help="of the text; twice for pairs")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    chosen = parser.parse_args()
    import numpy as np
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.model)

    names = sorted(set(read(chosen.train, chosen.column)[1]))

    def encoded(path: Path, rows: int | None = None) -> list[dict[str, Any]]:
        texts, labels = read(path, chosen.column, rows)
        padding = {"padding": "max_length"} if chosen.padding == "padded" else {}
        columns = tokenizer(*texts, truncation=True, max_length=chosen.max_length, **padding)
        return [
            {**{name: values[at] for name, values in columns.items()}, "labels": names.index(label)}
            for at, label in enumerate(labels)
        ]

    training = encoded(chosen.train, chosen.rows)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch,
            num_train_epochs=chosen.epochs,
            per_device_train_batch_size=chosen.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=chosen.learning_rate,
            warmup_steps=round(0.06 * chosen.epochs * len(training) / chosen.batch_size),
            weight_decay=0.01,
            seed=chosen.seed,
            train_sampling_strategy="group_by_length" if chosen.padding == "grouped" else "random",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=transformers.AutoModelForSequenceClassification.from_pretrained(chosen.model, num_labels=2),
            args=arguments,
            train_dataset=training,
            processing_class=tokenizer,
        )
        seconds = trainer.train().metrics["train_runtime"]
        dev = encoded(chosen.dev)
        predicted = trainer.predict(dev).predictions.argmax(axis=1)
    accuracy = 100 * float(np.mean(predicted == [row["labels"] for row in dev]))
    print(json.dumps({"seconds": seconds, "accuracy": accuracy}))


if __name__ == "__main__":
    main()
