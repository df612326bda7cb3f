"""Language and image models that are trained with multilinear mixtures of experts in place of their MLPs."""
