"""Still images: every image file below a folder, each a sample of one frame.

The class of an image is the name of its top folder below INPUT, as torchvision's `ImageFolder` has
it; an image that is in no such folder has no label. Classes have names and no numbers, which would
change when a folder is added: the order of classes is that of `task.names`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from data_sharding.images import ENCODER, IMAGE_SUFFIXES, read_image
from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.listing import Keys, Listing, check_folder
from svfap_dist import storage
from svfap_dist.errors import ShardError
from svfap_dist.video.names import suffix_of


def is_image(path: str) -> bool:
    """Return whether a file has an image's suffix and is not hidden.

    Args:
        path: Path or name.
    """
    return suffix_of(path) in IMAGE_SUFFIXES and not os.path.basename(path).startswith(".")


def samples(folder: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: the path without its suffix."""
    check_folder(folder)
    images = Listing(storage.walk_files(folder), is_image)
    if not len(images):
        others = images.num_others
        found = f"{others} files, none of them an image" if others else "no files"
        do = f"check the path; image files end in {', '.join(IMAGE_SUFFIXES)}"
        raise ShardError("No images found", where=folder, found=found, do=do)
    keys = Keys()
    for path, size in images:
        top, slash, _ = path.partition("/")
        is_labeled = slash and top
        yield SourceVideo(
            key=keys.assign(os.path.splitext(path)[0], path),
            read=functools.partial(read_image, url := storage.join(folder, path)),
            labels=Labels(set="images", class_name=top).as_dict() if is_labeled else {},
            where=url,
            stamp=f"image {ENCODER} {size}",
            num_bytes=size,
        )
