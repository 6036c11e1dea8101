"""The data and the training loop that the examples share: scikit-learn's handwritten digits, a small network."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn


def load():
    """Pixels in [0, 1] and labels: (x_train, y_train, x_test, y_test)."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=0.2, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = (torch.as_tensor(part) for part in parts)
    return x_train.float(), y_train, x_test.float(), y_test


def network():
    """64 pixels, 128 hidden units, 10 classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def batches(x, y, epochs, size=64):
    """Shuffled minibatches."""
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(size):
            yield x[chosen], y[chosen]


def accuracy(model, x, y):
    """The fraction of right answers."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()
