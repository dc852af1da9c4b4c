"""A picture stored in an odd way is, to ingest and to the scan, the same picture stored plainly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow

from pipeline.probe_media import probe
from pipeline.read_image import read_image
from pipeline.scan_medium import ScanConfig, scan_medium
from schemas.errors import RowError
from tests.pipeline.made_media import texture

WIDTH, HEIGHT = 320, 200
BGR = texture(3, WIDTH, HEIGHT)
BGR[60:64, 40:200] = 0  # something sharp and black, and something bright
BGR[100:140, 220:260] = 250
COLOUR = Pillow.fromarray(np.ascontiguousarray(BGR[..., ::-1]))
GREY = COLOUR.convert("L")
ANOTHER = Pillow.new("RGB", COLOUR.size, "red")
ORIENTATION = 0x0112
CLOSE = {"luma_mean": 0.01, "luma_std": 0.01, "monochrome_ratio": 0.03, "clipped_ratio": 0.02, "letterbox_ratio": 1e-6}


def scores(path: Path) -> dict[str, Any]:
    result = scan_medium(path, "0123456789abcdef", "image", ScanConfig(families=("technical",)))
    (resolution,), (technical,) = result.scores["score_resolution"], result.scores["score_technical"]
    return resolution | technical


def with_alpha(picture: Pillow.Image) -> Pillow.Image:
    """With an alpha channel that hides nothing."""
    layered = picture.copy()
    layered.putalpha(255)
    return layered


def turned(path: Path) -> None:
    exif = Pillow.Exif()
    exif[ORIENTATION] = 6  # a viewer turns it clockwise
    COLOUR.transpose(Pillow.Transpose.ROTATE_90).save(path, exif=exif)


def deep(picture: Pillow.Image, alpha: bool = False) -> Callable[[Path], None]:
    values = np.asarray(picture)[..., ::-1] if picture.mode == "RGB" else np.asarray(picture)
    if alpha:
        values = np.dstack([values, np.full(values.shape[:2], 255, np.uint8)])

    def write(path: Path) -> None:
        assert cv2.imwrite(str(path), values.astype(np.uint16) * 257)

    return write


ODD: dict[str, tuple[Pillow.Image, Callable[[Path], None]]] = {
    "turned.jpg": (COLOUR, turned),
    "turned.png": (COLOUR, turned),
    "several.mpo": (COLOUR, lambda path: COLOUR.save(path, save_all=True, append_images=[ANOTHER], quality=95)),
    "cmyk.jpg": (COLOUR, lambda path: COLOUR.convert("CMYK").save(path, quality=95)),
    "cmyk.tif": (COLOUR, lambda path: COLOUR.convert("CMYK").save(path)),
    "cmyk_profile.jpg": (
        COLOUR,
        lambda path: COLOUR.convert("CMYK").save(path, quality=95, icc_profile=b"no profile" * 40),
    ),
    "alpha.png": (COLOUR, lambda path: with_alpha(COLOUR).save(path)),
    "alpha.webp": (COLOUR, lambda path: with_alpha(COLOUR).save(path, lossless=True)),
    "grey_alpha.png": (GREY, lambda path: with_alpha(GREY).save(path)),
    "16_bit.png": (COLOUR, deep(COLOUR)),
    "16_bit.tif": (COLOUR, deep(COLOUR)),
    "16_bit_alpha.png": (COLOUR, deep(COLOUR, alpha=True)),
    "16_bit_grey.png": (GREY, deep(GREY)),
    "16_bit_grey.tif": (GREY, deep(GREY)),
    "float_grey.tif": (GREY, lambda path: Pillow.fromarray(np.asarray(GREY, np.float32) / 255).save(path)),
    "animated.png": (COLOUR, lambda path: COLOUR.save(path, save_all=True, append_images=[ANOTHER])),
    "animated.webp": (COLOUR, lambda path: COLOUR.save(path, save_all=True, append_images=[ANOTHER], lossless=True)),
    "ycbcr.tif": (COLOUR, lambda path: COLOUR.convert("YCbCr").save(path)),
    "lab.tif": (COLOUR, lambda path: COLOUR.convert("LAB").save(path)),
    "modern.avif": (COLOUR, lambda path: COLOUR.save(path, quality=95)),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Mode -> the scores of the picture as a plain PNG."""
    folder = tmp_path_factory.mktemp("plain")
    for picture in (COLOUR, GREY):
        picture.save(folder / f"{picture.mode}.png")
    return {picture.mode: scores(folder / f"{picture.mode}.png") for picture in (COLOUR, GREY)}


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures(tmp_path: Path, plain: dict[str, dict[str, Any]], name: str) -> None:
    picture, write = ODD[name]
    path = tmp_path / name
    write(path)
    facts, found, expected = probe(path), scores(path), plain[picture.mode]
    assert (facts.kind, facts.width_px, facts.height_px) == ("image", WIDTH, HEIGHT)
    for score in ("aspect_ratio", "short_edge_px"):
        assert found[score] == expected[score]
    for score, tolerance in CLOSE.items():
        assert found[score] == pytest.approx(expected[score], abs=tolerance), score
    assert found["sharpness"] == pytest.approx(expected["sharpness"], rel=0.15)
    assert found["colourfulness"] == pytest.approx(expected["colourfulness"], rel=0.1, abs=1)


def test_a_transparent_palette_colour_is_as_white(tmp_path: Path) -> None:
    palette = COLOUR.quantize(64, dither=Pillow.Dither.NONE)
    palette.save(tmp_path / "clear.gif", transparency=7)
    palette.save(tmp_path / "clear.png", transparency=7)
    white = np.asarray(palette.convert("RGB")).copy()
    white[np.asarray(palette) == 7] = 255
    Pillow.fromarray(white).save(tmp_path / "white.png")
    expected = scores(tmp_path / "white.png")
    for name in ("clear.gif", "clear.png"):
        found = scores(tmp_path / name)
        for score in ("luma_mean", "luma_std", "monochrome_ratio", "sharpness", "colourfulness"):
            assert found[score] == pytest.approx(expected[score], rel=1e-4), (name, score)


def ink_profile(rgb_of_cyan: int) -> bytes:
    """The smallest ICC profile of CMYK: neutral greys, of this level for full cyan, white for no ink at all."""
    lightness = round(Pillow.new("RGB", (1, 1), (rgb_of_cyan,) * 3).convert("LAB").getpixel((0, 0))[0])  # type: ignore[index]
    corners = bytes(
        value
        for index in range(16)  # cyan is the slowest
        for value in (0 if index & 1 else (lightness if index & 8 else 255), 128, 128)
    )
    ramp, one, nil = bytes(range(256)), (65536).to_bytes(4, "big"), bytes(4)
    identity = one + nil * 3 + one + nil * 3 + one
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + ramp * 4 + corners + ramp * 3
    lut += bytes(-len(lut) % 4)
    head = bytes(4) + bytes.fromhex("02400000") + b"prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28)
    head += b"".join(value.to_bytes(4, "big") for value in (63190, 65536, 54061)) + bytes(48)  # D50
    tags = (1).to_bytes(4, "big") + b"A2B0" + (144).to_bytes(4, "big") + len(lut).to_bytes(4, "big")
    return (len(head) + 4 + len(tags) + len(lut)).to_bytes(4, "big") + head + tags + lut


def test_inks_have_the_colour_that_their_profile_says(tmp_path: Path) -> None:
    half = np.zeros((64, 64, 4), np.uint8)
    half[:, 32:, 0] = 255  # all cyan on the right
    Pillow.fromarray(half, "CMYK").save(tmp_path / "a.tif", icc_profile=ink_profile(118))
    Pillow.fromarray(half, "CMYK").save(tmp_path / "plain.tif")
    found, plain = (read_image(tmp_path / name).bgr for name in ("a.tif", "plain.tif"))
    assert found[10, 10].min() >= 253
    assert np.abs(found[10, 50].astype(int) - 118).max() <= 3
    assert plain[10, 50].tolist() == [255, 255, 0]


def heic(path: Path) -> None:
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300))


def float_colour(path: Path) -> None:
    cv2.imwrite(str(path), (BGR / 255).astype(np.float32))


@pytest.mark.parametrize(("name", "write", "said"), [("a.heic", heic, "AVIF"), ("a.tif", float_colour, "floats")])
def test_kinds_that_are_not_read_say_so(tmp_path: Path, name: str, write: Callable[[Path], None], said: str) -> None:
    write(tmp_path / name)
    with pytest.raises(RowError, match=said) as caught:
        probe(tmp_path / name)
    assert caught.value.reason == "Unreadable"
