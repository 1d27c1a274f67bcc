"""Replaced-token detection: masking, draws, labels, parity with Hugging Face, shared embeddings, going on, exact resume."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining

from engine.data.corpus import Corpus
from engine.data.packed import PackedBatches
from engine.errors import UserError
from engine.models.scratch import ScratchConfig, build_model
from engine.objectives import rtd
from engine.objectives._tokens import IGNORED, hidden_of
from engine.randomness import generator
from engine.training import loop
from launch.resume_check import differences
from tests.recipes import pretrain_section, read_history, read_weights, run_here, train_section, write_recipe

PAD, CLS, SEP, MASK, VOCABULARY, LENGTH = 0, 2, 3, 4, 200, 40
SPECIAL = [PAD, 1, CLS, SEP, MASK]
SHAPE = {"family": "electra", "layers": 2, "hidden": 32, "heads": 4, "positions": 64}


class Tokenizer:
    pad_token_id, cls_token_id, sep_token_id = PAD, CLS, SEP


def objective(**keys):
    return rtd.Objective(rtd.Config(**keys), VOCABULARY, MASK, SPECIAL)


def model_of(**keys):
    torch.manual_seed(0)
    model = build_model(ScratchConfig(**SHAPE), rtd.Objective.head, VOCABULARY, {"pad_token_id": PAD})
    assert rtd.Objective.accompany(rtd.Config(**keys), model, None)
    rtd.Objective.adapt(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def batches_of(chosen):
    ends = np.cumsum(np.random.default_rng(0).integers(5, 30, 60))
    tokens = np.random.default_rng(1).integers(10, VOCABULARY, ends[-1])
    return PackedBatches({"": [Corpus(tokens, ends)]}, chosen, Tokenizer, LENGTH, 8, 1)


def batch_of(chosen):
    batches = batches_of(chosen)
    batch = batches.collate(0, np.arange(batches.rows - 6, batches.rows))
    assert (batch["segments"] == 0).any(), "rows without padding prove nothing about it"
    return {name: value for name, value in batch.items() if torch.is_tensor(value)}


def test_fifteen_percent_of_the_tokens_are_chosen_and_all_of_them_masked():
    tokens = np.random.default_rng(0).integers(10, VOCABULARY, 100_000)
    tokens[::10] = SEP
    columns = objective().corrupt(tokens, generator(1, "mask"))
    chosen = columns["labels"] != IGNORED
    assert chosen[tokens != SEP].mean() == pytest.approx(0.15, abs=0.005) and not chosen[tokens == SEP].any()
    assert (columns["input_ids"][chosen] == MASK).all() and (columns["input_ids"][~chosen] == tokens[~chosen]).all()
    draws = columns["draws"] / 2**rtd.DRAW_BITS
    assert draws.min() >= 0 and draws.max() < 1
    assert np.histogram(draws, 10, (0, 1))[0] == pytest.approx(np.full(10, 10_000), rel=0.05)


def test_draws_follow_the_softmax_of_the_generator():
    scores, count = 2 * torch.randn(12, generator=torch.Generator().manual_seed(0)), 200_000
    draws = torch.from_numpy(generator(1).integers(0, 2**rtd.DRAW_BITS, count))
    found = torch.bincount(rtd.drawn(scores.expand(count, -1), draws), minlength=12) / count
    assert found.numpy() == pytest.approx(scores.softmax(-1).numpy(), abs=0.005)


def test_the_first_and_the_last_draw_give_tokens_that_have_a_probability():
    scores = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert [int(rtd.drawn(scores, torch.tensor([draw]))) for draw in (0, 2**rtd.DRAW_BITS - 1)] == [1, 2]


def test_what_is_drawn_depends_neither_on_global_state_nor_on_how_many_tokens_go_at_once(monkeypatch):
    chosen, model = objective(), model_of()
    batch = batch_of(chosen)
    torch.manual_seed(1)
    with torch.no_grad():
        first = rtd.replaced_tokens(model.generator, hidden_of(model.generator, batch), batch)[0]
        torch.manual_seed(2)
        monkeypatch.setattr(rtd, "SAMPLED_SCORES", 3 * VOCABULARY)
        second = rtd.replaced_tokens(model.generator, hidden_of(model.generator, batch), batch)[0]
    assert torch.equal(first, second)


def text_of(batch):
    return torch.where(batch["labels"] != IGNORED, batch["labels"], batch["input_ids"])


@pytest.mark.parametrize("sure", [False, True])
def test_a_token_is_replaced_where_it_is_another_one_than_that_of_the_text(sure):
    model, batch = model_of(), batch_of(objective(mask=0.5))
    if sure:  # a generator that always draws token 50, which stands in the text at places, too
        with torch.no_grad():
            model.generator.get_output_embeddings().bias[50] = 1e4
        batch["labels"][0, batch["labels"][0].argmax()] = 50
    ids, replaced = rtd.replaced_tokens(model.generator, hidden_of(model.generator, batch), batch)
    assert torch.equal(replaced, ids != text_of(batch)) and replaced.any()
    assert torch.equal(ids[batch["labels"] == IGNORED], batch["input_ids"][batch["labels"] == IGNORED])
    if sure:
        assert (ids[batch["labels"] != IGNORED] == 50).all() and not replaced[batch["labels"] == 50].any()


def test_both_losses_of_packed_rows_are_those_of_transformers_own_classes_on_each_document_alone():
    chosen, model = objective(weight=30, mask=0.3), model_of()
    batch = batch_of(chosen)
    guessed = judged = masked = tokens = right = 0.0
    with torch.no_grad():
        found = chosen.measure(model, batch)
        ids, replaced = rtd.replaced_tokens(model.generator, hidden_of(model.generator, batch), batch)
        for row in range(len(ids)):
            for segment in range(1, int(batch["segments"][row].max()) + 1):
                here = batch["segments"][row] == segment
                read, labels, shown, truth = (
                    part[row][here][None] for part in (batch["input_ids"], batch["labels"], ids, replaced)
                )
                output = model(shown, attention_mask=torch.ones_like(shown), labels=truth.long())
                judged, tokens = judged + float(output.loss) * truth.numel(), tokens + truth.numel()
                right += int(((output.logits > 0) == truth).sum())
                if count := int((labels != IGNORED).sum()):
                    guessed, masked = guessed + float(model.generator(read, labels=labels).loss) * count, masked + count
    assert [float(part) for part in found["masked_loss"]] == pytest.approx([guessed, masked], rel=1e-5)
    assert [float(part) for part in found["replaced_loss"]] == pytest.approx([judged, tokens], rel=1e-5)
    assert [float(part) for part in found["loss"]] == pytest.approx([guessed + 30 * 0.3 * judged, masked], rel=1e-5)
    assert float(found["replaced_accuracy"][0]) == pytest.approx(100 * right)
    assert int(found["replaced_recall"][1]) == int(replaced.sum()) > 0


def test_embeddings_are_one_and_gradients_reach_every_weight_but_none_goes_through_a_draw():
    chosen, model = objective(), model_of()
    batch = batch_of(chosen)
    generated = model.generator
    assert generated.electra.embeddings is model.electra.embeddings
    assert generated.get_output_embeddings().weight is model.get_input_embeddings().weight
    chosen.loss(model, batch)[0].backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    own = {name: parameter.grad.clone() for name, parameter in generated.named_parameters() if "embeddings" not in name}
    model.zero_grad()
    chosen.measure(model, batch)["masked_loss"][0].backward()
    for name, parameter in generated.named_parameters():
        assert name not in own or torch.allclose(parameter.grad, own[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(("share", "heads", "hidden", "neurons"), [(0.25, 1, 8, 32), (0.5, 2, 16, 64), (1.0, 4, 32, 128)])
def test_a_generator_has_a_share_of_what_is_wide(share, heads, hidden, neurons):
    config = model_of(generator=share).generator.config
    sizes = (config.num_attention_heads, config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    assert sizes == (heads, hidden, neurons, 2) and config.embedding_size == 32


def test_another_models_generator_is_refused(tmp_path):
    model = model_of()
    model.generator.resize_token_embeddings(VOCABULARY + 8)
    model.generator.save_pretrained(tmp_path / "generator")
    other = build_model(ScratchConfig(**SHAPE), rtd.Objective.head, VOCABULARY, {"pad_token_id": PAD})
    with pytest.raises(UserError, match=r"table of tokens is \(208, 32\), that of the model \(200, 32\): remove it"):
        rtd.Objective.accompany(rtd.Config(), other, tmp_path)


def test_another_size_than_that_of_the_generator_that_is_there_is_refused(tmp_path):
    model_of(generator=0.5).generator.save_pretrained(tmp_path / "generator")
    model = build_model(ScratchConfig(**SHAPE), rtd.Objective.head, VOCABULARY, {"pad_token_id": PAD})
    assert not rtd.Objective.accompany(rtd.Config(), model, tmp_path), "what is not said stays as it is"
    assert not rtd.Objective.accompany(rtd.Config(generator=0.5), model, tmp_path)
    with pytest.raises(UserError, match=r"objective.generator=0.25 makes a generator of 8 features, that of .* has 16: leave"):
        rtd.Objective.accompany(rtd.Config(generator=0.25), model, tmp_path)


def section(model=SHAPE, **changes):
    changes = {"objective": {"type": "rtd"}, "train": train_section(steps=6, evaluate_every=2), **changes}
    made = pretrain_section(model=model, tokenizer={"train": {"vocab_size": 300}}, **changes)
    if model is not SHAPE:
        del made["tokenizer"]
    return {"pretrain": made}


def everything(directory):
    parts = {"": directory, "generator.": directory / "generator"}
    return {f"{name}{key}": value for name, path in parts.items() for key, value in read_weights(path).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rtd")
    return run_here(write_recipe(directory, {"base": section()}), "base", directory / "runs").directory


def test_transformers_opens_both_with_no_weight_missing_and_the_embeddings_are_the_same(base):
    for path, auto in ((base, AutoModelForPreTraining), (base / "generator", AutoModelForMaskedLM)):
        _, told = auto.from_pretrained(path, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    weights = everything(base)
    shared = [name for name in weights if name.startswith("electra.embeddings.")]
    assert len(shared) == 5 and all(torch.equal(weights[name], weights[f"generator.{name}"]) for name in shared)
    validation = json.loads((base / "stage.json").read_text())["metrics"]["validation"]
    assert {"masked_loss", "replaced_loss", "replaced_accuracy", "replaced_recall"} <= set(validation)


def test_what_goes_on_begins_with_the_generator_that_is_there_or_says_that_it_begins_at_random(base, tmp_path, capsys):
    def first(name):
        stage = run_here(write_recipe(tmp_path, {name: section(str(base))}), name, tmp_path / "runs")
        return next(r["validation"] for r in read_history(stage.directory) if "validation" in r)

    last = [r["validation"] for r in read_history(base) if "validation" in r][-1]
    assert first("with") == pytest.approx(last, abs=1e-5)
    assert "at random" not in capsys.readouterr().out
    (base / "generator").rename(base.parent / "aside")
    try:
        assert first("without")["masked_loss"] != pytest.approx(last["masked_loss"], abs=1e-3)
    finally:
        (base.parent / "aside").rename(base / "generator")
    assert capsys.readouterr().out.count("has no generator beside it: it begins at random") == 1


def test_words_that_are_added_get_a_row_in_both(base, tmp_path):
    made = section(str(base))
    made["pretrain"]["tokenizer"] = {"extend": {"words": ["brandnew", "otherword"]}}
    weights = everything(run_here(write_recipe(tmp_path, {"more": made}), "more", tmp_path / "runs").directory)
    rows = {len(weights[name]) for name in weights if name.endswith(("word_embeddings.weight", "generator_lm_head.bias"))}
    assert len(rows) == 1


def test_weights_of_a_generator_that_are_not_those_of_the_run_are_refused(tmp_path, monkeypatch):
    from engine.models import companions

    original = companions.save_together

    def other(model, tokenizer, directory, weights):
        wrong = {name: value * 0 if "lm_head.bias" in name else value for name, value in weights.items()}
        original(model, tokenizer, directory, wrong)

    monkeypatch.setattr(companions, "save_together", other)
    with pytest.raises(RuntimeError, match="do not give the logits"):
        run_here(write_recipe(tmp_path, {"base": section()}), "base", tmp_path / "runs")


def test_killed_it_ends_with_bit_equal_weights_of_both(base, tmp_path, monkeypatch):
    original = loop.Trainer.step

    def killed(self, batch, step, *arguments):
        if step == 5:
            raise KeyboardInterrupt
        return original(self, batch, step, *arguments)

    recipe = write_recipe(tmp_path, {"base": section()})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop.Trainer, "step", killed)
        run_here(recipe, "base", tmp_path / "runs")
    again = run_here(recipe, "base", tmp_path / "runs").directory
    ours, theirs = everything(again), everything(base)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert list(differences(again, base)) == []
    path = again / "generator" / "model.safetensors"
    save_file({name: value + (name == "generator_lm_head.bias") for name, value in load_file(path).items()}, path)
    assert [found.split(" by")[0] for found in differences(again, base)] == ["tensor generator_lm_head.bias differs"]
