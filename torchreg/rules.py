"""Which parameter gets which penalty."""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchreg.assignments import Assignment, by_rule, clean_name, parameters_of, unwrapped
from torchreg.penalties import Penalty, parts

Selector = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Parameter], bool] | Iterable[nn.Parameter]
Rules = Penalty | Mapping[Any, Penalty | None] | Iterable[tuple[Selector, Penalty | None]]

_WEIGHTED = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,  # its in_proj_weight is the weight of three linear layers
)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class _Weights:
    """The default selection as a rule's key (see `WEIGHTS`)."""

    def __repr__(self) -> str:
        return "WEIGHTS"


WEIGHTS = _Weights()
"""As a rule's key: the weights of linear, convolution, bilinear, recurrent and attention layers.

What a bare penalty selects. ``{"head.*": None, WEIGHTS: L1(1e-4)}`` makes an exception from it."""


class _Members:
    """The parameters that share a penalty's groups."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)

    def __call__(self, name: str, parameter: Any) -> bool:
        return name in self.names


def assign(model: nn.Module, rules: Rules) -> list[Assignment]:
    """Give every parameter of ``model`` a penalty or a reason to be left alone.

    The first rule that matches a parameter decides. A tied weight is one parameter with several names; a rule that
    matches any of them matches it (the default selection wants all of them to be weights, so a linear layer tied to
    an embedding is left alone).

    Raises:
        TypeError: if ``model`` or ``rules`` are not what they should be.
        ValueError: if a rule matches no parameter, or one that can't be penalised.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected `model` to be an nn.Module, got {_described(model)}.")
    pairs = _pairs(rules)
    model = unwrapped(model)
    if any(name.split(".")[-1] == "_flat_param" for name, _ in model.named_parameters()):
        raise ValueError(
            "FullyShardedDataParallel has flattened the parameters into one: give it use_orig_params=True, or shard by "
            "torch.distributed.fsdp.fully_shard."
        )
    modules = {clean_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    assignments = parameters_of(model)
    for index, (selector, penalty) in enumerate(pairs):
        label = _label(selector)
        matches = _matcher(selector, label, modules, assignments)
        matched = [a for a in assignments if matches(a)]
        if not matched and not (isinstance(selector, _Weights) and not assignments):
            raise ValueError(_no_match(label, selector, assignments))
        won = [a for a in matched if a.rule_index is None]
        if matched and not won:
            warnings.warn(f"Rule {label} decides nothing: earlier rules match all its parameters.", stacklevel=3)
        for a in won:
            a.rule_index, a.rule, a.penalty = index, label, penalty
            if penalty is None:
                a.reason = f"rule {label}: None"
            else:
                _check_penalised(a, penalty, explicit=not isinstance(selector, _Weights))
    for a in assignments:
        if a.rule_index is None:
            a.reason = _default_reason(a, modules)
    _check_members(pairs, assignments)
    for penalty, chosen in by_rule(assignments):
        if penalty is not None and penalty.is_joint:
            try:
                penalty.check_together([a.parameter.shape for a in chosen])
            except ValueError as error:
                raise ValueError(f"Rule {chosen[0].rule}: {error}") from None
            for a in chosen:
                a.penalty = penalty
    return assignments


def _check_members(pairs: Iterable[tuple[Any, Penalty | None]], assignments: Iterable[Assignment]) -> None:
    """Raise ``ValueError`` if groups are shared by parameters that the model does not have."""
    names = {name for a in assignments for name in a.aliases}
    for selector, penalty in pairs:
        missing = [name for name in (penalty and penalty.members()) or () if name not in names]
        if missing:
            raise ValueError(
                f"The groups of rule {_label(selector)} are shared by {missing[0]!r}, which is no parameter of the "
                "model."
            )


def _check_penalised(a: Assignment, penalty: Penalty, *, explicit: bool) -> None:
    p = a.parameter
    if isinstance(p, nn.parameter.UninitializedParameter):
        raise ValueError(f"Parameter {a.name!r} is not initialised yet: run one forward pass, then add penalties.")
    if not (p.is_floating_point() or p.is_complex()):
        if not explicit:
            a.penalty, a.reason = None, f"quantised ({p.dtype})"
            return
        raise TypeError(
            f"Expected parameter {a.name!r} to be floating point or complex, got {p.dtype}; "
            f"leave it alone with a rule {{{a.name!r}: None}} before {a.rule}."
        )
    if not p.is_leaf:
        raise ValueError(f"Expected parameter {a.name!r} to be a leaf tensor, got the result of an operation.")
    refusal = "" if explicit and getattr(a.module, "penalizable", False) else _reparametrised(a)  # see factorization
    if refusal:
        exception = f"a rule {{{a.name!r}: None}} before {a.rule}"
        if not explicit:  # there is no key to put it before
            exception = f"the rules {{{a.name!r}: None, torchreg.rules.WEIGHTS: {penalty.type_name}(...)}}"
        raise ValueError(
            f"Parameter {a.name!r} is {refusal}: the weight that the layer uses is computed from it, and a penalty "
            f"on it is not one on the weight. Leave it alone with {exception}."
        )
    try:
        parts.check_flat(penalty, p)
        penalty.check_weight(p)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Parameter {a.name!r}: {error}") from None


def _reparametrised(a: Assignment) -> str:
    if ".parametrizations." in f".{a.name}" or isinstance(a.module, torch.nn.utils.parametrize.ParametrizationList):
        return "the original of a parametrization"
    for suffix, what in (
        ("_g", "weight-normed"),
        ("_v", "weight-normed"),
        ("_orig", "reparametrised (pruned or spectral-normed)"),
    ):
        base = a.attribute.removesuffix(suffix)
        if (
            base != a.attribute
            and base not in a.module._parameters
            and isinstance(getattr(a.module, base, None), Tensor)
        ):
            return what
    return ""


def _pairs(rules: Rules) -> list[tuple[Any, Penalty | None]]:
    if isinstance(rules, Penalty):
        members = rules.members()
        return [(WEIGHTS if members is None else _Members(members), rules)]
    if isinstance(rules, type) or not isinstance(rules, (Mapping, Iterable)) or isinstance(rules, (str, Tensor)):
        raise TypeError(
            f"Expected `rules` to be a penalty or a mapping from selectors to penalties, got {_described(rules)}."
        )
    pairs: list[Any] = list(rules.items() if isinstance(rules, Mapping) else rules)
    if not pairs:
        raise ValueError("Expected `rules` to hold at least one rule, got none.")
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise TypeError(f"Expected each rule to be a pair (selector, penalty), got {_described(pair)}.")
        selector, penalty = pair
        if isinstance(selector, Penalty):
            raise TypeError(
                "Expected a selector (glob, regex, module class, predicate or parameters) as the rule's key, "
                f"got the penalty {selector!r}."
            )
        if penalty is not None and not isinstance(penalty, Penalty):
            raise TypeError(
                f"Expected the penalty of rule {_label(selector)} to be a Penalty or None, got {_described(penalty)}."
            )
    return pairs


def _matcher(
    selector: Any, label: str, modules: Mapping[str, nn.Module], assignments: list[Assignment]
) -> Callable[[Assignment], bool]:
    """The selector as a function of an assignment."""
    if isinstance(selector, _Weights):
        return lambda a: all(_is_weight(name, modules) for name in a.aliases)
    if isinstance(selector, str):
        return lambda a: any(fnmatch.fnmatchcase(name, selector) for name in a.aliases)
    if isinstance(selector, re.Pattern):
        return lambda a: any(selector.search(name) for name in a.aliases)
    if isinstance(selector, type):
        if not issubclass(selector, nn.Module):
            raise TypeError(f"Expected a module class as the rule's key, got the class {selector.__name__}.")
        return lambda a: any(_in_class(name, selector, modules) for name in a.aliases)
    if isinstance(selector, nn.Module):
        raise TypeError(
            f"Expected the class or the name of a module as the rule's key, got the {label} itself; "
            "its parameters are tuple(module.parameters())."
        )
    if isinstance(selector, Tensor) or (isinstance(selector, Iterable) and not callable(selector)):
        wanted = _listed(selector, label, assignments)
        return lambda a: id(a.parameter) in wanted
    if callable(selector):
        return lambda a: any(bool(selector(name, a.parameter)) for name in a.aliases)
    raise TypeError(
        "Expected the rule's key to be a glob, a compiled regex, a module class, a predicate (name, parameter) or "
        f"parameters, got {_described(selector)}."
    )


def _listed(selector: Any, label: str, assignments: list[Assignment]) -> set[int]:
    tensors = [selector] if isinstance(selector, Tensor) else list(selector)
    known = {id(a.parameter) for a in assignments}
    wanted: set[int] = set()
    for position, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Expected parameters in rule {label}, got {_described(tensor)} at position {position}.")
        shape = "unknown" if isinstance(tensor, nn.parameter.UninitializedParameter) else tuple(tensor.shape)
        if id(tensor) not in known:
            leaf = "" if tensor.is_leaf else " (it is the result of an operation, not a leaf)"
            raise ValueError(
                f"The tensor of shape {shape} at position {position} of rule {label} is not a parameter of the "
                f"model{leaf}."
            )
        if id(tensor) in wanted:
            raise ValueError(f"The parameter of shape {shape} at position {position} of rule {label} is listed twice.")
        wanted.add(id(tensor))
    return wanted


def _is_weight(name: str, modules: Mapping[str, nn.Module]) -> bool:
    prefix, _, attribute = name.rpartition(".")
    owner = modules[prefix]
    if isinstance(owner, torch.nn.utils.parametrize.ParametrizationList):
        layer, _, attribute = prefix.rpartition(".parametrizations.")
        owner = modules[layer]
    return isinstance(owner, _WEIGHTED) and "weight" in attribute and "bias" not in attribute


def _in_class(name: str, wanted: type[nn.Module], modules: Mapping[str, nn.Module]) -> bool:
    """Own parameters of such a module but biases, and the weights of layers inside it."""
    prefix, _, attribute = name.rpartition(".")
    if isinstance(modules[prefix], wanted) and "bias" not in attribute:
        return True
    return _is_weight(name, modules) and any(isinstance(modules[p], wanted) for p in _ancestors(prefix))


def _ancestors(prefix: str) -> Iterator[str]:
    while prefix:
        prefix = prefix.rpartition(".")[0]
        yield prefix


def _default_reason(a: Assignment, modules: Mapping[str, nn.Module]) -> str:
    owners = [modules[name.rpartition(".")[0]] for name in a.aliases]
    if not a.parameter.requires_grad:
        return "frozen"
    if "bias" in a.attribute:
        return "bias"
    if any(isinstance(owner, _NORMS) for owner in owners):
        return "normalisation layer"
    if any(isinstance(owner, _EMBEDDINGS) for owner in owners):
        return "tied to an embedding" if len(owners) > 1 else "embedding"
    return "no rule matches"


def _no_match(label: str, selector: Any, assignments: list[Assignment]) -> str:
    names = [name for a in assignments for name in a.aliases]
    message = f"Rule {label} matches none of {len(names)} parameters"
    if isinstance(selector, type):
        kinds = sorted({type(a.module).__name__ for a in assignments})
        return f"{message}; the layers with parameters are: {', '.join(kinds)}."
    if isinstance(selector, _Weights):
        return (
            f"{message}: a bare penalty selects the weights of linear, convolution, bilinear, recurrent and attention "
            "layers. Name the others by a rule."
        )
    pattern = selector.pattern if isinstance(selector, re.Pattern) else selector
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) if isinstance(pattern, str) else []
    if close:
        return f"{message}; closest: {', '.join(map(repr, close))}."
    return f"{message}." if not names else f"{message}; the first is {names[0]!r}."


def _label(selector: Any) -> str:
    if isinstance(selector, str):
        return repr(selector)
    if isinstance(selector, re.Pattern):
        return f"re {selector.pattern!r}"
    if isinstance(selector, type):
        return selector.__name__
    if isinstance(selector, (_Weights, _Members)):
        return "default"
    if isinstance(selector, nn.parameter.UninitializedParameter):
        return "uninitialised parameter"
    if isinstance(selector, Tensor):
        return f"parameter of shape {tuple(selector.shape)}"
    if callable(selector) and not isinstance(selector, nn.Module):
        return getattr(selector, "__name__", type(selector).__name__)
    if isinstance(selector, (list, tuple)):
        return f"list of {len(selector)} parameters"
    return type(selector).__name__


def _described(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__} (an instance such as {value.__name__}(…) is meant?)"
    return (
        f"{type(value).__name__} {value!r}" if isinstance(value, (str, int, float, Penalty)) else type(value).__name__
    )
