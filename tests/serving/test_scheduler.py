"""The queue of a model, without a network: what is merged, refused, dropped and survived."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from export.serving.protocol import ModelSpec, RequestError
from export.serving.scheduler import ServedModel

CONFIG = """
name: "echo"
backend: "python"
max_batch_size: 4
input [ { name: "X" data_type: TYPE_INT64 dims: [ 1 ] } ]
output [ { name: "Y" data_type: TYPE_INT64 dims: [ 1 ] } ]
"""


class Gate:
    """A computation that doubles its input, waits until it is let through, and keeps the batches it saw."""

    def __init__(self):
        self.open, self.started = threading.Event(), threading.Event()
        self.batches = []

    def __call__(self, arrays):
        self.batches.append(arrays["X"][:, 0].tolist())
        self.started.set()
        self.open.wait(10)
        if 13 in arrays["X"]:
            raise RuntimeError("unlucky")
        return {"Y": arrays["X"] * 2}


def rows(*values):
    return {"X": np.array(values, dtype=np.int64)[:, None]}


def run(scenario, batching="dynamic_batching { }", max_queue=16):
    """Runs `scenario(model, gate)` beside the model's queue."""

    async def main():
        gate = Gate()
        with ThreadPoolExecutor(1) as executor:
            model = ServedModel(ModelSpec.parse(CONFIG + batching, []), gate, executor, max_queue)
            queue = asyncio.create_task(model.run())
            try:
                await scenario(model, gate)
            finally:
                gate.open.set()
                queue.cancel()
        return model, gate

    return asyncio.run(main())


async def behind_a_running_batch(model, gate, *requests):
    """Queues requests while the computation is busy with [0]; returns their tasks, the first being [0]'s."""
    tasks = [asyncio.create_task(model.infer(rows(0)))]
    await asyncio.to_thread(gate.started.wait, 10)
    for request in requests:
        tasks.append(asyncio.create_task(model.infer(rows(*request))))
        await asyncio.sleep(0)
    return tasks


def test_what_waits_is_merged_in_order_up_to_the_largest_batch_and_split_again():
    async def scenario(model, gate):
        tasks = await behind_a_running_batch(model, gate, [1], [2, 3], [4, 5], [6])
        gate.open.set()
        answers = await asyncio.gather(*tasks)
        assert [answer["Y"][:, 0].tolist() for answer in answers] == [[0], [2], [4, 6], [8, 10], [12]]

    model, gate = run(scenario)
    assert gate.batches == [[0], [1, 2, 3], [4, 5, 6]]
    assert (model.statistics.inferences, model.statistics.executions) == (7, 3)
    assert model.statistics.requests["success"].count == 5


def test_without_dynamic_batching_every_request_is_a_batch():
    async def scenario(model, gate):
        tasks = await behind_a_running_batch(model, gate, [1], [2])
        gate.open.set()
        await asyncio.gather(*tasks)

    assert run(scenario, batching="")[1].batches == [[0], [1], [2]]


def test_a_full_queue_refuses():
    async def scenario(model, gate):
        tasks = await behind_a_running_batch(model, gate, [1], [2])
        with pytest.raises(RequestError, match="2 requests wait already") as caught:
            await model.infer(rows(3))
        assert caught.value.status == 503
        gate.open.set()
        await asyncio.gather(*tasks)

    model, _ = run(scenario, max_queue=2)
    assert model.statistics.requests["fail"].count == 1


def test_a_request_whose_client_has_gone_is_not_computed():
    async def scenario(model, gate):
        tasks = await behind_a_running_batch(model, gate, [1], [2])
        tasks[1].cancel()
        gate.open.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    assert run(scenario)[1].batches == [[0], [2]]


def test_an_error_reaches_its_batch_and_the_queue_goes_on():
    async def scenario(model, gate):
        tasks = await behind_a_running_batch(model, gate, [13], [1])
        gate.open.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(outcome) for outcome in outcomes[1:]] == ["unlucky", "unlucky"]
        assert (await model.infer(rows(2)))["Y"].tolist() == [[4]]

    model, _ = run(scenario)
    assert model.statistics.requests["fail"].count == 2


def test_a_full_batch_does_not_wait_for_the_delay():
    async def scenario(model, gate):
        gate.open.set()
        await asyncio.wait_for(asyncio.gather(*(model.infer(rows(n)) for n in range(4))), 30)

    _, gate = run(scenario, batching="dynamic_batching { max_queue_delay_microseconds: 3600000000 }")
    assert gate.batches == [[0, 1, 2, 3]]


def test_a_lonely_request_is_computed_when_the_delay_is_over():
    async def scenario(model, gate):
        gate.open.set()
        await asyncio.wait_for(model.infer(rows(1)), 30)

    assert run(scenario, batching="dynamic_batching { max_queue_delay_microseconds: 1000 }")[1].batches == [[1]]
