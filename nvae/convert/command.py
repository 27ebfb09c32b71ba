"""`python -m nvae.lmdb_io convert`: one half of a data set into NVAE's LMDB."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from nvae import lmdb_io, pictures, runtime
from nvae.arch import DATA_SETS
from nvae.convert import splits
from nvae.convert.sources import Source, open_source
from nvae.convert.writer import Conversion, write

# What the published models were trained and measured on.
PUBLISHED = {
    "celeba_64": {"train": 162770, "validation": 19867, "test": 19962},
    "celeba_256": {"train": 27000, "validation": 3000},
    "imagenet_32": {"train": 1281147, "validation": 50000},
    "imagenet_64": {"train": 1281147, "validation": 50000},
    "ffhq": {"train": 63000, "validation": 7000},
}
DESCRIPTION = """\
Put one half of a data set into LMDB files that this package and NVAE's own programs read.
Stopped at any moment (kill, full disk), it goes on where it was when started again; until it is
whole, the result is called *.part. One run makes one half: give --split train, then validation."""
EPILOG = """\
what each data set is made from, and what comes out (P stands for python -m nvae.lmdb_io):

  celeba_64    CelebA's aligned JPEGs, folder or zip, with its list_eval_partition.txt beside them
               (or --split_file); the files are kept bit by bit
                 P convert --dataset celeba_64 --source img_align_celeba.zip --out data/celeba64
  celeba_256   Glow's TFRecords of CelebA-HQ, a folder with train/ and validation/; no TensorFlow
  imagenet_32  Glow's TFRecords, or pictures of that size. NVAE's own programs want --out to end in
  imagenet_64  _32 and _64
                 P convert --dataset imagenet_32 --source imagenet-tfr --out data/imagenet_32
  ffhq         the 70000 PNG files, folder or zip, resized to 256. A train_test_ind.pt of NVAE's in
               --out gives its split; otherwise one is drawn from --seed into train_test_ind.npz
                 P convert --dataset ffhq --source images1024x1024 --out data/ffhq --workers 4
  lsun_*       LSUN's own LMDB can be read as it is; this makes a smaller, faster one, with every
               picture losslessly at the size the model sees; also from a folder or zip of pictures
                 P convert --dataset lsun_church_64 --source lsun --out data/church64

Any of them also takes a folder or a zip of other pictures: with the subfolders train and
validation, or all of one half with --whole. Values are raw RGB bytes (celeba_256, imagenet, ffhq)
or image files (celeba_64, lsun)."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m nvae.lmdb_io",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", choices=["convert"], help="what to do")
    add("--dataset", required=True, choices=lmdb_io.NAMES, metavar="NAME", help="see below")
    add("--source", required=True, type=Path, help="folder, zip, TFRecords or LSUN's LMDB")
    add("--out", required=True, type=Path, help="data folder; the LMDB gets its usual name in it")
    add("--split", default="train", choices=splits.SPLITS, help="which half (%(default)s)")
    add(
        "--split_file",
        type=Path,
        help="text of picture names with 0, 1, 2 for train, validation, test, or .pt or .npz with"
        " the indices train and test",
    )
    add("--whole", action="store_true", help="all pictures of the source belong to this half")
    add("--seed", type=int, default=0, help="of the split drawn for ffhq (%(default)s)")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="threads that decode (one per core: %(default)s)",
    )
    add("--dry_run", action="store_true", help="look at everything, tell the plan, write nothing")
    return parser


# --- one picture


def _named(source: Source, make: Callable[[bytes], bytes]) -> Callable[[int], bytes]:
    def value(index: int) -> bytes:
        try:
            return make(source[index])
        except (ValueError, OSError) as error:
            raise ValueError(f"{source.where}, {source.name(index)}: {error}") from None

    return value


def _photograph(file: bytes) -> bytes:
    """CelebA's file as it is, if it is one."""
    lmdb_io.celeba_face(file)
    return file


def _maker(dataset: str, kind: str) -> Callable[[bytes], bytes]:
    """From what a source gives to a record's value."""
    size = DATA_SETS[dataset].image_size

    def decode(file: bytes) -> Image.Image:
        # LSUN's records as its readers see them: not turned, not laid on white.
        lsun = kind == "lmdb"
        image = lmdb_io.encoded_image(file) if lsun else pictures.open_rgb(io.BytesIO(file))
        return pictures.shorter_side(image, size)

    def lossless(file: bytes) -> bytes:
        written = io.BytesIO()
        decode(file).save(written, "PNG")
        return written.getvalue()

    if kind == "tfrecords":
        return lambda pixels: pixels
    if dataset == "celeba_64":
        return _photograph
    if dataset.startswith("lsun_"):
        return lossless
    return lambda file: pictures.centre(decode(file), size).tobytes()


# --- the whole


def plan(args: argparse.Namespace) -> tuple[Source, Conversion]:
    """What will be read and what will be written.

    Raises:
        ValueError: flags, source and data set do not go together.
    """
    dataset, split = args.dataset, args.split
    if split == "test" and dataset != "celeba_64":
        raise ValueError(f"--split test: {dataset} has only train and validation")
    if args.workers < 1:
        raise ValueError(f"--workers: got {args.workers}, expected 1 or more")
    source = splits.choose(
        open_source(args.source, dataset, split),
        dataset,
        split,
        args.out,
        split_file=args.split_file,
        whole=args.whole,
        seed=args.seed,
        dry_run=args.dry_run,
    )
    numbered = not dataset.startswith("lsun_")
    size = DATA_SETS[dataset].image_size
    value_bytes = 3 * size * size if dataset in lmdb_io.RAW else 0
    if dataset == "celeba_64":
        value_bytes = source.bytes // len(source)
    value = _named(source, _maker(dataset, source.kind))

    def record(index: int) -> tuple[bytes, bytes]:
        if source.kind == "lmdb":
            return source.name(index).encode("latin1"), value(index)
        return (str(index) if numbered else f"{index:09d}").encode(), value(index)

    about = {
        "format": 1,
        "dataset": dataset,
        "split": split,
        "records": len(source),
        "source": source.kind,
        "source_sha256": source.digest,
    }
    target = args.out / lmdb_io.directory(dataset, split)
    if (
        args.source.resolve() in (target.resolve(), target.parent.resolve())
        and source.kind == "lmdb"
    ):
        raise ValueError(f"--out {args.out} is where the source lies; give another folder")
    return source, Conversion(target, len(source), record, about, value_bytes, numbered)


def convert(args: argparse.Namespace) -> int:
    """Make the LMDB of one half, tell what came out."""
    source, conversion = plan(args)
    done = conversion.is_done()
    there = conversion.length if done else conversion.records_there()
    if args.dry_run:
        existing = next(p for p in (args.out, *args.out.absolute().parents) if p.exists())
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        found = {
            "source_kind": source.kind,
            "target": str(conversion.target),
            "records": conversion.length,
            "records_there": there,
            "first": source.name(0),
            "last": source.name(len(source) - 1),
            "bytes_needed": conversion.bytes_needed or None,
            "bytes_free": shutil.disk_usage(existing).free,
        }
        print(json.dumps({**settings, **found}, indent=2))
        return 0
    if not done:
        from tqdm import tqdm

        with tqdm(total=conversion.length, initial=there, desc=conversion.target.name) as bar:
            for records in write(conversion, workers=args.workers):
                bar.update(records - bar.n)
    expected = PUBLISHED.get(args.dataset, {}).get(args.split, len(source))
    note = f"; the published set has {expected}" if expected != len(source) else ""
    size = (conversion.target / "data.mdb").stat().st_size
    was = "was there already" if done else "is complete"
    print(f"{conversion.target} {was}: {len(source)} records, {size / 1e6:.1f} MB{note}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = parser().parse_args(argv)
    return runtime.exit_status(lambda: convert(args))
