"""What defines a model: cell recipes, data sets, the checked configuration. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

# Inverted residuals: name -> (expansion, kernel size, groups; 0 = depthwise).
INVERTED_RESIDUALS: dict[str, tuple[int, int, int]] = {
    "mconv_e6k5g0": (6, 5, 0),
    "mconv_e3k5g0": (3, 5, 0),
    "mconv_e3k5g8": (3, 5, 8),
    "mconv_e6k11g0": (6, 11, 0),
}
# Normalise, activate, 3x3 convolution: name -> dilation of the kernel.
RESIDUALS: dict[str, int] = {"res_elu": 1, "res_bnelu": 1, "res_bnswish": 1, "res_bnswish5": 2}


def _cells(
    enc: list[str],
    dec: list[str] | None = None,
    pre: list[str] | None = None,
    post: list[str] | None = None,
) -> dict[str, list[str]]:
    columns = {
        ("normal_enc", "down_enc"): enc,
        ("normal_dec", "up_dec"): dec or enc,
        ("normal_pre", "down_pre"): pre or enc,
        ("normal_post", "up_post"): post or dec or enc,
    }
    cells = {kind: list(ops) for pair, ops in columns.items() for kind in pair}
    return {**cells, "ar_nn": [""]}  # `ar_nn` is written to files and otherwise ignored


_E6, _E3 = ["mconv_e6k5g0"], ["mconv_e3k5g0"]
_BN, _BN5 = "res_bnswish", "res_bnswish5"

#: Architecture name -> cell type -> primitives, first to last.
ARCHITECTURES: dict[str, dict[str, list[str]]] = {
    "res_elu": _cells(["res_elu"] * 2),
    "res_bnelu": _cells(["res_bnelu"] * 2),
    "res_bnswish": _cells([_BN] * 2),
    "mbconv_sep": _cells(_E6, _E6, _E3, _E3),
    "mbconv_sep11": _cells(["mconv_e6k11g0"], ["mconv_e6k11g0"], _E3, _E3),
    "res_mbconv": _cells([_BN] * 2, _E6, [_BN] * 2, _E3),
    "res53_mbconv": _cells([_BN5, _BN], _E6, [_BN5, _BN], _E3),
    "res35_mbconv": _cells([_BN, _BN5], _E6, [_BN, _BN5], _E3),
    "res55_mbconv": _cells([_BN5] * 2, _E6, [_BN5] * 2, _E3),
    # Upstream names its primitives and defines them nowhere; `ModelConfig` says so.
    "res_mbconv9": _cells([_BN] * 2, ["mconv_e6k9g0"], [_BN] * 2, ["mconv_e3k9g0"]),
    "mbconv_res": _cells(_E6, [_BN] * 2, _E3, [_BN] * 2),
    "mbconv_den": _cells(_E6, _E6, ["mconv_e3k5g8"], ["mconv_e3k5g8"]),
}


@dataclass(frozen=True)
class DataSet:
    """What a model must know about its data.

    `output` is the decoder's distribution: `bernoulli`, `color` (mixture of logistics, or Gaussian
    if `num_mixture_dec` is 1) or `grey` (our one-channel mixture of logistics). `levels` is the
    number of grey values of a byte image (`grey`: of the data itself); `border` pixels on each
    side are padding and do not count in the likelihood.
    """

    image_size: int
    channels: int = 3
    output: str = "color"
    levels: int = 256
    border: int = 0

    @property
    def num_output(self) -> int:
        """Number of values an image has: the divisor of bits per dimension."""
        return self.channels * (self.image_size - 2 * self.border) ** 2


#: Upstream's names, and `digits`: scikit-learn's 8x8 scans, a set of our own.
DATA_SETS: dict[str, DataSet] = {
    "mnist": DataSet(32, channels=1, output="bernoulli", levels=2, border=2),
    "omniglot": DataSet(32, channels=1, output="bernoulli", levels=2, border=2),
    # Upstream names it and leaves its size undefined; this is what was meant (contract 9.2).
    "stacked_mnist": DataSet(32, border=2),
    "cifar10": DataSet(32),
    "celeba_64": DataSet(64),
    "celeba_256": DataSet(256),
    "imagenet_32": DataSet(32),
    "imagenet_64": DataSet(64),
    "ffhq": DataSet(256),
    "lsun_bedroom_128": DataSet(128),
    "lsun_bedroom_256": DataSet(256),
    "lsun_church_64": DataSet(64),
    "lsun_church_128": DataSet(128),
    "lsun_church_256": DataSet(256),
    "lsun_tower_64": DataSet(64),
    "lsun_tower_128": DataSet(128),
    "lsun_tower_256": DataSet(256),
    "digits": DataSet(8, channels=1, output="grey", levels=17),
}

# What early checkpoints lack, and the value they were trained with.
_OLD_FILES: dict[str, Any] = {
    "ada_groups": False,
    "min_groups_per_scale": 1,
    "num_mixture_dec": 10,
}
# Larger than any published model by far; keeps a damaged file from asking for all memory.
_MAX_WIDTH, _MAX_CELLS = 1 << 15, 1000


@dataclass(frozen=True)
class ModelConfig:
    """The arguments that define a model, named and defaulted as upstream's flags.

    Raises:
        ValueError: a value is of the wrong type, out of range, or does not fit the others.
    """

    dataset: str = "mnist"
    use_se: bool = False
    res_dist: bool = False
    num_x_bits: int = 8
    num_latent_scales: int = 1
    num_groups_per_scale: int = 10
    num_latent_per_group: int = 20
    ada_groups: bool = False
    min_groups_per_scale: int = 1
    num_channels_enc: int = 32
    num_channels_dec: int = 32
    num_preprocess_blocks: int = 2
    num_preprocess_cells: int = 3
    num_cell_per_cond_enc: int = 1
    num_postprocess_blocks: int = 2
    num_postprocess_cells: int = 3
    num_cell_per_cond_dec: int = 1
    num_mixture_dec: int = 10
    num_nf: int = 0
    arch_instance: str = "res_mbconv"

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check_value(field.name, type(field.default), getattr(self, field.name))
        self._check_fit()

    @staticmethod
    def _check_value(name: str, kind: type, value: object) -> None:
        # bool is an int in Python; here 1 cell and True are different things.
        if type(value) is not kind:
            raise ValueError(f"{name}: got {value!r}, expected a value of type {kind.__name__}")
        if type(value) is int:
            low = 0 if name in ("num_nf", "num_preprocess_blocks", "num_postprocess_blocks") else 1
            high = _MAX_WIDTH if "channels" in name or "latent_per" in name else 1000
            if name == "num_latent_scales" or name.endswith("_blocks") or name == "num_x_bits":
                high = 8
            if not low <= value <= high:
                raise ValueError(f"{name}: got {value}, expected {low} to {high}")

    def _check_fit(self) -> None:
        if self.dataset not in DATA_SETS:
            raise ValueError(
                f"dataset: got {self.dataset!r}, expected one of {', '.join(DATA_SETS)}"
            )
        if self.arch_instance not in ARCHITECTURES:
            raise ValueError(
                f"arch_instance: got {self.arch_instance!r}, expected one of"
                f" {', '.join(ARCHITECTURES)}"
            )
        unknown = {op for ops in self.cells.values() for op in ops if op} - (
            INVERTED_RESIDUALS.keys() | RESIDUALS.keys()
        )
        if unknown:
            raise ValueError(
                f"arch_instance {self.arch_instance}: its primitives {', '.join(sorted(unknown))}"
                " were never defined, by upstream neither; take another architecture"
            )
        if self.num_preprocess_blocks != self.num_postprocess_blocks:
            raise ValueError(
                f"num_postprocess_blocks: got {self.num_postprocess_blocks}, expected"
                f" {self.num_preprocess_blocks} like num_preprocess_blocks, so that the decoder"
                " ends at the size of the image"
            )
        if self.image_size % (1 << self.top_level):
            raise ValueError(
                f"images of {self.dataset} are {self.image_size} pixels wide and cannot be halved"
                f" {self.top_level} times (num_preprocess_blocks + num_latent_scales - 1);"
                " use fewer blocks or scales"
            )
        if self.vanilla and self.num_channels_enc != self.num_channels_dec:
            raise ValueError(
                f"one group in one scale needs num_channels_enc = num_channels_dec, got"
                f" {self.num_channels_enc} and {self.num_channels_dec}"
            )
        lowest = self.num_channels_dec * (1 if self.num_postprocess_cells > 1 else 2)
        if self.arch_instance == "mbconv_den" and self.num_preprocess_blocks:
            for name, width in (("enc", self.num_channels_enc), ("dec", lowest)):
                if 3 * width % 8:
                    raise ValueError(
                        f"mbconv_den convolves in 8 groups: num_channels_{name} must be a multiple"
                        f" of 8, got {getattr(self, f'num_channels_{name}')}"
                    )
        width = max(self.num_channels_enc, self.num_channels_dec) << self.top_level
        per_group = self.num_cell_per_cond_enc + self.num_cell_per_cond_dec + self.num_nf
        cells = self.num_groups * per_group + self.num_preprocess_blocks * (
            self.num_preprocess_cells + self.num_postprocess_cells
        )
        if width > _MAX_WIDTH or cells > _MAX_CELLS:
            raise ValueError(
                f"the model would have {cells} cells and {width} channels at its top, expected at"
                f" most {_MAX_CELLS} and {_MAX_WIDTH}; use fewer groups, cells or channels"
            )

    @classmethod
    def from_args(cls, args: Mapping[str, object]) -> ModelConfig:
        """Read the fields from a checkpoint's arguments; fill in what old files lack.

        Further entries are ignored.

        Raises:
            ValueError: a field is missing or wrong.
        """
        values = {**_OLD_FILES, **args}
        names = [field.name for field in fields(cls) if field.default is not MISSING]
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(
                f"the arguments lack {', '.join(missing)}; expected those of NVAE's train.py"
            )
        return cls(**{name: values[name] for name in names})

    @property
    def cells(self) -> dict[str, list[str]]:
        """Cell type -> primitives of this architecture."""
        return ARCHITECTURES[self.arch_instance]

    @property
    def data(self) -> DataSet:
        return DATA_SETS[self.dataset]

    @property
    def image_size(self) -> int:
        return self.data.image_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.data.channels, self.image_size, self.image_size

    @property
    def levels(self) -> int:
        """Number of values a pixel can take."""
        return 1 << self.num_x_bits if self.data.output == "color" else self.data.levels

    @property
    def output_channels(self) -> int:
        """Channels of the decoder's logits."""
        if self.data.output == "bernoulli":
            return 1
        if self.data.output == "grey":
            return 3 * self.num_mixture_dec
        return 6 if self.num_mixture_dec == 1 else 10 * self.num_mixture_dec

    @property
    def top_level(self) -> int:
        """How often the image is halved on the way to the top latent."""
        return self.num_preprocess_blocks + self.num_latent_scales - 1

    @property
    def groups_per_scale(self) -> list[int]:
        """Groups per scale, the highest resolution first (the order of the encoder)."""
        groups = [self.num_groups_per_scale]
        while len(groups) < self.num_latent_scales:
            last = groups[-1]
            groups.append(max(self.min_groups_per_scale, last // 2) if self.ada_groups else last)
        return groups

    @property
    def num_groups(self) -> int:
        return sum(self.groups_per_scale)

    @property
    def levels_of_groups(self) -> list[int]:
        """How often the image is halved for each group, the top group first."""
        scales = reversed(list(enumerate(self.groups_per_scale)))
        return [self.num_preprocess_blocks + s for s, count in scales for _ in range(count)]

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of each z, the top group first."""
        sizes = [self.image_size >> level for level in self.levels_of_groups]
        return [(self.num_latent_per_group, size, size) for size in sizes]

    @property
    def vanilla(self) -> bool:
        """One group in one scale: an ordinary VAE, without towers."""
        return self.num_latent_scales == 1 and self.num_groups_per_scale == 1
