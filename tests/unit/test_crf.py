"""The linear-chain CRF against the sum over all sequences of tags; the decoder of the answering half likewise."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.answers._chains import FORBIDDEN, best_paths, marginals, probabilities, viterbi
from engine.answers._schemes import allowed, labels_of, spans_of
from engine.models.crf import Transitions, log_marginals, negative_log_likelihood

TAGS = 3


def path_scores(emissions_WC, scores, whole=(1, 1)):
    """{sequence of tags: its score} of one sentence, one by one."""
    words, tags = emissions_WC.shape
    found = {}
    for path in itertools.product(range(tags), repeat=words):
        total = sum(emissions_WC[word, tag] for word, tag in enumerate(path))
        total += sum(scores[one, other] for one, other in itertools.pairwise(path))
        found[path] = total + whole[0] * scores[tags, path[0]] + whole[1] * scores[tags + 1, path[-1]]
    return found


@st.composite
def sentences(draw):
    """(emissions, lengths, scores, tags, whole) of up to four sentences, of up to five words."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.1, 1.0, 20.0]))
    emissions = spread * rng.standard_normal((len(lengths), max(lengths), TAGS))
    scores = spread * rng.standard_normal((TAGS + 2, TAGS))
    tags = rng.integers(0, TAGS, (len(lengths), max(lengths)))
    return emissions, np.array(lengths), scores, tags, rng.integers(0, 2, (len(lengths), 2))


def tensors(*arrays):
    return [torch.from_numpy(array).float() if array.dtype.kind == "f" else torch.from_numpy(array) for array in arrays]


@settings(max_examples=60, deadline=None)
@given(sentences())
def test_the_likelihood_is_that_of_the_sum_over_all_sequences(made):
    emissions, lengths, scores, tags, whole = made
    given_B = negative_log_likelihood(*tensors(emissions, tags, lengths, scores, whole))
    for row, length in enumerate(lengths):
        each = path_scores(emissions[row, :length], scores, whole[row])
        expected = np.logaddexp.reduce(list(each.values())) - each[tuple(tags[row, :length])]
        assert float(given_B[row]) == pytest.approx(expected, rel=1e-4, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(sentences())
def test_marginals_are_the_shares_of_all_sequences_in_torch_and_in_numpy(made):
    emissions, lengths, scores, _, whole = made
    found_BWC = log_marginals(*tensors(emissions, lengths, scores, whole)).exp()
    decoder_BWC = marginals(emissions, lengths, scores)
    for row, length in enumerate(lengths):
        for own_BWC, ends in ((found_BWC.numpy(), whole[row]), (decoder_BWC, (1, 1))):
            expected_WC = np.zeros((length, TAGS))
            each = path_scores(emissions[row, :length], scores, ends)
            total = np.logaddexp.reduce(list(each.values()))
            for path, score in each.items():
                expected_WC[range(length), path] += np.exp(score - total)
            np.testing.assert_allclose(own_BWC[row, :length], expected_WC, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(sentences())
def test_the_decoder_finds_the_best_of_all_sequences(made):
    emissions, lengths, scores, _, _ = made
    paths = viterbi(emissions, lengths, scores)
    for row, length in enumerate(lengths):
        each = path_scores(emissions[row, :length], scores)
        assert each[tuple(paths[row, :length])] == pytest.approx(max(each.values()))


@pytest.mark.parametrize("scheme", ["bio", "bioes"])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_what_is_decoded_follows_its_scheme(scheme, seed):
    labels, rng = labels_of(["x", "y"], scheme), np.random.default_rng(seed)
    rules = np.where(allowed(labels, scheme), 0.0, FORBIDDEN)
    emissions = [rng.standard_normal((length, len(labels))) * 5 for length in (0, 1, 2, 7, 7, 30)]
    for own, path, shares in zip(emissions, best_paths(emissions, rules), probabilities(emissions, rules), strict=True):
        assert len(path) == len(own)
        spans_of([labels[tag] for tag in path], scheme)
        if len(own):
            np.testing.assert_allclose(shares.sum(axis=1), 1.0, atol=1e-9)
            assert shares[np.arange(len(path)), path].min() > 0


@pytest.mark.parametrize("scheme", ["bio", "bioes"])
def test_the_rules_allow_exactly_the_sequences_that_can_be_read(scheme):
    labels = labels_of(["x", "y"], scheme)
    rules = allowed(labels, scheme)
    size = len(labels)
    for path in itertools.chain.from_iterable(itertools.product(range(size), repeat=words) for words in (1, 2, 3)):
        legal = rules[size, path[0]] and rules[size + 1, path[-1]]
        legal = legal and all(rules[one, other] for one, other in itertools.pairwise(path))
        try:
            spans_of([labels[tag] for tag in path], scheme)
        except ValueError:
            assert not legal, path
        else:
            assert legal, path


def test_neighbours_and_what_lies_behind_a_sentence_change_nothing():
    rng = np.random.default_rng(0)
    emissions, scores = rng.standard_normal((3, 6, TAGS)), rng.standard_normal((TAGS + 2, TAGS))
    lengths, tags, whole = np.array([6, 2, 4]), rng.integers(0, TAGS, (3, 6)), np.ones((3, 2))
    together = negative_log_likelihood(*tensors(emissions, tags, lengths, scores, whole))
    for row, length in enumerate(lengths):
        part = tensors(emissions[row : row + 1, :length], tags[row : row + 1, :length], lengths[row : row + 1], scores, whole[:1])
        torch.testing.assert_close(negative_log_likelihood(*part), together[row : row + 1])


def test_gradients_are_right_and_do_not_come_from_behind_a_sentence():
    torch.manual_seed(0)
    emissions = torch.randn(2, 4, TAGS, requires_grad=True)
    scores = torch.randn(TAGS + 2, TAGS, requires_grad=True)
    lengths, tags, whole = torch.tensor([4, 2]), torch.randint(0, TAGS, (2, 4)), torch.ones(2, 2)
    negative_log_likelihood(emissions, tags, lengths, scores, whole).sum().backward()
    assert not emissions.grad[1, 2:].any()
    shares = log_marginals(emissions.detach(), lengths, scores.detach(), whole).exp()
    expected = shares - torch.nn.functional.one_hot(tags, TAGS)
    torch.testing.assert_close(emissions.grad[0], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(emissions.grad[1, :2], expected[1, :2], atol=1e-5, rtol=0)
    assert torch.isfinite(scores.grad).all() and scores.grad.abs().sum() > 0


def test_it_computes_in_fp32_under_autocast():
    torch.manual_seed(0)
    emissions, scores = torch.randn(2, 50, TAGS), torch.randn(TAGS + 2, TAGS)
    given = (emissions, torch.randint(0, TAGS, (2, 50)), torch.tensor([50, 30]), scores, torch.ones(2, 2))
    expected = negative_log_likelihood(*given)
    with torch.autocast("cpu", torch.bfloat16):
        found = negative_log_likelihood(*given)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_sentence_without_words_costs_nothing():
    given = (torch.randn(1, 1, TAGS), torch.zeros(1, 1, dtype=torch.long), torch.tensor([0]), torch.randn(TAGS + 2, TAGS))
    assert float(negative_log_likelihood(*given, torch.ones(1, 2))) == 0.0


def test_without_transitions_it_is_a_softmax_over_each_word():
    torch.manual_seed(0)
    emissions, tags = torch.randn(2, 5, TAGS), torch.randint(0, TAGS, (2, 5))
    scores = Transitions(TAGS)()
    found = negative_log_likelihood(emissions, tags, torch.tensor([5, 5]), scores, torch.ones(2, 2))
    expected = torch.nn.functional.cross_entropy(emissions.flatten(0, 1), tags.flatten(), reduction="none").reshape(2, 5).sum(1)
    torch.testing.assert_close(found, expected)


def test_tags_that_change_places_keep_their_transitions():
    part, order = Transitions(TAGS), torch.tensor([2, 0, 1])
    with torch.no_grad():
        part.weight.copy_(torch.randn_like(part.weight))
    before = part().detach()
    part.reorder(order)
    after = part().detach()
    for i, j in itertools.product(range(TAGS), repeat=2):
        assert after[i, j] == before[order[i], order[j]]
    torch.testing.assert_close(after[TAGS:], before[TAGS:][:, order])
