"""One training example, as it is kept in a shard."""

import io
import json
import warnings
from dataclasses import asdict, dataclass

import numpy as np
from ipadapter_instruct_core.tasks import Task
from PIL import Image

# What Pillow may decode here: of its other formats some start other programs (EPS) or are rarely looked after.
FORMATS = ("JPEG", "PNG", "WEBP")
MOST_PIXELS = 120_000_000  # the largest cameras' pictures; decoded, 360 MB
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of smaller ones


@dataclass(frozen=True)
class Sample:
    """A condition picture, the picture to make from it, and the words that go with it (paper, Sec. 3.4).

    Attributes:
        condition: an encoded picture (JPEG, PNG or WebP).
        target: an encoded picture, or None where it is the condition itself (replication).
        prompt: what the target shows.
        subject: the object's name, "" where the task needs none.
        source_id: where it came from, unique in its dataset.
        group: samples of one group (an identity, a source picture) are never split between train and validation.
        condition_prompt: what the condition shows, "" where it is not known.
    """

    condition: bytes
    target: bytes | None
    prompt: str
    task: Task
    source_id: str
    group: str
    subject: str = ""
    condition_prompt: str = ""

    @property
    def caption(self) -> str:
        """The condition's own text, which CLIP-T and CLIP-S read (Sec. 4.1); "" where it is not known."""
        return self.condition_prompt or (self.prompt if self.target is None else "")

    def members(self) -> dict[str, bytes]:
        """The files of this sample in a shard, by their ending."""
        words = {key: value for key, value in asdict(self).items() if key not in ("condition", "target")}
        words["task"] = self.task.value
        files = {"condition": self.condition, "json": json.dumps(words, ensure_ascii=False).encode()}
        return files if self.target is None else {**files, "target": self.target}

    @classmethod
    def from_members(cls, files: dict[str, bytes]) -> "Sample":
        """Raises KeyError, TypeError or ValueError where the files are not a sample's."""
        words = json.loads(files["json"])
        words["task"] = Task(words["task"])
        return cls(condition=files["condition"], target=files.get("target"), **words)

    def pictures(self) -> tuple[Image.Image, Image.Image]:
        """Condition and target, decoded. Raises ValueError where one of them cannot be."""
        condition = decode_picture(self.condition)
        return condition, condition if self.target is None else decode_picture(self.target)


def decode_picture(content: bytes) -> Image.Image:
    """A whole RGB picture, upright as its EXIF says, transparency laid on white; 16 bits are scaled to 8.

    Raises:
        ValueError: the bytes are no picture in one of `FORMATS`, are cut short, or are of more than `MOST_PIXELS`.
    """
    from PIL import ImageOps

    image = _opened(content)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # grey in 16 bits, which `convert` cuts off at 255
            return Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return image.convert("RGB")
    except Exception as error:  # on damaged files Pillow raises of nearly every kind: struct.error, TypeError, …
        raise ValueError(f"the picture cannot be read ({error})") from error


def picture_size(content: bytes) -> tuple[int, int]:
    """Width and height of an encoded picture as it is stored, by its header. Raises what `decode_picture` raises."""
    return _opened(content).size


def _opened(content: bytes) -> Image.Image:
    """A picture of which only the header was read."""
    from PIL import UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise Image.DecompressionBombError
        return image
    except Image.DecompressionBombError:  # Pillow's own, too, of still larger ones
        raise ValueError(f"it has more than the {MOST_PIXELS // 10**6} million pixels that are read") from None
    except UnidentifiedImageError as error:  # its own text names an address in memory
        raise ValueError("it is no picture file in JPEG, PNG or WebP") from error
    except Exception as error:
        raise ValueError(f"the picture cannot be read ({error})") from error


def encode_picture(image: Image.Image, quality: int = 95) -> bytes:
    """A JPEG of an RGB picture."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
