"""Linear models with scikit-learn's interface whose solutions are exact, on the CPU and on CUDA.

Needs scikit-learn: ``pip install 'torchreg-sparse[sklearn]'``. Importing torchreg alone does not import it.
"""

try:
    import sklearn  # noqa: F401
except ImportError:
    raise ImportError("torchreg.linear needs scikit-learn: pip install 'torchreg-sparse[sklearn]'") from None

from torchreg.linear.estimators.cross_validation import ElasticNetCV, LassoCV
from torchreg.linear.estimators.elastic_net import ElasticNet, Lasso
from torchreg.linear.estimators.group_lasso import GroupLasso
from torchreg.linear.estimators.logistic_regression import LogisticRegression
from torchreg.linear.estimators.multi_task import MultiTaskElasticNet, MultiTaskLasso
from torchreg.linear.estimators.multi_task_cv import MultiTaskElasticNetCV, MultiTaskLassoCV
from torchreg.linear.estimators.ridge import Ridge
from torchreg.linear.estimators.ridge_cv import RidgeCV
from torchreg.linear.paths.path import alpha_max, enet_path, lasso_path
from torchreg.one_standard_error import one_standard_error

__all__ = [
    "ElasticNet",
    "ElasticNetCV",
    "GroupLasso",
    "Lasso",
    "LassoCV",
    "LogisticRegression",
    "MultiTaskElasticNet",
    "MultiTaskElasticNetCV",
    "MultiTaskLasso",
    "MultiTaskLassoCV",
    "Ridge",
    "RidgeCV",
    "alpha_max",
    "enet_path",
    "lasso_path",
    "one_standard_error",
]
