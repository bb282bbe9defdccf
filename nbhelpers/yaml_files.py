"""What does a YAML or JSON file say? Plain values alone, and nothing twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from nbhelpers.errors import one_line


class _Loader(yaml.SafeLoader):
    """YAML without what surprises: a key twice is refused instead of dropped, and so are references."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="references (*name) are not read", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a name must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read(path: str | Path, what: str = "file") -> Any:
    """The content of a YAML (or .json) file. what: how it is called in errors. ValueError for one that cannot be read,
    OSError where there is none."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text)
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{what} '{path}' is not valid YAML{at}: {' '.join(problem.split())}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} '{path}' cannot be read: {one_line(error)}") from error
