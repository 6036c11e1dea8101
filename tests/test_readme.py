"""What the README says is true: its code runs, its table of strengths holds, its figures are the result files'."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchreg

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
STRENGTHS = (ROOT / "docs/strengths.md").read_text(encoding="utf-8")
CONVERSIONS = re.findall(r"^\| (.+?) \| `(.+?)` \| (`?\w+`?) \|$", STRENGTHS, flags=re.MULTILINE)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(TEXT.splitlines()) <= 175  # a fifth of them the table of what works with what
    links = re.findall(r"\]\(([^)\s]+)", TEXT)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_nobody_is_told_to_install_the_other_project():
    assert "torchreg-sparse" in TEXT
    assert not re.search(r"pip install torchreg(?!-sparse)", TEXT)


def test_the_code_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3))
    space = {
        "model": model,
        "criterion": nn.CrossEntropyLoss(),
        "batches": [(torch.randn(32, 8), torch.randint(0, 3, (32,))) for _ in range(3)],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    assert len(BLOCKS) >= 4
    for block in BLOCKS:
        exec(block, space)
    out = capsys.readouterr().out
    assert "sparsity" in out
    assert "left alone" in out
    assert list((tmp_path / "runs" / "a").iterdir())


def regression():
    x, y = pytest.importorskip("sklearn.datasets").load_diabetes(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def residual(penalty, coef, x, y, loss) -> float:
    """How far ``coef`` is from the optimum of torch's loss plus the penalty."""
    w = torch.tensor(np.ravel(coef), requires_grad=True)
    loss(torch.tensor(x) @ w, torch.tensor(y)).backward()
    return penalty.optimality_residual(w.detach(), w.grad).max().item()


def objective(penalty, w, x, y, loss) -> float:
    w = torch.tensor(w)
    return (loss(torch.tensor(x) @ w, torch.tensor(y)) + penalty.value(w)).item()


@pytest.mark.parametrize(("elsewhere", "here", "loss_name"), CONVERSIONS)
def test_the_conversion_of_strengths_holds(elsewhere, here, loss_name):
    """Solutions of the other library are optimal here; where it can't be run, its documented objective agrees."""
    x, y = regression()
    classes = (y > 0).astype(float)
    n = len(y)
    alpha, l1_ratio, C, wd, l1, l2, lam = 0.1, 0.7, 0.3, 0.02, 0.03, 0.05, 0.2
    settings = {"n": n, "alpha": alpha, "l1_ratio": l1_ratio, "C": C, "wd": wd, "l1": l1, "l2": l2, "lam": lam}
    penalty = eval(here, {**vars(torchreg), **settings})
    loss = {"`MSELoss`": nn.MSELoss(), "`BCEWithLogitsLoss`": nn.BCEWithLogitsLoss(), "any": None}[loss_name]
    w = np.random.default_rng(0).standard_normal(x.shape[1])
    if elsewhere.startswith("scikit-learn"):
        from sklearn import linear_model

        options = {"fit_intercept": False, "tol": 1e-12, "max_iter": 100_000}
        name = re.search(r"`(\w+)\(", elsewhere).group(1)
        if name == "LogisticRegression":
            ratio = 1.0 if elsewhere.endswith("L1") else 0.0
            if linear_model.LogisticRegression().penalty == "l2":  # before scikit-learn 1.8 it hides l1_ratio
                options["penalty"] = "elasticnet"
            solver = linear_model.LogisticRegression(C=C, l1_ratio=ratio, solver="saga", **options)
            y = classes
        else:
            solver = getattr(linear_model, name)(
                **{"alpha": alpha, "l1_ratio": l1_ratio} if name == "ElasticNet" else {"alpha": alpha}, **options
            )
        assert residual(penalty, solver.fit(x, y).coef_, x, y, loss) < 1e-6
    elif elsewhere.startswith("torch"):
        assert torch.allclose(penalty.grad(torch.tensor(w)), wd * torch.tensor(w), rtol=1e-14)
    elif elsewhere.startswith("Keras"):
        assert penalty.value(torch.tensor(w)).item() == pytest.approx(l1 * np.abs(w).sum() + l2 * (w**2).sum())
    elif elsewhere.startswith("glmnet"):
        ridge_and_lasso = lam * ((1 - alpha) / 2 * (w**2).sum() + alpha * np.abs(w).sum())
        if "gaussian" in elsewhere:
            assert objective(penalty, w, x, y, loss) == pytest.approx(
                2 * (((y - x @ w) ** 2).mean() / 2 + ridge_and_lasso)
            )
        else:
            z = x @ w
            deviance = (np.logaddexp(0, z) - classes * z).mean()
            assert objective(penalty, w, x, classes, loss) == pytest.approx(deviance + ridge_and_lasso)
    else:
        pytest.fail(f"no check for {elsewhere}")


def test_all_rows_of_the_table_are_checked():
    table = STRENGTHS.split("| elsewhere |")[1].split("\n\n")[0]
    assert len(CONVERSIONS) == table.count("\n") - 1 >= 9


def test_the_quality_page_and_the_readme_quote_the_result_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    lenet, settling = map(importlib.import_module, ("lenet", "lenet_settling"))
    page = (ROOT / "docs/quality.md").read_text(encoding="utf-8")
    networks, runs = (
        json.loads((ROOT / "benchmarks/results" / name).read_text(encoding="utf-8"))[key]
        for name, key in (("lenet-cpu.json", "networks"), ("lenet-settling.json", "runs"))
    )
    assert lenet.readme_table(networks) in page
    assert settling.table(runs) in page
    for network, compression in (("LeNet-300-100", "100"), ("LeNet-5", "280")):
        error = networks[network]["compressions"][compression]["mean"]
        assert f"{network} keeps 1/{compression} of its weights at {error:.2f} % test error" in " ".join(TEXT.split())


def test_the_figures_are_the_result_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    step = importlib.import_module("step")
    results = json.loads((ROOT / "benchmarks/results/step-cpu-amd.json").read_text(encoding="utf-8"))
    assert step.readme_table(results) in TEXT
    assert "one CPU thread" in TEXT
    assert results["machine"]["threads"] == 1
    of_groups = json.loads((ROOT / "benchmarks/results/step-groups-cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/groups.md").read_text(encoding="utf-8")
    assert step.readme_table(of_groups, step.GROUP_ROWS) in page
    assert of_groups["machine"]["threads"] == 1
