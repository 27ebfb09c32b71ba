"""The smallest NVAE that the tests of several files build on, by `dataclasses.replace`."""

from nvae.arch import ModelConfig

SMALL = ModelConfig(
    dataset="digits",
    num_groups_per_scale=2,
    num_latent_per_group=2,
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_blocks=1,
    num_postprocess_blocks=1,
    num_preprocess_cells=1,
    num_postprocess_cells=1,
    num_mixture_dec=2,
)
