"""Pictures of penalties: why L1 makes zeros, and what each penalty makes of a weight.

python examples/draw_penalties.py --out docs

Writes geometry.png (on two features of the diabetes data; put in your own) and shrinkage.png (every penalty here).
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes

from torchreg import plots


def geometry(path, names=("bmi", "s1")):
    """The loss of two features, and where it touches the diamond, the elastic ball and the circle."""
    data = load_diabetes()
    x, y = data.data[:, [data.feature_names.index(name) for name in names]], data.target
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    figure = Figure(figsize=(9.6, 3.7), dpi=100, layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    for axes, l1_ratio in zip(figure.subplots(1, 3), (1.0, 0.5, 0.0), strict=True):
        plots.geometry(x, y, axes, l1_ratio=l1_ratio, names=names)
    note = "cross: least squares; dot: the least loss on the ball; blue: the contour through it; grey: other contours"
    figure.supxlabel(note, fontsize="small", color="#555555")
    figure.savefig(path)


def shrinkage(path):
    """What the proximal operator makes of a weight, for every penalty of the library."""
    figure = Figure(figsize=(10.5, 7.2), dpi=100, layout="constrained")
    plots.shrinkage_curves(figure.subplots(3, 5))
    figure.supxlabel("weight before")
    figure.supylabel("weight after")
    figure.savefig(path)


def main():
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="the folder for the pictures")
    args = parser.parse_args()
    for draw in (geometry, shrinkage):
        path = args.out / f"{draw.__name__}.png"
        draw(path)
        print(path)


if __name__ == "__main__":
    main()
