"""
A lasso's path
==============

The coefficients over the strength, and the cross-validated error.
"""

import matplotlib.pyplot as plt
from sklearn.datasets import load_diabetes

from torchreg import plots
from torchreg.linear import LassoCV, lasso_path

data = load_diabetes()
X, y = data.data, data.target
X, y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()

# %%
# One call for all strengths of the path, one for ten folds of cross-validation.

model = LassoCV(cv=10).fit(X, y)
alphas, coefs, _ = lasso_path(X, y, alphas=model.alphas_)

figure, axes = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
plots.coefficient_path(alphas, coefs, axes[0], data.feature_names)
plots.cv_curve(model.alphas_, model.mse_path_, axes[1])
