"""A small real bundle: a tiny BERT exported to ONNX, made once for all tests."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import torch

from engine.tasks import classification
from export.engines.graph import export_onnx
from export.serving.write import write_bundle
from tests.unit.models import GRAPH, tiny_classifier, tiny_tokenizer

TEXTS = [
    "a good film",
    "bad",
    "the plot was very very dull and the actor was cold",
    "a great warm story with a short scene",
    "not a long film but a good story",
    "the scene is dull",
    "great actor",
    "a film of a film of a film of a film of a film of a film",
]
LABELS = ["negative", "neutral", "positive"]
LENGTH, BATCH = 32, 4


def torch_model():
    """Returns the classifier that the bundle's engine comes from."""
    return tiny_classifier(num_labels=len(LABELS), initializer_range=0.5)


def reference_run(model):
    """Returns `run(graph, arrays)` of the PyTorch model."""

    def run(graph, arrays):
        with torch.no_grad():
            return {"logits": model(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits.numpy()}

    return run


def golden_rows(texts=TEXTS):
    """Returns golden rows of texts, or of pairs of texts."""
    return [dict(zip(("text", "text_pair"), [text] if isinstance(text, str) else text, strict=False)) for text in texts]


def facts_of(labels=LABELS, **changes):
    """Returns what the answering half has to know."""
    section = classification.Config(type="classification", **changes)
    return {**section.model_dump(), "labels": list(labels)}


def make_bundle(directory: Path, work: Path, texts=TEXTS, pair: str | None = None, **changes):
    """Writes a bundle into `directory`; `work` keeps the tokenizer and the ONNX file for further bundles."""
    tokenizer, model = tiny_tokenizer(work / "tokenizer"), torch_model()
    if not (work / "model.onnx").exists():
        tokenizer.save_pretrained(work / "tokenizer")
        onnx.save(export_onnx(model, GRAPH), work / "model.onnx")
    directory.mkdir(parents=True, exist_ok=True)
    facts = {
        "name": "tiny",
        "task": "classification",
        "facts": facts_of(text_pair=pair),
        "max_length": LENGTH,
        "max_batch": BATCH,
        "tokenizer": work / "tokenizer",
        "engines": {"model": {"onnxruntime": work / "model.onnx"}},
        "golden": golden_rows(texts),
        "reference": reference_run(model),
        "parity": {},
        "benchmark": {},
        "provenance": {},
    }
    return write_bundle(directory, **{**facts, **changes})


def shared_bundle(tmp_path_factory) -> Path:
    """Returns the bundle that all tests read; made once in a test session."""
    base = tmp_path_factory.getbasetemp() / "shared"
    if not base.exists():
        make_bundle(base / "tiny", base / "work")
    return base / "tiny"


def copy_bundle(source: Path, target: Path) -> Path:
    """Returns a copy that a test may spoil."""
    shutil.copytree(source, target)
    return target


def relist(bundle: Path) -> None:
    """Gives the manifest the hashes of the files as they now are: what a careful forger would do."""
    from engine.stages.stage import hash_directory

    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = hash_directory(bundle, skip=("manifest.json", "stage.json"))
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def as_array(predictions):
    """Returns the probabilities of predictions, shape (N, C)."""
    return np.array([[row["scores"][label] for label in LABELS] for row in predictions])
