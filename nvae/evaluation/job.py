"""What every mode is given: the settings, the process, the model as it is to be used."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvae import runtime
from nvae.flags import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nvae.evaluation.blocks import Block
    from nvae.model import AutoEncoder


@dataclass(frozen=True)
class Job:
    """One run of the command."""

    settings: Settings
    here: runtime.Runtime
    folder: Path
    model: AutoEncoder
    args: dict[str, Any]  # the checkpoint's
    protocol: dict[str, Any]  # of the model: files, their sha256, batch norm, seed, version

    @property
    def batch_size(self) -> int:
        """The flag, or the batch size of the training."""
        return self.settings.batch_size or int(self.args.get("batch_size", 0)) or 100

    @property
    def prior(self) -> str:
        """What the samples come from: the key of their numbers in reports."""
        return "ebm" if self.settings.ebm_prior else "gaussian"

    @property
    def temperature(self) -> float:
        """Of the latents. Upstream's FID ignores its flag and draws at 1."""
        upstreams = self.settings.upstream_temp and self.settings.eval_mode == "evaluate_fid"
        return 1.0 if upstreams else self.settings.temp

    def draw(self, block: Block) -> Tensor:
        """A block of images (count, C, H, W) in [0, 1] on the CPU from the model's `sample`."""
        import torch

        from nvae.seeds import seeded

        generator = seeded(self.here.device, self.settings.seed, block.number)
        with torch.no_grad():
            logits = self.model.sample(block.count, self.temperature, generator=generator)
            return self.images(logits, generator)

    def images(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Images of the decoder's logits: its mean, or pixel samples.

        Raises:
            ValueError: NaN or infinite values, and what to do about them.
        """
        import torch

        from nvae.distributions import NormalDecoder

        output = self.model.decoder_output(logits)
        if self.settings.pixels == "mean" or self.model.config.data.output == "bernoulli":
            images = output.mean()
        else:
            # Upstream's Gaussian decoder knows no temperature.
            ignored = self.settings.upstream_temp and isinstance(output, NormalDecoder)
            images = output.sample(1.0 if ignored else self.settings.pixel_temp, generator)
        images = images.float().cpu()
        bad = (~torch.isfinite(images)).flatten(1).any(1)
        if bad.any():
            raise ValueError(
                f"{int(bad.sum())} of {len(images)} images hold NaN or infinite values; the stored"
                " batch-norm statistics do not fit these samples: try --readjust_bn, or a"
                " temperature nearer to 1"
            )
        return images

    def report(self, content: dict[str, Any]) -> None:
        """Write `report.json`: numbers, and under `protocol` how they came about."""
        protocol = {**self.protocol, **content.pop("protocol", {})}
        write_json(self.folder / "report.json", {**content, "protocol": protocol})


def write_json(path: Path, content: dict[str, Any]) -> None:
    with runtime.written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def provenance() -> dict[str, str | None]:
    """Package version, and the commit if this file is under version control."""
    try:
        version: str | None = importlib.metadata.version("nvae-ebm-prior")
    except importlib.metadata.PackageNotFoundError:
        version = None

    def git(*command: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *command],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
    return {"version": version, "commit": git("rev-parse", "HEAD") if tracked else None}
