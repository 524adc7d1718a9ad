"""Draw a picture of a data set: first and middle frame of random samples, each with its key.

It shows at a glance faces that are cut off, videos upside down, one video a hundred times, the
wrong region. Samples are drawn uniformly from all shards; each is one ranged read.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from PIL import Image

from svfap_dist import storage
from svfap_dist.errors import DecodeError
from svfap_dist.shards import format as shard_format
from svfap_dist.video import image_grid
from svfap_dist.video.backends import decode
from svfap_dist.video.frames import whole_frames
from svfap_dist.video.info import VideoInfo, load_info

_SIDE, _COLUMNS, _BACKGROUND = 160, 4, "dimgray"  # pixels; samples in a row


def draw_contact_sheet(url: str, png: str, *, num_samples: int = 24, seed: int = 0) -> None:
    """Write a PNG of random samples.

    Args:
        url: Folder or prefix of the data set.
        png: Path or URL to write to.
        num_samples: Samples to draw; all if there are fewer.
        seed: Seed of the choice.

    Raises:
        ShardError: The data set is incomplete or damaged.
        DecodeError: A sample cannot be decoded.
    """
    cells = [
        image_grid.add_caption(
            [_frame(key, video, info, number) for number in (0, info.num_frames // 2)],
            key,
            _BACKGROUND,
        )
        for key, info, video in _random_samples(url, num_samples, seed)
    ]
    rows = [("", cells[i : i + _COLUMNS]) for i in range(0, len(cells), _COLUMNS)]
    storage.write_bytes(png, image_grid.png_of(image_grid.draw_grid(rows, _BACKGROUND)))


def _random_samples(url: str, count: int, seed: int) -> Iterator[tuple[str, VideoInfo, bytes]]:
    """Yield key, JSON and video of each chosen sample."""
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
    """Return a frame, by its number in display order, scaled down to fit a cell."""
    try:
        picture = Image.fromarray(whole_frames(decode(video, info, [number]))[0])
    except DecodeError as error:
        do = "run `svfap shards verify`"
        raise DecodeError("Cannot decode a sample", key, str(error), do) from error
    picture.thumbnail((_SIDE, _SIDE))
    return picture
