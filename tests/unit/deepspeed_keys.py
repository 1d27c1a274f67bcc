"""The keys that DeepSpeed knows, asked of DeepSpeed itself: `python -m tests.unit.deepspeed_keys` prints them."""

import pprint


class _Asked(dict):
    """A configuration that remembers which keys it was asked for."""

    asked: set[str] = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __copy__(self):
        return _Asked(self)

    def keys(self):
        return self


def known_keys() -> dict[str, set[str]]:
    """Returns {name in engine.training.zero_keys: keys}, without those that are deprecated or removed."""
    from deepspeed.runtime import config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    config.DeepSpeedConfig(_Asked(train_batch_size=1, zero_optimization={"stage": 2}))
    # Asked for in an initialised process group only.
    top_level = (_Asked.asked | {"sequence_parallel_size"}) - set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    return {
        "TOP_LEVEL": top_level,
        "ZERO_OPTIMIZATION": _fields(DeepSpeedZeroConfig),
        "OFFLOAD_OPTIMIZER": _fields(DeepSpeedZeroOffloadOptimizerConfig),
        "OFFLOAD_PARAM": _fields(DeepSpeedZeroOffloadParamConfig),
    }


def _fields(model) -> set[str]:
    names = set()
    for name, field in model.model_fields.items():
        if not (field.json_schema_extra or {}).get("deprecated"):
            names |= {name, field.alias} - {None}
    return names


if __name__ == "__main__":
    for name, keys in known_keys().items():
        print(f"{name} = {pprint.pformat(tuple(sorted(keys)), width=120, compact=True)}")
