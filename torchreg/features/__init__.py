"""Feature selection by networks: `torchreg.FeatureSelector`, with scikit-learn's interface.

Needs scikit-learn: ``pip install 'torchreg-sparse[sklearn]'``. Importing torchreg alone does not import it.
"""

try:
    import sklearn  # noqa: F401
except ImportError:
    raise ImportError("torchreg.FeatureSelector needs scikit-learn: pip install 'torchreg-sparse[sklearn]'") from None

from torchreg.features.path import FeaturePath
from torchreg.features.selector import FeatureSelector

__all__ = ["FeaturePath", "FeatureSelector"]
