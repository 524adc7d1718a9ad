"""`svfap reconstruct`, `svfap import`, `svfap report`: what is done with weights and runs."""

from __future__ import annotations

from typing import Annotated

import typer

from svfap_dist.cli.app import AsJson, app, print_result
from svfap_dist.progress import say


@app.command()
def reconstruct(
    checkpoint: Annotated[str, typer.Argument(help="A run or a checkpoint of one")],
    videos: Annotated[list[str], typer.Argument(metavar="VIDEO...", help="Files; URLs too")],
    output: Annotated[str, typer.Option("-o", "--output", help="PNG")] = "reconstruction.png",
    show: Annotated[
        str,
        typer.Option(help="frames: what is reconstructed; tokens: where the encoder looks"),
    ] = "frames",
) -> None:
    """A picture of what a pre-trained network sees.

    Original, masked and reconstructed frames of videos, or where the encoder looks.

    Example: svfap reconstruct runs/a face.mp4 -o picture.png
    """
    from svfap_dist.errors import ConfigError
    from svfap_dist.report import reconstruction, token_maps

    makers = {"frames": reconstruction.make, "tokens": token_maps.make}
    if show not in makers:
        raise ConfigError("No such picture", where="--show", found=show, do="use frames or tokens")
    makers[show](checkpoint, videos, output)
    say(f"Picture: {output}")


@app.command("import")
def import_weights(
    official: Annotated[str, typer.Argument(help="A released .pth file")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder for our weights")],
    frame_size: Annotated[
        int | None, typer.Option(help="Pixels; default: 160 for SVFAP, 224 for VideoMAE")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a clip; default: 16")] = None,
    num_heads: Annotated[
        int | None, typer.Option(help="Only for widths that no released network has")
    ] = None,
    decoder_num_heads: Annotated[int | None, typer.Option(help="As --num-heads")] = None,
    stage_depths: Annotated[
        str, typer.Option(help="e.g. 12,6,3, only where no named size has them")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Bring in released SVFAP or VideoMAE weights.

    Of SVFAP, fine-tuned ones are released.
    Writes OUTPUT/model.safetensors and OUTPUT/config.json, the arguments that build the model.

    Example: svfap import svfap_dfew_fold1.pth -o weights/dfew1
    """
    from svfap_dist.model import weights

    overrides = {
        "frame_size": frame_size,
        "num_frames": num_frames,
        "num_heads": num_heads,
        "decoder_num_heads": decoder_num_heads,
        "stage_depths": _numbers("--stage-depths", stage_depths) if stage_depths else None,
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    print_result(weights.import_file(official, output, given), as_json)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from svfap_dist.errors import ConfigError

    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ConfigError(
            "Unreadable option", where=option, found=text, do="give whole numbers: 12,6,3"
        ) from error


@app.command()
def report(
    run_url: Annotated[str, typer.Argument(help="A run, or one fold of a fine-tuning")],
    output: Annotated[str, typer.Option("-o", "--output", help="HTML")] = "report.html",
) -> None:
    """One self-contained page about a run.

    Example: svfap report runs/a -o report.html
    """
    from svfap_dist.report import page

    page.make(run_url, output)
    say(f"Report: {output}")
