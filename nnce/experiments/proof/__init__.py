"""Accuracy of nnce's rules, and compatibility of its functions with PyTorch features."""
