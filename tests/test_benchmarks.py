"""The benchmark compares what it says it compares. Nothing here depends on how long anything takes."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARKS))
    import adam_contenders
    import bars
    import contenders
    import group_contenders
    import measurement
    import step
    import workload

CPU = torch.device("cpu")
EVERY = [*contenders.CONTENDERS, *adam_contenders.CONTENDERS, *group_contenders.CONTENDERS]
SMALL = [(70, 3), (64,), (257,), (257,)]


def taking_part(contender, dtype=torch.float32):
    work = workload.Workload(SMALL, CPU, dtype)
    reason = "torch.compile is for the slow tests" if contender.patient else contender.missing(work)
    if reason:
        pytest.skip(reason)
    return work


@pytest.fixture
def tiny(monkeypatch):
    """The command on tiny tensors, in a moment, with the process's threads as they were."""
    monkeypatch.setattr(workload, "LISTS", dict.fromkeys(workload.LISTS, SMALL))
    monkeypatch.setattr(measurement, "MOST_ROUNDS", 2)
    monkeypatch.setattr(step, "bandwidth", lambda device: 1e9)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "size", "tensors"), [("ResNet-50", 25_557_032, 161), ("GPT-2", 124_439_808, 148)])
def test_the_lists_have_the_size_of_the_models(name, size, tensors):
    assert workload.count(workload.LISTS[name]) == size
    assert len(workload.LISTS[name]) == tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("contender", EVERY, ids=lambda c: c.name)
def test_every_contender_computes_what_it_says(contender, dtype):
    work = taking_part(contender, dtype)
    measurement.check(contender, contender.build(work), work)


@pytest.mark.slow
def test_the_compiled_step_computes_what_it_says():
    (contender,) = [c for c in contenders.CONTENDERS if c.patient]
    work = workload.Workload(SMALL, CPU, torch.float32)
    if contender.missing(work):
        pytest.skip(contender.missing(work))
    measurement.check(contender, contender.build(work), work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_strength_that_is_twice_too_large_is_noticed(dtype):
    by_name = {c.name: c for c in contenders.CONTENDERS}
    for name in ("ProxSGD L1, foreach", "ProxSGD Elastic Net, foreach", contenders.SOFT_FOREACH):
        wrong = dataclasses.replace(by_name[name], formula=contenders.proximal(contenders.STRENGTH * 2))
        work = taking_part(wrong, dtype)
        with pytest.raises(measurement.Disagreement, match="is off by"):
            measurement.check(wrong, wrong.build(work), work)


@pytest.mark.parametrize("name", [contenders.BY_HAND, contenders.LOSS_TERM])
def test_a_wrong_value_is_noticed(name):
    (contender,) = [c for c in contenders.CONTENDERS if c.name == name]
    wrong = dataclasses.replace(contender, figure=lambda work: 1.01 * contenders.penalty_value(work))
    work = taking_part(wrong)
    with pytest.raises(measurement.Disagreement, match="instead of"):
        measurement.check(wrong, wrong.build(work), work)


def test_no_speed_is_printed_if_an_output_is_off(tiny, monkeypatch, capsys):
    first, *others = contenders.CONTENDERS
    wrong = dataclasses.replace(first, formula=contenders.proximal(contenders.STRENGTH))
    monkeypatch.setattr(contenders, "CONTENDERS", [wrong, *others])
    with pytest.raises(SystemExit, match="No speed is reported"):
        step.main(["--quick", "--device", "cpu"])
    assert "× fused SGD" not in capsys.readouterr().out


def test_the_command_writes_everything_it_measured(tiny, tmp_path, capsys):
    path = tmp_path / "results" / "step.json"
    status = step.main(["--quick", "--device", "cpu", "--json", str(path)])
    document = json.loads(path.read_text(encoding="utf-8"))
    assert set(document["machine"]) >= {"device", "cpu", "threads", "versions"}
    assert document["machine"]["threads"] == 1
    for name in workload.QUICK:
        result = document["lists"][name]["float32"]
        assert {*result["contenders"], *result["skipped"]} == {c.name for c in EVERY}
        for row in result["contenders"].values():
            assert all(row[key] is not None for key in ("ratio", "quartiles", "ms", "bytes_per_parameter"))
    hand = document["lists"]["4 × 4 M"]["float32"]["contenders"][contenders.SOFT_FOREACH]
    assert hand["extra_bytes_per_parameter"] >= 8  # |w| and sign(w)
    assert status == any(bar["met"] is False for bar in document["bars"])
    assert step.readme_table(document) in capsys.readouterr().out


def test_bars_are_met_missed_or_not_measured():
    def row(ratio, traffic=0.0):
        return {"ratio": ratio, "bytes_per_parameter": traffic}

    def verdict(contender, against, device, name, rows, dtype="float32"):
        lists = {name: {dtype: {"contenders": rows, "floor_bytes_per_parameter": 20}}}
        start, end = f"{contender}, ", f" × {against}, {name}, {dtype}"
        (bar,) = [b for b in bars.judged(lists, device) if b["text"].startswith(start) and b["text"].endswith(end)]
        return bar["met"]

    l1 = contenders.FUSED[0]
    for ratio, met in ((1.1, True), (1.11, False)):
        assert verdict(l1, contenders.BASELINE, "cpu", "4 × 4 M", {l1: row(ratio), contenders.BASELINE: row(1)}) is met
    assert verdict(l1, contenders.PAT, "cpu", "4 × 4 M", {l1: row(1.0)}) is None
    for traffic, met in ((23.5, True), (23.6, False)):
        copy = "a copy of the bytes that it needs"
        assert verdict(l1, copy, "cuda", "GPT-2", {l1: row(1.0, traffic)}) is met


def test_the_bars_are_about_what_is_measured():
    names = {c.name for c in EVERY}
    for bar in (bar for every in bars.BARS.values() for bar in every):
        assert {bar.contender, bar.against or bar.contender} <= names
        assert bar.tensors in workload.LISTS
        assert 0 < bar.limit < math.inf
    assert {*step.README_ROWS.values(), *step.GROUP_ROWS.values()} <= names
