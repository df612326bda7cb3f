"""What latents know: sample-level and token-level probes of sparse codes."""
