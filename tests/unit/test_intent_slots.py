"""Intent and slots: the joint loss, what a student imitates, the figures, what is kept with a model, what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from engine.data.sources import PlacedRow
from engine.errors import UserError
from engine.evaluate import torch_run
from engine.models import load_tokenizer
from engine.models.fitting import load_fitting
from engine.tasks import classification, intent_slots, tagging, token_mean
from tests.families import write_family
from tests.unit.models import tiny_config, tiny_tokenizer

ROWS = [
    {
        "tokens": ["a", "good", "film", "with", "the", "actor"],
        "slots": ["O", "B-WORK", "I-WORK", "O", "O", "B-PER"],
        "intent": "ask",
    },
    {"tokens": ["bad"], "slots": ["O"], "intent": "tell"},
    {"tokens": ["the", "plot", "was", "very", "dull"], "slots": ["O", "B-WORK", "O", "O", "O"], "intent": "tell"},
]
LABELS = ["O", "B-PER", "I-PER", "B-WORK", "I-WORK", "intent:ask", "intent:tell"]
BOTH = pytest.mark.parametrize("crf", [False, True])


def config_of(**section):
    return intent_slots.Config(type="intent_slots", **section)


def task_of(directory, rows=ROWS, max_length=32, **section):
    config = config_of(**section)
    return intent_slots.Task(config, intent_slots.Task.learn(config, rows), tiny_tokenizer(directory), max_length)


@pytest.fixture
def task(tmp_path):
    return task_of(tmp_path)


def tiny_model(task):
    """A model with random weights, loaded as the task's own."""
    from transformers import BertForTokenClassification

    from engine.models.heads import add_part

    torch.manual_seed(0)
    model = BertForTokenClassification(tiny_config(**task.settings(), initializer_range=0.5)).eval()
    part = add_part(model)
    if part is not None:
        torch.nn.init.normal_(part.weight, std=0.01)
    return model


def loss_of(task, model, examples):
    total, count = task.loss(model, task.collate(examples))
    return float(total), float(count)


@BOTH
def test_the_loss_of_a_batch_is_the_sum_of_its_rows_and_unlabelled_rows_enter_neither_sum_nor_count(tmp_path, crf):
    task = task_of(tmp_path, crf=crf)
    model, examples = tiny_model(task), task.encode([*ROWS, {"tokens": "a film"}])
    each = [loss_of(task, model, [example]) for example in examples]
    assert loss_of(task, model, examples) == pytest.approx((sum(total for total, _ in each), 12.0), rel=1e-5)
    assert [count for _, count in each] == [6, 1, 5, 0] and each[-1][0] == 0.0


@BOTH
def test_each_word_counts_its_slot_and_so_often_as_said_its_sentences_intent(tmp_path, crf):
    weighted, task = task_of(tmp_path, crf=crf, intent_weight=0.5), task_of(tmp_path, crf=crf)
    model, example = tiny_model(task), task.encode(ROWS)[0]
    logits_LC = model(**{name: tensor for name, tensor in task.collate([example]).items() if name in task.inputs}).logits[0]
    intent = float(functional.cross_entropy(logits_LC[:, 5:].mean(dim=0), torch.tensor(0)))
    once, half = loss_of(task, model, [example])[0], loss_of(weighted, model, [example])[0]
    assert once - half == pytest.approx(0.5 * 6 * intent, rel=1e-4)
    if not crf:
        slots = functional.cross_entropy(logits_LC[example["firsts"], :5], torch.tensor(example["label"]), reduction="sum")
        assert once == pytest.approx(float(slots) + 6 * intent, rel=1e-5)


@BOTH
def test_a_student_that_is_its_teacher_imitates_it_perfectly_and_padding_does_not_enter(tmp_path, crf):
    task = task_of(tmp_path, crf=crf)
    model, examples = tiny_model(task), task.encode(ROWS)

    def lesson(chosen, shift=0.0):
        batch = task.collate(chosen)
        outputs = task.named(task.forward(model, batch))
        outputs["intent"] = outputs["intent"] + shift * outputs["intent"].detach().cos()
        return task.lesson(outputs, batch, 2.0)

    same = lesson(examples)
    assert float(task.imitation(same, same, 2.0)) == pytest.approx(0.0, abs=1e-5)
    together = float(task.imitation(lesson(examples, 0.5), same, 2.0))
    alone = sum(float(task.imitation(lesson([each], 0.5), lesson([each]), 2.0)) for each in examples)
    assert together > 0.01, "another intent is another lesson"
    assert together == pytest.approx(alone, rel=1e-4)


def test_the_mean_over_tokens_leaves_padding_out():
    values_BLF = torch.tensor([[[1.0], [3.0], [99.0]], [[5.0], [9.0], [99.0]]])
    mask_BL = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert token_mean(values_BLF, mask_BL).tolist() == [[2.0], [0.0]]
    assert token_mean(values_BLF, torch.ones(2, 3)).tolist() == token_mean(values_BLF, None).tolist()


def answer_of(intent, *slots):
    """An answer with (start, end, type) of each slot."""
    found = [{"start": start, "end": end, "type": kind, "text": "", "score": 1.0} for start, end, kind in slots]
    return {"intent": intent, "score": 0.75, "entities": found}


TRUE = [answer_of("ask", (2, 11, "WORK"), (21, 26, "PER")), answer_of("tell"), answer_of("tell", (4, 8, "WORK"))]
GIVEN = [answer_of("ask", (2, 11, "WORK")), answer_of("ask"), TRUE[2]]
"""A slot is missed, an intent is wrong, everything is right."""


def test_a_sentence_is_right_when_its_intent_and_all_of_its_slots_are(task):
    judge = task.answers
    figures = judge.metrics(GIVEN, ROWS)
    assert figures["exact"] == pytest.approx(100 / 3) and figures["intent_accuracy"] == pytest.approx(200 / 3)
    assert (figures["slot_precision"], figures["slot_recall"]) == (100, pytest.approx(200 / 3))
    assert (figures["slot_f1"], figures["examples"]) == (pytest.approx(80), 3)
    assert judge.metric.name == "exact" and judge.metric.counted
    assert judge.right(GIVEN, ROWS).tolist() == [False, False, True]
    assert judge.right(TRUE, ROWS).all() and judge.metrics(TRUE, ROWS)["exact"] == 100
    assert judge.wrongness(GIVEN, ROWS).tolist() == [1, 1, 0]
    assert judge.agreement(GIVEN, TRUE) == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_the_interval_is_that_of_what_chooses(tmp_path):
    judge = task_of(tmp_path, metric="intent_accuracy").answers
    assert judge.right(GIVEN, ROWS).tolist() == [True, False, True]
    assert not task_of(tmp_path, metric="slot_f1").answers.metric.counted


def test_types_and_intents_are_judged_each_and_shown_with_the_text(task):
    judge = task.answers
    table = judge.table(GIVEN, ROWS)
    assert list(table) == ["PER", "WORK", "intent:ask", "intent:tell"]
    assert (table["PER"]["recall"], table["intent:tell"]["recall"], table["intent:ask"]["precision"]) == (0, 50, 50)
    assert judge.pieces(GIVEN[2], ROWS[2]) == [("tell: ", None), ("the ", None), ("plot", "WORK"), (" was very dull", None)]
    seen = judge.explained(GIVEN[1], ROWS[1])
    assert [seen[key]["pieces"][0][0] for key in ("true", "answered")] == ["tell: ", "ask: "]
    record = json.loads(json.dumps(judge.record(GIVEN[1], ROWS[1])))
    assert (record["intent"], record["predicted_intent"], record["prediction"]) == ("tell", "ask", [])
    assert judge.line(GIVEN[1]) == "ask\t0.7500\t-"


def test_types_of_slots_and_intents_are_confused_among_themselves(task):
    labels = [*task.answers.types, "(none)", "intent:ask", "intent:tell"]
    found = task.answers.confusion(GIVEN, ROWS)
    assert [labels[2:], len(found["labels"])] == [found["labels"][2:], 5]
    named = {(found["labels"][true], found["labels"][given]): count for true, given, count in found["counts"]}
    intents = {("intent:ask", "intent:ask"): 1, ("intent:tell", "intent:ask"): 1, ("intent:tell", "intent:tell"): 1}
    assert named == {("WORK", "WORK"): 2, ("PER", "(none)"): 1, **intents}


def test_what_no_training_row_has_counts_as_missed(task):
    rows = [{**ROWS[1], "intent": "sing"}, {**ROWS[2], "slots": ["O", "B-GPE", "O", "O", "O"]}]
    figures = task.answers.metrics([TRUE[1], TRUE[2]], rows)
    assert (figures["exact"], figures["intent_accuracy"], figures["slot_recall"]) == (0, 50, 0)
    assert task.answers.table([TRUE[1], TRUE[2]], rows)["intent:sing"]["recall"] == 0


def scores(task, arrays, intent_MI):
    """What a graph gives that knows no slot."""
    slots = np.zeros((*arrays["input_ids"].shape, len(task.answers.tags)), dtype=np.float32)
    slots[..., 0] = 9
    return {"intent": np.asarray(intent_MI, dtype=np.float32), "slots": slots}


def test_the_windows_of_a_long_row_decide_together(tmp_path):
    task = task_of(tmp_path, max_length=10, stride=4)
    rows = [{"tokens": "film"}, {"tokens": ["film"] * 12}, {"tokens": ""}]
    assert [len(each.windows) for each in task.answers.encode(rows)] == [1, 2, 1]
    answers = task.answers.answer(lambda _, arrays: scores(task, arrays, [[0, 1], [9, 0], [0, 1], [1, 0]]), rows)
    assert [answer["intent"] for answer in answers] == ["tell", "ask", "ask"]
    assert answers[1]["score"] == pytest.approx(1 / (1 + np.exp(-4)), abs=1e-6)
    assert answers[2]["entities"] == []
    assert task.answers.answer(lambda _, arrays: scores(task, arrays, np.zeros((0, 2))), []) == []


def test_the_windows_of_a_long_row_learn_its_intent_each(tmp_path):
    task = task_of(tmp_path, max_length=10, stride=4)
    row = {key: value * 2 if isinstance(value, list) else value for key, value in ROWS[0].items()}
    examples = task.encode([row])
    assert len(examples) == 2 and [example["intent"] for example in examples] == [0, 0]
    assert sum(len(example["label"]) for example in examples) == 12


@BOTH
def test_facts_come_back_from_a_models_configuration(tmp_path, crf):
    task = task_of(tmp_path, crf=crf)
    assert task.facts == {"labels": LABELS, "marks": "bio", "source": "bio"}
    assert intent_slots.Task.recall(task.config, SimpleNamespace(**task.settings())) == task.facts
    stranger = SimpleNamespace(num_labels=7, id2label=dict(enumerate(LABELS)))
    with pytest.raises(UserError, match="are not intents and slots that this task has learnt: fine-tune it first"):
        intent_slots.Task.recall(task.config, stranger)
    renamed = config_of(crf=crf, names={"WORK": "title"}, intent_names={"ask": "question"})
    recalled = intent_slots.Task.recall(renamed, SimpleNamespace(**task.settings()))
    assert recalled["labels"] == ["O", "B-PER", "I-PER", "B-title", "I-title", "intent:question", "intent:tell"]


def test_intents_and_types_may_have_the_same_names(tmp_path):
    rows = [{**row, "intent": intent} for row, intent in zip(ROWS, ["PER", "O", "WORK"], strict=True)]
    task = task_of(tmp_path, rows, names={"PER": "person"}, intent_names={"PER": "who"})
    assert task.answers.types == ["WORK", "person"] and task.answers.intents == ["O", "WORK", "who"]
    assert [task.answers.intents[example["intent"]] for example in task.encode(rows)] == ["who", "O", "WORK"]


def test_a_model_keeps_what_fits_and_its_crf_is_one_of_the_tags_alone(tmp_path):
    both, tags = task_of(tmp_path, crf=True), tagging_task(tmp_path)
    assert tiny_model(both).crf.weight.shape == (7, 5)
    for name, own in (("both", both), ("tags", tags)):
        tiny_model(own).save_pretrained(tmp_path / name)
    same, said = load_fitting(tmp_path / "both", both)
    assert said == [] and torch.equal(same.crf.weight, tiny_model(both).crf.weight)
    fewer, said = load_fitting(tmp_path / "both", tags)
    assert "a new head" in said[0] and (fewer.num_labels, fewer.crf.weight.shape) == (5, (7, 5))
    more, said = load_fitting(tmp_path / "tags", both)
    assert "a new head" in said[0] and (more.num_labels, more.crf.weight.shape) == (7, (7, 5))
    sentence = classification.Config(type="classification")
    other, _ = load_fitting(tmp_path / "both", classification.Task(sentence, {"labels": ["a", "b"]}, both.tokenizer, 32))
    assert not any("crf" in name for name, _ in other.named_parameters()), "no weights that nothing trains"
    own = [*reversed(LABELS[:5]), *LABELS[5:]]
    assert intent_slots.Task.in_order(both.facts, own)["labels"] == own
    assert intent_slots.Task.in_order(both.facts, LABELS[::-1])["labels"] == LABELS, "tags stand before intents"


def tagging_task(directory):
    rows = [{"text": row["tokens"], "label": row["slots"]} for row in ROWS]
    config = tagging.Config(type="tagging", crf=True)
    return tagging.Task(config, tagging.Task.learn(config, rows), tiny_tokenizer(directory), 32)


@pytest.mark.parametrize(
    ("rows", "section", "message"),
    [
        (
            [{**row, "intent": "ask"} for row in ROWS],
            {},
            "column 'intent' holds only the intent .'ask'.: two are needed at least",
        ),
        ([{**row, "slots": ["O"] * len(row["slots"])} for row in ROWS], {}, "column 'slots' holds no entity"),
        ([{**row, "slots": ["DET"] * len(row["slots"])} for row in ROWS], {}, "column 'slots' holds tags that mark no slots"),
        (ROWS, {"scheme": "none"}, "column 'slots' holds tags that mark no slots, as B-city"),
        (ROWS, {"intent_names": {"aks": "x"}}, "task.intent_names: 'aks' is no intent of column 'intent': did you mean 'ask'"),
        ([{**row, "intent": str(n / 7)} for n, row in enumerate(ROWS * 9)], {}, "regression"),
        ([*ROWS, PlacedRow({**ROWS[1], "slots": ["O", "O"]}, "train", 4)], {}, "train:4: has 1 words and 2 tags"),
    ],
)
def test_rows_that_cannot_be_learnt_are_refused_in_a_line(tmp_path, rows, section, message):
    with pytest.raises(UserError, match=message) as error:
        task_of(tmp_path, rows, **section)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intent": "aks"}, "intent 'aks' is none of the training rows: did you mean 'ask'"),
        ({"slots": ["B-GPE"]}, "tag 'B-GPE' is none of the training rows"),
    ],
)
def test_what_only_held_out_rows_have_is_named_or_not_learnt(tmp_path, change, message):
    row = PlacedRow({**ROWS[1], **change}, "test", 9)
    with pytest.raises(UserError, match=f"^test:9: {message}"):
        task_of(tmp_path).encode([row])
    task = task_of(tmp_path, unseen="miss")
    ordinary, missed = task.encode([ROWS[1], row])
    assert (ordinary["label"], ordinary["intent"], missed["label"], missed["intent"]) == ([0], 1, [-100], -100)
    assert row["intent"] == change.get("intent", "tell"), "it is judged by what it says"


def test_a_family_without_a_token_for_the_sentence_answers_a_row_alone_as_among_longer_ones(tmp_path):
    path = write_family(tmp_path / "model", "gpt2")
    config = config_of(crf=True)
    task = intent_slots.Task(config, intent_slots.Task.learn(config, ROWS), load_tokenizer(path), 24)
    torch.manual_seed(0)
    model, _ = load_fitting(path, task)
    run = torch_run(model.eval(), task)
    together = task.answers.answer(run, ROWS)
    for row, answer in zip(ROWS, together, strict=True):
        (alone,) = task.answers.answer(run, [row])
        assert alone["intent"] == answer["intent"] and alone["score"] == pytest.approx(answer["score"], abs=1e-5)
    assert len({answer["score"] for answer in together}) == 3, "the intent is read off the words"
