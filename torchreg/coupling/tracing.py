"""A model's channels as torch-pruning's dependency graph sees them, and which of them belong together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchreg.coupling import index_maps
from torchreg.coupling.index_maps import IDENTITY, IndexMap
from torchreg.coupling.layers import layer
from torchreg.coupling.stand_ins import Example, output_tensors


@dataclass
class Edge:
    """Channels that pass from the output of one layer or operation to another."""

    source: int
    target: int
    out_of: IndexMap
    into: IndexMap

    def forward(self, i: int) -> Iterable[int]:
        """The places in the target of a source's channel."""
        return [k for j in self.out_of.forward(i) for k in self.into.forward(j)]

    def backward(self, i: int) -> Iterable[int]:
        """The source's channels at a place of the target."""
        return [k for j in self.into.backward(i) for k in self.out_of.backward(j)]


@dataclass
class Trace:
    """The graph of a model: layers and operations, each with a space of channels where it reads and where it writes.

    Attributes:
        nodes: torch-pruning's nodes.
        reads, writes: the number of the space of each node; the same one for all but linear layers and convolutions.
        edges: how spaces hang together.
        names: of the layers and parameters among the nodes, by ``id(node.module)``.
        inputs: spaces of the model's inputs.
        outputs: spaces of its outputs.
    """

    nodes: list[Any]
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    inputs: set[int] = field(default_factory=set)
    outputs: set[int] = field(default_factory=set)


def require_torch_pruning() -> Any:
    """torch-pruning.

    Raises:
        ImportError: if it is missing; the message says how to install it.
    """
    try:
        import torch_pruning
    except ImportError:
        raise ImportError("coupled channels need torch-pruning: pip install 'torchreg-sparse[pruning]'") from None
    return torch_pruning


def trace(model: nn.Module, example: Example) -> Trace:
    """Run a model (a copy that may be changed) and read its graph.

    Raises:
        ValueError: if the model fails on the example, or torch-pruning can't trace it.
    """
    tp = require_torch_pruning()
    seen: dict[Any, Any] = {}

    class Graph(tp.DependencyGraph):  # type: ignore[name-defined]
        def _trace_computational_graph(
            self, module2node: Any, output: Any, gradfn2module: dict[Any, Any], *args: Any, **kwargs: Any
        ) -> Any:
            nonlocal seen
            seen = gradfn2module
            return super()._trace_computational_graph(module2node, output, gradfn2module, *args, **kwargs)

    entries: list[Any] = []

    def entrance(t: Tensor) -> Tensor:
        t = t.detach().clone()  # so that it is no inference tensor
        if not t.is_floating_point():
            return t
        entered = t.requires_grad_(True).clone()
        entries.append(entered.grad_fn)
        return entered

    def run(module: nn.Module, given: Example) -> list[Tensor]:
        outputs = output_tensors(given.map(entrance).call(module))
        return [t.clone() for t in outputs if t.grad_fn is not None]  # their clones are the graph's outputs

    failed = "The model can't be traced"
    with torch.enable_grad():
        try:
            outputs = run(model, example)
        except Exception as error:
            raise ValueError(f"{failed}: on the example it raised {type(error).__name__}: {error}") from error
        if not outputs:
            raise ValueError(f"{failed}: no output of it depends on a parameter by operations that have a gradient.")
        del outputs
        entries.clear()
        try:
            graph = Graph().build_dependency(model, example, forward_fn=run, verbose=False)
        except Exception as error:
            raise ValueError(f"{failed} by torch-pruning: {type(error).__name__}: {error}") from error
    return _read(tp, graph, seen, entries)


def _read(tp: Any, graph: Any, modules: dict[Any, Any], entries: Sequence[Any]) -> Trace:
    result = Trace(list(graph.module2node.values()))
    kinds = tp.ops.OPTYPE
    spaces = 0
    for node in result.nodes:
        two_sided = node.type in (kinds.CONV, kinds.DEPTHWISE_CONV, kinds.LINEAR)
        result.reads[id(node)], result.writes[id(node)] = spaces, spaces + two_sided
        spaces += 1 + two_sided
        if node.type == kinds.OUTPUT:
            result.outputs.add(result.reads[id(node)])
        name = graph._param_to_name.get(node.module) if node.type == kinds.PARAMETER else node._name
        if name is not None:
            result.names[id(node.module)] = name
    nodes = {g: graph.module2node[m] for g, m in modules.items() if m in graph.module2node}
    counts = _Counts(nodes, set(entries))
    for grad_fn, node in nodes.items():
        if grad_fn in entries:
            result.inputs.add(result.writes[id(node)])
        links = counts.links(grad_fn)
        channels = [counts.of(f, output) for f, output in links]
        for position, (f, output) in enumerate(links):
            shape = index_maps.output_shape(f, output)
            if channels[position] == 1 and _broadcast(shape, index_maps.output_shape(grad_fn)):
                continue
            into = index_maps.into(grad_fn, position, channels)
            source, target = result.writes[id(nodes[f])], result.reads[id(node)]
            result.edges.append(Edge(source, target, counts.out_of(f, output), into))
    return result


class _Counts:
    """How many channels every operation writes, by autograd's nodes.

    Args:
        nodes: torch-pruning's nodes by autograd's.
        entries: those where the model's inputs enter.
    """

    def __init__(self, nodes: dict[Any, Any], entries: set[Any]) -> None:
        self.nodes, self.entries = nodes, entries
        self.known: dict[Any, int | None] = {}

    def links(self, grad_fn: Any) -> list[tuple[Any, int]]:
        """The operations whose outputs one reads, and which of their outputs."""
        return [(f, output) for f, output in getattr(grad_fn, "next_functions", ()) if f in self.nodes]

    def of(self, grad_fn: Any, output: int = 0) -> int | None:
        """The channels of an output; None if they can't be told."""
        part = self.out_of(grad_fn, output)
        return part.size if isinstance(part, index_maps.Part) else self._whole(grad_fn)

    def out_of(self, grad_fn: Any, output: int) -> IndexMap:
        """Which of an operation's channels one of its outputs has."""
        if not any(kind in grad_fn.name() for kind in ("Split", "Unbind")):
            return IDENTITY
        return index_maps.of_split(grad_fn, output, self._whole(grad_fn))

    def _whole(self, grad_fn: Any) -> int | None:
        waiting = [] if grad_fn in self.known else [grad_fn]
        while waiting:  # no recursion: recurrent layers leave chains of thousands of operations
            g = waiting.pop()
            if g in self.known:
                continue
            before = [] if self._layer(g) is not None else [f for f, _ in self.links(g) if f not in self.known]
            if before:
                waiting += [g, *before]
            else:
                self.known[g] = self._counted(g)
        return self.known[grad_fn]

    def _layer(self, grad_fn: Any) -> int | None:
        own = layer("", self.nodes[grad_fn].module)
        return None if own is None else own.writes

    def _counted(self, grad_fn: Any) -> int | None:
        if (writes := self._layer(grad_fn)) is not None:
            return writes
        if grad_fn in self.entries:
            shape = index_maps.output_shape(grad_fn) or ()
            return shape[1] if len(shape) in (2, 4, 5) else None
        channels = [self.of(f, output) for f, output in self.links(grad_fn)]
        maps = [index_maps.into(grad_fn, i, channels) for i in range(len(channels))]
        counts = [m.count(n) for m, n in zip(maps, channels, strict=True) if n is not None]
        if counts and all(isinstance(m, index_maps.Placed) for m in maps):
            return sum(counts)
        return max(counts, default=None)


def _broadcast(source: tuple[int, ...] | None, target: tuple[int, ...] | None) -> bool:
    if source is None or target is None or len(source) != len(target):
        return False
    return any(a == 1 and b > 1 for a, b in zip(source, target, strict=True))
