"""Generating with latents set, scaled or switched off, and scoring what comes out."""
