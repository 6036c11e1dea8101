"""L1 or L2? Three things that decide it, shown on real data with linear models.

python examples/l1_or_l2.py

Two measurements of the same thing; the same column twice; ten features among thousands that are noise.
"""

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.model_selection import KFold, train_test_split

from torchreg.linear import ElasticNet, Lasso, LassoCV, Ridge, RidgeCV, one_standard_error


def standardised(x):
    """Columns of mean 0 and standard deviation 1, so that one strength is fair to all."""
    return (x - x.mean(0)) / x.std(0)


def collinear_features(alpha=0.1, halves=20):
    """Ridge spreads a weight over features that say the same, Lasso picks one, Elastic Net keeps them together."""
    data = load_breast_cancer()
    x, y, pair = standardised(data.data[:, :10]), data.target.astype(float), [0, 2]
    r = np.corrcoef(x[:, pair].T)[0, 1]
    print(f"1. Radius and perimeter of a tumour (correlation {r:.3f}), among ten features")
    models = {"Ridge": Ridge(alpha * len(y)), "Lasso": Lasso(alpha), "Elastic Net": ElasticNet(alpha, l1_ratio=0.5)}
    for name, model in models.items():
        radius, perimeter = model.fit(x, y).coef_[pair]
        print(
            f"   {name:<12} radius {radius:7.4f}   perimeter {perimeter:7.4f}   zeros {(model.coef_ == 0).sum()} of 10"
        )
    samples = [train_test_split(x, y, train_size=0.5, random_state=seed)[::2] for seed in range(halves)]
    for name in ("Lasso", "Elastic Net"):
        radius, perimeter = sum(models[name].fit(*sample).coef_[pair] != 0 for sample in samples)
        print(f"   on {halves} random halves of the data {name} uses radius {radius}, perimeter {perimeter} times")


def equal_columns(alpha=5.0):
    """Lasso doesn't care how a weight is divided between equal columns; Ridge has one best division, in halves."""
    x, y = load_diabetes(return_X_y=True)
    x, y = standardised(x), y - y.mean()
    bmi, twice = 2, np.column_stack([x, x[:, 2]])
    print("2. The body mass index twice in the diabetes data: one weight, divided between two equal columns")
    for name, model, power in (("Lasso", Lasso(alpha), 1), ("Ridge", Ridge(alpha * len(y)), 2)):
        w = model.fit(twice, y).coef_.copy()
        whole, values = w[bmi] + w[-1], []
        for share in (1.0, 0.75, 0.5):
            w[[bmi, -1]] = share * whole, (1 - share) * whole
            penalty = alpha * (np.abs(w) ** power).sum() / power
            values.append(((y - twice @ w) ** 2).mean() / 2 + penalty)
        shares = f"all in one {values[0]:.6f}, three to one {values[1]:.6f}, halves {values[2]:.6f}"
        print(f"   {name}: objective {shares}; found {model.coef_[bmi]:.2f} and {model.coef_[-1]:.2f}")


def wide_and_noisy(noise=2000):
    """Lasso finds the few columns that matter; Ridge gives every one of thousands a little weight."""
    x, y = load_diabetes(return_X_y=True)
    x = np.hstack([standardised(x), np.random.default_rng(0).standard_normal((len(y), noise))])
    x, x_test, y, y_test = train_test_split(x, y, test_size=1 / 3, random_state=0)
    print(f"3. The ten features of the diabetes data among {noise} columns of noise, {len(y)} patients")
    lasso = LassoCV(cv=KFold(5, shuffle=True, random_state=0)).fit(x, y)
    _, simple = one_standard_error(lasso.alphas_, lasso.mse_path_)
    models = {
        "Ridge": RidgeCV(np.logspace(1, 6, 60)).fit(x, y),
        "Lasso, least error": lasso,
        "Lasso, one standard error": Lasso(lasso.alphas_[simple]).fit(x, y),
    }
    for name, model in models.items():
        real, false = (model.coef_[:10] != 0).sum(), (model.coef_[10:] != 0).sum()
        score = model.score(x_test, y_test)
        print(f"   {name:<26} uses {real:2} features and {false:4} columns of noise, test R² {score:.3f}")


if __name__ == "__main__":
    collinear_features()
    equal_columns()
    wide_and_noisy()
