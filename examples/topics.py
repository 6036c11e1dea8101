"""The text and the network of compact_transformer.py: Python's own help topics, and a transformer that reads them."""

from pydoc_data.topics import topics

import torch
from torch import nn

CONTEXT = 64
"""How many characters the network sees at most."""


def load():
    """The texts of Python's `help()`, a number for each character: (training, held out, number of characters)."""
    text = "\n".join(topics[name] for name in sorted(topics))
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([number[character] for character in text])
    held_out = len(numbers) // 10
    return numbers[:-held_out], numbers[-held_out:], len(number)


class Transformer(nn.Module):
    """Guesses each next character: layers of 8 attention heads and 512 feed-forward units."""

    def __init__(self, characters, layers, width=128):
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.position = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, characters):
        """Scores of the characters that may come next, at each place."""
        x = self.embed(characters) + self.position.weight
        return self.head(self.encoder(x, mask=self.mask, is_causal=True))


def network(characters, layers=2):
    """The same one each time."""
    torch.manual_seed(0)
    return Transformer(characters, layers)


def batches(text, steps, size=16, seed=0):
    """Passages from anywhere in the text, and each one's next characters."""
    generator = torch.Generator().manual_seed(seed)
    passages = text.unfold(0, CONTEXT + 1, 1)
    for _ in range(steps):
        chosen = passages[torch.randint(len(passages), (size,), generator=generator)]
        yield chosen[:, :-1], chosen[:, 1:]


def loss_of(model, x, y):
    """The mean cross-entropy of a character, in nats."""
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def held_out_loss(model, text):
    """The loss on passages that cover the text once."""
    model.eval()
    passages = text[: len(text) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    with torch.no_grad():
        losses = [loss_of(model, some[:, :-1], some[:, 1:]) * len(some) for some in passages.split(64)]
    model.train()
    return float(sum(losses)) / len(passages)
