"""timm: nnce's cross-entropy in place of `BinaryCrossEntropy`, in a tiny ResNet on digits."""

import timm
import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

import nnce
from nnce import data


class FromIndices(nn.Module):
    """nnce's loss with `BinaryCrossEntropy`'s meaning of smoothing and target_threshold.

    timm smooths class indices by s to s/K + (1−s) at the class and s/K elsewhere, for K classes:
    targets of a one-hot softmax. nnce's label_smoothing takes each component for a decision of its
    own and moves it to s/2 or 1 − s/2, which is what timm calls smooth_dense. So smooth first.
    """

    def __init__(self, smoothing: float = 0.1, target_threshold: float | None = None) -> None:
        super().__init__()
        self.smoothing, self.target_threshold = smoothing, target_threshold
        self.loss = nnce.BCEWithLogitsLoss()  # sum_classes=True: SigmoidCrossEntropyLoss()

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """The mean over examples and classes, for class indices [n] or targets [n, K]."""
        if target.shape != z.shape:
            one_hot = nn.functional.one_hot(target.long(), z.shape[-1]).to(z.dtype)
            target = (1 - self.smoothing) * one_hot + self.smoothing / z.shape[-1]
        if self.target_threshold is not None:
            target = target > self.target_threshold  # nnce takes booleans
        return self.loss(z, target)


# Each of timm's losses, and what takes its place.
LOSSES = {"BinaryCrossEntropy": (BinaryCrossEntropy(), FromIndices())}


def train(loss: nn.Module, epochs: int = 3) -> tuple[nn.Module, float]:
    """A network trained on 1,000 digits of 32 × 32 pixels, and its accuracy on others."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False, in_chans=1, num_classes=10)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    digits = data.load("digits", train_size=1_000)
    (x, y), (x_test, y_test) = digits.train, digits.test
    images, test_images = (
        nn.functional.interpolate(pixels.view(-1, 1, 8, 8), scale_factor=4)
        for pixels in (x, x_test)
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            loss(network(images[rows]), y[rows].argmax(1)).backward()
            optimizer.step()
    with torch.no_grad():
        right = network.eval()(test_images).argmax(1) == y_test.argmax(1)
    return network, right.float().mean().item()


if __name__ == "__main__":
    for name, (theirs, ours) in LOSSES.items():
        accuracies = train(theirs)[1], train(ours)[1]
        print(
            f"Test accuracy after 3 epochs: {accuracies[0]:.1%} with timm's {name}, "
            f"{accuracies[1]:.1%} with nnce's loss and the same smoothed targets."
        )
