"""Multilinear mixtures of experts: CP and tensor-ring factorised, dense in the experts."""
