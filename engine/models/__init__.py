"""Loading models: from a stage directory, a package or a hub id.

Weights are read from safetensors only: no pickle from others, no remote code.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.answers._batches import MASK
from engine.errors import UserError
from engine.models.facts import ModelFiles
from engine.models.families import HEADS, STRUCTURE_KEY, family_of, require
from engine.models.weights import read_headers, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TOKEN_INPUTS = ("input_ids", MASK, "token_type_ids")
"""What a tokenizer gives that a model may take, in the order in which graphs take it."""
CLASSIFIER = "AutoModelForSequenceClassification"
"""The head of classes and of numbers."""


def auto_class(head: str) -> Any:
    """Returns the class of transformers of that name."""
    import transformers
    from transformers.utils import logging

    # A fresh head is expected here, and the stage has a progress bar of its own.
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    return getattr(transformers, head)


def default_attention() -> str:
    """Returns the faster attention: plain matrix products on CPUs at these lengths, fused kernels on GPUs, which add up gradients
    in no fixed order."""
    import torch

    return "sdpa" if torch.cuda.is_available() and not torch.are_deterministic_algorithms_enabled() else "eager"


def read_config(model: Path | str) -> Any:
    """Returns the configuration of a model directory or hub id.

    Raises:
        UserError: it cannot be read, or transformers does not know its architecture.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model '{model}' cannot be read: {reason}") from None


def load_model(
    model: Path | str,
    head: str,
    attention: str | None = None,
    settings: dict[str, Any] | None = None,
    random: bool = False,
) -> PreTrainedModel:
    """Loads a model with the given head; a head that the weights lack is initialised at random.

    Args:
        model: directory or hub id.
        head: what the model is for: the class of transformers, as in AutoModelForSequenceClassification.
        attention: transformers' attention implementation; None chooses by hardware.
        settings: entries of the configuration that replace the model's own, as the size of its head. None: the model is used as
            it is, and must have every weight.
        random: take only the shape and initialise every weight at random.

    Raises:
        UserError: no such model, no safetensors weights, unknown architecture, weights that do not fit.
    """
    import torch

    from engine.models.heads import HEAD_KEY, add_part, load_part

    if isinstance(model, Path):
        ModelFiles(model).refuse_quantizer()
        if not random:
            read_headers(model)  # damaged weights are named before anything heavy begins
    config = read_config(model)
    config.dtype = torch.float32  # whatever the weights were saved in: training keeps fp32 weights
    attention = attention or default_attention()
    if settings is not None and getattr(config, HEAD_KEY, None) is not None:
        settings = {HEAD_KEY: None, **settings}  # another task's head may need no such part
    for key, value in (settings or {}).items():
        setattr(config, key, value)
    auto = auto_class(head)
    if head in HEADS:
        require(config.model_type, HEADS[head])
    try:
        if random or getattr(config, STRUCTURE_KEY, None):
            built = auto.from_config(config, attn_implementation=attention)
            if getattr(config, STRUCTURE_KEY, None):
                from engine.models.structure import apply_structure

                apply_structure(built, getattr(config, STRUCTURE_KEY))
            add_part(built)
            if not random:
                _load_weights(built, Path(model))
            return by_rows(built, head)
        # Tensors of another shape are named by `_require_fitting`, not by a report that nobody sees.
        built, loading = auto.from_pretrained(
            model,
            config=config,
            attn_implementation=attention,
            use_safetensors=True,
            key_mapping=_other_bodies(auto, config),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        _require_fitting(built, model, loading, whole=settings is None)
        load_part(built, model, whole=settings is None)
        return by_rows(built, head)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model '{model}' cannot be loaded: {reason}") from None


def _other_bodies(auto: Any, config: Any) -> dict[str, str] | None:
    """Returns {pattern: prefix} for weights that call the body as another head of their family does; None where all agree."""
    if not (names := family_of(config.model_type).bodies):
        return None
    own = auto._model_mapping[type(config)].base_model_prefix
    return {rf"^{name}\.": f"{own}." for name in names if name != own}


def has_head(model: PreTrainedModel, path: Path | str) -> bool:
    """Whether a model's weights hold anything of its head; one that only ties the table of tokens lacks nothing."""
    body = f"{model.base_model_prefix}."
    own = {name for name, _ in model.named_parameters() if not name.startswith(body)}
    return not own or not isinstance(path, Path) or not own.isdisjoint(read_headers(path))


def by_rows(model: PreTrainedModel, head: str) -> PreTrainedModel:
    """Returns a model whose answer to a row depends on that row alone, whatever shares its batch."""
    if MASK not in inspect.signature(type(model).forward).parameters:
        raise UserError(f"models of type '{model.config.model_type}' take no attention mask: an answer would depend on padding")
    if family_of(model.config.model_type).float_mask:
        model.register_forward_pre_hook(_float_mask, with_kwargs=True)
    if head == CLASSIFIER:
        from engine.models.pooling import pool_each_row

        pool_each_row(model)
    elif head in HEADS and family_of(model.config.model_type).decoder_wraps:
        from engine.models.pooling import write_each_row

        write_each_row(model)
    return model


def _float_mask(model: PreTrainedModel, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return inputs, {**options, **({MASK: options[MASK].to(model.dtype)} if options.get(MASK) is not None else {})}


def _require_fitting(built: PreTrainedModel, model: Path | str, loading: dict[str, Any], whole: bool) -> None:
    """Raises UserError when weights of another shape, or too few of them, were loaded: what is missing was drawn at random.

    Args:
        loading: transformers' account of the loading.
        whole: the head must be there, too; a pooler may always be missing from the body, which was then trained without.
    """
    body = f"{built.base_model_prefix}."
    for name, there, here in sorted(loading["mismatched_keys"]):
        if not whole and not name.startswith(body):
            continue  # the head of another task, which is drawn anew
        shapes = f"{tuple(there)} in the weights, {tuple(here)} by config.json"
        raise UserError(f"model '{model}': {name} has the shape {shapes}: they are not of one model")
    missing = sorted(key for key in loading["missing_keys"] if whole or (key.startswith(body) and "pooler" not in key))
    if missing:
        of = f"{len(missing)} of {len(built.state_dict())} weights are missing"
        raise UserError(
            f"model '{model}': {of} ({', '.join(missing[:2])}, …): its files are not those of a {type(built).__name__}"
        )


def _load_weights(model: PreTrainedModel, directory: Path) -> None:
    from safetensors.torch import load_file

    weights = {name: tensor for path in weight_files(directory) for name, tensor in load_file(path).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [key for key in missing if key not in tied]
    if missing or unexpected:
        raise UserError(f"{directory}: weights do not fit the configuration (missing {missing[:3]}, unexpected {unexpected[:3]})")
    model.tie_weights()


def load_tokenizer(model: Path | str) -> PreTrainedTokenizerBase:
    """Loads the fast tokenizer of a model directory or hub id, without the truncation and padding that its file may switch on.

    One without a padding token gets one; of the inputs that it makes, those stay that the model beside it takes.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    if isinstance(model, Path):
        ModelFiles(model).require_tokenizer()

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, use_fast=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{model}: no tokenizer: {reason}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{model}: no fast tokenizer (tokenizer.json)")
    # Whoever needs a length asks for it: MiniLM's file cuts every text at 128 tokens and fills it up to them.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _padding(tokenizer, model)
    try:
        taken = _inputs_taken(read_config(model))
    except UserError:
        return tokenizer  # without a model, as pretraining takes one; a model that cannot be read is refused where it is loaded
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
    return tokenizer


def _inputs_taken(config: Any) -> set[str]:
    """Returns the names of the inputs of a model: many tokenizers give token types that it does not know."""
    from transformers import AutoModel

    body: Any = AutoModel._model_mapping.get(type(config), None)
    body = body[0] if isinstance(body, tuple) else body
    taken = set(inspect.signature(body.forward).parameters) if body else set(TOKEN_INPUTS)
    has_types = getattr(config, "type_vocab_size", None) not in (0, 1) and family_of(config.model_type).token_types
    return taken if has_types else taken - {"token_type_ids"}


def _padding(tokenizer: PreTrainedTokenizerBase, model: Path | str) -> str:
    """Returns a token to pad with: padding is never attended, so any will do."""
    chosen = tokenizer.eos_token or tokenizer.sep_token or tokenizer.unk_token
    if chosen is None:
        raise UserError(f"{model}: its tokenizer has no padding token and no end-of-text token: name one (pad_token)")
    return chosen


def positions_of(config: dict[str, Any]) -> int | None:
    """Returns how many tokens a model takes, from its config.json; None when nothing bounds them."""
    positions, counted = config.get("max_position_embeddings"), family_of(config.get("model_type")).positions
    if positions is None:
        positions = config.get("n_positions")
    if counted == "relative" or not positions or positions < 0:
        return None
    if counted == "after padding":
        # Their positions are counted from behind the id of the padding token, which is 1 unless the file says otherwise.
        return positions - config.get("pad_token_id", 1) - 1
    return positions


def check_length(length: int, config: Any, key: str, model: Path | str) -> None:
    """Raises UserError when `length` tokens do not fit the model's position embeddings."""
    positions = positions_of(config.to_dict())
    if positions and length > positions:
        raise UserError(f"{key}={length} is above the {positions} positions of model '{model}': set {key} to {positions} or less")


_DROPOUT = re.compile(r"(?<!layer)drop(?!_path)")
"""Entries and attributes that hold a probability of dropout of features or of attention; not of whole layers."""


def set_dropout(model: PreTrainedModel, probability: float) -> None:
    """Sets every dropout of the model, in its modules and in its configuration."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        for name in _probabilities(vars(module)):
            setattr(module, name, probability)
    for key in _probabilities(model.config.to_dict()):
        setattr(model.config, key, probability)


def _probabilities(entries: dict[str, Any]) -> list[str]:
    """Returns the names of those entries that are a probability of dropout: attention in transformers keeps it as a number."""
    return [name for name, value in entries.items() if type(value) in (int, float) and _DROPOUT.search(name.lower())]


def checkpoint_activations(model: Any) -> None:
    """Keeps only the inputs of every layer for the backward pass, which computes the layer again (arXiv:1604.06174).

    The random numbers of dropout are drawn again too: losses and gradients stay the same.

    Raises:
        UserError: the model cannot do that.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"train.gradient_checkpointing: models of type '{model.config.model_type}' cannot do that: turn it off")
    # The reentrant form loses gradients where no input of a layer needs one, and hides layers from ZeRO's hooks.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its older name
    enable({"use_reentrant": False})


def compile_layers(model: Any) -> None:
    """Lets torch.compile make each layer a few fused kernels, in place: names and weights stay. All layers share them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()


def size_of(model: Any) -> dict[str, int]:
    """Returns {"parameters", "weight_bytes"} of a model, tied weights counted once."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
    }
