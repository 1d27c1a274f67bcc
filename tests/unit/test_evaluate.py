"""`bothways evaluate`: any saved model or bundle judged on new data as it was judged when it was made."""

import json

import numpy as np
import pytest

from engine.errors import UserError
from engine.stages.stage import read_stage
from launch.cli import main
from launch.evaluate import evaluate
from tests.recipes import finetune_section, ragged_rows, run_here, write_model, write_recipe, write_rows
from tests.unit.bundles import LABELS, TEXTS, as_array, shared_bundle
from tests.unit.models import WORDS

UNNAMED = {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return shared_bundle(tmp_path_factory)


def judge(model, *data, settings=(), **options):
    given = {"max_length": None, "engine": None, "threads": 1, **options}
    return evaluate(model, [str(path) for path in data], list(settings), **given)


def labelled(path, column="label", text="text"):
    return write_rows(path, [{text: words, column: LABELS[index % 3]} for index, words in enumerate(TEXTS * 3)])


def values(report):
    return {name: metric["value"] for name, metric in report["metrics"].items()}


def test_a_stage_is_judged_on_its_own_test_rows_as_it_judged_itself(tmp_path):
    write_rows(tmp_path / "test.jsonl", ragged_rows(40, seed=1))
    data = {"train": "rows.jsonl", "validation": "25%", "test": "test.jsonl"}
    recipe = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(data=data)}})
    done = run_here(recipe, "teacher", tmp_path / "runs").directory
    report, predictions = judge(done, tmp_path / "test.jsonl")
    own = read_stage(done)["metrics"]["test"]
    assert values(report) == pytest.approx({name: value for name, value in own.items() if name != "examples"})
    kept = [json.loads(line) for line in (done / "predictions.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in kept[0]} for line in predictions] == kept
    assert [line["line"] for line in predictions] == list(range(1, 41))


def test_a_bundle_is_judged_by_its_own_answers(bundle, tmp_path):
    from export.serving.bundle import Bundle

    report, predictions = judge(bundle, labelled(tmp_path / "rows.jsonl"))
    scores = as_array(Bundle.open(bundle).predict([{"text": text} for text in TEXTS * 3]))
    truth = np.array([index % 3 for index in range(len(TEXTS) * 3)])
    right = scores.argmax(axis=1) == truth
    assert values(report)["accuracy"] == pytest.approx(100 * right.mean())
    assert [line["prediction"] for line in predictions] == [LABELS[index] for index in scores.argmax(axis=1)]
    assert report["rows"] == len(truth)
    for metric in report["metrics"].values():
        assert metric["low"] <= metric["value"] <= metric["high"]
        assert metric["low"] < metric["high"]


def test_columns_and_labels_may_have_other_names_than_in_training(bundle, tmp_path):
    plain, _ = judge(bundle, labelled(tmp_path / "rows.jsonl"))
    other = labelled(tmp_path / "other.jsonl", "stars", "review")
    assert values(judge(bundle, other, settings=["text=review", "label=stars"])[0]) == values(plain)
    short = write_rows(
        tmp_path / "short.jsonl", [{"text": text, "label": LABELS[index % 3][:3]} for index, text in enumerate(TEXTS * 3)]
    )
    names = json.dumps({name[:3]: name for name in LABELS})
    assert values(judge(bundle, short, settings=[f"names={names}"])[0]) == values(plain)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [{"text": "a", "label": "negativ"}],
            [],
            "rows.jsonl:1: label 'negativ' is none of the model's: did you mean 'neg",
        ),
        ([{"text": "a"}], [], r"rows.jsonl:1: no column 'label' in this row"),
        ([{"text": "a", "label": "neutral"}], ["lable=x"], "--set: unknown key 'lable': did you mean 'label'"),
        ([{"text": "a", "label": "neutral"}], ["label"], "--set label: write it as key=value"),
        ([{"text": "a", "label": "neutral"}], ["type=nothing"], "unknown task 'nothing'"),
    ],
)
def test_what_cannot_be_judged_is_one_line(bundle, tmp_path, rows, settings, message):
    with pytest.raises(UserError, match=message) as error:
        judge(bundle, write_rows(tmp_path / "rows.jsonl", rows), settings=settings)
    assert "\n" not in str(error.value)


def test_every_value_of_a_column_is_judged_apart(bundle, tmp_path, capsys):
    rows = [{"text": text, "label": LABELS[i % 3], "product": "ab"[i % 2]} for i, text in enumerate(TEXTS * 5)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    report, predictions = judge(bundle, path, slices=["product", "length"])
    groups = {group["value"]: group for group in report["slices"]["product"]["groups"]}
    for value, group in groups.items():
        own = [line for line, row in zip(predictions, rows, strict=True) if row["product"] == value]
        assert group["rows"] == len(own) == 20
        right = np.mean([line["label"] == line["prediction"] for line in own])
        assert group["metrics"]["accuracy"]["value"] == pytest.approx(100 * right)
    assert sum(group["rows"] for group in report["slices"]["length"]["groups"]) == 40
    with pytest.raises(SystemExit):
        main(["evaluate", str(bundle), str(path), "--slice", "product"])
    said = capsys.readouterr().out
    assert "accuracy by product" in said
    assert "n=20" in said
    with pytest.raises(UserError, match=r"rows.jsonl:1: no column 'prodcut' to slice by: did you mean 'product'"):
        judge(bundle, path, slices=["prodcut"])


def test_a_strangers_classifier_needs_its_task_and_names_for_its_classes(tmp_path):
    model = write_model(tmp_path / "model", **UNNAMED)
    rows = write_rows(tmp_path / "rows.jsonl", ragged_rows(20))
    with pytest.raises(UserError, match=r"no stage.json says which task it does: --set type=… \(known: classification"):
        judge(model, rows)
    with pytest.raises(UserError, match=r"rows.jsonl:1: label '\d' is none of the model's"):
        judge(model, rows, settings=["type=classification"])
    named, _ = judge(model, rows, settings=["type=classification", 'names={"LABEL_0": "0", "LABEL_1": "1"}'])
    assert values(named) == values(judge(write_model(tmp_path / "named"), rows, settings=["type=classification"])[0])
    with pytest.raises(UserError, match="neither a bundle"):
        judge(tmp_path, rows)
    with pytest.raises(UserError, match="only bundles hold engines"):
        judge(model, rows, engine="tensorrt")


def test_rows_longer_than_training_saw_are_cut_where_the_command_says(tmp_path):
    model = write_model(tmp_path / "model", initializer_range=0.5)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": " ".join([*WORDS, *WORDS]), "label": i % 2} for i in range(4)])
    long, short = (judge(model, rows, settings=["type=classification"], max_length=size)[1] for size in (40, 8))
    assert long[0]["scores"] != short[0]["scores"]
    with pytest.raises(UserError, match="max_length=65 is above the 64 positions"):
        judge(model, rows, settings=["type=classification"], max_length=65)


def test_the_command_prints_metrics_and_writes_predictions(bundle, tmp_path, capsys):
    rows = labelled(tmp_path / "rows.jsonl")
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", str(bundle), str(rows), "--output", str(tmp_path / "out.jsonl"), *options])
        assert not stop.value.code
    said = capsys.readouterr().out
    text, _, machine = said.partition("{")
    assert "accuracy" in text
    assert "24 rows; 95 % intervals" in text
    assert set(json.loads("{" + machine)["metrics"]) == {"accuracy", "f1_macro", "matthews", "loss"}
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 24
