"""Building blocks of the scripts; requires `nnce[scripts]`, unlike the rest of nnce.

This package may import every other package of nnce; none of them may import it.
"""
