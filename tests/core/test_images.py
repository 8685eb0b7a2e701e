"""Opening pictures of every kind, sizes equal to transformers', budgets by hand, closed reasons for the rest.

    python -m pytest tests/test_images.py
"""
import base64
import io
import random
from pathlib import Path

import pytest
from samples import png
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from utils.images import (IMAGE_REASONS, ImageError, budget_sizes, check_images, data_url, image_size,
                          open_image, resolve_image, smart_size)

RED, WHITE = (255, 0, 0), (255, 255, 255)


def two_halves(mode: str, left: object, right: object) -> Image.Image:
    image = Image.new(mode, (60, 40), left)
    image.paste(right, (30, 0, 60, 40))
    return image


def pixels_near(image: Image.Image, left: tuple, right: tuple, within: int = 2) -> bool:
    found = [image.getpixel((5, 5)), image.getpixel((image.width - 5, image.height - 5))]
    return all(abs(a - b) <= within for got, want in zip(found, (left, right)) for a,
               b in zip(got, want, strict=True))


@pytest.mark.parametrize("name, image, left, right", [
    ("rgb.png", two_halves("RGB", RED, "blue"), RED, (0, 0, 255)),
    ("l.png", two_halves("L", 10, 200), (10,) * 3, (200,) * 3),
    ("la.png", two_halves("LA", (10, 0), (10, 255)), WHITE, (10,) * 3),
    ("one.png", two_halves("1", 0, 1), (0,) * 3, WHITE),
    ("rgba.png", two_halves("RGBA", (255, 0, 0, 0), (255, 0, 0, 255)), WHITE, RED),
    ("half.webp", two_halves("RGBA", (255, 0, 0, 128), (255, 0, 0, 255)), (255, 127, 127), RED),
    ("palette.png", two_halves("RGB", RED, "blue").convert("P", palette=Image.Palette.ADAPTIVE), RED,
     (0, 0, 255)),
    ("cmyk.jpg", two_halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), RED, (0, 0, 0)),
    ("deep.png", two_halves("I;16", 257 * 10, 257 * 200), (10,) * 3, (200,) * 3),
    ("deep.tif", two_halves("I", 257 * 10, 257 * 200), (10,) * 3, (200,) * 3),
])
def test_every_mode_becomes_rgb(tmp_path, name, image, left, right):
    image.save(tmp_path / name)
    opened = open_image(tmp_path / name)
    assert opened.mode == "RGB" and opened.size == (60, 40)
    assert pixels_near(opened, left, right, within=6 if name.endswith((".jpg", ".webp")) else 2)


def test_palette_transparency_lies_on_white(tmp_path):
    image = two_halves("P", 0, 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "p.png", transparency=0)
    assert pixels_near(open_image(tmp_path / "p.png"), WHITE, (0, 0, 255))


def test_exif_turns_the_picture(tmp_path):
    image = two_halves("RGB", RED, "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert opened.size == (40, 60) and pixels_near(opened, RED, (0, 0, 255))
    assert image_size(tmp_path / "turned.png") == (60, 40)


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [two_halves("RGB", RED, "blue"), two_halves("RGB", "green", "green")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert pixels_near(open_image(tmp_path / "moving.gif"), RED, (0, 0, 255))


@pytest.mark.parametrize("name, data, reason", [
    ("empty.png", b"", "image_empty"), ("text.png", b"no picture at all", "image_unreadable"),
    ("huge.png", png(60_000, 60_000, 8, 2, 64), "image_too_large"),
    ("large.png", png(13_400, 13_400, 8, 2, 64), "image_too_large"),
    ("short.png", png(300, 300, 8, 2, 64), "image_unreadable"),
])
def test_bytes_that_are_no_picture(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=name) as caught:
        open_image(tmp_path / name)
    assert caught.value.reason == reason in IMAGE_REASONS


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif"])
def test_a_truncated_picture_is_unreadable(tmp_path, ending):
    noise = Image.frombytes("RGB", (80, 80), random.Random(0).randbytes(80 * 80 * 3))
    noise.save(tmp_path / f"whole.{ending}")
    data = (tmp_path / f"whole.{ending}").read_bytes()
    (tmp_path / f"cut.{ending}").write_bytes(data[:len(data) // 2])
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / f"cut.{ending}")
    assert caught.value.reason == "image_unreadable"


@pytest.mark.parametrize("size, reason", [((1, 1), "image_too_small"), ((27, 500), "image_too_small"),
                                          ((28, 28 * 201), "image_aspect"), ((28, 28 * 200), None)])
def test_sizes_that_qwen_cannot_take(tmp_path, size, reason):
    Image.new("RGB", size).save(tmp_path / "x.png")
    if reason is None:
        assert open_image(tmp_path / "x.png").size == size
        return
    with pytest.raises(ImageError, match="expected") as caught:
        open_image(tmp_path / "x.png")
    assert caught.value.reason == reason


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


@pytest.mark.parametrize("sizes, budget, expected", [
    ([(100, 100)], (2000, 1280, 28), [(100, 100)]),  # within the total: untouched, not even rounded
    ([(1253, 1251)], (2000, 1280, 28), [(1253, 1251)]),  # 1,567,503 of 1,568,000 pixels
    # above 1280 tokens an image but within the total: P does not apply
    ([(1120, 1120)], (2000, 1280, 28), [(1120, 1120)]),
    # r = sqrt(1568000 / 4000000) = 0.6261; 1252 -> 44 * 28 = 1232; 1232^2 > 1280 * 784, s = 0.8131 -> 1001 ->
    # 35 * 28
    ([(2000, 2000)], (2000, 1280, 28), [(980, 980)]),
    # r = sqrt(1568000 / 3000000) = 0.72296: 1445 x 722 -> 1428 x 700 < 1003520; 722 x 722 -> 700 x 700
    ([(2000, 1000), (1000, 1000)], (2000, 1280, 28), [(1428, 700), (700, 700)]),
    # r = sqrt(7840 / 90000) = 0.2951: 88 -> 84, never below one token: 2 -> 28
    ([(300, 290), (300, 10)], (10, 10, 28), [(84, 84), (84, 28)]),
    ([(640, 640)], (100, 25, 32), [(160, 160)]),  # r = 0.5 -> 320 = 100 tokens > 25: s = 0.5 -> 160
    ([], (2000, 1280, 28), []),
])
def test_budget_sizes_by_hand(sizes, budget, expected):
    assert budget_sizes(sizes, *budget) == expected


def test_resolve_image_stays_in_the_root(tmp_path, picture):
    picture("root/a b/ä.png")
    picture("out.png")
    root = tmp_path / "root"
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "inner.png").symlink_to(root / "a b/ä.png")
    assert resolve_image(root, "a b/ä.png") == (root / "a b/ä.png").resolve() == resolve_image(root,
                                                                                               "inner.png")
    for name, reason in [("../out.png", "image_outside_root"), ("link.png", "image_outside_root"),
                         ("a b", "image_missing"),
                         (str(tmp_path / "out.png"), "image_outside_root"), ("no.png", "image_missing")]:
        with pytest.raises(ImageError) as caught:
            resolve_image(root, name)
        assert caught.value.reason == reason, name


def test_data_url_is_the_file_with_the_mime_of_its_content(tmp_path, picture):
    path = picture("named.jpg.png")
    wrong = tmp_path / "named.jpg"
    path.rename(wrong)
    head, _, data = data_url(wrong, 10**6, 28).partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(data) == wrong.read_bytes()
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(ImageError, match="not a whole picture"):
        data_url(tmp_path / "x", 10**6, 28)


@pytest.mark.parametrize("name, mode, size, as_it_is", [
    ("a.png", "RGB", (100, 60), True), ("a.jpg", "RGB", (100, 60), True), ("a.webp", "L", (100, 60), True),
    ("grey.png", "L", (100, 60), True), ("big.png", "RGB", (400, 300), False),
    ("a.gif", "RGB", (100, 60), False),
    ("alpha.png", "RGBA", (100, 60), False), ("palette.png", "P", (100, 60), False),
    ("cmyk.jpg", "CMYK", (100, 60), False),
    ("deep.png", "I;16", (100, 60), False)])
def test_an_image_is_sent_as_it_is_if_it_fits(tmp_path, name, mode, size, as_it_is):
    image = Image.new(mode, size)
    image.paste(1, (0, 0, 50, 30)) if mode == "I;16" else image.paste(Image.new(mode, (50, 30),
                                                                                90 if mode in "LP" else None))
    image.save(tmp_path / name)
    head, _, data = data_url(tmp_path / name, 100 * 100, 28).partition(",")
    data = base64.b64decode(data)
    assert (data == (tmp_path / name).read_bytes()) is as_it_is
    assert head == f"data:{Image.MIME[Image.open(io.BytesIO(data)).format]};base64"
    sent = Image.open(io.BytesIO(data))
    assert sent.mode in ("RGB", "L") and sent.width * sent.height <= 100 * 100
    if not as_it_is:
        assert sent.format == "JPEG" and (size[0] < 400 or sent.width % 28 == sent.height % 28 == 0)
    assert sent.size == open_image(tmp_path / name).size or size[0] == 400


def test_a_turned_image_is_sent_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 60), "red").save(tmp_path / "a.jpg", exif=exif)
    sent = Image.open(io.BytesIO(base64.b64decode(data_url(tmp_path / "a.jpg", 10**6, 28).partition(",")[2])))
    assert sent.size == (60, 100) and sent.getexif().get(0x0112, 1) == 1


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
    found = check_images(tmp_path, images, helpers)
    assert found.reason == reason
    if reason:
        culprit = images[0] if reason in ("image_flat", "image_outside_root") else helpers[-1]
        assert culprit in found.detail
    else:
        assert found.detail == "" and len(found.hashes) == len(images) + len(helpers)


def test_real_photographs_open(shared_data):
    for path in sorted(Path(shared_data, "photos").iterdir()):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
            assert open_image(path).mode == "RGB"
