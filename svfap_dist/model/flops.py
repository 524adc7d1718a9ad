"""Floating-point operations per clip, computed from the dimensions, and peak rates of devices.

In: the dimensions of a model, and the numbers of visible and predicted tokens. Out: operations per
clip, by part. A multiply-add counts as two. Only matrix products are counted, as in the published
peak rates; norms, GELU, softmax and sums are not. A training step is three forward passes, because
each product has two in the backward pass; the patch embedding has one, since pixels need no
gradient.

Legend: T tubelet frames, t of a stage, s positions and z bottleneck tokens of a tubelet frame, V
visible tokens and M tokens to predict, N = V + M, D encoder width, E decoder width.
"""

from __future__ import annotations

import itertools
import operator
import pkgutil
from collections.abc import Mapping
from typing import Any

from svfap_dist.model.sizes import ENCODERS, Size

EMBEDDING = "patch embedding"
_MLP_RATIO = 4


def autoencoder(size: Size, visible: int, masked: int) -> dict[str, int]:
    """Return operations of the autoencoder's forward pass over one clip, by part.

    Args:
        size: dimensions.
        visible: tokens that the encoder sees.
        masked: tokens that the decoder predicts.
    """
    tubelets = size.num_visible_tubelets or size.num_tubelets
    width, tokens = size.decoder_embed_dim, visible + masked
    # The last block outputs the masked tokens only.
    blocks = [_block(tokens, width)] * (size.decoder_depth - 1) + [_block(tokens, width, masked)]
    return {
        **_encoder(size, visible, tubelets),
        "decoder": _linear(visible, size.embed_dim, width) + sum(blocks),
        "head": _linear(masked, width, size.patch_dim),
    }


def dense_autoencoder(size: Size, visible: int, masked: int) -> dict[str, int]:
    """Return operations of an autoencoder that embeds all patches and decodes all tokens.

    The paper's figures count it so: its code computes embeddings of masked patches and decoder
    outputs of visible tokens, neither of which the loss uses.

    Args:
        size: dimensions.
        visible: tokens that the encoder sees.
        masked: tokens that the decoder predicts.
    """
    width, tokens = size.decoder_embed_dim, visible + masked
    return {
        **autoencoder(size, visible, masked),
        EMBEDDING: _linear(size.num_tokens, size.patch_dim, size.embed_dim),
        "decoder": _linear(visible, size.embed_dim, width)
        + size.decoder_depth * _block(tokens, width),
    }


def classifier(
    size: Size, num_outputs: int, pool: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Return operations of the classifier's forward pass over one clip, by part.

    Args:
        size: dimensions.
        num_outputs: classes or dimensions.
        pool: see `pooling.build_pool`.
    """
    return {
        **_encoder(size, size.num_tokens, size.num_tubelets),
        **head(size, num_outputs, pool),
    }


def head(size: Size, num_outputs: int, pool: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Return operations of what follows a classifier's encoder, over one clip, by part.

    Args:
        size: dimensions.
        num_outputs: classes or dimensions.
        pool: see `pooling.build_pool`.
    """
    pool, dim = pool or {}, size.embed_dim
    merged = itertools.accumulate((1, *size.merge_factors), operator.mul)
    tokens = [size.num_tokens // frames for frames in merged]  # of each stage
    chosen = tokens if pool.get("stages") == "all" else tokens[-1:]
    vectors, pooling = len(chosen) * pool.get("grid", 1) ** 2, 0
    if pool.get("kind") == "attentive":
        vectors = 1
        pooling = _linear(sum(chosen), dim, 2 * dim) + _attention(1, sum(chosen), dim)
        pooling += 2 * _linear(1, dim, dim) + 2 * _linear(1, dim, _MLP_RATIO * dim)
    return {"pooling": pooling, "head": _linear(vectors, dim, num_outputs)}


def training_step(forward: Mapping[str, int]) -> int:
    """Return operations of a training step for one clip.

    Args:
        forward: operations of the forward pass, by part.
    """
    return 3 * sum(forward.values()) - forward[EMBEDDING]


def _encoder(size: Size, visible: int, tubelets: int) -> dict[str, int]:
    return pkgutil.resolve_name(ENCODERS[size.encoder].flops)(size, visible, tubelets)


def tpsbt(size: Size, visible: int, tubelets: int) -> dict[str, int]:
    """Return operations of a forward pass of the TPSBT or ViT encoder over one clip, by part.

    Args:
        size: dimensions.
        visible: visible tokens.
        tubelets: tubelet frames that have visible tokens.
    """
    dim, positions = size.embed_dim, visible // tubelets
    parts = {
        EMBEDDING: _linear(visible, size.patch_dim, dim),
        "stage 1": size.stage_depths[0] * _block(visible, dim),
        "downsampling": 0,
        "bottleneck": 0,
    }
    for stage, depth in enumerate(size.stage_depths[1:]):
        factor = size.merge_factors[stage]
        tubelets //= factor
        tokens = tubelets * positions
        if factor > 1 and size.temporal_downsampling == "conv":
            parts["downsampling"] += _linear(tokens, factor * dim, dim)
        if size.bottleneck:
            condensed = tubelets * size.bottleneck_tokens[stage]
            parts["bottleneck"] += _bottleneck(tokens, dim, size.bottleneck_tokens[stage])
            blocks = (depth - 1) * _cross_block(condensed, tokens, dim)
            blocks += _cross_block(tokens, condensed, dim)  # the reverse block
        else:
            blocks = depth * _block(tokens, dim)
        parts[f"stage {stage + 2}"] = blocks
    return parts


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def _attention(queries: int, keys: int, dim: int) -> int:
    """Count scores and weighted sums, over all heads."""
    return 2 * 2 * queries * keys * dim


def _block(tokens: int, dim: int, outputs: int | None = None) -> int:
    """Count a standard block that outputs the last `outputs` (None: all) of its tokens."""
    outputs = tokens if outputs is None else outputs
    after = _linear(outputs, dim, dim) + 2 * _linear(outputs, dim, _MLP_RATIO * dim)
    return _linear(tokens, dim, 3 * dim) + _attention(outputs, tokens, dim) + after


def _cross_block(queries: int, context: int, dim: int) -> int:
    projections = 2 * _linear(queries, dim, dim) + _linear(context, dim, 2 * dim)
    return projections + _attention(queries, context, dim) + _block(queries, dim)


def _bottleneck(positions: int, dim: int, tokens: int) -> int:
    """Count the MLP over all positions that gives the weights, then the weighted sums."""
    hidden = dim // 4
    mlp = _linear(positions, dim, hidden) + _linear(positions, hidden, tokens)
    return mlp + _linear(positions, tokens, dim)


# Dense peak rates in TFLOP/s, by CUDA's name of the device and the type of the factors ("tfloat32":
# rounded float32). Source: NVIDIA's data sheets; half of the rate where they give it with sparsity.
_SXM_HOPPER = {"bfloat16": 989.4, "tfloat32": 494.7, "float32": 66.9}
_NVL_HOPPER = {"bfloat16": 835.5, "tfloat32": 417.5, "float32": 60.0}
_A100 = {"bfloat16": 312.0, "tfloat32": 156.0, "float32": 19.5}
_PEAK_TFLOPS: Mapping[str, Mapping[str, float]] = {
    "NVIDIA B200": {"bfloat16": 2250.0},
    "NVIDIA H200": _SXM_HOPPER,
    "NVIDIA H200 NVL": _NVL_HOPPER,
    "NVIDIA H100 80GB HBM3": _SXM_HOPPER,
    "NVIDIA H100 NVL": _NVL_HOPPER,
    "NVIDIA H100 PCIe": {"bfloat16": 756.0, "tfloat32": 378.0, "float32": 51.0},
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA L40S": {"bfloat16": 362.0, "tfloat32": 183.0, "float32": 91.6},
    "NVIDIA L4": {"bfloat16": 121.0, "tfloat32": 60.0, "float32": 30.3},
    "NVIDIA A10": {"bfloat16": 125.0, "tfloat32": 62.5, "float32": 31.2},
}


def peak_rate(device_name: str, dtype: str) -> float | None:
    """Return a device's peak rate of matrix products, operations per second; None if unknown.

    Args:
        device_name: as CUDA calls it.
        dtype: type of the factors.
    """
    rates = _PEAK_TFLOPS.get(device_name, {})
    return rates[dtype] * 1e12 if dtype in rates else None
