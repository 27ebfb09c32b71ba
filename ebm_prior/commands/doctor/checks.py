"""What the doctor looks at: the machine, a VAE's file, a prior's, a folder of images."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from ebm_prior.steps import Steps
from ebm_prior.training import apex

if TYPE_CHECKING:
    from torch import Tensor

    from ebm_prior.backbones.files import Opened

OK, WARNING, PROBLEM = "ok", "warning", "PROBLEM"
MiB = 2**20
PACKAGES = {  # distribution -> what misses it
    "safetensors": "priors",
    "matplotlib": "figures",
    "lmdb": "64 and 256 pixel data sets",
    "pillow": "pictures",
    "tensorboardX": "training curves",
    "torchmetrics": "FID, KID and IS",
    "tqdm": "progress bars",
    "scikit-learn": "the digits of the demo",
}


class Check(NamedTuple):
    """One line of the table."""

    verdict: str
    subject: str
    text: str


Checks = Iterator[Check]


def machine() -> Checks:
    """Python, PyTorch, the device, and the packages that some commands need."""
    import torch

    python = platform.python_version()
    new = sys.version_info >= (3, 10)
    yield Check(OK if new else PROBLEM, "python", python + ("" if new else ": use 3.10 or newer"))
    number = tuple(int(part) for part in torch.__version__.split(".")[:2])
    text = (
        torch.__version__
        if number >= (2, 10)
        else (f"{torch.__version__}: older than 2.10, whose safe loading has holes; update it")
    )
    yield Check(OK if number >= (2, 10) else PROBLEM, "torch", text)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            size = properties.total_memory / 2**30
            yield Check(OK, f"cuda:{i}", f"{properties.name}, {size:.0f} GiB")
    elif torch.version.cuda:
        text = f"PyTorch is built for CUDA {torch.version.cuda} but sees no device: a driver?"
        yield Check(WARNING, "cuda", text)
    else:
        text = f"none, this PyTorch is for the CPU; {torch.get_num_threads()} threads"
        yield Check(OK, "cuda", text)
    reason = apex.why_not()
    text = f"not needed; {reason}" if reason else "fit for `ebm_prior train --optimizer apex_adam`"
    yield Check(OK, "apex", text)
    for name, purpose in PACKAGES.items():
        try:
            yield Check(OK, name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(WARNING, name, f"not installed; needed for {purpose}: pip install {name}")


def of_checkpoint(backbone: Opened) -> Checks:
    """The file, its BatchNorm statistics, its latents, one sample and the memory of a chain."""
    import torch

    model = backbone.model
    kind = type(backbone).__name__.removesuffix("Backbone")
    count = sum(p.numel() for p in model.parameters())
    yield Check(
        OK,
        "checkpoint",
        f"{kind} of {backbone.config.dataset},"
        f" {count:,} parameters ({4 * count / MiB:.0f} MiB), all finite",
    )
    yield Check(OK, "fingerprint", backbone.fingerprint())
    yield _batch_norm(dict(model.named_buffers()))
    shapes = backbone.layout.shapes
    first = 0
    for shape, same in groupby(shapes):
        last = first + len(list(same)) - 1
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        yield Check(OK, "latents", f"{layers}: {' x '.join(map(str, shape))}")
        first = last + 1
    yield Check(OK, "latents", f"{len(shapes)} layers, {backbone.layout.dim:,} coordinates")

    generator = torch.Generator().manual_seed(0)
    u = torch.randn(2, backbone.layout.dim, generator=generator).to(backbone.device)
    start = time.perf_counter()
    images = backbone.decode(u[:1], generator=generator).cpu()  # waits for the device
    seconds = time.perf_counter() - start
    yield _sample("gaussian sample", images, f"; {seconds:.2f} s on {backbone.device}")
    one, two = (_kept(backbone, u[:batch]) for batch in (1, 2))
    text = f"a Langevin step keeps {_mib(two - one)} of the VAE per sample on the plain path"
    folded = getattr(backbone, "folded", None)
    if folded is not None:
        kept = (folded(Steps(recompute=again)).walk().kept(u[:1]) for again in (False, True))
        text += ", {} on the fast one, {} with --recompute".format(*map(_mib, kept))
    yield Check(OK, "memory", f"{text}; the energies apart")


def _mib(size: int) -> str:
    return f"{size / MiB:.3g} MiB"


def of_prior(path: str, backbone: Opened | None) -> Checks:
    """The file, whether it belongs to the backbone, and one sample of a short chain."""
    from ebm_prior import checkpoint

    file = checkpoint.read(path)
    config = file.config
    count = sum(value.numel() for value in file.learned.values())
    what = f"{config.kind}, {count:,} values, all finite"
    if config.kind != "fitted":
        what += f"; {config.network} networks of width {config.width}"
    if config.kind in ("diffusion", "joint"):
        what += f"; max_T {config.max_T}, {config.num_steps} steps, b2 {config.b2:g}"
    yield Check(
        OK,
        "prior",
        f"{what}; preset {config.preset}; training step {file.step}, written by version"
        f" {file.version}",
    )
    if file.bn_statistics:
        yield _batch_norm(file.bn_statistics)
    if backbone is None:
        yield Check(OK, "backbone", f"{file.fingerprint}; --checkpoint compares it")
        return
    prior = checkpoint.load(path, backbone)
    yield Check(OK, "backbone", "the prior was trained on this checkpoint")

    from ebm_prior.prior import EBMPrior
    from ebm_prior.seeds import seeded

    generator = seeded(prior.device, 0)
    if isinstance(prior, EBMPrior):
        u = prior.sample_u(1, generator=generator, num_steps=1)
        more = f" after {config.max_T} Langevin steps"
    else:
        u, more = prior.sample_u(1, generator=generator), ""
    yield _sample("ebm sample", prior.backbone.decode(u, generator=generator), more)


def of_data(folder: str | None, name: str | None, backbone: Opened | None) -> Checks:
    """Whether the folder can be read, and fits the model."""
    from nvae import data

    config = None if backbone is None else backbone.config
    name = name or (config.dataset if config else "folder")
    if name == "folder" and config is None:
        yield Check(PROBLEM, "data", "a folder of images is fitted to a model: give --checkpoint")
        return
    for half in ("train", "validation"):
        try:
            images = data.load(name, folder, half == "train", config=config)
            first = images[0]
        except ValueError as error:
            yield Check(PROBLEM if half == "train" else WARNING, f"data, {half}", str(error))
            continue
        low, high = float(first.min()), float(first.max())
        text = f"{name}, {len(images):,} images of {' x '.join(map(str, first.shape))}"
        inside = low >= 0 and high <= 1
        yield Check(
            OK if inside else PROBLEM,
            f"data, {half}",
            text if inside else f"{text} with values {low:g} to {high:g}, expected 0 to 1",
        )


def _batch_norm(buffers: dict[str, Tensor]) -> Check:
    """Running variances positive, means finite, and every layer trained."""
    variances = {k: v for k, v in buffers.items() if k.endswith("running_var")}
    bad = [k for k, v in buffers.items() if not v.isfinite().all()]
    bad += [k for k, v in variances.items() if (v < 0).any()]
    idle = [k for k, v in buffers.items() if k.endswith("num_batches_tracked") and v == 0]
    idle += [k for k, v in variances.items() if (v == 0).any()]
    if bad:
        text = f"{len(bad)} statistics are infinite or negative (first: {bad[0]}); sample"
        return Check(PROBLEM, "batch norm", text + " with --readjust_bn, or get the file again")
    if idle:
        text = f"{len(idle)} layers never saw a batch or have variance 0 (first: {idle[0]})"
        return Check(WARNING, "batch norm", text + "; sample with --readjust_bn")
    if not variances:
        return Check(OK, "batch norm", "none")
    low = min(float(value.min()) for value in variances.values())
    high = max(float(value.max()) for value in variances.values())
    return Check(OK, "batch norm", f"{len(variances)} layers, variances {low:.2g} to {high:.2g}")


def _sample(subject: str, images: Tensor, more: str) -> Check:
    """Finite, in [0, 1]."""
    if not images.isfinite().all():
        text = "holds NaN or infinite values: the BatchNorm statistics or the weights are at fault"
        return Check(PROBLEM, subject, text + "; sample with --readjust_bn")
    low, high = float(images.min()), float(images.max())
    flat = low == high
    text = f"finite, {low:.2f} to {high:.2f}{more}"
    return Check(WARNING if flat else OK, subject, text + (": one flat colour" if flat else ""))


def _kept(backbone: Opened, u: Tensor) -> int:
    """Bytes that autograd keeps of the map u -> z for its backward pass, the weights apart."""
    import torch

    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z = backbone.to_z(u.requires_grad_())
    del z  # alive until here, so that no address was used twice
    return sum(storages.values())


def guarded(subject: str, checks: Callable[[], Checks]) -> Checks:
    """What the code refuses is a line of the table."""
    try:
        yield from checks()
    except (ValueError, OSError, RuntimeError) as error:
        yield Check(PROBLEM, subject, " ".join(str(error).split()))


def shown(checks: Checks) -> Checks:
    """Print each check as soon as it is known."""
    for check in checks:
        print(f"{check.verdict:<9}{check.subject:<17}{check.text}", flush=True)
        yield check
