"""timm: nnce's losses in place of `BinaryCrossEntropy` and `AsymmetricLossMultiLabel`."""

import timm
import torch
from timm.loss import AsymmetricLossMultiLabel, BinaryCrossEntropy
from torch import Tensor, nn

import nnce
from nnce import data


class FromIndices(nn.Module):
    """nnce's loss with timm's definition of smoothing and target_threshold.

    For K classes, timm smooths targets to 1 − s + s/K for the class and s/K elsewhere, as for a
    softmax. nnce's label_smoothing treats each component as a separate binary decision and smooths
    it to s/2 or 1 − s/2 (timm's smooth_dense). Therefore the targets are smoothed here.
    """

    def __init__(self, smoothing: float = 0.1, target_threshold: float | None = None) -> None:
        super().__init__()
        self.smoothing, self.target_threshold = smoothing, target_threshold
        self.loss = nnce.BCEWithLogitsLoss()  # sum_classes=True: SigmoidCrossEntropyLoss()

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """Compute the mean loss over examples and classes for targets [n] or [n, K]."""
        if target.shape != z.shape:
            one_hot = nn.functional.one_hot(target.long(), z.shape[-1]).to(z.dtype)
            target = (1 - self.smoothing) * one_hot + self.smoothing / z.shape[-1]
        if self.target_threshold is not None:
            target = target > self.target_threshold  # nnce accepts booleans
        return self.loss(z, target)


# Losses of timm with their replacements.
LOSSES: dict[str, tuple[nn.Module, nn.Module]] = {
    "BinaryCrossEntropy": (BinaryCrossEntropy(), FromIndices()),
    # For targets of 0 and 1: both divide by the number of examples. timm's ln is cut off at 1e-8.
    "AsymmetricLossMultiLabel": (
        AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=1, clip=0.05),
        nnce.SigmoidAsymmetricLoss(gamma_negative=4, gamma_positive=1, margin=0.05),
    ),
}


def train(loss: nn.Module, dense: bool = False, epochs: int = 5) -> tuple[nn.Module, float]:
    """Train a network on 1,000 digits; return it and its test accuracy.

    Args:
        loss: a criterion.
        dense: whether the loss takes targets [n, 10] of 0 and 1, not class indices.
        epochs: number of epochs.
    """
    torch.manual_seed(0)
    network = timm.create_model("test_convnext", pretrained=False, in_chans=1, num_classes=10)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    digits = data.load("digits", train_size=1_000)
    images, test_images = (
        nn.functional.interpolate(split.x.view(-1, 1, 8, 8), scale_factor=4)
        for split in (digits.train, digits.test)
    )
    labels, test_labels = digits.train.y.argmax(1), digits.test.y.argmax(1)
    targets = digits.train.y if dense else labels
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            loss(network(images[rows]), targets[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        right = network.eval()(test_images).argmax(1) == test_labels
    return network, right.float().mean().item()


def main() -> None:
    """Train with timm's losses and with their replacements, and compare."""
    for name, (theirs, ours) in LOSSES.items():
        dense = name == "AsymmetricLossMultiLabel"
        (network, accuracy), (twin, same) = train(ours, dense), train(theirs, dense)
        pairs = zip(network.parameters(), twin.parameters(), strict=True)
        difference = max((a - b).abs().max().item() for a, b in pairs)
        print(
            f"Test accuracy {accuracy:.1%} with nnce in place of timm's {name} ({same:.1%}); no "
            f"parameter differs by more than {difference:.0e}."
        )


if __name__ == "__main__":
    main()
