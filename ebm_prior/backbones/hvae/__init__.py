"""The HVAE, a small hierarchical VAE of our own: network, adapter, file, training (Figure 8)."""
