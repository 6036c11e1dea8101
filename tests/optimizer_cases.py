"""The one table of optimizers that all generic tests run over: a new optimizer is one more row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from torchreg import L1, L2, ElasticNet, ProxAdamW, ProxSGD
from torchreg.kernels import native


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer, and hyperparameters that are allowed beside a penalty."""

    optimizer: type[Optimizer]
    hyperparameters: dict[str, dict[str, Any]]
    usual: dict[str, Any]  # with all the state that there can be
    buffer: str  # of that state, one of the weight's shape
    invalid: tuple[str, Any]  # a hyperparameter out of range
    defaults: dict[str, Any] = field(default_factory=dict)
    flat: dict[str, Any] = field(default_factory=dict)  # all weights are shrunk by the same step; complex ones need it
    tensor_lr_foreach: bool = True  # whether foreach=True takes a learning rate that is a tensor
    capturable_on_cpu: bool = True
    precision: float = 1.0  # how many times more a compiled step may differ

    def __call__(self, params: Any, **kwargs: Any) -> Optimizer:
        params = list(params)
        tensors = [p for p in params if isinstance(p, Tensor)]
        extra = self.flat if any(p.is_complex() for p in tensors) else {}
        return self.optimizer(params, **{"lr": 0.1, **self.defaults, **extra, **kwargs})


OPTIMIZERS = {
    "ProxSGD": OptimizerCase(
        ProxSGD,
        {
            "plain": {},
            "momentum": {"momentum": 0.9},
            "nesterov": {"momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.1},
            "dampening": {"momentum": 0.9, "dampening": 0.5},
            "maximize": {"momentum": 0.5, "maximize": True, "weight_decay": 0.1},
        },
        usual={"momentum": 0.9, "dampening": 0.5},
        buffer="momentum_buffer",
        invalid=("momentum", 1.0),
    ),
    "ProxAdamW": OptimizerCase(
        ProxAdamW,
        {
            "plain": {},
            "amsgrad": {"amsgrad": True, "betas": (0.5, 0.9)},
            "coupled": {"weight_decay": 0.1, "decoupled_weight_decay": False, "eps": 1e-3},
            "maximize": {"weight_decay": 0.1, "maximize": True},
            "identity": {"weight_decay": 0.1, "metric": "identity"},
        },
        usual={"amsgrad": True},
        buffer="exp_avg",
        invalid=("betas", (0.9, 1.0)),
        defaults={"weight_decay": 0.0},
        flat={"metric": "identity"},
        tensor_lr_foreach=False,  # as torch.optim.AdamW
        capturable_on_cpu=False,  # likewise
        precision=10.0,  # torch compiles bias corrections in float32
    ),
}

PENALTIES = {
    "L1": L1(0.3),
    "L2": L2(0.4),
    "ElasticNet": ElasticNet(0.3, 0.4),
    "L1 of a 0-d tensor": L1(torch.tensor(0.3)),
    "ElasticNet per coordinate": ElasticNet(torch.tensor([0.0, 0.1, 0.6]), torch.tensor([0.2, 0.0, 0.4])),
}

optimizers = pytest.mark.parametrize("case", OPTIMIZERS.values(), ids=OPTIMIZERS)
optimizers_and_hyperparameters = pytest.mark.parametrize(
    ("case", "hyper"),
    [
        pytest.param(case, hyper, id=f"{name}-{label}")
        for name, case in OPTIMIZERS.items()
        for label, hyper in case.hyperparameters.items()
    ],
)
penalties = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)

FORMS: dict[str, dict[str, Any]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "default": {},
    "fused": {"fused": True},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def forms_and_dtypes(dtypes: list[torch.dtype], fused: tuple[torch.dtype, ...] = native.DTYPES) -> Any:
    """Every form with every dtype that it computes in; ``fused`` are those of the device's fused step."""
    return pytest.mark.parametrize(
        ("form", "dtype"),
        [
            pytest.param(form, dtype, id=f"{name}-{dtype}")
            for name, form in FORMS.items()
            for dtype in dtypes
            if name != "fused" or dtype in fused
        ],
    )


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    """Weights of many shapes and strides whose last dimension is 3, with their gradients."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(4, 3, generator=generator),
        torch.randn(3, generator=generator),
        torch.randn(0, 3, generator=generator),
        torch.randn(3, 5, generator=generator).T,
        torch.randn(2, 3, 2, 3, generator=generator).to(memory_format=torch.channels_last),
        torch.randn(4, 6, generator=generator)[:, ::2],
    ]
    params = [torch.nn.Parameter(_as(t, dtype)) for t in tensors]
    set_gradients(params, seed)
    return params


def set_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = _as(torch.randn(p.shape, generator=generator), p.dtype)


def snapshot(params: list[torch.nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def identical(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether all tensors are equal to the last bit, NaN to NaN and -0.0 not to +0.0."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and bool((_bits(x) == _bits(y)).all())
        for x, y in zip(a, b, strict=True)
    )


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.complex(t, t.flip(-1)).to(dtype) if dtype.is_complex else t.to(dtype)


def _bits(t: Tensor) -> Tensor:
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])
