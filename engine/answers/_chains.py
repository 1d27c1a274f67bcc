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
    step_TF, first_C, last_C = np.ascontiguousarray(scores[:tags].T), scores[tags], scores[tags + 1]
    ragged = bool((length_B != words).any())
    best_BC = first_C + emissions_BWC[:, 0]
    back_WBC = np.zeros((words, rows, tags), dtype=np.int64)
    for word in range(1, words):
        reached_BTF = best_BC[:, None, :] + step_TF
        back_WBC[word] = reached_BTF.argmax(axis=2)
        new_BC = reached_BTF.max(axis=2) + emissions_BWC[:, word]
        best_BC = np.where((word < length_B)[:, None], new_BC, best_BC) if ragged else new_BC
    tag_B = (best_BC + last_C).argmax(axis=1)
    path_BW, every = np.zeros((rows, words), dtype=np.int64), np.arange(rows)
    for word in range(words - 1, -1, -1):
        inside_B = word < length_B
        path_BW[:, word] = np.where(inside_B, tag_B, 0)
        tag_B = np.where(inside_B & (word > 0), back_WBC[word, every, tag_B], tag_B)
    return path_BW


def marginals(emissions_BWC: np.ndarray, length_B: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns the probability of every tag of each word, shape (B, W, C); forward and backward sums are scaled in every step."""
    rows, words, tags = emissions_BWC.shape
    share_BWC = _exp(emissions_BWC - emissions_BWC.max(axis=2, keepdims=True))
    step_FT, first_C, last_C = (_exp(part - part.max()) for part in (scores[:tags], scores[tags], scores[tags + 1]))
    forward_WBC, backward_WBC = np.empty((words, rows, tags)), np.empty((words, rows, tags))
    forward_WBC[0] = _scaled(first_C * share_BWC[:, 0])
    for word in range(1, words):
        new_BC = _scaled((forward_WBC[word - 1] @ step_FT) * share_BWC[:, word])
        forward_WBC[word] = np.where((word < length_B)[:, None], new_BC, forward_WBC[word - 1])
    backward_WBC[words - 1] = last_C
    for word in range(words - 2, -1, -1):
        new_BC = _scaled((share_BWC[:, word + 1] * backward_WBC[word + 1]) @ step_FT.T)
        backward_WBC[word] = np.where((word + 1 < length_B)[:, None], new_BC, last_C)
    return np.stack([_scaled(one * other) for one, other in zip(forward_WBC, backward_WBC, strict=True)], axis=1)


def _exp(values: np.ndarray) -> np.ndarray:
    return np.where(values <= FORBIDDEN / 2, 0.0, np.exp(np.maximum(values, _SMALLEST)))


def _scaled(values_BC: np.ndarray) -> np.ndarray:
    return values_BC / np.maximum(values_BC.sum(axis=1, keepdims=True), 1e-300)
