"""Linear maps and embedding tables as products of two thin matrices.

Shapes: I inputs, O outputs, R rank, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D, prune_linear_layer

from engine.errors import UserError


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


class ThinLinear(torch.nn.Sequential):
    """Two linear maps after each other: in the place of one, whose dtype some models ask for."""

    @property
    def weight(self) -> Any:
        return self[1].weight


def thin_linear(inputs: int, outputs: int, rank: int, bias: bool) -> Any:
    """Returns two linear maps after each other, with weights of no meaning yet."""
    return ThinLinear(torch.nn.Linear(inputs, rank, bias=False), torch.nn.Linear(rank, outputs, bias=bias))


def inputs_of(part: Any) -> int:
    """Returns the inputs of a linear map of any kind."""
    if isinstance(part, Conv1D):
        return part.nx
    first: Any = part[0] if isinstance(part, ThinLinear) else part
    return first.in_features


def outputs_of(part: Any) -> int:
    """Returns the outputs of a linear map of any kind."""
    if isinstance(part, Conv1D):
        return part.nf
    last: Any = part[1] if isinstance(part, ThinLinear) else part
    return last.out_features


def narrowed(part: Any, places: Any, outputs: bool) -> Any:
    """Returns a linear map, a table or a vector with some of its outputs alone, or of its inputs."""
    if isinstance(part, torch.nn.Parameter):
        return torch.nn.Parameter(part.detach()[places].clone())
    if isinstance(part, torch.nn.Embedding):
        return torch.nn.Embedding.from_pretrained(part.weight.detach()[:, places].clone(), freeze=False)
    if isinstance(part, Conv1D):
        kept = Conv1D(len(places), part.nx) if outputs else Conv1D(part.nf, len(places))
        with torch.no_grad():
            kept.weight.copy_(part.weight.index_select(1 if outputs else 0, places))
            kept.bias.copy_(part.bias[places] if outputs else part.bias)
        return kept
    return prune_linear_layer(part, places, dim=0 if outputs else 1)


class ThinEmbedding(torch.nn.Sequential):
    """A table of R numbers per token and a map to H: in the place of an embedding of shape (V, H)."""

    def __init__(self, tokens: int, hidden: int, rank: int, padding: int | None) -> None:
        super().__init__(torch.nn.Embedding(tokens, rank, padding_idx=padding), torch.nn.Linear(rank, hidden, bias=False))
        self.num_embeddings, self.embedding_dim, self.padding_idx = tokens, hidden, padding


def factorized_linear(name: str, linear: Any, wanted: int | float) -> tuple[Factor, Any]:
    """Returns (what became of a Linear or Conv1D, what takes its place: None where it stays)."""
    weight_OI = linear.weight.detach().T if isinstance(linear, Conv1D) else linear.weight.detach()
    outputs, inputs = weight_OI.shape
    energy = torch.linalg.svdvals(weight_OI.double())
    rank = rank_of(energy, wanted, inputs, outputs)
    if rank is None:
        return Factor(name, None, 1.0), None
    thin = thin_linear(inputs, outputs, rank, linear.bias is not None)
    with torch.no_grad():
        left_OR, right_RI = split(weight_OI, rank)
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
