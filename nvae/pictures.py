"""Pictures of any kind: found below a folder, opened as RGB, fitted to a size. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


def is_picture(path: Path) -> bool:
    """By its name; what begins with a dot is no picture (macOS puts such files into zips)."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def below(root: Path) -> list[Path]:
    """All pictures below a folder, in the order of their paths."""
    found = root.rglob("*") if root.is_dir() else ()
    return sorted(path for path in found if is_picture(path) and path.is_file())


def open_rgb(file: Path | BinaryIO) -> Image.Image:
    """Decode to RGB: turned as the camera says, transparent parts on white.

    Raises:
        ValueError: Pillow cannot read it, or it has more than 8 bits per channel; the message
            is to be read behind the name of the picture.
    """
    try:
        with Image.open(file) as picture:
            if picture.mode[0] in "IF":
                raise ValueError("has more than 8 bits per channel; convert it first")
            image = ImageOps.exif_transpose(picture)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        # SyntaxError: what Pillow raises on some damaged PNG files.
        raise ValueError(f"cannot be read as an image: {error}") from None


def shorter_side(image: Image.Image, size: int) -> Image.Image:
    """Resize, antialiased bilinear, until the shorter side has `size` pixels."""
    short, long = sorted(image.size)
    if short == size:
        return image
    long = int(size * long / short)
    shape = (long, size) if image.width >= image.height else (size, long)
    return image.resize(shape, Image.Resampling.BILINEAR)


def centre(image: Image.Image, size: int) -> Image.Image:
    """The square of `size` pixels in the middle."""
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def contents(root: Path) -> str:
    """What a folder holds, for messages that say what it lacks."""
    names = sorted(p.name for p in root.iterdir())[:8] if root.is_dir() else []
    return f"the folder holds {', '.join(names)}" if names else "the folder is empty"
