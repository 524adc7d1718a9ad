"""Check files of a checkpoint before they are opened: they may be another's, from a shared store.

DeepSpeed unpickles its files, and unpickling can run any code. The names that a pickle refers to
are read without running it: beside what torch calls safe, only DeepSpeed's classes may be there.
"""

from __future__ import annotations

import copyreg
import enum
import glob
import os
import pkgutil
import shutil
import tarfile

from svfap_dist.errors import CheckpointError

_DO = "use checkpoints of runs that you trust only; delete this one's COMMIT to use the one before"
_NUMPY = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")


def refuse_code(folder: str) -> None:
    """Check the pickles in a local folder, without loading them.

    Args:
        folder: With DeepSpeed's files (*.pt) of one checkpoint, at any depth.

    Raises:
        CheckpointError: A file is damaged, or loads something that may run code.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    for path in glob.glob(os.path.join(glob.escape(folder), "**", "*.pt"), recursive=True):
        try:
            names = get_unsafe_globals_in_checkpoint(path)
        except Exception as error:  # of any kind, for a file that is none of torch's
            raise CheckpointError("Checkpoint is damaged", path, repr(error), _DO) from error
        if strange := sorted(name for name in names if not _is_harmless(name)):
            found = f"it loads {', '.join(strange[:3])}"
            raise CheckpointError("Checkpoint file may run code", path, found, _DO)


def _is_harmless(name: str) -> bool:
    """Return whether a name is numpy's scalar or a class of DeepSpeed (`fragment_address`, ...)."""
    if name in _NUMPY:
        return True
    if not name.startswith(("deepspeed.runtime.", "deepspeed.utils.")):
        return False
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(found, type) and found.__module__.startswith("deepspeed.")


def pickle_by_value(kind: type[enum.Enum]) -> None:
    """Make pickles have members of an enum, such as DeepSpeed's ZeRO stage, as class and value.

    Some releases of Python 3.11, such as 3.11.2 of Debian 12, call `getattr` on loading, which
    `refuse_code` refuses.

    Args:
        kind: The enum.
    """
    copyreg.pickle(kind, lambda member: (kind, (member.value,)))


def extract_files(path: str, folder: str) -> None:
    """Unpack a tar of plain files and folders.

    Args:
        path: The tar, not compressed.
        folder: Where to unpack it.

    Raises:
        CheckpointError: A member is something else (a link, a device, a sparse file), would be
            written elsewhere, or is cut short.
    """
    # Python 3.11.2 (Debian 12) has no filters for this.
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _extract_file(tar, member, folder)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError("Checkpoint is damaged", path, repr(error), _DO) from error


def _extract_file(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: str) -> None:
    if not (member.isreg() or member.isdir()) or member.issparse() or member.size < 0:
        raise tarfile.ReadError(f"{member.name!r} is neither a plain file nor a folder")
    if os.path.isabs(member.name) or ".." in member.name.split("/"):
        raise tarfile.ReadError(f"{member.name!r} is outside of the folder")
    target = os.path.join(folder, member.name)
    os.makedirs(target if member.isdir() else os.path.dirname(target), exist_ok=True)
    if content := tar.extractfile(member):
        with content, open(target, "wb") as file:
            shutil.copyfileobj(content, file)
