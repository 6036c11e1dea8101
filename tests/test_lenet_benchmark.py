"""The quality benchmark counts and judges what it says, on digits of a few pixels."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARKS))
    import lenet
    import lenet_data
    import lenet_networks
    import lenet_training
    from lenet_networks import LeNet5, LeNet300, compact, expand, nonzero, weights
    from lenet_published import PUBLISHED
    from lenet_recipes import RECIPES, Phase

NETWORKS = (LeNet300, LeNet5)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """scikit-learn's 8 × 8 digits in MNIST's form."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = np.pad(np.kron(digits.images * 15, np.ones((1, 3, 3))), ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "mnist.npz"
    np.savez(path, x_train=images[:1500], y_train=labels[:1500], x_test=images[1500:], y_test=labels[1500:])
    return path


@pytest.fixture(autouse=True)
def as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def pruned(kind, fraction):
    """A network with few weights, layers whose first units read nothing, and units that nothing reads."""
    torch.manual_seed(0)
    network = kind()
    with torch.no_grad():
        for w in weights(network):
            w.mul_(torch.rand_like(w) < fraction * (10 if w.numel() < 10_000 else 1))
            w[:5] *= len(w) == 10
            w[:, -1:] *= w.shape[1] == 1
    return network


@pytest.mark.parametrize(("kind", "size"), [(LeNet300, 266_200), (LeNet5, 430_500)])
def test_the_networks_have_the_size_that_compressions_are_counted_against(kind, size):
    assert sum(w.numel() for w in weights(kind())) == size


@pytest.mark.parametrize("fraction", [0.0, 0.002, 0.01, 0.03])
@pytest.mark.parametrize("kind", NETWORKS)
def test_dead_units_go_and_the_function_stays(kind, fraction):
    network, x = pruned(kind, fraction).double(), torch.randn(50, 784, dtype=torch.double)
    size = nonzero(network)
    before = network(x)
    small = compact(network)
    smaller = compact(small)
    torch.testing.assert_close(network(x), before)
    assert nonzero(small) == nonzero(network) <= size
    assert sum(w.numel() for w in weights(small)) < sum(w.numel() for w in weights(network))
    for other in (small, smaller):
        full = expand(other).double()
        seen = x[:, other.kept["pixels"]] if kind is LeNet300 else x
        torch.testing.assert_close(other.double()(seen), before, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(full(x), before, rtol=1e-5, atol=1e-6)
        assert nonzero(full) == nonzero(other)


@pytest.mark.parametrize("kind", NETWORKS)
def test_compacting_again_after_a_cut_keeps_the_function(kind):
    network, x = pruned(kind, 0.03), torch.randn(50, 784)
    small = compact(network)
    lenet_training.cut_(small, 300)
    expected = expand(small)(x)
    torch.testing.assert_close(expand(compact(small))(x), expected, rtol=1e-4, atol=1e-5)


def test_a_cut_keeps_the_largest_weights():
    torch.manual_seed(0)
    network = LeNet300()
    for w in weights(network):
        torch.nn.init.normal_(w)
    moduli = torch.cat([w.detach().abs().flatten() for w in weights(network)]).sort(descending=True).values
    lenet_training.cut_(network, 200_000)
    kept = torch.cat([w[w != 0].detach().abs() for w in weights(network)])
    torch.testing.assert_close(kept.sort(descending=True).values, moduli[:200_000], rtol=0, atol=0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_cut_leaves_no_weight_to_a_dead_unit(kind):
    network = pruned(kind, 0.3)
    lenet_training.cut_(network, 3000)
    before = nonzero(network)
    assert nonzero(compact(network)) == before <= 3000


def test_the_validation_images_are_left_out_of_training(mnist, monkeypatch):
    monkeypatch.setattr(lenet_data, "HELD_OUT", 300)
    train, test = lenet_data.load(mnist)
    fitted, judge = train.split(seed=1)
    assert (len(fitted), len(judge)) == (1200, 300)
    both = torch.cat([fitted.pixels, judge.pixels]).sum(1).sort().values
    assert torch.equal(both, train.pixels.sum(1).sort().values)
    assert len(test) == 297


def test_moved_copies_come_in_the_order_of_the_images(mnist):
    images = lenet_data.load(mnist)[0]
    still = images.moved(copies=2, degrees=0, scale=0, shift=0, seed=0)
    for copy in range(3):
        assert torch.equal(still.pixels[1500 * copy : 1500 * (copy + 1)], images.pixels)
    moved = images.moved(copies=1, degrees=10, scale=0.1, shift=1, seed=0)
    assert not torch.equal(moved.pixels[1500:], images.pixels)
    together = torch.corrcoef(torch.stack([moved.pixels[1500:].flatten(), images.pixels.flatten()]).float())[0, 1]
    assert together > 0.7
    rows = torch.cat(list(moved.batches(100, torch.Generator().manual_seed(0))))
    assert sorted((rows % 1500).tolist()) == list(range(1500))
    assert rows.max() >= 1500


def test_zeros_stay_where_they_are_once_settled(mnist):
    images = lenet_data.load(mnist)[0]
    state, images = lenet_training.start(RECIPES["LeNet-300-100"], images, seed=0)
    phase = Phase(6, (0.05, 0.05), strength=1e-4, cut=50_000, keep=5000, settled=0.5)
    counts = []
    network = lenet_training.run(phase, state, images, seed=0, tell=lambda text: counts.append(text)).network
    assert nonzero(network) <= 5000
    assert len({int(text.split()[-2]) for text in counts[3:]}) == 1, counts
    assert len({int(text.split()[-2]) for text in counts[:3]}) == 3, counts


def test_the_command_judges_every_compression(mnist, tmp_path, monkeypatch, capsys):
    """An epoch a phase; the counts must be those asked for, the errors in the file those in the table."""
    for name, recipe in RECIPES.items():
        short = {
            compression: tuple(dataclasses.replace(phase, epochs=1, batch=50) for phase in phases)
            for compression, phases in list(recipe.then.items())[-1:]
        }
        moves = dataclasses.replace(recipe.moves, copies=1)
        shared = tuple(dataclasses.replace(phase, epochs=1, batch=50) for phase in recipe.shared)
        monkeypatch.setitem(RECIPES, name, dataclasses.replace(recipe, shared=shared, then=short, moves=moves))
    path = tmp_path / "results" / "lenet.json"
    status = lenet.main(["--data", str(mnist), "--json", str(path), "--seeds", "0", "1"])
    document = json.loads(path.read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert set(document["networks"]) == set(RECIPES)
    for name, result in document["networks"].items():
        assert result["judged_by"] == "test images"
        assert result["machine"]["threads"] == 1
        assert result["recipe"]["network"] == name
        for key, row in result["compressions"].items():
            assert len(row["error"]) == len(row["weights"]) == len(row["seconds"]) == 2
            if key != "dense":
                assert max(row["weights"]) <= result["weights"] / int(key)
                assert row["error"][0] < 85
                assert row["met"] == (row["mean"] <= lenet.BARS[name][int(key)])
                assert f"**{row['mean']:.2f}**" in printed
    missed = any(r.get("met") is False for n in document["networks"].values() for r in n["compressions"].values())
    assert status == missed
    assert lenet.readme_table(document["networks"]) in printed


def test_validation_never_looks_at_the_test_images(mnist, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(lenet_data, "HELD_OUT", 300)
    monkeypatch.setattr(lenet, "one_seed", lambda recipe, train, judge, seed: seen.append((train, judge)) or {})
    monkeypatch.setattr(lenet, "summary", lambda *args: {"weights": 1, "compressions": {}})
    assert lenet.main(["--data", str(mnist), "--validate", "--networks", "LeNet-300-100"]) == 0
    assert [(len(train), len(judge)) for train, judge in seen] == [(1200, 300)] * 5


def test_bars_are_about_recipes_and_published_figures_are_consistent():
    for name, bars in lenet.BARS.items():
        if name in RECIPES:
            assert set(bars) <= set(RECIPES[name].then)
        for row in PUBLISHED[name]:
            assert abs(100 / row.kept - row.compression) <= 0.12 * row.compression, row
    assert lenet_networks.LeNet300.full["pixels"] == lenet_data.SIDE**2
