"""A linear-chain conditional random field on top of scores for every tag of each word (Lafferty et al. 2001; arXiv:1603.01360).

A sequence of tags has the sum of its scores: those that the model gives the words, and those of its transitions. Everything is
computed in fp32, whatever autocast says: sums of exponentials over long sentences have no room in half precision.

`scores` has the shape (C + 2, C): [i, j] is added where tag j follows tag i; row C where j is the first tag, row C + 1 where it
is the last.

Shapes: B sentences, W words of the longest, C tags.
"""

from __future__ import annotations

import torch

GAIN = 100.0
"""Unit of the trained numbers. An optimizer such as Adam moves every number by about the learning rate: right for the weights of
an encoder, a few thousandths to hundredths each, and far too little for scores of transitions, which are a few units."""


class Transitions(torch.nn.Module):
    """The scores of a CRF's transitions; they begin at 0, where it is a softmax over each word."""

    def __init__(self, tags: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(tags + 2, tags))

    def forward(self) -> torch.Tensor:
        """Returns the scores, float32 of shape (C + 2, C)."""
        return self.weight.float() * GAIN

    @torch.no_grad()
    def reorder(self, order: torch.Tensor) -> None:
        """Makes tag i what was tag `order[i]`, in place; classes behind the tags have no transitions."""
        order = order[: self.weight.shape[1]]
        rows = torch.cat([order, torch.tensor([len(order), len(order) + 1])])
        self.weight.copy_(self.weight[rows][:, order])


def negative_log_likelihood(
    emissions_BWC: torch.Tensor, tags_BW: torch.Tensor, length_B: torch.Tensor, scores: torch.Tensor, whole_B2: torch.Tensor
) -> torch.Tensor:
    """Returns the loss of the given tags of each sentence in nats, shape (B,); 0 of a sentence without words.

    Args:
        emissions_BWC: scores of the tags; what lies behind a sentence's length is not looked at.
        tags_BW: any tag behind the length.
        whole_B2: 1 where a sentence begins, and ends, with its first and last word; 0 where it is a part of a longer one.
    """
    with torch.autocast(emissions_BWC.device.type, enabled=False):
        emissions_BWC, scores, whole_B2 = emissions_BWC.float(), scores.float(), whole_B2.float()
        tags = emissions_BWC.shape[2]
        inside_BW = _inside(emissions_BWC, length_B)
        own_BW = emissions_BWC.gather(2, tags_BW[..., None])[..., 0]
        steps_BW = scores[tags_BW[:, :-1], tags_BW[:, 1:]]
        last_B = tags_BW.gather(1, (length_B - 1).clamp(min=0)[:, None])[:, 0]
        edges_B = scores[tags, tags_BW[:, 0]] * whole_B2[:, 0] + scores[tags + 1, last_B] * whole_B2[:, 1]
        path_B = (own_BW * inside_BW).sum(1) + (steps_BW * inside_BW[:, 1:]).sum(1) + edges_B
        all_B = torch.logsumexp(_forward(emissions_BWC, inside_BW, scores, whole_B2)[-1] + _last(scores, whole_B2), dim=1)
        return torch.where(length_B > 0, all_B - path_B, 0.0)


def log_marginals(
    emissions_BWC: torch.Tensor, length_B: torch.Tensor, scores: torch.Tensor, whole_B2: torch.Tensor
) -> torch.Tensor:
    """Returns the logarithm of the probability of every tag of each word over all sequences of tags, shape (B, W, C).

    0 behind the length. See `negative_log_likelihood`.
    """
    with torch.autocast(emissions_BWC.device.type, enabled=False):
        emissions_BWC, scores, whole_B2 = emissions_BWC.float(), scores.float(), whole_B2.float()
        tags, inside_BW, last_BC = emissions_BWC.shape[2], _inside(emissions_BWC, length_B), _last(scores, whole_B2)
        forward = _forward(emissions_BWC, inside_BW, scores, whole_B2)
        backward = [last_BC]
        for word in range(emissions_BWC.shape[1] - 1, 0, -1):
            ahead_BC = backward[0] + emissions_BWC[:, word]
            step_BC = torch.logsumexp(scores[:tags] + ahead_BC[:, None, :], dim=2)
            backward.insert(0, torch.where(inside_BW[:, word, None], step_BC, last_BC))
        all_B11 = torch.logsumexp(forward[-1] + last_BC, dim=1)[:, None, None]
        return torch.where(inside_BW[..., None], torch.stack(forward, 1) + torch.stack(backward, 1) - all_B11, 0.0)


def _inside(emissions_BWC: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
    return torch.arange(emissions_BWC.shape[1], device=length_B.device) < length_B[:, None]


def _last(scores: torch.Tensor, whole_B2: torch.Tensor) -> torch.Tensor:
    return scores[-1] * whole_B2[:, 1:]


def _forward(
    emissions_BWC: torch.Tensor, inside_BW: torch.Tensor, scores: torch.Tensor, whole_B2: torch.Tensor
) -> list[torch.Tensor]:
    """Returns the logarithm of the sum over all beginnings that end with each tag at each word: W tensors of shape (B, C)."""
    tags = emissions_BWC.shape[2]
    found = [emissions_BWC[:, 0] + scores[tags] * whole_B2[:, :1]]
    for word in range(1, emissions_BWC.shape[1]):
        step_BC = torch.logsumexp(found[-1][:, :, None] + scores[:tags], dim=1) + emissions_BWC[:, word]
        found.append(torch.where(inside_BW[:, word, None], step_BC, found[-1]))
    return found
