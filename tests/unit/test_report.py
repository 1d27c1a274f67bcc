"""The report of a run: the JSON for machines and the page for people."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import load_recipe
from engine.errors import UserError
from engine.finetune import FinetuneConfig
from engine.pretrain import PretrainConfig
from export.compress.distill import DistillConfig
from export.report.figures import read_run, replay_recipe, report_json
from export.report.page import duration, lanes, write_report
from export.report.plots import on_frontier
from tests.unit.runs import classified, write_demo_run, write_history, write_stage


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(demo):
    return write_report(demo).read_text()


def test_the_json_has_exactly_the_promised_keys(demo):
    report = report_json(demo)
    assert report.keys() == {"stages", "comparison"}
    for stage in report["stages"]:
        assert stage.keys() == {"name", "kind", "metrics", "parameters", "weight_bytes", "latency_ms_b1"}
    assert report["comparison"].keys() == {"accuracy_drop_points", "speedup_vs_torch_fp32", "speedup_vs_onnx_fp32"}
    assert report["comparison"]["accuracy_drop_points"] == {"value": 0.9, "low": -0.2, "high": 2.0, "n": 1000}
    json.dumps(report)


def test_an_accuracy_comes_with_its_interval_and_a_latency_with_the_fastest_form_that_was_measured(demo):
    stages = {stage["name"]: stage for stage in report_json(demo)["stages"]}
    test = stages["teacher"]["metrics"]["test"]
    assert test["accuracy_low"] < test["accuracy"] == 86.6 < test["accuracy_high"]
    assert (stages["teacher"]["latency_ms_b1"], stages["engine"]["latency_ms_b1"]) == (6.9, 1.3)
    assert stages["pretrained"]["latency_ms_b1"] is None


def test_a_stage_comes_after_all_that_it_reads_even_when_those_were_made_again_later(tmp_path):
    write_stage(tmp_path, "base", "finetune", order=1)
    write_stage(tmp_path, "alone", "finetune", order=2)
    write_stage(tmp_path, "after", "distill", {"teacher": "base"}, order=3)
    write_stage(tmp_path, "base", "finetune", order=9)
    assert [stage["name"] for stage in report_json(tmp_path)["stages"]] == ["alone", "base", "after"]


def test_the_chain_is_the_way_of_the_exported_model_through_students_not_through_teachers(demo):
    assert read_run(demo).chain() == ["teacher", "student", "slim", "recovered", "int8", "engine"]


def test_without_an_export_the_comparison_is_empty_and_the_chain_the_longest(tmp_path):
    write_stage(tmp_path, "a", "finetune", order=1, metrics={"test": classified(80, 100)})
    write_stage(tmp_path, "b", "distill", {"teacher": "a"}, order=2, metrics={"test": classified(79, 100)})
    write_stage(tmp_path, "z", "finetune", order=3, metrics={"test": classified(70, 100)})
    assert set(report_json(tmp_path)["comparison"].values()) == {None}
    assert read_run(tmp_path).chain() == ["a", "b"]
    assert "No engine has been exported yet." in write_report(tmp_path).read_text()


def test_the_page_shows_the_verdict_every_stage_and_the_bundle(page, demo):
    assert "right on 85.7 % of the test rows, 0.9 points below “teacher”, and 10.8 times as fast" in page
    for stage in report_json(demo)["stages"]:
        assert f"<b>{stage['name']}</b>" in page
    assert re.search(r"manifest.json SHA-256 <code[^>]*>[0-9a-f]{64}<", page)
    assert page.count("<figure") == 5 + 6
    assert "2 CPUs with AVX2, VNNI" in page


def test_the_page_needs_nothing_from_elsewhere(page):
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|<script|<link|<img|@import|src=|url\((?!#)|href=\"(?!#)", page)


def test_every_element_id_of_the_page_is_its_own(page):
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)) <= {pair for i in ids for pair in ((i, ""), ("", i))}


def test_plots_take_their_colours_from_the_page(page):
    svgs = "".join(re.findall(r"<figure.*?</figure>", page, flags=re.DOTALL))
    assert "var(--accent)" in svgs
    assert not re.search(r"#[0-9a-f]{6}\b", svgs)


def test_the_same_run_gives_the_same_page(demo, page):
    assert write_report(demo).read_text() == page


def test_text_from_a_run_cannot_become_markup(tmp_path):
    section = {"text": "</pre><script>alert(1)</script>", "names": {"0": "<b>"}}
    write_stage(tmp_path, "a", "finetune", {"data.train.path": "<img src=x>"}, section=section, processes="<i>$x^2$</i>")
    write_history(tmp_path / "a", 20, 2, 1.0, 0.5, 80)
    page = write_report(tmp_path).read_text()
    assert not re.search(r"<script|<img|<i>|<b>\W", page)
    assert "&lt;img src=x&gt;" in page


def test_a_run_that_is_still_going_shows_what_is_there(tmp_path):
    write_stage(tmp_path, "first", "pretrain", order=1)
    partial = tmp_path / "second.partial"
    partial.mkdir()
    write_history(partial, 40, 2, 1.0, 0.5, None)
    with (partial / "history.jsonl").open("a") as file:
        file.write('{"step": 5')
    (tmp_path / "third.partial").mkdir()
    page = write_report(tmp_path).read_text()
    assert "Stage “second” has not finished (last recorded step: 40)" in page
    assert "Stage “third” has not finished; run" in page


def test_a_stage_made_from_an_earlier_version_of_its_input_is_pointed_out(tmp_path):
    write_stage(tmp_path, "a", "finetune", order=1)
    write_stage(tmp_path, "b", "distill", {"teacher": "a"}, order=2)
    assert "earlier" not in write_report(tmp_path).read_text()
    write_stage(tmp_path, "a", "finetune", order=3)
    assert "Stage “b” was made from an earlier “a”" in write_report(tmp_path).read_text()


def test_an_export_without_a_baseline_is_reported_without_comparison(tmp_path):
    engines = {"e/engine": {"stage": "e", "runtime": "onnxruntime", "precision": "fp32"}}
    engines["e/engine"] |= {"median_ms": 2.0, "low": 1.9, "high": 2.1, "p95_ms": 3.0}
    benchmark = {"threads": 2, "inputs": 10, "rounds": 5, "engines": engines}
    write_stage(tmp_path, "e", "export", {"model": "org/name"}, metrics={"test": classified(8, 10)}, benchmark=benchmark)
    page = write_report(tmp_path).read_text()
    assert "The engine of stage “e” is right on 80.0 % of the test rows." in page


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: None, "no such run directory"),
        (lambda run: run.mkdir(), "no finished stage in it"),
        (lambda run: (run / "a.partial").mkdir(parents=True), "no finished stage in it"),
        (lambda run: write_stage(run.parent, "run", "finetune"), "name the run directory"),
        (lambda run: ((run / "a").mkdir(parents=True), (run / "a/stage.json").write_text("[1]")), "a/stage.json: not "),
        (lambda run: ((run / "a").mkdir(parents=True), (run / "a/stage.json").write_text("{")), "unreadable"),
        (lambda run: (write_stage(run, "a", "x", {"m": "b"}), write_stage(run, "b", "x", {"m": "a"})), "read each other"),
        (lambda run: (write_stage(run, "a", "x"), (run / "report.html").mkdir()), "the report cannot be written"),
        (lambda run: (write_stage(run, "a", "x"), (run / "a/history.jsonl").write_text("x\n{}\n")), "history.jsonl:1: not JSON"),
    ],
)
def test_a_directory_that_is_no_run_is_one_clear_line(tmp_path, make, message):
    make(tmp_path / "run")
    with pytest.raises(UserError, match=message) as error:
        write_report(tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_recipe_in_the_report_validates_to_the_sections_that_ran(tmp_path):
    task, data = {"type": "classification", "names": {"0": "bad"}}, {"train": "rows.csv", "validation": "10%", "test": 0.1}
    train = {"epochs": 1, "learning_rate": "5e-5", "evaluate_every": "20%"}
    sections = {
        "p": ("pretrain", PretrainConfig, {"model": {}, "tokenizer": "org/name", "data": {"train": "x.txt"}, "train": train}),
        "f": ("finetune", FinetuneConfig, {"model": "p", "task": task, "data": data, "train": train}),
        "d": (
            "distill",
            DistillConfig,
            {"teacher": "f", "task": task, "data": data, "train": train, "transfer": {"path": "x.jsonl"}},
        ),
    }
    for order, (name, (kind, config, section)) in enumerate(sections.items()):
        written = config.model_validate(section).model_dump(mode="json")
        write_stage(tmp_path / "run", name, kind, order=order, section=written)
    (tmp_path / "again.yaml").write_text(replay_recipe(read_run(tmp_path / "run")))
    recipe = load_recipe(tmp_path / "again.yaml")
    assert (recipe.name, recipe.seed, list(recipe.stages)) == ("run", 1, ["p", "f", "d"])
    for name, (_, config, section) in sections.items():
        assert recipe.section(name, config) == config.model_validate(section)


@given(st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9)), min_size=1))
def test_the_frontier_is_what_nothing_else_beats(points):
    best = on_frontier(points)
    assert any(best)
    for (cost, value), kept in zip(points, best, strict=True):
        assert kept == all(c > cost or v < value or (c, v) == (cost, value) for c, v in points)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(2, 9)), max_size=12))
def test_arcs_in_one_lane_never_overlap(arcs):
    spans = {str(number): (first, first + length) for number, (first, length) in enumerate(arcs)}
    placed = lanes(spans)
    assert placed.keys() == spans.keys()
    for a in spans:
        for b in spans:
            if a != b and placed[a] == placed[b]:
                assert spans[a][1] <= spans[b][0] or spans[b][1] <= spans[a][0]


@pytest.mark.parametrize(("seconds", "text"), [(4.24, "4.2 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (None, "–")])
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text


def judged_run(run, classes=3, **facts):
    """A run of one stage with everything that is kept of its held-out rows."""
    labels = [f"class {number}" for number in range(classes)]
    write_stage(run, "teacher", "finetune", metrics={"test": classified(80, 100)}, **facts)
    counts = [[true, given, 10 if true == given else 1] for true in range(classes) for given in range(classes)]
    worst = [{"inputs": {"text": "<b>dull</b>"}, "label": "class 0", "prediction": "class 1", "off": 0.9876}]
    mistakes = {"worst": worst, "off_by": "probability", "confusion": {"labels": labels, "counts": counts}, "points": {}}
    figures = {
        label: {"precision": 90.0, "recall": 80.0, "f1": 85.0 - number, "rows": 12.0} for number, label in enumerate(labels)
    }
    metric = lambda value: {"accuracy": {"value": value, "low": value - 5, "high": value + 4}}  # noqa: E731
    groups = [
        {"value": "en", "rows": 80, "pooled": 0, "metrics": metric(90.0)},
        {"value": "<no>", "rows": 20, "pooled": 0, "metrics": metric(40.0)},
    ]
    slices = {"language": {"groups": groups, "worst": {"value": "<no>", "rest": {"value": 90.0, "low": 85.0, "high": 94.0}}}}
    for name, seen in (("mistakes", mistakes), ("per_class", figures), ("slices", slices)):
        (run / "teacher" / f"{name}.json").write_text(json.dumps({"test": seen}))
    return run


def test_slices_confusions_classes_and_errors_show_and_stay_text(tmp_path):
    page = write_report(judged_run(tmp_path)).read_text()
    assert "Where “teacher” is right and wrong: test rows" in page
    assert "Worse than the rest: “&lt;no&gt;”" in page
    assert "&lt;b&gt;dull&lt;/b&gt;" in page
    assert "<b>dull" not in page
    assert "0.988" in page
    assert "Confusion matrix" in page
    assert page.index("class 2</td>") < page.index("class 0</td>"), "the worst class comes first"
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_confusions_of_many_classes_are_listed_and_their_figures_fold_away(tmp_path):
    page = write_report(judged_run(tmp_path, classes=40)).read_text()
    assert "What is taken for what" in page
    assert "The other 28" in page


def test_a_damaged_judgement_is_one_line(tmp_path):
    (judged_run(tmp_path) / "teacher" / "slices.json").write_text("{")
    with pytest.raises(UserError, match=r"slices.json: not JSON: the file is damaged"):
        write_report(tmp_path)


def test_numbers_are_drawn_over_the_truth_and_a_kept_interval_shows(tmp_path):
    metric = {"name": "pearson", "higher_is_better": True, "unit": "", "counted": False}
    values = {"pearson": 88.1, "pearson_low": 86.2, "pearson_high": 89.7, "loss": 0.2, "examples": 100}
    write_stage(tmp_path, "teacher", "finetune", metrics={"test": values}, metric=metric)
    mistakes = {"worst": [], "off_by": "deviations", "confusion": None, "points": {"score": [[0.0, 0.5], [5.0, 4.0]]}}
    (tmp_path / "teacher" / "mistakes.json").write_text(json.dumps({"test": mistakes}))
    page = write_report(tmp_path).read_text()
    assert "score: true and answered" in page
    assert "86.2 to 89.7" in page


def test_a_selection_shows_mean_and_deviation_of_all_its_models(tmp_path):
    for number, right in ((1, 80), (2, 90)):
        write_stage(tmp_path, f"teacher-seed{number}", "finetune", order=number, metrics={"test": classified(right, 100)})
    reads = {"models[0]": "teacher-seed1", "models[1]": "teacher-seed2"}
    spread = {"test": {"accuracy": {"mean": 85.0, "sd": 7.071}}}
    facts = {"chosen": "teacher-seed2", "models": {"teacher-seed1": {}, "teacher-seed2": {}}, "spread": spread}
    write_stage(tmp_path, "teacher", "select", reads, order=3, metrics={"test": classified(90, 100)}, **facts)
    assert read_run(tmp_path).chain() == ["teacher-seed2", "teacher"]
    page = write_report(tmp_path).read_text()
    assert "teacher-seed2; all 2: 85.00 ± 7.07" in page
    assert "mean of 2: 85.00 ± 7.07" in page
