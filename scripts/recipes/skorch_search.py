"""skorch: scikit-learn's grid search over loss and learning rate on digits."""

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MinMaxScaler
from skorch import NeuralNetClassifier
from torch import Tensor, nn

import nnce


class OneHot(nn.Module):
    """nnce loss with class indices as targets, as scikit-learn passes them.

    Args:
        loss: "cross-entropy" or "quadratic".
    """

    def __init__(self, loss: nnce.losses.Loss = "cross-entropy") -> None:
        super().__init__()
        kinds = {
            "cross-entropy": nnce.SigmoidCrossEntropyLoss,
            "quadratic": nnce.SigmoidQuadraticLoss,
        }
        self.loss = kinds[loss]()

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss for logits [n, K] and class indices [n]."""
        return self.loss(z, nn.functional.one_hot(labels, z.shape[-1]).to(z.dtype))


def classifier(**options: Any) -> NeuralNetClassifier:
    """Classifier 64-30-10 whose predict_proba returns the activations σ(z).

    They do not sum to 1. Without predict_nonlinearity, predict_proba would return z.
    """
    return NeuralNetClassifier(
        nnce.MLP,
        module__sizes=(64, 30, 10),
        criterion=OneHot,
        predict_nonlinearity=nnce.sigmoid,
        optimizer=torch.optim.SGD,
        batch_size=10,
        max_epochs=5,
        iterator_train__shuffle=True,
        train_split=None,
        verbose=0,
        **options,
    )


GRID = [
    {"network__criterion__loss": ["cross-entropy"], "network__lr": [0.1, 0.5]},
    {"network__criterion__loss": ["quadratic"], "network__lr": [0.5, 3.0]},
]


def search(net: NeuralNetClassifier, folds: int = 3) -> tuple[GridSearchCV, float]:
    """Run the search; return it and the test accuracy of the best pipeline."""
    torch.manual_seed(0)
    x, labels = load_digits(return_X_y=True)
    x, x_test, labels, labels_test = train_test_split(x.astype("float32"), labels, random_state=0)
    pipeline = Pipeline([("pixels", MinMaxScaler()), ("network", net)])
    grid = GridSearchCV(pipeline, GRID, cv=folds, scoring="accuracy")
    grid.fit(x, labels)
    return grid, grid.score(x_test, labels_test)


def main() -> None:
    """Run the search and print the best loss and rate."""
    grid, accuracy = search(classifier())
    loss, lr = (grid.best_params_[f"network__{name}"] for name in ("criterion__loss", "lr"))
    print(
        f"Best of {len(grid.cv_results_['params'])} by cross-validation: {loss} with learning rate "
        f"{lr}; test accuracy {accuracy:.1%}."
    )


if __name__ == "__main__":
    main()
