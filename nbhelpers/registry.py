"""Which names are known, and what to say about one that is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """One line for an unknown name: the value, the nearest known name, and all known names in order."""
    names = list(known)
    near = get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Available: {', '.join(names)}"


class Registry:
    """Functions of one shape under their names, in the order in which they were registered.

    >>> strategies = Registry("strategy")
    >>> @strategies.register("first")
    ... def first(): ...
    >>> strategies.names()
    ['first']
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Callable] = {}

    def register(self, name: str) -> Callable[[Callable], Callable]:
        """Decorator that files a function under `name`; a name taken twice is a ValueError."""

        def add(function: Callable) -> Callable:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = function
            return function

        return add

    def names(self) -> list[str]:
        return list(self._entries)

    def __getitem__(self, name: str) -> Callable:
        if name not in self._entries:
            raise LookupError(unknown(self.kind, name, self._entries))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
