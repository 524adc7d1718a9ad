"""A video as it came -> the same frames stored for training: the profile `train`.

What costs time in training is decoding, and most of what a usual video makes a decoder do is of no
use: pixels outside the region, the frames between the ones of a strided window and those before it.
So the region is cut out here once, and frames are stored phase by phase (`PhaseLayout`), which
makes the frames of a window neighbours, with a key frame every `group` of them; the sample's JSON
says where each packet lies. The result is an ordinary mp4 nevertheless, whose frames are shown in
another order.

video -> planes of its frames (`planes`) -> mp4 (`encode`), as the `profile` has it; equal bytes in
give equal bytes out.
"""

from __future__ import annotations

import base64
import dataclasses
import tempfile

from av.error import FFmpegError

from data_sharding.transcode.encode import encode, read_back
from data_sharding.transcode.planes import spool_planes
from data_sharding.transcode.profile import TrainProfile, TranscodeError, plan_frames, refused
from svfap_dist.video.info import PhaseLayout, VideoInfo
from svfap_dist.video.region import Crop, region

__all__ = ["TrainProfile", "TranscodeError", "transcode"]

_IN_MEMORY_BYTES = 256 << 20  # planes of a video beyond this wait in a temporary file
_MAX_BYTES = 8 << 30  # of planes: two and a half hours of 160 x 160 at 25 frames per second


def transcode(data: bytes, info: VideoInfo, options: TrainProfile) -> tuple[bytes, VideoInfo]:
    """The video in `data`, of which the probe said `info`, as the profile has it: an mp4 and what
    to say about it.

    Raises: TranscodeError if it cannot be decoded through, is too long or has too few pixels.
    """
    crop = _even(region(options.region, info.height, info.width))
    height, width = (options.size, options.size) if options.size else (crop.height, crop.width)
    if min(height, width) < 2:
        raise refused("too_small", f"{info.width}x{info.height} pixels")
    frame_bytes = height * width * 3 // 2
    if frame_bytes * info.num_frames > _MAX_BYTES:
        raise refused("too_long", f"{info.num_frames} frames of {width}x{height} pixels")
    plan, group = plan_frames(info.num_frames, options)
    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, prefix="svfap-transcode-") as spool:
        try:
            colours = spool_planes(data, info, crop, options.size, spool)
        except FFmpegError as error:
            found = f"{type(error).__name__}: {error.strerror or error}"
            raise refused("undecodable", found) from error
        video = encode(spool, plan, info, options, (height, width), colours)
    header, packets = read_back(video, plan)
    order = PhaseLayout(
        phases=options.phases,
        group=group,
        codec_header=base64.b64encode(header).decode(),
        first_byte=packets[0].pos or 0,
        packet_sizes=tuple(packet.size for packet in packets),
        region=options.region,
        **dataclasses.asdict(crop),
        source_height=info.height,
        source_width=info.width,
    )
    return video, VideoInfo(
        info.num_frames, info.fps, width, height, "h264", labels=info.labels, layout=order
    )


def _even(crop: Crop) -> Crop:
    """The crop on whole chroma samples: at even offsets, with even sides, at most a pixel off."""
    return Crop(crop.top & ~1, crop.left & ~1, crop.height & ~1, crop.width & ~1)
