"""What a model directory says of itself in its files, without torch: configuration, classes, vocabulary, padding."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.models.weights import TensorHeader, read_headers, refuse_pointer

_UNNAMED = re.compile(r"LABEL_\d+")
_EMBEDDING = re.compile(r"(^|\.)(word_embeddings?|embed_tokens|tok_embeddings|wte|shared)\.weight$")
_HEAD = re.compile(r"^(classifier(\.out_proj)?|classification_head\.out_proj|score|logits_proj)\.weight$")
_TASK_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json")
"""Files from which a fast tokenizer is read as they are."""
SENTENCEPIECE = ("spm.model", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
"""Files from which transformers makes one, with the package sentencepiece."""


def read_json(path: Path) -> Any:
    """Returns a JSON file of a model directory, None when there is none.

    Raises:
        UserError: it cannot be read.
    """
    refuse_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def class_names(config: dict[str, Any], head: str) -> list[str] | None:
    """Returns the classes of a model in the order of its scores, from its configuration; None when its head is another one.

    `LABEL_0`, `LABEL_1`, … are returned as they stand; see `named`.

    Args:
        head: how the names of the architectures with that head end, as in ForSequenceClassification.
    """
    if not any(str(name).endswith(head) for name in config.get("architectures") or []):
        return None
    names = config.get("id2label")
    if not isinstance(names, dict) or not names:  # what transformers leaves out of the file
        return [f"LABEL_{index}" for index in range(int(config.get("num_labels", 2)))]
    return [str(names[key]) for key in sorted(names, key=int)]


def other_head(config: dict[str, Any], head: str) -> str | None:
    """Returns the class of a model whose head was trained for another kind of task; None where there is no such head.

    Args:
        head: as for `class_names`.
    """
    names = [str(name) for name in config.get("architectures") or []]
    return next((name for name in names if name.endswith(_TASK_HEADS) and not name.endswith(head)), None)


def named(classes: Sequence[str]) -> bool:
    """Says whether classes have names: `LABEL_0`, … is what transformers writes where nobody gave any."""
    return not all(_UNNAMED.fullmatch(name) for name in classes)


def names_hint(own: Sequence[str], labels: Sequence[str]) -> str:
    """Returns how a recipe says which class of a model is which, as in `task.names: {LABEL_0: no, LABEL_1: yes}`."""
    pairs = ", ".join(f"{name}: {label}" for name, label in zip(own[:3], [*labels, *["…"] * len(own)], strict=False))
    return f"task.names: {{{pairs}{', …' if len(own) > 3 else ''}}}"


def listed(names: Sequence[str]) -> str:
    """Returns names for a message, the first of many."""
    return ", ".join(names[:6]) + (f", … ({len(names)})" if len(names) > 6 else "")


def token_rules(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Returns what decides which ids a text gets, of the content of a tokenizer.json."""
    return {key: value for key, value in tokenizer.items() if key not in ("version", "truncation", "padding")}


class ModelFiles:
    """A model directory.

    Raises:
        UserError: from every property, when the file that it reads is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        path = self.directory / "config.json"
        config = read_json(path)
        if not isinstance(config, dict):
            raise UserError(f"{path}: not the configuration of a model")
        return config

    @functools.cached_property
    def tensors(self) -> dict[str, TensorHeader]:
        """Name, dtype and shape of every weight."""
        return read_headers(self.directory)

    def require_tokenizer(self) -> None:
        """Raises UserError unless a fast tokenizer can be read from the directory, as it is or by the package sentencepiece."""
        for name in (*TOKENIZERS, *SENTENCEPIECE):
            path = self.directory / name
            refuse_pointer(path)
            if path.is_file():
                if name in SENTENCEPIECE and importlib.util.find_spec("sentencepiece") is None:
                    raise UserError(f"{path}: no tokenizer.json, which is made from it: pip install sentencepiece")
                return
        raise UserError(f"{self.directory}: no tokenizer in it (tokenizer.json)")

    @functools.cached_property
    def tokens(self) -> Any:
        """What decides which ids a text gets: equal for tokenizers that read alike; None when its files do not tell."""
        rules = read_json(self.directory / "tokenizer.json")
        if isinstance(rules, dict):
            return token_rules(rules)
        words = self.directory / "vocab.txt"
        return words.read_text(encoding="utf-8") if words.is_file() else None

    @property
    def vocabulary_kind(self) -> str | None:
        """What the tokenizer makes tokens by, as WordPiece or BPE; None when its files do not tell."""
        rules = self.tokens
        kind: str | None = (rules.get("model") or {}).get("type") if isinstance(rules, dict) else None
        return kind

    @functools.cached_property
    def vocabulary(self) -> int | None:
        """The largest token id of the tokenizer, plus 1; None when its files do not tell."""
        ids = [-1]
        tokenizer = read_json(self.directory / "tokenizer.json")
        if isinstance(tokenizer, dict):
            vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
            ids += vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
            ids += [token["id"] for token in tokenizer.get("added_tokens") or []]
        elif (self.directory / "vocab.txt").is_file():
            ids += [len((self.directory / "vocab.txt").read_text(encoding="utf-8").splitlines()) - 1]
            ids += (read_json(self.directory / "added_tokens.json") or {}).values()
        return max(ids) + 1 or None

    @functools.cached_property
    def embedding_rows(self) -> int | None:
        """Token ids that the weights have an embedding for; None when no tensor bears a known name."""
        rows = [tensor.shape[0] for name, tensor in self.tensors.items() if _EMBEDDING.search(name) and len(tensor.shape) == 2]
        return max(rows, default=None)

    @functools.cached_property
    def head_rows(self) -> int | None:
        """Classes that the weights have scores for; None when no tensor bears a known name."""
        rows = [tensor.shape[0] for name, tensor in self.tensors.items() if _HEAD.search(name) and len(tensor.shape) == 2]
        return max(rows, default=None)

    def refuse_quantizer(self) -> None:
        """Raises UserError when config.json asks for weights that a quantizer made: they can be neither trained nor exported."""
        asked = self.config.get("quantization_config")
        if asked:
            method = asked.get("quant_method", "unknown method") if isinstance(asked, dict) else asked
            raise UserError(
                f"{self.directory / 'config.json'}: quantization_config ({method}): its weights are already quantized and cannot "
                "be trained or exported: use the original model; a quantize stage makes it int8"
            )
