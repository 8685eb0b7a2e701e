"""Pictures of every kind, sizes equal to transformers', budgets by hand, reasons for unusable files."""
import base64
import io
import os
import random
import struct
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image
from samples import EPS, grey_tiff, png
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from utils.images import (IMAGE_REASONS, ImageError, Picture, check_images, image_size, open_image,
                          picture_url, resolve_image, smart_size)

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def two_halves(mode: str, left: object, right: object) -> Image.Image:
    image = Image.new(mode, (60, 40), left)
    image.paste(right, (30, 0, 60, 40))
    return image


def check_halves(image: Image.Image, left: tuple, right: tuple, within: int = 2) -> None:
    for place, expected in (((5, 5), left), ((image.width - 5, image.height - 5), right)):
        assert image.mode == "RGB" and image.getpixel(place) == pytest.approx(expected, abs=within)


def sent(path, max_pixels: int) -> tuple[str, bytes]:
    head, _, data = picture_url(Picture(str(path)), max_pixels, 28).partition(",")
    return head, base64.b64decode(data)


HALVES, TURNED = two_halves("RGB", RED, "blue"), Image.Exif()
PALETTE = two_halves("P", 0, 1)
PALETTE.putpalette([255, 0, 0, 0, 0, 255])
TURNED[0x0112] = 6  # stored lying on its left side
GREY = ((10,) * 3, (200,) * 3)
UNCHANGED = ("rgb.png", "rgb.jpg", "grey.png", "grey.webp")  # what every server shows as open_image does


@pytest.mark.parametrize("name, image, left, right, options", [
    ("rgb.png", HALVES, RED, BLUE, {}), ("rgb.jpg", HALVES, RED, BLUE, {}),
    ("grey.png", two_halves("L", 10, 200), *GREY, {}), ("grey.webp", two_halves("L", 10, 200), *GREY, {}),
    ("la.png", two_halves("LA", (10, 0), (10, 255)), WHITE, (10,) * 3, {}),
    ("one.png", two_halves("1", 0, 1), (0,) * 3, WHITE, {}),
    ("rgba.png", two_halves("RGBA", (255, 0, 0, 0), (255, 0, 0, 255)), WHITE, RED, {}),
    ("half.webp", two_halves("RGBA", (255, 0, 0, 128), (255, 0, 0, 255)), (255, 127, 127), RED, {}),
    ("palette.png", PALETTE, RED, BLUE, {}), ("hole.png", PALETTE, WHITE, BLUE, {"transparency": 0}),
    ("cmyk.jpg", two_halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), RED, (0, 0, 0), {}),
    ("deep.png", two_halves("I;16", 257 * 10, 257 * 200), *GREY, {}),
    ("deep.tif", two_halves("I;16", 257 * 10, 257 * 200), *GREY, {}),
    ("turned.png", HALVES, RED, BLUE, {"exif": TURNED}), ("a.gif", HALVES, RED, BLUE, {}),
    ("moving.gif", HALVES, RED, BLUE, {"save_all": True, "append_images": [two_halves("L", 10, 200)]})])
def test_a_picture_becomes_rgb_and_is_sent_as_it_is_or_as_jpeg(tmp_path, name, image, left, right, options):
    image.save(tmp_path / name, **options)
    opened = open_image(tmp_path / name)
    assert image_size(tmp_path / name) == (60, 40)
    assert opened.size == ((40, 60) if name == "turned.png" else (60, 40))
    check_halves(opened, left, right, within=6 if name.endswith((".jpg", ".webp")) else 2)
    head, data = sent(tmp_path / name, 60 * 40)
    shown = Image.open(io.BytesIO(data))
    assert (data == (tmp_path / name).read_bytes()) is (name in UNCHANGED)
    assert shown.format == "JPEG" or name in UNCHANGED
    assert head == f"data:{Image.MIME[shown.format]};base64" and shown.mode in ("RGB", "L")
    assert shown.size == opened.size and shown.getexif().get(0x0112, 1) == 1
    check_halves(shown.convert("RGB"), left, right, within=8)


def saved(size: tuple[int, int] = (80, 80), ending: str = "png", kept: float = 1.0) -> bytes:
    """Return the first share of the bytes of a picture of noise."""
    buffer = io.BytesIO()
    noise = Image.frombytes("RGB", size, random.Random(0).randbytes(size[0] * size[1] * 3))
    noise.save(buffer, {"jpg": "jpeg"}.get(ending, ending))
    return buffer.getvalue()[:int(kept * buffer.tell())]


@pytest.mark.parametrize("name, data, reason", [
    ("empty.png", b"", "image_empty"), ("text.png", b"no picture at all", "image_unreadable"),
    ("huge.png", png(60_000, 60_000, 8, 2, 64), "image_too_large"),
    ("large.png", png(13_400, 13_400, 8, 2, 64), "image_too_large"),
    ("eps.jpg", EPS, "image_unreadable"), ("a.ppm", b"P6 64 64 255\n" + bytes(12288), "image_unreadable"),
    ("short.png", png(300, 300, 8, 2, 64), "image_unreadable"),
    *((f"cut.{ending}", saved(ending=ending, kept=0.5), "image_unreadable")
      for ending in ("png", "jpg", "webp", "gif")),
    ("dot.png", saved((1, 1)), None), ("low.png", saved((332, 27)), None),
    ("thin.png", saved((28, 28 * 201)), "image_aspect"), ("limit.png", saved((28, 28 * 200)), None)])
def test_files_that_cannot_be_used_have_a_reason(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    for read in (open_image, lambda path: picture_url(Picture(str(path)), 1, 28)):  # the second shrinks it
        with pytest.raises(ImageError, match=name) if reason else nullcontext() as caught:
            read(tmp_path / name)
        assert reason is None or caught.value.reason == reason in IMAGE_REASONS


def colours(path) -> list[tuple]:
    """Return the colours of a picture of one line as it is opened."""
    return list(map(tuple, np.asarray(open_image(path))[0].tolist()))


def test_greys_of_no_known_depth_are_refused_by_all_that_open_pictures(tmp_path):
    rng = random.Random(0)
    values = {kind: [rng.randrange(low, high) for _ in range(40)] for kind, low, high in (
        (1, 0, 4096), (2, -9, 30_000), (3, 0, 1000))}
    noise = Image.frombytes("F", (40, 30), struct.pack("<1200f", *(rng.random() for _ in range(1200))))
    refused = {f"{bits}-{kind}": grey_tiff(values[kind], bits, kind)
               for bits, kind in ((12, 1), (16, 2), (32, 1), (32, 2), (32, 3))}
    refused |= {"white is 0": grey_tiff(values[1], 16, photometric=0)}
    for mode in ("F", "I"):
        noise.convert(mode).save(buffer := io.BytesIO(), "TIFF")
        refused[mode] = buffer.getvalue()
    path = tmp_path / "a.tif"
    for name, data in refused.items():
        path.write_bytes(data)
        for read in (open_image, image_size, lambda path: picture_url(Picture(str(path)), 10**6, 28)):
            with pytest.raises(ImageError, match=r"a\.tif: greys of mode .* expected 8 or 16") as caught:
                read(path)
            assert caught.value.reason == "image_depth", name
        assert check_images(tmp_path, ["a.tif"], []).reason == "image_depth"
    path.write_bytes(grey_tiff([value * 16 for value in values[1]], 16))
    assert colours(path) == [(round(value * 16 / 257),) * 3 for value in values[1]]
    path.write_bytes(grey_tiff([value // 16 for value in values[1]], 8))
    assert colours(path) == [(value // 16,) * 3 for value in values[1]]


@pytest.mark.parametrize("depth, colour", [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_the_colour_that_a_png_calls_transparent_becomes_white_and_no_other(tmp_path, depth, colour):
    """Oracle: the pixels that were written, each scaled to 8 bits by hand. The key is one that is there, one
    that differs from it in the last bit, or one that is nowhere."""
    rng, n, size = random.Random(f"{depth} {colour}"), 3 if colour else 1, 96
    top = (1 << depth) - 1
    for round_ in range(12):
        pixels = [tuple(rng.randrange(top + 1) for _ in range(n)) for _ in range(size)]
        chosen = rng.choice(pixels)
        near = (*chosen[:-1], chosen[-1] ^ 1)
        pixels[5] = near if round_ % 2 else chosen
        key = (chosen, near, tuple(rng.randrange(top + 1) for _ in range(n)))[round_ % 3]
        bits = "".join(f"{value:0{depth}b}" for pixel in pixels for value in pixel)
        line = b"\0" + int(bits, 2).to_bytes(len(bits) // 8)
        path = tmp_path / "a.png"
        path.write_bytes(png(size, 1, depth, colour, line, (b"tRNS", struct.pack(f">{n}H", *key))))
        is_deep = (depth, colour) == (16, 2)  # of which the library keeps the higher bytes
        shown = [tuple(value >> 8 if is_deep else round(value * 255 / top) for value in pixel)
                 for pixel in pixels]
        expected = [WHITE if pixel == key else (tone * 3)[:3] for pixel, tone in zip(pixels, shown)]
        assert colours(path) == expected, (depth, colour, key)
        head, data = sent(path, 10**6)
        assert head == "data:image/jpeg;base64" and Image.open(io.BytesIO(data)).mode == "RGB"


def test_a_file_that_is_no_picture_is_described_alike_each_time(tmp_path):
    """The library's words hold a place in memory."""
    (tmp_path / "a.jpg").write_bytes(b"<html>404</html>")
    details = {check_images(tmp_path, ["a.jpg"], []).detail for _ in range(3)}
    assert len(details) == 1 and "0x" not in details.pop()


def test_smart_size_equals_transformers():
    rng = random.Random(0)
    for _ in range(1000):
        factor = rng.choice((28, 32))
        width, height = (int(2 ** rng.uniform(0, 13)) for _ in range(2))
        low = rng.choice((4, 256)) * factor**2
        high = low * rng.choice((1, 5, 50))
        if max(width, height) / min(width, height) > 200:
            with pytest.raises(ImageError):
                smart_size(width, height, factor, low, high)
        else:
            expected = smart_resize(height, width, factor, low, high)
            assert smart_size(width, height, factor, low, high) == expected[::-1]


def test_resolve_image_stays_in_the_root(tmp_path, picture):
    inner, outer, root = picture("root/a b/ä.png").resolve(), picture("out.png"), tmp_path / "root"
    (root / "link.png").symlink_to(outer)
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    (root / "inner.png").symlink_to(inner)
    assert resolve_image(root, "a b/ä.png") == inner == resolve_image(root, "inner.png")
    for name, reason in [("../out.png", "outside_root"), ("link.png", "outside_root"), ("a b", "missing"),
                         (str(outer), "outside_root"), ("no.png", "missing"), ("a\0.png", "missing"),
                         ("a" * 5000, "missing"), ("loop", "missing"), ("pipe", "missing")]:
        with pytest.raises(ImageError) as caught:
            resolve_image(root, name)
        assert caught.value.reason == f"image_{reason}", name


def test_an_image_is_sent_by_its_content_and_shrunk_to_whole_tokens(tmp_path, picture):
    path = picture("named.png").rename(tmp_path / "named.jpg")
    assert sent(path, 10**6) == ("data:image/png;base64", path.read_bytes())
    path.write_bytes(b"x")
    with pytest.raises(ImageError, match="not a whole picture"):
        picture_url(Picture(str(path)), 10**6, 28)
    shown = Image.open(io.BytesIO(sent(picture("big.png", size=(400, 300)), 100 * 100)[1]))
    assert (shown.format, shown.size) == ("JPEG", smart_size(400, 300, 28, 28 * 28, 100 * 100))


@pytest.mark.parametrize("images, helpers, reason", [
    (["a.png"], ["b.png"], None), (["a.png"], ["a.jpg"], "image_no_op"), (["a.png"], ["line.png"], None),
    (["a.png"], ["green.png"], None),  # as bright as red
    (["a.png"], ["b.png", "a.png"], "image_no_op"), (["flat.jpg"], ["b.png"], "image_flat"),
    (["a.png"], ["no.png"], "image_missing"), (["../x.png"], ["b.png"], "image_outside_root"),
    (["a.png"], ["cut.png"], "image_unreadable"), (["a.png", "a.png"], ["b.png"], None)])
def test_check_images(tmp_path, picture, images, helpers, reason):
    first = picture("a.png", size=(400, 300))
    picture("b.png", size=(400, 300), color="blue"), picture("green.png", size=(400, 300), color="green")
    image = Image.open(first)
    image.save(tmp_path / "a.jpg", quality=90)
    image.paste("black", (10, 200, 12, 280))  # the thinnest mark: two pixels wide
    image.save(tmp_path / "line.png")
    Image.new("RGB", (50, 50), "teal").save(tmp_path / "flat.jpg")
    (tmp_path / "cut.png").write_bytes(first.read_bytes()[:-30])
    checked = check_images(tmp_path, images, helpers)
    assert checked.reason == reason
    if reason:
        culprit = images[0] if reason in ("image_flat", "image_outside_root") else helpers[-1]
        assert culprit in checked.detail
    else:
        assert checked.detail == "" and len(checked.hashes) == len(images) + len(helpers)
