"""Extractive question answering, the answering half: scores of tokens as beginning and end of the answer in, its characters out.

Shapes: N rows, W windows of one row, L tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.answers import CHUNK, MODEL, Answer, Arrays, Metric, Row, RowError, Run
from engine.answers._quotes import Score, right_answers, score
from engine.answers._spans import Encoded, Found, best_spans, lengths_of, placed, room_for, shortened
from engine.answers._texts import SMALLEST, TextAnswers, arrays_of, identity, texts_of

START, END = "start_logits", "end_logits"
"""What the graph gives, shape (windows, tokens) each."""
ANSWERED, NONE, UNANSWERED = "answer", "(none)", "no answer"
"""Questions with and without an answer, where the two are told apart."""
REMEMBERED = 20_000
"""Rows whose truth is kept: intervals of a metric ask for it again and again."""
AROUND = 200
"""Characters of the context that are shown on each side of an answer."""


class Answers(TextAnswers):
    """The part of a context that answers a question, or that there is none.

    Facts: `question`, `context`, `answers`: the columns; `stride`; `max_answer`: tokens; `n_best`; `may_be_none`: questions may
    have no answer; `threshold`: of how much higher "no answer" has to score than the best span; `metric`.
    """

    METRICS = {"f1": Metric("f1"), "exact_match": Metric("exact_match", counted=True)}
    off_by = "1 - F1 of the words"

    def __init__(self, facts: dict[str, Any], tokenizer: Any) -> None:
        super().__init__(facts, tokenizer)
        self.may_be_none, self.threshold = bool(facts["may_be_none"]), float(facts["threshold"])
        self.truths: dict[int, tuple[Row, list[str] | None]] = {}
        self.stride, self.longest_question = room_for(tokenizer, facts["stride"])

    @property
    def columns(self) -> dict[str, str]:
        return {"question": self.facts["question"], "context": self.facts["context"]}

    @functools.cached_property
    def whole(self) -> Any:
        """The tokenizer without truncation."""
        from tokenizers import Tokenizer

        whole = Tokenizer.from_str(self.tokenizer.to_str())
        whole.no_truncation()
        whole.no_padding()
        return whole

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Tokenizes rows; every row has a window or more, each with the whole question, or what fits of it."""
        pairs = []
        for row in rows:
            question, context = texts_of(row, self.columns)
            pairs.append((self._fitting(question), context, question))
        encoded = self.tokenizer.encode_batch([(question, context) for question, context, _ in pairs])
        return [placed(each, self.stride, asked != whole) for each, (asked, _, whole) in zip(encoded, pairs, strict=True)]

    def _fitting(self, question: str) -> str:
        # A token stands for a byte at least, but for a sign that some tokenizers put before a text.
        if len(question.encode()) < self.longest_question:
            return question
        return shortened(self.whole, question, self.longest_question)

    def prepare(self, rows: Sequence[Row]) -> Arrays:
        """Returns the inputs of all windows: those of the first row, of the second, and so on."""
        return _arrays(self.encode(rows))

    def answer(self, run: Run, rows: Sequence[Row]) -> list[Answer]:
        """Returns {"answer", "start", "end", "score", "n_best": [{"answer", "start", "end", "score"}, …]} of each row.

        Places are characters of the context, `score` is a probability among all spans of at most `max_answer` tokens. Where a
        question may have no answer, `no_answer` holds its "score" and the "difference" that the threshold is for; one without an
        answer is answered "", 0 to 0.
        """
        encoded = self.encode(rows)
        outputs = run(MODEL, _arrays(encoded))
        given, first = [], 0
        for row, each in zip(rows, encoded, strict=True):
            windows = slice(first, first := first + len(each.windows))
            context = texts_of(row, self.columns)[1]
            scores = outputs[START][windows], outputs[END][windows]
            found = best_spans(each, context, *scores, self.facts["max_answer"], self.facts["n_best"], self.may_be_none)
            given.append(self._told(found, context))
        return self.revised(given)

    def _told(self, found: Found, context: str) -> Answer:
        spans = [
            {"answer": context[start:end], "start": start, "end": end, "score": round(share, 6)}
            for (start, end), share in zip(found.places, found.scores, strict=True)
        ]
        none = {"no_answer": {"score": round(found.none, 6), "difference": round(found.difference, 6)}}
        return {"n_best": spans, **(none if self.may_be_none else {})}

    def revised(self, answers: list[Answer]) -> list[Answer]:
        return [
            {**self._chosen(answer), **{key: answer[key] for key in ("n_best", "no_answer") if key in answer}}
            for answer in answers
        ]

    def _chosen(self, answer: Answer) -> Answer:
        none = answer.get("no_answer", {"score": 0.0, "difference": 0.0})
        if not answer["n_best"] or (self.may_be_none and none["difference"] > self.threshold):
            return {"answer": "", "start": 0, "end": 0, "score": none["score"]}
        return answer["n_best"][0]

    def choose(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, Any]:
        """Returns `threshold`: that with the largest metric on these rows, of equally good ones that nearest to 0.

        It lies half-way between two differences, so that one that moves a little stays on its side.
        """
        told = [(answer, row) for answer, row in zip(answers, rows, strict=True) if answer["n_best"]]
        if not self.may_be_none or not told:
            return {}
        pairs = [[self._score(text, row) for text in (answer["n_best"][0]["answer"], "")] for answer, row in told]
        right_N2 = np.array([[getattr(each, self._figure) for each in pair] for pair in pairs])
        difference_N = np.array([answer["no_answer"]["difference"] for answer, _ in told])
        return {"threshold": round(best_difference(difference_N, *right_N2.T), 6)}

    @property
    def _figure(self) -> str:
        return "f1" if self.facts["metric"] == "f1" else "exact"

    def truth(self, row: Row) -> list[str] | None:
        """Returns the right answers of a row, none of them where there is none; None for a row without its truth.

        Raises:
            RowError: a column that holds something else.
        """
        kept = self.truths.get(id(row))
        if kept is not None and kept[0] is row:
            return kept[1]
        if len(self.truths) >= REMEMBERED:
            self.truths.clear()
        value = row.get(self.facts["answers"])
        try:
            found = None if value is None else [quote.text for quote in right_answers(row, value)]
        except ValueError as error:
            raise RowError(f"column '{self.facts['answers']}' {error}") from None
        self.truths[id(row)] = (row, found)
        return found

    def check(self, row: Row) -> None:
        self.truth(row)

    def _score(self, answer: str, row: Row) -> Score:
        return score(answer, tuple(self.truth(row) or []), self.may_be_none)

    def _scores(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        """Returns exact match and F1 of each row, 0 to 1, shape (N, 2)."""
        found = [self._score(answer["answer"], row) for answer, row in zip(answers, rows, strict=True)]
        return np.array(found, dtype=np.float64).reshape(-1, 2)

    def metrics(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, float]:
        """Returns F1 of the words and exact match in percent, and the number of examples.

        They are those of SQuAD's official evaluation: of 2.0 where questions may have no answer, else of 1.1.
        """
        exact, f1 = 100.0 * self._scores(answers, rows).mean(axis=0)
        return {"f1": float(f1), "exact_match": float(exact), "examples": len(rows)}

    def table(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        """Returns F1, exact match in percent and the number of questions with, and of those without an answer."""
        if not self.may_be_none:
            return {}
        scores_N2 = 100.0 * self._scores(answers, rows)
        answered_N = np.array([bool(self.truth(row)) for row in rows])
        return {
            name: {"f1": float(f1), "exact_match": float(exact), "rows": float(chosen_N.sum())}
            for name, chosen_N in ((ANSWERED, answered_N), (NONE, ~answered_N))
            if chosen_N.any()
            for exact, f1 in [scores_N2[chosen_N].mean(axis=0)]
        }

    def right(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        return self._scores(answers, rows)[:, 0] == 1.0

    def wrongness(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        """Returns 1 - F1 of each answer, shape (N,)."""
        return 1.0 - self._scores(answers, rows)[:, 1]

    def confusion(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, Any] | None:
        """Returns how often a question with or without an answer is given one, or none; None where all have one."""
        if not self.may_be_none:
            return None
        pairs = np.array([[not self.truth(row), not answer["answer"]] for answer, row in zip(answers, rows, strict=True)])
        found, counts = np.unique(pairs.reshape(-1, 2).astype(int), axis=0, return_counts=True)
        return {"labels": [ANSWERED, NONE], "counts": np.column_stack([found, counts]).tolist()}

    def lengths(self, rows: Sequence[Row]) -> np.ndarray:
        """Returns the tokens of each row over all of its windows, shape (N,)."""
        found = [lengths_of(self.encode(rows[start : start + CHUNK])) for start in range(0, len(rows), CHUNK)]
        return np.concatenate(found)

    def agreement(self, answers: list[Answer], others: list[Answer]) -> float:
        """Returns the mean over rows of how likely the other model finds what was answered, beside its own answer.

        That is 1 where both are the same, and 0 where it is not among the other's n best or where only one of them is none: many
        questions have answers that differ in a word and are nearly as likely.
        """
        return float(np.mean([_alike(one, other) for one, other in zip(answers, others, strict=True)]))

    def identity(self, row: Row) -> str:
        return identity(texts_of(row, self.columns))

    def record(self, answer: Answer, row: Row) -> dict[str, Any]:
        """Returns {"id", "question", "label": the right answers, "prediction", "start", "end", "score"}.

        `question_id` is there, too, where the row has an id of its own.
        """
        own = {"question_id": row["id"]} if row.get("id") is not None else {}
        given = {"prediction": answer["answer"], **{key: answer[key] for key in ("start", "end", "score")}}
        return {"id": self.identity(row), **own, "question": texts_of(row, self.columns)[0], "label": self.truth(row), **given}

    def pieces(self, answer: Answer, row: Row) -> list[tuple[str, str | None]]:
        """Returns the question, and the context around the answer, which is marked."""
        question, context = texts_of(row, self.columns)
        kind = f"{answer['score']:.2f}" if answer["answer"] else UNANSWERED
        return [(f"{question}\n", None), *_around(context, answer["start"], answer["end"], kind)]

    def explained(self, answer: Answer, row: Row) -> dict[str, Any]:
        """Returns the question, and twice the context: around the first right answer and around the one that was given."""
        question, context = texts_of(row, self.columns)
        true = next(iter(self.truth(row) or []), "")
        start = max(0, context.find(true))
        right = _around(context, start, start + len(true), ANSWERED if true else UNANSWERED)
        return {"inputs": {"question": question}, "true": {"pieces": right}, "answered": {"pieces": self.pieces(answer, row)[1:]}}

    def line(self, answer: Answer) -> str:
        """Returns the answer with its probability, `-` for none."""
        return f"{answer['answer'] or '-'}\t{answer['score']:.4f}"


def _around(context: str, start: int, end: int, kind: str) -> list[tuple[str, str | None]]:
    """Returns some characters of a context, marked, with what stands on both sides of them."""
    before, behind = max(0, start - AROUND), min(len(context), end + AROUND)
    left = ("…" if before else "") + context[before:start]
    right = context[end:behind] + ("…" if behind < len(context) else "")
    pieces: list[tuple[str, str | None]] = [(left, None), (context[start:end], kind), (right, None)]
    return [(piece, mark) for piece, mark in pieces if piece or mark]


def _arrays(encoded: list[Encoded]) -> Arrays:
    """Returns the inputs of every window of some rows; the tokenizer has padded them alike."""
    return arrays_of([window.encoding for each in encoded for window in each.windows])


def best_difference(difference_N: np.ndarray, answered_N: np.ndarray, none_N: np.ndarray) -> float:
    """Returns the threshold above which a question has no answer, so that the sum of what is right is largest.

    Args:
        difference_N: how much higher "no answer" scores than the best span.
        answered_N, none_N: how right each row is with its best span, and without an answer.
    """
    order = np.argsort(difference_N, kind="stable")
    sorted_N = difference_N[order]
    gain_N = np.cumsum(answered_N[order] - none_N[order])
    # Below all of them, between two different ones, above all of them.
    last_N = np.append(sorted_N[1:] > sorted_N[:-1], True)
    cuts = np.concatenate([[sorted_N[0] - 1], np.append((sorted_N[1:] + sorted_N[:-1]) / 2, sorted_N[-1] + 1)[last_N]])
    gains = np.concatenate([[0.0], gain_N[last_N]])
    best = cuts[gains >= gains.max() - 1e-12]
    return float(best[np.abs(best).argmin()])


def _alike(one: Answer, other: Answer) -> float:
    place = one["start"], one["end"]
    if place == (other["start"], other["end"]):
        return 1.0
    if not (one["answer"] and other["answer"]):
        return 0.0
    likely = {(each["start"], each["end"]): each["score"] for each in other["n_best"]}
    return likely.get(place, 0.0) / max(other["score"], SMALLEST)
