"""One rank of a run that `benchmarks.zero` measures: `accelerate launch … -m benchmarks.zero_worker PART RECIPE --stage base`."""

from __future__ import annotations

import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

from engine.stages.rank import die_with_parent
from engine.stages.stage import Stage, stage_main


def losses() -> None:
    """Runs the stage as it is, but logs every step; a run that should swap to a disk and does not is an error."""
    from engine import pretrain
    from engine.training import loop
    from engine.training import processes as ranks

    loop.LOG_EVERY = 1
    close = ranks.Processes.close

    def checked(processes: Any) -> None:
        for directory in processes.swapped_to:
            if not any(path.stat().st_size for path in directory.rglob("*.swp")):
                raise RuntimeError(f"nothing was swapped to {directory}")
        close(processes)

    ranks.Processes.close = checked  # type: ignore[method-assign]
    pretrain.main()


def memory(stage: Stage[Any]) -> None:
    """Builds the stage's model and trains three steps; leaves this rank's bytes in rank<N>.json.

    `peak` is the growth of resident memory from before the model is built; a tiny model has been trained in the same way before
    that, so that libraries and their workspaces are there already.
    """
    import torch

    from engine.training.processes import Processes
    from engine.training.trainer import Trainer

    processes = Processes(stage.config, stage.recipe, stage.partial)
    warm_up(None if processes.parallel is None else json.loads(processes.parallel.read_text())["zero_optimization"]["stage"])
    gc.collect()
    before = resident(peak=False)
    reset_peak()
    model, loss, batch = subject(stage, processes.micro)
    trainer = Trainer(processes, model, loss)
    found = Held(trainer)
    count = torch.tensor(batch["count"] * processes.accumulation * processes.processes, dtype=torch.float64)
    for step in range(3):
        torch.manual_seed(step)
        trainer.step([batch] * processes.accumulation, step, lambda depth: 1e-4, lambda: count)
    record = {"peak": resident(peak=True) - before, **found.bytes()}
    stage.directory.mkdir(parents=True, exist_ok=True)
    (stage.directory / f"rank{processes.rank}.json").write_text(json.dumps(record))
    processes.close()


def subject(stage: Stage[Any], rows: int) -> tuple[Any, Any, dict[str, Any]]:
    """Returns the stage's model, its loss and one full micro batch of random tokens."""
    import torch

    from engine.models import set_dropout
    from engine.models.scratch import build_model
    from engine.objectives.mlm import IGNORED, Objective

    config = stage.config
    vocabulary, length = config.tokenizer.train.vocab_size, config.sequence_length
    torch.manual_seed(0)
    model = build_model(config.model, Objective.head, vocabulary, {"pad_token_id": 0})
    Objective.adapt(model)
    set_dropout(model, config.train.dropout)
    objective = Objective(config.objective, vocabulary, 4, [0, 1, 2, 3, 4])
    ids = torch.randint(5, vocabulary, (rows, length))
    predicted = math.ceil(rows * length * config.objective.mask)
    labels = torch.full_like(ids, IGNORED)
    labels.view(-1)[:predicted] = ids.view(-1)[:predicted]
    positions = torch.arange(length).expand(rows, length).contiguous()
    batch = {"input_ids": ids, "position_ids": positions, "segments": torch.ones_like(ids), "labels": labels, "count": predicted}
    batch["predicted"] = torch.arange(predicted)
    return model, objective.loss, batch


def warm_up(stage: int | None) -> None:
    """Loads what a first training step loads: kernels, their workspaces, DeepSpeed's modules, the ranks' connections.

    Args:
        stage: of ZeRO; None: without DeepSpeed.
    """
    import torch

    from engine.models.scratch import ScratchConfig, build_model

    model = build_model(
        ScratchConfig(layers=1, hidden=64, heads=2, positions=32), "AutoModelForMaskedLM", 128, {"pad_token_id": 0}
    )
    ids = torch.zeros(2, 16, dtype=torch.int64)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(ids).logits.float().sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    if stage is not None:
        import deepspeed

        zero = {"stage": stage, "reduce_bucket_size": 100_000}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": zero}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for _ in range(2):
            engine.backward(engine(ids).logits.sum())
            engine.step()
        engine.destroy()


class Held:
    """Bytes of model state that a rank really holds, from the tensors in DeepSpeed's engine and optimizer."""

    def __init__(self, trainer: Any) -> None:
        import torch

        self.trainer, self.gradients = trainer, 0
        self.optimizer = getattr(trainer.engine, "optimizer", None) if trainer.processes.parallel else None
        self.stage = trainer.engine.zero_optimization_stage() if self.optimizer is not None else 0
        if self.stage == 1:
            # Whole gradients live from the backward pass until they are reduced.
            for parameter in trainer.model.parameters():
                torch.Tensor.register_post_accumulate_grad_hook(parameter, lambda _: self._note(self._whole_gradients()))
        elif self.stage == 2:
            original = self.optimizer.step

            def step(*arguments: Any, **keywords: Any) -> Any:
                self._note(storages([tensor for part in self.optimizer.averaged_gradients.values() for tensor in part or []]))
                return original(*arguments, **keywords)

            self.optimizer.step = step

    def _note(self, size: int) -> None:
        self.gradients = max(self.gradients, size)

    def _whole_gradients(self) -> int:
        return sum(p.grad.numel() * p.grad.element_size() for p in self.trainer.model.parameters() if p.grad is not None)

    def bytes(self) -> dict[str, int]:
        """Returns {"parameters", "gradients", "optimizer"}; zeros where DeepSpeed does not shard."""
        if self.stage == 0:
            return {"parameters": 0, "gradients": 0, "optimizer": 0}
        optimizer = self.optimizer
        parameters = list(self.trainer.model.parameters())
        weights = [parameter.data for parameter in parameters]
        if self.stage == 3:
            weights += [parameter.ds_tensor for parameter in parameters]
            self._note(storages([optimizer.grad_partitions_flat_buffer]))
            copies = optimizer.fp32_partitioned_groups_flat
        else:
            weights += optimizer.bit16_groups_flat
            copies = optimizer.single_partition_of_fp32_groups
        states = [value for state in optimizer.optimizer.state.values() for value in state.values() if hasattr(value, "numel")]
        held = storages(weights)
        # Where the optimizer updates the weights themselves, they are counted once.
        return {"parameters": held, "gradients": self.gradients, "optimizer": storages([*weights, *copies, *states]) - held}


def storages(tensors: list[Any]) -> int:
    """Returns the bytes of the distinct storages under `tensors`."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def resident(peak: bool) -> int:
    """Returns the bytes of resident memory of this process, now or at its highest since `reset_peak`."""
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Makes Linux forget the highest resident memory so far."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Entry point; the first argument says what is measured, the others are those of a stage."""
    die_with_parent()
    part = sys.argv.pop(1)
    if part == "losses":
        losses()
    else:
        from engine.pretrain import PretrainConfig

        stage_main("benchmarks.zero_worker", PretrainConfig, memory)


if __name__ == "__main__":
    main()
