"""Pictures to arrays: the published numbers of CLIP's transform, transparency, damaged files."""

import base64
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cir_jax.data.images import ImageSpec, crop, data_uri, open_image, prepare

# width, height, sum, pixels (0, 0) (111, 111) (223, 223), mean and std after normalising, values at row 100, column 50
GOLDEN = [
    (301, 200, 19131778, (42, 0, 94), (126, 126, 201), (211, 255, 65), 0.18180, 0.97128, (-0.62439, -0.04121, -1.48022)),
    (200, 301, 19131757, (0, 42, 94), (126, 126, 201), (255, 211, 65), 0.18175, 0.96472, (-0.96015, 0.01882, -1.48022)),
    (224, 224, 19141568, (0, 0, 0), (126, 126, 18), (255, 255, 50), 0.18277, 1.08574, (-0.96015, -0.04121, -1.11050)),
    (227, 224, 19169568, (2, 0, 14), (127, 126, 32), (253, 255, 64), 0.18548, 1.08084, (-0.94555, -0.04121, -0.91142)),
    (640, 480, 19142334, (31, 0, 52), (126, 126, 58), (223, 254, 94), 0.18284, 0.98364, (-0.71198, -0.04121, 0.65279)),
    (100, 75, 19193821, (30, 0, 84), (127, 127, 91), (224, 255, 103), 0.18771, 1.00108, (-0.71198, -0.04121, 1.05095)),
]  # fmt: skip
WHITE = (255, 255, 255)


def synthetic(width, height) -> np.ndarray:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [x * 255 // (width - 1), y * 255 // (height - 1), 7 * (x + y) % 256]
    return np.stack(channels, axis=-1).astype(np.uint8)


def encoded(picture, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g[0]}x{g[1]}")
@pytest.mark.parametrize("convert_first", [True, False])
def test_clip_transform_gives_the_published_numbers(golden, convert_first):
    width, height, total, first, middle, last, mean, std, values = golden
    spec = ImageSpec(convert_first=convert_first)
    pixels = crop(synthetic(width, height), spec)
    assert pixels.dtype == np.uint8 and pixels.shape == (224, 224, 3)
    assert int(pixels.sum(dtype=np.int64)) == total
    assert [tuple(pixels[i, i]) for i in (0, 111, 223)] == [first, middle, last]
    array = prepare(synthetic(width, height), spec)
    assert array.dtype == np.float32 and array.shape == (224, 224, 3)
    assert array.mean(dtype=np.float64) == pytest.approx(mean, abs=6e-6)
    assert array.std(dtype=np.float64) == pytest.approx(std, abs=6e-6)
    np.testing.assert_allclose(array[100, 50], values, rtol=0, atol=6e-6)


@pytest.mark.parametrize(
    ("excess", "rounded", "floored"),
    [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 2, 1), (5, 2, 2), (7, 4, 3)],
)
def test_crop_offset_rounds_half_to_even_or_down(excess, rounded, floored):
    wide = synthetic(32 + excess, 32)
    for offset, left in (("round", rounded), ("floor", floored)):
        spec = ImageSpec(size=32, crop_offset=offset)
        np.testing.assert_array_equal(crop(wide, spec), wide[:, left : left + 32])
        tall = wide.swapaxes(0, 1)
        np.testing.assert_array_equal(crop(tall, spec), tall[left : left + 32])


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_squash_ignores_the_aspect_ratio(name):
    array = synthetic(301, 200)
    expected = Image.fromarray(array).resize((64, 64), Image.Resampling[name.upper()])
    spec = ImageSpec(size=64, resize="squash", filter=name)
    np.testing.assert_array_equal(crop(array, spec), np.asarray(expected))


def test_short_side_keeps_the_truncated_long_side():
    array = synthetic(301, 200)
    expected = Image.fromarray(array).resize((int(64 * 301 / 200), 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(
        crop(array, ImageSpec(size=64, filter="bilinear")),
        np.asarray(expected.crop((16, 0, 80, 64))),
    )


def test_a_cut_picture_is_not_changed_by_a_second_cut():
    for spec in (ImageSpec(size=48), ImageSpec(size=48, resize="squash", convert_first=False)):
        pixels = crop(synthetic(70, 51), spec)
        np.testing.assert_array_equal(crop(pixels, spec), pixels)
        np.testing.assert_array_equal(prepare(pixels, spec), prepare(synthetic(70, 51), spec))


def test_mean_and_std_are_those_of_the_spec():
    spec = ImageSpec(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    expected = synthetic(32, 32).astype(np.float32) / 255 * 2 - 1
    np.testing.assert_allclose(prepare(synthetic(32, 32), spec), expected, atol=1e-6)


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    array = synthetic(40, 30)
    data = encoded(Image.fromarray(array))
    (tmp_path / "a.png").write_bytes(data)
    sources = [array, data, tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array)]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(open_image(source)), array)


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda x: x),
        (3, lambda x: x[::-1, ::-1]),
        (6, lambda x: np.rot90(x, -1)),
        (8, np.rot90),
    ],
)
def test_the_orientation_of_a_camera_counts_where_the_spec_says_so(orientation, turned, tmp_path):
    array = synthetic(40, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(tmp_path / "x.png", exif=exif)
    for upright, expected in ((False, array), (True, turned(array))):
        spec = ImageSpec(size=24, upright=upright)
        ours = crop(str(tmp_path / "x.png"), spec)
        np.testing.assert_array_equal(ours, crop(np.ascontiguousarray(expected), spec))


# ---- palettes and transparency ----


def palette_picture() -> Image.Image:
    return Image.fromarray(synthetic(90, 60)).quantize(16)


def rgba_picture() -> Image.Image:
    picture = Image.fromarray(synthetic(90, 60)).convert("RGBA")
    picture.putalpha(Image.fromarray(synthetic(90, 60)[..., 2]))
    return picture


@pytest.mark.parametrize("make", [palette_picture, rgba_picture])
def test_order_of_conversion_and_resize(make):
    size = (int(32 * 90 / 60), 32)
    box = (8, 0, 40, 32)
    first = make().convert("RGB").resize(size, Image.Resampling.BICUBIC).crop(box)
    after = make().resize(size, Image.Resampling.BICUBIC).crop(box).convert("RGB")
    np.testing.assert_array_equal(crop(make(), ImageSpec(size=32)), np.asarray(first))
    np.testing.assert_array_equal(
        crop(make(), ImageSpec(size=32, convert_first=False)), np.asarray(after)
    )
    assert np.abs(np.int16(first) - np.int16(after)).max() > 20


def transparent_pictures() -> dict[str, bytes]:
    """A square of 8 pixels, dark with hidden pixels in the left half, in all the ways a PNG can say so."""
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[:, :4] = 0
    grey = np.full((8, 8), 50, np.uint8)
    hidden = np.where(alpha == 0, 100, 50).astype(np.uint8)
    palette = Image.fromarray((alpha == 0).astype(np.uint8))
    palette = Image.frombytes("P", palette.size, palette.tobytes())
    palette.putpalette([50, 50, 50, 100, 100, 100, 0, 0, 0])
    return {
        "RGBA": encoded(
            Image.merge("RGBA", [Image.fromarray(x) for x in (grey, grey, grey, alpha)])
        ),
        "LA": encoded(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])),
        "P bytes": encoded(palette, transparency=b"\xff\x00\x80"),
        "P index": encoded(palette, transparency=1),
        "L colour": encoded(Image.fromarray(hidden), transparency=100),
        "RGB colour": encoded(Image.fromarray(hidden).convert("RGB"), transparency=(100, 100, 100)),
    }


@pytest.mark.parametrize("name", sorted(transparent_pictures()))
@pytest.mark.parametrize("convert_first", [True, False])
def test_transparency_is_dropped_or_put_on_a_background(name, convert_first):
    data = transparent_pictures()[name]
    under = 50 if name in ("RGBA", "LA") else 100
    dropped = crop(data, ImageSpec(size=8, convert_first=convert_first))
    assert (dropped[:, :4] == under).all() and (dropped[:, 4:] == 50).all()
    for colour in (WHITE, (255, 0, 10)):
        shown = crop(data, ImageSpec(size=8, convert_first=convert_first, background=colour))
        assert (shown[:, :4] == colour).all() and (shown[:, 4:] == 50).all()


def test_half_transparent_pixels_are_mixed_with_the_background():
    picture = Image.new("RGBA", (8, 8), (0, 100, 200, 128))
    assert tuple(crop(picture, ImageSpec(size=8))[0, 0]) == (0, 100, 200)
    mixed = crop(picture, ImageSpec(size=8, background=WHITE))[0, 0]
    np.testing.assert_allclose(mixed, (127, 177, 227), atol=1)


def test_a_background_changes_nothing_under_an_opaque_picture():
    array = synthetic(50, 40)
    np.testing.assert_array_equal(
        crop(array, ImageSpec(size=32, background=WHITE)), crop(array, ImageSpec(size=32))
    )


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "I;16"])
def test_other_modes_become_rgb(mode):
    picture = Image.new(mode, (20, 16))
    expected = np.asarray(picture.convert("RGB"))[:, 2:18]
    np.testing.assert_array_equal(crop(picture, ImageSpec(size=16)), expected)


def test_orientation_of_the_camera_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(Image.fromarray(synthetic(40, 30)), "JPEG", exif=exif)).size == (
        40,
        30,
    )


# ---- what cannot be read ----


def damaged_files() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    png, jpeg = encoded(Image.fromarray(noise)), encoded(Image.fromarray(noise), "JPEG")
    middle = len(png) // 2
    return {
        "empty": b"",
        "text": b"<html>not found</html>",
        "cut png": png[:middle],
        "cut jpeg": jpeg[: len(jpeg) // 2],
        "only a head": png[:30],
        "overwritten": png[:middle] + bytes(100) + png[middle + 100 :],
    }


@pytest.mark.parametrize("name", sorted(damaged_files()))
def test_damaged_files_are_refused_with_path_and_reason(name, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(damaged_files()[name])
    with pytest.raises(
        ValueError, match=re.escape(str(path)) + r": cannot be read as a picture \(.+\); replace"
    ):
        open_image(path)
    with pytest.raises(ValueError, match=r"picture of .* bytes: cannot be read"):
        open_image(damaged_files()[name])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        open_image(tmp_path / "nowhere.png")


def test_decompression_bombs_are_refused(monkeypatch):
    data = encoded(Image.new("RGB", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="exceeds limit"):
        open_image(data)


def test_a_thread_of_a_picture_is_refused_before_it_fills_the_memory():
    with pytest.raises(ValueError, match="1 x 5000 is too long: scaled to 224 x 1120000"):
        crop(np.zeros((5000, 1, 3), np.uint8), ImageSpec())


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)],
)  # fmt: skip
def test_arrays_of_another_form_are_refused(array):
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\]"):
        open_image(array)


def test_sources_of_another_type_are_refused():
    with pytest.raises(ValueError, match="from NoneType; expected a path"):
        open_image(None)


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"resize": "long"}, {"filter": "nearest"}, {"crop_offset": "ceil"}]
)
def test_a_wrong_spec_is_refused(options):
    with pytest.raises(ValueError, match="expected"):
        ImageSpec(**options)


# ---- pages, imports ----


@pytest.mark.parametrize(("side", "kind", "longest"), [(64, "png", 64), (600, "jpeg", 256)])
def test_data_uri_is_a_small_copy(side, kind, longest):
    head, data = data_uri(synthetic(side, side // 2)).split(",")
    assert head == f"data:image/{kind};base64"
    assert open_image(base64.b64decode(data)).size == (longest, longest // 2)


def test_data_uri_shows_transparency_on_white():
    picture = open_image(base64.b64decode(data_uri(Image.new("RGBA", (8, 8))).split(",")[1]))
    assert picture.getpixel((0, 0)) == WHITE


def test_only_images_imports_pillow_and_only_when_needed():
    package = Path(__file__).parents[1] / "cir_jax"
    pattern = re.compile(r"^\s*(from|import) PIL\b", re.MULTILINE)
    found = {
        p.relative_to(package).as_posix()
        for p in package.rglob("*.py")
        if pattern.search(p.read_text())
    }
    assert found == {"data/images.py"}
    check = "import sys, cir_jax.data.images; assert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
