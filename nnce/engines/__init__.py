"""Fast engines of the revised algorithm, for one network or many: compiled loops, matrix products.

May import the notes' files and `kernels`.
"""

from nnce.engines.ensemble import Ensemble

__all__ = ["Ensemble"]
