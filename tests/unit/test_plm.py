"""Permutation language modelling: what is predicted, who sees whom, packing, parity with Hugging Face."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.corpus import Corpus
from engine.data.packed import PackedBatches
from engine.errors import UserError
from engine.models.attention import permuted_inputs
from engine.models.scratch import ScratchConfig, build_model
from engine.objectives import Frame, plm
from engine.objectives._tokens import IGNORED
from engine.objectives.plm import CONTEXT
from engine.randomness import generator

PAD, CLS, SEP, VOCABULARY, LENGTH = 0, 2, 3, 600, 40


class Tokenizer:
    """Puts [CLS] before and [SEP] after a text; as XLNet's, both of them after it, [CLS] with a type of its own."""

    name_or_path = "here"
    pad_token_id, all_special_ids = PAD, [PAD, CLS, SEP]
    around = ([CLS], [SEP])
    types = ([0], [0])
    pad_token = "<pad>"

    @classmethod
    def __call__(cls, text, add_special_tokens=True, return_token_type_ids=False):
        (before, after), (first, last) = (cls.around, cls.types) if add_special_tokens else (([], []), ([], []))
        return {"input_ids": [*before, 9, *after], "token_type_ids": [*first, 0, *last]}


class AtTheEnd(Tokenizer):
    around = ([], [SEP, CLS])
    types = ([], [0, 2])


class Three(Tokenizer):
    around = ([CLS], [SEP, CLS])
    types = ([0], [0, 2])


class Bare(Tokenizer):
    around = types = ([], [])


TOKENIZERS = {"before and after": Tokenizer(), "both after": AtTheEnd(), "three": Three()}
EACH = pytest.mark.parametrize("kind", TOKENIZERS)


def objective(tokenizer=None, **keys):
    return plm.Objective.of_tokenizer(plm.Config(**keys), tokenizer or Tokenizer())


def batches_of(tokenizer, objective):
    ends = np.cumsum(np.random.default_rng(0).integers(1, 60, 60))
    tokens = np.random.default_rng(1).integers(10, VOCABULARY, ends[-1])
    return PackedBatches({"": [Corpus(tokens, ends)]}, objective, tokenizer, LENGTH, 8, 1)


@pytest.mark.parametrize(("one_in", "longest"), [(6, 5), (5, 1), (10, 8)])
def test_one_in_so_many_tokens_is_predicted_in_runs_of_every_length(one_in, longest):
    tokens = np.random.default_rng(0).integers(10, VOCABULARY, 200_000)
    columns = objective(one_in=one_in, longest=longest).corrupt(tokens, generator(1, "mask"))
    chosen = columns["labels"] != IGNORED
    assert chosen.mean() == pytest.approx(1 / one_in, rel=0.02)
    assert (columns["input_ids"] == tokens).all() and (columns["labels"][chosen] == tokens[chosen]).all()
    borders = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    runs = np.bincount(borders[1::2] - borders[::2], minlength=2 * longest + 1)
    # A run may touch the next one; as every length is as frequent, few are longer than the longest.
    assert runs[longest + 1 :].sum() < 0.12 * runs.sum()
    assert runs[1 : longest + 1].min() > 0.6 * runs[1 : longest + 1].max()


def test_predicted_tokens_have_places_of_their_own_and_every_order_is_as_likely():
    tokens = np.arange(10, 40)
    firsts = []
    for turn in range(400):
        columns = objective().corrupt(tokens, generator(turn))
        chosen = columns["labels"] != IGNORED
        assert (columns["order"][~chosen] == CONTEXT).all()
        order = columns["order"][chosen]
        assert order.min() >= 0 and len(set(order)) == len(order)
        firsts.append(np.argsort(order)[0] / max(1, len(order) - 1))
    assert np.mean(firsts) == pytest.approx(0.5, abs=0.07)


def test_special_tokens_are_never_predicted():
    tokens = np.resize([CLS, 50, SEP, PAD, 51], 6000)
    labels = objective(one_in=2).corrupt(tokens, generator(1))["labels"]
    assert (labels[np.isin(tokens, [PAD, CLS, SEP])] == IGNORED).all() and (labels != IGNORED).any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_who_sees_whom_is_the_definition(tokens, random):
    segments = torch.tensor([[segment for segment, _ in tokens]])
    places = list(range(len(tokens)))
    random.shuffle(places)
    order = [place if predicted else CONTEXT for place, (_, predicted) in zip(places, tokens, strict=True)]
    targets = [at for at, place in enumerate(order) if place >= 0]
    found = permuted_inputs(segments, torch.tensor([order]), torch.tensor([targets], dtype=torch.int64), torch.float32)
    for one in range(len(tokens)):
        for other in range(len(tokens)):
            same = tokens[one][0] == tokens[other][0]
            context, before = order[other] == CONTEXT, order[one] != CONTEXT and order[other] < order[one]
            assert found["perm_mask"][0, one, other] == (0.0 if same and (context or before) else 1.0)
    assert found["target_mapping"].shape == (1, len(targets), len(tokens))
    assert found["target_mapping"][0].nonzero()[:, 1].tolist() == targets


@EACH
def test_every_token_is_in_one_piece_of_an_epoch_with_what_its_tokenizer_puts_around_it(kind):
    tokenizer = TOKENIZERS[kind]
    batches = batches_of(tokenizer, objective(tokenizer))
    (before, after), (first, last) = tokenizer.around, tokenizer.types
    found = []
    for number in range(batches.rows):
        row = batches.row(1, number)
        for segment in range(1, row["segments"].max() + 1):
            here = row["segments"] == segment
            ids, end = row["input_ids"][here], int(here.sum()) - len(after)
            assert (ids[: len(before)].tolist(), ids[end:].tolist()) == (before, after)
            assert row["token_type_ids"][here].tolist() == [*first, *[0] * (end - len(before)), *last]
            found.append(ids[len(before) : end])
        assert (row["order"][row["segments"] == 0] == CONTEXT).all()
    assert sorted(np.concatenate(found)) == sorted(batches.sources[""][0].tokens)


def model_of():
    torch.manual_seed(0)
    shape = ScratchConfig(family="xlnet", layers=2, hidden=32, heads=4, positions=64)
    model = build_model(shape, "AutoModelForCausalLM", VOCABULARY, {"pad_token_id": PAD}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tensors_of(batch):
    return {name: value for name, value in batch.items() if torch.is_tensor(value)}


@EACH
def test_the_loss_of_packed_rows_is_that_of_transformers_own_class_on_each_document_alone(kind):
    tokenizer = TOKENIZERS[kind]
    chosen = objective(tokenizer)
    batch, model = batches_of(tokenizer, chosen).collate(0, np.arange(6)), model_of()
    total = predicted = 0.0
    with torch.no_grad():
        ours, count = chosen.loss(model, tensors_of(batch))
        for row in range(6):
            for segment in range(1, int(batch["segments"][row].max()) + 1):
                here = batch["segments"][row] == segment
                part = {name: batch[name][row][here] for name in ("input_ids", "token_type_ids", "labels", "order")}
                targets = (part["labels"] != IGNORED).nonzero()[:, 0].tolist()
                if not targets:
                    continue
                size = int(here.sum())
                mask, mapping = torch.zeros(1, size, size), torch.zeros(1, len(targets), size)
                for number, target in enumerate(targets):
                    mapping[0, number, target] = 1.0
                    for one in range(size):
                        later = part["order"][one] <= part["order"][target]
                        mask[0, one, target] = float(later)
                output = model(
                    part["input_ids"][None],
                    token_type_ids=part["token_type_ids"][None],
                    perm_mask=mask,
                    target_mapping=mapping,
                    labels=part["labels"][targets][None],
                )
                total, predicted = total + len(targets) * output.loss.item(), predicted + len(targets)
    assert int(count) == predicted == batch["count"]
    assert ours.item() == pytest.approx(total, rel=1e-5)


def test_a_token_is_predicted_from_what_comes_before_it_in_the_order_and_from_nothing_else():
    chosen, model = objective(one_in=3), model_of()
    batch = tensors_of(batches_of(Tokenizer(), chosen).collate(0, np.arange(1)))
    predicted = (batch["labels"][0] != IGNORED).nonzero()[:, 0]
    with torch.no_grad():
        scores = chosen.logits(model, batch)
        for changed in predicted.tolist():
            ids = batch["input_ids"].clone()
            ids[0, changed] = 11 if ids[0, changed] != 11 else 12
            others = chosen.logits(model, {**batch, "input_ids": ids})
            differ = (others - scores).abs().amax(1) > 1e-6
            same = batch["segments"][0, predicted] == batch["segments"][0, changed]
            assert differ.tolist() == (same & (batch["order"][0, predicted] > batch["order"][0, changed])).tolist()


def test_a_tokenizer_that_puts_nothing_around_a_text_is_refused():
    plm.Objective.require(AtTheEnd())
    with pytest.raises(UserError, match="here: this tokenizer puts no special token around a text"):
        plm.Objective.require(Bare())
    assert plm.Objective.frame(AtTheEnd()) == Frame((), (SEP, CLS))


def test_a_new_model_has_the_size_that_was_asked_for():
    config = model_of().config
    assert (config.n_layer, config.d_model, config.n_head, config.d_inner, config.d_head) == (2, 32, 4, 128, 8)
