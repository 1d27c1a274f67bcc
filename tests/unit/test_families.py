"""The family table: what a row says is so, the docs say the same, and an architecture without one is told in one line."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from engine.errors import UserError
from engine.models import positions_of
from engine.models.families import FAMILIES, OPERATIONS, family_of
from engine.models.scratch import ScratchConfig
from engine.models.structure import layers_of
from engine.tasks import Graph
from export.engines.graph import export_onnx
from tests.families import UNKNOWN, config_of, tokenizer_of

COLUMNS = (
    "classes",
    "tags",
    "spans",
    "masked",
    "next",
    "pairs",
    "replaced",
    "permuted",
    "rewritten",
    "layers",
    "heads",
    "neurons",
    "attention",
    "ffn",
    "embeddings",
    "maps",
)
IDS = torch.tensor([[2, 10, 11, 12, 3]])


def body(family):
    torch.manual_seed(0)
    return AutoModel.from_config(config_of(family, tokenizer_of(family)), attn_implementation="eager").eval()


def hidden(model, ids):
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder)[0]


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.stacks])
def test_layers_heads_and_neurons_lie_where_the_row_says(family):
    layers, row = layers_of(body(family)), family_of(family)
    expected = 1 if row.shared_layers else 3 * len(row.stacks)
    assert [layer.neurons for layer in layers] == [64] * expected
    assert [layer.heads for layer in layers] == [0 if row.why_not("heads") else 4] * expected


BOUND = [name for name, row in FAMILIES.items() if row.positions != "relative" and not row.per_layer and row.stacks]
BOUND = [name for name in BOUND if not name.startswith("deberta")]  # bounded by what they were trained on, not by a table


@pytest.mark.parametrize("family", BOUND)
def test_the_longest_text_that_the_row_allows_fits_and_no_longer_one(family):
    model = body(family)
    positions = positions_of(model.config.to_dict())
    hidden(model, torch.full((1, positions), 7))
    with pytest.raises((IndexError, RuntimeError)):
        hidden(model, torch.full((1, positions + 1), 7))


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.positions == "relative"])
def test_no_text_is_too_long_for_relative_positions(family):
    model = body(family)
    assert positions_of(model.config.to_dict()) is None
    hidden(model, torch.full((1, 100), 7))


def test_an_architecture_without_a_row_is_one_line():
    with pytest.raises(UserError, match=f"models of type '{UNKNOWN}' cannot be given fewer layers: where .* is not known"):
        layers_of(body(UNKNOWN))
    with pytest.raises(ValueError, match="models of type 'deberta' take no packed rows: pretraining builds albert, bart, "):
        ScratchConfig(family="deberta")


def test_the_table_of_the_docs_is_that_of_the_rows():
    lines = (Path(__file__).parents[2] / "docs" / "models.md").read_text().splitlines()
    written = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    rows = {
        name: " | ".join([f"| `{name}`", *("no" if row.why_not(column) else "yes" for column in COLUMNS)]) + " |"
        for name, row in FAMILIES.items()
    }
    assert {name: line for name, line in written.items() if name in FAMILIES} == rows
    assert set(COLUMNS) == set(OPERATIONS)


def test_what_the_tracer_cannot_follow_is_one_line():
    model = body("bert")

    def forward(model, batch):
        return {"count": batch["input_ids"].sum() if batch["input_ids"].sum() > 3 else batch["input_ids"].max()}

    with pytest.raises(UserError, match="models of type 'bert' cannot be traced to ONNX: ") as error:
        export_onnx(model, Graph(["input_ids"], ["count"], forward))
    assert "\n" not in str(error.value)
