"""
What each penalty makes of a weight
===================================

A proximal step turns the weight on the horizontal axis into the one on the vertical axis.
"""

import matplotlib.pyplot as plt

from torchreg import L0, L1, L2, MCP, SCAD, ElasticNet, LHalf, LogSum, plots

penalties = [L1(1.0), L2(0.5), ElasticNet(0.5, 0.25), MCP(1.0, 3.0), SCAD(1.0), LogSum(1.0, 0.5), LHalf(1.0), L0(1.0)]
figure, axes = plt.subplots(2, 4, figsize=(10, 5), layout="constrained")
for ax, penalty in zip(axes.flat, penalties, strict=True):
    plots.shrinkage_curve(penalty, ax)
