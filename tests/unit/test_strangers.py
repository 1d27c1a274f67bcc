"""A stranger's model through a whole stage: classes are matched by name, each model reads with its own tokenizer."""

import importlib.util
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.config import load_recipe
from engine.errors import UserError
from engine.inheritance import INHERITED
from engine.models import load_model, load_tokenizer
from engine.stages.stage import read_stage
from engine.tasks import task_of_model
from export.engines import graph
from export.engines.benchmark import Candidate, measure
from export.export import compare, find_source
from launch.check import check_recipe
from launch.recipe import load_stages
from tests.recipes import finetune_section, ragged_rows, run_here, train_section, write_model, write_recipe, write_rows
from tests.unit.models import WORDS

HEAD = "AutoModelForSequenceClassification"
STILL = train_section(steps=1, learning_rate=1e-12, evaluate_every=1)
"""Training that changes nothing that could be seen: what comes out is what went in."""


def write_classifier(directory, classes):
    """A classifier whose rows mean `classes`; its scores for a name do not depend on the order."""
    write_model(directory, id2label=dict(enumerate(classes)), label2id={name: index for index, name in enumerate(classes)})
    model = load_model(directory, HEAD)
    rows = torch.stack([torch.randn(32, generator=torch.Generator().manual_seed(sum(name.encode()))) for name in classes])
    with torch.no_grad():
        model.classifier.weight.copy_(rows)
    model.save_pretrained(directory)
    return directory


def write_named_rows(directory):
    rows = [{**row, "label": ("bad", "good")[row["label"]]} for row in ragged_rows(64)]
    write_rows(directory / "rows.jsonl", rows)


def answers(directory, texts):
    """What transformers itself answers."""
    pipe = transformers.pipeline("text-classification", model=str(directory), tokenizer=str(directory), device="cpu")
    return [answer["label"] for answer in pipe(texts)]


def finetune(tmp_path, **changes):
    write_named_rows(tmp_path)
    path = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(train=STILL, **changes)}})
    return run_here(path, "teacher", tmp_path / "runs").directory


def distill(tmp_path, *overrides, **changes):
    write_named_rows(tmp_path)
    section = {**finetune_section(train=STILL), "teacher": "teacher", "student": {"model": "student"}, **changes}
    section.pop("model")
    path = write_recipe(tmp_path, {"small": {"distill": section}})
    return run_here(path, "small", tmp_path / "runs", *overrides).directory


def said_by_check(tmp_path, *overrides):
    """The lines of `bothways check`, or what it refuses."""
    recipe = load_recipe(tmp_path / "recipe.yaml", list(overrides))
    try:
        return check_recipe(recipe, load_stages(recipe))
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)


TEXTS = ["good great warm film", "bad dull cold plot", "the actor was very long", "a short story and a scene"]


@pytest.mark.parametrize("classes", [["good", "bad"], ["bad", "good"]])
def test_a_fine_tuned_classifier_goes_on_meaning_what_it_meant(tmp_path, classes):
    model = write_classifier(tmp_path / "model", classes)
    done = finetune(tmp_path)
    assert answers(done, TEXTS) == answers(model, TEXTS)
    assert json.loads((done / "config.json").read_text())["id2label"] == dict(zip("01", classes, strict=True))
    assert read_stage(done)["model_changes"] == []


def test_names_in_the_recipe_make_an_unnamed_head_a_named_one(tmp_path):
    model = write_classifier(tmp_path / "model", ["LABEL_0", "LABEL_1"])
    names = {"LABEL_0": "good", "LABEL_1": "bad"}
    done = finetune(tmp_path, task={"type": "classification", "names": names})
    assert answers(done, TEXTS) == [names[name] for name in answers(model, TEXTS)]


@pytest.mark.parametrize("classes", [["bad", "fair", "good"], ["LABEL_0", "LABEL_1"], ["down", "up"]])
def test_other_classes_get_a_new_head_and_the_record_says_so(tmp_path, capsys, classes):
    write_classifier(tmp_path / "model", classes)
    done = finetune(tmp_path)
    assert "the data is labelled bad, good: a new head" in said_by_check(tmp_path)["teacher"]
    (change,) = read_stage(done)["model_changes"]
    assert change.startswith(f"a new head: its classes are {', '.join(classes)}, those of the data bad, good")
    assert f"model 'model': {change}" in capsys.readouterr().out
    assert json.loads((done / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}
    assert load_model(done, HEAD).classifier.weight.shape == (2, 32)


def test_a_student_takes_the_classes_in_its_teachers_order(tmp_path):
    write_classifier(tmp_path / "teacher", ["good", "bad"])
    student = write_classifier(tmp_path / "student", ["bad", "good"])
    done = distill(tmp_path)
    assert json.loads((done / "config.json").read_text())["id2label"] == {"0": "good", "1": "bad"}
    assert answers(done, TEXTS) == answers(student, TEXTS)
    assert read_stage(done)["model_changes"] == ["the rows of its head are put in the order good, bad"]


def test_a_student_of_other_classes_gets_a_new_head(tmp_path):
    write_classifier(tmp_path / "teacher", ["good", "bad"])
    write_classifier(tmp_path / "student", ["a", "b", "c"])
    (change,) = read_stage(distill(tmp_path))["model_changes"]
    assert change == "a new head: its classes are a, b, c, those of the data good, bad"


def other_words(directory):
    """Gives a model a vocabulary of half the words, in another order."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *reversed(WORDS[:12])]
    for name in ("tokenizer.json", "vocab.txt"):
        (directory / name).unlink(missing_ok=True)
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(vocab=str(directory / "vocab.txt")).save_pretrained(directory)
    return directory


def test_teacher_and_student_read_with_their_own_tokenizers(tmp_path, monkeypatch):
    write_classifier(tmp_path / "teacher", ["bad", "good"])
    student = other_words(write_classifier(tmp_path / "student", ["bad", "good"]))
    seen = {}
    import export.compress.distill as module

    taught = module.teacher_outputs

    def watch(model, task, examples, *rest):
        seen["teacher"] = [example["input_ids"] for example in examples]
        seen["outputs"] = taught(model, task, examples, *rest)
        return seen["outputs"]

    monkeypatch.setattr(module, "teacher_outputs", watch)
    done = distill(tmp_path)
    own, theirs = load_tokenizer(done), load_tokenizer(tmp_path / "teacher")
    assert own.get_vocab() == load_tokenizer(student).get_vocab() != theirs.get_vocab()
    texts = [row["text"] for row in ragged_rows(64)]
    expected = {tuple(theirs(text)["input_ids"]) for text in texts}
    assert {tuple(ids) for ids in seen["teacher"]} <= expected
    assert answers(done, TEXTS) == answers(student, TEXTS)


@pytest.mark.parametrize("key", ["hidden", "attention"])
def test_layers_are_matched_only_between_models_with_the_same_tokens(tmp_path, key):
    write_classifier(tmp_path / "teacher", ["bad", "good"])
    other_words(write_classifier(tmp_path / "student", ["bad", "good"]))
    with pytest.raises(UserError, match=r"another tokenizer than its teacher: .* set hidden and attention to 0") as error:
        distill(tmp_path, f"small.{key}=1")
    assert said_by_check(tmp_path, f"small.{key}=1") == str(error.value)
    said_by_check(tmp_path)


def test_a_tokenizer_with_more_tokens_than_embeddings_trains_after_rows_are_added(tmp_path):
    model = write_classifier(tmp_path / "model", ["bad", "good"])
    tokenizer = load_tokenizer(model)
    rows = load_model(model, HEAD).config.vocab_size
    tokenizer.add_tokens([f"brand{index}" for index in range(rows)])
    tokenizer.save_pretrained(model)
    done = finetune(tmp_path)
    assert (
        f"its tokenizer has {len(tokenizer)} tokens, its embedding 64 rows: rows are added" in said_by_check(tmp_path)["teacher"]
    )
    (change,) = read_stage(done)["model_changes"]
    assert "rows are added to its 64 embeddings" in change
    assert load_model(done, HEAD).config.vocab_size == len(tokenizer)


FINISHED = {
    "prune": {"model": "model", "heads": 2},
    "quantize": {"model": "model"},
    "export": {"model": "model"},
    "distill": {"teacher": "model", "train": STILL},
}


def finished_stage(tmp_path, kind, **changes):
    said_once = {key: value for key, value in finetune_section().items() if key in INHERITED}
    write_named_rows(tmp_path)
    write_recipe(tmp_path, {"stage": {kind: {**said_once, **FINISHED[kind], **changes}}})


@pytest.mark.parametrize("kind", FINISHED)
def test_a_finished_model_whose_classes_are_not_those_of_the_data_is_refused_and_names_are_the_way_out(tmp_path, kind):
    write_classifier(tmp_path / "model", ["LABEL_0", "LABEL_1"])
    finished_stage(tmp_path, kind)
    said = said_by_check(tmp_path)
    assert "its classes are LABEL_0, LABEL_1, the data is labelled bad, good: name them in task.names: {LABEL_0: …" in said
    finished_stage(tmp_path, kind, task={"type": "classification", "names": {"LABEL_0": "good", "LABEL_1": "bad"}})
    assert list(said_by_check(tmp_path)) == ["stage"]
    write_classifier(tmp_path / "model", ["down", "up"])
    finished_stage(tmp_path, kind)
    assert "map them by task.names, or fine-tune it on this data first" in said_by_check(tmp_path)


def test_an_unnamed_model_that_is_used_before_it_is_checked_says_the_same(tmp_path):
    write_classifier(tmp_path / "model", ["LABEL_0", "LABEL_1"])
    finished_stage(tmp_path, "prune")
    with pytest.raises(
        UserError, match=r"rows.jsonl:\d+: label '\w+' is none of the model's classes, which have no names .* task.names"
    ):
        run_here(tmp_path / "recipe.yaml", "stage", tmp_path / "runs")


@pytest.mark.parametrize("kind", FINISHED)
def test_a_finished_model_with_more_tokens_than_embeddings_is_refused(tmp_path, kind):
    tokenizer = load_tokenizer(write_classifier(tmp_path / "model", ["bad", "good"]))
    tokenizer.add_tokens([f"brand{index}" for index in range(64)])
    tokenizer.save_pretrained(tmp_path / "model")
    finished_stage(tmp_path, kind)
    assert "its embedding 64 rows: fine-tune it first (rows are added)" in said_by_check(tmp_path)


def test_a_pruned_model_bears_the_names_that_the_recipe_gave_its_classes(tmp_path):
    model = write_classifier(tmp_path / "model", ["LABEL_0", "LABEL_1"])
    names = {"LABEL_0": "good", "LABEL_1": "bad"}
    finished_stage(tmp_path, "prune", task={"type": "classification", "names": names}, heads=4)
    done = run_here(tmp_path / "recipe.yaml", "stage", tmp_path / "runs").directory
    assert json.loads((done / "config.json").read_text())["id2label"] == {"0": "good", "1": "bad"}
    assert answers(done, TEXTS) == [names[name] for name in answers(model, TEXTS)]


def test_a_sentencepiece_model_alone_is_converted_or_the_package_is_named(tmp_path, monkeypatch):
    model = write_classifier(tmp_path / "model", ["bad", "good"])
    for path in [*model.glob("tokenizer*"), *model.glob("vocab*")]:
        path.unlink()
    (model / "spm.model").write_bytes(b"\n\x0e")
    finished_stage(tmp_path, "quantize")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else found(name))
    assert "spm.model: no tokenizer.json, which is made from it: pip install sentencepiece" in said_by_check(tmp_path)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        load_tokenizer(model)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("json"))
    assert list(said_by_check(tmp_path)) == ["stage"]
    (model / "spm.model").unlink()
    assert "no tokenizer in it (tokenizer.json)" in said_by_check(tmp_path)


def test_weights_without_their_body_or_their_head_are_refused(tmp_path):
    model = write_classifier(tmp_path / "model", ["bad", "good"])
    weights = load_file(model / "model.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"\d+ of \d+ weights are missing .* its files are not those of a Bert"):
        finetune(tmp_path)
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier")}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    finetune(tmp_path)
    with pytest.raises(UserError, match=r"2 of .* weights are missing"):
        load_model(model, HEAD)


def test_weights_of_another_shape_are_named(tmp_path):
    model = write_classifier(tmp_path / "model", ["bad", "good"])
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(UserError, match=r"has the shape \(.*\) in the weights, \(.*\) by config.json"):
        finetune(tmp_path)


def export_stage(tmp_path, **changes):
    finished_stage(tmp_path, "export", **changes)
    return load_stages(load_recipe(tmp_path / "recipe.yaml", [], tmp_path / "runs"))[0]


def test_an_engine_is_compared_with_a_baseline_that_reads_with_its_own_tokenizer_and_orders_its_classes_otherwise(tmp_path):
    baseline = other_words(write_classifier(tmp_path / "teacher", ["good", "bad"]))
    write_classifier(tmp_path / "model", ["bad", "good"])
    config = export_stage(tmp_path, baseline="teacher").config
    task = task_of_model(config.task, tmp_path / "model", config.max_length)
    rows = [{"text": row["text"], "label": ("bad", "good")[row["label"]]} for row in ragged_rows(40)]
    given = [{"label": row["label"], "score": 1.0, "scores": {"bad": 0.5, "good": 0.5}} for row in rows]  # always right
    drop = compare(config, baseline, task, rows, given, 1)["accuracy_drop_points"]["value"]
    right = [said == row["label"] for said, row in zip(answers(baseline, [row["text"] for row in rows]), rows, strict=True)]
    assert drop == pytest.approx(100 * sum(right) / len(rows) - 100)


def test_a_candidate_with_a_tokenizer_of_its_own_is_timed_on_its_own_form_of_the_same_inputs():
    seen = {"one": [], "other": []}
    one = Candidate("one", "", "", "", seen["one"].append)
    other = Candidate("other", "", "", "", seen["other"].append, ["A", "B", "C"])
    measure([one, other], ["a", "b", "c"], 5)
    assert set(seen["one"]) == {"a", "b", "c"}
    assert set(seen["other"]) == {"A", "B", "C"}


def test_somebody_elses_onnx_file_beside_weights_is_left_alone(tmp_path, monkeypatch):
    model = write_classifier(tmp_path / "model", ["bad", "good"])
    (model / "model.onnx").write_bytes(b"\x08\x08")
    stage = export_stage(tmp_path)
    assert said_by_check(tmp_path) == {"stage": "reads model"}
    task = task_of_model(stage.config.task, model, stage.config.max_length)
    monkeypatch.setattr(graph, "export_graphs", lambda model, task: {"model": model})
    monkeypatch.setattr(graph, "merge_projections", lambda exported: None)
    source = find_source(stage, model, task)
    assert source.precision == "fp32"
    assert torch.equal(source.graphs["model"].classifier.weight, load_model(model, HEAD).classifier.weight)
