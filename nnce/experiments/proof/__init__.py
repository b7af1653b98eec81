"""The proof: how precise nnce's rules are, and what PyTorch features its functions work with."""
