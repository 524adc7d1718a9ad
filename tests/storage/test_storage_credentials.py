"""URLs with credentials are refused everywhere, by errors that do not repeat them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import svfap_dist
from svfap_dist import storage
from svfap_dist.config import recipe
from svfap_dist.errors import ConfigError
from svfap_dist.storage.credentials import refuse_credentials

SECRET = "hush"
WITH_CREDENTIALS = [
    f"s3://AKIA:{SECRET}@bucket/prefix",
    f"s3://{SECRET}@bucket/prefix",
    f"s3://AKIA:ab/{SECRET}/cd@bucket/prefix",
    f"S3://AKIA:{SECRET}@bucket",
    f"https://user:{SECRET}@host/a.mp4",
    f"https://{SECRET}@host:9000/a.mp4",
    f"https://host/a.mp4?X-Amz-Date=1&X-Amz-Signature={SECRET}",
    f"https://account.blob.core.windows.net/a.mp4?sv=1&sig={SECRET}",
    f"https://host/a.mp4?access_token={SECRET}",
    f"sftp://user:{SECRET}@host/a.mp4",
]
WITHOUT = [
    "s3://bucket/a@b:c?token=1",
    "s3://arn:aws:s3:us-west-2:1:accesspoint/name/a@b",
    "abfs://container@account.dfs.core.windows.net/a",
    "sftp://user@host/a",
    "http://127.0.0.1:9000/a@b",
    "https://host/a.mp4?page=2",
    "/folder/user:word@host",
    "train.max_steps=3",
]


@pytest.mark.parametrize("url", WITH_CREDENTIALS)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "tiny_cpu"\n[run]\nurl = "{url}"\n')
    calls = {
        "override 1": lambda: recipe.load("tiny_cpu", [f"data.url={url}"]),
        f"run.url in {path}": lambda: recipe.load(str(path)),
        "a URL that was given": lambda: svfap_dist.load(url.replace("S3:", "s3:")),
    }
    for where, call in calls.items():
        with pytest.raises(ConfigError, match="URL contains credentials") as caught:
            call()
        assert SECRET not in str(caught.value)
        assert caught.value.where == where
        assert "AWS_SECRET_ACCESS_KEY" in caught.value.do


@pytest.mark.parametrize("text", WITHOUT)
def test_other_urls_are_not_refused(text: str) -> None:
    refuse_credentials(text, "here")


@pytest.mark.parametrize(
    "arguments",
    [
        ["shard", "folder", "URL", "out"],
        ["pretrain", "tiny_cpu", "data.url=URL", "run.url=out"],
        ["pretrain", "tiny_cpu", "URL"],
        ["no-such-verb", "URL"],
    ],
)
def test_the_command_line_does_not_repeat_credentials(arguments: list[str], tmp_path: Path) -> None:
    words = [word.replace("URL", WITH_CREDENTIALS[0]) for word in arguments]
    command = [sys.executable, "-m", "svfap_dist", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "error: URL contains credentials" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_with_credentials_is_refused(
    s3_environment: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, f"http://user:{SECRET}@127.0.0.1:9")
    for call in (storage.read_bytes, storage.exists, storage.list_files, storage.delete):
        before = storage.request_counts()
        with pytest.raises(ConfigError, match=f"Where: {variable}") as caught:
            call("s3://bucket/x")
        assert SECRET not in str(caught.value)
        assert storage.request_counts() == before
