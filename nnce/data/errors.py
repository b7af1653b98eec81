"""The error raised when data cannot be read."""


class DataError(ValueError):
    """Data cannot be loaded, or do not meet the requirements.

    >>> nnce.data.check(torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0]]))
    Traceback (most recent call last):
    nnce.data.errors.DataError: expected inputs x in [0, 1], got 2.0 at [0, 1]
    """
