"""The best sequence of tags and the probability of each tag, for sentences of words with a score for every tag (Viterbi 1967,
doi:10.1109/TIT.1967.1054010; forward and backward sums, Rabiner 1989, doi:10.1109/5.18626).

`scores` has the shape (C + 2, C): [i, j] is added where tag j follows tag i; row C where j is the first tag, row C + 1 where it
is the last.

Shapes: B sentences, W words of the longest, C tags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

AT_ONCE = 256
"""Sentences of similar length that are decoded together."""
FORBIDDEN = -1e4
"""Score of a step that must not be taken: still finite, so that there is a path where every path is forbidden."""
_SMALLEST = -600.0
"""Logarithms below it are taken for it: their exponential is still above 0, as is a product with `FORBIDDEN` replaced by 0."""


def best_paths(emissions: Sequence[np.ndarray], scores: np.ndarray) -> list[np.ndarray]:
    """Returns the tags with the largest sum of scores of each sentence, int64 of shape (words,).

    Args:
        emissions: scores of the tags of each sentence, shape (words, C).
    """
    return _in_groups(emissions, lambda emissions_BWC, length_B: viterbi(emissions_BWC, length_B, scores))


def probabilities(emissions: Sequence[np.ndarray], scores: np.ndarray) -> list[np.ndarray]:
    """Returns the probability of every tag of each word over all sequences of tags, shape (words, C) for each sentence."""
    return _in_groups(emissions, lambda emissions_BWC, length_B: marginals(emissions_BWC, length_B, scores))


def _in_groups(emissions: Sequence[np.ndarray], solve: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> list[np.ndarray]:
    found: list[np.ndarray] = [np.zeros(0)] * len(emissions)
    for chosen in _groups([len(sentence) for sentence in emissions]):
        length_B = np.array([len(emissions[index]) for index in chosen])
        padded_BWC = np.zeros((len(chosen), max(1, length_B.max()), emissions[chosen[0]].shape[1]))
        for row, index in enumerate(chosen):
            padded_BWC[row, : length_B[row]] = emissions[index]
        for index, answer, length in zip(chosen, solve(padded_BWC, length_B), length_B, strict=True):
            found[index] = answer[:length]
    return found


def _groups(lengths: Sequence[int]) -> Iterator[np.ndarray]:
    """Yields sentences by similar length: none is padded to twice its own, so that a very long one stays alone."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        limit = 2 * lengths[order[start]] + 8
        end = start + 1
        while end < min(len(order), start + AT_ONCE) and lengths[order[end]] <= limit:
            end += 1
        yield order[start:end]
        start = end


def viterbi(emissions_BWC: np.ndarray, length_B: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns the best tags of each sentence, int64 of shape (B, W); 0 behind its length."""
    rows, words, tags = emissions_BWC.shape
    step_TF, last_C = np.ascontiguousarray(scores[:tags].T), scores[tags + 1]
    best_WBC = np.empty((words, rows, tags))
    best_WBC[0] = scores[tags] + emissions_BWC[:, 0]
    for word in range(1, words):
        np.maximum.reduce(best_WBC[word - 1][:, None, :] + step_TF, axis=2, out=best_WBC[word])
        best_WBC[word] += emissions_BWC[:, word]
    path_BW = np.zeros((rows, words), dtype=np.int64)
    for row, length in enumerate(length_B.tolist()):
        after_F = last_C
        for word in range(length - 1, -1, -1):  # which tag came before is looked up along the best path alone
            tag = int((best_WBC[word, row] + after_F).argmax())
            path_BW[row, word], after_F = tag, step_TF[tag]
    return path_BW


def marginals(emissions_BWC: np.ndarray, length_B: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns the probability of every tag of each word, shape (B, W, C); what lies behind a sentence's length means nothing.

    Forward and backward sums are one recursion over the sentences and the same turned round, scaled in every step.
    """
    rows, words, tags = emissions_BWC.shape
    share_BWC = _exp(emissions_BWC - emissions_BWC.max(axis=2, keepdims=True))
    step_FT, first_C, last_C = (_exp(part - part.max()) for part in (scores[:tags], scores[tags], scores[tags + 1]))
    turned = (np.arange(rows)[:, None], (length_B[:, None] - 1 - np.arange(words)) % words)
    share_W2BC = np.ascontiguousarray(np.stack([share_BWC, share_BWC[turned]]).transpose(2, 0, 1, 3))
    step_2CC = np.stack([step_FT, step_FT.T])
    sums_W2BC = np.empty_like(share_W2BC)
    sums_W2BC[0] = _scaled(np.stack([first_C, last_C])[:, None] * share_W2BC[0])
    for word in range(1, words):
        sums_W2BC[word] = _scaled((sums_W2BC[word - 1] @ step_2CC) * share_W2BC[word])
    forward_BWC, backward_BWC = sums_W2BC[:, 0].swapaxes(0, 1), sums_W2BC[:, 1].swapaxes(0, 1)[turned]
    return _scaled(forward_BWC * (backward_BWC / share_BWC.clip(1e-300)))


def _exp(values: np.ndarray) -> np.ndarray:
    return np.where(values <= FORBIDDEN / 2, 0.0, np.exp(np.maximum(values, _SMALLEST)))


def _scaled(values: np.ndarray) -> np.ndarray:
    """Returns the values divided by their sum over the tags."""
    return values / (np.add.reduce(values, axis=-1, keepdims=True) + 1e-300)
