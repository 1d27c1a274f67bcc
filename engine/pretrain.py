"""Pretraining from scratch or from a model, on packed documents."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from engine.config import CorpusRef, ModelRef, Strict, TokenizerRef
from engine.corpus import SHARDS, NewTokenizer, as_model, learn, require_held_out, require_language, require_learnt, texts_of
from engine.data.splits import DataConfig
from engine.errors import UserError
from engine.models.families import family_of
from engine.models.scratch import ScratchConfig
from engine.objectives import AnyObjective, default_objective, objective_class
from engine.stages import heartbeat
from engine.stages.stage import Stage, stage_main
from engine.training.config import Trained

if TYPE_CHECKING:
    from engine.data.packed import PackedBatches
    from engine.data.shards import Shards
    from engine.objectives import Objective
    from engine.training.processes import Processes


OWN = "text"
"""Name of the texts that a stage tokenizes itself."""
SAMPLE = 10_000_000
"""Tokens that an objective may look at before the first step."""


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


class CorpusShare(Strict):
    """One of several corpora that are mixed. A bare string stands for `corpus`."""

    corpus: CorpusRef
    weight: Annotated[float, Field(gt=0)] | None = None
    """Its share of the rows, in any unit; None: as `PretrainConfig.mixing` says."""

    @property
    def name(self) -> str:
        """The stage, or the name of the directory."""
        return Path(self.corpus).name


def _as_shares(value: Any) -> Any:
    value = [] if value is None else [value] if isinstance(value, str) else value
    return [{"corpus": part} if isinstance(part, str) else part for part in value] if isinstance(value, list) else value


class PretrainConfig(Trained):
    """Section of a `pretrain` stage."""

    model: ScratchConfig | ModelRef
    """Shape of a new model; or a model that goes on learning, from the text of another domain, for example."""
    tokenizer: Annotated[TokenizerConfig, BeforeValidator(as_model)] | None = None
    """Of a new model; one that goes on learning keeps its own, or extends it, and a corpus has one."""
    objective: AnyObjective = Field(default_factory=default_objective)
    """What is learnt; without a `type` masked language modelling."""
    data: DataConfig | None = None
    """The texts; or `corpus`."""
    text: str = "text"
    """Column of the document."""
    language: str | None = None
    """Of all its documents, a token of the vocabulary such as en_XX: an objective that tags texts takes it."""
    corpus: Annotated[list[CorpusShare], BeforeValidator(_as_shares)] = []
    """In place of `data` and `tokenizer` a `corpus` stage, which was tokenized before, or a list of several, which are mixed."""
    mixing: float = Field(1.0, ge=0, le=1)
    """Share of the rows of each of several corpora: as its number of rows to the power of this. 1: as they are; 0.3 as in XLM-R
    (arXiv:1911.02116): small ones come more often; 0: all alike."""
    sequence_length: int = Field(128, ge=8)
    """Tokens per packed row; longer documents are cut into windows."""

    @property
    def shape(self) -> ScratchConfig | None:
        """Shape of the new model, None where one goes on learning."""
        return self.model if isinstance(self.model, ScratchConfig) else None

    @property
    def weights(self) -> list[float] | float:
        """Share of the rows that each corpus gives, in any unit; or the power of its number of rows that is."""
        return [share.weight for share in self.corpus if share.weight is not None] or self.mixing

    @model_validator(mode="after")
    def _texts_or_tokens(self) -> PretrainConfig:
        if (self.data is None) == (not self.corpus):
            raise ValueError("give exactly one of data, the texts, and corpus, a stage that has tokenized them")
        if self.corpus and self.tokenizer is not None:
            raise ValueError("tokenizer: a corpus has its own: say it in the stage that makes the corpus")
        if said := next((key for key in ("text", "language") if self.corpus and key in self.model_fields_set), None):
            raise ValueError(f"{said}: a corpus is made already: say it in the stage that makes the corpus")
        names = [share.name for share in self.corpus]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"corpus: '{twice}' is named twice: leave one out")
        if len({share.weight is None for share in self.corpus}) > 1:
            raise ValueError("corpus: give a weight for each, or for none")
        if self.mixing != 1 and (len(self.corpus) < 2 or self.corpus[0].weight is not None):
            raise ValueError(
                "mixing weighs several corpora by their sizes: name a list of them, without weights, or leave it out"
            )
        if self.data is not None:
            require_held_out(self.data)
        return self

    @model_validator(mode="after")
    def _new_or_not(self) -> PretrainConfig:
        extend = None if self.tokenizer is None else self.tokenizer.extend
        if self.shape is None and self.tokenizer is not None and extend is None:
            raise ValueError("tokenizer: a model that goes on learning keeps its own: leave it out, or say extend: {words: 500}")
        if self.shape is not None and extend is not None:
            raise ValueError("tokenizer.extend: a new model learns its vocabulary: say train: {vocab_size: 8192}")
        if self.shape is not None and self.tokenizer is None and not self.corpus:
            raise ValueError("tokenizer: a new model needs one: name a model's, or `train: {vocab_size: 8192}`")
        chosen = objective_class(self.objective)
        if self.tokenizer is not None and self.tokenizer.train is not None:
            require_learnt(self.tokenizer.train, chosen, self.language)
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
    import numpy as np
    import torch

    from engine.data.packed import PackedBatches
    from engine.finetune import saver
    from engine.models import load_tokenizer, set_dropout
    from engine.models.companions import together
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
        require_language(tokenizer, config.language)
    training, validation = _corpora(stage, processes, tokenizer, chosen.sentences)
    torch.manual_seed(torch_seed(stage.seed, "initialize"))
    model, changes, new = _model(stage, chosen, tokenizer)
    chosen.adapt(model)
    objective = chosen.of_tokenizer(config.objective, tokenizer)
    tokens = np.concatenate([corpus.sample(SAMPLE // len(training)) for corpus in training.values()])
    if new:
        objective.begin(model, tokens)
    for part in together(model):
        if config.train.dropout is not None:
            set_dropout(part, config.train.dropout)
        if processes.cuda:
            attend_by_lengths(part)
    languages = {name: corpus.language for name, corpus in training.items()}
    length, batch_size = config.sequence_length, config.train.batch_size
    batches, held_out = (
        PackedBatches(corpora, objective, tokenizer, length, batch_size, stage.seed, weights, processes, languages)
        for corpora, weights in ((training, config.weights), (validation, 1.0))
    )
    judge = Judge(held_out.evaluate, "loss", False, held_out.probe)
    fit = Fit(processes, model, objective.loss, batches, judge, saver(model, tokenizer), stage.partial, stage.name, stage.seed)
    of = " of {}:".format if len(training) > 1 else "".format
    for note in (
        f"{processes.describe}; {batches.describe}",
        *(f"training{of(name)} {corpus.describe}" for name, corpus in training.items()),
        *(f"held out{of(name)} {corpus.describe}" for name, corpus in validation.items()),
        *batches.shares,
        *changes,
        *objective.remarks(tokens),
    ):
        fit.tracker.say(note)
    state = fit.run()
    ledgers = {
        split: {key: sum(corpus.ledger[key] for corpus in corpora.values()) for key in next(iter(corpora.values())).ledger}
        for split, corpora in (("train", training), ("validation", validation))
    }
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
    from engine.models.companions import together
    from engine.models.varlen import attend_by_lengths
    from engine.training.loop import same_logits

    heartbeat.beat("finish")
    chosen = objective_class(stage.config.objective)
    model = load_model(weights, chosen.head)
    size = size_of(model)
    chosen.accompany(stage.config.objective, model, weights)
    model = model.to(processes.device)
    same_logits(held_out.probe(model), state.probe, weights)
    if processes.cuda:
        for part in together(model):
            attend_by_lengths(part)
    metrics = held_out.evaluate(model, processes)
    if processes.main:
        shutil.copytree(weights, stage.output, dirs_exist_ok=True)
        shutil.copy(stage.partial / "history.jsonl", stage.output)
        stage.complete(
            metrics={"validation": {**metrics, "initial_loss": state.initial["loss"]}},
            **size,
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
    from engine.models.companions import together
    from engine.models.fitting import fit_new_words, fit_tokenizer
    from engine.models.scratch import build_model, special_ids

    shape, reference = stage.config.shape, stage.config.model
    if shape is not None:
        model = build_model(shape, chosen.head, rounded(len(tokenizer)), special_ids(tokenizer))
        chosen.accompany(stage.config.objective, model, None)
        return model, [], True
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
    said = [f"'{reference}' has nothing that {chosen.scores}: it begins at random"] if new else []
    if chosen.companion:
        new = chosen.accompany(stage.config.objective, model, path)
        said += [f"'{reference}' has no {chosen.companion} beside it: it begins at random"] if new else []
    own, *beside = together(model)
    said += fit_tokenizer(own, tokenizer)
    for part in beside:
        fit_tokenizer(part, tokenizer)
    if stage.config.tokenizer is not None:
        for part in together(model):
            fit_new_words(part, tokenizer, load_tokenizer(path))
        said.append("those of the words that were added begin as the mean of their pieces")
    return model, said, new


def rounded(vocabulary: int) -> int:
    """Pads the vocabulary to a multiple of 64: matrix products with odd widths are markedly slower."""
    return -(-vocabulary // 64) * 64


def _tokenizer_directory(stage: Stage[PretrainConfig]) -> Path | str:
    """Returns where the tokenizer lies, learning it or words for it first when the recipe says so."""
    from engine.data.vocabulary import extend_tokenizer
    from engine.models import load_tokenizer

    config, chosen = stage.config.tokenizer, objective_class(stage.config.objective)
    if stage.config.corpus:
        return _tokenizer_of(stage)
    reference = stage.config.model if config is None else config.model
    if isinstance(reference, ModelRef):
        return stage.recipe.find_model(reference)
    assert config is not None and stage.config.data is not None
    directory = stage.partial / "tokenizer"
    if directory.exists():
        return directory
    texts = texts_of(stage.config.data, stage.recipe, stage.config.text)
    if config.train is not None:
        learn(config.train, texts, chosen, directory)
    elif config.extend is not None:
        more = config.extend
        assert isinstance(stage.config.model, ModelRef)
        own = load_tokenizer(stage.recipe.find_model(stage.config.model))
        note = extend_tokenizer(own, lambda: texts(more.documents), more.words, directory)
        print(f"  {note}", flush=True)
    return directory


def _tokenizer_of(stage: Stage[PretrainConfig]) -> Path | str:
    """Returns where the tokenizer of all corpora lies.

    Raises:
        UserError: they were not tokenized alike, or not as the model that goes on learning reads.
    """
    from engine.models import load_tokenizer

    first = stage.config.corpus[0].corpus
    others: list[ModelRef] = [part.corpus for part in stage.config.corpus[1:]]
    others += [stage.config.model] if isinstance(stage.config.model, ModelRef) else []
    tokens = load_tokenizer(stage.recipe.find_model(first)).get_vocab()
    for other in others:
        if load_tokenizer(stage.recipe.find_model(other)).get_vocab() != tokens:
            fix = f"say tokenizer: {other} in the stage that makes '{first}', or the same one in both"
            raise UserError(f"corpus '{first}' was tokenized by another vocabulary than that of '{other}': {fix}")
    return stage.recipe.find_model(first)


def _corpora(
    stage: Stage[PretrainConfig], processes: Processes, tokenizer: Any, sentences: bool
) -> tuple[dict[str, Shards], dict[str, Shards]]:
    """Returns the tokenized training and validation documents of each source; own texts are tokenized by all ranks together."""
    from engine.data.shards import SPLITS, Builder, Shards

    config = stage.config
    directories = {OWN: stage.partial / SHARDS}
    if config.data is not None:
        backend, language = tokenizer.backend_tokenizer, config.language
        builder = Builder(config.data, stage.recipe, config.text, backend, directories[OWN], sentences, language=language)
        builder.together(processes.rank, processes.processes, processes.barrier)
    else:
        directories = {part.name: Path(stage.recipe.find_model(part.corpus)) / SHARDS for part in config.corpus}
    training, validation = ({name: Shards(directory, split) for name, directory in directories.items()} for split in SPLITS)
    for name, corpus in training.items():
        if sentences and not corpus.with_sentences:
            lacks = f"corpus '{name}' lacks the beginnings of sentences, which {objective_class(config.objective).says} needs"
            raise UserError(f"{lacks}: say objective: {{type: {config.objective.type}}} in the stage that makes it")
    return training, validation


def main() -> None:
    """Entry point of `accelerate launch -m engine.pretrain RECIPE --stage NAME`."""
    stage_main("engine.pretrain", PretrainConfig, run)


if __name__ == "__main__":
    main()
