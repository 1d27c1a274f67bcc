"""The tagging task: entities with the characters of the text as it was given, its loss, its figures, what it refuses."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.answers import RowError
from engine.answers._marks import listed
from engine.answers._schemes import OUTSIDE, Span, tags_of
from engine.data.sources import PlacedRow
from engine.errors import UserError
from engine.tasks import tagging
from tests.recipes import finetune_section, run_here, write_recipe, write_rows
from tests.unit.models import tiny_config, tiny_tokenizer

ROWS = [
    {"text": ["a", "good", "film", "with", "the", "actor"], "label": ["O", "B-WORK", "I-WORK", "O", "O", "B-PER"]},
    {"text": ["bad"], "label": ["O"]},
    {"text": ["the", "plot", "was", "very", "very", "dull"], "label": ["O", "B-WORK", "O", "O", "O", "O"]},
]


def tagging_task(directory, rows=ROWS, max_length=32, **section):
    config = tagging.Config(type="tagging", **section)
    return tagging.Task(config, tagging.Task.learn(config, rows), tiny_tokenizer(directory), max_length)


@pytest.fixture
def task(tmp_path):
    return tagging_task(tmp_path)


def tiny_tagger(task, **shape):
    """A model with random weights, loaded as the task's own."""
    from transformers import BertForTokenClassification

    from engine.models.heads import add_part

    torch.manual_seed(0)
    model = BertForTokenClassification(tiny_config(**task.settings(), initializer_range=0.5, **shape)).eval()
    add_part(model)
    return model


def gives(task, tags, sure=9.0):
    """A `run` that scores these tags of the words of some rows highest; rows have one window."""

    def run(graph, arrays):
        logits = np.zeros((*arrays["input_ids"].shape, len(task.answers.tags)), dtype=np.float32)
        for row, (encoded, own) in enumerate(zip(encodings, tags, strict=True)):
            for word, place in zip(encoded.word_V, encoded.position_V, strict=True):
                logits[row, place, task.number[own[word]]] = sure
        return {"logits": logits}

    encodings = []

    def answer(rows):
        encodings[:] = task.answers.encode(rows)
        return task.answers.answer(run, rows)

    return answer


TEXTS = st.text(st.sampled_from("film good the a 北京 e\u0301 👩‍🚀 \U0001d49c .,\u200b\u00a0é"), min_size=1, max_size=60)


@settings(max_examples=80, deadline=None)
@given(TEXTS, st.data())
def test_entities_are_the_characters_of_the_text_as_it_was_given(tmp_path_factory, text, data):
    task = tagging_task(tmp_path_factory.mktemp("task"), max_length=64)
    words = task.answers.words({"text": text})
    read = set(task.answers.encode([{"text": text}])[0].word_V.tolist())
    count, spans, at = len(words.places), [], 0
    while at < count:
        end = data.draw(st.integers(at + 1, count))
        if data.draw(st.booleans()) and all(index in read for index in range(at, end)):
            spans.append(Span(at, end, data.draw(st.sampled_from(["PER", "WORK"]))))
        at = end
    (answer,) = gives(task, [tags_of(spans, count, "bio")])([{"text": text}])
    expected = [(*words.place(first, end), kind) for first, end, kind in spans]
    if len(text) < 40:  # longer ones may need a second window, which this model does not have
        assert [(each["start"], each["end"], each["type"]) for each in answer["entities"]] == expected
    for each in answer["entities"]:
        assert each["text"] == text[each["start"] : each["end"]] == each["text"].strip()
    assert "".join(piece for piece, _ in task.answers.pieces(answer, {"text": text})) == text


def test_given_words_and_their_text_get_the_same_entities(task):
    words = ROWS[0]["text"]
    answers = gives(task, [ROWS[0]["label"]] * 2)([{"text": words}, {"text": " ".join(words)}])
    assert answers[0] == answers[1]
    assert [(each["text"], each["type"]) for each in answers[0]["entities"]] == [("good film", "WORK"), ("actor", "PER")]


def test_what_is_decoded_follows_the_scheme_even_where_the_best_tags_of_each_word_do_not(task):
    (answer,) = gives(task, [["O", "I-WORK", "I-WORK", "O", "O", "I-PER"]])([ROWS[0]])
    for each in answer["entities"]:
        assert each["type"] in ("WORK", "PER")
    (sure,) = gives(task, [ROWS[0]["label"]])([ROWS[0]])
    assert min(each["score"] for each in sure["entities"]) > 0.99


def test_a_text_that_fits_gets_the_answer_that_it_gets_without_windows(tmp_path):
    rows = [{"text": "the good film was very dull and the actor bad"}]
    short, long = (tagging_task(tmp_path / str(length), max_length=length) for length in (16, 64))
    model = tiny_tagger(short)

    def run(graph, arrays):
        with torch.no_grad():
            return {"logits": model(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits.numpy()}

    assert short.answers.answer(run, rows) == long.answers.answer(run, rows)
    assert len(short.answers.encode(rows)[0].windows) == 1


@pytest.mark.parametrize("crf", [False, True])
def test_every_word_of_a_long_row_is_learnt_once_and_all_windows_together_hold_the_row(tmp_path, crf):
    words = [word for row in ROWS for word in row["text"]] * 4
    tags = [tag for row in ROWS for tag in row["label"]] * 4
    task = tagging_task(tmp_path, max_length=10, stride=4, crf=crf)
    examples = task.encode([{"text": words, "label": tags}])
    assert len(examples) > 3 and task.windows == len(examples) - 1
    assert [task.answers.tags[tag] for example in examples for tag in example["label"]] == tags
    assert [example["whole"] for example in examples] == [[1, 0], *[[0, 0]] * (len(examples) - 2), [0, 1]]
    batch = task.collate(examples)
    assert task.count(batch) == int(task.sizes(batch).sum()) == len(words)
    total, count = task.loss(tiny_tagger(task), batch)
    assert torch.isfinite(total) and count == len(words)


@pytest.mark.parametrize("crf", [False, True])
def test_the_loss_of_a_batch_is_the_sum_of_its_rows_and_unlabelled_rows_enter_neither_sum_nor_count(tmp_path, crf):
    task = tagging_task(tmp_path, crf=crf)
    model, examples = tiny_tagger(task), task.encode([*ROWS, {"text": "a film"}])
    if crf:
        torch.nn.init.normal_(model.crf.weight, std=0.01)
    total, count = task.loss(model, task.collate(examples))
    each = [task.loss(model, task.collate([example])) for example in examples]
    torch.testing.assert_close(total, sum(own for own, _ in each))
    assert (int(count), [int(own) for _, own in each]) == (13, [6, 1, 6, 0])
    assert float(each[-1][0]) == 0.0


def test_the_loss_without_a_crf_is_hugging_faces_over_first_sub_words(task):
    model, examples = tiny_tagger(task), task.encode(ROWS)
    batch = task.collate(examples)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, example in enumerate(examples):
        labels[row, example["firsts"]] = torch.tensor(example["label"])
    theirs = model(**{name: batch[name] for name in task.inputs}, labels=labels)
    total, count = task.loss(model, batch)
    torch.testing.assert_close(total / count, theirs.loss)


@pytest.mark.parametrize("crf", [False, True])
def test_a_student_that_is_its_teacher_imitates_it_perfectly_and_padding_does_not_enter(tmp_path, crf):
    task = tagging_task(tmp_path, crf=crf)
    model, examples = tiny_tagger(task), task.encode(ROWS)

    def lesson(chosen, shift=0.0):
        batch = task.collate(chosen)
        outputs = task.named(task.forward(model, batch))
        outputs["logits"] = outputs["logits"] + shift * outputs["logits"].detach().cos()
        return task.lesson(outputs, batch, 2.0)

    same = lesson(examples)
    assert float(task.imitation(same, same, 2.0)) == pytest.approx(0.0, abs=1e-5)
    together = float(task.imitation(lesson(examples, 0.5), same, 2.0))
    alone = sum(float(task.imitation(lesson([each], 0.5), lesson([each]), 2.0)) for each in examples)
    assert together > 0.01 and together == pytest.approx(alone, rel=1e-4)


def test_figures_agree_with_seqeval_to_the_last_digit(tmp_path):
    seqeval = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed")
    rng = np.random.default_rng(0)
    task = tagging_task(tmp_path, max_length=64)
    rows, truth, predicted = [], [], []
    for _ in range(60):
        words = rng.choice(["a", "film", "good", "plot"], rng.integers(1, 12)).tolist()
        both = []
        for _ in range(2):
            spans, at = [], 0
            while (at := at + int(rng.integers(0, 3))) < len(words):
                spans.append(Span(at, end := min(len(words), at + int(rng.integers(1, 3))), str(rng.choice(["PER", "WORK"]))))
                at = end
            both.append(tags_of(spans, len(words), "bio"))
        if rng.random() < 0.5:
            both[1] = both[0]
        truth.append(both[0])
        predicted.append(both[1])
        rows.append({"text": words, "label": both[0]})
    answers = gives(task, predicted)(rows)
    metrics, table = task.answers.metrics(answers, rows), task.answers.table(answers, rows)
    for name, score in (("f1", seqeval.f1_score), ("precision", seqeval.precision_score), ("recall", seqeval.recall_score)):
        assert metrics[name] == pytest.approx(100 * score(truth, predicted), rel=1e-14)
    assert metrics["f1_macro"] == pytest.approx(100 * seqeval.f1_score(truth, predicted, average="macro"), rel=1e-14)
    report = seqeval.classification_report(truth, predicted, output_dict=True)
    for kind in ("PER", "WORK"):
        assert table[kind]["rows"] == report[kind]["support"]
        assert table[kind]["f1"] == pytest.approx(100 * report[kind]["f1-score"], rel=1e-14)


def test_an_entity_of_a_type_that_the_model_does_not_know_counts_as_missed(task):
    rows = [{"text": ["film"], "label": ["B-GPE"]}, ROWS[0]]
    metrics = task.answers.metrics(gives(task, [["O"], ROWS[0]["label"]])(rows), rows)
    assert metrics["precision"] == 100 and metrics["recall"] == pytest.approx(200 / 3)


def test_types_that_are_taken_for_each_other_and_the_worst_rows_are_told(task):
    answers = gives(task, [["O", "B-PER", "I-PER", "O", "B-PER", "O"], ["B-PER"], ROWS[2]["label"]])(ROWS)
    confused = task.answers.confusion(answers, ROWS)
    assert confused["labels"] == ["PER", "WORK", "(none)"]
    assert confused["counts"] == [[0, 2, 1], [1, 0, 1], [1, 1, 1], [2, 0, 2]]
    assert task.answers.wrongness(answers, ROWS).tolist() == [4, 1, 0]
    assert task.answers.agreement(answers, answers) == 1.0
    seen = task.answers.explained(answers[0], ROWS[0])
    assert seen["true"]["pieces"] == [("a ", None), ("good film", "WORK"), (" with the ", None), ("actor", "PER")]
    assert ("good film", "PER") in seen["answered"]["pieces"]
    record = json.loads(json.dumps(task.answers.record(answers[0], ROWS[0])))
    assert record["label"] == [[2, 11, "WORK"], [21, 26, "PER"]] and record["text"][21:26] == "actor"


POS = [{"text": ["a", "film"], "label": ["DET", "NOUN"]}, {"text": ["good", "film"], "label": ["ADJ", "NOUN"]}]


def test_tags_that_mark_no_entities_are_judged_word_by_word(tmp_path):
    task = tagging_task(tmp_path, POS)
    answers = gives(task, [["DET", "ADJ"], ["ADJ", "NOUN"]])(POS)
    assert task.answers.metric.name == "accuracy"
    assert task.answers.metrics(answers, POS)["accuracy"] == 75
    assert [entry["tag"] for entry in answers[0]["tags"]] == ["DET", "ADJ"]
    assert [(entry["start"], entry["end"]) for entry in answers[1]["tags"]] == [(0, 4), (5, 9)]
    assert task.answers.line(answers[0]) == "DET ADJ"


def test_a_word_of_which_the_tokenizer_makes_nothing_is_refused_or_skipped_and_moves_no_other(tmp_path):
    row = PlacedRow({"text": ["film", "\u200b", "plot"], "label": ["B-WORK", "O", "B-PER"]}, "rows.conll", 7)
    rows = [*ROWS, row]
    with pytest.raises(UserError, match=r"^rows.conll:7: word 2, '\\u200b', becomes no token of this tokenizer: .*task.unread"):
        tagging_task(tmp_path, rows).encode(rows)
    task = tagging_task(tmp_path, rows, unread="skip")
    example = task.encode(rows)[-1]
    assert [task.answers.tags[tag] for tag in example["label"]] == ["B-WORK", "B-PER"]
    (answer,) = gives(task, [row["label"]])([row])
    assert [each["text"] for each in answer["entities"]] == ["film", "plot"]


@pytest.mark.parametrize("text", ["", " ", "\u200b", []])
def test_a_text_without_words_has_no_entities(task, text):
    (answer,) = gives(task, [[OUTSIDE] * 3])([{"text": text}])
    assert answer == {"entities": []}


def test_a_text_of_a_hundred_thousand_characters_is_answered(tmp_path):
    task = tagging_task(tmp_path, max_length=64)
    text = "a good film " * 8500

    def run(graph, arrays):
        film = task.tokenizer.convert_tokens_to_ids("film")
        logits = np.zeros((*arrays["input_ids"].shape, len(task.answers.tags)), dtype=np.float32)
        logits[..., task.number["B-WORK"]] = np.where(arrays["input_ids"] == film, 5, -5)
        return {"logits": logits}

    (answer,) = task.answers.answer(run, [{"text": text}])
    assert len(answer["entities"]) == 8500
    assert {each["text"] for each in answer["entities"]} == {"film"}


def test_facts_come_back_from_a_models_configuration_and_a_strangers_model_is_read_by_its_tags(task):
    settings = task.settings()
    assert tagging.Task.recall(task.config, SimpleNamespace(**settings)) == task.facts
    labels = ["O", "B-PER", "E-PER", "I-PER", "S-PER"]
    model = SimpleNamespace(num_labels=5, id2label=dict(enumerate(labels)))
    assert tagging.Task.recall(task.config, model) == {"labels": labels, "marks": "bioes", "source": "bioes"}
    with pytest.raises(UserError, match=r"the model has no CRF: set task.crf: false"):
        tagging.Task.recall(tagging.Config(type="tagging", crf=True), model)


SPANS = [{"text": "a good film, bad", "label": [[2, 11, "WORK"]]}, {"text": "the actor", "label": []}]


def test_spans_of_characters_are_learnt_as_tags_of_the_words(tmp_path):
    task = tagging_task(tmp_path, SPANS, names={"WORK": "title"})
    assert task.facts == {"labels": ["O", "B-title", "I-title"], "marks": "bio", "source": "bio"}
    assert [task.answers.tags[tag] for tag in task.encode(SPANS)[0]["label"]] == ["O", "B-title", "I-title", "O", "O"]
    assert task.answers.truth(SPANS[0]) == [Span(2, 11, "title")]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([[2, 99, "WORK"]], "span 2 to 99 (WORK) lies outside of the text, which has 16 characters"),
        ([[-1, 3, "WORK"]], "lies outside of the text"),
        ([[5, 5, "WORK"]], "lies outside of the text"),
        ([[1, 2, "WORK"]], "holds no word"),
        ([[3, 11, "WORK"]], "'ood film', does not begin and end with words ('good film'): mend it, or"),
        ([[2, 12, "WORK"], [7, 11, "PER"]], "two spans share a word, 'good film,' (WORK) and 'film' (PER)"),
    ],
)
def test_spans_that_cannot_be_learnt_are_named_with_file_and_line(tmp_path, label, message):
    row = PlacedRow({"text": SPANS[0]["text"], "label": label}, "rows.jsonl", 3)
    with pytest.raises(UserError) as error:
        tagging_task(tmp_path, [*SPANS, row])
    assert str(error.value).startswith("rows.jsonl:3: ") and message in str(error.value) and "\n" not in str(error.value)


def test_spans_grow_to_words_and_the_longest_is_taken_where_the_section_says_so(tmp_path):
    rows = [{"text": SPANS[0]["text"], "label": [[3, 10, "WORK"], [7, 11, "PER"]]}]
    task = tagging_task(tmp_path, rows, borders="widen", overlaps="longest")
    assert [task.answers.tags[tag] for tag in task.encode(rows)[0]["label"]] == ["O", "B-WORK", "I-WORK", "O", "O"]
    assert set(task.answers.truth(rows[0])) == {Span(3, 10, "WORK"), Span(7, 11, "PER")}, "judged by what the data says"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ["a", "film"], "label": ["O"]}, "has 2 words and 1 tags"),
        ({"text": ["a", "film"], "label": ["O", "I-WORK"]}, "word 2, 'film': I-WORK stands behind O"),
        ({"text": ["a", "film"], "label": ["O", "NOUN"]}, "holds 'NOUN'|2 tags|'NOUN' is no tag"),
    ],
)
def test_tags_that_break_their_scheme_are_named_with_file_line_and_word(tmp_path, row, message):
    rows = [*ROWS, PlacedRow(row, "rows.conll", 12)]
    config = tagging.Config(type="tagging", scheme="bio")
    with pytest.raises(UserError, match=rf"^rows.conll:12: .*({message})"):
        config.check_rows(rows, complete=True)


@pytest.mark.parametrize(
    "value",
    [{"a": 1}, 3, [[1, 2]], [[1.5, 2, "x"]], [[0, 1, ["a", "b"]]], [{"start": 1, "end": 2}], [True], ["O", 1], [0, 5, "LOC"]],
)
def test_what_is_neither_tags_nor_spans_is_refused(value):
    with pytest.raises(ValueError, match="holds"):
        listed(value)


def test_spans_that_are_objects_and_tags_in_a_text_are_read():
    assert listed([{"start": 0, "end": 4, "labels": ["PER"]}, {"start_offset": 5, "end_offset": 6, "label": "X"}]) == [
        [0, 4, "PER"],
        [5, 6, "X"],
    ]
    assert listed("O B-LOC O") == ["O", "B-LOC", "O"]
    assert listed([0, 1]) == ["0", "1"]


def test_numbers_for_tags_need_names(tmp_path):
    rows = [{"text": ["a", "film"], "label": ["0", "1"]}]
    with pytest.raises(UserError, match="holds numbers for tags: name them"):
        tagging_task(tmp_path, rows)
    assert tagging_task(tmp_path, rows, names={"0": "O", "1": "B-WORK"}).facts["labels"] == ["O", "B-WORK", "I-WORK"]


def test_a_row_without_a_text_is_named_by_the_answering_half(task):
    with pytest.raises(RowError, match="a row has no 'text'"):
        task.answers.prepare([{"txt": "a"}])


def test_sections_that_do_not_go_together_are_one_line(tmp_path):
    with pytest.raises(UserError, match="windows of 32 tokens cannot share 40: stride must be below 30"):
        tagging_task(tmp_path, stride=40)
    with pytest.raises(UserError, match=re.escape("task.metric=accuracy: these tags mark entities: take f1 or f1_macro")):
        tagging_task(tmp_path, metric="accuracy")


def test_a_strangers_classifier_gets_a_new_head_and_a_new_crf(tmp_path):
    rows = [{"text": row["text"], "label": row["label"]} for row in ROWS] * 6
    section = finetune_section(task={"type": "tagging", "crf": True}, data={"train": "rows.jsonl", "validation": "val.jsonl"})
    recipe = write_recipe(tmp_path, {"teacher": {"finetune": section}})
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "val.jsonl", rows[:3])
    stage = run_here(recipe, "teacher", tmp_path / "runs", "teacher.train.steps=2")
    from engine.models import load_model

    model = load_model(stage.directory, "AutoModelForTokenClassification")
    assert model.config.id2label == {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-WORK", 4: "I-WORK"}
    assert model.crf.weight.shape == (7, 5) and model.crf.weight.abs().max() > 0
