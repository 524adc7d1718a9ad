"""Make face crops of any videos, for `svfap shard folder`, which needs videos of one face.

Start with `folder`, the whole job. It calls `record` for each video, which calls `crop`: detections
on some frames (`detect`), tracks with a smooth box per frame (`track`), one square per frame. At
the end `sheet` draws a contact sheet.
"""
