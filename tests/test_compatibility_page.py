"""Each cell of the compatibility table names a test that is there and that has to do with both of its headings."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
ON_GPU = "tests exist, not run on a GPU yet"

FEATURES = {  # what the code that a test runs must mention
    "loss term": r"\breg\(\)|term=reg\b",
    "hook": r"\.attach\(|\"hook\"",
    "ProxSGD": r"\bProxSGD\b",
    "ProxAdamW": r"\bProxAdamW\b",
    "Proximal": r"\bProximal\b",
    "RMDA": r"\bRMDA\b",
    "groups": r"\bGroupLasso\b",
    "TargetSparsity": r"\bTargetSparsity\b",
    "SparsityMonitor": r"\bSparsityMonitor\b|every=|monitor",
    "freeze_zeros": r"\bfreeze_zeros\b",
    "compact": r"\bcompact\(",
}
SETTINGS = {
    "GradScaler": r"\bGradScaler\b",
    "Gradient accumulation": r"accumulat",
    "bfloat16 weights": r"bfloat16|\bHALF\b",
    "torch.compile, the model": r"torch\.compile\(model",
    "torch.compile, the step": r"torch\.compile\b",
    "DDP": r"DistributedDataParallel",
    "FSDP2": r"fully_shard",
    "Tensor parallel and FSDP2": r"parallelize_module(?s:.*)fully_shard",
    "Distributed checkpoints": r"distributed\.checkpoint",
    "Sparse gradients": r"sparse_gradient|sparse=True|to_sparse|sparse_coo",
    "Lightning": r"lightning",
    "Transformers": r"transformers",
    "Accelerate": r"accelerat",
    "skorch": r"skorch|\bnet\(",
    "Export": r"torch\.export",
    "CUDA": r"\bcuda\b",
    "CUDA graphs": r"CUDAGraph",
}


def _cells():
    for section in PAGE.split("\n## ")[1:]:
        setting = section.splitlines()[0]
        for line in section.splitlines():
            match = re.fullmatch(r"\| (.+?) \| (.+?) \|(?: `(.+?)`)? \|", line)
            if match and match[1] != "---":
                yield setting, match[1], match[2], match[3]


CELLS = list(_cells())


@cache
def _definitions(path):
    """What a test file defines by name, and the names that it imports from files beside it."""
    text = path.read_text(encoding="utf-8")
    here, there = {}, {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            here[node.name] = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign):
            for name in (n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)):
                here[name] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.ImportFrom) and (path.parent / f"{node.module}.py").exists():
            there |= {alias.asname or alias.name: path.parent / f"{node.module}.py" for alias in node.names}
    return here, there


def _code(path, name, seen):
    """The source of a test, and of whatever of the test files it uses."""
    here, there = _definitions(path)
    if (path, name) in seen:
        return ""
    seen.add((path, name))
    if name in there:
        return _code(there[name], name, seen)
    if name not in here:
        return ""
    text = here[name]
    return "\n".join([text, *(_code(path, other, seen) for other in sorted(set(re.findall(r"\w+", text))))])


def _split(test):
    return re.fullmatch(r"(test_\w+\.py)::(test_\w+)(?:\[(.+)\])?", test).groups()


def test_the_page_has_a_cell_for_each_feature_in_each_setting():
    assert [(setting, feature) for setting, feature, _, _ in CELLS] == [(s, f) for s in SETTINGS for f in FEATURES]


@pytest.mark.parametrize(("setting", "feature", "claim", "test"), [c for c in CELLS if c[3]], ids=lambda c: str(c)[:40])
def test_a_cell_names_a_test_of_both(setting, feature, claim, test):
    file, name, chosen = _split(test)
    path = ROOT / "tests" / file
    assert name in _definitions(path)[0], f"no test {test}"
    code = _code(path, name, set())
    assert re.search(FEATURES[feature], code), f"{test} does not mention {feature}"
    assert re.search(SETTINGS[setting], code), f"{test} does not mention {setting}"
    for part in (chosen or "").replace("L1-", "L1 ").replace("GroupLasso-", "GroupLasso ").split():
        assert part in code, f"{test} is not run for {part}"


@pytest.mark.parametrize(("setting", "feature", "claim", "test"), CELLS, ids=lambda c: str(c)[:40])
def test_no_cell_claims_what_no_test_shows(setting, feature, claim, test):
    assert bool(test) != claim.startswith("not tested")
    if test:
        file, name, _ = _split(test)
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        head = text.split("\ndef ")[0].split("pytestmark")[1:]
        skipped = _definitions(ROOT / "tests" / file)[0][name].split("def ")[0] + "".join(head)
        assert ("skipif(not torch.cuda.is_available()" in skipped) == (claim == ON_GPU)
        refuses = "raises" in _definitions(ROOT / "tests" / file)[0][name]
        assert not claim.startswith("refused") or refuses


def readme_table():
    """The page as one table: a mark for each cell, which links to the test's file and names the test."""
    short = {"TargetSparsity": "target", "SparsityMonitor": "monitor", "freeze_zeros": "freeze"}
    lines = [f"| | {' | '.join(short.get(name, name) for name in FEATURES)} |", f"| --- |{' :-: |' * len(FEATURES)}"]
    for setting in SETTINGS:
        marks = []
        for _, _, claim, test in (cell for cell in CELLS if cell[0] == setting):
            kind = "GPU" if claim == ON_GPU else "no" if claim.startswith("refused") else "✓"
            file, name, chosen = _split(test) if test else ("", "", None)
            title = f"{name}[{chosen}]" if chosen else name
            marks.append(f'[{kind}](tests/{file} "{title}")' if test else "")
        lines.append(f"| {setting} | {' | '.join(marks)} |".replace("  |", " |"))
    return "\n".join(lines)


def test_the_readme_has_the_table():
    assert readme_table() in README
