"""The benchmark of linear models judges what it has measured. Nothing here depends on how long anything takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARKS))
    import linear_gpu
    import linear_report


def test_a_bar_is_met_missed_or_not_measured():
    def rows(ours, **peers):
        return {"wide, alpha_max/10": {"torchreg": {"seconds": ours}, **{n: {"seconds": s} for n, s in peers.items()}}}

    def of(rows):
        return {bar["text"]: linear_report.told(bar).split()[0] for bar in linear_report.judged(rows)}

    three = "wide, alpha_max/10: at most 0.333 × sklearn"
    faster = "wide, alpha_max/10: at most 1 × celer and skglm"
    met = of(rows(1.0, sklearn=3.0, celer=1.2, skglm=1.1))
    assert (met[three], met[faster]) == ("met", "met")
    missed = of(rows(1.0, sklearn=2.9, celer=1.2, skglm=0.9))
    assert (missed[three], missed[faster]) == ("missed", "missed")
    alone = of(rows(1.0, sklearn=4.0))
    assert (alone[three], alone[faster]) == ("met", "not")
    assert set(of({}).values()) == {"not"}


def test_the_part_for_a_gpu_measures_and_judges(tmp_path, capsys):
    kept = tmp_path / "gpu.json"
    assert linear_gpu.main(["--samples", "60", "--features", "150", "--device", "cpu", "--json", str(kept)]) == 0
    report = json.loads(kept.read_text(encoding="utf-8"))
    row = report["rows"]["GPU, path of 100"]
    assert row["torchreg"]["gap"] < 1e-12
    assert row["sklearn"]["gap"] < 1e-4
    assert set(report["rows"]["GPU, LassoCV"]) == {"torchreg", "sklearn"}
    assert [bar["met"] is None for bar in report["bars"]] == [False, False, "cuml" not in row]
    assert "not measured yet" in capsys.readouterr().out or "cuml" in row


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it is measured")
def test_without_a_gpu_nothing_is_claimed(tmp_path, capsys):
    kept = tmp_path / "gpu.json"
    assert linear_gpu.main(["--json", str(kept)]) == 0
    assert "not measured yet" in capsys.readouterr().out
    assert not kept.exists()
