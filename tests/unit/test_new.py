"""`bothways new`: the recipe that it writes passes check, and says what was seen in the data."""

import csv

import pytest

from engine.config import load_recipe
from engine.errors import UserError
from launch.check import check_recipe
from launch.cli import main
from launch.new import new_recipe
from launch.recipe import load_stages
from tests.recipes import ragged_rows, run_here, write_model, write_rows


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    return tmp_path


def make(data, target=None, task=None, model="model", columns=()):
    return new_recipe(data, target, task, model, list(columns))


def section(path):
    recipe = load_recipe(path)
    stages = load_stages(recipe)
    check_recipe(recipe, stages)
    assert [stage.kind for stage in stages] == ["finetune", "quantize", "export"]
    return stages[0].config


def test_the_recipe_runs_from_its_directory_wherever_that_is(here):
    write_rows(here / "rows.jsonl", ragged_rows(64))
    (here / "recipes").mkdir()
    path, seen = make("rows.jsonl", here / "recipes/mine.yaml")
    config = section(path)
    assert (config.task.text, config.task.label, config.data.train.path) == ("text", "label", "../rows.jsonl")
    assert any("2 labels" in fact for fact in seen)
    assert "by its tokenizer" in path.read_text()
    quick = ["teacher.train={steps: 1, batch_size: 8, learning_rate: 1e-3, precision: fp32}"]
    assert run_here(path, "teacher", here / "runs", *quick).directory.is_dir()


def test_columns_are_found_whatever_they_are_called_and_shown(here):
    with (here / "Kritik 2024.csv").open("w", newline="") as file:
        table = csv.writer(file, delimiter=";")
        table.writerow(["nummer", "urteil", "kritik", "punkte"])
        for index, row in enumerate(ragged_rows(60)):
            table.writerow([index, ("schlecht", "gut")[row["label"]], f"{row['text']} {index}", index / 7])
    path, seen = make("Kritik 2024.csv")
    config = section(path)
    assert (path.name, config.task.text, config.task.label) == ("Kritik-2024.yaml", "kritik", "urteil")
    assert "CSV with ';'" in path.read_text()
    assert any("2 labels: " in fact and "gut" in fact for fact in seen)


def test_pairs_are_found_by_their_names(here):
    rows = [{"premise": row["text"], "hypothesis": row["text"], "label": row["label"]} for row in ragged_rows(40)]
    write_rows(here / "pairs.jsonl", rows)
    config = section(make("pairs.jsonl")[0])
    assert (config.task.text, config.task.text_pair) == ("premise", "hypothesis")


def test_columns_that_are_named_are_not_guessed(here):
    rows = [{**row, "other": index % 3, "note": row["text"]} for index, row in enumerate(ragged_rows(60))]
    write_rows(here / "rows.jsonl", rows)
    config = section(make("rows.jsonl", columns=["text=note", "label=other"])[0])
    assert (config.task.text, config.task.label) == ("note", "other")


def test_rows_that_lack_a_cell_are_left_out_and_it_says_so(here):
    rows = ragged_rows(60)
    rows[7]["label"] = None
    write_rows(here / "rows.jsonl", rows)
    path, _ = make("rows.jsonl")
    assert section(path).data.train.missing == "drop"
    assert "about 1 rows lack a cell: left out" in path.read_text()


def test_a_name_that_yaml_would_take_for_something_else_is_quoted(here):
    write_rows(here / "rows.jsonl", [{"no": row["text"], "1e5": row["label"]} for row in ragged_rows(40)])
    config = section(make("rows.jsonl")[0])
    assert (config.task.text, config.task.label) == ("no", "1e5")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"text": f"a film {index}"} for index in range(9)],
            {},
            "rows.jsonl: no columns for any task: text (3 words, 9 ",
        ),
        ([{"text": f"film {index}", "score": index / 7} for index in range(40)], {}, "no columns for any task"),
        (ragged_rows(20), {"columns": ["label=lable"]}, "no column 'lable': did you mean 'label'?"),
        (ragged_rows(20), {"columns": ["label"]}, "--column label: write it as key=column"),
        (ragged_rows(20), {"task": "nothing"}, "unknown task 'nothing'"),
        (ragged_rows(20), {"model": "no-model"}, "no stage of this recipe, no directory and no hub id"),
    ],
)
def test_what_cannot_become_a_recipe_is_one_line_and_nothing_is_written(here, rows, options, message):
    write_rows(here / "rows.jsonl", rows)
    before = sorted(path.name for path in here.iterdir())
    with pytest.raises(UserError) as error:
        make("rows.jsonl", **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in here.iterdir()) == before


def test_a_recipe_that_is_there_is_not_overwritten(here, capsys):
    write_rows(here / "rows.jsonl", ragged_rows(40))
    for status in (0, 2):
        with pytest.raises(SystemExit) as stop:
            main(["new", "--data", "rows.jsonl", "--model", "model"])
        assert (stop.value.code or 0) == status
    said = capsys.readouterr()
    assert "rows.yaml: written; next: bothways check rows.yaml" in said.out
    assert "rows.yaml: is there already" in said.err


def test_other_scripts_get_a_multilingual_model_and_longer_rows(here):
    texts = ["这部电影非常好看演员很棒故事感人", "剧情无聊浪费时间不推荐大家去看"]
    write_rows(here / "zh.jsonl", [{"text": f"{texts[i % 2]}{i}", "label": i % 2} for i in range(40)])
    assert "multilingual" in section(make("zh.jsonl", model=None)[0]).model
    write_rows(here / "en.jsonl", ragged_rows(40))
    assert "MiniLM" in section(make("en.jsonl", model=None)[0]).model
