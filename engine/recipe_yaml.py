"""YAML as recipes are written: `no` is a word, `5e-5` a number, and every key stands on a line that a message can name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

AS_WRITTEN = ("where", "names")
"""Keys of mappings from and to the contents of data files: `no`, `007` and `1.0` are there what was written."""


def key_lines(node: yaml.Node | None, where: str = "") -> Iterator[tuple[str, int]]:
    """Yields (dotted key, line) of every key below a node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{where}.{key.value}".lstrip(".")
            yield path, key.start_mark.line + 1
            yield from key_lines(value, path)


class RecipeLoader(yaml.SafeLoader):
    """YAML whose keys are words and come once; `5e-5` is a number and `no` is text, as in YAML 1.2, and a date is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
            if key.value in AS_WRITTEN and isinstance(value, yaml.MappingNode):
                for _, inner in value.value:
                    if isinstance(inner, yaml.ScalarNode):
                        inner.tag = "tag:yaml.org,2002:str"
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


# YAML 1.1 also takes yes, no, on and off for truth values: a language, a country, an answer.
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
RecipeLoader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: node.value)
FLOAT = (re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))
"""Numbers of YAML 1.2 that PyYAML takes for text: (pattern, first characters)."""
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", *FLOAT)
