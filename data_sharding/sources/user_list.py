"""Lists of files that users write, by hand or by a spreadsheet: their paths and their mistakes.

Paths are relative to a folder, mostly that of the list, and may not lead out of it. What is wrong
is reported with the lines that have it, before any file is read.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
from collections.abc import Sequence

from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.text_file import SAVE_AS_UTF8, decode_text

_EXAMPLES = 5


@dataclasses.dataclass
class Problems:
    """The lines with one kind of mistake, so that one error names them all."""

    where: str  # the list
    what: str
    do: str
    lines: list[int] = dataclasses.field(default_factory=list)
    first: str = ""  # what the first of them has

    def add(self, line: int, found: str) -> None:
        """Add a line.

        Args:
            line: Its number.
            found: What it has.
        """
        self.lines.append(line)
        self.first = self.first or found

    def refuse(self) -> None:
        """Raise the error, if any line was added."""
        if self.lines:
            where = f"{self.where}, {name_lines(self.lines)}"
            raise ShardError(self.what, where, self.first, self.do)


def name_lines(numbers: Sequence[int]) -> str:
    """Return "line 7", or "lines 7, 9 and 12 more".

    Args:
        numbers: Of the lines.
    """
    shown = ", ".join(map(str, numbers[:_EXAMPLES]))
    more = f" and {len(numbers) - _EXAMPLES} more" if len(numbers) > _EXAMPLES else ""
    return f"line{'s' * (len(numbers) > 1)} {shown}{more}"


def read_list(where: str) -> str:
    """Return the text of a list.

    Args:
        where: Path or URL of the list.

    Raises:
        ConfigError: There is none.
        ShardError: It is not UTF-8.
    """
    try:
        return decode_text(storage.read_bytes(where))
    except storage.StorageMissingError as error:
        raise ConfigError("No such list", where, "nothing there", "check the path") from error
    except ValueError as error:
        raise ShardError("List is not UTF-8 text", where, str(error), SAVE_AS_UTF8) from error


def folder_of_list(url: str) -> str:
    """Return the folder or prefix that a list is in.

    Args:
        url: Path or URL of the list.
    """
    return url.rpartition("/")[0] if storage.is_remote(url) else os.path.dirname(url) or "."


def path_below(folder: str, path: str) -> str | None:
    """Return a path of a list relative to the folder; None if it leads out of it.

    Args:
        folder: Folder or prefix of the files.
        path: As the list has it: relative to the folder, absolute or a URL.
    """
    if storage.is_remote(path) or os.path.isabs(path):
        base = folder if storage.is_remote(folder) else os.path.abspath(folder)
        below = path.removeprefix(base.rstrip("/") + "/")
        if below == path:
            return None
        path = below
    path = posixpath.normpath(path.replace("\\", "/"))  # lists are written on Windows, too
    drive = path[1:2] == ":" and path[0].isalpha()
    outside = path.startswith("/") or path.split("/")[0] in ("..", ".") or drive
    return None if outside or not path.isprintable() else path


class FileSizes:
    """Sizes of the files of a list.

    Args:
        folder: Folder or prefix of the files.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        # A store is listed once; a local folder may be a home with millions of other files.
        self._sizes = storage.list_files(folder) if storage.is_remote(folder) else None

    def find(self, path: str) -> int | None:
        """Return the bytes of a file; None if there is none.

        Args:
            path: Path below the folder.
        """
        if self._sizes is None:
            return storage.file_size(storage.join(self._folder, path))
        return self._sizes.get(path)
