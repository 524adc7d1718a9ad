"""Still images: image files of a folder or of a list, each a sample of one frame.

INPUT is a folder, of which every image at any depth is taken, or a text file with the path of an
image in each line, relative to the file's folder. A store cannot tell one from the other, so there
a list ends in `.txt`. Lines that name a file twice or one that is not there are reported with their
numbers, before any image is read.

The class of an image is the name of its top folder below INPUT, as torchvision's `ImageFolder` has
it, or below the folder of the list; an image that is in no such folder has no label. Classes have
names and no numbers, which would change when a folder is added: the order of classes is that of
`task.names`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator

from data_sharding.images import ENCODER, IMAGE_SUFFIXES, read_image
from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.listing import Keys, Listing, check_folder
from data_sharding.sources.user_list import (
    FileSizes,
    Problems,
    folder_of_list,
    name_lines,
    path_below,
    read_list,
)
from svfap_dist import storage
from svfap_dist.errors import ShardError
from svfap_dist.video.names import suffix_of

log = logging.getLogger(__name__)


def is_image(path: str) -> bool:
    """Return whether a file has an image's suffix and is not hidden.

    Args:
        path: Path or name.
    """
    return suffix_of(path) in IMAGE_SUFFIXES and not os.path.basename(path).startswith(".")


def samples(text: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: the path without its suffix."""
    if _is_list(text):
        return _of_list(text)
    return _of_folder(text)


def _is_list(text: str) -> bool:
    if storage.is_remote(text):
        return suffix_of(text) == "txt"
    return os.path.isfile(storage.local_path(text))


def _of_folder(folder: str) -> Iterator[SourceVideo]:
    check_folder(folder)
    images = Listing(storage.walk_files(folder), is_image)
    if not len(images):
        others = images.num_others
        found = f"{others} files, none of them an image" if others else "no files"
        do = f"check the path; image files end in {', '.join(IMAGE_SUFFIXES)}"
        raise ShardError("No images found", where=folder, found=found, do=do)
    keys = Keys()
    for path, size in images:
        yield _image(folder, path, size, keys)


def _of_list(where: str) -> Iterator[SourceVideo]:
    folder = folder_of_list(where)
    paths = _read_list(where, folder)
    files = FileSizes(folder)
    sizes = {path: size for path in paths if (size := files.find(path)) is not None}
    if not sizes:
        found = f"none of {len(paths)} files, such as {storage.join(folder, next(iter(paths)))}"
        do = f"check the paths, which are relative to {folder}"
        raise ShardError("No listed image exists", where=where, found=found, do=do)
    if missing := [line for path, line in paths.items() if path not in sizes]:
        log.warning("Files of %s that are not there: %s.", where, name_lines(missing))
    keys = Keys()
    for path in sorted(paths):
        misfit = "" if path in sizes else f"line {paths[path]}: no such file"
        if not is_image(path):
            misfit = f"line {paths[path]}: no image, by its suffix"
        yield _image(folder, path, sizes.get(path, 0), keys, misfit)


def _read_list(where: str, folder: str) -> dict[str, int]:
    """Return the paths of a list below the folder, each with the number of its first line."""
    do = f"give paths below {folder}, or put the list into a folder above its images"
    outside = Problems(where, "Path leads out of the folder of the list", do)
    first: dict[str, int] = {}
    same: list[int] = []
    for number, line in enumerate(read_list(where).splitlines(), start=1):
        if not (text := line.strip()):
            continue
        path = path_below(folder, text)
        if path is None:
            outside.add(number, text)
        elif first.setdefault(path, number) != number:
            same.append(number)
    outside.refuse()
    if not first:
        do = "write the path of an image in each line"
        raise ShardError("List has no paths", where=where, found="empty lines only", do=do)
    if same:
        log.warning("Lines of %s that repeat another one count once: %s.", where, name_lines(same))
    return first


def _image(folder: str, path: str, size: int, keys: Keys, misfit: str = "") -> SourceVideo:
    """Return an image below a folder or prefix as a sample."""
    top, slash, _ = path.partition("/")
    is_labeled = slash and top
    return SourceVideo(
        key=keys.assign(os.path.splitext(path)[0], path),
        read=functools.partial(read_image, url := storage.join(folder, path)),
        labels=Labels(set="images", class_name=top).as_dict() if is_labeled else {},
        where=url,
        stamp=f"image {ENCODER} {size}",
        misfit=misfit,
        num_bytes=size,
    )
