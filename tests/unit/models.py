"""Tiny real models and tokenizers, made on the spot."""

from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertTokenizer

from engine.tasks import Graph, classification

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
GRAPH = Graph(INPUTS, ["logits"], lambda model, batch: {"logits": model(**batch).logits.float()})
"""The graph of a tiny classifier."""
WORDS = [
    "the",
    "a",
    "film",
    "plot",
    "actor",
    "scene",
    "was",
    "is",
    "very",
    "not",
    "good",
    "bad",
    "great",
    "dull",
    "warm",
    "cold",
    "long",
    "short",
    "story",
    "and",
    "but",
    "with",
    "of",
]


def tiny_config(**changes):
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    return BertConfig(**{**shape, **changes}, attn_implementation="eager")


def tiny_masked_lm(**changes):
    torch.manual_seed(0)
    return BertForMaskedLM(tiny_config(**changes)).eval()


def tiny_classifier(**changes):
    torch.manual_seed(0)
    return BertForSequenceClassification(tiny_config(**changes)).eval()


def tiny_tokenizer(directory: Path):
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return BertTokenizer(vocab=str(directory / "vocab.txt"))


def classification_task(directory: Path, max_length: int = 16, labels=("0", "1"), **config):
    """The classification task with the tiny tokenizer."""
    section = classification.Config(type="classification", **config)
    return classification.Task(section, {"labels": list(labels)}, tiny_tokenizer(directory), max_length)
