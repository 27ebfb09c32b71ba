"""Training an NVAE, one idea per file; the command is `nvae.train`."""
