"""The revised algorithm at speed, for one network or many: compiled loops, or matrix products."""
