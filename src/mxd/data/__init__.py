"""From a text specification to batches of MLP activations: `text`, then `tokens`, then `activations`."""
