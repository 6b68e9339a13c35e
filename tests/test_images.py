"""Pictures in and out of files: every mode, every kind of damage, and a write that is whole or not at all."""

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm_edu.datasets.images import (
    MAX_MEGAPIXELS,
    contact_sheet,
    crop_to_square,
    read_image,
    read_mask,
    resize,
    to_uint8,
    write_png,
)
from ldm_edu.datasets.reader import read_scenes
from ldm_edu.runtime import UserError
from ldm_edu.widgets import Frame, FrameSlider, show

BYTES = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def expected(array: np.ndarray) -> torch.Tensor:
    """What `read_image` should return for an 8-bit colour array (H, W, 3)."""
    return torch.from_numpy(array.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG file byte by byte, for what Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_colours_are_read_exactly(tmp_path: Path, suffix: str):
    path = tmp_path / f"colours.{suffix}"
    Image.fromarray(COLOURS).save(path, lossless=True)
    image = read_image(path)
    assert image.dtype == torch.float32 and image.shape == (3, 5, 7)
    torch.testing.assert_close(image, expected(COLOURS), rtol=0, atol=1e-6)


def test_grey_becomes_three_equal_channels(tmp_path: Path):
    Image.fromarray(COLOURS[..., 0]).save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png")
    torch.testing.assert_close(image, expected(COLOURS[..., :1].repeat(3, 2)), rtol=0, atol=1e-6)


def test_black_and_white(tmp_path: Path):
    Image.fromarray(COLOURS[..., 0] > 127).save(tmp_path / "bits.png")
    assert set(read_image(tmp_path / "bits.png").unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_parts_are_laid_on_white(tmp_path: Path, mode: str):
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))  # black, but invisible
    path = tmp_path / "alpha.png"
    (picture.quantize() if mode == "PA" else picture.convert(mode)).save(path)
    assert read_image(path)[:, 0].tolist() == [[-1.0, 1.0]] * 3


def test_half_transparent_black_on_white_is_grey(tmp_path: Path):
    Image.new("RGBA", (1, 1), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert read_image(tmp_path / "half.png").flatten().tolist() == pytest.approx([0, 0, 0], abs=0.01)


def test_palette(tmp_path: Path):
    Image.fromarray(COLOURS).quantize(256).save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    torch.testing.assert_close(read_image(tmp_path / "palette.png"), expected(COLOURS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str):
    values = np.array([[0, 255, 256, 25700, 32768, 65535]], dtype=np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    image = read_image(path)
    wanted = torch.from_numpy(values.astype(np.float32)) / 32767.5 - 1
    torch.testing.assert_close(image, wanted.expand(3, -1, -1), rtol=0, atol=1e-6)


def test_16_bit_colour(tmp_path: Path):
    row = b"\0" + struct.pack(">HHH", 0, 0x8000, 0xFFFF)
    (tmp_path / "deep.png").write_bytes(png(1, 1, 16, 2, row))
    assert read_image(tmp_path / "deep.png").flatten().tolist() == pytest.approx([-1, 0, 1], abs=0.01)


def test_cmyk_jpeg(tmp_path: Path):
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg", quality=95)  # cyan ink alone
    red, green, blue = read_image(tmp_path / "cmyk.jpg")[:, 8, 8].tolist()
    assert red < -0.9 and green > 0.9 and blue > 0.9


def test_exif_orientation_is_applied(tmp_path: Path):
    picture = Image.fromarray(COLOURS)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    picture.save(tmp_path / "turned.png", exif=exif)
    wanted = expected(np.rot90(COLOURS, k=-1).copy())
    torch.testing.assert_close(read_image(tmp_path / "turned.png"), wanted, rtol=0, atol=1e-6)


def test_floating_point_tiff_is_refused(tmp_path: Path):
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match=r"float\.tiff holds floating-point values"):
        read_image(tmp_path / "float.tiff")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_truncated_file_is_named(tmp_path: Path, suffix: str, kept: float):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(UserError, match=rf"cut\.{suffix}"):
        read_image(path)


def test_altered_png_is_named(tmp_path: Path):
    path = tmp_path / "altered.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"altered\.png is broken"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "0 bytes"), (b"a letter", "not one of"), (b"%!PS-Adobe-3.0", "not one of")]
)
def test_what_is_no_picture(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "thing.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"thing\.png.*{reason}"):
        read_image(path)


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(UserError, match="There is no file"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="is a folder"):
        read_image(tmp_path)


@pytest.mark.parametrize("side", [9_000, 10_000, 20_000, 100_000])
def test_huge_picture_is_refused_before_decoding(tmp_path: Path, side: int):
    """The file holds a header only. At the larger sizes Pillow has checks of its own, which warn or raise."""
    path = tmp_path / "huge.png"
    path.write_bytes(png(side, side, 8, 2, b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=rf"huge\.png has .*{MAX_MEGAPIXELS}.*smaller copy"):
            read_image(path)


def test_mask_keeps_class_numbers(tmp_path: Path):
    classes = np.array([[0, 3], [11, 2]], dtype=np.uint8)
    Image.fromarray(classes).save(tmp_path / "grey.png")
    coloured = Image.new("P", (2, 2))
    coloured.putpalette(bytes(range(36)))
    coloured.putdata(classes.flatten().tolist())
    coloured.save(tmp_path / "palette.png")
    for name in ("grey.png", "palette.png"):
        mask = read_mask(tmp_path / name)
        assert mask.dtype == torch.int64 and mask.tolist() == classes.tolist()


def test_coloured_mask_is_refused(tmp_path: Path):
    Image.fromarray(COLOURS).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="class numbers"):
        read_mask(tmp_path / "mask.png")


@settings(deadline=None)
@given(st.integers(0, 255))
def test_every_8_bit_level_survives(level: int):
    image = torch.full((1, 3, 1, 1), level / 127.5 - 1)
    assert (to_uint8(image) == level).all()


def test_to_uint8_clips_and_refuses_nan():
    assert to_uint8(torch.tensor([-3.0, 3.0]).expand(1, 3, 1, 2)).tolist() == [[[[0] * 3, [255] * 3]]]
    with pytest.raises(UserError, match="NaN"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))


def test_write_and_read_back(tmp_path: Path):
    image = expected(COLOURS)
    write_png(tmp_path / "out.png", image)
    torch.testing.assert_close(read_image(tmp_path / "out.png"), image, rtol=0, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_write_needs_the_folder(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist. Create it first"):
        write_png(tmp_path / "nowhere" / "out.png", expected(COLOURS))
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "out.png"
    write_png(path, expected(COLOURS))
    before = path.read_bytes()

    def save(self, file, **_):
        Path(file).write_bytes(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(UserError, match="No space left"):
        write_png(path, -expected(COLOURS))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_contact_sheet_is_torchvisions_grid():
    from torchvision.utils import make_grid

    images = torch.rand(5, 3, 4, 6) * 2 - 1
    grid = make_grid(images, nrow=3, padding=2, pad_value=1.0)[:, 2:-2, 2:-2]  # ours has no frame
    assert torch.equal(contact_sheet(images), grid)
    assert contact_sheet(images, columns=5).shape == (3, 4, 5 * 6 + 4 * 2)
    assert torch.equal(contact_sheet([images[0]]), images[0])


def test_resize_is_pillows_bicubic():
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(np.random.default_rng(0).random((48, 64)).astype(np.float32), 2)
    smooth = (
        (smooth - smooth.mean()) / np.abs(smooth - smooth.mean()).max() * 0.9
    )  # so that nothing is clipped
    for height, width in [(12, 16), (20, 30), (96, 100)]:
        theirs = np.array(Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC))
        ours = resize(torch.from_numpy(smooth).expand(3, -1, -1), height, width)
        torch.testing.assert_close(ours[0], torch.from_numpy(theirs), rtol=0, atol=1e-4)


def test_crop_to_square_takes_the_middle():
    image = torch.arange(6.0).expand(3, 2, 6)
    assert crop_to_square(image)[0].tolist() == [[2.0, 3.0]] * 2
    assert crop_to_square(image.mT).shape == (3, 2, 2)


@pytest.mark.parametrize(
    "use", [lambda x: show(x, "bytes"), lambda x: FrameSlider([Frame("t = 0", {"it": x})]), read_scenes, to_uint8]
)
def test_bytes_are_refused_where_pictures_are_shown_or_read(use: Callable):
    """Taken for values in [-1, 1], nearly all of them would be white."""
    with pytest.raises(UserError, match="uint8: images / 127.5 - 1"):
        use(BYTES)


def test_a_batch_is_no_image(tmp_path: Path):
    with pytest.raises(UserError, match=r"one image \(3, H, W\) or a batch .*, not \(1, 2, 3, 64, 64\)"):
        write_png(tmp_path / "x.png", BYTES / 255)
    assert not list(tmp_path.iterdir())
