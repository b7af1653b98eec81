"""open_clip: `pair_sigmoid_cross_entropy` in place of `SigLipLoss`, in a tiny CLIP."""

import open_clip
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor, nn

import nnce
from nnce.experiments import timing


class PairLoss(nn.Module):
    """Replacement for `open_clip.loss.SigLipLoss` with memory linear in the number of images.

    For several processes, see `group` of `nnce.pair_sigmoid_cross_entropy`.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss summed over all image-text pairs, divided by the number of images."""
        C = nnce.pair_sigmoid_cross_entropy(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": C} if output_dict else C


def gradients(loss: nn.Module, n: int = 32) -> dict[str, Tensor]:
    """Compute value and gradients of the loss of a tiny CLIP on random images and texts."""
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"layers": 1, "width": 32, "heads": 2, "context_length": 8, "vocab_size": 100}
    clip = open_clip.CLIP(16, vision, text, init_logit_bias=-10.0, output_dict=True)
    images, texts = torch.rand(n, 3, 16, 16), torch.randint(100, (n, 8))
    C = loss(**clip(images, texts), output_dict=True)["contrastive_loss"]
    C.backward()
    return {"value": C.detach(), **{name: p.grad for name, p in clip.named_parameters()}}


def peak(loss: nn.Module, n: int = 8_000) -> float:
    """Peak memory in MB of forward and backward with n images and n texts (Linux only)."""
    x, y = (nn.functional.normalize(torch.randn(n, 256)).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (10.0, -10.0))
    loss(x[:2_000], y[:2_000], scale, bias).backward()  # load and compile first
    _, more = timing.peak_memory(lambda: loss(x, y, scale, bias).backward(), torch.device("cpu"))
    return more / 1e6


def main() -> None:
    """Compare values, gradients and peak memory."""
    ours, theirs = PairLoss(), SigLipLoss()
    found, expected = gradients(ours), gradients(theirs)
    difference = max(((found[k] - C).norm() / C.norm()).item() for k, C in expected.items())
    print(f"Value and gradients of a tiny CLIP agree to {difference:.0e} in relative norm.")
    print(
        f"Peak memory with 8,000 images: {peak(ours):,.0f} MB with nnce, {peak(theirs):,.0f} MB "
        f"with SigLipLoss."
    )


if __name__ == "__main__":
    main()
