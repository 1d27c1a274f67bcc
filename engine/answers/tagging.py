"""Sequence tagging, the answering half: scores of tags for the first token of each word in, entities with their characters out.

Tags that mark entities are decoded so that they follow their scheme; other tags, as of parts of speech, are given word by word.

Shapes: N rows, M windows, L tokens, V words with a token, C tags.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from engine.answers import CHUNK, MODEL, Answer, Arrays, Metric, Row, Run
from engine.answers._chains import FORBIDDEN, best_paths, probabilities
from engine.answers._marks import Reading, are_tags, entities_of, tags_as_named, words_of
from engine.answers._metrics import Counts
from engine.answers._schemes import OUTSIDE, SCHEMES, Span, allowed, parse, spans_of
from engine.answers._texts import OUTPUT, TextAnswers, arrays_of, identity
from engine.answers._words import Encoded, Words, encode, keep_spaces, overlap

TRANSITIONS = "transitions"
"""What the graph of a model with a CRF gives beside the scores of the tags: its own scores, see `engine.answers._chains`."""
NOTHING = "(none)"
"""What stands for no entity where types are compared."""
REMEMBERED = 20_000
"""Rows whose truth is kept: intervals of a metric ask for it again and again."""


class Answers(TextAnswers):
    """Entities of a text, or a tag for each word.

    Facts: `text`, `label`: the columns; `names` instead of the tags and types of the data; `labels`: the tags by id; `marks`: the
    scheme in which they mark entities, None where they mark none; `source`: that of the training rows, `scheme`: the one that was
    named for the rows at hand; `borders`, `overlaps`; `stride`; `metric`.
    """

    METRICS = {"f1": Metric("f1"), "f1_macro": Metric("f1_macro"), "accuracy": Metric("accuracy")}
    SCORES: ClassVar[str] = OUTPUT
    """What the graph calls the scores of the tags, shape (M, L, C)."""
    takes_words = True

    def __init__(self, facts: dict[str, Any], tokenizer: Any) -> None:
        super().__init__(facts, tokenizer)
        self.tags = self.tags_among(facts["labels"])
        self.scheme: str | None = facts["marks"]
        if not 0 < len(set(self.tags)) == len(self.tags):
            raise ValueError("labels must be there, each of them once")
        self.types = list(dict.fromkeys(parse(tag)[1] for tag in self.tags if tag != OUTSIDE)) if self.scheme else self.tags
        self.rules = np.where(allowed(self.tags, self.scheme), 0.0, FORBIDDEN)
        self.truths: dict[int, tuple[Row, list[Any] | None]] = {}
        widen, longest = facts["borders"] == "widen", facts["overlaps"] == "longest"
        source = facts["scheme"] if facts["scheme"] in SCHEMES else facts["source"]
        self.reading = Reading(source, facts["names"], widen, longest)
        overlap(tokenizer, facts["stride"])
        keep_spaces(tokenizer)

    @staticmethod
    def tags_among(labels: list[str]) -> list[str]:
        """Returns those of a model's classes that are tags: all of them."""
        return labels

    @property
    def metric(self) -> Metric:
        return self.METRICS[self.facts["metric"] or ("f1" if self.scheme else "accuracy")]

    def words(self, row: Row) -> Words:
        """Returns the words of a row.

        Raises:
            RowError: it has no text, or one that is not valid Unicode.
        """
        return words_of(row, self.facts["text"], self.facts["label"])

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Tokenizes rows; every row has a window or more."""
        return encode(self.tokenizer, [self.words(row) for row in rows])

    def prepare(self, rows: Sequence[Row]) -> Arrays:
        """Returns the inputs of M windows: those of the first row, of the second, and so on."""
        return _arrays(self.encode(rows))

    def answer(self, run: Run, rows: Sequence[Row]) -> list[Answer]:
        """Returns {"entities": [{"start", "end", "type", "text", "score"}]} of each row.

        Places are characters of the row's text, which has a space between two given words; the score is the mean probability of
        the tags. Without a scheme: {"tags": [{"start", "end", "tag", "text", "score"}]}, one for each word; `tag` is None for one
        of which the tokenizer makes nothing.
        """
        texts = [self.words(row) for row in rows]
        encoded = encode(self.tokenizer, texts)
        return self.read(run(MODEL, _arrays(encoded)), texts, encoded)

    def read(self, outputs: Arrays, texts: Sequence[Words], encoded: Sequence[Encoded]) -> list[Answer]:
        """Returns the answers from what the graph gave for every window of some rows."""
        firsts = first_windows(encoded)
        emissions = [
            outputs[self.SCORES][first + each.window_V, each.position_V] for first, each in zip(firsts, encoded, strict=True)
        ]
        tags, scores = self.decode(emissions, outputs[TRANSITIONS][0] if TRANSITIONS in outputs else None)
        return [self._answer(*each) for each in zip(texts, encoded, tags, scores, strict=True)]

    def decode(self, emissions: list[np.ndarray], transitions: np.ndarray | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Returns the best tags of each row, shape (V,), and the probability of each."""
        if transitions is None:
            paths = [emissions_VC.argmax(axis=1) for emissions_VC in emissions]
            wrong = [row for row, path in enumerate(paths) if not self._follows(path)]
            for row, path in zip(wrong, best_paths([emissions[row] for row in wrong], self.rules), strict=True):
                paths[row] = path
            shares = [_softmax(emissions_VC) for emissions_VC in emissions]
        else:
            scores = transitions + self.rules
            paths = best_paths(emissions, scores)
            outside = self.tags.index(OUTSIDE) if self.scheme and OUTSIDE in self.tags else -1
            told = [row for row, path in enumerate(paths) if (path != outside).any()]
            found = dict(zip(told, probabilities([emissions[row] for row in told], scores), strict=True))
            shares = [found.get(row, emissions_VC) for row, emissions_VC in enumerate(emissions)]
        return paths, [share_VC[np.arange(len(path)), path] for share_VC, path in zip(shares, paths, strict=True)]

    def _follows(self, path: np.ndarray) -> bool:
        """Says whether tags follow the scheme as they are: the best ones of each word are then the best ones of all."""
        size = len(self.tags)
        steps = np.concatenate([[size], path]) if len(path) else path
        return not len(path) or not (self.rules[steps[:-1], path].any() or self.rules[size + 1, path[-1]])

    def _answer(self, words: Words, encoded: Encoded, path: np.ndarray, scores: np.ndarray) -> Answer:
        tags = [self.tags[tag] for tag in path]
        if self.scheme is not None:
            return {"entities": [self._entity(words, encoded, span, scores) for span in spans_of(tags, self.scheme)]}
        found = dict(zip(encoded.word_V.tolist(), zip(tags, scores.tolist(), strict=True), strict=True))
        told = [found.get(index, (None, 0.0)) for index in range(len(words.places))]
        return {
            "tags": [
                {"start": start, "end": end, "tag": tag, "text": words.text[start:end], "score": round(score, 6)}
                for (start, end), (tag, score) in zip(words.places, told, strict=True)
            ]
        }

    def _entity(self, words: Words, encoded: Encoded, span: Span, scores: np.ndarray) -> dict[str, Any]:
        start, end = words.place(encoded.word_V[span.first], encoded.word_V[span.end - 1] + 1)
        score = round(float(scores[span.first : span.end].mean()), 6)
        return {"start": start, "end": end, "type": span.type, "text": words.text[start:end], "score": score}

    def truth(self, row: Row) -> list[Any] | None:
        """Returns the entities of a row as `Span` of characters, or the tags of its words; None for an unlabelled row.

        Raises:
            RowError: they are not there, or break their scheme.
        """
        kept = self.truths.get(id(row))
        if kept is not None and kept[0] is row:
            return kept[1]
        if len(self.truths) >= REMEMBERED:
            self.truths.clear()
        found: list[Any] | None = None
        if row.get(self.facts["label"]) is not None:
            words = self.words(row)
            if self.scheme is None:
                found = self.word_tags(row, words)
            else:
                found = self._entities_as_given(row, words)
        self.truths[id(row)] = (row, found)
        return found

    def check(self, row: Row) -> None:
        self.truth(row)

    def _entities_as_given(self, row: Row, words: Words) -> list[Span]:
        """Returns the entities of a labelled row as spans of characters: where the data has spans, exactly those."""
        found, label = self.entities(row, words), row[self.facts["label"]]
        if are_tags(label):
            return [Span(*words.place(first, end), kind) for first, end, kind in found]
        return [Span(start, end, self.facts["names"].get(kind, kind)) for start, end, kind in label]

    def entities(self, row: Row, words: Words) -> list[Span]:
        """Returns the entities of a labelled row as spans of words; raises as `truth`."""
        return entities_of(row[self.facts["label"]], words, self.reading)

    def word_tags(self, row: Row, words: Words) -> list[str]:
        """Returns the tags of a labelled row whose tags mark no entities; raises as `truth`."""
        return tags_as_named(row[self.facts["label"]], words, self.facts["names"])

    def metrics(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, float]:
        """Returns precision, recall and F1 of entities in percent, and the number of examples.

        An entity is right when its characters and its type are (Tjong Kim Sang and De Meulder 2003, cs/0306050); `f1_macro` is
        the mean of the types. Without a scheme: the share of words with the right tag, and the mean F1 of the tags.
        """
        _, counts = self._counts(answers, rows)
        both, predicted, true = (int(part.sum()) for part in counts)
        macro = counts.f1[counts.predicted + counts.true > 0]
        means = {"f1_macro": 100.0 * float(macro.mean()) if len(macro) else 0.0, "examples": len(rows)}
        if self.scheme is None:
            return {"accuracy": 100.0 * both / max(1, true), **means}
        precision, recall = 100.0 * both / max(1, predicted), 100.0 * both / max(1, true)
        return {"f1": 100.0 * counts.f1_micro, "precision": precision, "recall": recall, **means}

    def table(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        """Returns precision, recall, F1 in percent of each type, and its number (`rows`): entities, or words."""
        kinds, counts = self._counts(answers, rows)
        return counts.table(kinds)

    def _counts(self, answers: list[Answer], rows: Sequence[Row]) -> tuple[list[str], Counts]:
        """Returns (types of entities or tags, those that only the truth knows behind the others; how often each is right)."""
        both, predicted, true = Counter[str](), Counter[str](), Counter[str]()
        for answer, row in zip(answers, rows, strict=True):
            truth, given = self.truth(row) or [], self._given(answer)
            if self.scheme is None:
                both.update(tag for tag, other in zip(truth, given, strict=True) if tag == other)
                predicted.update(tag for tag in given if tag is not None)
                true.update(truth)
            else:
                both.update(span.type for span in set(truth) & set(given))
                predicted.update(span.type for span in given)
                true.update(span.type for span in set(truth))
        kinds = list(dict.fromkeys([*self.types, *sorted(true)]))
        return kinds, Counts(*(np.array([count[kind] for kind in kinds]) for count in (both, predicted, true)))

    def _given(self, answer: Answer) -> list[Any]:
        """Returns what was answered as `truth` has it."""
        if self.scheme is None:
            return [entry["tag"] for entry in answer["tags"]]
        return [Span(entry["start"], entry["end"], entry["type"]) for entry in answer["entities"]]

    off_by = "wrong entities or words"

    def wrongness(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        """Returns how many entities are missed or made up, or how many words have a wrong tag, shape (N,)."""
        pairs = [(self.truth(row) or [], self._given(answer)) for answer, row in zip(answers, rows, strict=True)]
        if self.scheme is None:
            return np.array([sum(tag != other for tag, other in zip(*pair, strict=True)) for pair in pairs], dtype=np.float64)
        return np.array([len(set(truth) ^ set(given)) for truth, given in pairs], dtype=np.float64)

    def confusion(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, Any]:
        """Returns {"labels", "counts": [[true, given, number], …]} of entities at the same characters; the last label is none."""
        found: Counter[tuple[Any, Any]] = Counter()
        for answer, row in zip(answers, rows, strict=True):
            truth, given = self.truth(row) or [], self._given(answer)
            if self.scheme is None:
                found.update(zip(truth, given, strict=True))
                continue
            there, here = ({(span.first, span.end): span.type for span in spans} for spans in (truth, given))
            found.update((there.get(place), here.get(place)) for place in there.keys() | here.keys())
        names = list(dict.fromkeys([*self.types, *sorted({kind for pair in found for kind in pair if kind} - set(self.types))]))
        number: dict[Any, int] = {**{name: index for index, name in enumerate(names)}, None: len(names)}
        counts = sorted([number[true], number[given], count] for (true, given), count in found.items())
        return {"labels": [*names, NOTHING], "counts": counts}

    def lengths(self, rows: Sequence[Row]) -> np.ndarray:
        """Returns the tokens of each row over all of its windows, shape (N,)."""
        found: list[int] = []
        for start in range(0, len(rows), CHUNK):
            for each in self.encode(rows[start : start + CHUNK]):
                found.append(sum(sum(window.attention_mask) for window in each.windows))
        return np.array(found)

    def agreement(self, answers: list[Answer], others: list[Answer]) -> float:
        """Returns the mean over rows of how far they are the same.

        That is the F1 of one model's entities against the other's, 1 where neither has any; or the share of words with the same
        tag.
        """
        return float(np.mean(self.alike(answers, others)))

    def alike(self, answers: list[Answer], others: list[Answer]) -> np.ndarray:
        """Returns how far each row's answers are the same, shape (N,); see `agreement`."""
        return np.array([self._alike(one, other) for one, other in zip(answers, others, strict=True)])

    def _alike(self, one: Answer, other: Answer) -> float:
        own, there = self._given(one), self._given(other)
        if not own and not there:
            return 1.0
        if self.scheme is None:
            return sum(tag == same for tag, same in zip(own, there, strict=False)) / max(len(own), len(there))
        return 2 * len(set(own) & set(there)) / (len(own) + len(there))

    def identity(self, row: Row) -> str:
        return identity([self.words(row).text])

    def inputs(self, row: Row) -> Row:
        value = row.get(self.facts["text"], row.get("text"))
        return {"text": list(value) if isinstance(value, (list, tuple)) else str(value)}

    def record(self, answer: Answer, row: Row) -> dict[str, Any]:
        """Returns {"id", "text", "label", "prediction"}; entities are [start, end, type], characters of the text."""
        truth = self.truth(row)
        shown = [list(each) if isinstance(each, Span) else each for each in truth] if truth is not None else None
        given = [list(each) if isinstance(each, Span) else each for each in self._given(answer)]
        return {"id": self.identity(row), "text": self.words(row).text, "label": shown, "prediction": given}

    def pieces(self, answer: Answer, row: Row) -> list[tuple[str, str | None]]:
        """Returns the text in pieces, each with the type of its entity or its tag, or None."""
        entries, kind = (answer["tags"], "tag") if self.scheme is None else (answer["entities"], "type")
        return _cut(self.words(row).text, [Span(entry["start"], entry["end"], entry[kind]) for entry in entries])

    def explained(self, answer: Answer, row: Row) -> dict[str, Any]:
        """Returns the text twice, with what is true and with what was answered marked in it."""
        words, truth = self.words(row), self.truth(row) or []
        if self.scheme is None:
            truth = [Span(*place, tag) for place, tag in zip(words.places, truth, strict=False)]
        return {"inputs": {}, "true": {"pieces": _cut(words.text, truth)}, "answered": {"pieces": self.pieces(answer, row)}}

    def line(self, answer: Answer) -> str:
        """Returns the entities with their types and scores, or the tags; `-` for none."""
        if self.scheme is None:
            return " ".join(str(entry["tag"]) for entry in answer["tags"]) or "-"
        return ", ".join(f"{each['type']} {each['text']} {each['score']:.4f}" for each in answer["entities"]) or "-"


def _cut(text: str, spans: Sequence[Span]) -> list[tuple[str, str | None]]:
    """Cuts a text at spans of characters; of spans that lie over each other the first is taken."""
    found: list[tuple[str, str | None]] = []
    at = 0
    for start, end, kind in sorted(spans):
        if start >= at:
            found += [(text[at:start], None), (text[start:end], kind)]
            at = end
    return [(piece, kind) for piece, kind in [*found, (text[at:], None)] if piece]


def first_windows(encoded: Sequence[Encoded]) -> np.ndarray:
    """Returns the number of each row's first window among those of all rows, shape (N,)."""
    return np.cumsum([0, *(len(each.windows) for each in encoded)])[:-1]


def _arrays(encoded: list[Encoded]) -> Arrays:
    """Returns the inputs of every window of some rows; the tokenizer has padded them alike."""
    return arrays_of([window for each in encoded for window in each.windows])


def _softmax(emissions_VC: np.ndarray) -> np.ndarray:
    shares_VC = np.exp(emissions_VC - emissions_VC.max(axis=1, keepdims=True, initial=-np.inf))
    return shares_VC / shares_VC.sum(axis=1, keepdims=True)
