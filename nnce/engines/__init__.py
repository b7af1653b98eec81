"""The revised algorithm at speed, for one network or many: compiled loops, or matrix products.

May import the notes' files and `kernels`.
"""

from nnce.engines.ensemble import Ensemble

__all__ = ["Ensemble"]
