"""A database of what every latent does, and the page that shows it."""
