"""Decompose the MLP layers of pretrained language models into sparse layers that can replace the originals."""
