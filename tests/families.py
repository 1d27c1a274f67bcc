"""A tiny model of every family, from scratch, with a tokenizer of the conventions of that family."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from engine.models.families import FAMILIES, family_of
from tests.unit.models import WORDS

LAYERS = 3
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "position_biased_input": False}
DECODER = {**ENCODER, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 40,
    "init_std": 0.2,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_decoder_layers": LAYERS, "num_heads": 4}
SHAPES = {
    "albert": {**ENCODER, "embedding_size": 16},
    "bart": SEQ2SEQ,
    "deberta": {**ENCODER, **RELATIVE, "max_relative_positions": 16},
    "deberta-v2": {**ENCODER, **RELATIVE, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    "distilbert": {"dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40},
    "electra": {**ENCODER, "embedding_size": 16},
    "gpt2": {
        "n_embd": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_inner": 64,
        "n_positions": 40,
        "initializer_range": 0.2,
        "eos_token_id": 0,
    },
    "llama": DECODER,
    "marian": SEQ2SEQ,
    "mbart": SEQ2SEQ,
    "mistral": {**DECODER, "sliding_window": 6},
    "modernbert": {**ENCODER, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    "mt5": {**T5, "feed_forward_proj": "gated-gelu"},
    "qwen2": DECODER,
    "qwen3": DECODER,
    "rembert": {**ENCODER, "input_embedding_size": 16},
    "roc_bert": {**ENCODER, "pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "squeezebert": {**ENCODER, "embedding_size": 32},
    "t5": T5,
    "xlnet": {"d_model": 32, "n_layer": LAYERS, "n_head": 4, "d_inner": 64, "initializer_range": 0.2},
}
"""Configurations that are not those of an encoder like BERT's."""

BERT = (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
ROBERTA = (["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<s> $A </s>", "<s> $A </s> </s> $B </s>")
SPECIAL = {
    "bart": ROBERTA,
    "gpt2": (["<|endoftext|>"], "$A", "$A $B"),
    "llama": (["<unk>", "<s>", "</s>"], "<s> $A", "<s> $A <s> $B"),
    "marian": (["</s>", "<unk>", "<pad>"], "$A </s>", "$A $B </s>"),
    "mbart": (["<s>", "<pad>", "</s>", "<unk>", "en_XX"], "$A </s> en_XX", "$A </s> $B </s> en_XX"),
    "mistral": (["<unk>", "<s>", "</s>"], "<s> $A", "<s> $A <s> $B"),
    "mpnet": (["<s>", "<pad>", "</s>", "[UNK]", "<mask>"], "<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "mt5": (["<pad>", "</s>", "<unk>"], "$A </s>", "$A </s> $B </s>"),
    "qwen2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "$A", "$A $B"),
    "qwen3": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "$A", "$A $B"),
    "t5": (["<pad>", "</s>", "<unk>"], "$A </s>", "$A </s> $B </s>"),
    "xlnet": (["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>"], "$A <sep> <cls>:2", "$A <sep> $B:1 <sep>:1 <cls>:2"),
}
"""Special tokens in the order of their ids, and where they stand around a text and a pair. Decoders have no padding token."""
BYTES = ("gpt2", "qwen2", "qwen3")
"""Families whose tokenizers begin from bytes; the others know whole words here."""
NAMES = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>", "<|endoftext|>"),
    "cls_token": ("[CLS]", "<cls>", "<s>"),
    "sep_token": ("[SEP]", "<sep>", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
    "bos_token": ("<s>",),
    "eos_token": ("</s>", "<|im_end|>", "<|endoftext|>"),
}
UNKNOWN = "squeezebert"
"""An architecture without a row."""
CLASSIFIERS = [UNKNOWN] + [name for name, row in FAMILIES.items() if not row.why_not("classes")]


def special_of(family: str) -> tuple[list[str], str, str]:
    """Returns (special tokens, template of a text, template of a pair)."""
    return SPECIAL.get(family, ROBERTA if family_of(family).positions == "after padding" else BERT)


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer to which every word of the tiny texts is one token."""
    special, single, pair = special_of(family)
    named = {key: next((token for token in tokens if token in special), None) for key, tokens in NAMES.items()}
    inside = of_bytes(special) if family in BYTES else of_words(special, named["unk_token"])
    inside.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, index) for index, token in enumerate(special)]
    )
    if family.startswith("qwen"):
        named["pad_token"] = "<|endoftext|>"
    side = "left" if family == "xlnet" else "right"
    given = {"padding_side": side, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=inside, **given, **{key: token for key, token in named.items() if token})


def of_words(special: list[str], unknown: str | None) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate([*special, *WORDS])}
    inside = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    inside.normalizer, inside.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    return inside


def of_bytes(special: list[str]) -> Tokenizer:
    inside = Tokenizer(models.BPE())
    inside.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inside.train_from_iterator([f"{word} {word}" for word in WORDS for _ in range(2)], trainer)
    return inside


def config_of(family: str, tokenizer: PreTrainedTokenizerFast, **changes):
    """The configuration of a tiny classifier."""
    known = {
        "vocab_size": 512 if family in BYTES else 64,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family_of(family).pooled == "end":
        known["decoder_start_token_id"] = tokenizer.pad_token_id
    names = {"id2label": {0: "0", 1: "1"}, "label2id": {"0": 0, "1": 1}}
    return AutoConfig.for_model(family, **{**SHAPES.get(family, ENCODER), **known, **names, **changes})


def write_family(directory: Path, family: str, **changes) -> Path:
    """A model directory with random weights: three layers of four heads and 64 neurons."""
    tokenizer = tokenizer_of(family)
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModel
    auto.from_config(config_of(family, tokenizer, **changes)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
