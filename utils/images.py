"""Open, size and send pictures, with a closed reason for each unusable file."""
import base64
import functools
import hashlib
import io
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image, ImageChops, ImageOps
from PIL.ExifTags import Base

from utils.jsonl import DataError

IMAGE_REASONS = ("image_missing", "image_outside_root", "image_empty", "image_unreadable", "image_too_large",
                 "image_aspect", "image_depth", "image_flat", "image_no_op")
MAX_ASPECT = 200  # Qwen's smart_resize refuses more
MAX_PIXELS = 178_956_970  # of one file: Pillow's own bomb limit
REGION_PIXELS = 16384 * 28 * 28  # to which a region is shrunk
MASK_GREY = (127, 127, 127)  # RGB of a masked region
THUMBNAIL = 256  # pixels a side
SAME_BRIGHTNESS = 16  # of 255; JPEG noise stays below, a drawn line of three pixels does not
SAME_COLOUR = 32  # of 255, over 4 x 4 thumbnail pixels: JPEG smears colour at edges
FLAT_WITHIN = 2  # of 255; a picture of one colour, stored as JPEG
# Pillow also opens EPS (by running Ghostscript), PSD, FITS and forty others, whatever the name.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SERVED_FORMATS = ("JPEG", "PNG", "WEBP")  # which every OpenAI-compatible server decodes
JPEG_QUALITY = 92  # of a shrunk picture; PNG takes 17 times as long
KEY_SCALE = {"L;2": 85, "L;4": 17}  # of the greys of 2 and 4 bits of a PNG to 8 bits
# Exceptions of Pillow's readers on damaged pictures, collected by tests/hostile.py.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, MemoryError, OverflowError, LookupError, TypeError,
          AttributeError, ArithmeticError, AssertionError, struct.error, zlib.error, RecursionError,
          NotImplementedError, Image.DecompressionBombError)
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class ImageError(DataError):
    """A picture that cannot be used; `reason` is one of IMAGE_REASONS."""


class Picture(NamedTuple):
    """An image of a prompt: a file, or its region `box` (after EXIF) by `crop_region`."""

    path: str
    box: Box | None = None
    min_pixels: int = 4 * 28 * 28


# ---- opening
def resolve_image(root: str | Path, relative: str) -> Path:
    """Return the path of a file; ImageError if it is missing or outside `root`, links followed."""
    try:
        path = Path(root, relative).resolve()
        inside, is_file = path.is_relative_to(Path(root).resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL, links in a circle
        raise ImageError(f"{relative[:200]!r}: no file can be there ({error})", "image_missing") from error
    if not inside:
        raise ImageError(f"{relative}: leaves the image root {root}", "image_outside_root")
    if not is_file:
        raise ImageError(f"{path}: no such image; is --image_root {root} right?", "image_missing")
    return path


def read_bytes(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}", "image_missing") from error
    if not data:
        raise ImageError(f"{path}: the file is empty", "image_empty")
    return data


def open_image(path: str | Path) -> Image.Image:
    """Return the picture as RGB: turned as EXIF says, alpha on white, the first frame of an animation.
    ImageError for a broken file or a size that Qwen cannot take."""
    return decode_image(read_bytes(path), path)


def decode_image(data: bytes, path: str | Path) -> Image.Image:
    """`open_image` for bytes already read; `path` is for messages."""
    with opened(io.BytesIO(data), path) as image:
        layout = image.tile[0][3] if image.format == "PNG" and image.tile else None  # of the file's values
        image.load()
        if layout == "RGB;16B" and "transparency" in image.info:
            image.putalpha(mask_of_key(image, data))
        elif layout in KEY_SCALE and "transparency" in image.info:
            image.info["transparency"] *= KEY_SCALE[layout]
        ImageOps.exif_transpose(image, in_place=True)
        return flatten(image)


def mask_of_key(image: Image.Image, data: bytes) -> Image.Image:
    """Return the alpha of a PNG of 16 bits a colour: only all six bytes identify the key."""
    with Image.open(io.BytesIO(data)) as low:
        low.tile = [low.tile[0]._replace(args="RGB;16L")]  # the lower bytes
        bands = [band for both in zip(image.split(), low.split()) for band in both]
    key = struct.pack(">3H", *image.info.pop("transparency"))
    masks = [band.point([255 * (value != byte) for value in range(256)]) for band, byte in zip(bands, key)]
    return functools.reduce(ImageChops.lighter, masks)


@contextmanager
def opened(file: BinaryIO | str | Path, path: str | Path) -> Iterator[Image.Image]:
    """Yield a picture, its size and depth checked by its header; ImageError for any fault."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            check_size(image.size, path)
            check_depth(image, path)
            yield image
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {error}", "image_too_large") from error
    except ImageError:
        raise
    except BROKEN as error:
        words = str(error).partition(" <_io")[0]  # without the place in memory, which differs between runs
        raise ImageError(f"{path}: not a whole picture ({words})", "image_unreadable") from error


def check_size(size: tuple[int, int], path: str | Path) -> None:
    """Raise ImageError for a (width, height) in pixels that cannot be used."""
    found = f"{path}: {size[0]}x{size[1]} pixels, expected"
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{found} at most {MAX_PIXELS:,} in total", "image_too_large")
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(f"{found} an aspect up to {MAX_ASPECT}", "image_aspect")


def check_depth(image: Image.Image, path: str | Path) -> None:
    """Raise ImageError for greys that are not 8 or 16 bits: no file says which of its values is white."""
    if image.mode[0] in "FI" and image.format == "TIFF":
        bits, photometric = map(image.tag_v2.get, (Base.BitsPerSample, Base.PhotometricInterpretation))
        if image.mode in ("F", "I") or (bits, photometric) != ((16,), 1):
            raise ImageError(f"{path}: greys of mode {image.mode}, bits {bits}, photometric {photometric}; "
                             "expected 8 or 16 unsigned bits from black (0) to white", "image_depth")


def flatten(image: Image.Image) -> Image.Image:
    """Return RGB: transparency on white (as vLLM does), 16-bit greys scaled to 8 bits."""
    if image.mode.startswith("I"):  # greys of 0..65535, which Pillow would clip at 255
        key, deep = image.info.pop("transparency", None), image.convert("I")
        image = deep.point([round(value / 257) for value in range(65536)], "L")
        if key is not None:
            image.putalpha(deep.point([255 * (value != key) for value in range(65536)], "L"))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")  # a copy takes up to 700 MB
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)  # in place: alpha_composite would hold two more pictures
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def open_picture(picture: Picture) -> Image.Image:
    """`open_image` of a picture's file, or its resized region."""
    image = open_image(picture.path)
    return image if picture.box is None else crop_region(image, picture.box, picture.min_pixels)


def crop_region(image: Image.Image, box: Box, min_pixels: int) -> Image.Image:
    """Return a part of a picture, resized to multiples of 28 within `min_pixels` and REGION_PIXELS."""
    region = image.crop(box)
    return region.resize(smart_size(*region.size, 28, min_pixels, REGION_PIXELS), Image.Resampling.BICUBIC)


# ---- sizes
def image_size(path: str | Path) -> tuple[int, int]:
    """Return (width, height) in pixels from the header, before EXIF; ImageError if it is invalid."""
    with opened(path, path) as image:
        return image.size


def smart_size(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return Qwen's (width, height): multiples of `factor`, area within bounds, as in transformers'
    `smart_resize` (Qwen2-VL), which takes height before width."""
    check_size((width, height), "a picture")
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    if new_width * new_height > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        return tuple(max(factor, math.floor(side / scale / factor) * factor) for side in (width, height))
    if new_width * new_height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        return tuple(math.ceil(side * scale / factor) * factor for side in (width, height))
    return new_width, new_height


def visual_tokens(path: str | Path, max_pixels: int, min_pixels: int = 28 * 28, factor: int = 28) -> int:
    """Estimate visual tokens from the header; 0 without one."""
    try:
        return math.prod(smart_size(*image_size(path), factor, min_pixels, max_pixels)) // factor**2
    except ImageError:
        return 0


# ---- sending
def picture_url(picture: Picture, max_pixels: int, factor: int) -> str:
    """Return a picture as a data URL: a region as PNG, a file as its own bytes if a server would show the
    model the same pixels.

    A picture larger than `max_pixels`, turned by EXIF, not RGB or grey, animated, or in a rare format is sent
    as JPEG, opened by `open_image` and shrunk by `smart_size` with the model's `factor` (28 or 32).
    """
    buffer = io.BytesIO()
    if picture.box is not None:
        open_picture(picture).save(buffer, "PNG")
        return encode_url("PNG", buffer.getvalue())
    data = read_bytes(picture.path)
    with opened(io.BytesIO(data), picture.path) as image:
        plain = (image.format in SERVED_FORMATS and image.mode in ("RGB", "L")
                 and not image.has_transparency_data
                 and getattr(image, "n_frames", 1) == 1 and image.getexif().get(Base.Orientation, 1) == 1)
        if plain and image.width * image.height <= max_pixels:
            return encode_url(image.format, data)
    image = decode_image(data, picture.path)
    if image.width * image.height > max_pixels:
        image = image.resize(smart_size(*image.size, factor, factor * factor, max_pixels),
                             Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return encode_url("JPEG", buffer.getvalue())


def encode_url(kind: str, data: bytes) -> str:
    return f"data:{Image.MIME[kind]};base64,{base64.b64encode(data).decode('ascii')}"


# ---- checking
class Inspection(NamedTuple):
    """The closed reason against a sample, if any, its detail, and the sha256 of its images."""

    reason: str | None
    detail: str
    hashes: list[str]


def check_images(root: str | Path, images: list[str], helpers: list[str]) -> Inspection:
    """Check a sample's question images and the images of its steps, the `helpers`."""
    hashes, first = [], None
    try:
        for n, name in enumerate([*images, *helpers]):
            path = resolve_image(root, name)
            data = read_bytes(path)
            hashes.append(hashlib.sha256(data).hexdigest())
            small = decode_image(data, path).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
            first = first or small
            if all(high - low <= FLAT_WITHIN for low, high in small.getextrema()):
                return Inspection("image_flat", f"{path}: one colour all over", hashes)
            if n >= len(images) and not differ(first, small):
                return Inspection("image_no_op", f"{path}: shows no more than {images[0]}", hashes)
    except ImageError as error:
        return Inspection(error.reason, str(error), hashes)
    return Inspection(None, "", hashes)


def differ(a: Image.Image, b: Image.Image) -> bool:
    """Return whether two thumbnails of one size differ anywhere by more than JPEG noise."""
    brightness = ImageChops.difference(a.convert("L"), b.convert("L")).getextrema()[1]
    colours = ImageChops.difference(a.reduce(4), b.reduce(4)).getextrema()
    return brightness > SAME_BRIGHTNESS or any(high > SAME_COLOUR for _, high in colours)
