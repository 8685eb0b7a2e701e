"""Open pictures safely and size them: EXIF, RGB, pixel budgets, closed reasons for what cannot be used."""
import base64
import hashlib
import io
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops, ImageOps

from utils.jsonl import DataError

IMAGE_REASONS = ("image_missing", "image_outside_root", "image_empty", "image_unreadable", "image_too_small",
                 "image_too_large", "image_aspect", "image_flat", "image_no_op")
MIN_SIDE = 28  # pixels; one visual token of Qwen2.5-VL
MAX_ASPECT = 200  # Qwen's smart_resize refuses more
# of one file: Pillow's own bomb limit, checked from the header before anything is decoded
MAX_PIXELS = 178_956_970
REGION_PIXELS = 16384 * 28 * 28  # to which a region is shrunk
THUMBNAIL = 256  # pixels a side, for comparing two pictures
SAME_BRIGHTNESS = 16  # of 255; JPEG noise stays below, a line of three pixels drawn on a photograph does not
SAME_COLOUR = 32  # of 255, over 4 x 4 pixels of the thumbnail: JPEG smears colour at edges
# Pillow also opens EPS (by running Ghostscript), PSD, FITS and forty others, whatever the file is called
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SERVED_FORMATS = ("JPEG", "PNG", "WEBP")  # what every OpenAI-compatible server decodes
JPEG_QUALITY = 92  # of a picture that is sent shrunk; PNG would take 17 times as long to encode
ORIENTATION = 0x0112  # EXIF tag
FLAT_WITHIN = 2  # of 255; a picture of one colour, stored as JPEG
# what Pillow's readers raise on bytes that are no whole picture, found by tests/hostile.py
BROKEN = (OSError, SyntaxError, ValueError, EOFError, MemoryError, OverflowError, LookupError, TypeError,
          AttributeError,
          ArithmeticError, AssertionError, struct.error, zlib.error, RecursionError, NotImplementedError,
          Image.DecompressionBombError)


class ImageError(DataError):
    """A picture that cannot be used; `reason` is one of IMAGE_REASONS."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Picture(NamedTuple):
    """What a prompt shows: a file, or the region `box` of it (left, top, right, bottom in the file's pixels,
    as EXIF turns it), resized to multiples of 28 within `min_pixels` and REGION_PIXELS."""

    path: str
    box: tuple[int, int, int, int] | None = None
    min_pixels: int = 4 * 28 * 28


def resolve_image(root: str | Path, relative: str) -> Path:
    """Return the path of an existing file under `root`; ImageError if it is missing or leaves the root by any
    link."""
    try:
        path = Path(root, relative).resolve()
        inside, is_file = path.is_relative_to(Path(root).resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL, links in a circle
        raise ImageError("image_missing", f"{relative[:200]!r}: no file can be there ({error})") from error
    if not inside:
        raise ImageError("image_outside_root",
                         f"{relative}: leaves the image root {root}; paths are relative to it")
    if not is_file:
        raise ImageError("image_missing", f"{path}: no such image; is --image_root {root} right?")
    return path


def read_bytes(path: str | Path) -> bytes:
    """Return a picture file's bytes; ImageError if there is none or it is empty."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError("image_missing", f"{path}: {error.strerror}") from error
    if not data:
        raise ImageError("image_empty", f"{path}: the file is empty")
    return data


def open_image(path: str | Path) -> Image.Image:
    """Return the picture as RGB: turned as EXIF says, alpha laid on white, first frame of an animation.

    Raises ImageError with a reason for anything that is no picture, is cut off, or has a size that Qwen
    cannot take.
    """
    return decode_image(read_bytes(path), path)


def decode_image(data: bytes, path: str | Path) -> Image.Image:
    """`open_image` for bytes already read; `path` only names them in errors."""
    with opened(data, path) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # else a second picture of up to 700 MB
        return flatten(image)


@contextmanager
def opened(data: bytes, path: str | Path) -> Iterator[Image.Image]:
    """Yield the picture that bytes hold, its size checked; what its reader finds broken, then or later, is an
    ImageError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image.size, path)
            yield image
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_large", f"{path}: {error}") from error
    except ImageError:
        raise
    except BROKEN as error:
        raise ImageError("image_unreadable", f"{path}: not a whole picture ({error})") from error


def check_size(size: tuple[int, int], path: str | Path) -> None:
    """Raise ImageError for a (width, height) in pixels that cannot be used."""
    low, high = min(size), max(size)
    if low * high > MAX_PIXELS:
        raise ImageError("image_too_large",
                         f"{path}: {size[0]}x{size[1]} pixels, at most {MAX_PIXELS:,} are opened")
    if low < MIN_SIDE:
        raise ImageError("image_too_small",
                         f"{path}: {size[0]}x{size[1]} pixels, expected {MIN_SIDE} a side at least")
    if high / low > MAX_ASPECT:
        raise ImageError("image_aspect",
                         f"{path}: {size[0]}x{size[1]} pixels, expected an aspect up to {MAX_ASPECT}")


def flatten(image: Image.Image) -> Image.Image:
    """Return RGB: transparency on white (as vLLM does), 16-bit greys scaled to 8 bits instead of clipped."""
    if image.mode.startswith("I"):  # greys of 0..65535, which Pillow's own conversion would clip at 255
        image = image.convert("F").point(lambda value: value * 255 / 65535).convert("L")
    if image.has_transparency_data:
        # a copy is another picture of up to 700 MB
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)  # in place: alpha_composite would hold two pictures more
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def image_size(path: str | Path) -> tuple[int, int]:
    """Return (width, height) in pixels from the header alone, before EXIF; ImageError if there is none."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except BROKEN as error:
        raise ImageError("image_unreadable", f"{path}: no picture header ({error})") from error


def smart_size(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the (width, height) to which Qwen's image processor resizes: multiples of `factor`, area within
    bounds.

    The numbers of `smart_resize` in transformers (Qwen2-VL), which takes height before width.
    """
    if max(width, height) / min(width, height) > MAX_ASPECT:
        raise ImageError("image_aspect", f"{width}x{height} pixels, expected an aspect up to {MAX_ASPECT}")
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    if new_width * new_height > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        return tuple(max(factor, math.floor(side / scale / factor) * factor) for side in (width, height))
    if new_width * new_height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        return tuple(math.ceil(side * scale / factor) * factor for side in (width, height))
    return new_width, new_height


def visual_tokens(path: str | Path, max_pixels: int, min_pixels: int = 28 * 28, factor: int = 28) -> int:
    """Return about how many visual tokens an image becomes, from its header; 0 if it has none (its call will
    say why)."""
    try:
        width, height = smart_size(*image_size(path), factor, min_pixels, max_pixels)
    except ImageError:
        return 0
    return width * height // factor**2


def budget_sizes(sizes: list[tuple[int, int]], total_tokens: int = 2000, image_tokens: int = 1280,
                 factor: int = 28) -> list[tuple[int, int]]:
    """Return the (width, height) of each image of one sample under a budget of visual tokens.

    Monet's `resize_by_token_budget` (NOVAglow646/Monet src/utils.py) with its defaults: nothing changes
    within the total; above it every image shrinks by one ratio, and only then is each bounded by
    `image_tokens` of its own.
    """
    area, total = factor * factor, sum(width * height for width, height in sizes)
    if total <= total_tokens * area:
        return list(sizes)
    ratio = math.sqrt(total_tokens * area / total)
    budgeted = []
    for width, height in sizes:
        width, height = (max(factor, int(side * ratio) // factor * factor) for side in (width, height))
        if width * height > image_tokens * area:
            scale = math.sqrt(image_tokens * area / (width * height))
            width, height = (max(factor, int(side * scale) // factor * factor) for side in (width, height))
        budgeted.append((width, height))
    return budgeted


def data_url(path: str | Path, max_pixels: int, factor: int) -> str:
    """Return a picture as a data URL: the file's own bytes if a server would show the model the same pixels.

    It would not if the picture is larger than `max_pixels`, turned by EXIF, not RGB or grey, animated, or in
    a format that servers may not know: such a one is opened as `open_image` does, shrunk as Qwen would
    (`smart_size` with the model's `factor`, 28 or 32), and sent as JPEG. The MIME type comes from the
    content, not from the name.
    """
    data = read_bytes(path)
    with opened(data, path) as image:
        plain = (image.format in SERVED_FORMATS and image.mode in ("RGB", "L")
                 and not image.has_transparency_data
                 and getattr(image, "n_frames", 1) == 1 and image.getexif().get(ORIENTATION, 1) == 1)
        if plain and image.width * image.height <= max_pixels:
            return as_url(image.format, data)
    image = decode_image(data, path)
    if image.width * image.height > max_pixels:
        image = image.resize(smart_size(*image.size, factor, factor * factor, max_pixels),
                             Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return as_url("JPEG", buffer.getvalue())


def as_url(kind: str, data: bytes) -> str:
    """Return a picture's bytes, in one of Pillow's formats, as a data URL."""
    return f"data:{Image.MIME[kind]};base64,{base64.b64encode(data).decode('ascii')}"


def open_picture(picture: Picture) -> Image.Image:
    """Return a picture as `open_image` does, or its region cut out and resized; ImageError if either cannot
    be."""
    image = open_image(picture.path)
    if picture.box is None:
        return image
    region = image.crop(picture.box)
    size = smart_size(*region.size, 28, picture.min_pixels, REGION_PIXELS)
    return region.resize(size, Image.Resampling.BICUBIC)


def picture_url(picture: Picture, max_pixels: int, factor: int) -> str:
    """Return a picture as a data URL: a file as `data_url` sends it, a region as PNG."""
    if picture.box is None:
        return data_url(picture.path, max_pixels, factor)
    buffer = io.BytesIO()
    open_picture(picture).save(buffer, "PNG")
    return as_url("PNG", buffer.getvalue())


class Look(NamedTuple):
    """What was found in a sample's images: the first of IMAGE_REASONS that holds or None, in words, and each
    file's sha256."""

    reason: str | None
    detail: str
    hashes: list[str]


def check_images(root: str | Path, images: list[str], helpers: list[str]) -> Look:
    """Look at a sample's images. `helpers` are the pictures of its steps; one that shows no more than the
    first question image is image_no_op."""
    hashes, first = [], None
    try:
        for n, name in enumerate([*images, *helpers]):
            path = resolve_image(root, name)
            data = read_bytes(path)
            hashes.append(hashlib.sha256(data).hexdigest())
            small = decode_image(data, path).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
            first = first or small
            if all(high - low <= FLAT_WITHIN for low, high in small.getextrema()):
                return Look("image_flat", f"{path}: one colour all over", hashes)
            if n >= len(images) and not differ(first, small):
                return Look("image_no_op", f"{path}: shows no more than {images[0]}", hashes)
    except ImageError as error:
        return Look(error.reason, str(error), hashes)
    return Look(None, "", hashes)


def differ(one: Image.Image, other: Image.Image) -> bool:
    """Return whether two thumbnails of one size differ anywhere by more than JPEG noise."""
    brightness = ImageChops.difference(one.convert("L"), other.convert("L")).getextrema()[1]
    colours = ImageChops.difference(one.reduce(4), other.reduce(4)).getextrema()
    return brightness > SAME_BRIGHTNESS or any(high > SAME_COLOUR for _, high in colours)


GREY = (127, 127, 127)
