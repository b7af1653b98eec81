"""What the scripts are made of; needs `nnce[scripts]`, which the rest of nnce does not."""
