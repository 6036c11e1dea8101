"""Which channels hang together, through layers, operations and tied weights: connected components of a trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchreg.coupling.layers import Layer, Role, Site, attention_sites, layer
from torchreg.coupling.stand_ins import AttentionStandIn
from torchreg.coupling.tracing import Trace
from torchreg.coupling.values import Coupling
from torchreg.groups import Member

Key = tuple[Any, ...]  # (space, index) of a channel, ("tensor", id, dim, index) of a slice


class Classes:
    """Disjoint sets of keys: union-find with path halving."""

    def __init__(self) -> None:
        self._parent: dict[Key, Key] = {}

    def find(self, key: Key) -> Key:
        """The representative of the set of ``key``."""
        parent = self._parent
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    def join(self, a: Key, b: Key) -> None:
        """Make the sets of two keys one."""
        self._parent[self.find(a)] = self.find(b)


@dataclass(frozen=True)
class Held:
    """A tensor whose slices along ``dim`` are the channels of a space; no name if it is no parameter of the model."""

    name: str | None
    tensor: Tensor | None
    dim: int
    role: Role
    space: int
    layer: str


@dataclass
class Component:
    """Channels that hang together.

    Attributes:
        slices: the indices of each (tensor's name, dim, role).
        refusals: why they can't be removed.
        first: the place of the first layer that makes them in the model, their place in it, and its name.
    """

    slices: dict[tuple[str, int, Role], set[int]] = field(default_factory=lambda: defaultdict(set))
    refusals: list[str] = field(default_factory=list)
    first: tuple[int, int, str] = (1 << 60, 0, "")


@dataclass(frozen=True)
class Found:
    """Components of the same tensors: a coupling, with the reason if its channels can't be removed."""

    coupling: Coupling
    refusal: str


class Assembly:
    """The layers of a model on the spaces of its trace.

    Args:
        traced: the trace of a copy of the model with stand-ins.
        copy: that copy.
        model: the model.
        refused: names of layers whose channels stay, and why.
    """

    def __init__(self, traced: Trace, copy: nn.Module, model: nn.Module, refused: Mapping[str, str]) -> None:
        self.traced, self.model, self.refused = traced, model, refused
        self.classes = Classes()
        self.names = {id(t): name for name, t in (*model.named_buffers(), *model.named_parameters())}
        self.order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        self.held: list[Held] = []
        self.sizes: dict[int, int] = {}
        self.seeds: dict[int, int] = {}
        self.refusals: dict[int, str] = {}  # of spaces
        self.blocks: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # own block, the other space, its block
        stand_ins = {n for n, m in copy.named_modules() if isinstance(m, AttentionStandIn)}
        for node in traced.nodes:
            name = traced.names.get(id(node.module))
            if name is None:
                continue
            parent, _, part = name.rpartition(".")
            if parent in stand_ins:
                attention: Any = model.get_submodule(parent)
                self._place(node, parent, attention_sites(attention, part), made_by=f"{parent}.out_proj")
            elif (own := layer(name, node.module)) is not None:
                self._place(node, name, own)
        self.refusals |= dict.fromkeys(traced.inputs, "the model's input is added to them")
        self.refusals |= dict.fromkeys(traced.outputs, "the model returns them")

    def _place(self, node: Any, name: str, own: Layer, made_by: str | None = None) -> None:
        reads, writes = self.traced.reads[id(node)], self.traced.writes[id(node)]
        for space, n in ((reads, own.reads), (writes, own.writes)):
            if n is not None:
                self.sizes[space] = min(n, self.sizes.get(space, n))
        if own.writes:
            self.seeds[writes] = own.writes
        if own.refusal:
            self.refusals[reads] = self.refusals[writes] = own.refusal
        if own.read_refusal:
            self.refusals[reads] = own.read_refusal
        if (made_by or name) in self.refused:
            self.refusals[writes] = self.refused[made_by or name]
        if own.through:
            self.blocks[reads].append((own.read_block, writes, own.write_block))
            self.blocks[writes].append((own.write_block, reads, own.read_block))
        if own.write_block > 1:
            self.blocks[writes].append((own.write_block, writes, own.write_block))
        for site in own.sites:
            self.held.append(self._hold(name, site, writes if site.writes else reads, made_by or name))

    def _hold(self, prefix: str, site: Site, space: int, layer_name: str) -> Held:
        path = ".".join(part for part in (prefix, site.tensor) if part)
        owner, _, attribute = path.rpartition(".")
        module = self.model.get_submodule(owner)
        tensor = module._parameters.get(attribute)
        if site.role == "other" and tensor is None:
            tensor = module._buffers.get(attribute)  # type: ignore[assignment]
        if tensor is None:
            self.refusals[space] = f"{path!r} is parametrised" if attribute == "weight" else f"{path!r} is no parameter"
            return Held(None, None, site.dim, site.role, space, layer_name)
        if isinstance(module, nn.RNNBase):
            self.refusals[space] = f"the recurrent layer {owner!r} takes part"
        return Held(self.names[id(tensor)], tensor, site.dim, site.role, space, layer_name)

    def components(self) -> list[Component]:
        """Follow every channel that a layer writes through the graph, and gather what hangs together."""
        seen = self._follow()
        for held in self.held:
            for i in seen[held.space] if held.tensor is not None else ():
                self.classes.join((held.space, i), ("tensor", id(held.tensor), held.dim, i))
        components: dict[Key, Component] = defaultdict(Component)
        for space, indices in seen.items():
            for i in indices:
                component = components[self.classes.find((space, i))]
                if space in self.refusals:
                    component.refusals.append(self.refusals[space])
                if not 0 <= i < self.sizes.get(space, 1 << 60):
                    component.refusals.append("their way through the model is not understood")
        for held in self.held:
            for i in seen[held.space]:
                if held.name is None or held.tensor is None or not 0 <= i < held.tensor.shape[held.dim]:
                    continue
                component = components[self.classes.find((held.space, i))]
                component.slices[held.name, held.dim, held.role].add(i)
                if held.role == "maker":
                    place = self.order.get(held.layer, 1 << 59)
                    component.first = min(component.first, (place, i, held.layer))
        return list(components.values())

    def _follow(self) -> dict[int, set[int]]:
        leaving: dict[int, list[tuple[int, Callable[[int], Iterable[int]]]]] = defaultdict(list)
        for edge in self.traced.edges:
            leaving[edge.source].append((edge.target, edge.forward))
            leaving[edge.target].append((edge.source, edge.backward))
        seen: dict[int, set[int]] = defaultdict(set)
        todo = [(space, i) for space, n in self.seeds.items() for i in range(n)]
        for space, i in todo:
            seen[space].add(i)
        while todo:
            space, i = todo.pop()
            steps = [(other, k) for other, step in leaving[space] for k in step(i)]
            for block, other, its in self.blocks[space]:
                steps += [(other, k) for k in range(i // block * its, (i // block + 1) * its)]
            for other, k in steps:
                self.classes.join((space, i), (other, k))
                if k not in seen[other]:
                    seen[other].add(k)
                    todo.append((other, k))
        return seen


def found(components: list[Component], tensors: dict[str, Tensor]) -> list[Found]:
    """Couplings from components, in the order of the layers that make them."""
    alike: dict[Any, list[Component]] = defaultdict(list)
    for component in sorted(components, key=lambda c: c.first):
        if any(role == "maker" for _, _, role in component.slices):
            refusal = component.refusals[0] if component.refusals else ""
            alike[frozenset(component.slices), refusal].append(component)
    return [Found(_coupling(members, tensors), refusal) for (_, refusal), members in alike.items()]


def _coupling(components: list[Component], tensors: dict[str, Tensor]) -> Coupling:
    held: dict[Role, list[Member]] = {"maker": [], "user": [], "other": []}
    for key in components[0].slices:
        name, dim, role = key
        labels = [-1] * tensors[name].shape[dim]
        for channel, component in enumerate(components):
            for i in component.slices[key]:
                labels[i] = channel
        held[role].append(Member(name, dim, torch.tensor(labels, dtype=torch.int64)))
    position = {name: i for i, name in enumerate(tensors)}
    makers, users, others = (
        tuple(sorted(held[role], key=lambda m: position[m.name])) for role in ("maker", "user", "other")
    )
    return Coupling(components[0].first[2], len(components), makers, users, others)
