"""The pages of the site: their code shows what they say, their links lead somewhere, no public name is missing."""

import ast
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchreg

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if not any(part.startswith(("_", "auto_")) for part in p.parts))
NAMES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
NOT_PUBLIC = ("torchreg.kernels",)


def code_of(page):
    """The page's code blocks one after another, each on the lines where it stands on the page."""
    text = NAMES[page]
    lines = [""] * text.count("\n")
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        first = text[: match.start(1)].count("\n")
        block = match[1].splitlines()
        lines[first : first + len(block)] = block
    return compile("\n".join(lines), str(DOCS / page), "exec")


def run(page, **names):
    torch.manual_seed(0)
    space = {"__name__": "page", **names}
    exec(code_of(page), space)
    return space


# What the code of each page is for


def tutorial(space):
    accuracy, sparsity = space["accuracy"], torchreg.sparsity
    assert sparsity(space["dense"]).fraction == 0
    assert sparsity(space["shrunk"]).fraction == 0
    assert sparsity(space["sparse"]).fraction > 0.5
    assert sparsity(space["reg"]).fraction == pytest.approx(0.9, abs=0.002)
    assert min(accuracy(space[name]) for name in ("dense", "shrunk", "sparse", "small", "again")) > 0.93
    assert all(torch.equal(a, b) for a, b in zip(space["small"].parameters(), space["again"].parameters(), strict=True))
    assert Path("small.safetensors").stat().st_size < Path("dense.pt").stat().st_size / 4


def layers(space):
    def names(reg):
        return [name for name, _, _ in reg.penalized()]

    assert names(space["everything"]) == ["encoder.0.weight", "head.weight"]
    assert names(space["only_convolutions"]) == ["encoder.0.weight"]
    assert names(space["below_encoder"]) == ["encoder.0.weight", "encoder.1.weight"]
    assert names(space["by_name"]) == ["head.weight"]
    assert names(space["all_but_the_head"]) == ["encoder.0.weight"]
    kinds = {name: penalty.type_name for name, _, penalty in space["different"].penalized()}
    assert kinds == {"encoder.0.weight": "L1", "encoder.1.weight": "L1", "head.weight": "L2"}


def zeros(space):
    assert space["jumping"].all()
    assert not space["settled"].any()


def adam(space):
    torch.testing.assert_close(space["weak"], torch.full((1, 4), 0.9), atol=1e-3, rtol=0)
    torch.testing.assert_close(space["weak"], space["strong"], atol=1e-4, rtol=0)
    model = space["model"]
    model(torch.ones(2, 4)).sum().backward()
    space["optimizer"].step()


def strength(space):
    assert space["fraction"] < 0.5
    assert 0 <= space["zeros"] < 1
    assert space["residual"] < 1e-3 * space["largest"]
    assert space["found"][0][0] > space["error"]


def target(space):
    assert space["reached"] == pytest.approx(0.9, abs=0.01)
    assert space["target"].reached().keys() == {"0.weight", "2.weight"}
    assert torchreg.sparsity(space["reg"]).fraction == pytest.approx(0.9, abs=0.01)


def amp(space):
    assert all(torch.isfinite(p).all() for p in space["model"].parameters())
    assert all(state["step"] == 2 for state in space["optimizer"].state.values())


def speed(space):
    model, small, x = space["model"], space["small"], space["x"]
    assert len(small[0].weight) == 16
    torch.testing.assert_close(small(x), model(x), atol=1e-5, rtol=1e-4)


def scikit_learn(space):
    assert space["difference"] < 1e-6
    assert space["closer"] < 1e-9
    assert ((space["model"].weight.detach().numpy() == 0) == (space["theirs"].coef_ == 0)).all()


def penalty(space):
    """The page's class keeps what its base class promises, by brute force and through three routes."""
    own = space["Lopsided"](0.7)
    w, grid = torch.linspace(-4, 4, 41, dtype=torch.float64), torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    density = 0.7 * torch.maximum(grid, -3 * grid)
    for a, v in zip(w, own.prox(w, 0.5), strict=True):
        assert abs(grid[(0.5 * (grid - a) ** 2 + 0.5 * density).argmin()] - v) < 2e-4
    assert not torch.signbit(own.prox(w, 0.5)[own.prox(w, 0.5) == 0]).any()
    leaf = w.clone().requires_grad_()
    own.value(leaf).backward()
    torch.testing.assert_close(own.grad(w)[w != 0], leaf.grad[w != 0])
    assert torchreg.penalties.from_dict(own.to_dict()) == own
    data = torch.tensor([1.0, -2.0], dtype=torch.float64)
    at_zero = torch.zeros(2, dtype=torch.float64)
    enough = own.strength_max(data)
    assert not type(own)(enough).optimality_residual(at_zero, data).any()
    assert type(own)(0.99 * enough).optimality_residual(at_zero, data).any()
    found = space["model"].weight.detach()
    assert torchreg.kkt_residual(space["reg"]) < 1e-9
    assert (found == 0).sum() >= 2
    for route in ("loss", "hook"):
        model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
        reg = torchreg.Regularizer(model, space["Lopsided"](0.15))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if route == "hook":
            reg.attach(optimizer)
        for _ in range(1500):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(space["X"]).squeeze(1), space["y"])
            (loss + reg() if route == "loss" else loss).backward()
            optimizer.step()
        torch.testing.assert_close(model.weight.detach(), found, atol=0.01, rtol=0)


def routes(space):
    assert space["found"] == pytest.approx([0.7] * 4, abs=1e-6)


def geometry(space):
    l2, l1, net = (values.tolist() for values in space["shrunk"])
    assert (l2, l1, net) == (pytest.approx([1.5, 0.1]), [2.5, 0.0], [1.25, 0.0])


def momentum(space):
    assert space["with_gain"] == pytest.approx([0.7] * 3, abs=1e-9)
    assert space["without"] == pytest.approx(0.97, abs=1e-9)


def precision(space):
    assert space["to_nearest"] == 1
    assert space["at_random"] == pytest.approx(0.99, abs=2e-3)


CHECKS = {
    "tutorial.md": tutorial,
    "how-to/layers.md": layers,
    "how-to/zeros.md": zeros,
    "how-to/adam.md": adam,
    "how-to/strength.md": strength,
    "how-to/target.md": target,
    "how-to/amp.md": amp,
    "how-to/speed.md": speed,
    "how-to/scikit-learn.md": scikit_learn,
    "how-to/penalty.md": penalty,
    "explanation/routes.md": routes,
    "explanation/geometry.md": geometry,
    "explanation/momentum.md": momentum,
    "explanation/precision.md": precision,
}


@pytest.mark.parametrize("page", CHECKS)
def test_the_code_of_a_page_does_what_the_page_says(page, tmp_path, monkeypatch):
    if page in ("tutorial.md", "how-to/strength.md", "how-to/scikit-learn.md"):
        pytest.importorskip("sklearn")
    if page == "how-to/speed.md":
        pytest.importorskip("torch_pruning")
    monkeypatch.chdir(tmp_path)
    CHECKS[page](run(page))


def _sharded():
    space = run("how-to/fsdp.md")
    return space["report"].fraction


def test_the_code_for_many_processes_runs_in_two():
    import distributed

    one, other = distributed.run(2, _sharded)
    assert one == other > 0


def test_every_page_with_code_is_run_by_a_test():
    with_code = {page for page, text in NAMES.items() if "```python" in text}
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for page in with_code - set(CHECKS):
        assert page in tests, f"{page}: no test runs its code"
    assert set(CHECKS) <= with_code


def test_the_code_of_the_page_on_smaller_models_runs(tmp_path, monkeypatch):
    pytest.importorskip("torch_pruning")
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight[:8], model[0].bias[:8] = 0, 0
    x = torch.randn(2, 8)
    expected = model(x)
    space = run("smaller.md", model=model, batch=x, example_input=x, torchreg=torchreg)
    assert len(space["small"][0].weight) == 8
    torch.testing.assert_close(space["small"](x), expected)


def test_the_code_of_the_page_on_linear_models_runs():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.make_regression(80, 35, noise=1.0, random_state=0)
    space = run("linear.md", X=x, y=y, Y=np.c_[y, -y], labels=y > 0, np=np)
    assert space["model"].dual_gap_ < 1e-6


def _of_many_processes():
    from torch.distributed import get_rank
    from torch.utils.tensorboard import SummaryWriter

    names = {
        "model": nn.Sequential(nn.Linear(4, 4)),
        "torchreg": torchreg,
        "SummaryWriter": SummaryWriter,
        "rank": get_rank(),
    }
    space = run("distributed.md", **names)
    space["monitor"].close()
    return space["monitor"].steps


def test_the_code_of_the_page_on_many_processes_runs(tmp_path, monkeypatch):
    import distributed

    monkeypatch.chdir(tmp_path)
    assert distributed.run(2, _of_many_processes) == [0, 0]


# Links


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", NAMES)
def test_every_internal_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", NAMES[page], flags=re.DOTALL)
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text):
        if re.match(r"https?:", link):
            continue
        there = (DOCS / page).parent / link if link else DOCS / page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), f"{link}#{anchor}"
    for name in re.findall(r"\{py:\w+\}`~?([\w.]+)`", text):
        assert documented(name), name


def test_every_page_is_in_the_table_of_contents():
    index = NAMES["index.md"]
    trees = "\n".join(re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL))
    listed = {f"{line}.md" for line in trees.splitlines() if line and not line.startswith(":")}
    assert set(NAMES) - {"index.md"} == {name for name in listed if not name.startswith("auto_")}


# The reference


def _reference():
    """The names that the pages of the reference describe, and what they are."""
    for page, text in NAMES.items():
        module = None
        for line in text.splitlines() if page.startswith("reference/") else ():
            if found := re.match(r"\.\. currentmodule:: (\S+)", line):
                module = found[1]
            elif found := re.match(r"\.\. auto(?:class|function|data):: (\S+)", line):
                yield module, found[1]


REFERENCE = list(_reference())


def documented(name):
    return any(name == f"{module}.{short}" for module, short in REFERENCE)


def _public_modules():
    for path in sorted((ROOT / "torchreg").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        names = [
            ast.literal_eval(node.value)
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        ]
        if names and not name.startswith(NOT_PUBLIC):
            yield pytest.param(name, names[0], id=name)


@pytest.mark.parametrize(("module", "names"), list(_public_modules()))
def test_every_public_name_is_in_the_reference(module, names):
    try:
        namespace = importlib.import_module(module)
    except ImportError as missing:
        pytest.skip(str(missing))
    for name in names:
        thing = getattr(namespace, name)
        if type(thing) is type(torchreg):  # a module: its own names are checked
            continue
        same = [(m, n) for m, n in REFERENCE if n == name and _is(m, n, thing)]
        assert len(same) == 1, f"{module}.{name} is on {len(same)} pages of the reference"


def _is(module, name, thing):
    found = getattr(importlib.import_module(module), name, None)
    return found is thing or (found == thing and isinstance(found, (str, tuple)))


def test_the_reference_names_what_there_is():
    for module, name in REFERENCE:
        if module.startswith("torchreg.integrations."):
            pytest.importorskip(module.rpartition(".")[2])
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


# Pictures that are drawn while the site is built, and what prepares the pages for it


@pytest.mark.parametrize("path", sorted((DOCS / "gallery").glob("plot_*.py")), ids=lambda path: path.stem)
def test_a_picture_of_the_gallery_is_drawn(path, monkeypatch):
    pytest.importorskip("sklearn")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    space = {}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), space)
    drawn = [ax for ax in np.ravel(space["axes"]) if ax.has_data()]
    assert len(drawn) == len(np.ravel(space["axes"])) > 1
    matplotlib.pyplot.close("all")


def test_prose_in_docstrings_is_escaped_and_code_is_not(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    escaped = importlib.import_module("docstrings").escaped
    assert escaped(["λ Σ|w|, `a|b`, w* and ``c|d``"]) == [r"λ Σ\|w\|, `a|b`, w\* and ``c|d``"]
    assert escaped(["*exact* zeros, w*, v*"]) == [r"*exact* zeros, w\*, v\*"]
    assert escaped(["    dampening: d.", "    a: Any."]) == [r"    dampening: d\.", "    a: Any."]
    assert escaped([">>> a * b", "c * d", "", "coef_ is"]) == [">>> a * b", "c * d", "", r"coef\_ is"]
    assert escaped([".. math::", "    m_{i} |w|", "", "|w|"]) == [".. math::", "    m_{i} |w|", "", r"\|w\|"]


def test_examples_get_titles_and_stay_the_same_code(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(DOCS))
    write_examples = importlib.import_module("example_pages").write_examples
    write_examples(ROOT / "examples", tmp_path / "pages")
    for path in (ROOT / "examples").glob("*.py"):
        there = ast.parse((tmp_path / "pages" / path.name).read_text(encoding="utf-8"))
        title = ast.get_docstring(there).splitlines()
        assert title[0] == path.name
        assert title[1] == "=" * len(path.name)
        here = ast.parse(path.read_text(encoding="utf-8"))
        assert [ast.dump(node) for node in there.body[1:]] == [ast.dump(node) for node in here.body[1:]]
