"""A training loop around the core: `fit`, what it is fed with, checkpoints, processes, and watching it."""
