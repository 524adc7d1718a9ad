"""Named sizes and their overrides: what is taken, what is refused and in which words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from svfap_dist.errors import ConfigError
from svfap_dist.model import autoencoder, classifier
from svfap_dist.model.sizes import ENCODERS, resolve


def test_overrides_replace_fields_of_the_named_size() -> None:
    size = resolve("base", {"decoder_depth": 2, "stage_depths": [6, 3], "frame_size": 224})
    assert size.stage_depths == (6, 3)
    assert (size.decoder_depth, size.embed_dim, size.patches_per_frame) == (2, 512, 196)
    assert resolve("base", {}).decoder_depth == 4


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_named_size_fits_together(encoder: str) -> None:
    for name, fields in ENCODERS[encoder].sizes.items():
        size = resolve(name, {"encoder": encoder})
        assert {field: getattr(size, field) for field in fields} == fields


def test_the_table_of_encoders_is_read_without_torch() -> None:
    code = "import sys; from svfap_dist.model.sizes import ENCODERS, resolve; resolve('base', {})\n"
    code += "from svfap_dist.config import recipe; recipe.load('tiny_cpu', ['model.encoder=vit'])\n"
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_later_stages_share_a_number_of_bottleneck_tokens_or_have_their_own() -> None:
    assert resolve("base", {}).bottleneck_tokens == (8, 8)
    assert resolve("base", {"num_bottleneck_tokens": [4, 2]}).bottleneck_tokens == (4, 2)
    assert resolve("base", {"encoder": "vit"}).bottleneck_tokens == ()


def test_nothing_is_merged_without_the_pyramid() -> None:
    assert resolve("base", {}).merge_factors == (2, 2)
    flat = resolve("base", {"pyramid": False, "num_frames": 6})
    assert (flat.merge_factors, flat.num_tubelets) == ((1, 1), 3)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("bas", {}, "model.size.*'bas'.*did you mean base"),
        ("enormous", {}, "use one of nano, tiny, small, base, large"),
        ("base", {"embed_dims": 512}, "model.embed_dims.*did you mean embed_dim"),
        ("base", {"embed_dim": "512"}, "model.embed_dim.*'512'.*valid integer"),
        ("base", {"embed_dim": True}, "valid integer"),
        ("base", {"embed_dim": [512]}, "valid integer"),
        ("base", {"decoder_depth": 0}, "greater than 0"),
        ("base", {"stage_depths": 12}, "give a list"),
        ("base", {"stage_depths": ()}, "at least 1 item"),
        ("base", {"stage_depths": (12, 0)}, "greater than 0"),
        ("base", {"num_heads": 7}, "512: not a multiple of num_heads = 7"),
        ("base", {"decoder_num_heads": 5}, "384: not a multiple of decoder_num_heads = 5"),
        ("base", {"embed_dim": 6, "num_heads": 1}, "not a multiple of 4"),
        ("base", {"pyramid": 1}, "model.pyramid.*valid boolean"),
        ("base", {"encoder": "vitt"}, "model.encoder.*did you mean vit"),
        ("base", {"encoder": ["vit"]}, "model.encoder.*valid string"),
        ("base", {"temporal_downsampling": "mean"}, "'conv', 'average' or 'max'"),
        ("base", {"num_bottleneck_tokens": [8, 0]}, "whole number greater than 0, or a list"),
        ("base", {"num_bottleneck_tokens": [8, 4, 2]}, "8, 4, 2.*each stage but the first, 2"),
        ("base", {"encoder": "vit", "stage_depths": [6, 6]}, "6, 6.*vit has at most 1 stage"),
        ("base", {"num_visible_tubelets": 3}, "3 of 8 tubelet frames visible.*multiple of 4"),
        ("base", {"num_visible_tubelets": 12}, "12 of 8 tubelet frames"),
        ("base", {"num_frames": 15}, "15: not a multiple of tubelet_size = 2"),
        ("base", {"frame_size": 170}, "170: not a multiple of patch_size = 16"),
        ("base", {"temporal_kernel_size": 3}, "8 tubelet frames cannot be merged by 3"),
        ("base", {"stage_depths": (1,) * 5}, "between each of 5 stages"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, overrides: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        autoencoder.build(name, **overrides)
    with pytest.raises(ConfigError, match=words):
        classifier.build(name, 7, **overrides)
