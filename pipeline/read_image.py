"""Picture files -> one upright 8-bit BGR picture, whatever mode they store."""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageCms, ImageOps, UnidentifiedImageError

from pipeline.decode import Image, check_pixels
from schemas.errors import RowError

EXIF_ORIENTATION = 0x0112
TURNED_DEG = {3: 180, 4: 180, 5: 90, 6: 270, 7: 270, 8: 90}  # EXIF orientation -> counter-clockwise rotation
WHITE = (255, 255, 255)
ROWS_AT_ONCE = 256
BROKEN_PICTURE = (
    OSError, SyntaxError, ValueError, EOFError, RuntimeError, IndexError, KeyError, TypeError, OverflowError, struct.error,
    zlib.error,
)  # fmt: skip
"""What Pillow raises on pictures that are broken, some formats in ways of their own."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture and what its file says of itself."""

    bgr: Image
    container: str
    rotation_deg: int


def read_image(path: Path, max_pixels: int | None = None, max_pictures: int | None = None) -> Picture:
    """A picture file -> its first frame, upright, uint8 [height, width, 3], blue first.

    Transparency is laid on white, as pages show it. Inks become colours by the profile that comes with them. 16-bit values
    are scaled by their full range, floats by 0 to 1. Size and number of pictures are checked before any pixel is decoded.
    Of a GIF that holds several the first is read.

    Raises: RowError with TooManyPixels, TooManyFrames, Unreadable or Truncated.
    """
    with _limited(max_pixels):
        try:
            with Pillow.open(path, formats=picture_formats()) as opened:
                check_pixels(opened.width, opened.height, max_pixels)
                _check_pictures(opened, path, max_pictures)
                container = opened.format or "unknown"
                opened.seek(0)
                _load(opened, path)
                # Reads on behind the picture: a broken end must be found by _load.
                orientation = opened.getexif().get(EXIF_ORIENTATION, 1)
                upright = ImageOps.exif_transpose(opened)
                return Picture(_to_bgr(upright), container, TURNED_DEG.get(orientation, 0))
        except UnidentifiedImageError as error:
            raise RowError("Unreadable", f"{path.name} is no picture that can be read{_remedy(path)}") from error
        except Pillow.DecompressionBombError as error:
            raise RowError("TooManyPixels", f"{path.name}: {error}") from error
        except BROKEN_PICTURE as error:
            raise RowError("Unreadable", f"{path.name}: {error}") from error


def _remedy(path: Path) -> str:
    """What to do about a picture of a kind that is known but not read here; nothing for what is no picture at all."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp":
        return f": HEIF ({head[8:12].decode('latin-1')}) is read as AVIF only; convert it to AVIF, JPEG or PNG"
    if head[:4] in (b"II*\0", b"MM\0*"):
        return ": a damaged TIFF, or one of samples that are not read, such as floats in several channels; convert it to PNG"
    return ""


@cache
def picture_formats() -> tuple[str, ...]:
    """Names of the formats that Pillow reads, but for EPS: that is a program, and Pillow would run it."""
    Pillow.init()
    return tuple(name for name in Pillow.ID if name != "EPS")


@contextlib.contextmanager
def _limited(max_pixels: int | None) -> Iterator[None]:
    """Pillow's own limit is set to ours meanwhile, for pictures inside pictures, whose size no header tells."""
    limit = Pillow.MAX_IMAGE_PIXELS
    Pillow.MAX_IMAGE_PIXELS = None if max_pixels is None else max(1, -(-max_pixels // 2))  # it refuses twice that
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Pillow.DecompressionBombWarning)
            yield
    finally:
        Pillow.MAX_IMAGE_PIXELS = limit


def _check_pictures(opened: Pillow.Image, path: Path, max_pictures: int | None) -> None:
    """Raises: RowError(TooManyFrames) if the file holds more pictures. Those of a TIFF are a chain, and only walked so far."""
    if max_pictures is None:
        return
    if opened.format == "TIFF":
        try:
            opened.seek(max_pictures)
        except EOFError:
            return
        found = max_pictures + 1
    else:
        found = 1 if opened.format == "GIF" else getattr(opened, "n_frames", 1)
    if found > max_pictures:
        raise RowError(
            "TooManyFrames", f"{path.name}: found {found} pictures or more; the limit is max_pictures={max_pictures}"
        )


def _load(opened: Pillow.Image, path: Path) -> None:
    try:
        opened.load()
    except BROKEN_PICTURE as error:
        reason = "Truncated" if "truncat" in str(error).lower() or isinstance(error, EOFError) else "Unreadable"
        raise RowError(reason, f"{path.name}: {error}") from error


def _to_bgr(picture: Pillow.Image) -> Image:
    if picture.mode.startswith(("I", "F")):
        grey = _eight_bit(np.asarray(picture))
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2)
    if picture.has_transparency_data:
        layered = picture.convert("RGBA")
        page = Pillow.new("RGB", picture.size, WHITE)
        page.paste(layered, mask=layered.getchannel("A"))
        picture = page
    rgb = np.asarray(_from_inks(picture) if picture.mode == "CMYK" else picture.convert("RGB"))
    return np.ascontiguousarray(rgb[:, :, ::-1])


def _from_inks(picture: Pillow.Image) -> Pillow.Image:
    """CMYK -> RGB by the file's own profile, without which nobody knows the inks; plain arithmetic if it holds none."""
    profile = picture.info.get("icc_profile")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a profile that is none, or of other colours
            inks = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(picture, inks, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
    return picture.convert("RGB")


def _eight_bit(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Grey values of more than 8 bits, [height, width] -> 0 to 255. Wider integers hold 16-bit values unless they exceed
    them; what is no number is black. Some rows at a time: as floats the largest pictures would not fit into memory.
    """
    most = float(np.max(values, initial=0, where=np.isfinite(values)))
    top = 1.0 if values.dtype.kind == "f" and most <= 1.0 else max(65535.0, most)
    grey = np.empty(values.shape, np.uint8)
    for row in range(0, len(values), ROWS_AT_ONCE):
        wide = np.nan_to_num(values[row : row + ROWS_AT_ONCE].astype(np.float64), posinf=top, neginf=0.0)
        grey[row : row + ROWS_AT_ONCE] = np.rint(np.clip(wide / top, 0, 1) * 255)
    return grey
