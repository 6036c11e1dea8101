"""The recipes of docs/groups.md run, and each does to its groups what the page says."""

import re
from pathlib import Path

import pytest
import torch

import torchreg
from torchreg.groups import Groups

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/groups.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)
BLOCKS = [(s.splitlines()[0], block) for s in SECTIONS for block in re.findall(r"```python\n(.*?)```", s, re.DOTALL)]
pytest.importorskip("torch_pruning")


RECIPES = [i for i, (title, block) in enumerate(BLOCKS) if "reg = " in block]


def space_after(i: int) -> dict:
    """The names that the first block and those of a section up to the i-th block define."""
    torch.manual_seed(0)
    space: dict = {}
    for k, (title, block) in enumerate(BLOCKS[: i + 1]):
        if k == 0 or title == BLOCKS[i][0]:
            exec(block, space)
    return space


def test_the_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / link).exists(), link
    anchors = {re.sub(r"[^\w -]", "", s.splitlines()[0]).lower().replace(" ", "-") for s in SECTIONS[1:]}
    wanted = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert set(wanted) <= anchors
    assert len(wanted) >= 12


def test_the_pages_on_strengths_links_here():
    page = (ROOT / "docs/strengths.md").read_text(encoding="utf-8")
    assert "(groups.md)" in page
    assert "(smaller.md)" in page


@pytest.mark.parametrize("i", RECIPES, ids=lambda i: BLOCKS[i][0])
def test_each_recipe_zeroes_groups(i):
    """A strong step of the last regularizer of a block leaves no group alive; of 4 weights 2; of 16 channels 8."""
    reg = space_after(i)["reg"]
    optimizer = torchreg.ProxSGD(reg.param_groups(), lr=1.0)
    kinds = {penalty.type_name for _, _, penalty in reg.penalized()}
    for _, p, _ in reg.penalized():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        if group["penalty"] is not None:
            group["strength_scale"] = 1.0 if kinds <= {"NM", "TopK"} else 1e6
    optimizer.step()
    for _, p, _ in reg.penalized():
        if kinds == {"NM"}:
            assert ((p != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
        elif kinds != {"TopK"}:
            assert not p.any()
    if any(isinstance(getattr(penalty, "groups", None), Groups) for _, _, penalty in reg.penalized()):
        assert torchreg.group_sparsity(reg).fraction == (0.5 if kinds == {"TopK"} else 1)


def test_the_channels_that_the_page_removes_are_removed():
    space = space_after(next(i for i in RECIPES if BLOCKS[i][0] == "Channels"))
    assert "small" in space
    norm = space["cnn"][1]
    with torch.no_grad():
        norm.weight[:12], norm.bias[:12] = 0, 0
    small = torchreg.export.compact(space["cnn"].eval(), space["image"], seconds=0).model
    assert len(small[1].weight) == 4


def test_groups_can_be_seen_as_the_page_says(capsys):
    space = space_after(RECIPES[-1])
    exec(BLOCKS[-1][1], space)
    out = capsys.readouterr().out
    assert "alive" in out
    assert "made by" in out
