"""Draw a picture of a data set: first and middle frame of random samples, each with its key.

It shows at a glance faces that are cut off, videos upside down, one video a hundred times, the
wrong region. Samples are drawn uniformly from all shards; each is one ranged read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from PIL import Image

from svfap_dist import storage
from svfap_dist.errors import DecodeError, ShardError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import BadSample, Sample
from svfap_dist.shards.reader import SampleReader
from svfap_dist.video import image_grid
from svfap_dist.video.backends import decode
from svfap_dist.video.frames import whole_frames

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
            [_frame(sample, number) for number in (0, sample.info.num_frames // 2)],
            sample.key,
            _BACKGROUND,
        )
        for sample in _random_samples(url, num_samples, seed)
    ]
    rows = [("", cells[i : i + _COLUMNS]) for i in range(0, len(cells), _COLUMNS)]
    storage.write_bytes(png, image_grid.png_of(image_grid.draw_grid(rows, _BACKGROUND)))


def _random_samples(url: str, count: int, seed: int) -> Iterator[Sample]:
    manifest = shard_format.load_manifest(url)
    count = min(count, manifest.num_samples)
    reader = SampleReader(url, manifest, range_bytes=1)
    for index in sorted(random.Random(seed).sample(range(manifest.num_samples), count)):  # noqa: S311
        sample = reader.read(index)
        if isinstance(sample, BadSample):
            do = f"run `svfap shards verify {url}`"
            raise ShardError("Cannot read a sample", f"{url}, {sample.key}", sample.detail, do)
        yield sample


def _frame(sample: Sample, number: int) -> Image.Image:
    """Return a frame, by its number in display order, scaled down to fit a cell."""
    try:
        frames = decode(sample.video, sample.info, [number])
    except DecodeError as error:
        do = "run `svfap shards verify`"
        raise DecodeError("Cannot decode a sample", sample.key, str(error), do) from error
    picture = Image.fromarray(whole_frames(frames)[0])
    picture.thumbnail((_SIDE, _SIDE))
    return picture
