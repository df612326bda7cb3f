"""Test-time privacy: certified uncertainty on protected instances."""
