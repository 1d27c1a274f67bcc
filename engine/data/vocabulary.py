"""Learning a tokenizer's vocabulary from texts, and words for one that is there."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import UserError
from engine.stages.stage import publish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = {
    "wordpiece": ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
    "bpe": ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token", "cls_token", "sep_token"),
}
"""Kind of vocabulary → the special tokens that its tokenizer has."""
NOT_EXTENDED = "not a vocabulary of WordPiece, to which words could be added: leave out tokenizer.extend"

Texts = Callable[[], Iterator[str]]
"""Reads the documents from the beginning."""
ALPHABET, COVERAGE = 1000, 0.9995
"""A WordPiece vocabulary has so many characters, the most frequent ones; more where it takes them to write this share of the
texts, as of Chinese (SentencePiece's `character_coverage`), up to half of the vocabulary."""


def learn_tokenizer(
    kind: str, texts: Texts, vocab_size: int, lowercase: bool, directory: Path, added: Sequence[str] = ()
) -> None:
    """Learns a vocabulary and writes it as a tokenizer directory, complete or absent. The same texts give the same vocabulary.

    Args:
        kind: `wordpiece`, as BERT has it (arXiv:1609.08144), or `bpe` on bytes, as GPT-2 has it, with RoBERTa's special tokens.
        texts: one document each; they are read up to three times.
        vocab_size: largest vocabulary, special tokens included.
        lowercase: fold case; WordPiece then strips accents, too.
        directory: where the tokenizer goes.
        added: special tokens beside its own; not for `wordpiece`.
    """
    with _whole(directory) as part:
        if kind == "wordpiece":
            _wordpiece(texts, vocab_size, lowercase, part).save_pretrained(part)
        else:
            _bpe(texts, vocab_size, lowercase, list(added)).save_pretrained(part)


@contextlib.contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """Gives an empty directory beside this one, which it becomes when all is written."""
    part = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    publish(part, directory)


def extend_tokenizer(tokenizer: Any, texts: Texts, words: int | list[str], directory: Path) -> str:
    """Adds whole words to a WordPiece vocabulary and writes it as a tokenizer directory, complete or absent.

    Args:
        tokenizer: a fast one of transformers; it stays as it is.
        texts: one document each.
        words: so many words, those that save the most tokens in the texts; or these words.
        directory: where the tokenizer goes.

    Returns:
        what was added, and how many tokens it saves, in a line.

    Raises:
        UserError: no WordPiece vocabulary; a word that its tokenizer takes for several; nothing to add.
    """
    backend = tokenizer.backend_tokenizer
    if json.loads(backend.to_str())["model"]["type"] != "WordPiece":
        raise UserError(f"{tokenizer.name_or_path}: {NOT_EXTENDED}")

    def words_of(text: str) -> list[str]:
        normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]

    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(words_of(text))
    pieces = {word: len(backend.model.tokenize(word)) for word in counts}
    saved = {word: counts[word] * (pieces[word] - 1) for word in counts}
    if isinstance(words, int):
        chosen = sorted((word for word in counts if pieces[word] > 1), key=lambda word: (-saved[word], word))[:words]
    else:
        read = {word: words_of(word) for word in words}
        for word, found in read.items():
            if len(found) != 1:
                raise UserError(
                    f"tokenizer.extend.words: '{word}' is {len(found)} words to its tokenizer ({' '.join(found)}): leave it out"
                )
        chosen = [word for word in dict.fromkeys(found[0] for found in read.values()) if backend.token_to_id(word) is None]
    if not chosen:
        raise UserError("tokenizer.extend: its vocabulary has all of these words already: leave it out")
    first = max(tokenizer.get_vocab().values()) + 1
    with _whole(directory) as part:
        tokenizer.save_pretrained(part)
        file = part / "tokenizer.json"
        inside = json.loads(file.read_text("utf-8"))
        inside["model"]["vocab"].update({word: first + number for number, word in enumerate(chosen)})
        file.write_text(json.dumps(inside, ensure_ascii=False), "utf-8")
    share = sum(saved.get(word, 0) for word in chosen) / max(1, sum(counts[word] * pieces[word] for word in counts))
    some = ", ".join(chosen[:5]) + (", …" if len(chosen) > 5 else "")
    return f"{len(chosen):,} words are added to its vocabulary ({some}): the texts take {share:.1%} fewer tokens"


def _wordpiece(texts: Texts, vocab_size: int, lowercase: bool, directory: Path) -> PreTrainedTokenizerBase:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    learner = BertWordPieceTokenizer(lowercase=lowercase)
    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(learner.normalizer.normalize_str(text))
    written = sorted((one for one in counts if not one.isspace()), key=lambda one: (-counts[one], one))
    covered = np.cumsum([counts[one] for one in written])
    wanted = int(np.searchsorted(covered, COVERAGE * covered[-1])) + 1 if written else 0
    alphabet = sorted(written[: max(ALPHABET, min(wanted, vocab_size // 2))])
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


def _bpe(texts: Texts, vocab_size: int, lowercase: bool, added: list[str]) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    inside: Any = Tokenizer(models.BPE())
    if lowercase:
        inside.normalizer = normalizers.Lowercase()
    inside.pre_tokenizer, inside.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = sorted(pre_tokenizers.ByteLevel.alphabet()), [*names.values(), *added]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inside.train_from_iterator(texts(), trainer)
    ends = [(token, inside.token_to_id(token)) for token in (names["bos_token"], names["eos_token"])]
    inside.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    more: dict[str, Any] = {"extra_special_tokens": added} if added else {}
    return PreTrainedTokenizerFast(tokenizer_object=inside, cls_token="<s>", sep_token="</s>", **names, **more)
