"""Packaging of the distribution `nvae-ebm-prior`: the packages `nvae` and `ebm_prior`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """Read the version as text: importing the package would need what is yet to be installed."""
    text = (ROOT / "ebm_prior" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('ebm_prior/_version.py has no line __version__ = "..."')
    return found.group(1)


DEMO = ["scikit-learn"]  # the digits: its bundled scans, no download

setup(
    name="nvae-ebm-prior",
    version=version(),
    description="NVAE, and an energy-based diffusion prior on the latent space of its checkpoints",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the nvae-ebm-prior authors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=find_packages(include=["nvae", "nvae.*", "ebm_prior", "ebm_prior.*"]),
    package_data={"ebm_prior": ["assets/*"]},
    install_requires=[
        "torch>=2.10",  # older ones have holes in safe loading
        "numpy",
        "scipy",
        "lmdb",
        "pillow",
        "tensorboardX",
        "safetensors",
        "tqdm",
        "torchmetrics",
        "matplotlib",
    ],
    # NVIDIA's apex (fused optimisers) is optional and built from source by hand; it is no extra
    # because the package of that name on the usual index is something else.
    extras_require={
        "demo": DEMO,
        # Pinned once, here: the hooks and scripts run what this installs.
        "test": [
            *DEMO,
            "ruff==0.17.5",
            "mypy==2.4.1",
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "pre-commit==4.7.0",
        ],
    },
    entry_points={"console_scripts": ["ebm-prior = ebm_prior.__main__:main"]},
)
