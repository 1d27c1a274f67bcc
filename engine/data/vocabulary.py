"""Learning a tokenizer's vocabulary from texts."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.stages.stage import publish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = {
    "wordpiece": ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
    "bpe": ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token", "cls_token", "sep_token"),
}
"""Kind of vocabulary → the special tokens that its tokenizer has."""


Texts = Callable[[], Iterator[str]]
"""Reads the documents from the beginning."""
ALPHABET = 1000
"""Characters that a WordPiece vocabulary has of its own, the most frequent ones."""


def learn_tokenizer(kind: str, texts: Texts, vocab_size: int, lowercase: bool, directory: Path) -> None:
    """Learns a vocabulary and writes it as a tokenizer directory, complete or absent. The same texts give the same vocabulary.

    Args:
        kind: `wordpiece`, as BERT has it (arXiv:1609.08144), or `bpe` on bytes, as GPT-2 has it, with RoBERTa's special tokens.
        texts: one document each; they are read up to three times.
        vocab_size: largest vocabulary, special tokens included.
        lowercase: fold case; WordPiece then strips accents, too.
        directory: where the tokenizer goes.
    """
    part = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    learn = _wordpiece if kind == "wordpiece" else _bpe
    learn(texts, vocab_size, lowercase, part).save_pretrained(part)
    publish(part, directory)


def _wordpiece(texts: Texts, vocab_size: int, lowercase: bool, directory: Path) -> PreTrainedTokenizerBase:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    learner = BertWordPieceTokenizer(lowercase=lowercase)
    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(learner.normalizer.normalize_str(text))
    written = sorted((one for one in counts if not one.isspace()), key=lambda one: (-counts[one], one))
    alphabet = sorted(written[:ALPHABET])
    # Learning nothing beyond the characters shows which of them go on with a word.
    learner.train_from_iterator(texts(), vocab_size=1, limit_alphabet=len(written), show_progress=False)
    # The learner numbers those as it comes upon them, in an order that changes from run to run, and prefers the smaller number
    # where two merges are as good. What is named before has its number.
    inner = sorted({f"##{character}" for character in alphabet} & learner.get_vocab().keys())
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    learner.train_from_iterator(
        texts(),
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[*special, *inner],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )
    learner.save_model(str(directory))
    tokenizer: Any = BertTokenizer(vocab=str(directory / "vocab.txt"), do_lower_case=lowercase)
    return tokenizer


def _bpe(texts: Texts, vocab_size: int, lowercase: bool, directory: Path) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    inside: Any = Tokenizer(models.BPE())
    if lowercase:
        inside.normalizer = normalizers.Lowercase()
    inside.pre_tokenizer, inside.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(names.values()), initial_alphabet=alphabet, show_progress=False
    )
    inside.train_from_iterator(texts(), trainer)
    ends = [(token, inside.token_to_id(token)) for token in (names["bos_token"], names["eos_token"])]
    inside.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    return PreTrainedTokenizerFast(tokenizer_object=inside, cls_token="<s>", sep_token="</s>", **names)
