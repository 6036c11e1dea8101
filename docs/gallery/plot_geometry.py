"""
Why L1 makes zeros
==================

The least loss within a ball of the penalty is where a contour of the loss touches it. L1's ball has corners.
"""

from sklearn.datasets import load_diabetes

from torchreg import plots

data = load_diabetes()
columns = [data.feature_names.index(name) for name in ("bmi", "s1")]
X, y = data.data[:, columns], data.target
X, y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()

# %%
# Two features of the diabetes data. The cross is least squares, the dot the least loss on the ball.

import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.7), layout="constrained")
for ax, l1_ratio in zip(axes, (1.0, 0.5, 0.0), strict=True):
    plots.geometry(X, y, ax, l1_ratio=l1_ratio, names=("bmi", "s1"))
