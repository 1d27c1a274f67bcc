"""What the documentation promises is there."""

import re
from pathlib import Path

import pytest
import yaml

from engine.config import load_recipe
from engine.data.splits import DataConfig
from engine.recipe_yaml import RecipeLoader
from launch.recipe import KINDS, load_stages

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_linked_from_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and f"({page.name})" not in index
    ] == []


TASK_PAGES = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("tasks-*.md"))]


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md", "docs/glue.md", "docs/pretraining.md", *TASK_PAGES])
def test_the_recipes_of_a_page_are_valid(tmp_path, page):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    whole = [block for block in blocks if block.startswith("name:")]
    assert whole
    for block in whole:
        path = tmp_path / "reviews.yaml"
        path.write_text(block, encoding="utf-8")
        stages = load_stages(load_recipe(path))
        assert [stage.name for stage in stages] == list(yaml.safe_load(block)["stages"])


def test_every_kind_of_stage_is_named_in_the_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"`{kind}`" not in text] == []


def test_every_task_has_a_page():
    from engine.tasks import REGISTRY

    shown = {task for page in TASK_PAGES for task in REGISTRY.own() if f"type: {task}" in (ROOT / page).read_text()}
    assert shown == set(REGISTRY.own())


def test_every_example_of_data_is_valid(tmp_path):
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    whole, *blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "reviews.yaml").write_text(whole, encoding="utf-8")
    assert load_stages(load_recipe(tmp_path / "reviews.yaml"))
    examples = [part for block in blocks for part in re.split(r"^(?=\w)", block, flags=re.MULTILINE) if part]
    assert len(examples) == 6
    for example in examples:
        data = yaml.load(example, Loader=RecipeLoader)
        DataConfig(**data.get("data", data))
