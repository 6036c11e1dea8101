"""The house rules that a machine can check."""

import ast
import graphlib
import inspect
from pathlib import Path

import pytest

import torchreg

ROOT = Path(torchreg.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
FLOORS = {  # a file imports from its own floor or lower ones, never in a circle
    "torchreg.tables": 0,
    "torchreg.wording": 0,
    "torchreg.plots": 3,
    "torchreg.one_standard_error": 1,
    "torchreg.cuts": 1,
    "torchreg.sampling": 1,
    "torchreg.sharding": 1,
    "torchreg.spanning": 1,
    "torchreg.unsettled": 1,
    "torchreg.groups": 1,
    "torchreg.penalties": 2,
    "torchreg.compacted": 1,
    "torchreg.coupling": 3,
    "torchreg.assignments": 3,
    "torchreg.rules": 3,
    "torchreg.kernels": 3,
    "torchreg.linear.data": 3.0,
    "torchreg.linear.quadratic": 3.0,
    "torchreg.linear.lasso": 3.1,
    "torchreg.linear.grouped": 3.2,
    "torchreg.linear.logistic": 3.2,
    "torchreg.linear.ridge": 3.2,
    "torchreg.linear.paths": 3.3,
    "torchreg.linear.estimators": 3.4,
    "torchreg.linear": 3.5,
    "torchreg.optimality": 3,
    "torchreg.scales": 3,
    "torchreg.zeroing": 3,
    "torchreg.schedules": 3,
    "torchreg.support": 3,
    "torchreg.loss_term": 4,
    "torchreg.hook": 4,
    "torchreg.regularizer": 4,
    "torchreg.optim": 4,
    "torchreg.goals": 4,
    "torchreg.target": 4,
    "torchreg.factorization": 4,
    "torchreg.averaging": 4,
    "torchreg.monitor": 4,
    "torchreg.features": 5,
    "torchreg.export": 5,
    "torchreg.integrations": 5,
    "torchreg.cli": 5,
    "torchreg.__main__": 6,
    "torchreg": 6,
}


def _name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {_name(path): path for path in SOURCES}


def _imports(path):
    """The project's modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "torchreg")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchreg":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in NAMES else node.module
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"


def _floor(name):
    while name not in FLOORS:
        name = name.rpartition(".")[0]
    return FLOORS[name]


def test_imports_point_downwards():
    upwards = {
        f"{name} -> {target}"
        for name, path in NAMES.items()
        for target in _imports(path)
        if _floor(target) > _floor(name) and not (target == "torchreg" and _floor(name) == FLOORS["torchreg.cli"])
    }
    assert upwards == set()


def test_imports_make_no_circle():
    graph = {}
    for name, path in NAMES.items():
        graph[name] = {target for target in _imports(path) if target not in {"torchreg", name}}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: _name(path))
def test_a_module_is_short_and_named_after_a_concept(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.stem not in {"util", "utils", "helper", "helpers", "common", "misc"}
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "module",
    [
        "torchreg",
        *(
            f"torchreg.{part}"
            for part in (
                "coupling",
                "export",
                "features",
                "groups",
                "linear",
                "penalties",
                "rules",
                "optim",
                "schedules",
            )
        ),
    ],
)
def test_every_public_name_is_documented(module):
    namespace = inspect.importlib.import_module(module)
    for name in getattr(namespace, "__all__", ()):
        thing = getattr(namespace, name)
        if not (inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)):
            continue  # an alias of a type
        assert inspect.getdoc(thing), name
        for attribute, member in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isroutine(member) and not attribute.startswith("_"):
                assert inspect.getdoc(getattr(thing, attribute)), f"{name}.{attribute}"
