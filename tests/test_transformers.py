"""In Hugging Face's Trainer a callback gives the weights of the plain loop, also resumed, and shares TensorBoard."""

import json
import re
from pathlib import Path

import pytest
import torch
from example import percent, printed
from feature_cases import assert_same as assert_features_same
from feature_cases import data_loss, in_a_trainer, of_trainers
from feature_cases import trained as trained_plainly
from torch.utils.data import DataLoader, Dataset

from torchreg import L1, ProxAdamW, Proximal, Regularizer, TargetSparsity, sparsity
from torchreg.schedules import WarmupStrength

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from torchreg.integrations.transformers import RegularizationCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
RULES = {"*dense.weight": L1(0.02), "*self.*.weight": L1(0.01)}
STEPS = 12


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """Accelerate collects garbage when a training begins, which takes longer than the training."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


class Words(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 20, (16, 5), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": (self.ids[i, 0] > 9).long()}


def network():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **sizes, **quiet))


def arguments(folder, **options):
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "optim": "adamw_torch",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 5,
    }
    return transformers.TrainingArguments(**{**settings, **options})


def trained(folder, callback, optimizer=None, resume=None, **options):
    args = arguments(folder, **options)
    made = callback.optimizer(optimizer, args) if optimizer else None
    trainer = transformers.Trainer(network(), args, train_dataset=Words(), optimizer_cls_and_kwargs=made)
    callback.add_to(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def plain(route, schedule=None, accumulate=1, made=None):
    """The loop that the Trainer replaces, with its weight decay, schedule and clipping."""
    model = network()
    model.train()
    reg = Regularizer(model, RULES)
    exempt = [n for n, _ in model.named_parameters() if "bias" in n or "norm" in n.lower()]
    named = list(model.named_parameters())
    if route == "hook":
        groups = [{"params": [p for n, p in named if (n in exempt) == bare]} for bare in (False, True)]
    else:
        groups = []
        for bare in (False, True):
            names = {id(p) for n, p in named if (n in exempt) == bare}
            groups += [{**g, "params": [p for p in g["params"] if id(p) in names]} for g in reg.param_groups()]
            for group in groups[-len(reg.param_groups()) :]:
                group["bare"] = bare
        groups = [g for g in groups if g["params"]]
    decays = [0.0 if g.pop("bare", i == 1) else 0.01 for i, g in enumerate(groups)]
    for group, decay in zip(groups, decays, strict=True):
        group["weight_decay"] = decay
    optimizer = (made or torch.optim.AdamW)(groups, lr=5e-3)
    if route == "hook":
        reg.attach(optimizer)
    elif made is None:
        optimizer = Proximal(optimizer)
    moves = schedule(reg if route == "hook" else optimizer) if schedule else None
    decay = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    batches = [batch for _ in range(99) for batch in DataLoader(Words(), batch_size=4)]
    for step in range(STEPS):
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            model(**batch).loss.backward()  # the Trainer leaves the division to the model, which does none
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        if moves:
            moves.step()
    return model


def assert_same(one, other):
    for (name, p), q in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name


def warmup(holder):
    return WarmupStrength(holder, until=9)


def target(optimizer):
    return TargetSparsity(optimizer, 0.6, until=10)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_hook_gives_the_weights_of_the_plain_loop(accumulate, tmp_path):
    callback = RegularizationCallback(RULES, schedule=warmup)
    trainer = trained(tmp_path, callback, gradient_accumulation_steps=accumulate)
    assert_same(trainer.model, plain("hook", warmup, accumulate))
    assert callback.regularization.steps == STEPS


@pytest.mark.parametrize(("kind", "schedule"), [(torch.optim.AdamW, target), (ProxAdamW, None)])
def test_the_optimizer_of_the_callback_leaves_zeros(kind, schedule, tmp_path):
    callback = RegularizationCallback(RULES, "proximal", schedule)
    trainer = trained(tmp_path, callback, kind)
    assert isinstance(trainer.optimizer.optimizer, ProxAdamW if kind is ProxAdamW else Proximal)
    assert_same(trainer.model, plain("proximal", schedule, made=None if kind is torch.optim.AdamW else kind))
    counts = sparsity(Regularizer(trainer.model, RULES))
    assert counts.fraction == pytest.approx(0.6, abs=0.02) if schedule else counts.total.zeros > 10


@of_trainers
def test_what_needs_no_more_than_the_trainer_gives_the_weights_of_the_plain_loop(penalty, feature, tmp_path):
    def train(model, part, data):
        class Module(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = model

            def forward(self, x, labels):
                return {"loss": data_loss(self.net, x, labels) + part.term()}

        class Rows(Dataset):
            def __len__(self):
                return len(data)

            def __getitem__(self, i):
                return dict(zip(("x", "labels"), data[i], strict=True))

        args = arguments(tmp_path, max_steps=len(data) // 8, per_device_train_batch_size=8, max_grad_norm=0.0)
        constant = torch.optim.lr_scheduler.LambdaLR(part.optimizer, lambda step: 1.0)
        transformers.Trainer(Module(), args, train_dataset=Rows(), optimizers=(part.optimizer, constant)).train()

    assert_features_same(in_a_trainer(penalty, feature, train), trained_plainly(feature, penalty))


@pytest.mark.parametrize(("route", "schedule", "restore"), [("hook", warmup, False), ("proximal", target, True)])
def test_a_resumed_training_ends_with_the_same_weights(route, schedule, restore, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "restore_callback_states_from_checkpoint": restore}
    kind = torch.optim.AdamW if route == "proximal" else None
    whole = trained(tmp_path, RegularizationCallback(RULES, route, schedule), kind, **options).model
    callback = RegularizationCallback(RULES, route, schedule)
    trainer = trained(tmp_path, callback, kind, str(tmp_path / "checkpoint-5"), **options)
    assert_same(trainer.model, whole)
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, RegularizationCallback))
    assert callback.regularization.steps == callback.regularization.monitor.steps == STEPS
    saved = json.loads(Path(tmp_path, "checkpoint-5", "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["RegularizationCallback"]["attributes"]["saved"]["steps"] == 5


@pytest.mark.parametrize("kept", ["by the trainer", "given", "no TensorBoard"])
def test_the_numbers_are_where_the_trainers_are(kept, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    if kept == "given":
        board = transformers.integrations.TensorBoardCallback()
        callback = RegularizationCallback(RULES, every=5, writer=board)
        args = arguments(tmp_path)
        trainer = transformers.Trainer(network(), args, train_dataset=Words(), callbacks=[callback, board])
        trainer.train()
    else:
        report_to = "tensorboard" if kept == "by the trainer" else "none"
        trainer = trained(tmp_path, RegularizationCallback(RULES, every=5), report_to=report_to)
    if kept == "no TensorBoard":
        logged = [entry["step"] for entry in trainer.state.log_history if "sparsity/total" in entry]
        assert logged[:2] == [4, 9], "the Trainer counts a step after it"
        return
    (folder,) = {path.parent for path in (tmp_path / "tb").rglob("events*")}
    events = EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "sparsity/total", "loss/penalty"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("sparsity/total")] == [5, 10, 12]


def test_a_training_that_raised_leaves_nothing_in_the_way(tmp_path):
    callback = RegularizationCallback(RULES)

    class Failing(transformers.TrainerCallback):
        fails = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.fails and state.global_step == 3:
                raise KeyError("the user's")

    failing = Failing()
    trainer = transformers.Trainer(network(), arguments(tmp_path), train_dataset=Words(), callbacks=[callback, failing])
    with pytest.raises(KeyError):
        trainer.train()
    failing.fails = False
    trainer.train()
    assert callback.regularization.steps == STEPS


def test_the_proximal_route_needs_the_callbacks_optimizer(tmp_path):
    with pytest.raises(ValueError, match=r"callback\.optimizer"):
        trained(tmp_path, RegularizationCallback(RULES, "proximal"))
    with pytest.raises(ValueError, match="route 'proximal'"):
        RegularizationCallback(RULES).optimizer(torch.optim.AdamW)


def test_the_example(monkeypatch, capsys, tmp_path):
    arguments = ["--steps", 100, "--logdir", tmp_path]
    out = printed("transformers_classifier.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert percent("test accuracy", out) > 90
    assert float(re.search(r"total .* ([\d.]+) %", out)[1]) > 20
