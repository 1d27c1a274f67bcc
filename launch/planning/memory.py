"""How much memory a rank needs under each ZeRO level: pure functions of the model's footprint and the DeepSpeed configuration.

The formulas follow DeepSpeed 0.19 as this engine uses it: fp32 weights and gradients (autocast casts inside the model), plain
`torch.optim.AdamW`, contiguous gradients. P: elements of the model, N: ranks, p = P/N, B: reduce_bucket_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.training.zero import offload_devices
from launch.planning.footprint import Footprint, Moment

Place = Literal["device", "host", "disk"]
Group = Literal["parameters", "gradients", "optimizer", "activations", "buffers"]
ALL_REDUCE = 500_000_000
"""Elements that stage 0 copies into one buffer for its all-reduce."""
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}
"""What DeepSpeed takes for a key that the JSON leaves out."""


@dataclass(frozen=True)
class Item:
    """One number of the plan and where it comes from."""

    group: Group
    bytes: int
    formula: str
    place: Place = "device"


@dataclass(frozen=True)
class Setting:
    """What the memory of a rank depends on besides the model."""

    ranks: int
    accumulation: int
    optimizer_bytes: float
    """Bytes of optimizer state per element, as `plan` counts them: 8 for Adam's two fp32 averages."""
    weight_bytes: int
    """4, or 2 with fp16."""
    gpu: bool
    """GPUs hold a buffer in full; a CPU holds only what has been written to."""
    resident: int = 0
    """Bytes of other models on the device (a teacher)."""


@dataclass(frozen=True)
class Need:
    """The items that are alive at the moment of the largest total on the device (on a CPU: device and host together)."""

    phase: str
    items: list[Item] = field(default_factory=list)

    def total(self, *places: Place) -> int:
        return sum(item.bytes for item in self.items if item.place in (places or ("device",)))

    def group(self, group: Group, place: Place = "device") -> int:
        return sum(item.bytes for item in self.items if item.group == group and item.place == place)


class Level:
    """One DeepSpeed configuration (None: no DeepSpeed) applied to one model.

    Args:
        zero: its `zero_optimization` section.
    """

    def __init__(self, zero: dict[str, Any] | None, footprint: Footprint, setting: Setting) -> None:
        self.zero, self.setting, self.footprint = zero or {}, setting, footprint
        self.stage: int = self.zero.get("stage", 0)
        self.engine = zero is not None
        self.elements = footprint.parameters
        self.share = -(-self.elements // setting.ranks)
        self.bucket = self._value("reduce_bucket_size")
        optimizer, parameters = offload_devices(self.zero)
        places: dict[str, Place] = {"none": "device", "cpu": "host", "nvme": "disk"}
        self.optimizer_at, self.parameters_at = places[optimizer], places[parameters]

    def _value(self, key: str) -> int:
        return int(self.zero.get(key, DEFAULTS[key]))

    def peak(self) -> Need:
        """Returns the moment that needs most."""
        places: tuple[Place, ...] = ("device",) if self.setting.gpu else ("device", "host")
        return max(self.phases(), key=lambda need: need.total(*places))

    def phases(self) -> Iterator[Need]:
        """Yields what each part of a step needs: the moments of forward and backward, the reduction, the update."""
        resident = list(self._states())
        if self.setting.resident:
            resident.append(Item("parameters", self.setting.resident, "weights of the teacher, which stays loaded"))
        yield Need("start", list(self._start()))
        for moment in self.footprint.moments:
            live = Item("activations", moment.activations, self._rows_in_words())
            yield Need("forward and backward", [*resident, live, *self._backward(moment)])
        yield Need("optimizer step", [*resident, *self._update()])

    def _rows_in_words(self) -> str:
        return f"activations and temporaries of {self.footprint.rows} rows, counted operation by operation"

    # What is there all the time.

    def _states(self) -> Iterator[Item]:
        weight, elements, share = self.setting.weight_bytes, self.elements, self.share
        if self.stage == 3:
            yield Item("parameters", weight * share, f"{weight} × P/N: the rank's shard of the weights", self.parameters_at)
            yield from self._gathered()
        else:
            yield Item("parameters", weight * elements, f"{weight} × P: all weights, in one flat buffer from stage 1 on")
        if self.stage or weight == 2:
            count, name = (elements, "P") if self.stage == 0 else (share, "P/N")
            words = f"4 × {name}: fp32 weights that the optimizer updates, a copy of its own"
            yield Item("optimizer", 4 * count, words, self.optimizer_at)
        count, name = (elements, "P") if self.stage == 0 else (share, "P/N")
        state = round(self.setting.optimizer_bytes * count)
        yield Item("optimizer", state, f"{self.setting.optimizer_bytes:g} × {name}: the optimizer's averages", self.optimizer_at)
        if self.stage == 3:
            at: Place = "host" if self.optimizer_at != "device" else "device"
            yield Item("gradients", 4 * share, "4 × P/N: the rank's shard of the gradients, kept for the whole run", at)
            size = self._bucket_bytes(self.elements)
            yield Item("buffers", size, f"{weight} × reduce_bucket_size (on CPUs: what is written to), kept for the whole run")
        yield from self._offload()

    def _offload(self) -> Iterator[Item]:
        if self.optimizer_at == "device":
            return
        weight, largest = self.setting.weight_bytes, max(self.footprint.numels)
        yield Item("gradients", 4 * self.share, "4 × P/N: gradients beside the offloaded optimizer", "host")
        if self.stage in (1, 2):
            yield Item("buffers", weight * self.share, f"{weight} × P/N: updated weights on their way back", "host")
            yield Item("buffers", weight * largest, f"{weight} × largest parameter: staging of gradients", "host")
            yield Item("buffers", weight * largest, f"{weight} × largest parameter: staging of gradients")
            if self.setting.accumulation > 1:
                yield Item("gradients", 4 * self.share, "4 × P/N: gradients accumulated so far", "host")
        if self.optimizer_at == "disk":
            group = min(self._value("sub_group_size"), self.share)
            count = int((self.zero.get("offload_optimizer") or {}).get("buffer_count", 4))
            yield Item("buffers", 4 * count * group, f"4 × buffer_count {count} × sub-group: swapping of the optimizer", "host")
        if self.parameters_at == "disk":
            section = self.zero.get("offload_param") or {}
            count, size = int(section.get("buffer_count", 5)), int(section.get("buffer_size", 100_000_000))
            words = f"{weight} × buffer_count {count} × buffer_size, locked in memory: swapping of the weights"
            yield Item("buffers", weight * count * size, words, "host")

    def _gathered(self) -> Iterator[Item]:
        """Weights that stage 3 holds whole: small ones for good, those in use, and those that will be used again soon."""
        weight, threshold = self.setting.weight_bytes, self._value("stage3_param_persistence_threshold")
        groups = self.zero.get("zero_hpz_partition_size", 1)
        if isinstance(groups, int) and groups > 1:
            words = f"{weight} × P / zero_hpz_partition_size {groups}: the node's second copy of the weights"
            yield Item("parameters", weight * self.elements // groups, words)
        if self.setting.ranks == 1 and self.parameters_at == "device":
            return  # a single rank uses its shard as it is
        small = sum(numel for numel in self.footprint.numels if numel <= threshold)
        reuse, prefetch = self._value("stage3_max_reuse_distance"), self._value("stage3_prefetch_bucket_size")
        large = self.elements - small
        # A layer at distance d from the end of the forward pass is used again after 2d elements.
        kept = min(large, reuse // 2 + prefetch + self.footprint.largest_module)
        words = f"{weight} × weights up to stage3_param_persistence_threshold: never split during a step"
        yield Item("parameters", weight * small, words)
        words = (
            f"{weight} × min(P, stage3_max_reuse_distance / 2 + prefetch + largest layer): whole weights that are in use, or "
            "will be used again too soon to be given up"
        )
        yield Item("buffers", weight * kept, words)
        fetched = min(large, max(self.footprint.largest_module, min(prefetch, large)))
        yield Item("buffers", weight * fetched, f"{weight} × what is fetched at once: all-gather before it is cut into weights")

    # What comes and goes.

    def _start(self) -> Iterator[Item]:
        weight, elements = self.setting.weight_bytes, self.elements
        yield Item("parameters", weight * elements, f"{weight} × P: the model as it was loaded")
        if self.stage in (1, 2):
            yield Item("buffers", weight * elements, f"{weight} × P: the flat buffer that the weights are copied to")

    def _bucket_bytes(self, written: int) -> int:
        return self.setting.weight_bytes * (self.bucket if self.setting.gpu else min(self.bucket, written))

    def _backward(self, moment: Moment) -> Iterator[Item]:
        weight, setting = self.setting.weight_bytes, self.setting
        produced = moment.gradients // weight
        done = produced >= self.elements
        whole = weight * self.elements if setting.accumulation > 1 else moment.gradients
        if self.stage < 2:
            yield Item("gradients", whole, f"{weight} × P: gradients of all weights (fewer before the end of the backward pass)")
            if done and self.engine:
                yield from self._reduction()
            return
        if self.stage == 2:
            words = f"{weight} × reduce_bucket_size (on CPUs: what is written to): gradients on their way to their owner"
            yield Item("buffers", self._bucket_bytes(produced), words)
            if setting.accumulation > 1 and self.optimizer_at == "device":
                yield Item("gradients", 4 * self.share, "4 × P/N: gradients accumulated so far")
        if produced > self.bucket or done:
            yield from self._reduction()

    def _reduction(self) -> Iterator[Item]:
        weight, elements = self.setting.weight_bytes, self.elements
        sent = min(self.bucket, elements)
        if self.stage == 0:
            yield Item("buffers", weight * min(elements, ALL_REDUCE), f"{weight} × min(P, 5e8): copy for the all-reduce")
            return
        if self.stage == 1:
            # The gradients move into the bucket; it replaces as much of them as it holds.
            extra = self._bucket_bytes(elements) - weight * sent
            yield Item("buffers", extra, "reduce_bucket_size beyond the gradients that moved into it")
        copy = weight * sent
        if self.stage in (1, 2) and self.optimizer_at == "device":
            part = weight * self.share
            if elements <= self.bucket:
                # One bucket: the copy is gone when the rank's part is cut out.
                copy = max(copy, part)
            else:
                yield Item("gradients", part, f"{weight} × P/N: the rank's part of the gradients")
        yield Item("buffers", copy, f"{weight} × min(P, reduce_bucket_size): copy for the reduction")

    def _update(self) -> Iterator[Item]:
        weight, share = self.setting.weight_bytes, self.share
        if self.stage == 0:
            yield Item("gradients", weight * self.elements, f"{weight} × P: gradients of all weights")
            return
        if self.optimizer_at == "device":
            if self.stage < 3:
                yield Item("gradients", weight * share, f"{weight} × P/N: the rank's part of the gradients")
            yield Item("gradients", 4 * share, "4 × P/N: the same, flattened in fp32 for the optimizer")
