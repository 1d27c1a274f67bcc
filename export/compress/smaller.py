"""What every stage does that makes a model smaller without training it: save, re-open, judge, publish."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from engine.stages.stage import Stage

if TYPE_CHECKING:
    from engine.data.rows import Prepared


def publish_model(stage: Stage[Any], data: Prepared, model: Any, started: float, **facts: Any) -> int:
    """Saves a changed model with its tokenizer, judges what was saved, and completes the stage.

    Args:
        data: of the stage; its task says what the model's configuration holds.
        started: when the stage began, as time.monotonic() has it.
        facts: for stage.json, beside metrics, size and seconds.

    Returns:
        the number of its parameters.
    """
    from engine.evaluate import evaluate
    from engine.models import load_model, size_of

    task = data.task
    model.config.update(task.settings())
    model.save_pretrained(stage.output)
    task.tokenizer.save_pretrained(stage.output)
    saved = load_model(stage.output, task.head)
    metrics = data.judge(lambda rows: evaluate(saved, task, rows), stage.output)
    size = size_of(saved)
    stage.complete(
        metric=task.answers.metric._asdict(),
        metrics=metrics,
        **size,
        **facts,
        seconds={"this_run": round(time.monotonic() - started, 3)},
    )
    return size["parameters"]
