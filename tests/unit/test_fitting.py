"""A stranger's model is made to fit by the names of its classes and the ids of its tokenizer; no row of another class passes."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.models import load_tokenizer
from engine.models.fitting import fit_head, fit_tokenizer, load_fitting, output_layer
from engine.tasks import tagging
from tests.unit.models import classification_task, tiny_classifier, tiny_tokenizer

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 34,
    "pad_token_id": 1,
}
SHORT = {"vocab_size": 64, "pad_token_id": 1}
FAMILIES = {
    "bert": SHAPE,
    "roberta": SHAPE,
    "electra": {**SHAPE, "embedding_size": 16},
    "albert": {**SHAPE, "embedding_size": 16},
    "mpnet": SHAPE,
    "deberta-v2": SHAPE,
    "modernbert": {**SHAPE, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    "distilbert": {**SHORT, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
    "xlnet": {**SHORT, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},
    "gpt2": {**SHORT, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
}
IDS = torch.tensor([[2, 10, 11, 3], [2, 12, 3, 1]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def classifier(family, labels):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, **FAMILIES[family], id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
    )
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def scores(model, labels):
    """{label: scores of the rows}."""
    with torch.no_grad():
        logits_BC = model(input_ids=IDS, attention_mask=MASK).logits
    assert logits_BC.shape[1] == len(labels)
    return {label: logits_BC[:, index] for index, label in enumerate(labels)}


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_in_another_order_keep_their_scores(family):
    own, wanted = ["bad", "fair", "good"], ["good", "bad", "fair"]
    model = classifier(family, own)
    before = scores(model, own)
    assert fit_head(model, own, wanted) == "the rows of its head are put in the order good, bad, fair"
    after = scores(model, wanted)
    assert all(torch.equal(after[label], before[label]) for label in own)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wanted", [["bad", "good"], ["bad", "fair", "superb"], ["a", "b", "c", "d"]])
def test_other_classes_get_a_new_output_layer_and_the_body_stays(family, wanted):
    own = ["bad", "fair", "good"]
    model = classifier(family, own)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, _, layer = output_layer(model, 3)
    said = fit_head(model, own, wanted)
    assert said == f"a new head: its classes are bad, fair, good, those of the data {', '.join(wanted)}"
    assert len(scores(model, wanted)) == len(wanted)
    for parameter in output_layer(model, len(wanted))[2].parameters():
        old = layer.weight if parameter.dim() == 2 else layer.bias
        assert not any(torch.equal(row, before_row) for row in parameter for before_row in old) or parameter.dim() == 1
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[2] for name in changed} <= {"weight", "bias"}
    assert len({name.rpartition(".")[0] for name in changed}) == 1


@given(st.permutations(["a", "b", "c", "d"]), st.permutations(["a", "b", "c", "d"]))
@settings(deadline=None, max_examples=20)
def test_any_order_is_reached_and_left_again(own, wanted):
    model = tiny_classifier(num_labels=4, num_hidden_layers=1)
    before = model.classifier.weight.clone()
    fit_head(model, own, wanted)
    assert all(torch.equal(model.classifier.weight[wanted.index(x)], before[own.index(x)]) for x in own)
    fit_head(model, wanted, own)
    assert torch.equal(model.classifier.weight, before)


def test_a_head_that_fits_is_left_alone_and_no_random_number_is_drawn():
    model = tiny_classifier()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert fit_head(model, ["no", "yes"], ["no", "yes"]) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_label_0_is_no_name_and_the_line_says_how_to_give_one():
    said = fit_head(tiny_classifier(), ["LABEL_0", "LABEL_1"], ["no", "yes"])
    assert said.startswith(
        "a new head: its classes are LABEL_0, LABEL_1, those of the data no, yes (to keep it, name its classes: "
    )
    assert "task.names: {LABEL_0: no, LABEL_1: yes}" in said


def test_every_token_id_gets_an_embedding_and_the_old_ones_stay(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    model = tiny_classifier(vocab_size=len(tokenizer))
    before = model.get_input_embeddings().weight.detach().clone()
    assert fit_tokenizer(model, tokenizer) == []
    tokenizer.add_tokens(["brandname", "other"])
    (said,) = fit_tokenizer(model, tokenizer)
    assert said.startswith(f"2 rows are added to its {len(before)} embeddings")
    after = model.get_input_embeddings().weight
    assert model.config.vocab_size == len(after) == len(before) + 2
    assert torch.equal(after[: len(before)], before)
    assert torch.allclose(after[len(before) :], before.mean(dim=0).expand(2, -1))
    ids = torch.tensor([tokenizer("brandname film")["input_ids"]])
    assert model(input_ids=ids).logits.isfinite().all()


def without_padding(directory, **tokens):
    """A tokenizer that knows only the given special tokens."""
    inside = tiny_tokenizer(directory / "words").backend_tokenizer
    transformers.PreTrainedTokenizerFast(tokenizer_object=inside, **tokens).save_pretrained(directory)
    return directory


def test_a_tokenizer_without_padding_pads_with_its_end_of_text_and_the_model_knows(tmp_path):
    bare = load_tokenizer(without_padding(tmp_path, unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]"))
    assert (bare.pad_token, bare.pad_token_id) == ("[SEP]", 3)
    model = classifier("gpt2", ["no", "yes"])
    model.config.pad_token_id = None
    assert fit_tokenizer(model, bare) == ["it knows no padding: '[SEP]' pads, never attended"]
    assert model.config.pad_token_id == bare.pad_token_id
    assert fit_tokenizer(model, bare) == []
    short = torch.tensor([[10, 11, 12]])
    padded = torch.tensor([[10, 11, 12, bare.pad_token_id, bare.pad_token_id], [10, 11, 12, 13, 14]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        alone, beside = model(input_ids=short).logits[0], model(input_ids=padded, attention_mask=mask).logits[0]
    assert torch.allclose(alone, beside, atol=1e-6)


def test_a_tokenizer_with_no_token_to_spare_is_refused(tmp_path):
    with pytest.raises(UserError, match="no padding token and no end-of-text token"):
        load_tokenizer(without_padding(tmp_path))


def test_a_head_that_was_trained_for_another_kind_of_task_is_not_taken_for_this_one(tmp_path):
    """Three classes of texts and three tags of words have heads of the same name and shape."""
    tokenizer = tiny_tokenizer(tmp_path)
    tiny_classifier(num_labels=3, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classes = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).classifier.weight
    config = tagging.Config(type="tagging")
    task = tagging.Task(config, {"labels": ["O", "B-A", "I-A"], "marks": "bio", "source": "bio"}, tokenizer, 16)
    model, said = load_fitting(tmp_path, task)
    assert said == ["a new head: the one that it has is that of a BertForSequenceClassification"]
    assert model.classifier.weight.shape == classes.shape and not torch.equal(model.classifier.weight, classes)
    model, said = load_fitting(tmp_path, classification_task(tmp_path, labels=("LABEL_0", "LABEL_1", "LABEL_2")))
    assert said == [] and torch.equal(model.classifier.weight, classes)
