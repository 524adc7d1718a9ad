"""Little data sets for the data plane's tests: shards in which every frame names its sample."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import os
from fractions import Fraction

import av
import numpy as np
import webdataset
from clips import paint_frame, read_frame_number

from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import Manifest, ShardEntry, ShardIndex
from svfap_dist.video.info import VideoInfo, dump_info

FRAMES = 30  # of each video
SIDE = 48  # pixels


def video_of(sample: int) -> bytes:
    """A video whose frame i has the number sample * FRAMES + i painted in."""
    noise = np.random.default_rng(sample).integers(0, 16, (SIDE, SIDE, 3))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        options = {"preset": "ultrafast", "threads": "1", "g": "10"}
        stream = output.add_stream("libx264", rate=Fraction(25), options=options)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for i in range(FRAMES):
            painted = paint_frame(sample * FRAMES + i, (SIDE, SIDE), noise)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(painted, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def sample_and_frame(frame_rgb: np.ndarray) -> tuple[int, int]:
    """The number of the sample and of its frame that are painted into a whole frame."""
    return divmod(read_frame_number(frame_rgb), FRAMES)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Shards in a folder, and what was put into them."""

    url: str
    manifest: Manifest
    videos: list[bytes]

    def damage(self, sample: int) -> None:
        """Change a byte in the middle of a sample's video."""
        for entry in self.manifest.shards:
            if sample < entry.num_samples:
                index = shard_format.load_index(self.url, entry)
                with open(os.path.join(self.url, entry.name), "r+b") as tar:
                    tar.seek(index.offsets[sample] + index.sizes[sample] // 2)
                    byte = tar.read(1)
                    tar.seek(-1, os.SEEK_CUR)
                    tar.write(bytes([byte[0] ^ 255]))
                return
            sample -= entry.num_samples


def write_data_set(
    url: str, sizes: list[int], videos: list[bytes], replace: dict[int, tuple[bytes, VideoInfo]]
) -> DataSet:
    """Write shards of the given sizes; `replace` puts another (video, info) in a sample's place."""
    info = VideoInfo(FRAMES, 25.0, SIDE, SIDE, "h264")
    samples = [replace.get(i, (videos[i], info)) for i in range(sum(sizes))]
    first, entries = 0, []
    os.makedirs(url)
    for number, size in enumerate(sizes):
        rows = range(first, first + size)
        entries.append(write_shard(url, f"shard-{number:06d}.tar", rows, samples))
        first += size
    shortest = min(info.num_frames for _, info in samples)
    manifest = Manifest("folder", "source", 0, shortest, "none", tuple(entries))
    with open(os.path.join(url, shard_format.MANIFEST_NAME), "wb") as file:
        file.write(shard_format.dump(manifest))
    return DataSet(url, manifest, [video for video, _ in samples])


def write_shard(
    url: str, name: str, rows: range, samples: list[tuple[bytes, VideoInfo]]
) -> ShardEntry:
    buffer, borders = io.BytesIO(), [0]
    writer = webdataset.TarWriter(buffer, mtime=0)
    for i in rows:
        video, info = samples[i]
        fields = dump_info(info)
        writer.write({"__key__": f"clip-{i:03d}", "mp4": video, "json": fields})
        borders.append(writer.tarstream.offset)
    writer.close()
    tar = buffer.getvalue()
    index = ShardIndex(
        keys=tuple(f"clip-{i:03d}" for i in rows),
        offsets=tuple(borders[:-1]),
        sizes=tuple(np.diff(borders).tolist()),
        digests=tuple(
            shard_format.digest(tar[start:stop]) for start, stop in itertools.pairwise(borders)
        ),
        num_frames=tuple(samples[i][1].num_frames for i in rows),
        labels=tuple(labels) if any(labels := [samples[i][1].labels for i in rows]) else (),
    )
    raw = shard_format.dump(index)
    entry = ShardEntry(
        name, len(rows), len(tar), hashlib.sha256(tar).hexdigest(), hashlib.sha256(raw).hexdigest()
    )
    for file_name, content in ((entry.name, tar), (entry.index_name, raw)):
        with open(os.path.join(url, file_name), "wb") as file:
            file.write(content)
    return entry
