"""The nine tasks of GLUE: their files as they are, the recipes, and the files that GLUE takes for submission."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.answers import answering
from engine.config import load_recipe
from engine.data.sources import SourceConfig, SourceRows
from engine.data.splits import load_splits
from engine.errors import UserError
from launch.check import check_recipe
from launch.predict import predict
from launch.recipe import load_stages
from tests.recipes import write_model

RECIPES = Path(__file__).parents[2] / "recipes" / "glue"
WORDS = ["the", "film", "was", "good", "bad", "story", "and", "cold", "warm", "long"]


def text(number):
    return " ".join(WORDS[(number * step + number // 7) % len(WORDS)] for step in (1, 3, 7, 9)) + f" {number}"


def tsv(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")


def table(header, row, count, start=0):
    return [header, *(row(start + number) for number in range(count))]


def yes_no(number):
    return str(number % 2)


def entailed(number):
    return ["entailment", "not_entailment"][number % 2]


def three(number):
    return ["contradiction", "entailment", "neutral"][number % 3]


def write_glue(root):
    """Writes files as the download of GLUE has them: columns, quotes that are text, broken lines, no header in CoLA."""
    for split, count in (("train", 90), ("dev", 20)):
        name = f"{split}.tsv"
        tsv(root / "CoLA" / name, [["gj04", yes_no(n), "" if n % 2 else "*", text(n)] for n in range(count)])
        tsv(root / "SST-2" / name, table(["sentence", "label"], lambda n: [f'{text(n)} "so', yes_no(n)], count))
        mrpc = ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        tsv(root / "MRPC" / name, table(mrpc, lambda n: [yes_no(n), "1", "2", f'"{text(n)}', text(n + 1)], count))
        qqp = table(
            ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            lambda n: [str(n), "1", "2", f'"""{text(n)}""?', text(n + 2), yes_no(n)],
            count,
        )
        tsv(root / "QQP" / name, [*qqp[:4], ["3", "1", "2", "what is"], ["broken"], *qqp[4:], ["9", "1", "2", "why", "", "0"]])
        stsb = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"]
        row = lambda n: [str(n), "news", "f", "2012", "1", *["none"] * 2, text(n), text(n + 1), f"{n % 11 / 2:.3f}"]  # noqa: E731
        tsv(root / "STS-B" / name, table(stsb, row, count))
        for folder, pair in (("QNLI", ["question", "sentence"]), ("RTE", ["sentence1", "sentence2"])):
            row = lambda n: [str(n), text(n), text(n + 1), entailed(n)]  # noqa: E731
            tsv(root / folder / name, table(["index", *pair, "label"], row, count))
        row = lambda n: [str(n), text(n), text(n + 1), yes_no(n)]  # noqa: E731
        tsv(root / "WNLI" / name, table(["index", "sentence1", "sentence2", "label"], row, count))
    front = ["index", "promptID", "pairID", "genre", "b1", "b2", "p1", "p2", "sentence1", "sentence2"]
    begin = lambda n: [str(n), "1", "2", "fiction", "x", "x", "x", "x", text(n), text(n + 1)]  # noqa: E731
    tsv(root / "MNLI" / "train.tsv", table([*front, "label1", "gold_label"], lambda n: [*begin(n), three(n), three(n)], 90))
    judges = [f"label{number}" for number in range(1, 6)]
    for name in ("dev_matched.tsv", "dev_mismatched.tsv"):
        tsv(root / "MNLI" / name, table([*front, *judges, "gold_label"], lambda n: [*begin(n), *[three(n)] * 6], 20))
    tsv(root / "CoLA" / "test.tsv", table(["index", "sentence"], lambda n: [str(n), text(n)], 7))
    tsv(root / "SST-2" / "test.tsv", table(["index", "sentence"], lambda n: [str(n), f'"{text(n)}'], 7))
    row = lambda n: [str(n), "1", "2", f'"{text(n)}', text(n + 1)]  # noqa: E731
    tsv(root / "MRPC" / "test.tsv", table(["index", *mrpc[1:]], row, 7))
    row = lambda n: [str(n), f'"""{text(n)}""?', text(n + 2) if n else ""]  # noqa: E731
    tsv(root / "QQP" / "test.tsv", table(["id", "question1", "question2"], row, 7))
    tsv(root / "STS-B" / "test.tsv", table(stsb[:-1], lambda n: [*[str(n)] * 7, text(n), text(n + 1)], 7))
    for name in ("test_matched.tsv", "test_mismatched.tsv"):
        tsv(root / "MNLI" / name, table(front, begin, 7))
    pairs = {"QNLI": ["question", "sentence"], "RTE": ["sentence1", "sentence2"], "WNLI": ["sentence1", "sentence2"]}
    for folder, pair in pairs.items():
        tsv(root / folder / "test.tsv", table(["index", *pair], lambda n: [str(n), text(n), text(n + 1)], 7))
    header = ["index", "sentence1", "sentence2"]
    tsv(root / "diagnostic" / "diagnostic.tsv", table(header, lambda n: [str(n), text(n), text(n + 1)], 7))


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """The recipes with made-up files and a tiny model beside them."""
    root = tmp_path_factory.mktemp("glue")
    for path in RECIPES.glob("*.yaml"):
        shutil.copy(path, root)
    write_glue(root / "glue_data")
    write_model(root / "model", max_position_embeddings=512)
    return root


NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def test_there_is_a_recipe_for_each_of_the_nine_tasks():
    assert NAMES == ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]


def recipe_of(glue, name):
    recipe = load_recipe(glue / f"{name}.yaml", ["teacher.model=model"])
    return recipe, load_stages(recipe)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_of_glue_is_ready_for_the_files_of_glue(glue, name):
    recipe, stages = recipe_of(glue, name)
    notes = []
    assert list(check_recipe(recipe, stages, say=notes.append)) == ["teacher", "int8", "engine"]
    assert all("quotes are plain characters" in note for note in notes if note.count("CSV"))


@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_glue_is_read_with_its_label_and_nothing_is_taken_for_a_quote(glue, name):
    recipe, stages = recipe_of(glue, name)
    task, data = stages[0].config.task, stages[0].config.data
    rows = load_splits(data, recipe, task.split_by, task.columns, task.classes_of)
    assert len(rows["train"]) + len(rows["validation"]) == 90
    assert len(rows["test"]) == (40 if name == "mnli" else 20)
    assert {len(row[task.text].split()) for row in rows["test"]} == {6 if name == "sst2" else 5}
    if name == "mnli":
        assert rows.sets == {"matched": 20, "mismatched": 20}
    if name == "qqp":
        assert any("2 lines with too few or too many cells left out" in note for note in rows.notes)
        assert any("1 rows without" in note for note in rows.notes)


def test_a_broken_line_is_refused_with_the_way_out_where_nothing_else_is_said(glue):
    source = SourceConfig(path="glue_data/QQP/dev.tsv", quoting="none")
    with pytest.raises(UserError, match=r"dev.tsv:5: 4 columns where the header has 6: mend it, or .*bad_lines: drop"):
        list(SourceRows(source, load_recipe(glue / "qqp.yaml"), {}))


class Engine:
    """What `predict` needs of a bundle: the task's own answering half, over numbers that follow from the texts."""

    def __init__(self, facts, tokenizer, outputs):
        self.answers = answering(facts["type"])(facts, tokenizer)
        self.outputs = outputs

    def predict(self, rows):
        def run(graph, arrays):
            ids_NL = arrays["input_ids"]
            return {"logits": np.stack([(ids_NL * (place + 3)).sum(axis=1) % 17 for place in range(self.outputs)], axis=1) - 8.0}

        return self.answers.answer(run, rows)


SUBMISSIONS = [
    # file of the submission, recipe, test file, fields, labels
    ("CoLA.tsv", "cola", "CoLA/test.tsv", "index,prediction=label", ["0", "1"]),
    ("SST-2.tsv", "sst2", "SST-2/test.tsv", "index,prediction=label", ["0", "1"]),
    ("MRPC.tsv", "mrpc", "MRPC/test.tsv", "index,prediction=label", ["0", "1"]),
    ("QQP.tsv", "qqp", "QQP/test.tsv", "index=id,prediction=label", ["0", "1"]),
    ("STS-B.tsv", "stsb", "STS-B/test.tsv", "index,prediction=values.score", None),
    ("MNLI-m.tsv", "mnli", "MNLI/test_matched.tsv", "index,prediction=label", ["contradiction", "entailment", "neutral"]),
    ("MNLI-mm.tsv", "mnli", "MNLI/test_mismatched.tsv", "index,prediction=label", ["contradiction", "entailment", "neutral"]),
    ("QNLI.tsv", "qnli", "QNLI/test.tsv", "index,prediction=label", ["entailment", "not_entailment"]),
    ("RTE.tsv", "rte", "RTE/test.tsv", "index,prediction=label", ["entailment", "not_entailment"]),
    ("WNLI.tsv", "wnli", "WNLI/test.tsv", "index,prediction=label", ["0", "1"]),
    ("AX.tsv", "mnli", "diagnostic/diagnostic.tsv", "index,prediction=label", ["contradiction", "entailment", "neutral"]),
]


def engine_of(glue, name, labels):
    from tokenizers import Tokenizer

    from engine.answers._texts import limit

    tokenizer = Tokenizer.from_file(str(glue / "model" / "tokenizer.json"))
    limit(tokenizer, 64, "[PAD]")
    learnt = {"labels": labels} if labels else {"mean": [2.5], "sd": [1.5]}
    config = recipe_of(glue, name)[1][0].config.task
    return Engine({**config.model_dump(mode="json"), **learnt}, tokenizer, len(labels or ["score"]))


@pytest.mark.parametrize(("file", "name", "source", "fields", "labels"), SUBMISSIONS, ids=[entry[0] for entry in SUBMISSIONS])
def test_a_submission_has_a_line_for_every_row_in_the_words_of_glue(glue, tmp_path, file, name, source, fields, labels):
    engine, options = engine_of(glue, name, labels), {"layout": ["quoting=none"], "empty": name == "qqp"}
    predict(engine, [], glue / "glue_data" / source, tmp_path / file, False, fields=fields, expected=7, **options)
    header, *lines = (tmp_path / file).read_text(encoding="utf-8").splitlines()
    assert header == "index\tprediction"
    index, given = zip(*(line.split("\t") for line in lines), strict=True)
    assert index == tuple(map(str, range(7)))
    if labels:
        assert set(given) <= set(labels)
    else:
        assert all(0 <= float(value) <= 5 for value in given)
        assert {0.0, 5.0} & set(map(float, given)), "without bounds some would lie outside"
    if name == "qqp":
        assert file == "QQP.tsv"
        with pytest.raises(UserError, match=r"test.tsv:2: no text in column 'question2': .*--empty"):
            predict(engine, [], glue / "glue_data" / source, tmp_path / "x.tsv", False, fields=fields, layout=["quoting=none"])
    with pytest.raises(UserError, match="7 rows, and --rows says 8"):
        predict(engine, [], glue / "glue_data" / source, tmp_path / "x.tsv", False, fields=fields, expected=8, **options)
    assert not (tmp_path / "x.tsv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"fields": "index,prediction=lable"},
            r"'lable' is no field of the answer \(label, score, scores, .*did you mean 'label'",
        ),
        ({"fields": "index,index=label"}, "write names that differ"),
        ({"fields": "index,=label"}, "write names that differ"),
        ({"fields": "index", "as_json": True}, "leave out --json"),
        ({"layout": ["quoting"]}, "--layout quoting: write it as key=value"),
        ({"layout": ["qouting=none"]}, "--layout: unknown key 'qouting': did you mean 'quoting'"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_leaves_no_file(glue, tmp_path, options, message):
    engine = engine_of(glue, "cola", ["0", "1"])
    given = {"as_json": False, **options}
    with pytest.raises(UserError, match=message) as error:
        predict(engine, [], glue / "glue_data/CoLA/test.tsv", tmp_path / "out.tsv", **given)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_table_may_hold_columns_numbers_and_every_score(glue, tmp_path):
    engine, source = engine_of(glue, "cola", ["0", "1"]), glue / "glue_data/CoLA/test.tsv"
    predict(engine, [], source, tmp_path / "out.csv", False, fields="row=#,sentence,p=scores.1,all=scores")
    header, first, *_ = (tmp_path / "out.csv").read_text().splitlines()
    assert header == "row,sentence,p,all"
    number, sentence, score, scores = first.split(",", 3)
    assert (number, sentence) == ("0", text(0))
    assert json.loads(scores.strip('"').replace('""', '"'))["1"] == pytest.approx(float(score), abs=1e-5)


def test_rows_and_layout_need_a_file(glue):
    with pytest.raises(UserError, match="give --input"):
        predict(engine_of(glue, "cola", ["0", "1"]), ["a film"], None, None, False, expected=1)
