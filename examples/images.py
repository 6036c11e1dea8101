"""What compact_resnet.py trains: a small residual network, on images from a file or scikit-learn's digits."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F


def load(path, samples):
    """Standardised images (n, 1, height, width) and labels: (x_train, y_train, x_test, y_test).

    Args:
        path: an .npz file with these four arrays, such as Keras's mnist.npz, or None for scikit-learn's digits.
        samples: how many of the training images are used.
    """
    if path is None:
        digits = load_digits()
        parts = train_test_split(digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
        x_train, x_test, y_train, y_test = parts
    else:
        with np.load(path) as arrays:
            x_train, y_train, x_test, y_test = (arrays[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    mean, deviation = x_train.mean(), x_train.std()
    x_train, x_test = (torch.tensor((x - mean) / deviation).float().unsqueeze(1) for x in (x_train, x_test))
    y_train, y_test = torch.tensor(y_train).long(), torch.tensor(y_test).long()
    return x_train[:samples], y_train[:samples], x_test, y_test


class Block(nn.Module):
    """Two convolutions beside a shortcut (He, Zhang, Ren and Sun, CVPR 2016)."""

    def __init__(self, before, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if before != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        """The shortcut plus what the convolutions add."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


def network(width=32):
    """Three blocks of 32, 64 and 128 channels for 10 classes: 308,074 parameters, the same ones each time."""
    torch.manual_seed(0)
    first = [nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(*first, *blocks, *last)


def accuracy(model, x, y):
    """The fraction of right answers."""
    model.eval()
    with torch.no_grad():
        right = sum((model(x[some]).argmax(1) == y[some]).sum() for some in torch.arange(len(y)).split(500))
    model.train()
    return int(right) / len(y)


def train(model, optimizer, x, y, epochs, after_step=lambda loss: None):
    """Minibatches, a learning rate that warms up and then decays to nothing."""
    rates, steps = [group["lr"] for group in optimizer.param_groups], epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.2, cycle_momentum=False)
    for chosen in (some for _ in range(epochs) for some in torch.randperm(len(x)).split(64)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        after_step(loss)
