"""Pretraining from scratch or from a model, on packed documents."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.config import ModelRef, Strict, TokenizerRef
from engine.data.splits import DataConfig
from engine.data.vocabulary import SPECIAL_TOKENS
from engine.errors import UserError
from engine.models.families import family_of
from engine.models.scratch import ScratchConfig
from engine.objectives import AnyObjective, default_objective, objective_class
from engine.stages import heartbeat
from engine.stages.stage import Stage, stage_main
from engine.training.config import Trained

if TYPE_CHECKING:
    from engine.data.corpus import Corpus
    from engine.data.packed import PackedBatches
    from engine.objectives import Objective
    from engine.training.processes import Processes


LEAST = {"wordpiece": 100, "bpe": 261}
"""Kind of vocabulary → its smallest size: letters, or bytes, and special tokens."""


class NewTokenizer(Strict):
    """A vocabulary learnt from the training texts."""

    type: Literal["wordpiece", "bpe"] = "wordpiece"
    """BERT's, or GPT-2's and RoBERTa's pairs of bytes (at least 261 tokens)."""
    vocab_size: int = Field(30_522, ge=100)
    lowercase: bool | None = None
    """Fold case; None: WordPiece does, BPE does not."""
    documents: int | None = Field(None, ge=1)
    """Learn from this many documents only, from the top."""


class ExtendTokenizer(Strict):
    """Words that the vocabulary of a model that goes on learning gets: each begins as the mean of its pieces."""

    words: Annotated[int, Field(ge=1)] | Annotated[list[str], Field(min_length=1)]
    """So many, those that save the most tokens in the training texts; or a list of them."""
    documents: int | None = Field(None, ge=1)
    """Count in this many documents only, from the top."""

    @property
    def count(self) -> int:
        """How many words are added, at most."""
        return self.words if isinstance(self.words, int) else len(self.words)


class TokenizerConfig(Strict):
    """The tokenizer of a pretrained model: taken from a model, learnt, or its own with more words. A bare string stands for
    `model`."""

    model: TokenizerRef | None = None
    """A stage, a hub id, or a directory with tokenizer.json and tokenizer_config.json; no model is needed in it."""
    train: NewTokenizer | None = None
    extend: ExtendTokenizer | None = None
    """Of a model that goes on learning."""

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizerConfig:
        if sum(part is not None for part in (self.model, self.train, self.extend)) != 1:
            raise ValueError("tokenizer needs exactly one of model and train, or extend where a model goes on learning")
        return self


class PretrainConfig(Trained):
    """Section of a `pretrain` stage."""

    model: ScratchConfig | ModelRef
    """Shape of a new model; or a model that goes on learning, from the text of another domain, for example."""
    tokenizer: (
        Annotated[TokenizerConfig, BeforeValidator(lambda value: {"model": value} if isinstance(value, str) else value)] | None
    ) = None
    """Of a new model; one that goes on learning keeps its own, or extends it."""
    objective: AnyObjective = Field(default_factory=default_objective)
    """What is learnt; without a `type` masked language modelling."""
    data: DataConfig
    text: str = "text"
    """Column of the document."""
    sequence_length: int = Field(128, ge=8)
    """Tokens per packed row; longer documents are cut into windows."""

    @property
    def shape(self) -> ScratchConfig | None:
        """Shape of the new model, None where one goes on learning."""
        return self.model if isinstance(self.model, ScratchConfig) else None

    @model_validator(mode="after")
    def _new_or_not(self) -> PretrainConfig:
        extend = None if self.tokenizer is None else self.tokenizer.extend
        if self.shape is None and self.tokenizer is not None and extend is None:
            raise ValueError("tokenizer: a model that goes on learning keeps its own: leave it out, or say extend: {words: 500}")
        if self.shape is not None and extend is not None:
            raise ValueError("tokenizer.extend: a new model learns its vocabulary: say train: {vocab_size: 8192}")
        if self.shape is not None and self.tokenizer is None:
            raise ValueError("tokenizer: a new model needs one: name a model's, or `train: {vocab_size: 8192}`")
        chosen = objective_class(self.objective)
        if self.tokenizer is not None and self.tokenizer.train is not None:
            kind = self.tokenizer.train.type
            missing = [name for name in chosen.special_tokens if name not in SPECIAL_TOKENS[kind]]
            if missing:
                raise ValueError(f"tokenizer.train: {kind} has no {', '.join(missing)}, which {chosen.says} needs: set type: bpe")
            least = LEAST[kind] + len(chosen.added_tokens)
            if (size := self.tokenizer.train.vocab_size) < least:
                raise ValueError(f"tokenizer.train.vocab_size={size}: {kind} begins with {least} tokens: raise it")
        if self.shape is not None:
            try:
                chosen.require_family(self.shape.family)
            except UserError as error:
                raise ValueError(f"objective: {error}") from None
        return self

    @model_validator(mode="after")
    def _positions_reach(self) -> PretrainConfig:
        if self.shape is not None and self.sequence_length > self.shape.positions:
            raise ValueError(
                f"sequence_length={self.sequence_length} is above model.positions={self.shape.positions}: "
                "lower the first or raise the second"
            )
        if self.shape is not None and family_of(self.shape.family).positions != "relative":
            self.check_sides(self.shape.positions, "model.positions")
        if not self.data.validation:
            raise ValueError("data.validation is needed to measure the loss: give a file or a share such as 2%")
        if self.data.slices:
            raise ValueError("data.slices: pretraining judges no single rows: say it in the stage that fine-tunes")
        return self

    def check_sides(self, positions: int, of: str) -> None:
        """Raises ValueError when the objective makes more tokens of a row than a model has positions."""
        if (most := max(objective_class(self.objective).sides(self.objective, self.sequence_length))) > positions:
            written = f"sequence_length={self.sequence_length} lets the decoder write {most} tokens"
            raise ValueError(f"{written}, above the {positions} of {of}: lower it, or objective.mask")


def run(stage: Stage[PretrainConfig]) -> None:
    """Runs one pretraining stage on this rank."""
    config = stage.config
    stage.inputs  # noqa: B018 - missing inputs show before anything heavy is loaded
    import torch

    from engine.data.packed import PackedBatches
    from engine.finetune import saver
    from engine.models import load_tokenizer, set_dropout
    from engine.models.varlen import attend_by_lengths
    from engine.randomness import torch_seed
    from engine.training.loop import Fit, Judge
    from engine.training.processes import Processes

    started = time.monotonic()
    chosen = objective_class(config.objective)
    processes = Processes(config, stage.recipe, stage.partial)
    if processes.main:
        stage.begin()
    with processes.main_first():
        tokenizer = load_tokenizer(_tokenizer_directory(stage))
        chosen.require(tokenizer)
        training, validation = _corpora(stage, tokenizer, chosen.sentences)
    torch.manual_seed(torch_seed(stage.seed, "initialize"))
    model, changes, new = _model(stage, chosen, tokenizer)
    chosen.adapt(model)
    objective = chosen.of_tokenizer(config.objective, tokenizer)
    if new:
        objective.begin(model, training)
    if config.train.dropout is not None:
        set_dropout(model, config.train.dropout)
    if processes.cuda:
        attend_by_lengths(model)
    batches = PackedBatches(training, objective, tokenizer, config.sequence_length, config.train.batch_size, stage.seed)
    held_out = PackedBatches(validation, objective, tokenizer, config.sequence_length, config.train.batch_size, stage.seed)
    judge = Judge(held_out.evaluate, "loss", False, held_out.probe)
    fit = Fit(processes, model, objective.loss, batches, judge, saver(model, tokenizer), stage.partial, stage.name, stage.seed)
    for note in (
        f"{processes.describe}; {batches.describe}",
        f"training {training.describe}",
        f"held out {validation.describe}",
        *changes,
        *objective.remarks(training),
    ):
        fit.tracker.say(note)
    state = fit.run()
    ledgers = {"train": training.ledger, "validation": validation.ledger}
    _publish(stage, processes, held_out, state, fit.weights, started, ledgers)
    processes.close()


def _publish(
    stage: Stage[PretrainConfig],
    processes: Processes,
    held_out: PackedBatches,
    state: Any,
    weights: Path,
    started: float,
    corpora: dict[str, dict[str, int]],
) -> None:
    """Re-opens the saved weights, proves that they give the logits of the run, judges them on all ranks, publishes."""
    from engine.models import load_model, size_of
    from engine.models.varlen import attend_by_lengths
    from engine.training.loop import same_logits

    heartbeat.beat("finish")
    model = load_model(weights, objective_class(stage.config.objective).head).to(processes.device)
    same_logits(held_out.probe(model), state.probe, weights)
    if processes.cuda:
        attend_by_lengths(model)
    metrics = held_out.evaluate(model, processes)
    if processes.main:
        shutil.copytree(weights, stage.output, dirs_exist_ok=True)
        shutil.copy(stage.partial / "history.jsonl", stage.output)
        stage.complete(
            metrics={"validation": {**metrics, "initial_loss": state.initial["loss"]}},
            **size_of(model),
            seconds={"training": round(state.seconds, 3), "this_run": round(time.monotonic() - started, 3)},
            steps=state.step,
            best_step=state.best_step,
            stopped=state.stop,
            processes=processes.describe,
            corpus=corpora,
        )
    processes.barrier()


def _model(stage: Stage[PretrainConfig], chosen: type[Objective], tokenizer: Any) -> tuple[Any, list[str], bool]:
    """Returns (the model, what was changed in one that goes on learning, whether what scores the vocabulary is new)."""
    from engine.models import has_head, load_model, load_tokenizer, positions_of, read_config
    from engine.models.fitting import fit_new_words, fit_tokenizer
    from engine.models.scratch import build_model, special_ids

    shape, reference = stage.config.shape, stage.config.model
    if shape is not None:
        return build_model(shape, chosen.head, rounded(len(tokenizer)), special_ids(tokenizer)), [], True
    assert isinstance(reference, ModelRef)
    path = stage.recipe.find_model(reference)
    chosen.require_family(read_config(path).model_type)
    model = load_model(path, chosen.head, settings={})
    positions = positions_of(model.config.to_dict())
    if positions is not None and stage.config.sequence_length > positions:
        raise UserError(f"sequence_length={stage.config.sequence_length} is above the {positions} positions of '{reference}'")
    if positions is not None:
        try:
            stage.config.check_sides(positions, f"'{reference}'")
        except ValueError as error:
            raise UserError(str(error)) from None
    new = not has_head(model, path)
    said = [f"'{reference}' has nothing that scores the vocabulary: it begins at random"] if new else []
    said += fit_tokenizer(model, tokenizer)
    if stage.config.tokenizer is not None:
        fit_new_words(model, tokenizer, load_tokenizer(path))
        said.append("those of the words that were added begin as the mean of their pieces")
    return model, said, new


def rounded(vocabulary: int) -> int:
    """Pads the vocabulary to a multiple of 64: matrix products with odd widths are markedly slower."""
    return -(-vocabulary // 64) * 64


def _tokenizer_directory(stage: Stage[PretrainConfig]) -> Path | str:
    """Returns where the tokenizer lies, learning it or words for it first when the recipe says so."""
    from engine.data.cells import text_cell
    from engine.data.sources import read_rows
    from engine.data.vocabulary import extend_tokenizer, learn_tokenizer
    from engine.models import load_tokenizer

    config, chosen = stage.config.tokenizer, objective_class(stage.config.objective)
    reference = stage.config.model if config is None else config.model
    if isinstance(reference, ModelRef):
        return stage.recipe.find_model(reference)
    assert config is not None
    directory = stage.partial / "tokenizer"
    if directory.exists():
        return directory

    def texts(documents: int | None) -> Iterator[str]:
        rows = read_rows(stage.config.data.train, stage.recipe, {stage.config.text: text_cell})
        return (str(row[stage.config.text]) for row in itertools.islice(rows, documents))

    if config.train is not None:
        new = config.train
        lowercase = new.type == "wordpiece" if new.lowercase is None else new.lowercase
        learn_tokenizer(new.type, lambda: texts(new.documents), new.vocab_size, lowercase, directory, chosen.added_tokens)
    elif config.extend is not None:
        more = config.extend
        assert isinstance(stage.config.model, ModelRef)
        own = load_tokenizer(stage.recipe.find_model(stage.config.model))
        note = extend_tokenizer(own, lambda: texts(more.documents), more.words, directory)
        print(f"  {note}", flush=True)
    return directory


def _corpora(stage: Stage[PretrainConfig], tokenizer: Any, sentences: bool) -> tuple[Corpus, Corpus]:
    """Returns the tokenized training and validation documents, from disk when they are there already."""
    from engine.data.cells import text_cell
    from engine.data.corpus import Corpus, CorpusWriter
    from engine.data.splits import iter_splits

    paths = [stage.partial / "corpus" / name for name in ("train", "validation")]
    if all(path.exists() for path in paths):
        return Corpus.open(paths[0]), Corpus.open(paths[1])
    text = stage.config.text
    notes: list[str] = []
    writers = {path.name: CorpusWriter(tokenizer.backend_tokenizer, path, sentences) for path in paths}
    for name, row in iter_splits(stage.config.data, stage.recipe, text, {text: text_cell}, notes):
        if name in writers:
            writers[name].add(row[text])
    for note in notes:
        print(f"  {note}", flush=True)
    return writers["train"].close(), writers["validation"].close()


def main() -> None:
    """Entry point of `accelerate launch -m engine.pretrain RECIPE --stage NAME`."""
    stage_main("engine.pretrain", PretrainConfig, run)


if __name__ == "__main__":
    main()
