"""The bundle: complete, unchanged and right, or refused with one line."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import engine.answers
from engine.answers._batches import batched
from engine.answers.classification import Answers
from engine.errors import UserError
from export.compress.quantize import quantize_embeddings, quantize_matmuls, watch_activations
from export.serving.bundle import Bundle, verify_bundle
from export.serving.golden import Golden
from export.serving.write import default_tolerance
from tests.unit.bundles import (
    BATCH,
    LABELS,
    LENGTH,
    TEXTS,
    copy_bundle,
    facts_of,
    make_bundle,
    relist,
    shared_bundle,
    torch_model,
)
from tests.unit.emulated import run_emulated
from tests.unit.models import classification_task

FILES = [
    "golden.jsonl",
    "manifest.json",
    "models/tiny/1/engine/__init__.py",
    *(f"models/tiny/1/engine/answers/{path.name}" for path in sorted(Path(engine.answers.__file__).parent.glob("*.py"))),
    "models/tiny/1/model.py",
    "models/tiny/1/task.json",
    "models/tiny/1/tokenizer.json",
    "models/tiny/config.pbtxt",
    "models/tiny/labels.txt",
    "models/tiny_core/1/model.onnx",
    "models/tiny_core/config.pbtxt",
    "models/tiny_core/labels.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return shared_bundle(tmp_path_factory)


@pytest.fixture
def copy(bundle, tmp_path):
    return copy_bundle(bundle, tmp_path / "copy")


def edit_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def logits_of(bundle, rows, size=None):
    """Returns the engine's logits in the order of the rows."""
    return batched(bundle.run, size or BATCH)("model", bundle.encode(rows))["logits"]


def refused(path, message):
    """Asserts that opening, and so predicting, serving and verifying, fails with one line."""
    with pytest.raises(UserError, match=message) as caught:
        Bundle.open(path)
    assert "\n" not in str(caught.value)


def test_a_bundle_holds_these_files_and_lists_all_but_its_manifest(bundle):
    present = sorted(str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file())
    assert present == FILES
    listed = json.loads((bundle / "manifest.json").read_text())["files"]
    assert sorted(listed) == sorted(set(FILES) - {"manifest.json"})


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, -2])
def test_one_flipped_bit_anywhere_is_refused(copy, name, place):
    data = bytearray((copy / name).read_bytes())
    data[place] ^= 0x01
    (copy / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        verify_bundle(copy)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    refused(copy, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(copy, name):
    (copy / name).unlink()
    refused(copy, name)


def test_a_file_that_the_manifest_does_not_list_is_refused_but_the_stage_record_is_not(copy):
    (copy / "stage.json").write_text("{}")
    verify_bundle(copy)
    (copy / "models" / "extra.py").write_text("")
    refused(copy, "models/extra.py: not listed")


@pytest.mark.parametrize("name", [".DS_Store", "models/Thumbs.db", "models/tiny/1/__pycache__/model.pyc", "notes/read me.txt"])
def test_what_a_copy_has_picked_up_is_refused_and_is_to_be_removed(copy, name):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("litter")
    refused(copy, "(not listed in|has no file of).*: no part of the bundle, remove it$")


@pytest.mark.parametrize("name", ["lost+found", "models/empty"])
def test_a_folder_that_no_listed_file_lies_in_is_refused_unread(copy, name):
    (copy / name).mkdir(mode=0)
    refused(copy, f"{re.escape(name)}: a folder that manifest.json has no file of: no part of the bundle, remove it")


def test_symbolic_links_are_refused_even_to_the_right_bytes(copy, tmp_path):
    (copy / "golden.jsonl").rename(tmp_path / "golden.jsonl")
    (copy / "golden.jsonl").symlink_to(tmp_path / "golden.jsonl")
    refused(copy, "golden.jsonl: a symbolic link")


def test_linked_directories_are_refused(copy, tmp_path):
    (copy / "tokenizer").rename(tmp_path / "tokenizer")
    (copy / "tokenizer").symlink_to(tmp_path / "tokenizer")
    refused(copy, "tokenizer: a symbolic link")


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "models/../../secret", "models//x", "./golden.jsonl", "a\\b", ""])
def test_a_path_that_leaves_the_bundle_is_refused(copy, path):
    entry = {"sha256": "0" * 64, "bytes": 0}
    edit_manifest(copy, lambda manifest: manifest["files"].update({path: entry}))
    refused(copy, "not a plain path inside the bundle")
    edit_manifest(copy, lambda manifest: manifest["files"].pop(path))
    edit_manifest(copy, lambda manifest: manifest["graphs"]["model"]["engines"].update(onnxruntime={"file": path}))
    refused(copy, "not a plain path inside the bundle")


def test_an_engine_file_must_be_listed(copy):
    edit_manifest(
        copy, lambda manifest: manifest["graphs"]["model"]["engines"].update(tensorrt={"file": "models/tiny_core/1/model.plan"})
    )
    refused(copy, "model.plan' is not among files")


@pytest.mark.parametrize("version", [1, "2", None, True])
def test_another_format_is_refused(copy, version):
    edit_manifest(copy, lambda manifest: manifest.update(format=version))
    refused(copy, "this version reads format 2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.pop("graphs"), "graphs: "),
        (lambda manifest: manifest.update(graphs={}), "graphs: "),
        (lambda manifest: manifest.update(graph={}), "unknown key 'graph': did you mean 'graphs'"),
        (lambda manifest: manifest["task"].update(type="no_such_task"), "no task 'no_such_task' is installed here"),
        (lambda manifest: manifest["task"].update(type="../classification"), "task.type: "),
        (lambda manifest: manifest["task"]["facts"].pop("labels"), "the facts of task 'classification' .* are damaged"),
        (lambda manifest: manifest.update(max_batch=0), "max_batch: "),
        (lambda manifest: manifest.update(name="../tiny"), "name: "),
        (lambda manifest: manifest["graphs"]["model"]["engines"].clear(), "no engine 'onnxruntime'"),
        (lambda manifest: manifest["graphs"]["model"]["engines"].update(os={"file": "golden.jsonl"}), "engines.os"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(copy, change, message):
    edit_manifest(copy, change)
    refused(copy, message)


def test_other_directories_are_not_bundles(tmp_path):
    refused(tmp_path / "nowhere", "no such bundle")
    refused(tmp_path, "not a bundle")


def test_unread_files_are_not_hashed_without_verify(copy):
    (copy / "golden.jsonl").write_text("{}\n")
    assert Bundle.open(copy, verify=False).predict([{"text": "bad"}])
    (copy / "tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: its SHA-256"):
        Bundle.open(copy, verify=False)


def test_golden_logits_of_another_engine_are_refused_though_every_hash_is_right(copy):
    rows = [json.loads(line) for line in (copy / "golden.jsonl").read_text().splitlines()]
    rows[3]["outputs"]["model/logits"][0] += 0.01
    (copy / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    relist(copy)
    with pytest.raises(UserError, match=r"model/logits differs from its golden values by 0\.01"):
        verify_bundle(copy)


@pytest.mark.parametrize("golden", ["", "{}\n", "nonsense\n", '{"row": {"text": "a"}, "outputs": {"model/logits": [[0.0]]}}\n'])
def test_golden_inputs_that_are_none_are_refused(copy, golden):
    (copy / "golden.jsonl").write_text(golden)
    relist(copy)
    with pytest.raises(UserError, match="no golden inputs with what the engines"):
        verify_bundle(copy)


def test_a_reference_that_disagrees_is_refused(copy):
    rows = [json.loads(line) for line in (copy / "golden.jsonl").read_text().splitlines()]
    for row in rows:
        row["reference"]["outputs"]["model/logits"] = [-value for value in row["outputs"]["model/logits"]]
        row["reference"]["answer"] = {**row["answer"], "label": "another"}
    (copy / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    relist(copy)
    with pytest.raises(UserError, match="differs from that of the fp32 model"):
        verify_bundle(copy)
    edit_manifest(copy, lambda manifest: manifest["tolerance"]["outputs"]["model/logits"].update(reference=1e9))
    with pytest.raises(UserError, match=r"only 0\.0% of the golden inputs get the answer of the fp32 model"):
        verify_bundle(copy)


class DependsOnTheBatch:
    """An engine with a fault that a single row never shows."""

    def __init__(self, engine, fault):
        self.engine, self.inputs, self.outputs, self.fault = engine, engine.inputs, engine.outputs, fault

    def run(self, arrays):
        moved = 0.1 if self.fault(arrays["attention_mask"]) else 0
        return {name: array + moved for name, array in self.engine.run(arrays).items()}


def test_logits_that_depend_on_the_batch_or_on_padding_are_refused(bundle):
    opened = Bundle.open(bundle)
    engine = opened.engines["model"]
    opened.engines["model"] = DependsOnTheBatch(engine, lambda mask: len(mask) > 1)
    with pytest.raises(UserError, match=r"neighbours in the batch by 0\.1"):
        opened.verify()
    opened.engines["model"] = DependsOnTheBatch(engine, lambda mask: mask.shape[1] == LENGTH)
    with pytest.raises(UserError, match=r"changes with padding by 0\.1"):
        opened.verify()


def test_a_broken_bound_names_the_cpu_that_the_bundle_was_exported_on(bundle, monkeypatch):
    opened = Bundle.open(bundle)
    opened.engines["model"] = DependsOnTheBatch(opened.engines["model"], lambda mask: True)
    with pytest.raises(UserError) as same:
        opened.verify()
    assert "this one has" not in str(same.value)
    monkeypatch.setattr("export.serving.bundle.instructions", lambda: ["AVX1"])
    with pytest.raises(UserError, match=r"exported on a CPU with .*; this one has AVX1\): install"):
        opened.verify()


@pytest.mark.parametrize("weights", ["portable", "8bit"])
def test_an_int8_bundle_passes_its_golden_checks_on_a_cpu_without_vnni(bundle, tmp_path, weights):
    work = tmp_path / "work"
    shutil.copytree(bundle.parent / "work", work)
    model = onnx.load(work / "model.onnx")
    task = classification_task(work / "tokenizer", LENGTH, LABELS)
    examples = task.encode([{"text": text, "label": LABELS[0]} for text in TEXTS])
    quantize_matmuls(model, watch_activations(model, task, examples), weights)
    quantize_embeddings(model)
    onnx.save(model, work / "model.onnx")
    here = make_bundle(tmp_path / "int8", work, weights=weights)["measured"]
    code = "import json, sys; from export.serving.bundle import verify_bundle; print(json.dumps(verify_bundle(sys.argv[1])))"
    there = json.loads(run_emulated(tmp_path, code, tmp_path / "int8"))["measured"]
    here, there = (found["outputs"]["model/logits"] for found in (here, there))
    assert here["golden"] == 0 and there["golden"] < 0.2 * here["reference"]


def test_verifying_measures_nothing_on_the_machine_that_exported(bundle):
    report = verify_bundle(bundle)
    moved = report["measured"]["outputs"]["model/logits"]
    assert moved["golden"] == moved["batch"] == moved["padding"] == 0
    assert report["measured"]["agreement"] == report["measured"]["golden_agreement"] == 1
    assert report["inputs"] == len(TEXTS)
    assert report["files"] == len(FILES) - 1
    assert report["identity"] == Bundle.open(bundle).identity


def test_the_same_input_gives_the_same_bundle_to_the_byte(bundle, tmp_path):
    make_bundle(tmp_path / "again", bundle.parent / "work")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (bundle / name).read_bytes(), name


def test_default_bounds_allow_as_much_drift_as_quantization_made():
    def bounds(first):
        answer = {"label": "a"}
        pairs = [([first, 2.0], [0.0, 2.0]), ([2.0, 0.0], [2.0, 0.0])]
        values = [[{"model/logits": np.array(part, dtype=np.float32)} for part in pair] for pair in pairs]
        found = default_tolerance(Answers(facts_of(), None), [Golden({}, own, answer, other, answer) for own, other in values])
        return {**found["outputs"]["model/logits"], "agreement": found["agreement"]}

    assert bounds(0.0) == {"golden": 1e-3, "invariance": 1e-3, "reference": 1e-3, "agreement": 0.95}
    assert bounds(0.25) == {"golden": 0.25, "invariance": 0.25, "reference": 0.5, "agreement": 0.95}


def test_an_answering_half_that_answers_otherwise_than_at_export_is_refused_though_every_output_is_right(copy):
    rows = [json.loads(line) for line in (copy / "golden.jsonl").read_text().splitlines()]
    for row in rows:
        row["answer"]["label"] = "another"
    (copy / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    relist(copy)
    with pytest.raises(UserError, match=r"only 0\.0% of the golden inputs get the answer that they had at export"):
        verify_bundle(copy)


def test_encoding_is_that_of_transformers(bundle):
    from transformers import AutoTokenizer

    texts = [*TEXTS, "", "film " * 60, "a FILM, unknown wörds"]
    theirs = AutoTokenizer.from_pretrained(bundle / "tokenizer")(
        texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="np"
    )
    ours = Bundle.open(bundle).encode([{"text": text} for text in texts])
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


@pytest.mark.parametrize("size", [None, 1, 3, 100])
def test_predictions_keep_the_order_of_their_rows_whatever_the_batch(bundle, size, monkeypatch):
    monkeypatch.setattr("engine.answers._batches.AT_ONCE", 5)
    opened = Bundle.open(bundle)
    golden_rows = opened.golden()
    rows = [golden.row for golden in golden_rows]
    expected = np.array([golden.outputs["model/logits"] for golden in golden_rows])
    np.testing.assert_allclose(logits_of(opened, rows, size), expected, atol=1e-5)
    predictions = opened.predict(rows, size)
    assert [row["label"] for row in predictions] == [LABELS[index] for index in expected.argmax(axis=1)]
    for row in predictions:
        assert row["score"] == max(row["scores"].values()) == row["scores"][row["label"]]
        assert sum(row["scores"].values()) == pytest.approx(1)
    assert opened.predict([]) == []


def test_no_call_of_the_engine_is_larger_than_the_bundle_allows(bundle):
    opened = Bundle.open(bundle)
    sizes = []
    run = opened.engines["model"].run
    opened.engines["model"].run = lambda arrays: sizes.append(len(arrays["input_ids"])) or run(arrays)
    opened.predict([{"text": "bad"}] * 10, 100)
    assert sizes == [BATCH, BATCH, 2]


def test_a_row_without_text_and_broken_unicode_are_named(bundle):
    opened = Bundle.open(bundle)
    with pytest.raises(UserError, match="a row has no 'text': did you mean 'txt'"):
        opened.predict([{"txt": "bad"}])
    with pytest.raises(UserError, match="not valid Unicode"):
        opened.predict([{"text": "bad \ud800"}])


def test_an_engine_that_the_bundle_lacks_is_named(bundle):
    with pytest.raises(UserError, match=r"no engine 'tensorrt' \(known: onnxruntime\)"):
        Bundle.open(bundle, engine="tensorrt")


def test_pairs_of_texts_and_their_columns(bundle, tmp_path):
    facts = facts_of(text="premise", text_pair="hypothesis")
    pairs = [("a good film", "the film is good"), ("bad", "not good"), ("the plot was long " * 9, "short " * 30)]
    make_bundle(tmp_path / "pairs", bundle.parent / "work", texts=pairs, facts=facts)
    opened = Bundle.open(tmp_path / "pairs")
    by_column = logits_of(opened, [{"premise": first, "hypothesis": second} for first, second in pairs])
    by_key = logits_of(opened, [{"text": first, "text_pair": second} for first, second in pairs])
    reference = np.array([golden.reference["model/logits"] for golden in opened.golden()])
    np.testing.assert_array_equal(by_column, by_key)
    np.testing.assert_allclose(by_key, reference, atol=1e-3)
    with pytest.raises(UserError, match="a row has no 'hypothesis'"):
        opened.predict([{"premise": "a"}])


def test_other_engines_lie_where_their_runtime_finds_them_and_rtx_is_never_served_by_triton(bundle, tmp_path):
    work = bundle.parent / "work"
    for name in ("plan", "rtx"):
        (work / name).write_bytes(name.encode())
    engines = {"onnxruntime": work / "model.onnx", "tensorrt": work / "plan", "tensorrt_rtx": work / "rtx"}
    make_bundle(tmp_path / "gpu", work, engines={"model": engines})
    manifest = Bundle.open(tmp_path / "gpu").manifest
    assert {name: entry.file for name, entry in manifest.graphs["model"].engines.items()} == {
        "onnxruntime": "models/tiny_core/1/model.onnx",
        "tensorrt": "models/tiny_core/1/model.plan",
        "tensorrt_rtx": "engines/tensorrt_rtx/model.engine",
    }
    assert 'platform: "tensorrt_plan"' in (tmp_path / "gpu/models/tiny_core/config.pbtxt").read_text()
    assert 'platform: "onnxruntime_onnx"' in (bundle / "models/tiny_core/config.pbtxt").read_text()


def test_int8_onnx_runs_on_cpus_in_triton_and_all_else_where_triton_likes(bundle, tmp_path):
    work = bundle.parent / "work"
    (work / "plan").write_bytes(b"plan")
    both = {"onnxruntime": work / "model.onnx", "tensorrt": work / "plan"}
    make_bundle(tmp_path / "int8", work, weights="portable")
    make_bundle(tmp_path / "plan", work, weights="portable", engines={"model": both})
    kinds = [
        (path / "models/tiny_core/config.pbtxt").read_text().partition("kind: ")[2].split()[0]
        for path in (bundle, tmp_path / "int8", tmp_path / "plan")
    ]
    assert kinds == ["KIND_AUTO", "KIND_CPU", "KIND_AUTO"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"facts": facts_of(["good", "bad\nor worse", "dull"])}, "holds a line break"),
        ({"facts": facts_of(["good", "bad"])}, "does not give what the task reads"),
        ({"facts": facts_of(["good", "bad", "good"])}, "the facts of task 'classification' .* are damaged"),
    ],
)
def test_what_a_bundle_cannot_hold_is_refused_when_it_is_written(bundle, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        make_bundle(tmp_path / "new", bundle.parent / "work", **change)
    assert not (tmp_path / "new/manifest.json").exists()


def test_a_tokenizer_without_padding_is_refused(bundle, tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_bytes((bundle / "tokenizer/tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=r"tokenizer_config\.json: No such file"):
        make_bundle(tmp_path / "new", bundle.parent / "work", tokenizer=source)
    (source / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="no pad_token"):
        make_bundle(tmp_path / "other", bundle.parent / "work", tokenizer=source)


def test_predicting_imports_neither_torch_nor_transformers(bundle):
    code = (
        "import sys; from export.serving.bundle import Bundle, verify_bundle; verify_bundle(sys.argv[1]);"
        "Bundle.open(sys.argv[1]).predict([{'text': 'bad'}]);"
        "print(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_bundle_agrees_with_the_model_in_pytorch(bundle):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle / "tokenizer")
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        expected = torch_model()(**batch).logits.numpy()
    np.testing.assert_allclose(logits_of(Bundle.open(bundle), [{"text": text} for text in TEXTS]), expected, atol=1e-3)
