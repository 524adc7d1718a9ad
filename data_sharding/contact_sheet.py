"""A picture of a data set: first and middle frame of random samples, each with its key.

What a sheet shows at a glance: faces cut off, videos upside down, one video a hundred times, the
wrong region. Samples are drawn evenly over all; each is one ranged read.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator

import av
from av.error import FFmpegError
from PIL import Image, ImageDraw

from svfap_dist import storage
from svfap_dist.errors import DecodeError
from svfap_dist.shards import format as shard_format
from svfap_dist.video.info import VideoInfo, load_info, stored_position

_SIDE, _CAPTION, _COLUMNS = 160, 14, 4  # pixels; samples in a row
_GREY = (96, 96, 96)


def draw_contact_sheet(url: str, png: str, *, num_samples: int = 24, seed: int = 0) -> None:
    """Write a PNG of so many samples (or all, if they are fewer) to the path or URL `png`.

    Raises: ShardError if the data set is incomplete or damaged; DecodeError; StorageError.
    """
    samples = list(_random_samples(url, num_samples, seed))
    columns = min(_COLUMNS, len(samples))
    rows = -(-len(samples) // columns)
    width, height = 2 * _SIDE, _SIDE + _CAPTION
    sheet = Image.new("RGB", (columns * width, rows * height), _GREY)
    draw = ImageDraw.Draw(sheet)
    for number, (key, info, video) in enumerate(samples):
        row, column = divmod(number, columns)
        left, top = column * width, row * height
        for place, frame in enumerate((0, info.num_frames // 2)):
            picture = _frame(key, video, info, frame)
            picture.thumbnail((_SIDE, _SIDE))
            sheet.paste(picture, (left + place * _SIDE, top + _CAPTION))
        # The end of a key tells more than its start.
        draw.text((left + 2, top + 1), key[-50:], fill="white")
    file = io.BytesIO()
    sheet.save(file, "PNG")
    storage.write_bytes(png, file.getvalue())


def _random_samples(url: str, count: int, seed: int) -> Iterator[tuple[str, VideoInfo, bytes]]:
    manifest = shard_format.load_manifest(url)
    count = min(count, manifest.num_samples)
    chosen = sorted(random.Random(seed).sample(range(manifest.num_samples), count))  # noqa: S311
    firsts = itertools.accumulate((entry.num_samples for entry in manifest.shards), initial=0)
    for entry, first in zip(manifest.shards, firsts, strict=False):
        rows = [number - first for number in chosen if first <= number < first + entry.num_samples]
        if not rows:
            continue
        index = shard_format.load_index(url, entry)
        for row in rows:
            start, size = index.offsets[row], index.sizes[row]
            content = storage.read_range(storage.join(url, entry.name), start, start + size)
            members = shard_format.tar_members(content)
            info = load_info(members.pop("json"))
            yield index.keys[row], info, next(iter(members.values()))


def _frame(key: str, video: bytes, info: VideoInfo, number: int) -> Image.Image:
    """Frame `number` of a video, counted as it is shown."""
    place = stored_position(number, info.num_frames, info.layout.phases) if info.layout else number
    try:
        with av.open(io.BytesIO(video), "r") as container:
            frame = next(itertools.islice(container.decode(video=0), place, None))
            return frame.to_image()
    except (FFmpegError, StopIteration) as error:
        raise DecodeError(
            "Cannot decode a sample", where=key, found=repr(error), do="run `svfap shards verify`"
        ) from error
