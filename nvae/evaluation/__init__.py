"""What `python -m nvae.evaluate` can do, one module per kind of mode."""
