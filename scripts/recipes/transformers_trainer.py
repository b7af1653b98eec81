"""transformers: a multi-label `Trainer` with nnce's loss, and a head for 10,000 labels."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import nnce

VOCABULARY, LENGTH, WIDTH = 100, 6, 64


def config(num_labels: int) -> BertConfig:
    """Configuration of a tiny BERT, for random initial weights."""
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=num_labels,
        problem_type="multi_label_classification",
    )


def cross_entropy(
    outputs: SequenceClassifierOutput, labels: Tensor, num_items_in_batch: Tensor | None = None
) -> Tensor:
    """Mean loss over all elements, like the built-in one, for `compute_loss_func`.

    With gradient accumulation, the Trainer expects division by num_items_in_batch, the number of
    elements in all batches of a step. (The built-in loss does not do that.)
    """
    C = nnce.sigmoid_cross_entropy(outputs.logits, labels, reduction="sum")
    return C / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


class ManyLabels(nn.Module):
    """BERT with last layer and loss in one module that processes many labels block by block."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.encoder = BertModel(config(num_labels))
        self.last = nnce.LinearSigmoidCrossEntropyLoss(WIDTH, num_labels, prior=LENGTH / num_labels)

    def features(self, input_ids: Tensor) -> Tensor:
        """Compute the mean hidden state over the tokens, [n, WIDTH]."""
        return self.encoder(input_ids).last_hidden_state.mean(1)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the loss; labels [n, k] are label numbers, padded with −1."""
        return {"loss": self.last(self.features(input_ids), labels)}


def train(model: nn.Module, dataset: list[Any], loss: Any = None, **options: Any) -> nn.Module:
    """Train a model with a `Trainer`, without checkpoints and reports."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            **{"per_device_train_batch_size": 32, "learning_rate": 5e-3, **options},
            **{"use_cpu": True, "save_strategy": "no", "logging_strategy": "no"},
            **{"report_to": "none", "disable_tqdm": True},
        )
        Trainer(model, arguments, train_dataset=dataset, compute_loss_func=loss).train()
    return model.eval()


def make(kind: type[nn.Module], argument: Any) -> nn.Module:
    """Create a model with the same initial weights at each call."""
    torch.manual_seed(0)
    return kind(argument)


def main() -> None:
    """Train with both losses, then with 10,000 labels."""
    # Sentences of distinct tokens. Label t is positive if the sentence contains token t.
    tokens = torch.rand(1_000, VOCABULARY, generator=torch.Generator().manual_seed(0))
    tokens = tokens.argsort(1)[:, :LENGTH]
    y = torch.zeros(1_000, VOCABULARY).scatter_(1, tokens, 1.0)
    dataset = [{"input_ids": t, "labels": row} for t, row in zip(tokens, y, strict=True)]
    ours, theirs = (
        train(make(BertForSequenceClassification, config(VOCABULARY)), dataset, loss)
        for loss in (cross_entropy, None)
    )
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(f"Parameters differ from those with the built-in loss by at most {difference:.0e}.")

    # The same with 10,000 labels, where token t corresponds to label 100 t.
    labels = 100 * tokens
    dataset = [{"input_ids": t, "labels": row} for t, row in zip(tokens, labels, strict=True)]
    model = train(make(ManyLabels, 10_000), dataset, num_train_epochs=4)
    with torch.no_grad():
        _, best = model.last.topk(model.features(tokens), LENGTH)
    found = (best.unsqueeze(-1) == labels.unsqueeze(1)).any(-1).float().mean().item()
    print(f"{found:.0%} of the {LENGTH} top-ranked labels out of 10,000 are right.")


if __name__ == "__main__":
    main()
