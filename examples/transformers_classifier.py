"""A sparse transformer with Hugging Face's Trainer: which of its weights does counting need?

python examples/transformers_classifier.py --logdir runs/transformers
"""

import argparse

import torch
import transformers

import torchreg
from torchreg.integrations.transformers import RegularizationCallback


class Sequences(torch.utils.data.Dataset):
    """Random tokens; the label says whether more than half of them are in the upper half of the vocabulary."""

    def __init__(self, size, seed):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, 32, (size, 9), generator=generator)
        self.labels = ((self.tokens >= 16).sum(1) > 4).long()

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


def main():
    """Train with L1 by a proximal AdamW, and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--strength", type=float, default=1e-5)
    parser.add_argument("--logdir", default="runs/transformers")
    args = parser.parse_args()

    transformers.set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=32, **sizes))
    settings = transformers.TrainingArguments(
        output_dir=args.logdir,
        max_steps=args.steps,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        report_to="tensorboard",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rules = {"*LayerNorm*": None, "bert.encoder.*.weight": torchreg.L1(args.strength)}  # the first match wins
    penalties = RegularizationCallback(rules, route="proximal", every=50)
    trainer = transformers.Trainer(
        model,
        settings,
        train_dataset=Sequences(4096, seed=0),
        eval_dataset=Sequences(512, seed=1),
        optimizer_cls_and_kwargs=penalties.optimizer(torch.optim.AdamW, settings),
        compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(1) == result.label_ids).mean())},
    )
    penalties.add_to(trainer)  # TensorBoard's writer is shared
    trainer.train()

    print(torchreg.sparsity(penalties.regularization.regularizer))
    print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.1%}")


if __name__ == "__main__":
    main()
