"""Lightning: training on digits with checkpoints, resuming and `nnce.watch`."""

import logging
import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import nnce
from nnce import data


class Watch(Callback):
    """Callback that logs the curves of `nnce.watch` for the sigmoid layers."""

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Attach the watcher at the current step, so that a resumed run continues its curves."""
        self.watcher = nnce.watch(module.network, trainer.logger.experiment, every=50)
        self.watcher.step = trainer.global_step

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Detach the watcher."""
        self.watcher.remove()


class Digits(lightning.LightningModule):
    """A network 64-30-10 of sigmoid neurons."""

    def __init__(self, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.network = nnce.MLP((64, 30, 10), generator=torch.Generator().manual_seed(0))
        self.loss = nnce.SigmoidCrossEntropyLoss() if loss is None else loss
        self.digits = data.load("digits")

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Training mini-batches, in an order that depends only on the epoch.

        shuffle=True would use PyTorch's global generator, which is not part of checkpoints.
        """
        digits = TensorDataset(*self.digits.train)
        return DataLoader(digits, 10, sampler=DistributedSampler(digits, num_replicas=1, rank=0))

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All validation digits in one batch."""
        return DataLoader(TensorDataset(*self.digits.validation), 1_000)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Loss C of one mini-batch."""
        x, y = batch
        return self.loss(self.network(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log the classification accuracy."""
        x, y = batch
        self.log("accuracy", (self.network(x).argmax(1) == y.argmax(1)).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum; its state is part of the checkpoint."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


def train(
    folder: Path, epochs: int, module: Digits, checkpoint: str | None = None
) -> lightning.Trainer:
    """Train up to `epochs` epochs, from the start or from a checkpoint."""
    trainer = lightning.Trainer(
        max_epochs=epochs,
        logger=TensorBoardLogger(folder, name=None, version=""),
        callbacks=[ModelCheckpoint(folder, save_last=True), Watch()],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=checkpoint)
    return trainer


def main() -> None:
    """Train 6 epochs without and with an interruption after 3, and compare."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uninterrupted, resumed = Digits(), Digits()
        trainer = train(folder / "uninterrupted", 6, uninterrupted)
        train(folder / "resumed", 3, Digits())
        train(folder / "resumed", 6, resumed, str(folder / "resumed" / "last.ckpt"))
    pairs = zip(uninterrupted.parameters(), resumed.parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    print(
        f"Validation accuracy {trainer.callback_metrics['accuracy']:.1%} after 6 epochs; resumed "
        f"after 3, the parameters are {'bit-identical' if same else 'different'}."
    )


if __name__ == "__main__":
    main()
