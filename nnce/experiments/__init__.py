"""Building blocks of the scripts. Needs `nnce[scripts]`, unlike the rest of nnce.

May import everything; nothing outside this package may import it.
"""
