"""Face crops from any videos: what has to happen before `svfap shard folder` if they show more.

video -> frames (`frames`) -> detections on some frames (`detect`) -> tracks, one smooth box per
frame (`track`) -> one square per frame and its mp4 (`crop`) -> a folder of crops (`folder`), and a
contact sheet to look at (`sheet`)
"""
