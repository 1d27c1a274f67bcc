"""A corpus: texts tokenized into shards, once, for any number of pretrainings; by as many processes as there are.

It needs neither a model nor a GPU. Every process reads files of its own, and tokenizes them on all cores that it has.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.config import Strict, TokenizerRef
from engine.data.splits import DataConfig
from engine.data.vocabulary import SPECIAL_TOKENS
from engine.errors import UserError, did_you_mean
from engine.objectives import AnyObjective, Objective, default_objective, objective_class
from engine.stages import heartbeat
from engine.stages.stage import Stage, stage_main

if TYPE_CHECKING:
    from engine.config import Recipe

LEAST = {"wordpiece": 100, "bpe": 261}
"""Kind of vocabulary → its smallest size: letters, or bytes, and special tokens."""
SHARDS = "corpus"
"""Directory of the shards in that of a stage."""


class NewTokenizer(Strict):
    """A vocabulary learnt from the training texts."""

    type: Literal["wordpiece", "bpe"] = "wordpiece"
    """BERT's, or GPT-2's and RoBERTa's pairs of bytes (at least 261 tokens)."""
    vocab_size: int = Field(30_522, ge=100)
    lowercase: bool | None = None
    """Fold case; None: WordPiece does, BPE does not."""
    documents: int | None = Field(None, ge=1)
    """Learn from this many documents only, from the top."""
    special_tokens: list[str] = []
    """More tokens that no text is broken into, such as those of languages: [en_XX, de_DE]; not of `wordpiece`."""


def require_learnt(new: NewTokenizer, objective: type[Objective], language: str | None) -> None:
    """Raises ValueError when a vocabulary that is learnt lacks what the objective needs, or the token of the language."""
    if language is not None and language not in new.special_tokens:
        raise ValueError(f"language: the vocabulary has no {language}: name it in tokenizer.train.special_tokens")
    missing = [name for name in objective.special_tokens if name not in SPECIAL_TOKENS[new.type]]
    if missing:
        raise ValueError(f"tokenizer.train: {new.type} has no {', '.join(missing)}, which {objective.says} needs: set type: bpe")
    added = [*objective.added_tokens, *new.special_tokens]
    if new.special_tokens and new.type == "wordpiece":
        raise ValueError("tokenizer.train.special_tokens: wordpiece takes none: set type: bpe")
    if twice := next((token for token in added if added.count(token) > 1), None):
        raise ValueError(f"tokenizer.train.special_tokens: '{twice}' is there twice: leave one out")
    least = LEAST[new.type] + len(added)
    if new.vocab_size < least:
        raise ValueError(f"tokenizer.train.vocab_size={new.vocab_size}: {new.type} begins with {least} tokens: raise it")


def learn(new: NewTokenizer, texts: Callable[[int | None], Iterator[str]], objective: type[Objective], directory: Path) -> None:
    """Learns a vocabulary and writes it as a tokenizer directory, complete or absent.

    Args:
        new: which one.
        texts: yields so many documents from the top; None: all.
        objective: its special tokens are added.
        directory: where the tokenizer goes.
    """
    from engine.data.vocabulary import learn_tokenizer

    lowercase = new.type == "wordpiece" if new.lowercase is None else new.lowercase
    added = [*objective.added_tokens, *new.special_tokens]
    learn_tokenizer(new.type, lambda: texts(new.documents), new.vocab_size, lowercase, directory, added)


def as_model(value: Any) -> Any:
    """Returns what a bare string stands for in a section of a tokenizer."""
    return {"model": value} if isinstance(value, str) else value


class OwnTokenizer(Strict):
    """The tokenizer of a corpus: taken from a model, or learnt. A bare string stands for `model`."""

    model: TokenizerRef | None = None
    """A stage, a hub id, or a directory with tokenizer.json and tokenizer_config.json; no model is needed in it."""
    train: NewTokenizer | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> OwnTokenizer:
        if (self.model is None) == (self.train is None):
            raise ValueError("tokenizer needs exactly one of model and train")
        return self


class CorpusConfig(Strict):
    """Section of a `corpus` stage."""

    PLACEMENT: ClassVar = ("section.processes",)
    """What an interrupted run may change before it goes on."""

    tokenizer: Annotated[OwnTokenizer, BeforeValidator(as_model)]
    objective: AnyObjective = Field(default_factory=default_objective)
    """What will be learnt from it: says which special tokens a new vocabulary gets, and whether the beginnings of sentences are
    kept."""
    data: DataConfig
    text: str = "text"
    """Column of the document."""
    language: str | None = None
    """Of all its documents, a token of the vocabulary such as en_XX: an objective that tags texts takes it."""
    shard_tokens: int = Field(2**26, ge=1)
    """Tokens from which on a shard is full. A process that trains on the corpus holds a few of them."""
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Each reads files of its own; auto: one on each machine, which tokenizes on all cores."""

    @model_validator(mode="after")
    def _learnt_for_the_objective(self) -> CorpusConfig:
        if self.tokenizer.train is not None:
            require_learnt(self.tokenizer.train, objective_class(self.objective), self.language)
        require_held_out(self.data)
        return self


def require_held_out(data: DataConfig) -> None:
    """Raises ValueError when nothing is held out, or something is said that means nothing to a text."""
    if not data.validation:
        raise ValueError("data.validation is needed to measure the loss: give a file or a share such as 2%")
    if data.slices:
        raise ValueError("data.slices: pretraining judges no single rows: say it in the stage that fine-tunes")


def require_language(tokenizer: Any, language: str | None) -> None:
    """Raises UserError when the token of a language is none of a tokenizer's."""
    if language is not None and language not in tokenizer.all_special_tokens:
        known = did_you_mean(language, tokenizer.all_special_tokens)
        raise UserError(f"language: {language} is no special token of {tokenizer.name_or_path}{known}")


def texts_of(data: DataConfig, recipe: Recipe, text: str) -> Callable[[int | None], Iterator[str]]:
    """Returns a function that yields so many training texts from the top; None: all."""
    from engine.data.cells import text_cell
    from engine.data.sources import read_rows

    def texts(documents: int | None) -> Iterator[str]:
        rows = read_rows(data.train, recipe, {text: text_cell})
        return (str(row[text]) for row in itertools.islice(rows, documents))

    return texts


class Workers:
    """The processes that make a corpus together, found by the variables that `accelerate launch` sets."""

    def __init__(self) -> None:
        self.rank, self.processes = (int(os.environ.get(name, alone)) for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1")))

    def __enter__(self) -> Workers:
        if self.processes > 1:
            import torch

            from engine.training.processes import PATIENCE

            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        return self

    def __exit__(self, *error: object) -> None:
        if self.processes > 1 and error[0] is None:
            import torch

            self.barrier()
            torch.distributed.destroy_process_group()

    def barrier(self) -> None:
        """Waits for all of them."""
        if self.processes > 1:
            import torch

            torch.distributed.barrier()


def run(stage: Stage[CorpusConfig]) -> None:
    """Makes the corpus, on this process and those beside it."""
    config = stage.config
    stage.inputs  # noqa: B018 - missing inputs show before anything is read
    from engine.data.shards import Builder
    from engine.models import load_tokenizer

    started = time.monotonic()
    heartbeat.beat("prepare")
    chosen = objective_class(config.objective)
    with Workers() as workers:
        main = workers.rank == 0
        directory = stage.partial / "tokenizer"
        if main:
            stage.begin()
            if config.tokenizer.train is not None and not directory.exists():
                learn(config.tokenizer.train, texts_of(config.data, stage.recipe, config.text), chosen, directory)
        workers.barrier()
        source = directory if config.tokenizer.model is None else stage.recipe.find_model(config.tokenizer.model)
        tokenizer = load_tokenizer(source)
        chosen.require(tokenizer)
        require_language(tokenizer, config.language)
        builder = Builder(
            config.data,
            stage.recipe,
            config.text,
            tokenizer.backend_tokenizer,
            stage.partial / SHARDS,
            chosen.sentences,
            config.shard_tokens,
            config.language,
        )
        if main:
            print(f"  {builder.describe(workers.processes)}", flush=True)
        files = builder.together(workers.rank, workers.processes, workers.barrier)
        if main:
            _publish(stage, builder.directory, files, tokenizer, started)


def _publish(stage: Stage[CorpusConfig], directory: Path, files: dict[str, Any], tokenizer: Any, started: float) -> None:
    from engine.data.shards import SPLITS, Shards

    corpora = {split: Shards(directory, split) for split in SPLITS}
    for split, corpus in corpora.items():
        print(f"  {split}: {corpus.describe}, shards: {len(corpus):,}", flush=True)
    tokenizer.save_pretrained(stage.output)
    shutil.copytree(directory, stage.output / SHARDS, copy_function=_linked)
    stage.known = {f"{SHARDS}/{name}": entry for name, entry in files.items()}
    stage.complete(
        corpus={split: {**corpus.ledger, "shards": len(corpus)} for split, corpus in corpora.items()},
        seconds={"this_run": round(time.monotonic() - started, 3)},
    )


def _linked(source: str, target: str) -> None:
    """Gives a file a second name, so that a run that is killed now still has the first; copies it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def main() -> None:
    """Entry point of `python -m engine.corpus RECIPE --stage NAME`, alone or under `accelerate launch`."""
    stage_main("engine.corpus", CorpusConfig, run)


if __name__ == "__main__":
    main()
