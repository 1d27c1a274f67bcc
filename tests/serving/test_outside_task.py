"""The worked example of CONTRIBUTING.md: a task from outside of the package, from a file of rows to the served engine."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.stages.stage import read_stage
from tests.recipes import run_here, write_model, write_rows
from tests.unit.models import WORDS

ROOT = Path(__file__).parents[2]


def blocks(language):
    """Returns the code blocks of the section, in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("## Add a task") : text.index("## How to test")]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as pip leaves it: its modules, and a dist-info directory with its entry points."""
    site = tmp_path_factory.mktemp("site")
    package, about = site / "bothways_stars", site / "bothways_stars-1.0.dist-info"
    package.mkdir()
    about.mkdir()
    answers, task = blocks("python")
    (package / "__init__.py").write_text("")
    (package / "answers.py").write_text(answers)
    (package / "task.py").write_text(task)
    (toml,) = blocks("toml")
    points = re.sub(r'\[project\.entry-points\."(.*?)"\]', r"[\1]", toml).replace('"', "")
    (about / "entry_points.txt").write_text(points)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bothways-stars\nVersion: 1.0\n")
    sys.path.insert(0, str(site))
    yield site
    sys.path.remove(str(site))


def star_rows(count):
    """Rows whose stars are the number of good words."""
    rng = np.random.default_rng(0)
    others = [word for word in WORDS if word != "good"]
    rows = []
    for stars in rng.integers(1, 6, count):
        words = [*(["good"] * stars), *rng.choice(others, 6 - stars)]
        rows.append({"text": " ".join(rng.permutation(words)), "stars": int(stars)})
    return rows


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """The recipe, run to its end."""
    work = tmp_path_factory.mktemp("stars")
    write_model(work / "model", id2label={0: "0"}, label2id={"0": 0})
    write_rows(work / "rows.jsonl", star_rows(96))
    (recipe,) = blocks("yaml")
    (work / "recipe.yaml").write_text(recipe)
    for name in ("teacher", "student", "int8", "engine"):
        run_here(work / "recipe.yaml", name, work / "runs")
    return work / "runs" / "reviews"


def test_it_learns_by_its_own_metric_and_every_stage_is_judged_by_it(run):
    for name in ("teacher", "student", "int8", "engine"):
        record = read_stage(run / name)
        assert record["metric"]["name"] == "error"
        assert set(record["metrics"]["test"]) == {"error", "error_low", "error_high", "examples"}
    history = [json.loads(line) for line in (run / "teacher" / "history.jsonl").read_text().splitlines()]
    errors = [line["validation"]["error"] for line in history if "validation" in line]
    assert min(errors) < 0.7 * errors[0]


def test_the_bundle_answers_verifies_and_is_reported(run):
    from export.report.figures import report_json
    from export.report.page import write_report
    from export.serving.bundle import Bundle, verify_bundle

    verify_bundle(run / "engine")
    (answer,) = Bundle.open(run / "engine").predict([{"text": "a good film"}])
    assert list(answer) == ["stars"] and np.isfinite(answer["stars"])
    assert "error" in write_report(run).read_text()
    assert report_json(run)["stages"][-1]["metrics"]["test"]["error"] > 0


def test_the_server_gives_the_answers_of_the_bundle(run):
    import asyncio

    from export.serving.bundle import Bundle
    from export.serving.service import Service

    bundle = Bundle.open(run / "engine")

    async def ask():
        service = Service(bundle)
        queues = [asyncio.create_task(model.run()) for model in service.models.values()]
        try:
            return await service.predict([{"text": "a good film"}, {"text": "bad"}])
        finally:
            for queue in queues:
                queue.cancel()
            service.executor.shutdown()

    expected = bundle.predict([{"text": "a good film"}, {"text": "bad"}])
    for given, wanted in zip(asyncio.run(ask()), expected, strict=True):
        assert given["stars"] == pytest.approx(wanted["stars"], abs=1e-5)


def test_its_answering_half_lies_in_the_triton_repository(run):
    copy = run / "engine/models/reviews/1/engine/answers"
    assert (copy / "stars.py").read_text() == blocks("python")[0]
    about = json.loads((copy.parents[1] / "task.json").read_text())
    assert about["task"] == "stars" and about["graphs"]["model"]["outputs"] == ["stars"]


def test_real_tritonserver_answers_it(run, tmp_path):
    from tests.serving.servers import CLIENTS, inputs, texts
    from tests.serving.triton_server import triton, why_not

    if why_not():
        pytest.skip(why_not())
    from export.serving.bundle import Bundle

    (expected,) = Bundle.open(run / "engine").predict([{"text": "a good film"}])
    with triton(run / "engine" / "models", tmp_path) as (http, _):
        client = CLIENTS["http"].InferenceServerClient(http)
        result = client.infer("reviews", inputs("http", texts("a good film"))).as_numpy("ANSWER")
    assert json.loads(result[0, 0])["stars"] == pytest.approx(expected["stars"], abs=1e-4)


def test_a_recipe_that_names_the_task_without_its_package_is_one_line(tmp_path):
    from engine.config import load_recipe
    from engine.errors import UserError
    from launch.recipe import load_stages

    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe.replace("type: stars", "type: moons"))
    with pytest.raises(UserError, match=r"recipe.yaml:6: .*unknown task 'moons' \(known: classification"):
        load_stages(load_recipe(tmp_path / "recipe.yaml"))
