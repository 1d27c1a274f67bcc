"""The families of models: one row of facts per architecture of transformers. No other module names an architecture.

An architecture without a row trains, evaluates and exports; only what needs the row says in one line that it is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from engine.errors import UserError

NEW = "bert"
"""The family of models that are built from scratch, unless the recipe names another one."""

STRUCTURE_KEY = "bothways_structure"
"""config.json key of a physically smaller model: kept heads and FFN neurons per layer."""

OPERATIONS = {
    "classes": "cannot classify",
    "tags": "cannot tag words",
    "spans": "cannot find answers in a text",
    "masked": "cannot be pretrained to predict masked tokens",
    "next": "cannot be pretrained to predict the next token",
    "pairs": "cannot be pretrained to judge pairs of texts",
    "replaced": "cannot be pretrained to tell replaced tokens",
    "permuted": "cannot be pretrained to predict tokens in any order",
    "rewritten": "cannot be pretrained to write a text",
    "layers": "cannot be given fewer layers",
    "heads": "cannot lose attention heads",
    "neurons": "cannot lose FFN neurons",
    "attention": "cannot have their attention matrices factorised",
    "ffn": "cannot have their FFN matrices factorised",
    "embeddings": "cannot have their table of tokens factorised",
    "maps": "give no attention maps that could be matched",
}
"""What a row is asked for, and how a message says that it cannot be done."""
HEADS = {
    "AutoModelForSequenceClassification": "classes",
    "AutoModelForTokenClassification": "tags",
    "AutoModelForQuestionAnswering": "spans",
}
"""Class of transformers that gives a model a task's head → the operation that needs it."""
PRETRAINED = {"masked": (False, False), "next": (True, False), "rewritten": (False, True)}
PRETRAINED |= dict.fromkeys(("pairs", "replaced"), PRETRAINED["masked"])
"""Operations that need packed rows, whether a token then sees those before it alone, and whether a decoder reads an encoder."""
LAYERED = ("layers", "heads", "neurons", "attention", "ffn")
"""Operations that need to know where the layers lie."""


class Matrix(NamedTuple):
    """A matrix whose outputs belong to heads or neurons: a Linear, a Conv1D or a bare vector."""

    path: str
    """In a layer, dotted. What is not there is left out: architectures have variants."""
    parts: int = 1
    """So many matrices are one, each behind the other: query, key and value; gate and value."""
    together: int = 1
    """So many outputs of a head stand behind each other before the next head begins."""


@dataclass(frozen=True)
class Stack:
    """One stack of layers. Paths are attributes, dotted; the defaults are those of an encoder like BERT's."""

    layers: str = "encoder.layer"
    """The list of layers, from the base model; `*` stands for every element of a list."""
    count: str = "num_hidden_layers"
    """Key of config.json: how many layers there are."""
    heads: str = "num_attention_heads"
    key_heads: str = "num_key_value_heads"
    """Keys of config.json: heads of the queries; heads of keys and values, where they are fewer."""
    attention: str = "attention.self"
    """In a layer: what holds the attributes that follow."""
    size: str = "attention_head_size"
    """Attribute: features of a head."""
    counts: tuple[str, ...] = ("num_attention_heads",)
    widths: tuple[str, ...] = ("all_head_size",)
    """Attributes: the number of heads; heads × features. None where they are read from the matrices."""
    inputs: Mapping[str, Matrix] = field(
        default_factory=lambda: {role: Matrix(f"attention.self.{role}") for role in ("query", "key", "value")}
    )
    """By role: the matrices whose outputs belong to heads; a `key` and `value` may have fewer of them."""
    output: str = "attention.output.dense"
    """The matrix whose inputs are the heads' outputs; "" where all of the attention is bare parameters."""
    beside: tuple[Matrix, ...] = ()
    """What else has a part for every head: projections of positions, biases."""
    bias: str = ""
    """From the base model: a table with a number for each head that all layers of the stack add to their scores."""
    up: Mapping[str, Matrix] = field(default_factory=lambda: {"up": Matrix("intermediate.dense")})
    """By role: the matrices whose outputs are neurons; two where the FFN is gated."""
    down: str = "output.dense"
    """The matrix whose inputs are the neurons."""
    tokens_first: bool = False
    """Its layers take (tokens, rows, features) in place of (rows, tokens, features)."""


@dataclass(frozen=True)
class Family:
    """Where the parts of an architecture lie, and what can be done with them."""

    stacks: tuple[Stack, ...] = ()
    """Encoder before decoder; none: unknown, so that layers can neither be left out nor shrunk."""
    shared_layers: str = ""
    """Key of config.json: how many groups of layers there are, where all passes go through the same: a smaller model has fewer
    passes."""
    first_layer_stays: bool = False
    """Layer 0 is built otherwise than the others."""
    per_layer: tuple[str, ...] = ()
    """Keys of the configuration that list something for each layer."""
    neurons: tuple[str, ...] = ("intermediate_size",)
    """Keys of config.json: neurons of a layer, of each stack where they are not the same."""
    as_wide: tuple[str, ...] = ()
    """Keys of config.json: features of other vectors, as many as of a token in a model that is built from scratch."""
    hidden: str = "hidden_size"
    """Key of config.json: features of a token."""
    positions: Literal["table", "after padding", "relative"] = "table"
    """`after padding`: counted from behind the id of the padding token, so that so many embeddings are never used.
    `relative`: no length is too long."""
    bodies: tuple[str, ...] = ()
    """What weights call the body, where that depends on their head."""
    float_mask: bool = False
    """Its mask of zeros and ones must be numbers of the weights' kind, or the tracer stumbles."""
    packed: bool = False
    """Takes rows of several documents: explicit positions and an additive mask of shape (rows, 1, tokens, tokens)."""
    additive_mask: bool = False
    """Takes an additive mask of shape (rows, 1, 1, tokens) in place of zeros and ones: the fewest nodes in a graph."""
    plain_attention: bool = False
    """Where its attention comes from transformers' registry, it is the plain softmax."""
    token_types: bool = True
    """What its forward pass calls token_type_ids are types of tokens, and not tokens."""
    pooled: Literal["", "last", "end"] = ""
    """The head reads one token that transformers finds by its place: the `last` of the batch, though it may be padding; or by its
    id: the `end` of the text, as often in every row. We look for it in each row (engine/models/pooling.py)."""
    decoder_start: str = ""
    """Key of config.json: the token with which a decoder begins, in a model that is built from scratch."""
    decoder_wraps: bool = False
    """A decoder begins with the last token of the text, its language, in place of a fixed one."""
    position_tables: tuple[str, ...] = ()
    """From the model: the encoder's and the decoder's learnt positions, which know of no documents in a row."""
    vocabulary_head: tuple[str, ...] = ()
    """From the model: what scores the vocabulary, one module behind the other; the first takes hidden states."""
    vocabulary_scale: str = ""
    """Key of config.json: hidden states are divided by the root of their width before they are scored."""
    vocabulary_bias: str = ""
    """From the model: what is added to the scores."""
    pair_head: tuple[str, ...] = ()
    """From the model: what scores a pair of texts, one module behind the other; the first takes the first token's state."""
    replaced_head: tuple[str, ...] = ()
    """From the model: what scores how surely a token is a replaced one, one module behind the other."""
    embeddings: str = "embeddings"
    """From the base model: what makes vectors of tokens, their places and types."""
    two_streams: bool = False
    """Takes an order in which tokens are predicted: perm_mask and target_mapping, and no positions."""
    causal: bool = False
    """A token sees those before it alone."""
    windowed: bool = False
    """All of its layers have the window that config.json may name."""
    cannot: Mapping[str, str] = field(default_factory=dict)
    """Operation (see OPERATIONS) → why not."""

    @property
    def pretrains(self) -> bool:
        """Whether an objective has rows for it, several documents in each, so that a new model can learn something."""
        return self.packed or self.two_streams

    def why_not(self, operation: str) -> str | None:
        """Returns why an operation of OPERATIONS cannot be done, None where it can."""
        if operation == "rewritten" and len(self.stacks) != 2:
            return self.cannot.get(operation, "they have no decoder that reads an encoder")
        if operation in PRETRAINED and not (self.packed and (self.causal, len(self.stacks) == 2) == PRETRAINED[operation]):
            return self.cannot.get(
                operation, "how they take the rows that it needs is not known (docs/models.md lists the families)"
            )
        if operation == "pairs" and not self.pair_head:
            return self.cannot.get(operation, "transformers has no head for that")
        if operation == "replaced" and not self.replaced_head:
            return self.cannot.get(operation, "transformers has no head for that")
        if operation == "permuted" and not self.two_streams:
            return self.cannot.get(operation, "they have no second stream of attention")
        if operation in LAYERED and not self.stacks:
            return self.cannot.get(operation, "where their layers lie is not known (docs/models.md lists the families)")
        return self.cannot.get(operation)


def _matrices(prefix: str, **names: str) -> dict[str, Matrix]:
    return {role: Matrix(f"{prefix}{name}") for role, name in names.items()}


UNKNOWN = Family()
_BERT = Family((Stack(),), additive_mask=True, plain_attention=True, packed=True, vocabulary_head=("cls.predictions",))
_BERT_PAIRS = ("bert.pooler.dense", "bert.pooler.activation", "cls.seq_relationship")
_ALBERT_PAIRS = ("albert.pooler", "albert.pooler_activation", "sop_classifier")
_OFFSET = replace(_BERT, positions="after padding", vocabulary_head=("lm_head",))

_DISTIL = Stack(
    layers="transformer.layer",
    count="n_layers",
    heads="n_heads",
    attention="attention",
    counts=("n_heads",),
    widths=(),
    inputs=_matrices("attention.", query="q_lin", key="k_lin", value="v_lin"),
    output="attention.out_lin",
    up={"up": Matrix("ffn.lin1")},
    down="ffn.lin2",
)
_ALBERT = Stack(
    layers="encoder.albert_layer_groups.*.albert_layers",
    attention="attention",
    inputs=_matrices("attention.", query="query", key="key", value="value"),
    output="attention.dense",
    up={"up": Matrix("ffn")},
    down="ffn_output",
)
_MPNET = Stack(
    attention="attention.attn",
    inputs=_matrices("attention.attn.", query="q", key="k", value="v"),
    output="attention.attn.o",
    bias="encoder.relative_attention_bias",
)
_DEBERTA = Stack(
    inputs={"qkv": Matrix("attention.self.in_proj", together=3)},
    beside=tuple(Matrix(f"attention.self.{name}") for name in ("q_bias", "v_bias", "pos_proj", "pos_q_proj")),
)
_DEBERTA_V2 = Stack(
    inputs=_matrices("attention.self.", query="query_proj", key="key_proj", value="value_proj"),
    beside=tuple(Matrix(f"attention.self.{name}") for name in ("pos_key_proj", "pos_query_proj")),
)
_XLNET = Stack(
    layers="layer",
    count="n_layer",
    heads="n_head",
    inputs={},
    output="",
    up={"up": Matrix("ff.layer_1")},
    down="ff.layer_2",
    tokens_first=True,
)
_MODERNBERT = Stack(
    layers="layers",
    attention="attn",
    size="head_dim",
    counts=(),
    widths=(),
    inputs={"qkv": Matrix("attn.Wqkv", parts=3)},
    output="attn.Wo",
    up={"up": Matrix("mlp.Wi", parts=2)},
    down="mlp.Wo",
)
_GPT2 = Stack(
    layers="h",
    count="n_layer",
    heads="n_head",
    attention="attn",
    size="head_dim",
    counts=("num_heads",),
    widths=("split_size",),
    inputs={"qkv": Matrix("attn.c_attn", parts=3)},
    output="attn.c_proj",
    up={"up": Matrix("mlp.c_fc")},
    down="mlp.c_proj",
)
_LLAMA = Stack(
    layers="layers",
    attention="self_attn",
    size="head_dim",
    counts=(),
    widths=(),
    inputs=_matrices("self_attn.", query="q_proj", key="k_proj", value="v_proj"),
    output="self_attn.o_proj",
    up=_matrices("mlp.", gate="gate_proj", up="up_proj"),
    down="mlp.down_proj",
)


def _bart(side: str) -> Stack:
    return Stack(
        layers=f"{side}.layers",
        count=f"{side}_layers",
        heads=f"{side}_attention_heads",
        attention="self_attn",
        size="head_dim",
        counts=("num_heads",),
        widths=(),
        inputs=_matrices("self_attn.", query="q_proj", key="k_proj", value="v_proj"),
        output="self_attn.out_proj",
        up={"up": Matrix("fc1")},
        down="fc2",
    )


def _t5(side: str, count: str, ffn: str) -> Stack:
    return Stack(
        layers=f"{side}.block",
        count=count,
        heads="num_heads",
        attention="layer.0.SelfAttention",
        size="key_value_proj_dim",
        counts=("n_heads",),
        widths=("inner_dim",),
        inputs=_matrices("layer.0.SelfAttention.", query="q", key="k", value="v"),
        output="layer.0.SelfAttention.o",
        bias=f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias",
        up=_matrices(f"{ffn}.DenseReluDense.", up="wi", gate="wi_0", linear="wi_1"),
        down=f"{ffn}.DenseReluDense.wo",
    )


_SHARED_TABLE = {"embeddings": "encoder and decoder share it"}
_NO_HEADS = dict.fromkeys(HEADS.values(), "transformers has no such head for them")
_NO_TAGS, _NO_SPANS = ({name: _NO_HEADS[name]} for name in ("tags", "spans"))
_SEQ2SEQ = Family(
    plain_attention=True, hidden="d_model", pooled="end", packed=True, vocabulary_head=("lm_head",), cannot=_SHARED_TABLE
)
_BART_ROW = replace(
    _SEQ2SEQ,
    stacks=(_bart("encoder"), _bart("decoder")),
    neurons=("encoder_ffn_dim", "decoder_ffn_dim"),
    vocabulary_bias="final_logits_bias",
    decoder_start="eos_token_id",
    position_tables=("model.encoder.embed_positions", "model.decoder.embed_positions"),
    cannot={**_SHARED_TABLE, **_NO_TAGS},
)
_T5_ROW = replace(
    _SEQ2SEQ,
    stacks=(_t5("encoder", "num_layers", "layer.1"), _t5("decoder", "num_decoder_layers", "layer.2")),
    neurons=("d_ff",),
    vocabulary_scale="scale_decoder_outputs",
    decoder_start="pad_token_id",
    positions="relative",
    first_layer_stays=True,
)
_DECODER = Family(
    (_LLAMA,),
    plain_attention=True,
    per_layer=("layer_types",),
    bodies=("model", "transformer"),
    packed=True,
    causal=True,
    vocabulary_head=("lm_head",),
)

FAMILIES = {
    "albert": replace(
        _BERT, stacks=(_ALBERT,), shared_layers="num_hidden_groups", vocabulary_head=("predictions",), pair_head=_ALBERT_PAIRS
    ),
    "bart": _BART_ROW,
    "bert": replace(_BERT, pair_head=_BERT_PAIRS),
    "camembert": _OFFSET,
    "data2vec-text": _OFFSET,
    "deberta": Family((_DEBERTA,)),
    "deberta-v2": Family((_DEBERTA_V2,)),
    "distilbert": replace(
        _BERT,
        stacks=(_DISTIL,),
        hidden="dim",
        neurons=("hidden_dim",),
        vocabulary_head=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    ),
    "electra": replace(
        _BERT,
        as_wide=("embedding_size",),
        vocabulary_head=("generator_predictions", "generator_lm_head"),
        replaced_head=("discriminator_predictions",),
    ),
    "ernie": _BERT,
    "fnet": Family(cannot=dict.fromkeys(OPERATIONS, "they take no attention mask, so that an answer would depend on padding")),
    "gpt2": Family(
        (_GPT2,),
        plain_attention=True,
        token_types=False,
        hidden="n_embd",
        neurons=("n_inner",),
        packed=True,
        causal=True,
        vocabulary_head=("lm_head",),
    ),
    "layoutlm": replace(_BERT, additive_mask=False, packed=False, cannot=_NO_SPANS),
    "llama": _DECODER,
    "marian": replace(_BART_ROW, packed=False, position_tables=(), cannot={**_SHARED_TABLE, **_NO_HEADS}),
    "mbart": replace(_BART_ROW, decoder_start="", decoder_wraps=True),
    "megatron-bert": _BERT,
    "mistral": replace(_DECODER, windowed=True),
    "modernbert": Family(
        (_MODERNBERT,),
        plain_attention=True,
        per_layer=("layer_types",),
        first_layer_stays=True,
        packed=True,
        vocabulary_head=("head", "decoder"),
    ),
    "mpnet": replace(_OFFSET, stacks=(_MPNET,)),
    "mt5": _T5_ROW,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "rembert": replace(_BERT, as_wide=("input_embedding_size", "output_embedding_size")),
    "roberta": _OFFSET,
    "roberta-prelayernorm": _OFFSET,
    "roc_bert": replace(_BERT, packed=False),
    "t5": _T5_ROW,
    "xlm-roberta": _OFFSET,
    "xlm-roberta-xl": _OFFSET,
    "xlnet": Family(
        (_XLNET,),
        hidden="d_model",
        neurons=("d_inner",),
        positions="relative",
        pooled="last",
        float_mask=True,
        vocabulary_head=("lm_loss",),
        two_streams=True,
        cannot=dict.fromkeys(("heads", "attention"), "query, key, value and output are bare parameters"),
    ),
}
"""Rows by `model_type`."""


def family_of(model_type: str | None) -> Family:
    """Returns the row of an architecture; one that says nothing where there is none."""
    return FAMILIES.get(model_type or "", UNKNOWN)


def require(model_type: str | None, operation: str) -> Family:
    """Returns the row of an architecture that can do what is asked.

    Raises:
        UserError: it cannot; the message says why.
    """
    family = family_of(model_type)
    reason = family.why_not(operation)
    if reason:
        raise UserError(f"models of type '{model_type}' {OPERATIONS[operation]}: {reason}")
    return family


def stack_sizes(config: Mapping[str, Any]) -> list[int]:
    """Returns how many layers each stack of a model has, from its config.json; empty where that is not known.

    Where layers are shared that is the number of passes.
    """
    counts = [config.get(stack.count) for stack in family_of(config.get("model_type")).stacks]
    # transformers counts the layers of a decoder like those of its encoder where config.json says nothing.
    counts = [counts[0] if count is None else count for count in counts]
    return [] if None in counts else counts  # type: ignore[return-value]


def trained_layers(config: Mapping[str, Any], sizes: list[int]) -> int:
    """Returns how many layers a model has that can be trained apart, given the sizes of its stacks."""
    shared = family_of(config.get("model_type")).shared_layers
    return config.get(shared, 1) if shared else sum(sizes)


def check_kept(model_type: str | None, kept: list[int]) -> None:
    """Raises UserError unless these layers can be all that is left of a stack."""
    if family_of(model_type).first_layer_stays and kept[0] != 0:
        raise UserError(f"layer 0 of models of type '{model_type}' is unlike the others: keep it, as the first")
