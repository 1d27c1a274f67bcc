"""ONNX graphs, int8 form, ONNX Runtime engine, parity gates, latency measurement."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from engine.answers._batches import batched, padded
from engine.errors import UserError
from engine.evaluate import torch_run
from engine.models.structure import shrink
from export.compress.quantize import (
    Activation,
    quantize_embeddings,
    quantize_matmuls,
    quantize_weight,
    smoothing,
    tensorrt_form,
    watch_activations,
)
from export.engines.benchmark import Candidate, measure, summary
from export.engines.einsum import einsums_to_products, linear_map
from export.engines.graph import drop_unused, export_onnx, initializers, merge_projections, weight_bytes, weight_matmuls
from export.engines.ort import OrtEngine, session
from export.engines.parity import ParityGates, check_parity, observe, run_of
from tests.recipes import ragged_rows
from tests.unit.int8_products import one_product
from tests.unit.models import GRAPH, INPUTS, classification_task, tiny_classifier

LOUD = 63
"""A token that no row holds."""
ROWS = [{**row, "label": str(row["label"])} for row in ragged_rows(64)]


@pytest.fixture(scope="module")
def model():
    built = tiny_classifier(initializer_range=0.2)
    shrink(built, [[0, 2, 3], [1, 2]], [range(40), range(30)])
    return built


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return classification_task(tmp_path_factory.mktemp("t"), 48)


@pytest.fixture(scope="module")
def examples(task):
    return task.encode(ROWS)


@pytest.fixture(scope="module")
def plain(model):
    return export_onnx(model, GRAPH)


@pytest.fixture(scope="module")
def merged(plain):
    copy = onnx.ModelProto()
    copy.CopyFrom(plain)
    assert merge_projections(copy) == 2
    return copy


@pytest.fixture(scope="module")
def quantized(merged, task, examples):
    copy = onnx.ModelProto()
    copy.CopyFrom(merged)
    quantize_matmuls(copy, watch_activations(copy, task, examples))
    quantize_embeddings(copy)
    onnx.checker.check_model(copy)
    return copy


def torch_logits(model, task, examples):
    with torch.no_grad():
        return np.concatenate([task.forward(model, task.collate([example])).logits.numpy() for example in examples])


def logits_of(engine, task, rows, batch=1, length=0):
    """Logits of every row in batches of similar length, padded to at least `length` tokens."""
    call = padded(run_of({"model": engine}), length, task.answers.padding)
    return batched(call, batch)("model", task.answers.prepare(rows))["logits"]


def run(proto, task, **options):
    return logits_of(OrtEngine(proto.SerializeToString(), 1), task, ROWS, **options)


@pytest.mark.parametrize("options", [{"batch": 1}, {"batch": 7}, {"batch": 64}, {"batch": 3, "length": 48}])
def test_the_graph_gives_the_models_logits_for_every_batch_length_and_padding(plain, model, task, examples, options):
    np.testing.assert_allclose(run(plain, task, **options), torch_logits(model, task, examples), atol=2e-5)


def test_merging_query_key_and_value_changes_the_nodes_but_not_the_logits(plain, merged, task, examples):
    np.testing.assert_allclose(run(merged, task), run(plain, task), atol=1e-5)
    assert len(weight_matmuls(plain)) - len(weight_matmuls(merged)) == 4


def test_an_exported_graph_tells_nothing_about_the_machine_that_made_it(plain):
    assert b"/" + b"site-packages" not in plain.SerializeToString()
    assert not any(node.metadata_props for node in plain.graph.node)


def test_both_inputs_of_every_weight_product_are_int8_and_no_pair_is_shared(merged, quantized):
    maker = {name: node for node in quantized.graph.node for name in node.output}
    readers = [name for node in quantized.graph.node for name in node.input]
    constants = initializers(quantized)
    products = [n for n in quantized.graph.node if n.op_type == "MatMul" and n.input[1] in maker]
    products = [n for n in products if maker[n.input[1]].op_type == "DequantizeLinear"]
    assert len(products) == len(weight_matmuls(merged)) == 8
    for product in products:
        left, right = (maker[name] for name in product.input)
        assert left.op_type == right.op_type == "DequantizeLinear"
        assert constants[right.input[0]].data_type == TensorProto.INT8
        assert len(constants[right.input[1]].dims) == 1, "one scale per output channel"
        pair = maker[left.input[0]]
        assert pair.op_type == "QuantizeLinear" and list(pair.input[1:]) == list(left.input[1:])
        assert readers.count(pair.output[0]) == readers.count(left.output[0]) == 1
        for zero_point in (left.input[2], right.input[2]):
            assert not onnx.numpy_helper.to_array(constants[zero_point]).any(), "symmetric"
    assert not weight_matmuls(quantized)


def test_onnx_runtime_fuses_every_quantized_product(quantized, tmp_path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(quantized.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 8
    assert "DequantizeLinear" not in kinds


def test_int8_stays_close_to_the_float_model_and_is_a_quarter_of_its_size(merged, quantized, task, examples):
    full, small = run(merged, task), run(quantized, task)
    assert (full.argmax(1) == small.argmax(1)).mean() > 0.95
    assert np.abs(full - small).max() < 0.1 * np.ptp(full)
    assert weight_bytes(quantized) < 0.45 * weight_bytes(merged)  # biases and normalization weigh much in a tiny model


def test_weights_are_rounded_by_at_most_half_a_step_per_channel(merged, quantized):
    constants = initializers(quantized)
    for node, weight in weight_matmuls(merged):
        values, scale = (onnx.numpy_helper.to_array(constants[f"{node.input[1]}_{kind}"]) for kind in ("int8", "scale"))
        if f"{node.input[1]}_smoothing" in constants:
            weight = weight / onnx.numpy_helper.to_array(constants[f"{node.input[1]}_smoothing"])[:, None]
        assert np.abs(values * scale - weight).max(axis=0) == pytest.approx(0, abs=float(scale.max() / 2) + 1e-7)
        full, _ = quantize_weight(weight, "8bit")
        assert (np.abs(full).max(axis=0) == 127).all(), "the whole range is used"


def test_the_form_for_tensorrt_computes_the_same(quantized, task, examples):
    changed = tensorrt_form(quantized)
    onnx.checker.check_model(changed)
    np.testing.assert_allclose(run(changed, task), run(quantized, task), atol=1e-6)
    gathers = [node for node in changed.graph.node if node.op_type == "Gather"]
    assert not any(initializers(changed).get(n.input[0], onnx.TensorProto()).data_type == TensorProto.INT8 for n in gathers)


def test_calibration_never_looks_at_padding(merged, task, examples):
    ordinary = watch_activations(merged, task, examples)

    class Loud:
        """Gives padding an embedding that is louder than all others."""

        inputs = task.inputs

        def collate(self, rows):
            batch = task.collate(rows)
            batch["input_ids"][batch["attention_mask"] == 0] = LOUD
            return batch

    loud = onnx.ModelProto()
    loud.CopyFrom(merged)
    (table,) = [tensor for tensor in loud.graph.initializer if "word_embeddings" in tensor.name]
    values = onnx.numpy_helper.to_array(table).copy()
    values[LOUD] = 100 * np.sign(values[LOUD])
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    for name, seen in watch_activations(loud, Loud(), examples).items():
        assert all(np.array_equal(*both) for both in zip(seen, ordinary[name], strict=True))


def test_calibration_sees_the_largest_activation_of_all_rows(merged, task, examples):
    some, more = (watch_activations(merged, task, examples[:count]) for count in (2, 64))
    assert some.keys() == {node.input[0] for node, _ in weight_matmuls(merged)}
    assert all((more[name].largest_I >= some[name].largest_I).all() for name in some)
    for seen in more.values():
        assert (np.abs(seen.sample_SI).max(axis=0) <= seen.largest_I).all() and len(seen.sample_SI) > 1


def outlying(rng, factor):
    """Returns an activation of 16 inputs, one of which is `factor` times as large as the others, and a weight."""
    sample = rng.standard_normal((256, 16)).astype(np.float32)
    sample[:, 3] *= factor
    return Activation(np.abs(sample).max(axis=0), sample), rng.standard_normal((16, 8)).astype(np.float32)


@pytest.mark.parametrize("weights", ["portable", "8bit"])
def test_inputs_far_larger_than_the_others_are_made_alike_where_that_halves_the_error(weights):
    rng = np.random.default_rng(0)
    assert smoothing(*outlying(rng, 1), weights) is None
    activation, weight = outlying(rng, 100)
    divisor = smoothing(activation, weight, weights)
    assert divisor[3] > 5 * np.delete(divisor, 3).max()

    def error(seen):
        model = one_product(weight)
        quantize_matmuls(model, {"x": seen}, weights)
        given = session(model.SerializeToString()).run(["y"], {"x": activation.sample_SI})[0]
        return np.square(given - activation.sample_SI @ weight).sum()

    assert error(activation) < 0.25 * error(Activation(activation.largest_I, activation.sample_SI[:0]))


def test_an_input_that_is_always_0_or_never_used_moves_nothing_to_infinity():
    activation, weight = outlying(np.random.default_rng(0), 100)
    activation.sample_SI[:, 5] = activation.largest_I[5] = 0
    weight[7] = 0
    assert np.isfinite(smoothing(activation, weight, "portable")).all()


def test_a_product_that_rounding_would_make_noise_stays_float():
    rng = np.random.default_rng(0)
    sample, weight = rng.standard_normal((256, 16)).astype(np.float32), rng.standard_normal((16, 8)).astype(np.float32)
    seen = Activation(np.abs(sample).max(axis=0), sample)
    assert quantize_matmuls(one_product(weight), {"x": seen}) == {}
    sample[0] *= 1000  # a token far larger than the others: one scale for all of them leaves nothing of the rest
    model, seen = one_product(weight), Activation(np.abs(sample).max(axis=0), sample)
    (noise,) = quantize_matmuls(model, {"x": seen}).values()
    assert noise > 0.9
    np.testing.assert_allclose(
        session(model.SerializeToString()).run(["y"], {"x": sample})[0], sample @ weight, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [("ibh,hnd->ibnd", [(2, 3, 8), (8, 4, 5)]), ("ibnd,hnd->ibh", [(2, 3, 4, 5), (8, 4, 5)]), ("ab,cb->ac", [(2, 3), (4, 3)])],
)
def test_an_einsum_that_is_a_linear_map_becomes_the_product_that_gives_the_same(equation, shapes):
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    model = one_product(weight.reshape(len(weight), -1))
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    node = model.graph.node[0]
    changed = onnx.helper.make_node("Einsum", list(node.input), list(node.output), name="einsum", equation=equation)
    model.graph.node.remove(node)
    model.graph.node.append(changed)
    for value, rank in ((model.graph.input[0], x.ndim), (model.graph.output[0], len(equation.partition("->")[2]))):
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [None] * rank))
    assert einsums_to_products(model) == 1
    drop_unused(model)
    onnx.checker.check_model(model)
    assert [weight.ndim for _, weight in weight_matmuls(model)] == [2]
    given = session(model.SerializeToString()).run(None, {model.graph.input[0].name: x})[0]
    np.testing.assert_allclose(given, np.einsum(equation, x, weight), rtol=1e-4, atol=1e-4)


def test_other_einsums_stay():
    assert all(
        linear_map(equation) is None for equation in ("ibnd,jbnd->bnij", "ibnd,snd->ibns", "ijbs,ibns->bnij", "ibh,hnd->bind")
    )


def test_layers_that_share_a_weight_share_its_int8_form():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 16)).astype(np.float32)
    model = one_product(weight)
    node = model.graph.node[0]
    again = onnx.helper.make_node("MatMul", [node.output[0], node.input[1]], ["z"], name="again")
    model.graph.node.append(again)
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    x = rng.standard_normal((64, 16)).astype(np.float32)
    seen = {name: Activation(np.abs(values).max(axis=0), values) for name, values in (("x", x), (node.output[0], x @ weight))}
    quantize_matmuls(model, seen)
    assert len(initializers(model)) == len(model.graph.initializer)
    assert [tuple(t.dims) for t in model.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 2] == [(16, 16)]
    given = session(model.SerializeToString()).run(["z"], {"x": x})[0]
    assert np.abs(given - x @ weight @ weight).max() < 0.1 * np.ptp(x @ weight @ weight)


def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"model\.onnx cannot be loaded by ONNX Runtime"):
        OrtEngine(tmp_path / "model.onnx")


class Moved:
    """An engine whose logits move when a call has several rows, or the largest number of tokens."""

    inputs, outputs = INPUTS, ["logits"]

    def __init__(self, engine, rows=0.0, tokens=0.0):
        self.engine, self.rows, self.tokens = engine, rows, tokens

    def run(self, arrays):
        rows, tokens = arrays["input_ids"].shape
        moved = np.float32([0, self.rows * (rows > 1) + self.tokens * (tokens == 48)])
        return {name: array + moved for name, array in self.engine.run(arrays).items()}


def test_the_gates_let_a_faithful_engine_pass_and_stop_the_others(quantized, model, task):
    engine, answers = OrtEngine(quantized.SerializeToString(), 1), task.answers
    reference = observe(torch_run(model, task), answers, ROWS)

    def check(engine, agreement, against=reference):
        return check_parity(run_of({"model": engine}), answers, ROWS, against, ParityGates(agreement=agreement), 48)

    found = check(engine, 0.9)
    assert found["batch_difference"] < 1e-4 and found["padding_difference"] < 1e-4 and found["rows"] == 64
    assert found["outputs"]["model/logits"]["cosine"] == found["cosine"] > 0.99
    with pytest.raises(UserError, match="model/logits depend on batch"):
        check(Moved(engine, rows=0.1), 0)
    with pytest.raises(UserError, match="depend on padding"):
        check(Moved(engine, tokens=0.1), 0)
    opposite = observe(lambda graph, arrays: {"logits": -torch_run(model, task)(graph, arrays)["logits"]}, answers, ROWS)
    with pytest.raises(UserError, match=r"only .*% of 64 rows"):
        check(engine, 0.95, opposite)


def test_candidates_run_the_same_inputs_in_turn_and_everyone_goes_first_once(monkeypatch):
    monkeypatch.setattr("export.engines.benchmark.WARM_UP_SECONDS", 0.0)
    calls = []
    candidates = [Candidate(name, name, "", "", lambda arrays, name=name: calls.append((name, arrays["x"]))) for name in "ab"]
    times = measure(candidates, [{"x": number} for number in range(3)], rounds=2)
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert calls == [(name, x) for name in "abba" for x in range(3)]
    assert summary(np.asarray([1.0, 2.0, 3.0]))["median_ms"] == 2.0
