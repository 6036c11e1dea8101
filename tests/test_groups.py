"""How weights are cut: which weights belong together, sums without copies, and what does not fit."""

import io
import re

import pytest
import torch

from torchreg import groups
from torchreg.groups import NAMES, Blocks, Heads, Labels, Slices, as_groups

CASES = [  # groups, a shape, and the label of every weight of it
    (as_groups("rows"), (4, 3), lambda i, j: i),
    (as_groups("columns"), (4, 3), lambda i, j: j),
    (as_groups("filters"), (4, 3, 2, 5), lambda i, j, *_: i),
    (as_groups("in_channels"), (4, 3, 2, 5), lambda i, j, *_: j),
    (as_groups("kernels"), (4, 3, 2, 5), lambda i, j, *_: 3 * i + j),
    (as_groups("kernels"), (4, 3), lambda i, j: 3 * i + j),
    (as_groups("tensor"), (4, 3), lambda i, j: 0 * i),
    (as_groups("tensor"), (), lambda: torch.tensor(0)),
    (as_groups("rows"), (5,), lambda i: i),
    (Slices((0, 2)), (4, 3, 2), lambda i, j, k: 2 * i + k),
    (Blocks(2), (3, 6), lambda i, j: 3 * i + j // 2),
    (Blocks(2, dim=0), (6, 3), lambda i, j: 3 * (i // 2) + j),
    (Blocks(5), (2, 3, 5), lambda i, j, k: 3 * i + j),
    (Heads(2), (6, 4), lambda i, j: i // 3),
    (Heads(2, dim=1), (3, 6), lambda i, j: j // 3),
    (Heads(2, packed=3), (12, 4), lambda i, j: i % 4 // 2),
    (Heads(2, packed=3), (12,), lambda i: i % 4 // 2),
    (Labels(torch.tensor([[0, 1, 2], [2, 1, 0]])), (2, 3), lambda i, j: torch.tensor([[0, 1, 2], [2, 1, 0]])[i, j]),
    (Labels(torch.tensor([0, 1, 1])), (2, 3), lambda i, j: torch.tensor([0, 1, 1])[j]),
    (Labels(torch.tensor([[1], [0]])), (2, 3), lambda i, j: 1 - i),
]


def _id(case):
    return f"{case[0]} of {case[1]}"


every_cut = pytest.mark.parametrize("case", CASES, ids=_id)


def _labels(case):
    _, shape, label = case
    index = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij") if shape else ()
    return label(*index)


def _weight(shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@every_cut
def test_the_groups_are_those_of_the_labels(case):
    (cutting, shape, _), labels = case, _labels(case)
    cut, w = cutting.of(shape), _weight(shape)
    members = [w[labels == g] for g in range(int(labels.max()) + 1)]
    assert cut.count == cutting.count(shape) == len(members)
    assert torch.as_tensor(cut.sizes).expand(cut.count).tolist() == [len(m) for m in members]
    assert torch.equal(torch.as_tensor(cutting.sizes(shape)), torch.as_tensor(cut.sizes))
    y = cut.arranged(w)
    torch.testing.assert_close(cut.sums(y), torch.stack([m.sum() for m in members]))
    torch.testing.assert_close(cut.norms(y), torch.stack([m.norm() for m in members]))
    assert torch.equal(cut.maxima(y.abs()), torch.stack([m.abs().max() for m in members]))
    values = torch.arange(1.0, cut.count + 1, dtype=torch.float64)
    spread = cut.spread(values).expand(y.shape).reshape(shape)
    assert torch.equal(spread, values[labels])


@every_cut
def test_an_arranged_weight_is_a_view_in_any_layout(case):
    cutting, shape, _ = case
    cut = cutting.of(shape)
    layouts = [_weight(shape), _weight((*shape, 2))[..., 0]]
    if len(shape) > 1:
        layouts.append(_weight(shape[::-1]).permute(*range(len(shape) - 1, -1, -1)))
    if len(shape) == 4:
        layouts.append(_weight(shape).to(memory_format=torch.channels_last))
    for w in layouts:
        y = cut.arranged(w)
        assert y.data_ptr() == w.data_ptr()
        scaled = y * 2
        assert torch.equal(scaled.reshape(shape), w * 2)
        torch.testing.assert_close(cut.norms(y), cut.norms(cut.arranged(w.contiguous())))


def test_values_of_slices_are_spread_without_a_copy():
    for name in NAMES:
        cut = as_groups(name).of((4, 3, 2))
        values = torch.ones(cut.count)
        assert cut.spread(values).data_ptr() == values.data_ptr()
        assert cut.spread(values).numel() == cut.count
    assert Labels(torch.tensor([[1], [0]])).of((2, 5)).spread(torch.ones(2)).shape == (2, 1)


@pytest.mark.parametrize("kind", [*NAMES, Labels(torch.arange(2048).reshape(-1, 1))], ids=str)
def test_norms_of_long_groups_are_exact_in_float32(kind):
    w = torch.rand(2048, 1024, generator=torch.Generator().manual_seed(0))
    for x in (w, w.t().contiguous().t()):
        cut = as_groups(kind).of(x.shape)
        exact = cut.norms(cut.arranged(x.double()))
        torch.testing.assert_close(cut.norms(cut.arranged(x)).double(), exact, rtol=2e-6, atol=0)


@every_cut
def test_norms_have_derivatives_and_none_at_zero_groups(case):
    cutting, shape, _ = case
    cut = cutting.of(shape)
    w = _weight(shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: cut.norms(cut.arranged(w)), w)
    zero = torch.zeros(shape, requires_grad=True)
    (grad,) = torch.autograd.grad(cut.norms(cut.arranged(zero)).sum(), zero)
    assert torch.equal(grad, torch.zeros(shape))


def test_empty_weights_have_empty_groups():
    assert as_groups("rows").of((0, 3)).count == 0
    cut = as_groups("rows").of((3, 0))
    assert (cut.count, cut.sizes) == (3, 0)
    assert torch.equal(cut.norms(torch.zeros(3, 0)), torch.zeros(3))


def test_names_are_those_of_linear_layers_and_convolutions():
    assert as_groups("rows") == as_groups("out_channels") == Slices((0,))
    conv, linear = torch.nn.Conv2d(3, 8, 5), torch.nn.Linear(3, 8)
    for layer in (conv, linear):
        assert as_groups("out_channels").count(layer.weight.shape) == 8
        assert as_groups("in_features").count(layer.weight.shape) == 3
    assert as_groups("kernels").sizes(conv.weight.shape) == 25


@pytest.mark.parametrize("kind", {type(case[0]).__name__: case[0] for case in CASES}.values(), ids=str)
def test_groups_survive_files_and_compare_by_content(kind):
    file = io.BytesIO()
    torch.save(kind.to_dict(), file)
    file.seek(0)
    again = groups.from_dict(torch.load(file, weights_only=True))
    assert again == as_groups(kind.to_dict()) == kind == kind.to("cpu")
    assert hash(again) == hash(kind)
    assert (str(again), repr(again)) == (str(kind), repr(kind))
    assert kind != Slices((7,))
    assert kind != Labels(torch.tensor([0, 1]))


def test_labels_are_copied():
    given = torch.tensor([0, 1])
    labels = Labels(given)
    given.zero_()
    assert labels == Labels(torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("kind", "shape", "said"),
    [
        ("rows", (), "Expected a weight with a dimension 0 for the groups rows, got the shape ()"),
        ("columns", (5,), "Expected a weight with a dimension 1 for the groups columns, got the shape (5,)"),
        ("kernels", (5,), "dimension 1 for the groups kernels, got the shape (5,)"),
        (Blocks(4), (3, 6), "Expected k=4 of Blocks(k=4, dim=-1) to divide the size 6 of dimension 1 of the weight's"),
        (Blocks(4), (), "Expected a weight with a dimension -1"),
        (Blocks(4, dim=2), (4, 4), "Expected a weight with a dimension 2"),
        (Heads(4), (6, 6), "Expected packed·heads=4 of Heads(heads=4, packed=1, dim=0) to divide the size 6"),
        (Heads(4, packed=3), (8, 6), "packed·heads=12"),
        (Heads(2, dim=1), (4,), "Expected a weight with a dimension 1"),
        (Labels(torch.tensor([0, 1])), (2, 3), "Expected labels that broadcast to the weight's shape (2, 3), got the"),
        (Labels(torch.tensor([[0], [1]])), (2,), "broadcast to the weight's shape (2,), got the shape (2, 1)"),
        (Labels(torch.arange(6).reshape(2, 3)), (1, 3), "broadcast to the weight's shape (1, 3)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(kind, shape, said):
    for method in (as_groups(kind).of, as_groups(kind).count, as_groups(kind).sizes):
        with pytest.raises(ValueError, match=re.escape(said)):
            method(shape)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: as_groups("row"), ValueError, "Expected `groups` to be one of 'rows', 'out_features'"),
        (lambda: as_groups(0), TypeError, "Expected `groups` to be a name or a value of torchreg.groups, got int"),
        (lambda: as_groups(torch.tensor([0])), TypeError, "a tensor of labels goes into torchreg.groups.Labels"),
        (lambda: as_groups({"type": "Stripes"}), ValueError, "Expected the type of groups to be one of ['Blocks'"),
        (lambda: as_groups({"type": "Blocks"}), ValueError, "Expected the fields of Blocks to be ['dim', 'k'], got []"),
        (lambda: Slices((-1,)), ValueError, "Expected `dims` to be an integer of at least 0, got -1"),
        (lambda: Slices((0, 0)), ValueError, "Expected `dims` to be different dimensions"),
        (lambda: Slices((0.5,)), TypeError, "Expected `dims` to be an integer of at least 0, got 0.5"),
        (lambda: Blocks(0), ValueError, "Expected `k` to be an integer of at least 1, got 0"),
        (lambda: Blocks(True), TypeError, "Expected `k` to be an integer"),
        (lambda: Heads(0), ValueError, "Expected `heads` to be an integer of at least 1, got 0"),
        (lambda: Heads(2, packed=0), ValueError, "Expected `packed`"),
        (
            lambda: Labels([0, 1]),
            TypeError,
            "Expected `labels` to be an int64 tensor with the labels 0 … n − 1, got l",
        ),
        (lambda: Labels(torch.tensor([0.0])), TypeError, "got torch.float32"),
        (lambda: Labels(torch.tensor([0, -1])), ValueError, "got the label -1"),
        (lambda: Labels(torch.tensor([0, 2])), ValueError, "got the label 2 among 2"),
        (lambda: Labels(torch.tensor([0, 2, 2])), ValueError, "each of which occurs; 1 does not"),
    ],
)
def test_what_is_no_cutting_is_refused(make, error, said):
    with pytest.raises(error, match=re.escape(said)):
        make()
