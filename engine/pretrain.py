"""Pretraining from scratch or from a model, on packed documents."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from engine import heartbeat
from engine.config import Strict, TokenizerRef
from engine.data.splits import DataConfig
from engine.errors import UserError
from engine.models import ScratchConfig
from engine.objectives import MlmConfig
from engine.stage import Stage, stage_main
from engine.train_config import Trained

if TYPE_CHECKING:
    import numpy as np

    from engine.data.corpus import Corpus
    from engine.distributed import Batch, Processes
    from engine.evaluate import Ranks
    from engine.objectives.mlm import MaskedLanguageModelling


PROBE_LOGITS = 64
SPECIAL_TOKENS = ("cls_token", "sep_token", "pad_token", "mask_token")
"""What the tokenizer of a pretraining has to have."""
FREQUENCY_TOKENS = 10_000_000
"""Tokens from the top of the corpus from which frequencies are estimated."""


class NewTokenizer(Strict):
    """A lower-casing WordPiece vocabulary learnt from the training texts."""

    vocab_size: int = Field(30_522, ge=100)
    lowercase: bool = True
    documents: int | None = Field(None, ge=1)
    """Learn from this many documents only, from the top."""


class TokenizerConfig(Strict):
    """The tokenizer of a pretrained model: taken from a model, or learnt. A bare string stands for `model`."""

    model: TokenizerRef | None = None
    """A stage, a hub id, or a directory with tokenizer.json and tokenizer_config.json; no model is needed in it."""
    train: NewTokenizer | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizerConfig:
        if (self.model is None) == (self.train is None):
            raise ValueError("tokenizer needs exactly one of model and train")
        return self


class PretrainConfig(Trained):
    """Section of a `pretrain` stage."""

    model: ScratchConfig
    """Shape of the new model."""
    tokenizer: Annotated[TokenizerConfig, BeforeValidator(lambda value: {"model": value} if isinstance(value, str) else value)]
    objective: MlmConfig = MlmConfig()
    data: DataConfig
    text: str = "text"
    """Column of the document."""
    sequence_length: int = Field(128, ge=8)
    """Tokens per packed row; longer documents are cut into windows."""

    @model_validator(mode="after")
    def _positions_reach(self) -> PretrainConfig:
        if self.sequence_length > self.model.positions:
            raise ValueError(
                f"sequence_length={self.sequence_length} is above model.positions={self.model.positions}: "
                "lower the first or raise the second"
            )
        if not self.data.validation:
            raise ValueError("data.validation is needed to measure the loss: give a file or a share such as 2%")
        return self


def run(stage: Stage[PretrainConfig]) -> None:
    """Runs one pretraining stage on this rank."""
    config = stage.config
    stage.inputs  # noqa: B018 - missing inputs show before anything heavy is loaded
    import torch

    from engine.distributed import Processes
    from engine.finetune import saver
    from engine.loop import Fit, Judge
    from engine.models import build_model, load_tokenizer, set_dropout
    from engine.objectives.mlm import MaskedLanguageModelling
    from engine.randomness import torch_seed

    started = time.monotonic()
    processes = Processes(config, stage.recipe, stage.partial)
    if processes.main:
        stage.begin()
    with processes.main_first():
        tokenizer = load_tokenizer(_tokenizer_directory(stage))
        require_special_tokens(tokenizer)
        training, validation = _corpora(stage, tokenizer)
    torch.manual_seed(torch_seed(stage.seed, "initialize"))
    model = build_model(config.model, "AutoModelForMaskedLM", rounded(len(tokenizer)), tokenizer.pad_token_id)
    predict_frequencies(model, training)
    if config.train.dropout is not None:
        set_dropout(model, config.train.dropout)
    objective = MaskedLanguageModelling(config.objective, len(tokenizer), tokenizer.mask_token_id, tokenizer.all_special_ids)
    batches = PackedBatches(training, objective, tokenizer, config.sequence_length, config.train.batch_size, stage.seed)
    held_out = PackedBatches(validation, objective, tokenizer, config.sequence_length, config.train.batch_size, stage.seed)
    judge = Judge(held_out.evaluate, "loss", False, held_out.probe)
    fit = Fit(processes, model, objective.loss, batches, judge, saver(model, tokenizer), stage.partial, stage.name, stage.seed)
    for note in (f"{processes.describe}; {batches.describe}", f"training {training.describe}", f"held out {validation.describe}"):
        fit.tracker.say(note)
    state = fit.run()
    if processes.main:
        ledgers = {"train": training.ledger, "validation": validation.ledger}
        _publish(stage, processes, held_out, state, fit.weights, started, ledgers)
    processes.close()


def require_special_tokens(tokenizer: Any) -> None:
    """Raises UserError when the tokenizer lacks a special token that packed rows are made with."""
    missing = [name for name in SPECIAL_TOKENS if getattr(tokenizer, name) is None]
    if missing:
        raise UserError(
            f"{tokenizer.name_or_path}: this tokenizer has no {', '.join(missing)}, which masked language modelling needs: "
            "name them in its tokenizer_config.json"
        )


def predict_frequencies(model: Any, corpus: Corpus) -> None:
    """Sets the bias of the vocabulary projection to the log frequencies of the tokens (Meister et al. 2023, arXiv:2212.09686).

    The weights then learn from the first step on what depends on the context, not first how frequent every token is.
    """
    import numpy as np
    import torch

    bias = model.get_output_embeddings().bias
    counts = np.bincount(corpus.tokens[:FREQUENCY_TOKENS], minlength=len(bias))[: len(bias)] + 1.0
    with torch.no_grad():
        bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))


def _publish(
    stage: Stage[PretrainConfig],
    processes: Processes,
    held_out: PackedBatches,
    state: Any,
    weights: Path,
    started: float,
    corpora: dict[str, dict[str, int]],
) -> None:
    from engine.evaluate import ALONE
    from engine.loop import same_logits
    from engine.models import load_model, size_of

    heartbeat.beat("finish")
    model = load_model(weights, "AutoModelForMaskedLM").to(processes.device)
    same_logits(held_out.probe(model), state.probe, weights)
    metrics = held_out.evaluate(model, ALONE)
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


def rounded(vocabulary: int) -> int:
    """Pads the vocabulary to a multiple of 64: matrix products with odd widths are markedly slower."""
    return -(-vocabulary // 64) * 64


def _tokenizer_directory(stage: Stage[PretrainConfig]) -> Path | str:
    """Returns where the tokenizer lies, learning it first when the recipe says so."""
    from engine.data.cells import text_cell
    from engine.data.sources import read_rows

    config = stage.config.tokenizer
    if config.model is not None:
        return stage.recipe.find_model(config.model)
    assert config.train is not None
    directory = stage.partial / "tokenizer"
    if not directory.exists():
        from engine.data.wordpiece import learn_wordpiece

        rows = read_rows(stage.config.data.train, stage.recipe, {stage.config.text: text_cell})
        texts = (str(row[stage.config.text]) for row in rows)
        learn_wordpiece(texts, config.train.vocab_size, config.train.lowercase, config.train.documents, directory)
    return directory


def _corpora(stage: Stage[PretrainConfig], tokenizer: Any) -> tuple[Corpus, Corpus]:
    """Returns the tokenized training and validation documents, from disk when they are there already."""
    from engine.data.cells import text_cell
    from engine.data.corpus import Corpus, CorpusWriter
    from engine.data.splits import iter_splits

    paths = [stage.partial / "corpus" / name for name in ("train", "validation")]
    if all(path.exists() for path in paths):
        return Corpus.open(paths[0]), Corpus.open(paths[1])
    text = stage.config.text
    notes: list[str] = []
    writers = {path.name: CorpusWriter(tokenizer.backend_tokenizer, path) for path in paths}
    for name, row in iter_splits(stage.config.data, stage.recipe, text, {text: text_cell}, notes):
        if name in writers:
            writers[name].add(row[text])
    for note in notes:
        print(f"  {note}", flush=True)
    return writers["train"].close(), writers["validation"].close()


class PackedBatches:
    """Masked batches of packed rows, as a seekable function of (step, rank).

    Args:
        corpus: tokenized documents.
        objective: corrupts the tokens.
        tokenizer: gives the special tokens around every piece.
        length: tokens per row.
        batch_size: rows per optimizer step over all ranks.
        seed: of packing, order and masking.
    """

    def __init__(
        self, corpus: Corpus, objective: MaskedLanguageModelling, tokenizer: Any, length: int, batch_size: int, seed: int
    ) -> None:
        import numpy as np

        from engine.data.batches import BatchPlan
        from engine.data.packing import PackedRows

        self.corpus, self.objective, self.length, self.seed = corpus, objective, length, seed
        self.start, self.end = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.pad = tokenizer.pad_token_id
        self.windows = corpus.windows(length - 2)
        self.packed = PackedRows(self.windows[:, 1] - self.windows[:, 0] + 2, length, seed)
        self.plan = BatchPlan(np.full(len(self.packed), length), batch_size, seed, bucket=False)
        self.steps_per_epoch = self.plan.steps_per_epoch

    @property
    def describe(self) -> str:
        """Size of the data and how full the rows are."""
        return (
            f"{len(self.corpus.ends):,} documents, {self.corpus.ends[-1]:,} tokens, {len(self.windows):,} pieces in "
            f"{len(self.packed):,} rows of {self.length} ({self.packed.fill:.1%} filled), {self.steps_per_epoch:,} steps an epoch"
        )

    def row(self, epoch: int, row: int) -> dict[str, np.ndarray]:
        """Returns input_ids, position_ids, segments and labels of one packed row, each of shape (length,)."""
        import numpy as np

        from engine.objectives.mlm import IGNORED
        from engine.randomness import generator

        columns = {name: np.zeros(self.length, dtype=np.int64) for name in ("input_ids", "position_ids", "segments", "labels")}
        columns["input_ids"][:] = self.pad
        columns["labels"][:] = IGNORED
        at = 0
        for number, piece in enumerate(self.packed.row(epoch, row), 1):
            first, last = self.windows[piece]
            tokens = np.concatenate([[self.start], self.corpus.tokens[first:last].astype(np.int64), [self.end]])
            place = slice(at, at + len(tokens))
            corrupted, labels = self.objective.corrupt(tokens, generator(self.seed, "mask", epoch, piece))
            columns["input_ids"][place], columns["labels"][place] = corrupted, labels
            columns["position_ids"][place] = np.arange(len(tokens))
            columns["segments"][place] = number
            at += len(tokens)
        return columns

    def collate(self, epoch: int, rows: np.ndarray) -> Batch:
        """Stacks rows into tensors of shape (rows, length), with `count` and `tokens`."""
        import numpy as np
        import torch

        columns = [self.row(epoch, int(row)) for row in rows]
        arrays = {name: np.stack([column[name] for column in columns]) for name in columns[0]}
        batch: Batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["count"] = int((arrays["labels"] >= 0).sum())
        batch["tokens"] = int((arrays["segments"] > 0).sum())
        return batch

    def at(self, step: int, rank: int, processes: int, micro: int) -> list[Batch]:
        """Returns this rank's micro batches of `step`."""
        epoch, _ = self.plan.position(step)
        return [self.collate(epoch, rows) for rows in self.plan.micro_batches(step, rank, processes, micro)]

    def evaluate(self, model: Any, ranks: Ranks) -> dict[str, float]:
        """Returns loss (nats per predicted token), perplexity and predicted tokens over all rows, always masked alike."""
        import numpy as np
        import torch

        rows = np.arange(len(self.packed))
        parts = np.array_split(rows, max(1, -(-len(rows) // 32)))
        training = model.training
        model.eval()
        total = count = 0.0
        with torch.no_grad():
            for turn in range(-(-len(parts) // ranks.processes)):
                ranks.poll()
                index = turn * ranks.processes + ranks.rank
                batch = self._on(model, self.collate(0, parts[min(index, len(parts) - 1)]))
                loss, targets = self.objective.loss(model, batch)
                if index < len(parts):
                    total, count = total + float(loss), count + float(targets)
        model.train(training)
        total, count = ranks.sum(total, count)
        return {"loss": total / count, "perplexity": math.exp(min(total / count, 50.0)), "predicted_tokens": count}

    def probe(self, model: Any) -> list[float]:
        """Returns a few logits of the first row: what saved weights have to give again when they are re-opened."""
        import numpy as np
        import torch

        training = model.training
        model.eval()
        with torch.no_grad():
            logits = self.objective.logits(model, self._on(model, self.collate(0, np.arange(1))))
        model.train(training)
        return [float(value) for value in logits.flatten()[:PROBE_LOGITS]]

    def _on(self, model: Any, batch: Batch) -> Batch:
        import torch

        return {name: value.to(model.device) for name, value in batch.items() if torch.is_tensor(value)}


def main() -> None:
    """Entry point of `accelerate launch -m engine.pretrain RECIPE --stage NAME`."""
    stage_main("engine.pretrain", PretrainConfig, run)


if __name__ == "__main__":
    main()
