"""int8 post-training quantization with real calibration rows.

The form is the one that both ONNX Runtime and TensorRT run fast: symmetric int8, one scale per activation tensor and per output
channel of a weight, a QuantizeLinear and DequantizeLinear pair of its own on the inputs of every MatMul with a constant weight,
weights folded to int8 constants. Where a few inputs are far larger than the others, they are made alike first (`smoothing`).
Embedding tables are stored as int8 with a scale per row (as in arXiv:1911.02079, without its
pruning). The arithmetic between them stays fp32.

x86 CPUs without VNNI add two neighbouring products in 16 bits that saturate (VPMADDUBSW, Intel 64 manual, volume 2). `portable`
weights leave that sum no room to saturate, so that the integer products are exact on every CPU.

Shapes: I inputs and O outputs of a weight, S sampled rows of an activation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import Field

from engine.config import ModelRef, Strict
from engine.data.splits import DataConfig
from engine.stages.stage import Stage, stage_main
from engine.tasks import AnyTask, Example, Task
from export.engines import Weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

CALIBRATION_BATCH = 32
"""Most rows per calibration run; they have the same length, so that no padding is looked at."""
SAMPLE = 1024
"""Rows of an activation, about, over which the error of a product is measured."""
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""How much of the differences between inputs is moved into the weights, as tried: SmoothQuant's alpha."""
NOISE = 0.05
"""Most that rounding may make of a product; it makes less than 0.004 of any product of MiniLM-L6, 0.0002 of most."""
PAIR_LIMIT = 128
"""Largest sum of two neighbouring weights of one sign: an activation of up to 255 times it stays below 2¹⁵."""


def graph_file(graph: str) -> str:
    """Returns the name of a graph's file in the directory of a `quantize` stage."""
    return f"{graph}.onnx"


class QuantizeConfig(Strict):
    """Section of a `quantize` stage."""

    model: ModelRef
    """What to quantize: a stage or a model directory that was fine-tuned."""
    task: AnyTask
    data: DataConfig
    """Training rows calibrate; validation and test rows measure the loss of accuracy."""
    examples: int = Field(512, ge=1)
    """Training rows that calibrate the activation ranges."""
    weights: Weights = "portable"
    """`portable`: the scale of each channel is as fine as it can be while no product saturates on any CPU. `8bit`: every channel
    uses all 8 bits, for CPUs with VNNI and for TensorRT; `predict` and `serve` then compute wider on x86 CPUs without VNNI, which
    is slower, and Triton's ONNX Runtime saturates there."""
    max_length: int = Field(128, ge=4)


class Activation(NamedTuple):
    """What calibration saw of the left input of a MatMul, S rows."""

    largest_I: np.ndarray
    """Largest absolute value of each input."""
    sample_SI: np.ndarray
    """Some of the rows; without any, nothing is smoothed."""


def watch_activations(model: onnx.ModelProto, task: Task, examples: Sequence[Example]) -> dict[str, Activation]:
    """Runs real rows through a float model and watches what its weights are multiplied with.

    Args:
        model: from `export_onnx`.
        task: collates examples.
        examples: calibration rows.

    Returns:
        {tensor: what was seen of it} for the left input of every MatMul with a constant weight.
    """
    import onnx

    from export.engines.graph import weight_matmuls
    from export.engines.ort import session

    names = list(dict.fromkeys(node.input[0] for node, _ in weight_matmuls(model)))
    if not names:
        return {}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    runner = session(watched.SerializeToString())
    lengths = np.asarray([len(example["input_ids"]) for example in examples])
    stride = max(1, int(lengths.sum()) // SAMPLE)
    largest: dict[str, np.ndarray] = {}
    samples: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for rows in _batches_of_one_length(lengths):
        batch = task.collate([examples[row] for row in rows])
        tensors = runner.run(names, {name: batch[name].numpy() for name in task.inputs})
        for name, tensor in zip(names, tensors, strict=True):
            flat_SI = tensor.reshape(-1, tensor.shape[-1])
            found_I = np.abs(flat_SI).max(axis=0)
            largest[name] = np.maximum(largest.get(name, found_I), found_I)
            samples[name].append(flat_SI[::stride].copy())
    return {name: Activation(largest[name], np.concatenate(samples[name])) for name in names}


def _batches_of_one_length(lengths: np.ndarray) -> Iterator[np.ndarray]:
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        yield from (rows[start : start + CALIBRATION_BATCH] for start in range(0, len(rows), CALIBRATION_BATCH))


def activation_scale(largest_I: np.ndarray) -> np.float32:
    """Returns the one scale of an activation whose inputs reach these absolute values."""
    return np.float32(max(float(largest_I.max()), 1e-12) / 127)


def smoothing(activation: Activation, weight_IO: np.ndarray, weights: Weights) -> np.ndarray | None:
    """Returns what each input is divided by before it is rounded, and its weights multiplied with, shape (I,).

    A few inputs of a transformer are many times larger than the others, and one scale for all of them leaves little of the rest:
    SmoothQuant (arXiv:2211.10438) moves a part of that into the weights. The part that gives the calibration rows the smallest
    error of the product is taken; None where even that does not halve the squared error, which is what the extra product costs.
    """
    if not len(activation.sample_SI):
        return None
    exact_SO = activation.sample_SI @ weight_IO

    def error(divisor_I: np.ndarray) -> float:
        return float(np.square(rounded_product(activation, weight_IO, divisor_I, weights) - exact_SO).sum())

    # Inputs that are never used, or always 0, have nothing to move.
    inputs_I, weights_I = (np.maximum(x, 1e-5 * x.max() + 1e-30) for x in (activation.largest_I, np.abs(weight_IO).max(axis=1)))
    tried = []
    for share in SHARES:
        log_I = share * np.log(inputs_I) - (1 - share) * np.log(weights_I)
        tried.append(np.exp(log_I - log_I.mean()).astype(np.float32))
    errors = [error(divisor_I) for divisor_I in tried]
    best = int(np.argmin(errors))
    return tried[best] if errors[best] < 0.5 * error(np.ones_like(inputs_I)) else None


def rounded_product(activation: Activation, weight_IO: np.ndarray, divisor_I: np.ndarray, weights: Weights) -> np.ndarray:
    """Returns what int8 makes of the sampled rows times the weight, shape (S, O)."""
    scale = activation_scale(activation.largest_I / divisor_I)
    int8_IO, scale_O = quantize_weight(weight_IO * divisor_I[:, None], weights)
    rounded_SI = np.clip(np.rint(activation.sample_SI / divisor_I / scale), -128, 127)
    return rounded_SI @ int8_IO.astype(np.float32) * (scale * scale_O)


def rounding_noise(activation: Activation, weight_IO: np.ndarray, divisor_I: np.ndarray, weights: Weights) -> float:
    """Returns the share of a product that rounding makes noise: the squared error over the square, at most 1, mean over rows.

    Rows count alike: one scale for all of them follows the largest, and may leave little of the others.
    """
    if not len(activation.sample_SI):
        return 0.0
    exact_SO = activation.sample_SI @ weight_IO
    error_S = np.square(rounded_product(activation, weight_IO, divisor_I, weights) - exact_SO).sum(axis=1)
    return float(np.minimum(error_S / np.maximum(np.square(exact_SO).sum(axis=1), 1e-30), 1).mean())


def quantize_weight(weight_IO: np.ndarray, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a weight to int8 with one scale per output.

    Returns:
        (int8 of shape (I, O), float32 scales of shape (O,)). `portable`: no two rows 2i and 2i + 1 of a column hold values of one
        sign that add up to more than PAIR_LIMIT.
    """
    bound_O = np.abs(weight_IO).max(axis=0) / 127
    if weights == "portable":
        inputs, outputs = weight_IO.shape
        pairs = np.pad(weight_IO, ((0, inputs % 2), (0, 0))).reshape(-1, 2, outputs)
        sums = [np.maximum(sign * pairs, 0).sum(axis=1).max(axis=0) for sign in (1, -1)]
        # Rounding adds at most a half to each of the two: the whole number below their sum is then PAIR_LIMIT at most.
        bound_O = np.maximum(bound_O, np.maximum(*sums) / (PAIR_LIMIT - 0.5))
    scale_O = np.maximum(bound_O, 1e-12 / 127).astype(np.float32)
    return np.rint(weight_IO / scale_O).astype(np.int8), scale_O


def quantize_matmuls(
    model: onnx.ModelProto, activations: dict[str, Activation], weights: Weights = "portable"
) -> dict[str, float]:
    """Gives every MatMul with a constant weight int8 inputs, in place: a Q/DQ pair on its activation, DQ of an int8 weight.

    Layers that share a weight share its int8 form, which is chosen for what all of them multiply it with. A product of which
    rounding would make more than NOISE noise stays float.

    Args:
        activations: see `watch_activations`.
        weights: see `QuantizeConfig`.

    Returns:
        {name of a product that stays float: the share of it that would be noise}.
    """
    from export.engines.graph import replace_node, weight_matmuls

    users: dict[str, list[tuple[onnx.NodeProto, np.ndarray]]] = {}
    for node, weight_IO in weight_matmuls(model):
        users.setdefault(node.input[1], []).append((node, weight_IO))
    kept: dict[str, float] = {}
    for right, found in users.items():
        weight_IO, seen = found[0][1], [activations[node.input[0]] for node, _ in found]
        together = _together(seen)
        divisor_I = smoothing(together, weight_IO, weights)
        noise = rounding_noise(together, weight_IO, np.ones(len(weight_IO)) if divisor_I is None else divisor_I, weights)
        if noise > NOISE:
            kept |= {node.name: noise for node, _ in found}
            continue
        if divisor_I is not None:
            weight_IO = weight_IO * divisor_I[:, None]
        int8_IO, scale_O = quantize_weight(weight_IO, weights)
        constants = {f"{right}_int8": int8_IO, f"{right}_scale": scale_O, f"{right}_zero": np.zeros(len(scale_O), dtype=np.int8)}
        if divisor_I is not None:
            constants[f"{right}_smoothing"] = 1 / divisor_I
        _add_constants(model, constants)
        for (node, _), activation in zip(found, seen, strict=True):
            largest_I = activation.largest_I if divisor_I is None else activation.largest_I / divisor_I
            replace_node(model, node, _int8_product(model, node, activation_scale(largest_I), divisor_I is not None))
    return kept


def _together(seen: Sequence[Activation]) -> Activation:
    """Returns what was seen of several tensors as if it were one."""
    return Activation(np.max([each.largest_I for each in seen], axis=0), np.concatenate([each.sample_SI for each in seen]))


def _add_constants(model: onnx.ModelProto, constants: dict[str, Any]) -> None:
    from onnx import numpy_helper

    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items())


def _int8_product(model: onnx.ModelProto, node: onnx.NodeProto, scale: np.float32, smooth: bool) -> list[onnx.NodeProto]:
    """Returns the nodes that take the place of a MatMul whose weight has an int8 form."""
    from onnx import helper

    left, right, name = node.input[0], node.input[1], node.name
    new = []
    if smooth:
        new.append(helper.make_node("Mul", [left, f"{right}_smoothing"], [f"{name}_smooth"], name=f"{name}_smooth"))
        left = f"{name}_smooth"
    _add_constants(model, {f"{name}_scale": scale, f"{name}_zero": np.zeros((), dtype=np.int8)})
    pair = [f"{name}_scale", f"{name}_zero"]
    weight = [f"{right}_int8", f"{right}_scale", f"{right}_zero"]
    return [
        *new,
        helper.make_node("QuantizeLinear", [left, *pair], [f"{name}_int8"], name=f"{name}_quantize"),
        helper.make_node("DequantizeLinear", [f"{name}_int8", *pair], [f"{name}_left"], name=f"{name}_dequantize"),
        helper.make_node("DequantizeLinear", weight, [f"{name}_right"], name=f"{name}_weight", axis=1),
        helper.make_node("MatMul", [f"{name}_left", f"{name}_right"], list(node.output), name=name),
    ]


def quantize_embeddings(model: onnx.ModelProto) -> None:
    """Stores every float embedding table as int8 with one scale per row, in place: Gather × Gather instead of Gather."""
    from onnx import TensorProto, helper, numpy_helper

    from export.engines.graph import initializers, replace_node

    constants = initializers(model)
    for node in list(model.graph.node):
        table = constants.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or table.data_type != TensorProto.FLOAT or len(table.dims) != 2:
            continue
        name, rows, output = table.name, node.input[1], node.output[0]
        if f"{name}_int8" not in initializers(model):  # encoder and decoder may read the same table
            values = numpy_helper.to_array(table)
            scale = np.maximum(np.abs(values).max(axis=1, keepdims=True), 1e-12).astype(np.float32) / 127
            _add_constants(model, {f"{name}_int8": np.rint(values / scale).astype(np.int8), f"{name}_scale": scale})
        new = [
            helper.make_node("Gather", [f"{name}_int8", rows], [f"{output}_int8"], name=f"{node.name}_int8"),
            helper.make_node("Gather", [f"{name}_scale", rows], [f"{output}_scale"], name=f"{node.name}_scale"),
            helper.make_node("Cast", [f"{output}_int8"], [f"{output}_float"], name=f"{node.name}_cast", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{output}_float", f"{output}_scale"], [output], name=f"{node.name}_rescale"),
        ]
        replace_node(model, node, new)


def tensorrt_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the same model with embeddings as TensorRT takes them: DequantizeLinear of the int8 table, then Gather.

    ONNX Runtime would dequantize the whole table in every run; TensorRT accepts int8 constants in no other place.
    """
    import onnx
    from onnx import helper, numpy_helper

    from export.engines.graph import initializers, replace_node

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    constants = initializers(changed)
    maker = {name: node for node in changed.graph.node for name in node.output}
    for node in list(changed.graph.node):
        cast = maker.get(node.input[0]) if node.op_type == "Mul" else None
        gather = maker.get(cast.input[0]) if cast is not None and cast.op_type == "Cast" else None
        if cast is None or gather is None or gather.op_type != "Gather" or gather.input[0] not in constants:
            continue
        table, rows = gather.input
        scales = maker[node.input[1]]
        pair = [f"{table}_row_scale", f"{table}_row_zero"]
        new = [helper.make_node("Gather", [f"{table}_float", rows], list(node.output), name=node.name)]
        if pair[0] not in initializers(changed):
            scale = numpy_helper.to_array(constants[scales.input[0]]).ravel()
            _add_constants(changed, {pair[0]: scale, pair[1]: np.zeros(len(scale), dtype=np.int8)})
            new.insert(
                0, helper.make_node("DequantizeLinear", [table, *pair], [f"{table}_float"], name=f"{table}_dequantize", axis=0)
            )
        replace_node(changed, node, new)
        for dead in (cast, gather, scales):
            changed.graph.node.remove(dead)
    return changed


def run(stage: Stage[QuantizeConfig]) -> None:
    """Runs one quantization stage."""
    config = stage.config
    path = stage.recipe.find_model(config.model)
    stage.inputs  # noqa: B018 - missing inputs show before anything heavy is loaded
    import onnx

    from engine.data.rows import prepare_for_model
    from engine.models import size_of
    from engine.models.fitting import load_finished
    from export.engines.graph import export_graphs, merge_projections, weight_bytes
    from export.engines.ort import OrtEngine
    from export.engines.parity import evaluate_engine, run_of

    started = time.monotonic()
    data = prepare_for_model(config, stage.recipe, path, config.examples)
    task = data.task
    model = load_finished(path, task, "eager")
    graphs = export_graphs(model, task)
    kept: dict[str, float] = {}
    for graph in graphs.values():
        merge_projections(graph)
        kept |= quantize_matmuls(graph, watch_activations(graph, task, data.examples["train"]), config.weights)
        quantize_embeddings(graph)
        onnx.checker.check_model(graph)
    if kept:
        worst = max(kept.values())
        print(f"  {len(kept)} matrix products stay float: rounding would make up to {worst:.0%} of them noise", flush=True)
    stage.begin()
    for name, graph in graphs.items():
        onnx.save(graph, stage.output / graph_file(name))
    model.config.update(task.settings())
    model.config.save_pretrained(stage.output)
    task.tokenizer.save_pretrained(stage.output)
    wide = config.weights == "8bit"
    engines = run_of({name: OrtEngine(stage.output / graph_file(name), wide=wide) for name in graphs})
    metrics = data.judge(lambda rows: evaluate_engine(engines, task.answers, rows), stage.output)
    stage.complete(
        metric=task.answers.metric._asdict(),
        metrics=metrics,
        parameters=size_of(model)["parameters"],
        weight_bytes=sum(weight_bytes(graph) for graph in graphs.values()),
        float_products=kept,
        seconds={"this_run": round(time.monotonic() - started, 3)},
    )


def main() -> None:
    """Entry point of `python -m export.compress.quantize RECIPE --stage NAME`."""
    stage_main("export.compress.quantize", QuantizeConfig, run)


if __name__ == "__main__":
    main()
