"""What a sharding did, in numbers and for people."""

from __future__ import annotations

import dataclasses

from data_sharding.markers import Tally
from svfap_dist import storage
from svfap_dist.shards.format import REJECTED_NAME, Manifest


@dataclasses.dataclass(frozen=True)
class ShardSummary:
    """What a sharding did, or found done.

    seconds: of video; rejected: videos left out, by reason; bytes_read: of the source's files that
    went into shards; wall_seconds, clips_per_second: of this call, whose samples are new_samples.
    fingerprint_before: of the data set that was there, "" if none was.
    """

    url: str
    num_samples: int
    num_shards: int
    num_bytes: int
    seconds: float
    rejected: dict[str, int]
    already_complete: bool
    fingerprint: str
    bytes_read: int = 0
    wall_seconds: float = 0.0
    clips_per_second: float = 0.0
    new_samples: int = 0
    fingerprint_before: str = ""

    @classmethod
    def of(
        cls, url: str, manifest: Manifest, tally: Tally, *, took: float, before: Manifest | None
    ) -> ShardSummary:
        """The summary of a data set that is complete now; `took` seconds, 0 if it was before."""
        new = manifest.num_samples - (before.num_samples if before else 0)
        return cls(
            url=url,
            num_samples=manifest.num_samples,
            num_shards=len(manifest.shards),
            num_bytes=sum(entry.num_bytes for entry in manifest.shards),
            seconds=tally.seconds,
            rejected=tally.reasons,
            already_complete=not took,
            fingerprint=manifest.fingerprint,
            bytes_read=tally.num_read,
            wall_seconds=took,
            clips_per_second=new / took if took else 0.0,
            new_samples=new,
            fingerprint_before=before.fingerprint if before else "",
        )

    def lines(self) -> list[str]:
        """For people."""
        state = "already complete, nothing to do" if self.already_complete else "complete"
        counts = f"{self.num_samples} samples in {self.num_shards} shards, {self.num_bytes} bytes"
        counts += f" from {self.bytes_read}, {self.seconds / 3600:.3f} hours of video"
        lines = [f"{self.url}: {state}", counts]
        if not self.already_complete:
            speed = f"{self.clips_per_second:.2f} clips/s"
            lines.append(f"{self.new_samples} samples new, {self.wall_seconds:.1f} s, {speed}")
        if self.rejected:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.rejected.items())
            where = storage.join(self.url, REJECTED_NAME)
            lines.append(f"{sum(self.rejected.values())} videos left out: {reasons} (see {where})")
        if self.fingerprint_before not in ("", self.fingerprint):
            lines.append(
                f"The fingerprint was {self.fingerprint_before} and is {self.fingerprint}: a run "
                "that has begun goes by the former, so start a new one for the new samples"
            )
        return lines
