"""What was seen while a model ran, and what follows from it for layers and batch norms."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

__all__ = ["Call", "Record", "Source"]


class Call(NamedTuple):
    """One call of a layer, by its number."""

    layer: nn.Module
    turn: int


class Source(NamedTuple):
    """What a batch norm was given in one call.

    Attributes:
        made: the calls of layers that it was last multiplied in; empty where none was.
        given: the call whose very output it is, with the dimensions of a batch.
    """

    made: frozenset[Call]
    given: Call | None


def _sets() -> dict[nn.Module, set[nn.Module]]:
    return collections.defaultdict(set)


@dataclasses.dataclass
class Record:
    """What was seen while a model ran, once or more.

    Attributes:
        calls: how often each layer was called.
        sources: for every batch norm what it was given, call by call.
        readers: for every batch norm the layers that read what it gave.
        taken: layers whose output something else than a batch norm read, or the model returned.
        weights: for every layer or batch norm whose parameters something else read, a place, as ``file.py:12 in f``.
        written: batch norms whose output an operation in place has changed.
        returned: batch norms whose output lies in the memory of what the model returned, or may.
        rows: for every layer, whether in all calls it saw one number per channel and image, from a pooling.
        by_function: modules that call torch's function ``batch_norm`` on statistics of their own.
    """

    calls: collections.Counter[nn.Module] = dataclasses.field(default_factory=collections.Counter)
    sources: dict[nn.Module, list[Source]] = dataclasses.field(default_factory=dict)
    readers: dict[nn.Module, set[nn.Module]] = dataclasses.field(default_factory=_sets)
    taken: set[nn.Module] = dataclasses.field(default_factory=set)
    weights: dict[nn.Module, str] = dataclasses.field(default_factory=dict)
    written: set[nn.Module] = dataclasses.field(default_factory=set)
    returned: set[nn.Module] = dataclasses.field(default_factory=set)
    rows: dict[nn.Module, bool] = dataclasses.field(default_factory=dict)
    by_function: set[nn.Module] = dataclasses.field(default_factory=set)

    def makers(self, norm: nn.Module) -> set[nn.Module]:
        """The layers that made what a batch norm normalises."""
        return {call.layer for source in self.sources.get(norm, ()) for call in source.made}

    def feeds(self) -> dict[nn.Module, nn.Module]:
        """For a batch norm the layer it can be folded into: no other reads any output of that layer, nor it others."""
        readers = _sets()
        for norm, sources in self.sources.items():
            for source in sources:
                if source.given is not None:
                    readers[source.given.layer].add(norm)
        return {
            norm: layer
            for layer, (norm, *others) in readers.items()
            if not others
            and layer not in self.taken
            and {source.given and source.given.layer for source in self.sources[norm]} == {layer}
            and len(self.sources[norm]) == self.calls[layer]
        }

    def shared(self) -> dict[nn.Module, list[nn.Module]]:
        """Layers of which some calls go to one batch norm, and some to another, with these batch norms."""
        turns: dict[nn.Module, dict[nn.Module, set[int]]] = {}
        for norm, sources in self.sources.items():
            for call in (call for source in sources if len(source.made) == 1 for call in source.made):
                turns.setdefault(call.layer, {}).setdefault(norm, set()).add(call.turn)
        return {
            layer: list(norms)
            for layer, norms in turns.items()
            if any(one.isdisjoint(other) for one in norms.values() for other in norms.values())
        }

    def why_kept(
        self, norm: nn.Module, whitened: Callable[[nn.Module], bool], name: Callable[[nn.Module], str]
    ) -> tuple[str, nn.Module | None] | None:
        """Why a batch norm that ran has to stay, and the layer that is the cause; ``None`` where whitening replaces it.

        Whitening takes the place of the batch norm of a whitened layer; where a batch norm normalises an input of the
        model, or a sum of which not all is whitened, also the place of one that is read by a whitened layer.
        """
        makers, readers = self.makers(norm), self.readers.get(norm, set())
        plain = min((layer for layer in makers if not whitened(layer)), key=name, default=None)  # always the same one
        if makers and plain is None:
            return None
        joins = any(len(source.made) > 1 for source in self.sources.get(norm, ()))
        if plain is not None and not (joins and any(map(whitened, makers))):
            return f"it normalises the output of {name(plain)}", plain
        if any(map(whitened, readers)):
            return None
        reader = min(readers, key=name, default=None)
        why = "no whitened layer takes its place" if reader is None else f"it normalises the input of {name(reader)}"
        return why, reader
