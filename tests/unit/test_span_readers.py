"""Readers of words in columns and of spans: what they see in a file, say of it, and refuse."""

import json

import pytest

from engine.data.readers import FormatConfig, find_layout
from engine.errors import UserError

IOB1 = "-DOCSTART- -X- -X- O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\n-DOCSTART- -X- -X- O\n\nPeter NNP I-NP I-PER\n\n"


def read(path, text, **options):
    """Writes a file and returns (its layout, [(line, row)])."""
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    layout = find_layout(path, FormatConfig(**options))
    return layout, list(layout.rows())


def refused(path, text, **options):
    with pytest.raises(UserError) as error:
        read(path, text, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sentences_are_lists_of_each_column_between_blank_lines_and_documents_are_counted(tmp_path):
    layout, rows = read(tmp_path / "eng.train.txt", IOB1)
    assert layout.describe == "CoNLL with spaces, columns text, 2, 3, label, tags in iob1, utf-8"
    assert rows == [
        (3, {"text": ["EU", "rejects"], "2": ["NNP", "VBZ"], "3": ["I-NP", "I-VP"], "label": ["I-ORG", "O"], "document": 1}),
        (8, {"text": ["Peter"], "2": ["NNP"], "3": ["I-NP"], "label": ["I-PER"], "document": 2}),
    ]
    assert list(layout.rows(3)) == rows[:1], "the line of its last row says that it went as far as it was asked to"


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.conll", "a.tsv", "a.txt", "a.bio", "A.CONLL"])
def test_tabs_and_line_ends_and_extensions_of_all_kinds(tmp_path, name, ending):
    text = "New York\tB-LOC\n#winning\tO\n\n#\tO\nit\tO\n".replace("\n", ending)
    layout, rows = read(tmp_path / name, text)
    assert "with tabs" in layout.describe and "tags in bio" in layout.describe
    assert [row for _, row in rows] == [
        {"text": ["New York", "#winning"], "label": ["B-LOC", "O"]},
        {"text": ["#", "it"], "label": ["O", "O"]},
    ]
    assert [line for line, _ in rows] == [1, 4]


def test_comments_stand_before_sentences(tmp_path):
    _, rows = read(tmp_path / "a.conll", "# a comment of several words\n#\thttp://x\t[2009]\nBerlin B-LOC\n")
    assert [row for _, row in rows] == [{"text": ["Berlin"], "label": ["B-LOC"]}]


def test_columns_get_the_names_that_are_given(tmp_path):
    _, rows = read(tmp_path / "a.conll", "EU NNP O\n", header=["text", "pos", "ner"])
    assert rows == [(1, {"text": ["EU"], "pos": ["NNP"], "ner": ["O"]})]
    assert "columns of words have no line with their names" in refused(tmp_path / "a.conll", "EU NNP O\n", header=True)
    assert "header names 2 columns, and lines have 3" in refused(tmp_path / "a.conll", "EU NNP O\n", header=["text", "ner"])


def test_universal_dependencies_have_their_columns_and_their_words_only(tmp_path):
    def line(number, form, tag):
        return "\t".join([number, form, form.lower(), tag, "_", "_", "0", "root", "_", "_"])

    text = "\n".join(
        ["# sent_id = 1", line("1-2", "im", "_"), line("1", "in", "ADP"), line("2", "dem", "DET"), line("2.1", "x", "X"), ""]
    )
    _, rows = read(tmp_path / "a.conllu", text)
    assert [(row["text"], row["upos"]) for _, row in rows] == [(["in", "dem"], ["ADP", "DET"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("EU B-ORG\nrejects\n", "a.conll:2: 1 columns where there should be 2"),
        ("EU\tB-ORG\n\tO\n", "a.conll:2: column 'text' is empty"),
    ],
)
def test_lines_that_are_no_words_are_named(tmp_path, text, message):
    assert message in refused(tmp_path / "a.conll", text)


@pytest.mark.parametrize("text", ["good film\nbad film\n", "a b c\nd e f\n\n", "__label__x a b\n"])
def test_plain_text_is_not_taken_for_columns(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert find_layout(path).NAME in ("lines", "fasttext")


def test_a_table_is_not_taken_for_columns_of_words(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("sentence\tlabel\na good film\t1\na bad one\t0\n")
    assert find_layout(path).NAME == "csv"


CLUE = {"text": "浙商银行企业信贷部叶老桂", "label": {"name": {"叶老桂": [[9, 11]]}, "company": {"浙商银行": [[0, 3]]}}}


def test_cluener_counts_the_last_character_too(tmp_path):
    layout, rows = read(tmp_path / "train.json", CLUE)
    assert layout.describe == "CLUENER's JSON lines (last characters included), utf-8"
    (line, row) = rows[0]
    assert (line, row["label"]) == (1, [[0, 4, "company"], [9, 12, "name"]])
    assert [row["text"][start:end] for start, end, _ in row["label"]] == ["浙商银行", "叶老桂"]


def test_an_entity_that_does_not_stand_where_its_place_says_is_named(tmp_path):
    wrong = {**CLUE, "label": {"name": {"叶老桂": [[8, 10]]}}}
    message = refused(tmp_path / "a.jsonl", "\n".join([json.dumps(CLUE), json.dumps(wrong)]))
    assert "a.jsonl:2: '叶老桂' (name) does not stand at 8 to 10: '部叶老' does" in message
    wrong["label"] = {"name": [[1, 2]]}
    assert "a.jsonl:2: the entities of 'name' have no lists" in refused(
        tmp_path / "a.jsonl", "\n".join([json.dumps(CLUE), json.dumps(wrong)])
    )


@pytest.mark.parametrize(
    "row",
    [
        {"id": 1, "text": "Berlin", "label": [[0, 6, "LOC"]]},
        {"id": 1, "data": "Berlin", "labels": [[0, 6, "LOC"]]},
        {"id": 1, "text": "Berlin", "entities": [{"id": 3, "label": "LOC", "start_offset": 0, "end_offset": 6}], "relations": []},
    ],
)
def test_doccanos_exports_of_all_versions_have_the_same_columns(tmp_path, row):
    layout, rows = read(tmp_path / "all.jsonl", row)
    assert layout.describe == "doccano's JSON lines with spans, utf-8"
    assert rows[0][1]["text"] == "Berlin" and rows[0][1]["label"]


def task_of(*spans, **more):
    results = [
        {"type": "labels", "from_name": "l", "to_name": "t", "value": {"start": s, "end": e, "text": "", "labels": [kind]}}
        for s, e, kind in spans
    ]
    return {"id": 1, "data": {"text": "Berlin is large"}, "annotations": [{"result": results, **more}]}


def test_label_studios_export_gives_the_newest_annotation(tmp_path):
    task = task_of((0, 6, "LOC"), updated_at="2024-01-01")
    task["annotations"] += task_of((7, 9, "X"), updated_at="2024-02-02", was_cancelled=True)["annotations"]
    task["annotations"] += task_of((10, 15, "Y"), updated_at="2023-01-01")["annotations"]
    task["annotations"][0]["result"].append({"type": "choices", "value": {"choices": ["ok"]}})
    layout, rows = read(tmp_path / "project.json", [task, {**task, "annotations": []}])
    assert layout.describe == "Label Studio's export, utf-8"
    assert rows[0][1] == {"id": 1, "text": "Berlin is large", "label": [[0, 6, "LOC"]]}
    assert "label" not in rows[1][1]


def test_label_studios_small_export_is_read_too(tmp_path):
    small = [{"id": 1, "text": "Berlin", "ner": [{"start": 0, "end": 6, "text": "Berlin", "labels": ["LOC"]}], "annotator": 1}]
    _, rows = read(tmp_path / "min.json", small)
    assert rows[0][1] == {"id": 1, "text": "Berlin", "annotator": 1, "label": [[0, 6, "LOC"]]}


def test_a_span_with_two_labels_is_named(tmp_path):
    task = task_of((0, 6, "LOC"))
    task["annotations"][0]["result"][0]["value"]["labels"].append("GPE")
    assert "project.json:1: a span has the labels ['LOC', 'GPE']" in refused(tmp_path / "project.json", [task])


@pytest.mark.parametrize(
    "row", [{"text": "a", "label": "x"}, {"text": "a", "label": ["x", "y"]}, {"text": "a", "label": {"a": 1}}]
)
def test_other_json_is_read_as_before(tmp_path, row):
    layout, rows = read(tmp_path / "a.jsonl", row)
    assert layout.NAME == "jsonl" and rows == [(1, row)]


def test_numbers_of_tags_in_lists_become_their_names(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    tags = datasets.ClassLabel(names=["O", "B-LOC"])
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": datasets.Sequence(tags)})
    made = datasets.Dataset.from_dict({"tokens": [["in", "Berlin"]], "ner_tags": [[0, 1]]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "a.parquet")
    for source in (tmp_path / "saved", tmp_path / "a.parquet"):
        assert [row for _, row in find_layout(source).rows()] == [{"tokens": ["in", "Berlin"], "ner_tags": ["O", "B-LOC"]}]


def write_aligned(directory, words="play it\n\nlet it be\n", tags="O B-x\n\nB-x I-x I-x\n", label="play\n\nstop#play"):
    """A directory as ATIS and SNIPS come; None leaves a file out."""
    directory.mkdir(exist_ok=True)
    for name, text in (("seq.in", words), ("seq.out", tags), ("label", label)):
        if text is not None:
            (directory / name).write_text(text)
    return directory


def test_words_tags_and_intents_lie_in_three_files_of_a_directory(tmp_path):
    layout = find_layout(write_aligned(tmp_path / "train"))
    assert (
        layout.describe == "line-aligned text: tokens from seq.in (utf-8), slots from seq.out (utf-8), intent from label (utf-8)"
    )
    assert list(layout.rows()) == [
        (1, {"tokens": ["play", "it"], "slots": ["O", "B-x"], "intent": "play"}),
        (3, {"tokens": ["let", "it", "be"], "slots": ["B-x", "I-x", "I-x"], "intent": "stop#play"}),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, "label: no such file: seq.in, seq.out, label belong together line by line"),
        ({"label": "play\n"}, "label:1: ends here, but {0}/seq.in goes on: line by line they must belong together"),
        ({"words": "play it\n"}, "seq.in:1: ends here, but {0}/seq.out goes on: line by line they must belong together"),
        ({"tags": "O B-x\n\nB-x I-x\n"}, "seq.out:3: 2 tags for the 3 words in seq.in"),
    ],
)
def test_files_that_do_not_belong_together_are_refused_with_file_and_line(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        list(find_layout(write_aligned(tmp_path / "train", **changes)).rows())
    assert str(error.value) == f"{tmp_path / 'train'}/{message.format(tmp_path / 'train')}"


def test_such_a_directory_has_no_other_format(tmp_path):
    for options, message in (
        ({"format": "csv"}, "format: csv: a directory with seq.in"),
        ({"split": "train"}, "split means nothing"),
    ):
        with pytest.raises(UserError, match=message):
            find_layout(write_aligned(tmp_path / "train"), FormatConfig(**options))
