"""What others reached with these networks on MNIST, as printed in their papers or repositories."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    method: str
    error: str
    """Test error in percent."""
    kept: float
    """Percent of the weights."""
    compression: int


PUBLISHED = {
    "LeNet-300-100": (
        Published("prune and retrain, Han et al. 2015", "1.59", 8.0, 12),
        Published("SNIP, Lee et al. 2019", "1.6", 5.0, 20),
        Published("soft weight sharing, Ullrich et al. 2017", "1.94", 4.3, 23),
        Published("dynamic sparse training, Liu et al. 2020, mean of 5", "2.31", 2.48, 40),
        Published("SNIP, Lee et al. 2019", "2.4", 2.0, 50),
        Published("dynamic network surgery, Guo et al. 2016", "1.99", 1.8, 56),
        Published("L-OBS, Dong et al. 2017", "2.0", 1.5, 67),
        Published("sparse variational dropout, Molchanov et al. 2017", "1.92", 1.5, 68),
        Published("LC, Carreira-Perpiñán and Idelbayev 2018", "3.2", 1.0, 100),
    ),
    "LeNet-5": (
        Published("prune and retrain, Han et al. 2015", "0.77", 8.0, 12),
        Published("SNIP, Lee et al. 2019", "0.8", 2.0, 50),
        Published("dynamic sparse training, Liu et al. 2020, mean of 5", "0.89", 1.64, 61),
        Published("ADMM, Zhang et al. 2018", "0.8", 1.4, 71),
        Published("SNIP, Lee et al. 2019", "1.1", 1.0, 100),
        Published("dynamic network surgery, Guo et al. 2016", "0.91", 0.9, 108),
        Published("soft weight sharing, Ullrich et al. 2017", "0.97", 0.5, 200),
        Published("progressive ADMM, 2019", "about no loss", 0.41, 246),
        Published("sparse variational dropout, Molchanov et al. 2017", "0.75", 0.36, 280),
    ),
}
