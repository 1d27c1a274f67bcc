"""Linear maps and embedding tables as products of two thin matrices.

Shapes: I inputs, O outputs, R rank, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from engine.errors import UserError

ATTENTION, FFN = ("query", "key", "value", "output"), ("up", "down")
"""Roles of a layer's linear maps in the family table."""


class Factor(NamedTuple):
    """What became of one matrix."""

    name: str
    rank: int | None
    """None: it was left as it is."""
    energy: float
    """Share of the squared singular values that is left."""


def rank_of(singular: torch.Tensor, wanted: int | float, inputs: int, outputs: int) -> int | None:
    """Returns the rank that is wanted, None where two factors would be no smaller than the matrix.

    Args:
        singular: singular values, falling.
        wanted: a rank, or a share of the squared singular values.
    """
    if isinstance(wanted, float):
        shares = singular.double().square().cumsum(0) / singular.double().square().sum()
        wanted = int((shares < wanted - 1e-12).sum()) + 1
    return wanted if wanted * (inputs + outputs) < inputs * outputs else None


def split(matrix_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns factors of shapes (O, R) and (R, I) whose product is the best approximation of that rank."""
    left_OK, singular_K, right_KI = torch.linalg.svd(matrix_OI.double(), full_matrices=False)
    root_R = singular_K[:rank].sqrt()
    return (left_OK[:, :rank] * root_R).to(matrix_OI.dtype), (root_R[:, None] * right_KI[:rank]).to(matrix_OI.dtype)


def thin_linear(inputs: int, outputs: int, rank: int, bias: bool) -> Any:
    """Returns two linear maps after each other, with weights of no meaning yet."""
    return torch.nn.Sequential(torch.nn.Linear(inputs, rank, bias=False), torch.nn.Linear(rank, outputs, bias=bias))


class ThinEmbedding(torch.nn.Sequential):
    """A table of R numbers per token and a map to H: in the place of an embedding of shape (V, H)."""

    def __init__(self, tokens: int, hidden: int, rank: int, padding: int | None) -> None:
        super().__init__(torch.nn.Embedding(tokens, rank, padding_idx=padding), torch.nn.Linear(rank, hidden, bias=False))
        self.num_embeddings, self.embedding_dim, self.padding_idx = tokens, hidden, padding


def factorized_linear(name: str, linear: torch.nn.Linear, wanted: int | float) -> tuple[Factor, Any]:
    """Returns (what became of a linear map, what takes its place: None where it stays)."""
    energy = torch.linalg.svdvals(linear.weight.detach().double())
    rank = rank_of(energy, wanted, linear.in_features, linear.out_features)
    if rank is None:
        return Factor(name, None, 1.0), None
    thin = thin_linear(linear.in_features, linear.out_features, rank, linear.bias is not None)
    with torch.no_grad():
        left_OR, right_RI = split(linear.weight, rank)
        thin[0].weight.copy_(right_RI)
        thin[1].weight.copy_(left_OR)
        if linear.bias is not None:
            thin[1].bias.copy_(linear.bias)
    return Factor(name, rank, float(energy[:rank].square().sum() / energy.square().sum())), thin


def factorize_embedding(model: Any, wanted: int | float) -> Factor:
    """Factorises the table of the tokens, in place.

    Raises:
        UserError: it is none that can be.
    """
    table = model.get_input_embeddings()
    if not isinstance(table, torch.nn.Embedding):
        raise UserError("model: its table of tokens is none that can be factorised: leave embeddings out")
    energy = torch.linalg.svdvals(table.weight.detach().double())
    rank = rank_of(energy, wanted, table.num_embeddings, table.embedding_dim)
    if rank is None:
        return Factor("embeddings", None, 1.0)
    thin: Any = ThinEmbedding(table.num_embeddings, table.embedding_dim, rank, table.padding_idx)
    with torch.no_grad():
        left_VR, right_RH = split(table.weight, rank)
        thin[0].weight.copy_(left_VR)
        thin[1].weight.copy_(right_RH.T)
    model.set_input_embeddings(thin)
    return Factor("embeddings", rank, float(energy[:rank].square().sum() / energy.square().sum()))
