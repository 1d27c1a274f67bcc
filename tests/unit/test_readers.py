"""Readers: whatever layout a file has, its rows come out, and what cannot be read is named with file and line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.data.readers import FormatConfig, find_layout
from engine.data.readers.json_array import PIECE
from engine.errors import UserError

PEOPLE = [
    {"text": "Ein schöner Film; très bon, überraschend", "label": "positive"},
    {"text": "Langweilig, öde und viel zu lang", "label": "negative"},
]
PROPERTY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def rows_of(path, **options):
    return [row for _, row in find_layout(path, FormatConfig(**options)).rows()]


def refused(path, **options):
    with pytest.raises(UserError) as error:
        rows_of(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def table(rows, delimiter=",", **dialect):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# Delimited text.


@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=8),
    delimiter=st.sampled_from(",;|"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
)
@PROPERTY
def test_a_csv_file_gives_back_what_was_written_whatever_its_delimiter_and_encoding(tmp_path, rows, delimiter, encoding):
    named = [{"text": row[0], "label": row[1], "source": row[2]} for row in rows]
    path = write(tmp_path / "rows.csv", table(named, delimiter, quoting=csv.QUOTE_ALL), encoding)
    assert rows_of(path) == named


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_delimiter_and_encoding_are_detected_and_said(tmp_path, delimiter, encoding):
    layout = find_layout(write(tmp_path / "ROWS.CSV", table(PEOPLE, delimiter), encoding))
    assert [row for _, row in layout.rows()] == PEOPLE
    assert {"\t": "tab"}.get(delimiter, repr(delimiter)) in layout.describe
    assert "header" in layout.describe
    assert encoding in layout.describe


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Un film très réussi – drôle et “émouvant” à la fois, où tout est léger, même la fin qu’on n’espérait guère"),
        ("latin-1", "Una película muy divertida, ¡qué corazón! El guión no tiene ningún interés, añadió"),
        ("cp1250", "Wspaniały film, piękne zdjęcia i świetna muzyka, szkoda że źle zagrany"),
        ("cp1251", "Отличный фильм с прекрасной музыкой, а вот конец скучный"),
        ("gb18030", "这部电影很好看, 音乐也很美, 但是结尾不好"),
    ],
)
def test_another_encoding_is_guessed_and_the_guess_is_said(tmp_path, encoding, text):
    pytest.importorskip("chardet")
    layout = find_layout(write(tmp_path / "rows.csv", table([{"text": text, "label": "x"}], ";"), encoding))
    assert [row["text"] for _, row in layout.rows()] == [text]
    assert "(guessed: set encoding to overrule it)" in layout.describe


def test_an_encoding_that_is_named_is_taken(tmp_path):
    path = write(tmp_path / "rows.csv", table(PEOPLE), "cp1252")
    assert rows_of(path, encoding="cp1252") == PEOPLE
    assert rows_of(path, encoding="cp1251") != PEOPLE
    assert rows_of(write(path, table(PEOPLE), "utf-8-sig"), encoding="utf-8") == PEOPLE


def test_quotes_escaped_by_backslashes_are_read(tmp_path):
    text = 'text,label\n"plain, one",x\n"he said \\"hi, there\\", twice",y\n'
    layout = find_layout(write(tmp_path / "rows.csv", text))
    assert [row["text"] for _, row in layout.rows()] == ["plain, one", 'he said "hi, there", twice']
    assert "backslash before quotes" in layout.describe


def test_quotes_are_plain_characters_in_a_tsv_unless_they_are_seen_to_quote(tmp_path):
    plain = write(tmp_path / "glue.tsv", 'sentence\tlabel\n"Batman" is dark\t1\nhe said "no\t0\n"alone"\t1\n')
    assert [row["sentence"] for row in rows_of(plain)] == ['"Batman" is dark', 'he said "no', '"alone"']
    cells = [{"text": 'he said "hi"\tand left', "label": "1"}, {"text": "plain", "label": "0"}]
    quoted = write(tmp_path / "pandas.tsv", table(cells, "\t"))
    assert rows_of(quoted) == cells
    assert rows_of(plain, quoting="none")[0]["sentence"] == '"Batman" is dark'


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("text,label\na,b\n", ["text", "label"]),
        ("a film,1\na plot,0\n", ["1", "2"]),
        ("gj04,1,,Our friends\ngj05,0,*,One more\n", ["1", "2", "3", "4"]),
        ("0,1\na film,1\n", ["0", "1"]),  # how pandas writes columns that have no names
        (",text\n0,a\n", ["", "text"]),
        ("text\na\n", ["text"]),
    ],
)
def test_a_first_line_with_numbers_in_it_is_a_row(tmp_path, text, columns):
    path = write(tmp_path / "rows.csv", text)
    assert list(rows_of(path)[0]) == columns
    named = any(column not in ("1", "2", "3", "4") for column in columns)
    assert ("no header (columns 1 to" in find_layout(path).describe) is not named


def test_a_header_can_be_given_or_denied(tmp_path):
    path = write(tmp_path / "rows.csv", "good,film\nbad,plot\n")
    assert rows_of(path, header=False) == [{"1": "good", "2": "film"}, {"1": "bad", "2": "plot"}]
    assert rows_of(path, header=["label", "text"])[0] == {"label": "good", "text": "film"}
    assert rows_of(write(path, "2019,2020\n1,2\n"), header=True) == [{"2019": "1", "2020": "2"}]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_a_cell_of_200_kilobytes_is_read(tmp_path, suffix):
    text = "word " * 40_000
    written = {"csv": f'text,label\n"{text}",x\n', "jsonl": json.dumps({"text": text}), "json": json.dumps([{"text": text}])}
    assert rows_of(write(tmp_path / f"rows.{suffix}", written[suffix]))[0]["text"] == text


# JSON, plain text, fastText.


@given(
    st.lists(st.dictionaries(CELLS, CELLS | st.integers() | st.none() | st.lists(CELLS), max_size=3), max_size=5), st.booleans()
)
@PROPERTY
def test_json_lines_and_an_array_hold_the_same_rows(tmp_path, rows, indented):
    lines = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    array = write(tmp_path / "rows.json", json.dumps(rows, indent=1 if indented else None, ensure_ascii=False))
    assert rows_of(lines) == rows_of(array) == rows


def test_an_array_is_read_piece_by_piece_with_the_line_on_which_each_row_begins(tmp_path):
    rows = [{"text": "ä" * (PIECE // 3), "number": number} for number in range(10)]
    path = write(tmp_path / "rows.json", json.dumps(rows, indent=1))
    found = list(find_layout(path).rows())
    assert [row for _, row in found] == rows
    assert [line for line, _ in found] == [2 + 4 * number for number in range(10)]
    assert [line for line, _ in find_layout(path).rows(lines=6)] == [2, 6]


def test_json_is_recognised_by_its_first_character_whatever_the_extension(tmp_path):
    assert rows_of(write(tmp_path / "a.jsonl", '[{"text": "a"}]')) == [{"text": "a"}]
    assert rows_of(write(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n')) == [{"text": "a"}, {"text": "b"}]


def test_fasttext_has_one_label_several_or_none(tmp_path):
    path = write(tmp_path / "train.txt", "__label__a good film\n__label__a __label__b  dull, but warm\nno label\n")
    assert rows_of(path) == [
        {"text": "good film", "label": "a"},
        {"text": "dull, but warm", "label": ["a", "b"]},
        {"text": "no label", "label": []},
    ]


def test_a_text_file_has_a_row_a_line(tmp_path):
    path = write(tmp_path / "rows.txt", " one \n\n__label__ is a word here\n")
    assert list(find_layout(path).rows()) == [(1, {"text": "one"}), (3, {"text": "__label__ is a word here"})]


def test_line_aligned_files_make_rows_together(tmp_path):
    files = {"source": write(tmp_path / "a.en", "one\n\ntwo\n"), "target": write(tmp_path / "a.de", "eins\n\nzwei\n", "utf-16")}
    layout = find_layout(files)
    assert list(layout.rows()) == [(1, {"source": "one", "target": "eins"}), (3, {"source": "two", "target": "zwei"})]
    assert layout.describe == "line-aligned text: source from a.en (utf-8), target from a.de (utf-16)"
    write(files["target"], "eins\n\n")
    with pytest.raises(UserError, match=r"a.de:2: ends here, but .*a.en goes on"):
        list(find_layout(files).rows())


# Compression.


def zstd(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


COMPRESS = {
    "gz": gzip.compress,
    "BZ2": lambda data: bz2.compress(data, 1),  # blocks of 100 kB
    "xz": lambda data: lzma.compress(data, preset=0),
    "zst": zstd,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_is_read_as_what_it_holds(tmp_path, suffix):
    path = tmp_path / f"rows.CSV.{suffix}"
    data = table(PEOPLE).encode()
    path.write_bytes(COMPRESS[suffix](data))
    assert rows_of(path) == PEOPLE
    path.write_bytes(COMPRESS[suffix](data[:20]) + COMPRESS[suffix](data[20:]))
    assert rows_of(path) == PEOPLE, "several streams, one after the other"


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_compressed_file_that_is_damaged_is_named_with_the_line_reached(tmp_path, suffix, damage):
    text = "".join(json.dumps({"text": f"row {hash((number, 'salt'))}"}) + "\n" for number in range(20_000))
    data = COMPRESS[suffix](text.encode())
    middle = len(data) // 2
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(data[:middle] if damage == "cut" else data[:middle] + b"\x55" * 100 + data[middle + 100 :])
    message = refused(path)
    found = re.fullmatch(
        rf"{re.escape(str(path))}:(\d+): cannot be read: the compressed file is damaged.*: fetch it again", message
    )
    assert found, message
    assert 1000 < int(found[1]) < 19_000


def test_a_missing_package_for_zst_is_named(tmp_path, monkeypatch):
    (tmp_path / "rows.csv.zst").write_bytes(b"\x28\xb5\x2f\xfd" + b"\x00" * 8)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install zstandard" in refused(tmp_path / "rows.csv.zst")


# Binary formats.


def test_parquet_gives_rows_and_names_of_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    data.to_parquet(tmp_path / "rows.PARQUET")
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "several")
    rows = [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}, {"text": "c", "label": None}]
    assert list(find_layout(tmp_path / "rows.PARQUET").rows()) == list(enumerate(rows, 1))
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "several") == rows
    assert rows_of(tmp_path / "several", split="test") == rows[:1]
    assert "no split 'tset': did you mean 'test'?" in refused(tmp_path / "several", split="tset")
    assert (
        len(list(find_layout(tmp_path / "one").rows(lines=2))) == len(list(find_layout(tmp_path / "rows.PARQUET").rows(2))) == 2
    )


def test_a_data_set_of_the_hub_is_asked_for_by_name_subset_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows_of("hub:nyu-mll/glue", subset="sst2", split="validation") == [{"text": "a"}]
    assert asked == [("nyu-mll/glue", "sst2", "validation")]


def test_a_damaged_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing else")
    assert re.match(r".*rows.parquet: cannot be read as Parquet: ", refused(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("name", ["rows.parquet", "hub:owner/name"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name):
    (tmp_path / "rows.parquet").touch()
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'bothways[data]'" in refused(name if name.startswith("hub") else tmp_path / name)


# What is refused.


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,label,text\na,b,c\n", r"a.csv:1: two columns are called 'text', and only one could be read"),
        ("a.csv", "text,label\na,b\na,b,c\n", r"a.csv:3: 3 columns where the header has 2"),
        ("a.csv", "text;label\na;b\na;b;c\n", r"a.csv:3: 3 columns where the header has 2"),
        ("a.csv", 'text,label\n"a,b\n', r"a.csv:2: cannot be read as CSV with ',', header, utf-8: .*: mend the quotes, or set"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', r"a.jsonl:2: the key 'a' comes twice in one object"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a.jsonl:2: a row must be a JSON object, not list"),
        ("a.jsonl", '{"a": 1}\n\n{"a": }\n', r"a.jsonl:3: not valid JSON: Expecting value at column 7"),
        ("a.jsonl", '{"a": 1}\n{"a": "\\ud83d"}\n', r"a.jsonl:2: \\ud83d is half a character \(a lone surrogate\)"),
        ("a.jsonl", '{"a": 1}\n{"a": {"b": ["\\uDE00 x"]}}\n', r"a.jsonl:2: \\ude00 is half a character"),
        ("a.json", '[{"a": 1},\n{"a": "\\ud83d"}]\n', r"a.json:2: \\ud83d is half a character"),
        ("a.json", '[{"a": 1},\n{"a": 2}\n{"a": 3}]\n', r"a.json:3: not valid JSON: a comma or \] is missing"),
        ("a.json", '[{"a": 1},\n{"a": 2},\n{"a" 3}]\n', r"a.json:3: not valid JSON: Expecting ':'"),
        ("a.json", '[{"a": 1},\n{"a": 2}\n', r"a.json:3: the array is cut short"),
        ("a.json", '[{"a": 1},\n2]\n', r"a.json:2: a row must be a JSON object, not int"),
        ("a.csv", "a\x01\x00b\x00" * 9, r"a.csv: not a text file \(it holds zero bytes\)"),
        ("a.xlsx", "a", r"a.xlsx: unknown format '.xlsx': name it \(format: csv, …\), or use one of .*\.csv, "),
        ("a.zip", "a", r"a.zip: unknown format '.zip': unpack it"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_file_and_line(tmp_path, name, text, message):
    assert re.search(message, refused(write(tmp_path / name, text)))


def test_half_a_character_is_no_lone_surrogate_when_its_other_half_follows(tmp_path):
    assert rows_of(write(tmp_path / "a.jsonl", '{"a": "\\ud83d\\ude00"}\n')) == [{"a": "😀"}]


def test_a_byte_that_is_not_utf8_far_down_is_named_with_its_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,label\n" + b"a plain row,x\n" * 40_000 + b"caf\xe9,x\n" + b"a plain row,x\n" * 1000)
    assert re.search(r"rows.csv:40002: byte 0xe9 is not utf-8 .*: save it as UTF-8, or set encoding", refused(path))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.jsonl", {"delimiter": ";"}, "delimiter means nothing to the format jsonl"),
        ("a.txt", {"header": True}, "header means nothing to the format lines"),
        ("a.csv", {"split": "test"}, "split means nothing to the format csv"),
    ],
)
def test_an_option_that_the_format_does_not_have_is_refused(tmp_path, name, options, message):
    assert message in refused(write(tmp_path / name, "{}"), **options)


@pytest.mark.parametrize("options", [{"delimiter": ",,"}, {"delimiter": '"'}, {"encoding": "utf-9"}, {"format": "xml"}])
def test_an_option_that_makes_no_sense_is_refused(options):
    with pytest.raises(ValidationError):
        FormatConfig(**options)


def test_a_format_that_is_named_is_taken_whatever_the_extension(tmp_path):
    path = write(tmp_path / "rows.data", "text\tlabel\na\tb\n")
    assert rows_of(path, format="csv") == [{"text": "a", "label": "b"}]
    assert rows_of(path, format="lines")[0] == {"text": "text\tlabel"}
