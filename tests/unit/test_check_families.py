"""What an architecture cannot do is one line of `bothways check`, before anything is trained."""

import functools
import shutil

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.config import load_recipe
from engine.errors import UserError
from launch.check import check_recipe
from launch.planning.subject import subject_of
from launch.recipe import load_stages
from tests.families import UNKNOWN, write_family
from tests.recipes import finetune_section, train_section, write_recipe


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    return functools.lru_cache(lambda family, **changes: write_family(tmp_path_factory.mktemp(family), family, **changes))


@pytest.fixture
def said(model_of, tmp_path):
    """Returns what `check` says of stages that begin with the fine-tuning of a family."""

    def said(family, train=None, **stages):
        shutil.copytree(model_of(family), tmp_path / "model")
        teacher = {"finetune": finetune_section(train=train_section(**(train or {})))}
        recipe = load_recipe(write_recipe(tmp_path, {"teacher": teacher, **stages}))
        try:
            check_recipe(recipe, load_stages(recipe))
        except UserError as error:
            assert "\n" not in str(error)
            assert "recipe.yaml:" in str(error)
            return str(error)
        return ""

    return said


def distill(layers, teacher="teacher", **changes):
    return {"distill": {"teacher": teacher, "student": {"layers": layers}, "train": train_section(), **changes}}


REFUSED = {
    "no_classes": ("marian", {}, "models of type 'marian' cannot classify: transformers has no such head"),
    "no_mask": ("fnet", {}, "models of type 'fnet' cannot classify: they take no attention mask"),
    "bare_parameters": (
        "xlnet",
        {"small": distill(2), "slim": {"prune": {"model": "small", "heads": 2}}},
        "stages.slim.prune.heads: models of type 'xlnet' cannot lose attention heads: query, key, value and output are bare",
    ),
    "shared_table": (
        "t5",
        {"thin": {"factorize": {"model": "teacher", "embeddings": 4}}},
        "stages.thin.factorize.embeddings: models of type 't5' cannot have their table of tokens factorised",
    ),
    "unknown": (
        UNKNOWN,
        {"slim": {"prune": {"model": "teacher", "neurons": 8}}},
        f"models of type '{UNKNOWN}' cannot lose FFN neurons: where their layers lie is not known",
    ),
    "unknown_layers": (UNKNOWN, {"small": distill(2)}, f"models of type '{UNKNOWN}' cannot be given fewer layers"),
    "too_many_layers": ("gpt2", {"small": distill(4)}, "student.layers=4: the model has layers 0 to 2"),
    "too_many_after_a_stage": (
        "bart",
        {"small": distill(2), "smaller": distill(3, "small")},
        "student.layers=3: the model has layers 0 to 1",
    ),
    "first_layer": ("modernbert", {"small": distill([1, 2])}, "layer 0 of models of type 'modernbert' is unlike the others"),
    "too_many_heads": ("distilbert", {"slim": {"prune": {"model": "teacher", "heads": 5}}}, "heads=5: the model has only 4"),
    "half_a_group": ("llama", {"slim": {"prune": {"model": "teacher", "heads": 1}}}, "name a multiple of 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_trained(said, case):
    family, stages, message = REFUSED[case]
    assert message in said(family, **stages)


@pytest.mark.parametrize(("family", "layers"), [("albert", 1), ("roberta", 3), ("t5", 6)])
def test_more_trained_layers_than_there_are_are_refused(said, family, layers, tmp_path):
    assert said(family, train={"layers": layers}) == ""
    shutil.rmtree(tmp_path / "model")
    assert f"train.layers={layers + 1}: the model has {layers} layer" in said(family, train={"layers": layers + 1})


def test_a_student_trains_no_more_layers_than_it_keeps(said):
    small = distill(2, train=train_section(layers=3))
    assert "stages.small.distill: train.layers=3: the model has 2 layers" in said("electra", small=small)


def test_hidden_states_of_other_widths_are_not_compared(said, tmp_path):
    write_family(tmp_path / "wide", "bert", hidden_size=64)
    small = {"distill": {"teacher": "teacher", "student": {"model": "wide"}, "hidden": 1.0, "train": train_section()}}
    assert "stages.small.distill.hidden: student and teacher have other numbers of features" in said("bert", small=small)


@pytest.mark.parametrize("family", ["llama", "t5", "xlnet", "deberta-v2"])
def test_the_memory_of_a_chain_of_any_family_can_be_planned(model_of, tmp_path, family):
    shutil.copytree(model_of(family), tmp_path / "model")
    stages = {"teacher": {"finetune": finetune_section()}, "small": distill(2)}
    recipe = load_recipe(write_recipe(tmp_path, stages))
    parameters = []
    for stage in load_stages(recipe):
        subject = subject_of(stage, "eager")
        with FakeTensorMode():
            model = subject.build()
            assert subject.loss(model, 2).ndim == 0
        parameters.append(model.num_parameters())
    assert parameters[1] < parameters[0]


@pytest.mark.parametrize("family", ["albert", "deberta-v2", "mpnet", "modernbert", "gpt2", "qwen3", "t5", "bart"])
def test_what_can_be_done_is_left_alone(said, family):
    stages = {
        "small": distill(2, hidden=1.0, attention=1.0),
        "slim": {"prune": {"model": "small", "heads": 2, "neurons": 16}},
        "thin": {"factorize": {"model": "slim", "attention": 3, "ffn": "90%"}},
        "int8": {"quantize": {"model": "thin"}},
        "engine": {"export": {"model": "int8", "baseline": "teacher"}},
    }
    assert said(family, **stages) == ""
