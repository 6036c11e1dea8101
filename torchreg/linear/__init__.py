"""Linear models with scikit-learn's interface whose solutions are exact, on the CPU and on CUDA.

Needs scikit-learn: ``pip install 'torchreg-sparse[sklearn]'``. Importing torchreg alone does not import it.
"""

try:
    import sklearn  # noqa: F401
except ImportError:
    raise ImportError("torchreg.linear needs scikit-learn: pip install 'torchreg-sparse[sklearn]'") from None

from torchreg.linear.cross_validation import ElasticNetCV, LassoCV
from torchreg.linear.elastic_net import ElasticNet, Lasso
from torchreg.linear.group_lasso import GroupLasso
from torchreg.linear.logistic import LogisticRegression
from torchreg.linear.multi_task import MultiTaskElasticNet, MultiTaskLasso
from torchreg.linear.multi_task_cv import MultiTaskElasticNetCV, MultiTaskLassoCV
from torchreg.linear.paths import alpha_max, enet_path, lasso_path
from torchreg.linear.ridge import Ridge
from torchreg.linear.ridge_cv import RidgeCV
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
