"""The command from files to files."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from ebm_prior import control as steering
from ebm_prior.commands.control.judge import Judge, deviation, share
from ebm_prior.commands.shared import figures, session
from ebm_prior.prior import EBMPrior
from nvae import images

KEY = "control"  # all modes share their random numbers, block by block
SHOWN = 10  # samples of a class in a picture
COMPOSED = 8  # samples of a composition


class Control:
    """One run: what all modes need.

    Args:
        words: NAME, CLASS of the command line.
    """

    def __init__(self, job: session.Job, prior: EBMPrior, words: list[tuple[str, str]]) -> None:
        self.job, self.prior, self.args = job, prior, job.args
        attributes = prior.config.attributes
        for name, _ in words:
            steering.attribute_number(prior, name)
        found, labels = job.labelled(True, [attribute.name for attribute in attributes])
        for attribute, each in zip(attributes, labels, strict=True):
            if len(each.classes) != attribute.classes:
                raise ValueError(
                    f"attribute {each.name!r} has {len(each.classes)} classes in the data and"
                    f" {attribute.classes} in the prior; give the data and --labels it was trained"
                    " with"
                )
        self.labels = {each.name: each for each in labels}
        self.asked = [(name, self.labels[name].number(text)) for name, text in words]
        if job.args.compose:
            steering.in_order(prior, self.asked)
        self.judge = Judge.trained(job, prior, found, labels)
        self.num: int = job.args.num_samples

    def words(self, asked: list[tuple[str, int]], between: str = ", ") -> str:
        """What is asked for, with the classes' names."""
        every = [f"{name}={self.labels[name].classes[value]}" for name, value in asked]
        return between.join(every) or "no label"

    def pictures(self, u: Tensor) -> Tensor:
        """Images of u, the same pixel noise for all."""
        return self.job.decode(u, self.args.temperature, KEY)

    def sample(self, asked: list[tuple[str, int]]) -> Tensor:
        """Images with these attributes; without any from the prior as it is."""
        row = torch.full((1, len(self.prior.config.attributes)), -1)
        for name, value in asked:
            row[0, steering.attribute_number(self.prior, name)] = value

        def make(first: int, count: int) -> Tensor:
            return steering.sample_classes(
                self.prior,
                row.expand(count, -1).to(self.job.here.device),
                generator=self.job.generator(KEY, first),
                guidance=self.args.guidance,
                label_steps=self.args.label_steps,
            )

        return self.pictures(self.job.blocks(self.num, self.words(asked), make))

    def composed(self) -> tuple[list[Tensor], list[Tensor]]:
        """u_0 and images of every stage."""

        def make(first: int, count: int) -> Tensor:
            generator = self.job.generator(KEY, first)
            stages = steering.compose(
                self.prior,
                count,
                self.asked,
                generator=generator,
                guidance=self.args.guidance,
                label_steps=self.args.label_steps,
            )
            return torch.stack([stage.u for stage in stages], dim=1)

        u = list(self.job.blocks(self.num, "composing", make).unbind(1))
        return u, [self.pictures(each) for each in u]

    def classes(self, name: str, free: Tensor, gaussian: Tensor) -> dict[str, Any]:
        """Every class of an attribute: pictures, confusion, numbers."""
        judge, labels = self.judge, self.labels[name]
        every = [self.sample([(name, value)]) for value in range(len(labels.classes))]
        asked = torch.arange(len(every)).repeat_interleave(self.num)
        counts = steering.confusion(asked, judge.see(name, torch.cat(every)), len(every))
        agreement = steering.agreement(counts)
        real = judge.spread[name]
        spread = [_ratio(deviation(x), of) for x, of in zip(every, real, strict=True)]
        if self.job.here.is_main:
            shown = [x[:SHOWN] for x in (*every, free)]
            images.save_grid(
                self.job.out / f"{name}.png",
                torch.cat(shown),
                columns=len(shown[0]),
                row_labels=[*(f"{name} {word}" for word in labels.classes), "no label"],
                caption=f"Asked for {name}: {agreement:.0%} obey; a column shares its noise",
            )
            figures.heatmap(
                self.job.out / f"confusion_{name}.png",
                100 * counts / self.num,
                labels.classes,
                labels.classes,
                title=f"Samples of each {name}, as a pixel classifier sees them (%)",
                ylabel="asked for",
                xlabel="seen",
            )
        return {
            "agreement": agreement,
            "per_class": [round(hits / self.num, 4) for hits in counts.diagonal().tolist()],
            "chance": round(1 / len(every), 4),
            "shares_without_label": judge.shares(name, free),
            "shares_gaussian_prior": judge.shares(name, gaussian),
            "spread_against_real": spread,
            "confusion": counts.tolist(),
            "classes": list(labels.classes),
        }

    def together(self, free: Tensor, gaussian: Tensor) -> dict[str, Any]:
        """`--set`: all attributes at once."""
        found = self.sample(self.asked)
        numbers = {
            "samples": self._obeyed(found),
            "without_label": self._obeyed(free),
            "gaussian_prior": self._obeyed(gaussian),
        }
        if self.job.here.is_main:
            shown = [x[:SHOWN] for x in (found, free)]
            images.save_grid(
                self.job.out / "set.png",
                torch.cat(shown),
                columns=len(shown[0]),
                row_labels=[self.words(self.asked, "\n"), "no label"],
                caption=f"{numbers['samples']['all']:.0%} obey; a column shares its noise",
            )
        return numbers

    def one_by_one(self, free: Tensor, gaussian: Tensor) -> dict[str, Any]:
        """`--compose`: one attribute after the other."""
        u, every = self.composed()
        layout, attributes = self.prior.layout, self.prior.config.attributes
        numbers: list[dict[str, Any]] = []
        for number, (name, value) in enumerate(self.asked):
            word = self.labels[name].classes[value]
            entry: dict[str, Any] = {"attribute": name, "class": word}
            entry |= self._obeyed(every[number])
            if number:
                before, now = u[number - 1 : number + 1]
                above = steering.attribute_number(self.prior, self.asked[number - 1][0])
                lowest = max(attributes[above].layers)
                held = layout.mask(range(lowest + 1))
                entry["held_layers"] = list(range(lowest + 1))
                entry["held_bit_identical"] = torch.equal(before[:, held], now[:, held])
                entry["survived"] = {
                    earlier: steering.survival(
                        self.judge.see(earlier, every[stage]),
                        self.judge.see(earlier, every[number]),
                        wanted,
                    )
                    for stage, (earlier, wanted) in enumerate(self.asked[:number])
                }
            numbers.append(entry)
        if self.job.here.is_main:
            columns = [free, *every]
            steps = [("+ " if i else "") + self.words([one]) for i, one in enumerate(self.asked)]
            images.save_grid(
                self.job.out / "compose.png",
                torch.stack([x[:COMPOSED] for x in columns], dim=1).flatten(0, 1),
                columns=len(columns),
                column_labels=[text.replace("=", "\n= ") for text in ("no label", *steps)],
                caption="One attribute after the other:\neach holds the layers above it",
            )
        return {
            "stages": numbers,
            "without_label": self._obeyed(free),
            "gaussian_prior": self._obeyed(gaussian),
        }

    def _obeyed(self, x: Tensor) -> dict[str, Any]:
        """The share of images that show each attribute asked for, and all of them."""
        hits = {name: self.judge.see(name, x) == value for name, value in self.asked}
        shares = {name: share(hit) for name, hit in hits.items()}
        together = torch.stack(list(hits.values())).all(0)
        return {"agreement": shares, "all": share(together)}


def control(args: argparse.Namespace, words: list[tuple[str, str]]) -> None:
    """Sample as asked, and write pictures, figures and the report.

    Args:
        words: NAME, CLASS of `--set` or `--compose`.
    """
    with session.opened(args) as job:
        prior = steering.steerable(job.prior)
        label_steps = prior.label_steps(args.label_steps)
        run = Control(job, prior, words)
        free = run.sample([])
        gaussian = run.pictures(job.gaussian_u(run.num, KEY))
        content: dict[str, Any] = {"classifiers": run.judge.report}
        if args.compose:
            content["compose"] = run.one_by_one(free, gaussian)
        elif args.set:
            content["set"] = run.together(free, gaussian)
        else:
            names = [attribute.name for attribute in prior.config.attributes]
            content["classes"] = {name: run.classes(name, free, gaussian) for name in names}
        protocol = {
            "samples": run.num,
            "attributes": prior.config.to_dict()["attributes"],
            "label_steps": label_steps,
            "label_steps_at_least": steering.label_steps_for(prior.schedule),
            "guidance": args.guidance,
            "agreement": "share that a classifier of pixels, trained on the labelled training"
            " images, sees as asked for",
            "spread_against_real": "root of the summed pixel variance within a class, samples"
            " over held-out images; below 1: less varied",
        }
        job.report(content, protocol)
        if job.here.is_main:
            print(told(content, protocol))
            print(f"Report and pictures are in {job.out}")


def told(content: dict[str, Any], protocol: dict[str, Any]) -> str:
    """The report in a few lines."""
    lines = [
        f"Labels act at t < {protocol['label_steps']} (this schedule needs at"
        f" least {protocol['label_steps_at_least']}), guidance {protocol['guidance']:g}"
    ]
    for name, judged in content["classifiers"].items():
        lines.append(
            f"{name}: a classifier of pixels is right on {judged['pixel_classifier']:.1%} of"
            f" {judged['held_out_images']} held-out images, the prior's own on"
            f" {judged['latent_classifier']:.1%} of their latents"
        )
    for name, found in content.get("classes", {}).items():
        chance = f"{found['chance']:.1%}"
        lines.append(f"{name}: {found['agreement']:.1%} of samples obey; chance {chance}")
    if "set" in content:
        found = content["set"]
        lines.append(
            f"{found['samples']['all']:.1%} of samples obey; {found['without_label']['all']:.1%}"
            f" without label, {found['gaussian_prior']['all']:.1%} from the Gaussian prior"
        )
    if "compose" in content:
        free = content["compose"]["without_label"]["agreement"]
        lines.append(f"without label: {_shares(free)}")
        for stage in content["compose"]["stages"]:
            text = f"asked for {stage['attribute']}: {_shares(stage['agreement'])}"
            for name, share in stage.get("survived", {}).items():
                text += f"; {name} survived in {'none' if share is None else f'{share:.0%}'}"
            lines.append(text)
    return "\n".join(lines)


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def _ratio(value: float | None, reference: float | None) -> float | None:
    return round(value / reference, 3) if value is not None and reference else None
