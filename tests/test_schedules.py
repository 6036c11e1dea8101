"""Strength over time: the scale follows its formula by every route, resumes bit for bit, and moves only when told."""

import copy
import io
import itertools
import math
import pickle
import re

import pytest
import torch
from torch import nn

from torchreg import L1, L2, ProxSGD, Regularizer, schedules
from torchreg.schedules import (
    ChainedStrength,
    CosineStrength,
    CubicStrength,
    LambdaStrength,
    LinearStrength,
    SequentialStrength,
    StrengthScheduler,
    WarmupStrength,
)


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def two_rules():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    return Regularizer(model, {"0.weight": L1(0.1), "1.weight": L2(0.2)})


def prox(reg):
    return ProxSGD(reg.param_groups(), lr=0.1)


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


MAKERS = {
    "warmup": lambda holder: WarmupStrength(holder, until=7, after=2),
    "linear": lambda holder: LinearStrength(holder, until=5, start=0.3, end=2.0),
    "cosine": lambda holder: CosineStrength(holder, until=9, after=1, start=1.0, end=0.1),
    "cubic": lambda holder: CubicStrength(holder, until=6),
    "lambda": lambda holder: LambdaStrength(holder, lambda t: 0.9**t),
    "sequential": lambda holder: SequentialStrength(
        holder, [WarmupStrength(holder, until=3), CosineStrength(holder, until=4, start=1.0, end=0.2)], [5]
    ),
    "chained": lambda holder: ChainedStrength(
        holder, [WarmupStrength(holder, until=3), LambdaStrength(holder, lambda t: 0.9**t)]
    ),
}
every_schedule = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def scales(schedule, steps):
    seen = [schedule.get_last_scale()]
    for _ in range(steps):
        schedule.step()
        seen.append(schedule.get_last_scale())
    return seen


# The formulas


@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (LinearStrength, lambda p: p),
        (CosineStrength, lambda p: (1 - math.cos(math.pi * p)) / 2),
        (CubicStrength, lambda p: 1 - (1 - p) ** 3),
    ],
)
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (2.0, 0.5), (0.1, 0.3)])
def test_a_ramp_goes_from_start_to_end(cls, shape, start, end):
    schedule = cls(Regularizer(linear(), L1(0.1)), until=13, after=3, start=start, end=end)
    seen = [scale for (scale,) in scales(schedule, 20)]
    assert seen[:4] == [start] * 4  # exactly, as are the last ones
    assert seen[13:] == [end] * 8
    expected = [start + (end - start) * shape((t - 3) / 10) for t in range(3, 14)]
    assert seen[3:14] == pytest.approx(expected, abs=1e-15)


def test_warmup_is_nothing_then_all():
    schedule = WarmupStrength(Regularizer(linear(), L1(0.1)), until=4, after=2)
    assert scales(schedule, 5) == [[0.0], [0.0], [0.0], [0.5], [1.0], [1.0]]


def test_a_sequence_starts_each_schedule_at_its_own_zero():
    reg = Regularizer(linear(), L1(0.1))
    parts = [LambdaStrength(reg, lambda t, k=k: k + t / 8) for k in (1, 2, 3)]
    schedule = SequentialStrength(reg, parts, [2, 3])
    assert scales(schedule, 5) == [[1.0], [1.125], [2.0], [3.0], [3.125], [3.25]]


def test_a_chain_is_the_product_and_keeps_groups_apart():
    opt = prox(two_rules())
    parts = [LambdaStrength(opt, [lambda t: 1.0 + t, lambda t: 2.0]), WarmupStrength(opt, until=2)]
    assert scales(ChainedStrength(opt, parts), 2) == [[0.0, 0.0], [1.0, 1.0], [3.0, 2.0]]


# Who sees it


@every_schedule
def test_all_groups_and_the_regularizer_share_the_scale(make):
    reg = two_rules()
    opt, own = prox(reg), reg.strength_scale
    schedule = make(opt)
    for _ in range(4):
        schedule.step()
        assert all(group["strength_scale"] is own for group in opt.param_groups)
        assert reg.strength_scale is own
        assert own.item() == pytest.approx(schedule.get_scale()[0], rel=1e-7)


@every_schedule
def test_the_loss_term_follows(make):
    reg = Regularizer(linear(), L1(0.1))
    full = reg().item()
    schedule = make(reg)
    for _ in range(4):
        schedule.step()
        assert reg().item() == pytest.approx(full * schedule.get_scale()[0], rel=1e-6)


def test_the_hook_follows_and_its_handle_may_be_given():
    model = nn.Linear(4, 3, bias=False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with Regularizer(model, L2(0.5)).attach(sgd) as handle:
        schedule = WarmupStrength(handle, until=2)
        for factor in (1.0, 0.95, 0.9):
            model.weight.grad = torch.zeros(3, 4)
            before = model.weight.detach().clone()
            sgd.step()
            torch.testing.assert_close(model.weight.detach(), before * factor)
            schedule.step()


@pytest.mark.parametrize("scale", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_the_proximal_step_follows(scale):
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    opt = ProxSGD([w], lr=0.5, penalty=L1(0.25), strength_scale=scale)
    schedule = LinearStrength(opt, until=2, start=0.0, end=2.0)
    w.grad = torch.zeros_like(w)
    for expected in (1.0, 0.875, 0.625):
        opt.step()
        assert w.item() == expected
        schedule.step()
    assert isinstance(opt.param_groups[0]["strength_scale"], type(scale))


def test_a_float_scale_is_exact():
    opt = ProxSGD([nn.Parameter(torch.ones(1))], lr=0.5, penalty=L1(0.25))
    LambdaStrength(opt, lambda t: 0.1)
    assert opt.param_groups[0]["strength_scale"] == 0.1


def test_the_step_itself_advances_nothing():
    reg = two_rules()
    opt = prox(reg)
    schedule = WarmupStrength(opt, until=10)
    schedule.step()
    for group in opt.param_groups:  # as torch.distributed.checkpoint does it
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    opt.step()
    assert schedule.last_epoch == 1
    assert reg.strength_scale.item() == pytest.approx(0.1)


# Per rule


@pytest.mark.parametrize("groups", ["1.weight", 1, ["1.weight"], (1,)])
def test_one_rule_moves_by_itself(groups):
    reg = two_rules()
    opt = prox(reg)
    LinearStrength(opt, until=2, start=0.25, groups=groups)
    assert opt.param_groups[0]["strength_scale"] is reg.strength_scale
    assert reg.strength_scale.item() == 1.0
    assert opt.param_groups[1]["strength_scale"].item() == 0.25


def test_rules_have_schedules_of_their_own():
    opt = prox(two_rules())
    one, two = WarmupStrength(opt, until=2, groups=0), WarmupStrength(opt, until=4, groups=1)
    one.step()
    two.step()
    assert [group["strength_scale"].item() for group in opt.param_groups[:2]] == [0.5, 0.25]


def test_a_list_of_functions_is_one_for_each_group():
    opt = prox(two_rules())
    schedule = LambdaStrength(opt, [lambda t: 1.0 * t, lambda t: 2.0])
    schedule.step()
    schedule.step()
    schedule.step()
    assert schedule.get_last_scale() == [3.0, 2.0]
    assert [group["strength_scale"].item() for group in opt.param_groups[:2]] == [3.0, 2.0]


def test_chosen_groups_go_on_sharing_among_themselves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    reg = Regularizer(model, {f"{i}.weight": L1(0.1 + i) for i in range(3)})
    opt = prox(reg)
    WarmupStrength(opt, until=2, groups=[0, 2])
    first, middle, last = (group["strength_scale"] for group in opt.param_groups[:3])
    assert first is last
    assert middle is reg.strength_scale


def test_groups_are_named_after_their_rules():
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv1d(3, 2, 1), nn.Linear(2, 2))
    reg = Regularizer(model, {"0.*": L1(0.1), nn.Conv1d: L2(0.1), re.compile("2"): L1(0.2)})
    assert [group.get("name") for group in reg.param_groups()] == ["0.*", "Conv1d", "re '2'", None]
    assert Regularizer(model, L1(0.1)).param_groups()[0]["name"] == "default"


def test_groups_without_a_penalty_are_left_out():
    reg = Regularizer(linear(), L1(0.1))
    opt = ProxSGD([{**reg.param_groups()[1], "strength_scale": 0.7}, reg.param_groups()[0]], lr=0.1)
    WarmupStrength(opt, until=2)
    assert opt.param_groups[0]["strength_scale"] == 0.7


# Checkpoints


@every_schedule
@pytest.mark.parametrize("at", [0, 4, 15])
def test_resuming_is_bit_exact(make, at):
    whole = make(prox(two_rules()))
    for _ in range(at):
        whole.step()
    state = through_file(whole.state_dict())
    reg = two_rules()
    resumed = make(prox(reg))
    resumed.load_state_dict(state)
    assert resumed.get_last_scale() == whole.get_last_scale()
    assert reg.strength_scale.item() == pytest.approx(whole.get_last_scale()[0], rel=1e-7)
    assert scales(resumed, 12) == scales(whole, 12)


@every_schedule
def test_a_state_is_numbers_only(make):
    state = make(prox(two_rules())).state_dict()
    assert all(type(value) is int for value in state.values())


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one():
    def run(opt, schedule, model, first, last):
        for k in range(first, last):
            torch.manual_seed(k)
            opt.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            opt.step()
            schedule.step()

    def start():
        model = linear()
        reg = Regularizer(model, L1(0.05))
        opt = ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9)
        return opt, CubicStrength(opt, until=12), model

    whole, half = start(), start()
    run(*whole, 0, 10)
    run(*half, 0, 5)
    again = start()
    for fresh, old in zip(again, half, strict=True):
        fresh.load_state_dict(through_file(old.state_dict()))
    run(*again, 5, 10)
    assert torch.equal(again[2].weight, whole[2].weight)


def test_it_finds_its_groups_after_the_optimizer_was_loaded():
    opt = prox(two_rules())
    schedule = WarmupStrength(opt, until=4, groups=1)
    opt.load_state_dict(through_file(opt.state_dict()))
    schedule.step()
    assert [group["strength_scale"].item() for group in opt.param_groups[:2]] == [1.0, 0.25]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_and_pickles_go_on_by_themselves(copied):
    schedule = WarmupStrength(prox(two_rules()), until=4)
    other = copied(schedule)
    other.step()
    assert (schedule.last_epoch, other.last_epoch) == (0, 1)
    assert other.optimizer.param_groups[0]["strength_scale"].item() == 0.25


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({}, "with the key 'last_epoch', got the keys"),
        (None, "got None"),
        ({"last_epoch": 1, "extra": 2}, "extra"),
        ({"last_epoch": -1}, "got -1"),
        ({"last_epoch": 1.5}, "got 1.5"),
        ({"last_epoch": True}, "got True"),
    ],
)
def test_a_bad_state_changes_nothing(state, error):
    reg = two_rules()
    schedule = WarmupStrength(reg, until=4)
    schedule.step()
    with pytest.raises((ValueError, TypeError), match=error):
        schedule.load_state_dict(state)
    assert schedule.last_epoch == 1
    assert reg.strength_scale.item() == 0.25


# Bad input


def plain():
    return ProxSGD([nn.Parameter(torch.ones(2))], lr=0.1)


BAD = {
    "no penalty": (ValueError, "None of the 1 param groups has a penalty", lambda: WarmupStrength(plain(), until=3)),
    "group without penalty": (
        ValueError,
        "Param group 2 has no penalty",
        lambda: WarmupStrength(prox(two_rules()), until=3, groups=2),
    ),
    "unknown group": (ValueError, "from 0 to 2, got 3", lambda: WarmupStrength(prox(two_rules()), until=3, groups=3)),
    "unknown rule": (
        ValueError,
        "named '0.wieght'; closest: '0.weight'",
        lambda: WarmupStrength(prox(two_rules()), until=3, groups="0.wieght"),
    ),
    "group twice": (
        ValueError,
        "every param group once",
        lambda: WarmupStrength(prox(two_rules()), until=3, groups=[0, "0.weight"]),
    ),
    "no groups": (ValueError, "at least one", lambda: WarmupStrength(prox(two_rules()), until=3, groups=[])),
    "groups of a wrong kind": (
        TypeError,
        "position or the name",
        lambda: WarmupStrength(prox(two_rules()), until=3, groups=[0.5]),
    ),
    "groups of a regularizer": (
        ValueError,
        "one strength scale",
        lambda: WarmupStrength(two_rules(), until=3, groups=0),
    ),
    "torch's optimizer": (
        ValueError,
        "SGD applies no penalties.*give the Regularizer",
        lambda: WarmupStrength(torch.optim.SGD(two_rules().param_groups(), lr=0.1), until=3),
    ),
    "a model": (TypeError, "an optimizer or a Regularizer, got Linear", lambda: WarmupStrength(linear(), until=3)),
    "a class": (TypeError, "got the class ProxSGD", lambda: WarmupStrength(ProxSGD, until=3)),
    "until 0": (ValueError, "greater than `after`", lambda: WarmupStrength(two_rules(), until=0)),
    "until before after": (ValueError, "got 3 and 3", lambda: WarmupStrength(two_rules(), until=3, after=3)),
    "until no integer": (TypeError, "`until`.*got 2.5", lambda: WarmupStrength(two_rules(), until=2.5)),
    "negative scale": (ValueError, "`end`.*got -1", lambda: LinearStrength(two_rules(), until=2, end=-1)),
    "nan scale": (ValueError, "`start`.*nan", lambda: LinearStrength(two_rules(), until=2, start=math.nan)),
    "text scale": (TypeError, "`start`.*'1'", lambda: LinearStrength(two_rules(), until=2, start="1")),
    "not callable": (TypeError, "callable", lambda: LambdaStrength(two_rules(), 1.0)),
    "too few functions": (
        ValueError,
        "Expected 2 functions, one for each group, got 1",
        lambda: LambdaStrength(prox(two_rules()), [lambda t: 1.0]),
    ),
    "negative value": (ValueError, "at step 0.*-1", lambda: LambdaStrength(two_rules(), lambda t: -1)),
    "no value": (TypeError, "at step 0.*None", lambda: LambdaStrength(two_rules(), lambda t: None)),
    "no schedules": (ValueError, "at least one", lambda: ChainedStrength(two_rules(), [])),
    "lr schedules": (TypeError, "got int", lambda: ChainedStrength(two_rules(), [1])),
    "other optimizer's": (
        ValueError,
        "same groups",
        lambda: ChainedStrength(two_rules(), [WarmupStrength(two_rules(), until=2)]),
    ),
    "the base": (NotImplementedError, "scales_at", lambda: StrengthScheduler(two_rules())),
}


@pytest.mark.parametrize(("error", "message", "make"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_milestones_fit_the_schedules():
    reg = two_rules()
    parts = [WarmupStrength(reg, until=2), WarmupStrength(reg, until=2)]
    for milestones in ([], [1, 2], [0]):
        with pytest.raises(ValueError, match="milestones"):
            SequentialStrength(reg, parts, milestones)
    for milestones in (1, "1", None, [1.5]):
        with pytest.raises(TypeError, match="milestones"):
            SequentialStrength(reg, parts, milestones)
    with pytest.raises(ValueError, match="at least one schedule, got none"):
        SequentialStrength(reg, [], [])
    with pytest.raises(ValueError, match="increase"):
        SequentialStrength(reg, [*parts, parts[0]], [3, 3])


def test_refused_input_changes_no_scale():
    opt = prox(two_rules())
    before = [group["strength_scale"] for group in opt.param_groups]
    with pytest.raises(ValueError, match="at step 0"):
        LambdaStrength(opt, [lambda t: 0.5, lambda t: math.inf])
    after = [group["strength_scale"] for group in opt.param_groups]
    assert all(a is b and a.item() == 1.0 for a, b in zip(before, after, strict=True))


def test_a_function_that_fails_later_leaves_the_schedule_where_it_is():
    reg = two_rules()
    schedule = LambdaStrength(reg, lambda t: 1.0 if t < 2 else -1.0)
    schedule.step()
    with pytest.raises(ValueError, match="at step 2"):
        schedule.step()
    assert schedule.last_epoch == 1
    assert reg.strength_scale.item() == 1.0


def test_every_schedule_is_public():
    classes = {cls.__name__ for cls in _subclasses(StrengthScheduler)} | {"StrengthScheduler"}
    assert {name for name in classes if not name.startswith("_")} == set(schedules.__all__)


def _subclasses(cls):
    return itertools.chain.from_iterable((sub, *_subclasses(sub)) for sub in cls.__subclasses__())
