"""The job of `ebm_prior transitions`: run both kinds of chains, judge the long ones, report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ebm_prior import parallel, transitions
from ebm_prior.commands.shared.measure import Ruler
from ebm_prior.commands.shared.session import Job
from ebm_prior.commands.transitions import pictures
from ebm_prior.transitions import Frame, Row

WORDS = {True: "pass", False: "FAIL", None: "open"}


@dataclass
class Chains:
    """What is kept of the chains of one length."""

    name: str
    num_steps: int
    every: int
    u: Tensor  # (N, D), the final states
    rows: list[Row]
    shown: pictures.Shown


def trace_all(job: Job) -> None:
    """Both kinds of chains, their pictures, the verdict and the report."""
    args = job.args
    prior: Any = job.prior
    trained = prior.config.num_steps
    ruler = None if args.mode == "short" else ruler_of(job)  # told before hours of chains
    traced: dict[str, Chains] = {}
    if args.mode != "long":
        every = args.short_every or (5 if trained >= 20 else max(1, trained // 4))
        traced["short"] = chains(job, "short", trained, every)
    if args.mode != "short":
        traced["long"] = chains(job, "long", args.long_steps, args.long_every)
    content: dict[str, Any] = {}
    for name, run in traced.items():
        rows = [asdict(row) for row in run.rows]
        content[name] = {"num_steps": run.num_steps, "every": run.every, "rows": rows}
    protocol: dict[str, Any] = {
        "f": "mean log density ratio of each layer, top first",
        "u_square": "mean |u|^2 / d of each layer, top first",
        "gradient_norm": "mean norm of the conditional log density's gradient",
        "saturation": f"share of pixels below {transitions.DARK} or above {transitions.BRIGHT}",
        "decoder_noise": "the same for every state of a chain",
    }
    if "long" in traced:
        items = transitions.verdict(
            traced["long"].rows,
            None if ruler is None else distances(job, ruler, traced),
            below_gaussian=job.dataset == "digits",
        )
        content["no_oversaturation"] = {"passed": transitions.passed(items), **items}
        if ruler is not None:
            protocol["frechet"] = {"distance": ruler.title, **ruler.protocol}
    if job.here.is_main:
        for run in traced.values():
            title = f"{run.name} chains, mean of {args.num_samples}"
            pictures.strip(job.out / f"{run.name}.png", run.shown, run.num_steps, trained)
            pictures.curves(
                job.out / f"{run.name}_curves.png", run.rows, job.backbone.layout, title
            )
    job.report(content, protocol)
    if job.here.is_main:
        tell(content)


def chains(job: Job, name: str, num_steps: int, every: int) -> Chains:
    """Run and record all chains of one length; short and long ones start from the same noise."""
    args = job.args
    prior: Any = job.prior
    levels = range(prior.config.max_T)
    shown_at = {levels[-1], 0}
    blocks: dict[int, tuple[int, list[Row]]] = {}
    shown: pictures.Shown = {}

    def make(first: int, count: int) -> Tensor:
        rows: list[Row] = []

        def look(frame: Frame) -> None:
            noise = job.generator("decode", "transitions", first)
            images = prior.backbone.decode(frame.u, 1.0, noise).float()
            rows.append(transitions.row(frame, images))
            if first == 0 and frame.t in shown_at:
                shown[frame.t, frame.step] = images[: args.shown].cpu()

        blocks[first] = (count, rows)
        return transitions.trace(
            prior,
            count,
            generator=job.generator("transitions", first),
            num_steps=num_steps,
            every=every,
            levels=levels,
            look=look,
        )

    u = job.blocks(args.num_samples, f"{name} chains", make)
    every_block = [block for part in parallel.collect(blocks) for block in part.values()]
    frames = zip(*(rows for _, rows in every_block), strict=True)
    counts = [count for count, _ in every_block]
    rows = [transitions.pooled(list(zip(counts, parts, strict=True))) for parts in frames]
    return Chains(name, num_steps, every, u, rows, shown)


def ruler_of(job: Job) -> Ruler | None:
    """What to measure with; None without data."""
    args = job.args
    if job.dataset != "digits" and args.data is None and args.fid_dir is None:
        return None
    return Ruler.of(job, inception=args.inception, features=args.features, fid_dir=args.fid_dir)


def distances(job: Job, ruler: Ruler, traced: dict[str, Chains]) -> dict[str, float]:
    """Fréchet distances of the Gaussian prior and after chains of the trained and long length."""
    num = job.args.num_samples
    short = traced["short"].u if "short" in traced else job.sample_u(num, "transitions")
    found = {"gaussian": job.gaussian_u(num), "short": short, "long": traced["long"].u}
    return {name: ruler.distance(job.decode(u, 1.0, "transitions")) for name, u in found.items()}


def tell(content: dict[str, Any]) -> None:
    """The verdict in a few lines."""
    verdict = content.get("no_oversaturation")
    if verdict is None:
        print(f"recorded {len(content['short']['rows'])} states of short chains")
        return
    for name, item in verdict.items():
        if name == "passed":
            continue
        found = {k: v for k, v in item.items() if k not in ("passed", "required")}
        told = ", ".join(f"{k} {_short(v)}" for k, v in found.items()) or "not measured"
        print(f"{WORDS[item['passed']]}  {name}: {told} (required: {item['required']})")
    steps, word = content["long"]["num_steps"], WORDS[verdict["passed"]]
    print(f"{word}  no oversaturation after {steps} steps per t")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"t = {k}: {v:+.3f}" for k, v in value.items()) or "not measured"
    return f"{value:.3f}"
