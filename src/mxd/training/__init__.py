"""Training of sparse layers by distillation on a model's activations."""
