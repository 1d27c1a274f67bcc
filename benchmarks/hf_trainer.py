"""Fine-tuning by Hugging Face's Trainer, the peer of `finetune_throughput`: `python -m benchmarks.hf_trainer PADDING …`.

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
MAX_LENGTH = 128


def read(path: Path, rows: int | None = None) -> tuple[list[str], list[int]]:
    """Returns the sentences and labels of an SST-2 file, the first `rows` of them."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:rows]
    return [line["sentence"] for line in lines], [int(line["label"]) for line in lines]


def main() -> None:
    """Trains one epoch and evaluates."""
    parser = argparse.ArgumentParser("python -m benchmarks.hf_trainer", description=__doc__)
    parser.add_argument("padding", choices=PADDINGS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    chosen = parser.parse_args()
    import numpy as np
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.model)

    def encoded(name: str, rows: int | None = None) -> list[dict[str, Any]]:
        texts, labels = read(chosen.data / name, rows)
        padding = {"padding": "max_length"} if chosen.padding == "padded" else {}
        ids = tokenizer(texts, truncation=True, max_length=MAX_LENGTH, **padding)["input_ids"]
        masks = tokenizer(texts, truncation=True, max_length=MAX_LENGTH, **padding)["attention_mask"]
        return [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, masks, labels, strict=True)]

    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=chosen.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=chosen.learning_rate,
            warmup_steps=round(0.06 * chosen.rows / chosen.batch_size),
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
            train_dataset=encoded("train.tsv", chosen.rows),
            processing_class=tokenizer,
        )
        seconds = trainer.train().metrics["train_runtime"]
        dev = encoded("dev.tsv")
        predicted = trainer.predict(dev).predictions.argmax(axis=1)
    accuracy = 100 * float(np.mean(predicted == [row["labels"] for row in dev]))
    print(json.dumps({"seconds": seconds, "accuracy": accuracy}))


if __name__ == "__main__":
    main()
