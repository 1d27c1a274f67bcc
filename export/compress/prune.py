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
from engine.stages.stage import Stage, stage_main
from engine.tasks import AnyTask, Example, Task
from export.compress.smaller import publish_model

if TYPE_CHECKING:
    import torch

    Scores = list[torch.Tensor]

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


def importance(model: Any, task: Task, examples: Sequence[Example]) -> tuple[Scores, Scores]:
    """Returns the importance of every head and of every FFN neuron: of each layer, shapes (heads,) and (neurons,)."""
    import torch

    from engine.models.structure import layers_of

    layers = layers_of(model)
    head_scores = [torch.zeros(layer.heads) for layer in layers]
    neuron_scores = [torch.zeros(layer.neurons) for layer in layers]
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def watch(name: str, index: int) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            inputs[0].retain_grad()
            seen.setdefault((name, index), []).append(inputs[0])  # shared layers are passed several times

        return hook

    hooks = []
    for index, layer in enumerate(layers):
        if layer.heads:
            hooks.append(layer.part("output").register_forward_pre_hook(watch("heads", index)))
        hooks.append(layer.part("down").register_forward_pre_hook(watch("neurons", index)))
    model.eval()
    for start in range(0, len(examples), BATCH):
        batch = task.collate(list(examples[start : start + BATCH]))
        loss, _ = task.loss(model, batch)
        loss.backward()
        for (name, index), passes in seen.items():
            tokens = 0 if layers[index].stack.tokens_first else 1
            effect_BU = torch.stack([effect(activation).sum(dim=tokens) for activation in passes]).sum(dim=0)
            if name == "heads":
                effect_BU = effect_BU.unflatten(-1, (layers[index].heads, -1)).sum(dim=-1)
            (head_scores if name == "heads" else neuron_scores)[index] += effect_BU.abs().sum(dim=0)
        seen.clear()
        model.zero_grad()
    for handle in hooks:
        handle.remove()
    return head_scores, neuron_scores


def effect(activation: torch.Tensor) -> torch.Tensor:
    """Returns activation × gradient: to first order, how much the loss changes without that output."""
    assert activation.grad is not None
    return activation.detach() * activation.grad


def strongest(scores: Scores, keep: int, what: str) -> list[list[int]]:
    """Returns the `keep` highest scored entries of each layer, in their old order.

    Raises:
        UserError: there are fewer.
    """
    there = min(len(layer) for layer in scores)
    if keep > there:
        raise UserError(f"{what}={keep}: the model has only {there} in each layer: lower it")
    return [sorted(layer.topk(keep).indices.tolist()) for layer in scores]


def strongest_heads(model: Any, scores: Scores, keep: int) -> list[list[int]]:
    """Returns the `keep` highest scored heads of each layer, as its family lets them go.

    Heads that share keys and values count together; where all layers share a table of positions for each head, so do the heads
    of all layers that have the same number.

    Raises:
        UserError: there are fewer, or they leave in groups and `keep` is no multiple.
    """
    from engine.models.structure import stacks_of

    kept: list[list[int]] = []
    for layers in stacks_of(model):
        group, mine = layers[0].group, scores[len(kept) : len(kept) + len(layers)]
        if keep % group:
            raise UserError(f"heads={keep}: {group} heads share their keys and values: name a multiple of {group}")
        pooled = [layer.unflatten(0, (-1, group)).sum(dim=1) for layer in mine]
        if layers[0].stack.bias:
            pooled = [sum(pooled)] * len(layers)
        if keep > min(map(len, mine)):
            strongest(mine, keep, "heads")
        chosen = strongest(pooled, keep // group, "heads")
        kept += [[group * index + head for index in groups for head in range(group)] for groups in chosen]
    return kept


def run(stage: Stage[PruneConfig]) -> None:
    """Runs one pruning stage."""
    config = stage.config
    path = stage.recipe.find_model(config.model)
    stage.inputs  # noqa: B018 - missing inputs show before anything heavy is loaded
    from engine.data.rows import prepare_for_model
    from engine.models.families import require
    from engine.models.fitting import load_finished
    from engine.models.structure import shrink

    started = time.monotonic()
    data = prepare_for_model(config, stage.recipe, path, config.examples)
    model = load_finished(path, data.task)
    for operation in ("heads", "neurons"):
        if getattr(config, operation):
            require(model.config.model_type, operation)
    head_scores, neuron_scores = importance(model, data.task, data.examples["train"])
    heads = strongest_heads(model, head_scores, config.heads) if config.heads else None
    neurons = strongest(neuron_scores, config.neurons, "neurons") if config.neurons else None
    stage.begin()
    shrink(model, heads, neurons)
    kept = {"heads": heads, "neurons": neurons}
    said = " and ".join(f"{len(each[0])} {name}" for name, each in kept.items() if each)
    print(f"  kept {said} in each of {len(head_scores)} layers", flush=True)
    publish_model(stage, data, model, started, kept=kept)


def main() -> None:
    """Entry point of `python -m export.compress.prune RECIPE --stage NAME`."""
    stage_main("export.compress.prune", PruneConfig, run)


if __name__ == "__main__":
    main()
