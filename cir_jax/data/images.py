"""Pictures to arrays, byte for byte as PIL and torchvision do it; the only file that imports Pillow."""

import base64
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeAlias

import numpy as np

from cir_jax.data.augment import random_box

if TYPE_CHECKING:
    from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What iPhones and others write into the first bytes of HEIC files.
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")

Source: TypeAlias = "str | os.PathLike | bytes | np.ndarray | Image.Image"


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes the square a model reads.

    Attributes:
      size: side of the square.
      resize: "short" takes the short side to `size` and cuts the centre; "targetpad" does so too, but first puts black
        bars along a picture whose sides differ by the factor `target_ratio` or more, up to that ratio (Baldrati et al.
        2022, "CLIP4Cir"; FTI4CIR, SEARLE); "squash" ignores the aspect ratio.
      short: what "short" takes the short side to before it cuts, where that is more than `size`; None for `size`.
      filter: of the resize, always with antialiasing.
      crop_offset: "round" as torchvision (half to even), "floor" as Hugging Face; one pixel apart when the part to cut
        is 3 modulo 4.
      convert_first: RGB before the resize. False is the order of CLIP, open_clip and FTI4CIR, under which pictures
        with a palette are resized with nearest neighbour and transparent ones by weighted colours.
      background: colour under transparent pixels; None drops the transparency as `Image.convert("RGB")` does, which
        is what the published pipelines do and which shows whatever colour the hidden pixels have.
      mean: subtracted from values in [0, 1].
      std: divides the difference.
      target_ratio: long side by short side, for "targetpad" alone.
      upright: turn the picture as its camera has noted in EXIF; no published pipeline does.
      scale_by_brightest: the square's largest value becomes 1 instead of 255 (MagicLens, which takes the largest of
        the picture before its resize).
    """

    size: int = 224
    resize: Literal["short", "targetpad", "squash"] = "short"
    short: int | None = None
    filter: Literal["bicubic", "bilinear"] = "bicubic"
    crop_offset: Literal["round", "floor"] = "round"
    convert_first: bool = True
    background: tuple[int, int, int] | None = None
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    target_ratio: float = 1.25
    scale_by_brightest: bool = False
    upright: bool = False

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"image size {self.size}; expected at least 1")
        _one_of("resize", self.resize, ("short", "targetpad", "squash"))
        if self.short is not None and (self.short < self.size or self.resize != "short"):
            raise ValueError(
                f"image short is {self.short} with resize {self.resize!r} and size {self.size}; it needs resize "
                "'short' and at least `size`"
            )
        _one_of("filter", self.filter, ("bicubic", "bilinear"))
        _one_of("crop_offset", self.crop_offset, ("round", "floor"))
        if not self.target_ratio >= 1:
            raise ValueError(f"image target_ratio {self.target_ratio}; expected at least 1")


def open_image(source: Source) -> "Image.Image":
    """The decoded picture in the mode of its file.

    The orientation that a camera notes in EXIF is not applied, as in all the published pipelines (`ImageSpec.upright`). Of an animation this
    is the first picture.

    Args:
      source: path, the bytes of a file, a picture of Pillow's, or a uint8 array `[H, W, 3]`.

    Raises:
      OSError: no file at that path, or one that may not be read.
      ValueError: not a picture, a damaged one, or one above Pillow's limit against decompression bombs; an array
        of another type or shape.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise ValueError(
                f"picture array is {source.dtype} {source.shape}; expected uint8 [H, W, 3]"
            )
        return Image.fromarray(source)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), f"picture of {len(source)} bytes")
    if isinstance(source, str | os.PathLike):
        path = Path(source).absolute()
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(
                f"{path}: is a folder, or a link to one; expected the file of a picture"
            )
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise ValueError(f"{path}: is no ordinary file; expected that of a picture")
        with path.open("rb") as file:
            return _decode(file, str(path))
    raise ValueError(
        f"cannot read a picture from {type(source).__name__}; expected a path, bytes, an array or a PIL picture"
    )


def crop(image: Source, spec: ImageSpec) -> np.ndarray:
    """The square of a picture that the model sees, `[size, size, 3]` uint8.

    Applied to its own result it changes nothing, so cut pictures can be kept and prepared later: an array of that very
    shape is taken for one.
    """
    if isinstance(image, np.ndarray) and image.shape == (spec.size, spec.size, 3):
        return np.asarray(open_image(image))
    picture = _upright(open_image(image)) if spec.upright else open_image(image)
    if spec.convert_first:
        picture = _rgb(picture, spec.background)
    if spec.resize == "targetpad":
        picture = _padded(picture, spec.target_ratio)
    picture = _centre(_resize(picture, spec), spec)
    return np.asarray(_rgb(picture, spec.background))


def random_crop(
    image: Source, spec: ImageSpec, share: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A random part of a picture as the square that a model reads, `[size, size, 3]` uint8.

    As torchvision's `RandomResizedCrop`: the part is cut out first and then resized with the spec's filter, whatever its
    aspect ratio. `share` is that of the picture's area, at least and at most.
    """
    from PIL import Image

    picture = _upright(open_image(image)) if spec.upright else open_image(image)
    if spec.convert_first:
        picture = _rgb(picture, spec.background)
    part = picture.crop(random_box(*picture.size, share, rng))
    square = part.resize((spec.size, spec.size), Image.Resampling[spec.filter.upper()])
    return np.asarray(_rgb(square, spec.background))


def prepare(image: Source, spec: ImageSpec) -> np.ndarray:
    """The normalised square, `[size, size, 3]` float32; the operations and their order are torchvision's."""
    pixels = crop(image, spec)
    # A row of a picture at a time: numpy is five times slower over an axis of three.
    values = pixels.reshape(spec.size, -1).astype(np.float32)
    values /= np.float32(max(values.max(), 1) if spec.scale_by_brightest else 255)
    values -= np.tile(np.asarray(spec.mean, np.float32), spec.size)
    values /= np.tile(np.asarray(spec.std, np.float32), spec.size)
    return values.reshape(pixels.shape)


def data_uri(image: Source, longest: int = 256) -> str:
    """A small upright copy on white as a `data:` address for an HTML page; PNG up to 128 pixels, JPEG above."""
    picture = _rgb(_upright(open_image(image)), (255, 255, 255)).copy()
    picture.thumbnail((longest, longest))
    kind = "png" if max(picture.size) <= 128 else "jpeg"
    data = io.BytesIO()
    picture.save(data, kind, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    """The JPEG file of a picture `[H, W, 3]` uint8."""
    data = io.BytesIO()
    open_image(pixels).save(data, "jpeg", quality=quality)
    return data.getvalue()


def _one_of(name, value, choices):
    if value not in choices:
        raise ValueError(f"image {name} is {value!r}; expected one of {', '.join(choices)}")


def _decode(file: BinaryIO, name: str) -> "Image.Image":
    from PIL import Image

    try:
        picture = Image.open(file)
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds, some of them undocumented
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason, remedy = _unknown(file) if unknown else (error, "replace or remove it")
        raise ValueError(f"{name}: cannot be read as a picture ({reason}); {remedy}") from error
    return picture


def _unknown(file: BinaryIO) -> tuple[str, str]:
    """What a file is that Pillow does not recognise, and what to do about it."""
    file.seek(0)
    head = file.read(512)
    if not head:
        return "the file is empty", "replace or remove it"
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS:
        return "HEIC, which Pillow cannot decode", "convert it to JPEG or PNG"
    if b"<svg" in head.lower():
        return "SVG, a drawing and no pixels", "convert it to PNG"
    return "unknown format", "replace or remove it"


def _upright(picture: "Image.Image") -> "Image.Image":
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture)


def _rgb(picture: "Image.Image", background: tuple[int, int, int] | None) -> "Image.Image":
    from PIL import Image

    if background is not None and picture.has_transparency_data:
        under = Image.new("RGBA", picture.size, (*background, 255))
        return Image.alpha_composite(under, picture.convert("RGBA")).convert("RGB")
    if picture.mode.startswith("I;16"):
        # Pillow cuts off at 255, which turns nearly every such picture white; the high byte is the picture.
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "P" and isinstance(picture.info.get("transparency"), bytes):
        picture = picture.copy()
        del picture.info["transparency"]  # same pixels, without Pillow's warning
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _padded(picture: "Image.Image", ratio: float) -> "Image.Image":
    """The picture between two black bars if it is longer than `ratio` allows; the bars' widths are cut to whole."""
    from PIL import Image, ImageOps

    long, short = max(picture.size), min(picture.size)
    if long / short < ratio:
        return picture
    bars = [max(int((long / ratio - side) / 2), 0) for side in picture.size]
    width, height = (side + 2 * bar for side, bar in zip(picture.size, bars))
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"a picture of {picture.size[0]} x {picture.size[1]} is too long: with bars of {width} x {height} it has "
            f"more than {Image.MAX_IMAGE_PIXELS} pixels; cut it"
        )
    # A colour number: under a palette (`convert_first=False`) the bars have the palette's first colour, as originally.
    return ImageOps.expand(picture, (*bars, *bars))


def _resize(picture: "Image.Image", spec: ImageSpec) -> "Image.Image":
    from PIL import Image

    width, height = picture.size
    short, long = min(width, height), max(width, height)
    side = spec.short or spec.size
    scaled = side if spec.resize == "squash" else int(side * long / short)
    size = (side, scaled) if width <= height else (scaled, side)
    if size == picture.size:
        return picture
    if Image.MAX_IMAGE_PIXELS and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"a picture of {width} x {height} is too long: scaled to {size[0]} x {size[1]} it has more than "
            f"{Image.MAX_IMAGE_PIXELS} pixels; cut it"
        )
    return picture.resize(size, Image.Resampling[spec.filter.upper()])


def _centre(picture: "Image.Image", spec: ImageSpec) -> "Image.Image":
    if picture.size == (spec.size, spec.size):
        return picture
    excess = [side - spec.size for side in picture.size]
    left, top = [round(e / 2) if spec.crop_offset == "round" else e // 2 for e in excess]
    return picture.crop((left, top, left + spec.size, top + spec.size))
