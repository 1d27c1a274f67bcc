"""Full-parameter fine-tuning: body and task head are trained together on labelled rows."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from engine.config import ModelRef
from engine.data.splits import DataConfig
from engine.stages import heartbeat
from engine.stages.stage import Stage, stage_main
from engine.tasks import AnyTask
from engine.training.config import Trained

if TYPE_CHECKING:
    from engine.answers import Row
    from engine.data.rows import Prepared
    from engine.tasks import Facts
    from engine.training.checkpoint import TrainState
    from engine.training.loop import Judge
    from engine.training.processes import Processes


class FinetuneConfig(Trained):
    """Section of a `finetune` stage."""

    model: ModelRef
    """What to fine-tune: a stage, a directory, `package:NAME/path` or a hub id."""
    initialize: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only the model's shape: the baseline that shows what pretraining is worth."""
    task: AnyTask
    data: DataConfig
    max_length: int = Field(128, ge=4)
    """Longest row in tokens, special tokens included; longer ones are cut and counted."""

    @model_validator(mode="after")
    def _validation_for_early_stopping(self) -> FinetuneConfig:
        if not self.data.validation:
            raise ValueError("data.validation is needed to choose the best weights: give a file or a share such as 10%")
        return self


def run(stage: Stage[FinetuneConfig]) -> None:
    """Runs one fine-tuning stage on this rank."""
    config = stage.config
    path = stage.recipe.find_model(config.model)
    stage.inputs  # noqa: B018 - missing inputs show before anything heavy is loaded
    import torch

    from engine.data.rows import LabelledBatches, prepare_on_disk
    from engine.models import check_length, load_tokenizer, read_config, set_dropout
    from engine.models.fitting import load_fitting
    from engine.randomness import torch_seed
    from engine.tasks import own_classes, task_class
    from engine.training.loop import Fit
    from engine.training.processes import Processes

    started = time.monotonic()
    about, random = read_config(path), config.initialize == "random"
    check_length(config.max_length, about, "max_length", path)
    tokenizer = load_tokenizer(path)
    processes = Processes(config, stage.recipe, stage.partial)
    if processes.main:
        stage.begin()
    kind, own = task_class(config.task), None if random else own_classes(config.task, about)

    def learn(rows: Sequence[Row]) -> Facts:
        facts = kind.learn(config.task, rows)
        return kind.in_order(facts, own) if own else facts

    stored = stage.shared("model", "initialize", "task", "data", "max_length") / "rows"
    data = prepare_on_disk(config, stage.recipe, stored, processes, tokenizer, learn)
    task = data.task
    torch.manual_seed(torch_seed(stage.seed, "initialize"))
    model, changes = load_fitting(path, task, random=random)
    if config.train.dropout is not None:
        set_dropout(model, config.train.dropout)
    batches = LabelledBatches(data.examples["train"], task, config.train.batch_size, stage.seed)
    judge = judge_of(data)
    save = saver(model, task.tokenizer)
    fit = Fit(processes, model, task.loss, batches, judge, save, stage.partial, stage.name, stage.seed)
    for note in [f"{processes.describe}; {data.describe}", *data.notes]:
        fit.tracker.say(note)
    say_changes(fit.tracker.say, config.model, changes)
    state = fit.run()
    hand_over(stage, processes, data, state, fit.weights, started, changes)
    processes.close()


def judge_of(data: Prepared) -> Judge:
    """Returns how the progress of a fine-tuned model is measured: by the task's own metric on the validation rows."""
    from engine.training.loop import Judge

    metric = data.task.answers.metric
    return Judge(data.progress, metric.name, metric.higher_is_better, data.probe)


def saver(model: Any, tokenizer: Any) -> Any:
    """Returns a function that writes (directory, weights) as a model directory."""
    from engine.models.companions import save_together

    def save(directory: Path, weights: dict[str, Any]) -> None:
        save_together(model, tokenizer, directory, weights)

    return save


def say_changes(say: Callable[[str], None], model: str, changes: list[str]) -> None:
    """Says what was changed in a model that did not fit as it was."""
    for change in changes:
        say(f"model '{model}': {change}")


def hand_over(
    stage: Stage[Any],
    processes: Processes,
    data: Prepared,
    state: TrainState,
    weights: Path,
    started: float,
    changes: list[str],
) -> None:
    """Re-opens the saved weights, proves that they give the logits of the run, judges them on every split, publishes.

    Raises:
        RuntimeError: the re-opened model gives other logits: the saved weights are not those of the run.
    """
    from engine.evaluate import evaluate
    from engine.models import load_model, size_of
    from engine.training.loop import same_logits

    heartbeat.beat("finish")
    model = load_model(weights, data.task.head).to(processes.device)
    same_logits(data.probe(model), state.probe, weights)
    output = stage.output if processes.main else None
    metrics = data.judge(lambda rows: evaluate(model, data.task, rows, processes), output, choose=True)
    if processes.main:
        shutil.copytree(weights, stage.output, dirs_exist_ok=True)
        keep_settings(stage.output, data.task.kept)
        shutil.copy(stage.partial / "history.jsonl", stage.output)
        stage.complete(
            metric=data.task.answers.metric._asdict(),
            metrics=metrics,
            **size_of(model),
            seconds={"training": round(state.seconds, 3), "this_run": round(time.monotonic() - started, 3)},
            steps=state.step,
            best_step=state.best_step,
            stopped=state.stop,
            processes=processes.describe,
            truncated_rows=data.task.truncated,
            model_changes=changes,
        )
    processes.barrier()


def keep_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Writes entries into the configuration of a saved model."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **settings}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Entry point of `accelerate launch -m engine.finetune RECIPE --stage NAME`."""
    stage_main("engine.finetune", FinetuneConfig, run)


if __name__ == "__main__":
    main()
