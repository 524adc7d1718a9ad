"""`svfap reconstruct`, `svfap import`, `svfap report`: pictures, released weights, reports."""

from __future__ import annotations

from typing import Annotated

import typer

from svfap_dist.cli.app import AsJson, app, print_result
from svfap_dist.progress import say, waiting


@app.command()
def reconstruct(
    checkpoint: Annotated[str, typer.Argument(help="URL of a run or of a checkpoint.")],
    videos: Annotated[list[str], typer.Argument(metavar="VIDEO...", help="Video files or URLs.")],
    output: Annotated[
        str, typer.Option("-o", "--output", help="PNG file to write.")
    ] = "reconstruction.png",
    show: Annotated[
        str,
        typer.Option(help="frames: reconstructed frames; tokens: attention maps of the encoder."),
    ] = "frames",
) -> None:
    """Draw original, masked and reconstructed frames of videos, or attention maps.

    Example: svfap reconstruct runs/a face.mp4 -o picture.png
    """
    from svfap_dist.errors import ConfigError

    if show not in ("frames", "tokens"):
        raise ConfigError("Unknown kind of picture", "--show", show, "use frames or tokens")
    with waiting(f"Drawing {output}"):
        from svfap_dist.report import reconstruction, token_maps

        make = reconstruction.make if show == "frames" else token_maps.make
        make(checkpoint, videos, output)
    say(f"Picture: {output}")


@app.command("import")
def import_weights(
    official: Annotated[str, typer.Argument(help="Released .pth file.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder or URL to write to.")],
    frame_size: Annotated[
        int | None,
        typer.Option(help="Side of a frame in pixels (default: 160 for SVFAP, 224 for VideoMAE)."),
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a clip (default: 16).")] = None,
    num_heads: Annotated[
        int | None,
        typer.Option(help="Attention heads (default: those of a released network of that width)."),
    ] = None,
    decoder_num_heads: Annotated[
        int | None,
        typer.Option(help="Attention heads of the decoder (default: as for --num-heads)."),
    ] = None,
    stage_depths: Annotated[
        str,
        typer.Option(help="Blocks of each stage, e.g. 12,6,3 (default: those of a named size)."),
    ] = "",
    license: Annotated[
        str,
        typer.Option(
            help="License of the weights (default: CC-BY-NC-4.0 for VideoMAE; SVFAP states none)."
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Convert released SVFAP (fine-tuned) or VideoMAE weights.

    Writes OUTPUT/model.safetensors and OUTPUT/config.json, which `svfap predict`, `extract`, ...
    and finetune.init take.

    Example: svfap import svfap_dfew_fold1.pth -o weights/dfew1
    """
    overrides = {
        "frame_size": frame_size,
        "num_frames": num_frames,
        "num_heads": num_heads,
        "decoder_num_heads": decoder_num_heads,
        "stage_depths": _numbers("--stage-depths", stage_depths) if stage_depths else None,
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    with waiting(f"Converting {official}"):
        from svfap_dist.model import weights

        result = weights.import_file(official, output, given, license)
    print_result(result, as_json)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from svfap_dist.errors import ConfigError

    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        advice = "give whole numbers: 12,6,3"
        raise ConfigError("Unreadable option", option, text, advice) from error


@app.command()
def report(
    run_url: Annotated[
        str, typer.Argument(help="URL of a run, or of one fold of a fine-tuning run.")
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", help="HTML file to write.")
    ] = "report.html",
) -> None:
    """Write one self-contained HTML page about a run.

    Example: svfap report runs/a -o report.html
    """
    with waiting(f"Writing {output}"):
        from svfap_dist.report import page

        page.make(run_url, output)
    say(f"Report: {output}")
