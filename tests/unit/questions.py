"""Rows, models and runs of tests on question answering."""

import numpy as np
import torch

from engine.answers.question_answering import END, START
from engine.tasks import question_answering
from tests.unit.models import tiny_config, tiny_tokenizer

CONTEXT = "the actor was in a good film with a dull plot"
ROWS = [
    {"question": "a film", "context": CONTEXT, "answers": [{"text": "good film", "answer_start": 19}]},
    {"question": "the plot", "context": CONTEXT, "answers": [{"text": "dull plot", "answer_start": 36}]},
]
NONE = {"question": "the scene", "context": "the actor was cold", "answers": []}
LONG = " ".join(["the actor was very very cold but"] * 6 + ["good film"] + ["and the plot was long"] * 6)


def qa_task(directory, rows=ROWS, max_length=32, **section):
    config = question_answering.Config(type="question_answering", **section)
    return question_answering.Task(config, question_answering.Task.learn(config, rows), tiny_tokenizer(directory), max_length)


def tiny_model(task, **shape):
    from transformers import BertForQuestionAnswering

    torch.manual_seed(0)
    return BertForQuestionAnswering(tiny_config(**task.settings(), initializer_range=0.5, **shape)).eval()


def runs(model, task):
    """A `run` of the model."""

    def run(graph, arrays):
        batch = {name: torch.from_numpy(arrays[name]) for name in task.inputs}
        with torch.no_grad():
            return {
                name: tensor.numpy() for name, tensor in task.graphs[graph].run(model, batch, batch["attention_mask"]).items()
            }

    return run


def likes(task, *pairs, none=0.0, elsewhere=0.0):
    """A `run` that scores tokens as beginning and end by their words: {beginning, end} in pairs with a score."""
    number = task.tokenizer.convert_tokens_to_ids

    def run(graph, arrays):
        ids = arrays["input_ids"]
        start, end = np.full(ids.shape, elsewhere, dtype=np.float32), np.full(ids.shape, elsewhere, dtype=np.float32)
        for first, last, value in pairs:
            start[ids == number(first)], end[ids == number(last)] = value, value
        start[:, 0] = end[:, 0] = none
        return {START: start, END: end}

    return run
