"""Which parameter gets which penalty, and what is refused with a word on why."""

import copy
import re
import textwrap
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import torchreg
from torchreg import L1, L2, ElasticNet, Regularizer
from torchreg.rules import WEIGHTS


def chain():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def chosen(model, rules):
    return {a.name: a.penalty for a in Regularizer(model, rules).assignments if a.penalty is not None}


class Zoo(nn.Module):
    """One layer of every kind that the default has an opinion on."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.up = nn.ConvTranspose1d(2, 2, 3)
        self.lstm = nn.LSTM(4, 4, proj_size=2)
        self.cell = nn.GRUCell(4, 4)
        self.bilinear = nn.Bilinear(2, 2, 2)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.embedding = nn.Embedding(5, 4)
        self.bag = nn.EmbeddingBag(5, 4)
        self.norm = nn.LayerNorm(4)
        self.batch = nn.BatchNorm2d(4)
        self.prelu = nn.PReLU()
        self.token = nn.Parameter(torch.zeros(4))


def test_a_bare_penalty_selects_weights_and_says_why_it_leaves_the_rest():
    reg = Regularizer(Zoo(), L1(0.1))
    assert [a.name for a in reg.assignments if a.penalty is not None] == [
        "linear.weight",
        "conv.weight",
        "up.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "lstm.weight_hr_l0",
        "cell.weight_ih",
        "cell.weight_hh",
        "bilinear.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    reasons = {a.name: a.reason for a in reg.assignments if a.penalty is None}
    assert {reason for name, reason in reasons.items() if "bias" in name} == {"bias"}
    assert {name: reason for name, reason in reasons.items() if reason != "bias"} == {
        "embedding.weight": "embedding",
        "bag.weight": "embedding",
        "norm.weight": "normalisation layer",
        "batch.weight": "normalisation layer",
        "prelu.weight": "no rule matches",
        "token": "no rule matches",
    }


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("*", {"0.weight", "0.bias", "2.weight", "2.bias"}),
        ("0.*", {"0.weight", "0.bias"}),
        ("*.weight", {"0.weight", "2.weight"}),
        ("[02].bias", {"0.bias", "2.bias"}),
        (re.compile(r"^2\."), {"2.weight", "2.bias"}),
        (re.compile("eigh"), {"0.weight", "2.weight"}),
        (nn.Linear, {"0.weight", "2.weight"}),
        (nn.Sequential, {"0.weight", "2.weight"}),
        (WEIGHTS, {"0.weight", "2.weight"}),
        (lambda name, p: p.ndim == 1, {"0.bias", "2.bias"}),
        (lambda name, p: name.startswith("2") and p.shape[0] == 2, {"2.weight", "2.bias"}),
    ],
    ids=[
        "all",
        "glob",
        "glob-suffix",
        "glob-set",
        "regex",
        "regex-search",
        "class",
        "container",
        "default",
        "by-p",
        "by-name",
    ],
)
def test_a_selector_matches(selector, expected):
    assert chosen(chain(), {selector: L1(0.1)}) == dict.fromkeys(expected, L1(0.1))
    assert chosen(chain(), [(selector, L1(0.1))]) == dict.fromkeys(expected, L1(0.1))


def test_parameters_select_themselves():
    model = chain()
    pair = (model[0].bias, model[2].weight)
    expected = dict.fromkeys(["0.bias", "2.weight"], L1(0.1))
    for selector in (list(pair), iter(pair), set(pair)):
        assert chosen(model, [(selector, L1(0.1))]) == expected
    assert chosen(model, {pair: L1(0.1)}) == expected
    assert chosen(model, {model[2].bias: L1(0.1)}) == {"2.bias": L1(0.1)}
    assert set(chosen(model, {model[0].parameters(): L1(0.1)})) == {"0.weight", "0.bias"}


def test_the_first_match_wins_and_none_leaves_alone():
    rules = {"0.weight": None, "*.weight": L1(0.1), "*": L2(0.2)}
    assert chosen(chain(), rules) == {"2.weight": L1(0.1), "0.bias": L2(0.2), "2.bias": L2(0.2)}
    reg = Regularizer(chain(), rules)
    assert reg.assignments[0].reason == "rule '0.weight': None"
    assert chosen(chain(), {"2.*": None, WEIGHTS: L1(0.1)}) == {"0.weight": L1(0.1)}


def test_a_class_takes_the_layers_inside_it():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), nn.Conv1d(2, 2, 1))
    assert set(chosen(model, [(type(model[0]), L1(0.1))])) == {"0.0.weight", "1.weight"}
    assert set(chosen(model, {nn.LayerNorm: L1(0.1)})) == {"0.1.weight"}
    assert set(chosen(nn.Linear(2, 2), {nn.Linear: L1(0.1)})) == {"weight"}


def test_tied_weights_count_once():
    model = chain()
    model[2] = model[0]
    model[0].weight.data.fill_(1.0)
    reg = Regularizer(model, L1(0.5))
    assert reg.assignments[0].aliases == ("0.weight", "2.weight")
    assert reg().item() == 0.5 * 12
    assert set(chosen(model, {"2.weight": L1(0.5)})) == {"0.weight"}
    assert sum(len(group["params"]) for group in reg.param_groups()) == 2


def test_a_layer_tied_to_an_embedding_is_left_alone_unless_named():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "other": nn.Linear(4, 4)})
    model["head"].weight = model["embed"].weight
    reg = Regularizer(model, L1(0.1))
    assert [name for name, _, _ in reg.penalized()] == ["other.weight"]
    assert reg.assignments[0].reason == "tied to an embedding"
    assert set(chosen(model, {"head.weight": L1(0.1)})) == {"embed.weight"}


def test_a_frozen_parameter_is_skipped_until_it_is_unfrozen():
    model = chain()
    model[0].weight.requires_grad_(False)
    reg = Regularizer(model, L1(0.1))
    assert [name for name, _, _ in reg.penalized()] == ["2.weight"]
    assert "L1 0.1 (frozen: skipped)" in str(reg)
    model[0].weight.requires_grad_(True)
    assert [name for name, _, _ in reg.penalized()] == ["0.weight", "2.weight"]
    model[0].bias.requires_grad_(False)
    assert Regularizer(model, L1(0.1)).assignments[1].reason == "frozen"


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def _parametrized(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())


def _quietly(function):
    def changed(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            function(layer)

    return changed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_parametrized, "the original of a parametrization"),
        (parametrizations.weight_norm, "the original of a parametrization"),
        (parametrizations.spectral_norm, "the original of a parametrization"),
        (_quietly(nn.utils.weight_norm), "weight-normed"),
        (_quietly(nn.utils.spectral_norm), "reparametrised"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 2), "reparametrised (pruned"),
    ],
    ids=["parametrize", "weight_norm", "spectral_norm", "old-weight_norm", "old-spectral_norm", "prune"],
)
def test_a_weight_computed_from_others_is_refused_with_a_word_on_why(change, why):
    layer = nn.Linear(4, 3)
    change(layer)
    for model in (layer, nn.Sequential(layer, nn.Linear(3, 2))):
        for rules in (L1(0.1), {"*": L1(0.1)}, {nn.Linear: L1(0.1)}):
            with pytest.raises(ValueError, match=rf"Parameter '.*' is {re.escape(why)}.*a penalty on it is not one on"):
                Regularizer(model, rules)
    excepted = {re.compile(r"^0\."): None, WEIGHTS: L1(0.1)}
    assert set(chosen(nn.Sequential(layer, nn.Linear(3, 2)), excepted)) == {"1.weight"}


@pytest.mark.parametrize("change", [_parametrized, parametrizations.weight_norm, _quietly(nn.utils.weight_norm)])
def test_the_exception_that_the_refusal_suggests_works(change):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    change(model[1])
    rules = L1(0.1)
    for _ in range(2):  # weight norm computes a weight from two parameters
        try:
            reg = Regularizer(model, rules)
        except ValueError as error:
            suggested = re.search(r"Leave it alone with the rules (\{.*\})\.$", str(error))[1]
            known = rules if isinstance(rules, dict) else {}
            rules = {name: None for name in known if name is not WEIGHTS} | eval(suggested.replace("...", "0.1"))
    reg = Regularizer(model, rules)
    assert [name for name, _, _ in reg.penalized()] == ["0.weight"]


# A model that changes after the rules


def _replace(model):
    model[2] = nn.Linear(3, 2)


def _remove(model):
    model[2] = nn.ReLU()


def _tie(model):
    model[2].bias = model[0].bias


GONE = r"Parameter '%s' is no longer in the model \(parametrized, pruned or replaced\?\): apply the rules again"
CHANGES = [
    (_replace, GONE % "2.weight"),
    (_remove, GONE % "2.weight"),
    (lambda model: prune.l1_unstructured(model[0], "weight", 2), GONE % "0.weight"),
    (lambda model: _parametrized(model[0]), GONE % "0.weight"),
    (lambda model: model.append(nn.Linear(2, 2)), "Parameter '3.weight' is new in the model: apply the rules again"),
]
CHANGED = pytest.mark.parametrize(("change", "said"), CHANGES, ids=["replace", "remove", "prune", "param", "append"])


@CHANGED
def test_a_change_of_the_model_after_the_rules_is_told(change, said):
    model = chain()
    reg = Regularizer(model, L1(0.1))
    attached = torch.optim.SGD(model.parameters(), lr=0.1)
    reg.attach(attached)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    change(model)
    uses = [
        reg,
        reg.param_groups,
        lambda: reg.attach(torch.optim.SGD(model.parameters(), lr=0.1)),
        attached.step,
        lambda: torchreg.kkt_residual(reg),
        lambda: torchreg.strength_max(reg, lambda: model(torch.ones(1, 4)).sum()),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=said):
            use()
    assert re.search("\n\nout of date: " + said, str(reg))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_tie, "Parameter '2.bias' is tied to another one since the rules were applied: apply them again"),
        (lambda model: model.register_parameter("gain", nn.Parameter(torch.ones(1))), "Parameter 'gain' is new"),
    ],
    ids=["tie", "add"],
)
def test_a_changed_parameter_inside_a_layer_is_told_where_all_are_gone_through(change, said):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    reg = Regularizer(model, L1(0.1))
    change(model)
    for use in (reg.param_groups, lambda: reg.attach(torch.optim.SGD(model.parameters(), lr=0.1))):
        with pytest.raises(RuntimeError, match=said):
            use()


def test_untying_a_weight_is_told():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    reg = Regularizer(model, L1(0.1))
    model[1].weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(RuntimeError, match=r"Parameter '1.weight' is new in the model"):
        reg.param_groups()


def test_a_model_that_holds_the_same_parameters_elsewhere_is_as_good_as_before():
    model = chain()
    reg = Regularizer(model, L1(0.1))
    expected = reg().item()
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())  # as sharding does
    model[2] = nn.Sequential(model[2])
    model.alias = model[0]
    for again in (reg, copy.deepcopy(reg)):
        assert again().item() == expected
        assert sum(len(group["params"]) for group in again.param_groups()) == 4
        assert "out of date" not in str(again)


def test_a_lazy_parameter_is_refused_until_it_is_initialised():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    for rules in (L1(0.1), [([model[0].weight], L1(0.1))], {model[0].weight: L1(0.1)}):
        with pytest.raises(ValueError, match=r"Parameter '0.weight' is not initialised yet: run one forward pass"):
            Regularizer(model, rules)
    assert "not initialised" in str(Regularizer(model, {"1.weight": L1(0.1)}))
    model(torch.ones(1, 4))
    assert set(chosen(model, L1(0.1))) == {"0.weight", "1.weight"}


def test_integer_parameters_are_left_alone_by_default_and_refused_by_name():
    model = chain()
    model[0].weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    reg = Regularizer(model, L1(0.1))
    assert reg.assignments[0].reason == "quantised (torch.int8)"
    assert [name for name, _, _ in reg.penalized()] == ["2.weight"]
    with pytest.raises(
        TypeError, match=r"Expected parameter '0.weight' to be floating point or complex, got torch.int8"
    ):
        Regularizer(model, {"*.weight": L1(0.1)})


def test_a_non_leaf_is_refused():
    model = chain()
    model[0]._parameters["weight"] = 2 * model[0].weight
    with pytest.raises(ValueError, match=r"Expected parameter '0.weight' to be a leaf tensor"):
        Regularizer(model, L1(0.1))
    with pytest.raises(
        ValueError, match=r"not a parameter of the model \(it is the result of an operation, not a leaf"
    ):
        Regularizer(chain(), [([2 * nn.Parameter(torch.ones(3))], L1(0.1))])


# Errors and warnings


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        ("conv.weight", "Rule 'conv.weight' matches none of 4 parameters; closest: '2.weight', '0.weight'."),
        ("3.wieght", "Rule '3.wieght' matches none of 4 parameters; closest: '2.weight', '0.weight'."),
        ("Q*", "Rule 'Q*' matches none of 4 parameters; the first is '0.weight'."),
        (re.compile("^bias$"), "Rule re '^bias$' matches none of 4 parameters; closest: '2.bias', '0.bias'."),
        (nn.Conv2d, "Rule Conv2d matches none of 4 parameters; the layers with parameters are: Linear."),
        (lambda name, p: False, "Rule <lambda> matches none of 4 parameters; the first is '0.weight'."),
        ((), "Rule list of 0 parameters matches none of 4 parameters"),
    ],
)
@pytest.mark.parametrize("penalty", [L1(0.1), None], ids=["penalty", "None"])
def test_a_rule_that_matches_nothing_names_near_misses(selector, said, penalty):
    with pytest.raises(ValueError, match="^" + re.escape(said)):
        Regularizer(chain(), {"*.bias": L2(0.1), selector: penalty})


def test_a_bare_penalty_on_a_model_without_weights_is_told_what_it_selects():
    with pytest.raises(
        ValueError, match="Rule default matches none of 2 parameters: a bare penalty selects the weights of"
    ):
        Regularizer(nn.LayerNorm(3), L1(0.1))


def test_a_model_without_parameters_has_no_penalty():
    reg = Regularizer(nn.ReLU(), L1(0.1))
    assert reg().item() == 0
    assert reg.param_groups() == []
    assert str(reg) == ""


def test_a_rule_that_decides_nothing_warns_at_the_callers_line():
    with pytest.warns(UserWarning, match=r"Rule '0.weight' decides nothing: earlier rules match all") as caught:
        Regularizer(chain(), {"*.weight": L1(0.1), "0.weight": None})
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("rules", "error", "said"),
    [
        (
            L1,
            TypeError,
            "Expected `rules` to be a penalty or a mapping from selectors to penalties, got the class L1 (an",
        ),
        ("*.weight", TypeError, "got str '*.weight'"),
        (0.1, TypeError, "got float 0.1"),
        (None, TypeError, "got NoneType"),
        ({}, ValueError, "Expected `rules` to hold at least one rule, got none."),
        ([L1(0.1)], TypeError, "Expected each rule to be a pair (selector, penalty), got L1 L1(strength=0.1)."),
        ({"*": 0.1}, TypeError, "Expected the penalty of rule '*' to be a Penalty or None, got float 0.1."),
        ({"*": L1}, TypeError, "Expected the penalty of rule '*' to be a Penalty or None, got the class L1"),
        ({"*": {"0.*": L1(0.1)}}, TypeError, "Expected the penalty of rule '*' to be a Penalty or None, got dict."),
        ({L1(0.1): L1(0.1)}, TypeError, "Expected a selector (glob, regex, module class, predicate or parameters) as"),
        ({L1(0.1): "*"}, TypeError, "Expected a selector (glob, regex, module class, predicate or parameters) as"),
        (
            {7: L1(0.1)},
            TypeError,
            "Expected the rule's key to be a glob, a compiled regex, a module class, a predicate",
        ),
        ({dict: L1(0.1)}, TypeError, "Expected a module class as the rule's key, got the class dict."),
        (
            {nn.Linear(1, 1): L1(0.1)},
            TypeError,
            "Expected the class or the name of a module as the rule's key, got the L",
        ),
        (
            [(["0.weight"], L1(0.1))],
            TypeError,
            "Expected parameters in rule list of 1 parameters, got str '0.weight' at",
        ),
        ({"*": L1(torch.ones(7))}, ValueError, "Parameter '0.weight': Expected `strength` of L1 to broadcast to the w"),
    ],
)
def test_what_are_no_rules_is_refused(rules, error, said):
    with pytest.raises(error, match=re.escape(said)):
        Regularizer(chain(), rules)


@pytest.mark.parametrize(
    ("model", "said"),
    [(L1(0.1), "got L1 L1(strength=0.1)"), (nn.Linear, "got the class Linear (an instance such as"), ([], "got list")],
    ids=["penalty", "class", "list"],
)
def test_what_is_no_model_is_refused(model, said):
    with pytest.raises(TypeError, match=r"^Expected `model` to be an nn.Module, " + re.escape(said)):
        Regularizer(model, L1(0.1))


def test_rules_given_where_a_penalty_is_meant_are_refused():
    with pytest.raises(TypeError, match=r"got dict; rules for a model's parameters go to torchreg.Regularizer"):
        torchreg.ProxSGD([nn.Parameter(torch.ones(1))], lr=0.1, penalty={"*": L1(0.1)})


def test_the_same_parameter_twice_and_a_foreign_tensor_are_refused():
    model = chain()
    w = model[0].weight
    with pytest.raises(
        ValueError, match=r"of shape \(3, 4\) at position 1 of rule list of 2 parameters is listed twice"
    ):
        Regularizer(model, [([w, w], L1(0.1))])
    for foreign in (nn.Parameter(torch.ones(2, 5)), torch.ones(2, 5)):
        with pytest.raises(
            ValueError, match=r"The tensor of shape \(2, 5\) at position 0 of rule .* is not a parameter of"
        ):
            Regularizer(model, [(foreign, L1(0.1))])


# Wrapped models


def _ddp(model):
    class Unbuilt(nn.parallel.DistributedDataParallel):  # building one needs a process group
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    return Unbuilt(model)


def _in_checkpoint_wrapper(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model[0] = checkpoint_wrapper(model[0])
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        _ddp,
        nn.DataParallel,
        _in_checkpoint_wrapper,
        lambda model: torch.compile(_ddp(model)),
        lambda model: _ddp(torch.compile(model)),
        lambda model: nn.Sequential(*(torch.compile(layer) for layer in model)),
    ],
    ids=["compile", "ddp", "data-parallel", "checkpoint", "compile-ddp", "ddp-compile", "compiled-layers"],
)
def test_wrappers_leave_no_trace_in_names(wrap):
    model = chain()
    expected = ["0.weight", "0.bias", "2.weight", "2.bias"]
    reg = Regularizer(wrap(model), {"0.weight": L1(0.1), WEIGHTS: L2(0.1)})
    assert [a.name for a in reg.assignments] == expected
    assert [name for name, _, _ in reg.penalized()] == ["0.weight", "2.weight"]


# The table


def test_print_shows_what_is_penalised_and_what_is_left_alone_and_why():
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(1, 2, 3), "norm": nn.BatchNorm2d(2), "head": nn.Linear(4, 2), "out": nn.Linear(2, 1)}
    )
    model["out"].requires_grad_(False)
    rules = {
        nn.Conv2d: L1(1e-4),
        re.compile("head.w"): ElasticNet(torch.tensor([0.0, 0.1, 0.25, 1.0]), 0.5),
        "head.bias": None,
        "out.weight": L2(torch.tensor(2.0)),
    }
    reg = Regularizer(model, rules)
    reg.strength_scale = 0.5
    assert str(reg) == textwrap.dedent(
        """\
        parameter     shape     rule           strength
        ────────────────────────────────────────────────────────────────
        conv.weight   2×1×3×3   Conv2d         L1 0.0001
        head.weight   2×4       re 'head.w'    ElasticNet l1=0…1, l2=0.5
        out.weight    1×2       'out.weight'   L2 2 (frozen: skipped)

        left alone    shape   why
        ────────────────────────────────────────────
        conv.bias     2       bias
        norm.weight   2       normalisation layer
        norm.bias     2       bias
        head.bias     2       rule 'head.bias': None
        out.bias      1       frozen

        all strengths × 0.5"""
    )
    assert repr(reg) == "Regularizer(3 of 8 parameters penalised)"
