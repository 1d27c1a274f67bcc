"""Pretraining stages: another family, another objective, another vocabulary, and a model that goes on learning."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForSeq2SeqLM, AutoTokenizer

from engine.config import load_recipe
from engine.errors import UserError
from launch.check import check_recipe
from launch.recipe import load_stages
from tests.recipes import (
    finetune_section,
    pretrain_section,
    ragged_rows,
    read_history,
    read_weights,
    run_here,
    train_section,
    write_recipe,
    write_rows,
)

SHAPE = {"layers": 2, "hidden": 32, "heads": 4, "positions": 64}
BPE = {"train": {"type": "bpe", "vocab_size": 300}}
SENTINELS = {"train": {"type": "bpe", "vocab_size": 400}}
LONGER = train_section(steps=30, learning_rate=3e-3, evaluate_every=15, keep="last")


def new_model(family, objective, tokenizer=None, **changes):
    shape = {**SHAPE, "family": family}
    tokenizer = tokenizer or (SENTINELS if objective == "span_corruption" else BPE)
    return {
        "pretrain": pretrain_section(model=shape, tokenizer=tokenizer, objective={"type": objective}, train=LONGER, **changes)
    }


def going_on(model, **changes):
    section = pretrain_section(model=model, train=train_section(steps=10, evaluate_every=5), **changes)
    del section["tokenizer"]
    return {"pretrain": section}


def check(recipe):
    loaded = load_recipe(recipe)
    return check_recipe(loaded, load_stages(loaded))


def run_all(recipe, stages, runs):
    check(recipe)
    return [run_here(recipe, name, runs).directory for name in stages]


CASES = {"gpt2": ("clm", AutoModelForCausalLM), "llama": ("clm", AutoModelForCausalLM), "roberta": ("mlm", AutoModelForMaskedLM)}
CASES |= {"bert": ("nsp", AutoModelForPreTraining), "albert": ("sop", AutoModelForPreTraining)}
CASES |= {"xlnet": ("plm", AutoModelForCausalLM)}
CASES |= {"t5": ("span_corruption", AutoModelForSeq2SeqLM), "bart": ("denoising", AutoModelForSeq2SeqLM)}
CASES |= {"mbart": ("denoising", AutoModelForSeq2SeqLM)}
CASES |= {"modernbert": ("mlm", AutoModelForMaskedLM), "electra": ("rtd", AutoModelForPreTraining)}


@pytest.fixture(scope="module", params=CASES)
def chain(request, tmp_path_factory):
    """(family, directories): a new model, one that goes on from it, a classifier made of that one."""
    family, directory = request.param, tmp_path_factory.mktemp(request.param)
    objective = CASES[family][0]
    task = finetune_section(model="more", max_length=24, train=train_section(steps=2))
    stages = {
        "base": new_model(family, objective),
        "more": going_on("base", objective={"type": objective}),
        "teacher": {"finetune": task},
    }
    return family, run_all(write_recipe(directory, stages), stages, directory / "runs")


def test_its_loss_falls_and_what_goes_on_begins_where_the_other_ended(chain):
    _, (base, more, teacher) = chain
    first, second = ([r["validation"]["loss"] for r in read_history(path) if "validation" in r] for path in (base, more))
    assert first[-1] < first[0] - 0.05
    assert second[0] == pytest.approx(first[-1], abs=1e-6)
    assert second[-1] < second[0] + 0.05
    assert json.loads((teacher / "stage.json").read_text())["metrics"]


def test_transformers_opens_it_and_gives_the_same_perplexity(chain):
    family, (_, more, _) = chain
    objective, auto = CASES[family]
    model, tokenizer = auto.from_pretrained(more).eval(), AutoTokenizer.from_pretrained(more)
    assert tokenizer("great film")["input_ids"][0] == tokenizer.bos_token_id
    if objective == "clm":
        record = json.loads((more / "stage.json").read_text())["metrics"]["validation"]
        total = count = 0
        rows = [row["text"] for row in ragged_rows(64)]
        with torch.no_grad():
            for text in rows:
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
                count += ids.shape[1] - 1
        # Of all rows here, of the held-out quarter there.
        assert total / count == pytest.approx(record["loss"], abs=0.4)


def test_the_text_comes_back_from_its_tokens(chain):
    tokenizer = AutoTokenizer.from_pretrained(chain[1][0])
    text = "Ünïcode — 電影 was great 🎬"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_a_body_alone_gets_a_head_that_knows_the_frequencies_and_says_so(tmp_path, capsys):
    recipe = write_recipe(tmp_path, {"more": going_on("model")})
    directory = run_all(recipe, ["more"], tmp_path / "runs")[0]
    assert "'model' has nothing that scores the vocabulary: it begins at random" in capsys.readouterr().out
    bias = read_weights(directory)["cls.predictions.bias"].numpy()
    assert np.exp(bias).sum() == pytest.approx(1.0, abs=0.1) and bias.std() > 1


def written(family):
    stage = new_model(family, "span_corruption", sequence_length=64)
    stage["pretrain"]["objective"] |= {"mask": 0.9}
    return stage


REFUSED = {
    "objective": ({"base": new_model("gpt2", "mlm")}, "models of type 'gpt2' cannot be pretrained to predict masked tokens"),
    "pairs": ({"base": new_model("roberta", "nsp")}, "models of type 'roberta' cannot be pretrained to judge pairs of texts"),
    "order": (
        {"base": new_model("bert", "plm")},
        "models of type 'bert' cannot be pretrained to predict tokens in any order: they have no second stream of attention",
    ),
    "detector": (
        {"base": new_model("bert", "rtd")},
        "models of type 'bert' cannot be pretrained to tell replaced tokens: transformers has no head for that",
    ),
    "streams": ({"base": new_model("xlnet", "clm")}, "models of type 'xlnet' cannot be pretrained to predict the next token"),
    "family": ({"base": new_model("bert", "clm")}, "models of type 'bert' cannot be pretrained to predict the next token"),
    "end": (
        {"base": new_model("gpt2", "clm", {"train": {"vocab_size": 300}})},
        "wordpiece has no eos_token, which next-token prediction needs: set type: bpe",
    ),
    "decoder": (
        {"base": new_model("bert", "denoising")},
        "models of type 'bert' cannot be pretrained to write a text: they have no decoder that reads an encoder",
    ),
    "written": (
        {"base": written("bart")},
        "sequence_length=64 lets the decoder write 316 tokens, above the 64 of model.positions: lower it, or objective.mask",
    ),
    "sentinels": ({"base": new_model("t5", "span_corruption", BPE)}, "bpe begins with 361 tokens: raise it"),
    "bytes": (
        {"base": new_model("roberta", "mlm", {"train": {"type": "bpe", "vocab_size": 200}})},
        "begins with 261 tokens: raise it",
    ),
    "tokenizer": (
        {"base": {"pretrain": pretrain_section(model="model")}},
        "tokenizer: a model that goes on learning keeps its own",
    ),
    "extended": (
        {"base": new_model("bert", "mlm", {"extend": {"words": 5}})},
        "tokenizer.extend: a new model learns its vocabulary: say train",
    ),
    "none": ({"base": going_on(SHAPE)}, "tokenizer: a new model needs one"),
    "long": ({"base": going_on("model", sequence_length=500)}, "sequence_length=500 is above the 64 positions of model"),
    "kind": (
        {"teacher": {"finetune": finetune_section()}, "base": going_on("teacher")},
        "stage 'teacher' (finetune) gives a fine-tuned model; a pretrained model is needed",
    ),
    "next": (
        {"base": going_on("model", objective={"type": "clm"})},
        "models of type 'bert' cannot be pretrained to predict the next",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pretrained_is_one_line_before_anything_runs(tmp_path, case):
    stages, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        check(write_recipe(tmp_path, stages))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_new_domain_is_learnt_without_the_task_of_the_run_that_the_model_comes_from(tmp_path):
    runs = tmp_path / "runs"
    teacher = run_here(write_recipe(tmp_path, {"teacher": {"finetune": finetune_section()}}), "teacher", runs).directory
    write_rows(tmp_path / "rows.jsonl", ragged_rows(64, seed=3))
    recipe = write_recipe(tmp_path, {"more": going_on(str(teacher))}, name="other")
    check(recipe)
    assert run_here(recipe, "more", runs).directory.exists()


def test_a_decoder_may_write_as_much_as_it_will_where_positions_are_relative(tmp_path):
    check(write_recipe(tmp_path, {"base": written("t5")}))


def test_a_model_that_goes_on_has_positions_for_what_its_decoder_writes(tmp_path):
    small = new_model("bart", "span_corruption")
    small["pretrain"]["train"] = train_section(steps=1)
    more = going_on("base", objective={"type": "span_corruption", "mask": 0.9}, sequence_length=64)
    recipe = write_recipe(tmp_path, {"base": small, "more": more})
    run_here(recipe, "base", tmp_path / "runs")
    with pytest.raises(UserError, match="lets the decoder write 316 tokens, above the 64 of 'base'"):
        run_here(recipe, "more", tmp_path / "runs")
