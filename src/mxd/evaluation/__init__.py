"""What a sparse layer changed in its model, measured and shown."""
