"""The error of everything that reads data."""


class DataError(ValueError):
    """The data asked for cannot be had, or are not what they should be."""
