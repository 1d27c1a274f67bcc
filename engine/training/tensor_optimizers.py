"""Optimizers that measure each tensor as a whole: they cannot work on the pieces that ZeRO cuts tensors into.

Each reads `train.betas` and the decoupled weight decay of its groups. A group says by `matrix` whether its tensors have two
dimensions or more, and by `hidden` whether Muon takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Groups = list[dict[str, Any]]
EPSILON = 1e-8


class _Averages(torch.optim.Optimizer):
    """Adam's averages of gradients and their squares; a subclass makes an update of them.

    Args:
        groups: `params`, `weight_decay`, `matrix`.
        lr: learning rate.
        betas: averaging factors.
        eps: is added to the root of the average of squares.
    """

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float], eps: float = EPSILON) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Changes every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._change(parameter, parameter.grad, group)

    def _change(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        mean = state["exp_avg"] / (1 - first ** state["step"])
        square = state["exp_avg_sq"] / (1 - second ** state["step"])
        self._update(parameter, gradient, mean, square, group)

    def _update(self, parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        """Changes a parameter, given its gradient and the averages without their bias towards 0; all of the same shape."""
        raise NotImplementedError


class Lamb(_Averages):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2, φ the identity): the update of a matrix is as long as the matrix.

    Vectors (biases, normalization weights) are updated as by Adam, as in the authors' code.
    """

    def _update(self, parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        update = mean.div_(square.sqrt_().add_(group["eps"])).add_(parameter, alpha=group["weight_decay"])
        if group["matrix"]:
            weight, length = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
            update.mul_(torch.where((weight > 0) & (length > 0), weight / length, 1.0))
        parameter.add_(update, alpha=-group["lr"])


class StableAdamW(_Averages):
    """AdamW with AdaFactor's clipping of updates (Wortsman et al. 2023, arXiv:2304.13013, algorithm 2): a tensor whose gradients
    are larger than their average leads to expect moves by less.
    """

    def _update(self, parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        surprise = (gradient.square() / square.clamp(min=group["eps"] ** 2)).mean().sqrt()
        rate = group["lr"] / surprise.clamp(min=1.0)
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.sub_(mean.div_(square.sqrt_().add_(group["eps"])).mul_(rate))


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for all else: embeddings, head, vectors (https://kellerjordan.github.io/posts/muon).

    An update of Muon is scaled to the size that one of AdamW has (Liu et al. 2025, arXiv:2502.16982), so that both take the same
    learning rate and weight decay.

    Args:
        groups: `params`, `weight_decay`, `hidden`.
        lr: learning rate.
        betas: averaging factors of AdamW.
    """

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float]) -> None:
        self.betas = betas
        super().__init__(groups, {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Gives both optimizers their groups, and the one state."""
        hidden, others = ([group for group in self.param_groups if group["hidden"] is each] for each in (True, False))
        self.parts: list[torch.optim.Optimizer] = []
        if hidden:
            self.parts.append(torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, betas=self.betas, fused=True))
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Changes every parameter that has a gradient."""
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()
