"""Structured pruning: whole attention heads and FFN neurons leave the model, which gets physically smaller.

Importance is the first-order change of the loss when an output is removed, |Σ activation × gradient|, summed over rows: of a
head as in Michel et al. 2019 (arXiv:1905.10650), of a neuron as in Molchanov et al. 2019 (arXiv:1906.10771). Recovery training
is a `distill` stage whose student is the pruned model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from engine.config import ModelRef, Strict
from engine.data.splits import DataConfig
from engine.errors import UserError
from engine.stage import Stage, stage_main
from engine.tasks import AnyTask, Example, Task
from export.compress.smaller import publish_model

if TYPE_CHECKING:
    import torch

BATCH = 32
"""Rows per backward pass."""


class PruneConfig(Strict):
    """Section of a `prune` stage."""

    model: ModelRef
    """What to prune: a stage or a model directory that was fine-tuned."""
    task: AnyTask
    data: DataConfig
    """Training rows rank heads and neurons; validation and test rows measure the loss of accuracy."""
    heads: int | None = Field(None, ge=1)
    """Attention heads that stay in each layer; None: all."""
    neurons: int | None = Field(None, ge=1)
    """FFN neurons that stay in each layer; None: all."""
    examples: int = Field(1024, ge=1)
    """Training rows over which importance is summed."""
    max_length: int = Field(128, ge=4)

    @model_validator(mode="after")
    def _something_to_prune(self) -> PruneConfig:
        if self.heads is None and self.neurons is None:
            raise ValueError("give heads, neurons or both: otherwise nothing is pruned")
        return self


def importance(model: Any, task: Task, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the importance of every head, shape (layers, heads), and of every FFN neuron, shape (layers, neurons)."""
    import torch

    from engine.models.structure import encoder_layers

    layers = encoder_layers(model)
    head_scores = torch.zeros(len(layers), layers[0].heads)
    neuron_scores = torch.zeros(len(layers), layers[0].neurons)
    seen: dict[tuple[str, int], torch.Tensor] = {}

    def watch(name: str, index: int) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            inputs[0].retain_grad()
            seen[name, index] = inputs[0]

        return hook

    hooks = []
    for index, layer in enumerate(layers):
        hooks.append(layer.part("output").register_forward_pre_hook(watch("heads", index)))
        hooks.append(layer.part("down").register_forward_pre_hook(watch("neurons", index)))
    model.eval()
    for start in range(0, len(examples), BATCH):
        batch = task.collate(list(examples[start : start + BATCH]))
        loss, _ = task.loss(model, batch)
        loss.backward()
        for index, layer in enumerate(layers):
            effect_BLHD = effect(seen["heads", index]).unflatten(-1, (layer.heads, -1))
            head_scores[index] += effect_BLHD.sum(dim=(1, 3)).abs().sum(dim=0)
            neuron_scores[index] += effect(seen["neurons", index]).sum(dim=1).abs().sum(dim=0)
        model.zero_grad()
    for handle in hooks:
        handle.remove()
    return head_scores, neuron_scores


def effect(activation: torch.Tensor) -> torch.Tensor:
    """Returns activation × gradient: to first order, how much the loss changes without that output."""
    assert activation.grad is not None
    return activation.detach() * activation.grad


def strongest(scores_LN: torch.Tensor, keep: int | None, what: str) -> list[list[int]]:
    """Returns the `keep` highest scored entries of each layer, in their old order; all of them when `keep` is None.

    Raises:
        UserError: there are fewer.
    """
    there = scores_LN.shape[1]
    if keep is not None and keep > there:
        raise UserError(f"{what}={keep}: the model has only {there} in each layer: lower it")
    return [sorted(layer.topk(keep or there).indices.tolist()) for layer in scores_LN]


def run(stage: Stage[PruneConfig]) -> None:
    """Runs one pruning stage."""
    config = stage.config
    path = stage.recipe.find_model(config.model)
    stage.inputs  # noqa: B018 - missing inputs show before anything heavy is loaded
    from engine.data.rows import prepare_for_model
    from engine.models.fitting import load_finished
    from engine.models.structure import shrink

    started = time.monotonic()
    data = prepare_for_model(config, stage.recipe, path, config.examples)
    model = load_finished(path, data.task)
    head_scores, neuron_scores = importance(model, data.task, data.examples["train"])
    heads, neurons = strongest(head_scores, config.heads, "heads"), strongest(neuron_scores, config.neurons, "neurons")
    stage.begin()
    shrink(model, heads, neurons)
    print(f"  kept {len(heads[0])} heads and {len(neurons[0])} FFN neurons in each of {len(heads)} layers", flush=True)
    publish_model(stage, data, model, started, kept={"heads": heads, "neurons": neurons})


def main() -> None:
    """Entry point of `python -m export.compress.prune RECIPE --stage NAME`."""
    stage_main("export.compress.prune", PruneConfig, run)


if __name__ == "__main__":
    main()
