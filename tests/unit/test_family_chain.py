"""Every family through the whole chain: fine-tuned, saved, distilled, pruned, factorised, quantized and exported."""

import copy
import functools

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine.answers import RowError
from engine.errors import UserError
from engine.evaluate import torch_run
from engine.models import CLASSIFIER, load_model, load_tokenizer, set_dropout
from engine.models.dropout import cheapen
from engine.models.families import family_of
from engine.models.fitting import load_finished, load_fitting
from engine.models.pooling import pool_each_row
from engine.models.structure import factorize, layers_of, shrink, sizes_of
from engine.tasks import classification, reads_alike, with_tokenizer_of
from engine.training.tuning import depth_of
from export.compress.distill import DistillationLoss, DistillConfig, shorten
from export.compress.prune import importance, strongest, strongest_heads
from export.compress.quantize import quantize_embeddings, quantize_matmuls, tensorrt_form, watch_activations
from export.engines.graph import export_graphs, merge_projections, weight_bytes
from export.engines.ort import OrtEngine
from tests.families import CLASSIFIERS, write_family
from tests.recipes import ragged_rows

ALIKE = ("camembert", "data2vec-text", "electra", "ernie", "layoutlm", "mbart", "megatron-bert", "mistral", "mt5", "qwen2")
ALIKE = (*ALIKE, "rembert", "roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl")
"""Families whose graph is made of the same operators as that of another one."""
EXPORTED = [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in CLASSIFIERS]
ROWS = [{**row, "label": str(row["label"])} for row in ragged_rows(48)]
EVERY = pytest.mark.parametrize("family", CLASSIFIERS)


def able_to(operation):
    return pytest.mark.parametrize("family", [name for name in CLASSIFIERS if not family_of(name).why_not(operation)])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns (directory, task) of a classifier of a family that was fine-tuned for some steps, saved and loaded again."""

    @functools.lru_cache
    def train(family):
        path = write_family(tmp_path_factory.mktemp(family) / "model", family)
        task = task_at(path)
        torch.manual_seed(0)
        model, _ = load_fitting(path, task, "eager")
        set_dropout(model, 0.0)
        learn(model, task.loss, task)
        done = path.with_name("trained")
        model.save_pretrained(done)
        task.tokenizer.save_pretrained(done)
        given = outputs(model, task, ROWS[:6])
        reloaded = load_finished(done, task_at(done), "eager").eval()
        np.testing.assert_allclose(outputs(reloaded, task, ROWS[:6]), given, atol=1e-5)
        return done, task_at(done)

    return train


def task_at(path):
    config = classification.Config(type="classification")
    return classification.Task(config, {"labels": ["0", "1"]}, load_tokenizer(path), 24)


def loaded(trained, family):
    path, task = trained(family)
    return load_finished(path, task, "eager").eval(), task


def learn(model, loss_of, task, steps=3, **more):
    examples = task.encode(ROWS[:16])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = {**task.collate(examples), **more}
        loss, count = loss_of(model.train(), batch)
        assert torch.isfinite(loss)
        (loss / count).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def outputs(model, task, rows):
    return torch_run(model, task)("model", task.answers.prepare(rows))["logits"]


def alone(run, task, rows):
    """Scores of rows that share their batch with nobody."""
    return np.concatenate([run("model", task.answers.prepare([row]))["logits"] for row in rows])


@EVERY
def test_a_row_gets_the_same_scores_whoever_shares_its_batch(trained, family):
    model, task = loaded(trained, family)
    run = torch_run(model, task)
    np.testing.assert_allclose(run("model", task.answers.prepare(ROWS[:12]))["logits"], alone(run, task, ROWS[:12]), atol=2e-5)


@EVERY
def test_scores_are_those_of_transformers_own_class_and_padding(trained, family):
    path, task = trained(family)
    own = AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager").eval()
    texts = [row["text"] for row in ROWS[:8]]
    padded = AutoTokenizer.from_pretrained(path)(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        expected = own(**{name: padded[name] for name in task.inputs}).logits.numpy()
    model, _ = loaded(trained, family)
    np.testing.assert_allclose(outputs(model, task, ROWS[:8]), expected, atol=2e-5)


@EVERY
def test_cheap_dropout_changes_nothing_where_nothing_is_dropped(trained, family):
    model, task = loaded(trained, family)
    set_dropout(model, 0.0)
    batch = task.collate(task.encode(ROWS[:12]))
    with torch.no_grad():
        expected = task.forward(model.train(), batch).logits
        cheapen(model)
        torch.testing.assert_close(task.forward(model, batch).logits, expected, rtol=1e-6, atol=1e-6)


@EVERY
def test_no_dropout_is_left_anywhere(trained, family):
    model, task = loaded(trained, family)
    set_dropout(model, 0.0)
    batch = task.collate(task.encode(ROWS[:4]))
    with torch.no_grad():
        first, second = (task.forward(model.train(), batch).logits for _ in range(2))
    assert torch.equal(first, second)
    assert {key: value for key, value in model.config.to_dict().items() if "dropout" in key and value} == {}


@able_to("layers")
def test_layers_below_the_head_are_those_of_the_row(trained, family):
    model, _ = loaded(trained, family)
    layers, depths = layers_of(model), depth_of(model)
    names = {module: name for name, module in model.named_modules()}
    found = [
        {depths[f"{names[layer.module]}.{name}"] for name, _ in layer.module.named_parameters() if "relative" not in name}
        for layer in layers
    ]
    assert found == [{len(layers) - index} for index in range(len(layers))]


def matching(**changes):
    """A section of distillation that compares layers."""
    rows = {"data": {"train": "rows.jsonl", "validation": "10%"}, "train": {"steps": 2}}
    section = {"teacher": "t", "task": {"type": "classification"}, **rows, "hidden": 1.0, "attention": 1.0}
    return DistillConfig.model_validate({**section, **changes})


def test_a_student_without_token_types_learns_from_a_teacher_that_has_them(trained, tmp_path):
    teacher, taught = loaded(trained, "bert")
    path = write_family(tmp_path, "distilbert")
    task = with_tokenizer_of(taught, path)
    assert taught.inputs == ["input_ids", "attention_mask", "token_type_ids"] and task.inputs == taught.inputs[:2]
    assert reads_alike(task.tokenizer, taught.tokenizer) and with_tokenizer_of(taught, trained("bert")[0]) is taught
    said = {"teacher_logits": taught.forward(teacher, taught.collate(taught.encode(ROWS[:16]))).logits.detach()}
    learn(load_finished(path, task, "eager"), DistillationLoss(matching(), task, teacher, taught), task, **said)


@able_to("layers")
def test_a_student_with_fewer_layers_learns_from_scores_and_layers(trained, family, tmp_path):
    teacher, task = loaded(trained, family)
    student = copy_of(teacher)
    shorten(student, 2)
    assert sizes_of(student) == [2] * len(sizes_of(teacher))
    config = matching(attention=0.0 if family_of(family).why_not("maps") else 1.0)
    said = {"teacher_logits": task.forward(teacher, task.collate(task.encode(ROWS[:16]))).logits.detach()}
    learn(student, DistillationLoss(config, task, teacher), task, **said)
    assert_saved(student, task, tmp_path)


def assert_saved(model, task, directory):
    model.save_pretrained(directory)
    task.tokenizer.save_pretrained(directory)
    reloaded = load_model(directory, CLASSIFIER, "eager").eval()
    np.testing.assert_allclose(outputs(reloaded, task, ROWS[:6]), outputs(model, task, ROWS[:6]), atol=1e-5)


@able_to("neurons")
def test_heads_and_neurons_leave_as_the_row_says(trained, family, tmp_path):
    model, task = loaded(trained, family)
    head_scores, neuron_scores = importance(model, task, task.encode(ROWS[:8]))
    assert {len(layer) for layer in neuron_scores} == {64} and all(layer.sum() > 0 for layer in neuron_scores)
    heads = None
    if not family_of(family).why_not("heads"):
        assert {len(layer) for layer in head_scores} == {4} and all(layer.sum() > 0 for layer in head_scores)
        heads = strongest_heads(model, head_scores, 2)
    neurons = strongest(neuron_scores, 20, "neurons")
    expected = outputs(silenced(copy_of(model), heads, neurons), task, ROWS[:6])
    shrink(model, heads, neurons)
    assert {layer.neurons for layer in layers_of(model)} == {20}
    assert heads is None or {layer.heads for layer in layers_of(model)} == {2}
    np.testing.assert_allclose(outputs(model, task, ROWS[:6]), expected, atol=2e-5)
    assert_saved(model, task, tmp_path)


def copy_of(model):
    """Returns a copy; where a forward pass of ours is bound to the model, to the copy."""
    copied = copy.deepcopy(model)
    pool_each_row(copied)
    return copied


def silenced(model, heads, neurons):
    """Takes the effect from all that is not kept, in place."""
    for number, layer in enumerate(layers_of(model)):
        with torch.no_grad():
            zero_inputs(layer.part("down"), [n for n in range(layer.neurons) if n not in neurons[number]], 1)
            if heads:
                zero_inputs(layer.part("output"), [h for h in range(layer.heads) if h not in heads[number]], layer.head_size)
    return model


def zero_inputs(part, units, size):
    weight = part.weight if isinstance(part, torch.nn.Linear) else part.weight.T  # (outputs, inputs)
    for unit in units:
        weight[:, unit * size : (unit + 1) * size] = 0


@able_to("ffn")
def test_matrices_become_products_as_the_row_says(trained, family, tmp_path):
    model, task = loaded(trained, family)
    row, before = family_of(family), model.num_parameters()
    attention, embeddings = (None if row.why_not(name) else 3 for name in ("attention", "embeddings"))
    found = factorize(model, attention, 5, embeddings)
    assert any(factor.rank for factor in found) and model.num_parameters() < before
    assert_saved(model, task, tmp_path)
    if attention is None:
        with pytest.raises(UserError, match="cannot have their attention matrices factorised: ") as error:
            factorize(load_finished(trained(family)[0], task), 3, None, None)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", EXPORTED)
def test_the_engine_gives_what_pytorch_gives_at_every_length_and_beside_padded_rows(trained, family):
    model, task = loaded(trained, family)
    examples = task.encode(ROWS)
    reference = alone(torch_run(model, task), task, ROWS)
    for graph in export_graphs(model, task).values():
        merge_projections(graph)
        engine = OrtEngine(graph.SerializeToString())
        run = lambda name, arrays: engine.run(arrays)  # noqa: E731, B023
        np.testing.assert_allclose(alone(run, task, ROWS), reference, atol=1e-4)
        np.testing.assert_allclose(run("model", task.answers.prepare(ROWS))["logits"], reference, atol=1e-4)
        size = weight_bytes(graph)
        quantize_matmuls(graph, watch_activations(graph, task, examples))
        quantize_embeddings(graph)
        onnx.checker.check_model(tensorrt_form(graph), full_check=True)
        engine = OrtEngine(graph.SerializeToString())
        small = alone(run, task, ROWS)
        assert np.abs(small - reference).max() < 0.15 * np.ptp(reference)
        assert (small.argmax(axis=1) == reference.argmax(axis=1)).mean() >= 0.9
        assert weight_bytes(graph) < 0.6 * size or not family_of(family).stacks


def test_a_text_without_a_token_is_one_line(trained):
    _, task = trained("gpt2")
    with pytest.raises(UserError, match="a text without a single token"):
        task.encode([{"text": "", "label": "0"}])
    with pytest.raises(RowError, match="a text without a single token"):
        task.answers.prepare([{"text": "good"}, {"text": ""}])
