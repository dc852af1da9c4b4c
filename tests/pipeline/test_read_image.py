"""Pictures of every mode become upright 8-bit BGR."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.read_image import read_image
from schemas.errors import RowError
from tests.pipeline.made_media import shared_media

ORIENTATION = 0x0112


def quadrants() -> Image.Image:
    """Red, green over blue, white: 40 by 20."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :20], pixels[:10, 20:], pixels[10:, :20], pixels[10:][:, 20:] = (
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        255,
    )
    return Image.fromarray(pixels)


def test_blue_comes_first(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").bgr[2, 2].tolist() == [0, 0, 255]


@pytest.mark.parametrize(("tag", "rotation"), [(1, 0), (3, 180), (6, 270), (8, 90)])
def test_exif_orientation_is_applied(tmp_path: Path, tag: int, rotation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    quadrants().save(tmp_path / "a.png", exif=exif)
    picture = read_image(tmp_path / "a.png")
    assert picture.rotation_deg == rotation
    stored = np.asarray(quadrants())[..., ::-1]
    assert np.array_equal(picture.bgr, np.rot90(stored, rotation // 90))


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 255)).save(tmp_path / "b.png")
    assert read_image(tmp_path / "a.png").bgr.min() == 255
    assert read_image(tmp_path / "b.png").bgr.max() == 0


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([10, 20, 30] + [0] * 765)
    picture.save(tmp_path / "a.png", transparency=0)
    picture.save(tmp_path / "b.png")
    assert read_image(tmp_path / "a.png").bgr.min() == 255
    assert read_image(tmp_path / "b.png").bgr[0, 0].tolist() == [30, 20, 10]


def test_16_bit_values_are_scaled_and_not_cut(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").bgr[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk_and_one_bit(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    blue, green, red = read_image(tmp_path / "a.jpg").bgr.mean(axis=(0, 1))
    assert red > 225
    assert max(blue, green) < 60
    Image.new("1", (8, 8), 1).save(tmp_path / "b.tif")
    assert read_image(tmp_path / "b.tif").bgr.min() == 255


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second], lossless=True)
    assert read_image(tmp_path / "a.webp").bgr[0, 0].tolist() == [0, 0, 255]


def test_too_many_pixels_are_refused_by_the_header(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "a.png")
    with pytest.raises(RowError, match="40x20") as caught:
        read_image(tmp_path / "a.png", max_pixels=799)
    assert caught.value.reason == "TooManyPixels"


def test_a_picture_cut_short(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(RowError) as caught:
        read_image(tmp_path / "a.jpg")
    assert caught.value.reason == "Truncated"


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("not a picture")
    with pytest.raises(RowError) as caught:
        read_image(tmp_path / "a.jpg")
    assert caught.value.reason == "Unreadable"


def test_the_limit_of_the_picture_library_stays_as_it_was(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    quadrants().save(tmp_path / "a.png")
    read_image(tmp_path / "a.png", max_pixels=1000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_real_pictures() -> None:
    media = shared_media()
    expected = json.loads((media / "expected.json").read_text())["display_size"]
    for path in sorted((media / "image").iterdir()):
        if path.name == "giant_20000x14000.jpg":
            with pytest.raises(RowError, match="280000000"):
                read_image(path, max_pixels=120_000_000)
            continue
        if path.stat().st_size > 1_500_000:
            continue  # the largest ones take seconds and differ in nothing but size
        picture = read_image(path).bgr
        assert picture.dtype == np.uint8
        assert picture.flags.c_contiguous
        if (size := expected.get(f"image/{path.name}")) is not None:
            assert [picture.shape[1], picture.shape[0]] == size
    grey, colour = (read_image(media / "image" / f"flower_q85_{name}.jpg").bgr for name in ("gray", "444"))
    assert np.ptp(grey, axis=2).max() == 0
    assert np.abs(grey[..., 0].mean() - colour.mean()) < 25
    upright = [read_image(media / "image" / f"exif_Landscape_{tag}.jpg").bgr for tag in (1, 6, 8)]
    assert len({picture.shape for picture in upright}) == 1
    assert np.abs(upright[0].astype(int) - upright[1]).mean() < 12


def test_floats_that_are_no_numbers_are_black_or_white(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 600 * 4, dtype=np.float32).reshape(600, 4)
    values[0, 0], values[300, 1], values[599, 2] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    grey = read_image(tmp_path / "a.tif").bgr[:, :, 0]
    assert (grey[0, 0], grey[300, 1], grey[599, 2]) == (0, 255, 0)
    kept = np.isfinite(values)
    assert grey[kept].tolist() == np.rint(values[kept].astype(np.float64) * 255).tolist()
