"""Distillation: a smaller student learns from a teacher's scores, and optionally from its layers.

Soft targets with temperature follow Hinton et al. 2015 (arXiv:1503.02531), beside the loss of the labels; what a student
imitates is the task's. Layer matching compares hidden states and attention maps (TinyBERT, arXiv:1909.10351). The same stage is
the recovery training of a pruned model: its student is then the pruned model itself.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from engine.config import ModelRef, Strict
from engine.data.cells import text_cell
from engine.data.sentences import sentences_of
from engine.data.sources import SourceConfig, read_rows
from engine.data.splits import DataConfig
from engine.errors import UserError
from engine.stages.stage import Stage, made_once, stage_main
from engine.tasks import AnyTask, Example, Task
from engine.training.config import Trained

if TYPE_CHECKING:
    import torch

    from engine.data.batches import Batch
    from engine.data.readers import Row
    from engine.data.rows import Prepared
    from engine.data.splits import Splits
    from engine.training.processes import Processes

OTHER_TOKENS = "it has another tokenizer than its teacher: their tokens cannot be matched: set hidden and attention to 0"
OTHER_WIDTH = "student and teacher have other numbers of features: their hidden states cannot be compared: set hidden to 0"
TEACHER = "teacher_"
"""Prefix of the teacher's outputs in a batch."""


class StudentConfig(Strict):
    """What the student is before it learns."""

    model: ModelRef | None = None
    """A stage or directory; None: the teacher."""
    layers: int | list[int] | None = None
    """Keep so many layers, evenly spaced, or exactly these (0-based); None: all of them."""


class TransferConfig(SourceConfig):
    """Unlabelled text that only the teacher labels."""

    text: str = "text"
    """Column of the text."""
    sentences: bool = False
    """Cut every text into its sentences."""
    rows: int | None = Field(None, ge=1)
    """Use at most this many texts (after cutting into sentences), from the top."""
    min_words: int = 3
    max_words: int = 60
    """Shorter and longer texts are left out."""


class DistillConfig(Trained):
    """Section of a `distill` stage."""

    teacher: ModelRef
    student: StudentConfig = StudentConfig()
    task: AnyTask
    data: DataConfig
    transfer: TransferConfig | None = None
    """More texts, without labels."""
    max_length: int = Field(128, ge=4)
    temperature: float = Field(2.0, gt=0)
    """Softens both distributions."""
    soft: float = Field(0.9, ge=0)
    """Weight of the soft targets; for classes KL × T²."""
    hard: float = Field(0.1, ge=0)
    """Weight of the task's own loss, on labelled rows."""
    hidden: float = Field(0.0, ge=0)
    """Weight of the mean squared error between hidden states of matched layers; runs the teacher in every step."""
    attention: float = Field(0.0, ge=0)
    """Weight of the mean squared error between head-averaged attention maps of matched layers; runs the teacher in every step."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> DistillConfig:
        if self.soft + self.hard + self.hidden + self.attention == 0:
            raise ValueError("soft, hard, hidden and attention are all 0: nothing to learn from; raise one of them")
        if not self.data.validation:
            raise ValueError("data.validation is needed to choose the best weights: give a file or a share such as 10%")
        return self


def layers_to_keep(keep: int | list[int], layers: int) -> list[int]:
    """Returns the 0-based layers of a student: `keep` evenly spaced ones, the first always among them, or those listed.

    Raises:
        UserError: more layers than there are, or a layer that does not exist.
    """
    chosen = [round(index * layers / keep) for index in range(keep)] if isinstance(keep, int) and keep > 0 else keep
    if not isinstance(chosen, list) or not chosen or len(chosen) > layers or not all(0 <= index < layers for index in chosen):
        raise UserError(f"student.layers={keep}: the model has layers 0 to {layers - 1}")
    return chosen


def shorten(model: Any, keep: int | list[int]) -> None:
    """Leaves a model so many layers of every stack that it has, in place; see `layers_to_keep`."""
    from engine.models.structure import keep_layers, sizes_of

    keep_layers(model, *(layers_to_keep(keep, layers) for layers in sizes_of(model)))


def transfer_texts(transfer: TransferConfig, stage: Stage[Any], held_out: Collection[str | None]) -> list[str]:
    """Returns distinct transfer texts, without any that is in `held_out` (validation and test texts).

    Raises:
        UserError: the source cannot be read, or nothing is left of it.
    """
    found: dict[str, None] = {}
    for row in read_rows(transfer, stage.recipe, {transfer.text: text_cell}):
        text = str(row[transfer.text])
        for part in sentences_of(text) if transfer.sentences else [text]:
            if transfer.min_words <= len(part.split()) <= transfer.max_words and part not in held_out:
                found[part] = None
            if transfer.rows is not None and len(found) >= transfer.rows:
                return list(found)
    if not found:
        raise UserError(
            f"{transfer.shown}: no transfer text has {transfer.min_words} to {transfer.max_words} words: widen the bounds"
        )
    return list(found)


def transfer_rows(stage: Stage[DistillConfig], rows: Splits) -> list[Row]:
    """Returns the rows that only the teacher labels, none of whose texts is held out."""
    transfer, task = stage.config.transfer, stage.config.task
    if transfer is None:
        return []
    held_out = {text_cell(row[task.split_by]) for name in ("validation", "test") for row in rows.get(name, [])}
    return [task.unlabelled(text) for text in transfer_texts(transfer, stage, held_out)]


class DistillationLoss:
    """Summed distillation loss of a batch; `count` is that of what a student imitates: rows, or words (`Task.sizes`).

    Args:
        config: weights and temperature.
        task: computes outputs and what a student imitates of them.
        teacher: needed only when layers are matched; the batch brings its outputs as `teacher_<name>`.
        taught: the task as the teacher does it, where it takes other inputs.
    """

    def __init__(self, config: DistillConfig, task: Task, teacher: torch.nn.Module | None, taught: Task | None = None) -> None:
        self.config, self.task, self.teacher, self.taught = config, task, teacher, taught or task

    def __call__(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (sum, count), two scalars."""
        import torch

        config, sizes_B = self.config, self.task.sizes(batch)
        output = self._forward(self.task, model, batch)
        outputs = self.task.named(output)
        own = self.task.lesson(outputs, batch, config.temperature)
        teacher = {name: batch[f"{TEACHER}{name}"] for name in own}
        total = config.soft * self.task.imitation(own, teacher, config.temperature)
        total = total + config.hard * self.task.loss_of(outputs, batch)[0]
        if self.teacher is not None:
            with torch.no_grad():
                target = self._forward(self.taught, self.teacher, batch)
            if config.hidden:
                pairs = matched(layers_in(output, "hidden_states")[1:], layers_in(target, "hidden_states")[1:])
                total = total + config.hidden * token_mse(pairs, batch["attention_mask"], sizes_B)
            if config.attention:
                pairs = matched(layers_in(output, "attentions"), layers_in(target, "attentions"))
                maps = [(own.mean(dim=1), other.mean(dim=1)) for own, other in pairs]
                total = total + config.attention * token_mse(maps, batch["attention_mask"], sizes_B)
        return total, sizes_B.sum()

    def _forward(self, task: Task, model: torch.nn.Module, batch: Batch) -> Any:
        if self.teacher is None:
            return task.forward(model, batch)
        hidden, attention = self.config.hidden > 0, self.config.attention > 0
        return task.forward(model, batch, output_hidden_states=hidden, output_attentions=attention)


def layers_in(output: Any, name: str) -> tuple[Any, ...]:
    """Returns what a forward pass says of each layer.

    Raises:
        UserError: the architecture says nothing.
    """
    found = getattr(output, name, None)
    if not found or any(layer is None for layer in found):
        key = "hidden" if name == "hidden_states" else "attention"
        raise UserError(f"this architecture gives no {name.replace('_', ' ')} of its layers: set {key} to 0")
    return tuple(found)


def matched(own: tuple[Any, ...], teacher: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """Pairs layer i of the student with the teacher's layer at the same relative height."""
    return [(layer, teacher[(index + 1) * len(teacher) // len(own) - 1]) for index, layer in enumerate(own)]


def token_mse(
    pairs: list[tuple[torch.Tensor, torch.Tensor]], mask_BL: torch.Tensor, sizes_B: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns Σ over rows of the mean squared difference over real tokens and features, averaged over layer pairs.

    Args:
        pairs: tensors of shape (B, L, F).
        mask_BL: 1 for real tokens.
        sizes_B: what each row counts; None: 1.
    """
    import torch

    weight_BL = mask_BL / mask_BL.sum(dim=1, keepdim=True)
    if sizes_B is not None:
        weight_BL = weight_BL * sizes_B[:, None]
    losses = [(((own.float() - other.float()) ** 2).mean(dim=2) * weight_BL).sum() for own, other in pairs]
    return torch.stack(losses).mean()


def teacher_outputs(
    model: Any, task: Task, examples: Sequence[Example], temperature: float, processes: Processes, directory: Path
) -> dict[str, Any]:
    """Returns what a student imitates of the teacher, by `teacher_<name>`, an entry for every example.

    It is computed once, then read from `directory`.
    """
    import json

    import numpy as np
    import torch

    from engine.data.ragged import RaggedArray, write_ragged
    from engine.evaluate import lessons_of

    # What the main rank sees holds for all: a stage beside this one may be making the same directory.
    if not processes.gather(directory.exists())[0]:
        with torch.autocast(processes.device.type, torch.bfloat16, enabled=processes.precision == "bf16"):
            share = lessons_of(model.to(processes.device), task, examples, temperature, processes)
        shares = processes.gather(share)

        def write(part: Path) -> None:
            lessons = {row: lesson for given in shares for row, lesson in given.items()}
            names = list(lessons[0])
            for name in names:
                values = [lessons[row][name] for row in range(len(examples))]
                if task.aligned:
                    write_ragged(values, part, name)
                else:
                    np.save(part / f"{name}.npy", np.stack(values).astype(np.float32))
            (part / "names.json").write_text(json.dumps(names))

        if processes.main:
            made_once(directory, write)
        processes.barrier()
    names = json.loads((directory / "names.json").read_text())
    read: Any = RaggedArray if task.aligned else lambda where, name: np.load(where / f"{name}.npy", mmap_mode="r")
    return {f"{TEACHER}{name}": read(directory, name) for name in names}


def run(stage: Stage[DistillConfig]) -> None:
    """Runs one distillation stage on this rank."""
    config = stage.config
    teacher_path = stage.recipe.find_model(config.teacher)
    stage.inputs  # noqa: B018 - missing inputs show before anything heavy is loaded
    import torch

    from engine.data.rows import LabelledBatches, prepare_on_disk
    from engine.finetune import hand_over, judge_of, saver, say_changes
    from engine.models import set_dropout
    from engine.models.fitting import load_finished, load_fitting
    from engine.randomness import torch_seed
    from engine.tasks import reads_alike, task_of_model, with_tokenizer_of
    from engine.training.loop import Fit
    from engine.training.processes import Processes

    started = time.monotonic()
    # Fused attention kernels do not give their maps away.
    attention = "eager" if config.attention else None
    taught = task_of_model(config.task, teacher_path, config.max_length)
    teacher = load_finished(teacher_path, taught, attention).eval()
    student_path = stage.recipe.find_model(config.student.model) if config.student.model else teacher_path
    # The classes are the teacher's, in its order; each of the two reads with its own tokenizer.
    task = with_tokenizer_of(taught, student_path)
    if (task.aligned or config.hidden or config.attention) and not reads_alike(task.tokenizer, taught.tokenizer):
        where = f"stages.{stage.name}.{stage.kind}.student.model"
        raise stage.recipe.error(where, f"{where}: {OTHER_TOKENS}")
    processes = Processes(config, stage.recipe, stage.partial)
    if processes.main:
        stage.begin()

    texts = ("teacher", "task", "data", "max_length", "transfer")
    shared = stage.shared(*texts)

    def read_as(reader: Task, directory: Path) -> Prepared:
        more = functools.partial(transfer_rows, stage)
        return prepare_on_disk(
            config, stage.recipe, directory / "rows", processes, reader.tokenizer, lambda rows: reader.facts, more
        )

    alike = task is taught
    data = read_as(task, shared if alike else stage.shared(*texts, "student"))
    read, task = data if alike else read_as(taught, shared), data.task
    torch.manual_seed(torch_seed(stage.seed, "initialize"))
    student, changes = load_fitting(student_path, task, attention)
    if config.student.layers is not None:
        shorten(student, config.student.layers)
    if config.hidden and student.config.hidden_size != teacher.config.hidden_size:
        where = f"stages.{stage.name}.{stage.kind}.hidden"
        raise stage.recipe.error(where, f"{where}: {OTHER_WIDTH}")
    if config.train.dropout is not None:
        set_dropout(student, config.train.dropout)
    said_in = shared / f"teacher-{processes.precision}-{config.temperature:g}"
    said = teacher_outputs(teacher, read.task, read.examples["train"], config.temperature, processes, said_in)
    matching = teacher.to(processes.device) if config.hidden or config.attention else None
    batches = LabelledBatches(data.examples["train"], task, config.train.batch_size, stage.seed, said)
    judge = judge_of(data)
    loss = DistillationLoss(config, task, matching, taught)
    fit = Fit(processes, student, loss, batches, judge, saver(student, task.tokenizer), stage.partial, stage.name, stage.seed)
    for note in [f"{processes.describe}; {data.describe}; {data.more:,} transfer texts", *data.notes]:
        fit.tracker.say(note)
    say_changes(fit.tracker.say, config.student.model or config.teacher, changes)
    state = fit.run()
    hand_over(stage, processes, data, state, fit.weights, started, changes)
    processes.close()


def main() -> None:
    """Entry point of `accelerate launch -m export.compress.distill RECIPE --stage NAME`."""
    stage_main("export.compress.distill", DistillConfig, run)


if __name__ == "__main__":
    main()
