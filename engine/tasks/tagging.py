"""Sequence tagging, the training half: a score for every tag at the first token of each word; a softmax over each, or a CRF.

Rows longer than `max_length` become several examples, windows that overlap. Every word is learnt in one of them, where most
tokens stand around it.

Shapes: B examples, L tokens, W words of the longest, C tags.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engine.answers import Row
from engine.answers._marks import are_tags, listed, types_of, words_of
from engine.answers._schemes import OUTSIDE, labels_of, marks_entities, parse, tags_of
from engine.answers._words import Encoded, Words
from engine.answers.tagging import TRANSITIONS
from engine.data.columns import Proposal
from engine.data.sources import placed
from engine.errors import UserError, did_you_mean
from engine.models.heads import HEAD_KEY, TAGS_KEY
from engine.tasks import FACTS, Example, Facts
from engine.tasks._tags import TagsConfig
from engine.tasks._texts import TextTask, facts_in_order, file_of, labels_as_settings

if TYPE_CHECKING:
    import torch

    from engine.data.columns import Table
    from engine.tasks import Batch

CRF = "crf"
"""The part of a model (engine.models.heads) that gives its transitions."""
LESSON = "log_probabilities"
SHOWN = 8
"""Types that a line lists."""
LABELS = ("label", "labels", "ner", "ner_tags", "tags", "slots", "entities", "spans", "upos", "pos")
TEXTS = ("text", "words", "tokens", "sentence", "form")
"""Names of columns that data sets have, likelier ones first."""


class Config(TagsConfig):
    """Tags of the words of a text, or the entities in it."""

    type: Literal["tagging"]
    metric: Literal["f1", "f1_macro", "accuracy"] | None = None
    """Chooses the best weights; None: F1 of entities, or the accuracy of tags that mark none."""

    def check_metric(self, marks: bool) -> None:
        """Raises UserError when the metric is none of tags that mark entities, or of such that mark none."""
        fitting, what = (("f1", "f1_macro"), "mark") if marks else (("accuracy", "f1_macro"), "do not mark")
        if self.metric is not None and self.metric not in fitting:
            raise UserError(f"task.metric={self.metric}: these tags {what} entities: take {' or '.join(fitting)}")

    @classmethod
    def propose(cls, table: Table, given: dict[str, str]) -> Proposal | None:
        named = {key: table.column(name).name for key, name in given.items()}
        label = named.get("label") or _likeliest(table, LABELS, _holds_marks, without=named.get("text"))
        text = named.get("text") or _likeliest(table, TEXTS, lambda value: isinstance(value, (str, list)), without=label)
        if text is None or label is None or not all(map(_holds_marks, table.columns[label].raw)):
            return None
        labels = [listed(value) for value in table.columns[label].raw]
        rows = [{text: words, label: marks} for words, marks in zip(table.columns[text].raw, labels, strict=False)]
        if any(are_tags(row[label]) and len(words_of(row, text, label).places) != len(row[label]) for row in rows):
            return None
        source = cls(type="tagging", text=text, label=label).source_of(rows)
        types = sorted({kind for marks in labels for kind in (types_of(marks, {}) if source else marks)})
        what = f"entities of {len(types)} types" if source else f"{len(types)} tags"
        shown = ", ".join(types[:SHOWN]) + (", …" if len(types) > SHOWN else "")
        seen = {
            "text": f"{table.columns[text].mean_words:.0f} words on average",
            "label": f"{what}: {shown}" + (f"; tags in {source}" if source and any(map(are_tags, labels)) else ""),
        }
        advice = "crf: true  # learn which tag follows which, too"
        return Proposal({"text": text, "label": label}, seen, [text], fit=2.0, advice=advice)


def _likeliest(table: Table, names: tuple[str, ...], fits: Callable[[Any], bool], without: str | None) -> str | None:
    """Returns the column whose values fit: one that bears such a name, else the last one."""
    found = [name for name, column in table.columns.items() if name != without and column.raw and all(map(fits, column.raw))]
    return next((name for wanted in names for name in found if name.lower() == wanted), found[-1] if found else None)


def _holds_marks(value: Any) -> bool:
    """Says whether a cell is a list of spans, or of what looks like tags."""
    try:
        marks = listed(value) if isinstance(value, list) else None
    except ValueError:
        return False
    if marks is None or not are_tags(marks):
        return marks is not None
    return marks_entities(marks) or all(mark == OUTSIDE or mark.isupper() for mark in marks)


class UnseenError(UserError):
    """A truth that no training row has."""


class Task(TextTask):
    """The tagging task. Facts: `labels`, the tags by id; `marks`, the scheme of entities or None; `source`, the data's."""

    head = "AutoModelForTokenClassification"
    says = "a model that tags words"
    aligned = True

    def __init__(self, config: TagsConfig, facts: Facts, tokenizer: Any, max_length: int) -> None:
        try:
            super().__init__(config, facts, tokenizer, max_length)
        except ValueError as error:
            raise UserError(f"task.type={config.type}: {error}") from None
        config.check_metric(facts["marks"] is not None)
        self.outputs = [self.answers.SCORES, *([TRANSITIONS] if config.crf else [])]

    @classmethod
    def learn(cls, config: TagsConfig, rows: Sequence[Row]) -> Facts:
        """Returns the tags of the training rows, and how they mark entities.

        Raises:
            UserError: there are none, or they break their scheme.
        """
        config.check_rows(rows, complete=True)
        source = config.source_of(rows)
        kinds: set[str] = set()
        for row in rows:
            kinds.update(types_of(row[config.label], config.names) if source else config.called(row[config.label]))
        if len(kinds) < (1 if source else 2):
            found = "no entity" if source or not kinds else "one tag only"
            raise UserError(f"{file_of(rows)}column '{config.label}' holds {found}: there is nothing to learn")
        labels = labels_of(sorted(kinds), config.learns) if source else sorted(kinds)
        return {"labels": labels, "marks": config.learns if source else None, "source": source}

    @classmethod
    def in_order(cls, facts: Facts, own: list[str]) -> Facts:
        return facts_in_order(facts, own)

    @classmethod
    def recall(cls, config: TagsConfig, model: Any) -> Facts:
        labels = [config.class_name(model.id2label[index]) for index in range(model.num_labels)]
        has = getattr(model, HEAD_KEY, None) == CRF
        if has != config.crf:
            raise UserError(f"the model has {'a' if has else 'no'} CRF: set task.crf: {str(has).lower()}")
        kept = getattr(model, FACTS, None) or {}
        if kept.get("type") == config.type:
            return {"labels": labels, "marks": kept["marks"], "source": kept["source"]}
        # Somebody else's model: the scheme follows from its tags; the data is read in the scheme that the section names.
        scheme = None
        if marks_entities(labels):
            scheme = "bioes" if any(parse(label)[0] in "ES" for label in labels) else "bio"
        source = {"auto": scheme, "none": None}.get(config.scheme, config.scheme)
        return {"labels": labels, "marks": scheme, "source": source}

    def settings(self) -> dict[str, Any]:
        part = {HEAD_KEY: CRF if self.config.crf else None, TAGS_KEY: len(self.answers.tags)}
        return {**labels_as_settings(self.facts["labels"]), **part, **self.kept}

    @property
    def notes(self) -> list[str]:
        if self.answers.scheme is None:
            return [f"{len(self.answers.tags)} tags"]
        source, types = self.facts["source"], self.answers.types
        shown = ", ".join(types[:SHOWN]) + (f", … ({len(types)})" if len(types) > SHOWN else "")
        read = f"; tags of the data read as {source}" if source != self.answers.scheme else ""
        return [f"entities {shown}{read}; the model gives {self.answers.scheme}"]

    def target_of(self, row: Row) -> list[int]:
        """Returns the tag of each word.

        Raises:
            UnseenError: a tag that training never saw.
            RowError: no truth that can be read, see `engine.answers.tagging`.
        """
        words = self.answers.words(row)
        if row.get(self.config.label) is None:
            return [int(self.missing)] * len(words.places)
        if self.answers.scheme is None:
            tags = self.answers.word_tags(row, words)
        else:
            tags = tags_of(self.answers.entities(row, words), len(words.places), self.answers.scheme)
        for tag in tags:
            if tag not in self.number:
                raise UnseenError(f"tag '{tag}' is none of the training rows{did_you_mean(tag, self.answers.tags)}")
        return [self.number[tag] for tag in tags]

    @functools.cached_property
    def number(self) -> dict[str, int]:
        """{tag: its id}."""
        return {tag: index for index, tag in enumerate(self.facts["labels"])}

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Tokenizes rows in order, an example for each window.

        Returns:
            {"input_ids", "token_type_ids", "firsts": places of the first tokens of the words that are learnt here, "label": their
            tags, -100 for a row without, "whole": 1 where the row's first, and its last word is among them, "id"}.
        """
        examples = []
        rows = list(rows)
        for row, encoded in zip(rows, self.answers.encode(rows), strict=True):
            with placed(row):
                label_W = np.asarray(self.target_of(row), dtype=np.int64)
                self._require_read(row, encoded, label_W)
                beside = {**self.beside(row), "id": self.answers.identity(row)}
            self.windows += len(encoded.windows) - 1
            examples += [{**self._window(encoded, number, label_W), **beside} for number in range(len(encoded.windows))]
        return examples

    def beside(self, row: Row) -> Example:
        """Returns what the examples of all windows of a row hold beside its words."""
        return {}

    def _window(self, encoded: Encoded, number: int, label_W: np.ndarray) -> Example:
        window, mine = encoded.windows[number], np.flatnonzero(encoded.window_V == number)
        real = np.flatnonzero(window.attention_mask)
        part = slice(real[0], real[-1] + 1)
        last = len(encoded.word_V) - 1
        return {
            "input_ids": window.ids[part],
            "token_type_ids": window.type_ids[part],
            "firsts": (encoded.position_V[mine] - real[0]).tolist(),
            "label": label_W[encoded.word_V[mine]].tolist(),
            "whole": [int(place in mine) for place in (0, last)],
        }

    def _require_read(self, row: Row, encoded: Encoded, label_W: np.ndarray) -> None:
        """Raises UserError for a labelled word without a token, unless such words are skipped."""
        if self.config.unread == "skip" or len(encoded.word_V) == len(label_W) or row.get(self.config.label) is None:
            return
        words: Words = self.answers.words(row)
        for index in sorted(set(range(len(label_W))) - set(encoded.word_V.tolist())):
            if words.given or (self.answers.scheme and label_W[index] != self.number.get(OUTSIDE)):
                raise UserError(
                    f"word {index + 1}, {words.word(index)!a}, becomes no token of this tokenizer: remove it with its tag, or "
                    "let such words be skipped (task.unread: skip)"
                )

    def collate(self, examples: list[Example]) -> Batch:
        """Pads examples to the longest: the inputs (B, L); firsts, labels (B, W); words (B,); whole (B, 2)."""
        import torch

        words_B = np.array([len(example["firsts"]) for example in examples])
        firsts_BW = np.zeros((len(examples), max(1, words_B.max())), dtype=np.int64)
        labels_BW = np.full_like(firsts_BW, int(self.missing))
        for row, example in enumerate(examples):
            firsts_BW[row, : words_B[row]] = example["firsts"]
            labels_BW[row, : words_B[row]] = example["label"]
        whole_B2 = np.array([example["whole"] for example in examples], dtype=np.int64)
        arrays = {**self.padded(examples), "firsts": firsts_BW, "labels": labels_BW, "words": words_B, "whole": whole_B2}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def sizes(self, batch: Batch) -> torch.Tensor:
        return batch["words"].float()

    def named(self, output: Any) -> Batch:
        """Returns the scores of the tags of every token, shape (B, L, C), and of a CRF's transitions, (B, C + 2, C), float32."""
        outputs = {self.answers.SCORES: output.logits[..., : len(self.answers.tags)].float()}
        return {**outputs, TRANSITIONS: output[CRF].float()} if self.config.crf else outputs

    @property
    def graphs(self) -> dict[str, Any]:
        return {name: replace(graph, of_tokens=frozenset({self.answers.SCORES})) for name, graph in super().graphs.items()}

    def loss_of(self, outputs: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy of the tags, or the negative log-likelihood of a CRF: (sum in nats, number of labelled words)."""
        from torch.nn import functional

        emissions_BWC, labels_BW = _at_words(outputs[self.answers.SCORES], batch), batch["labels"]
        count = (labels_BW >= 0).sum()
        if not self.config.crf:
            return functional.cross_entropy(emissions_BWC.flatten(0, 1), labels_BW.flatten(), reduction="sum"), count
        from engine.models.crf import negative_log_likelihood

        labelled_B = labels_BW[:, 0] >= 0
        losses_B = negative_log_likelihood(
            emissions_BWC, labels_BW.clamp(min=0), batch["words"], outputs[TRANSITIONS][0], batch["whole"]
        )
        return (losses_B * labelled_B).sum(), count

    def lesson(self, outputs: Batch, batch: Batch, temperature: float) -> Batch:
        """Returns the logarithm of the probability of every tag of each word, (B, W, C), of the softened distribution.

        That is a softmax, or the CRF's marginals over all sequences of tags (arXiv:2004.03846).
        """
        import torch

        emissions_BWC = _at_words(outputs[self.answers.SCORES], batch) / temperature
        if self.config.crf:
            from engine.models.crf import log_marginals

            found_BWC = log_marginals(emissions_BWC, batch["words"], outputs[TRANSITIONS][0] / temperature, batch["whole"])
            return {LESSON: found_BWC}
        inside_BW = torch.arange(emissions_BWC.shape[1], device=emissions_BWC.device) < batch["words"][:, None]
        return {LESSON: emissions_BWC.log_softmax(dim=2).masked_fill(~inside_BW[..., None], 0.0)}

    def imitation(self, outputs: Batch, teacher: Batch, temperature: float) -> torch.Tensor:
        """Σ over words of T² × KL(teacher ‖ student) of the distributions of `lesson` (Hinton et al. 2015, arXiv:1503.02531)."""
        from torch.nn import functional

        own_BWC, target_BWC = outputs[LESSON], teacher[LESSON].float()
        return temperature**2 * functional.kl_div(own_BWC, target_BWC, reduction="sum", log_target=True)


def _at_words(logits_BLC: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Returns the scores at the first tokens of the words, shape (B, W, C)."""
    return logits_BLC.gather(1, batch["firsts"][..., None].expand(-1, -1, logits_BLC.shape[2]))
