"""Models whose MLPs are multilinear mixtures: put in by one call, trained from scratch, saved and loaded."""
