"""Learning a WordPiece vocabulary from texts."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine.stages.stage import publish


def learn_wordpiece(texts: Iterator[str], vocab_size: int, lowercase: bool, documents: int | None, directory: Path) -> None:
    """Learns a BERT-style WordPiece vocabulary and writes it as a tokenizer directory, complete or absent.

    Args:
        texts: one document each.
        vocab_size: largest vocabulary, special tokens included.
        lowercase: fold case and strip accents.
        documents: learn from this many only.
        directory: where the tokenizer goes.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    learner = BertWordPieceTokenizer(lowercase=lowercase)
    learner.train_from_iterator(itertools.islice(texts, documents), vocab_size=vocab_size, show_progress=False)
    part = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    learner.save_model(str(part))
    tokenizer = BertTokenizer(vocab=str(part / "vocab.txt"), do_lower_case=lowercase)
    tokenizer.save_pretrained(part)
    publish(part, directory)
