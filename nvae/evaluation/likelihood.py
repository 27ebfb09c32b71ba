"""Mode `evaluate`: the ELBO and the importance-weighted bound of a data set."""

from __future__ import annotations

from nvae import likelihood
from nvae.evaluation import source
from nvae.evaluation.job import Job


def run(job: Job) -> None:
    """Print upstream's four lines and write `report.json`."""
    settings = job.settings
    images = source.load(settings.data, job.model.config, train=settings.eval_on_train)
    found = likelihood.importance_weighted(
        job.model,
        images,
        settings.num_iw_samples,
        batch_size=job.batch_size,
        seed=settings.seed,
        progress=job.here.is_main,
    )
    if not job.here.is_main:
        return
    print(f"final valid nelbo {found.nelbo:f}")
    print(f"final valid neg log p {found.neg_log_p:f}")
    print(f"final valid nelbo in bpd {found.nelbo_bpd:f}")
    print(f"final valid neg log p in bpd {found.neg_log_p_bpd:f}")
    protocol = {
        "images": images.name,
        "num_images": found.images,
        "num_iw_samples": settings.num_iw_samples,
        "batch_size": job.batch_size,
    }
    numbers = {k: v for k, v in found._asdict().items() if k != "images"}
    job.report({**numbers, "protocol": protocol})
