"""A stranger's model: what its files say is read before anything is loaded, and named in one line when it is damaged."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.config import load_recipe
from engine.errors import UserError
from engine.inheritance import INHERITED
from engine.models import load_model, load_tokenizer
from engine.models.facts import ModelFiles, class_names, named
from engine.models.weights import read_header, read_headers, weight_files
from launch.check import check_recipe
from launch.recipe import load_stages
from tests.recipes import finetune_section, write_model, write_recipe

HEAD = "AutoModelForSequenceClassification"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 90868376\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A classifier in one file, and the same in three shards."""
    directory = tmp_path_factory.mktemp("models")
    write_model(directory / "whole")
    shutil.copytree(directory / "whole", directory / "sharded")
    (directory / "sharded/model.safetensors").unlink()
    load_model(directory / "whole", HEAD).save_pretrained(directory / "sharded", max_shard_size="60KB")
    return directory


@pytest.fixture
def model(made, tmp_path):
    return shutil.copytree(made / "whole", tmp_path / "model")


def check(path):
    recipe = load_recipe(path)
    return check_recipe(recipe, load_stages(recipe))


def refused(tmp_path, section=None):
    """What `bothways check` says."""
    path = write_recipe(tmp_path, section)
    with pytest.raises(UserError) as error:
        check(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}:")
    return str(error.value)


def pointer(model):
    (model / "model.safetensors").write_text(POINTER)


def half(model):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def longer(model):
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"\0")


def lost_shard(model):
    shards = weight_files(model)
    assert len(shards) > 1
    shards[-1].unlink()


def changed_config(**changes):
    def change(model):
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


DAMAGES = [
    ("whole", pointer, "model.safetensors: a Git LFS pointer in place of the file of 90,868,376 bytes: run git lfs pull"),
    ("whole", half, "model.safetensors: truncated: "),
    ("whole", longer, "model.safetensors: damaged: "),
    ("whole", lambda model: (model / "model.safetensors").write_bytes(b""), "model.safetensors: truncated: only 0 bytes"),
    ("whole", lambda model: (model / "model.safetensors").write_text("<html>404</html>"), "not a safetensors file"),
    ("sharded", lost_shard, "shard model-0000"),
    ("sharded", lambda model: weight_files(model)[0].write_text(POINTER), ".safetensors: a Git LFS pointer"),
    ("sharded", lambda model: (model / "model.safetensors.index.json").write_text(POINTER), "index.json: a Git LFS pointer"),
    ("sharded", lambda model: (model / "model.safetensors.index.json").write_text("{}"), "not an index of shards"),
    ("whole", changed_config(quantization_config={"quant_method": "bitsandbytes"}), "already quantized and cannot be trained"),
]


@pytest.mark.parametrize(("kind", "damage", "message"), DAMAGES)
def test_damaged_weights_are_named_by_check_and_by_loading_alike(made, tmp_path, kind, damage, message):
    shutil.copytree(made / kind, tmp_path / "model")
    damage(tmp_path / "model")
    assert message in refused(tmp_path)
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "model", HEAD)
    assert message in str(error.value)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_file_that_ends_anywhere_too_early_is_refused_and_a_whole_one_never(tmp_path, data):
    path = tmp_path / "weights.safetensors"
    shapes = data.draw(st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4))
    save_file({f"tensor{index}": torch.zeros(shape) for index, shape in enumerate(shapes)}, path)
    assert {name: list(tensor.shape) for name, tensor in read_header(path).items()} == {
        f"tensor{index}": shape for index, shape in enumerate(shapes)
    }
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(UserError, match=r"truncated|damaged|not a safetensors file"):
        read_header(path)


def test_shards_hold_what_one_file_holds(made):
    assert read_headers(made / "sharded") == read_headers(made / "whole")


def test_an_index_that_leads_out_of_its_directory_is_refused(made, tmp_path):
    shutil.copytree(made / "sharded", tmp_path / "model")
    index = tmp_path / "model/model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "weight_map": dict.fromkeys(content["weight_map"], "../other.safetensors")}))
    with pytest.raises(UserError, match="not an index of shards"):
        read_headers(tmp_path / "model")


def test_an_index_that_promises_a_tensor_which_no_shard_holds_is_refused(made, tmp_path):
    shutil.copytree(made / "sharded", tmp_path / "model")
    index = tmp_path / "model/model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["one.more"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    assert "no tensor 'one.more', which model.safetensors.index.json says is there" in refused(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_pointer_in_the_place_of_any_file_of_a_model_is_named(model, tmp_path, name):
    (model / name).write_text(POINTER)
    assert f"{name}: a Git LFS pointer" in refused(tmp_path)


def test_a_configuration_and_weights_that_do_not_belong_together_are_named(model, tmp_path):
    changed_config(vocab_size=100)(model)
    assert "config.json says vocab_size=100, its weights have 64 embeddings" in refused(tmp_path)
    changed_config(vocab_size=64, id2label={"0": "a", "1": "b", "2": "c"})(model)
    said_once = {key: value for key, value in finetune_section().items() if key in INHERITED}
    prune = {"slim": {"prune": {"model": "model", "heads": 2, **said_once}}}
    assert "config.json names 3 classes, its weights score 2" in refused(tmp_path, prune)


def test_facts_are_those_of_the_loaded_model(model):
    files, loaded = ModelFiles(model), load_model(model, HEAD)
    assert files.embedding_rows == loaded.get_input_embeddings().num_embeddings
    assert files.head_rows == loaded.num_labels
    assert files.vocabulary == len(load_tokenizer(model))


@pytest.mark.parametrize(
    ("config", "classes", "with_names"),
    [
        ({"architectures": ["BertModel"]}, None, None),
        ({}, None, None),
        ({"architectures": ["BertForSequenceClassification"]}, ["LABEL_0", "LABEL_1"], False),
        ({"architectures": ["XForSequenceClassification"], "id2label": {"10": "k", "2": "c", "0": "a"}}, ["a", "c", "k"], True),
    ],
)
def test_classes_come_in_the_order_of_their_ids_and_label_0_is_no_name(config, classes, with_names):
    assert class_names(config, "ForSequenceClassification") == classes
    if classes:
        assert named(classes) is with_names


def test_a_body_for_random_initialisation_needs_no_weights_but_a_sound_configuration(model, tmp_path):
    stages = {"teacher": {"finetune": finetune_section(initialize="random")}}
    pointer(model)
    check(write_recipe(tmp_path, stages))
    changed_config(quantization_config={"quant_method": "gptq"})(model)
    assert "quantization_config (gptq)" in refused(tmp_path, stages)
