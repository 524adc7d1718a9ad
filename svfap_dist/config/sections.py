"""The sections of a recipe that say what a run reads, computes and writes.

Each field says its unit, its range and, where it comes from the paper, so. What a downstream task
adds to them is in `downstream`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Scales = Annotated[tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...], Field(min_length=1)]


def _tokens_per_stage(value: Any) -> int | tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not numbers or not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("give a whole number greater than 0, or a list of them, one per stage")
    return numbers if isinstance(value, (list, tuple)) else numbers[0]


# One check instead of pydantic's for a union, which would name the union's branches, not the key.
BottleneckTokens = Annotated[int | tuple[int, ...], BeforeValidator(_tokens_per_stage)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    name: str = "pretrain"  # label of the metrics
    url: str = ""  # folder or s3:// prefix of the run's files; required to train
    seed: NonNegative = 0  # of weights, order of samples, windows, crops and masks
    ledger: bool = False  # write (epoch, step, lane, key) of every sample used below ledger/


class DataConfig(Section):
    """Which clips, in which order, cut how."""

    url: str = ""  # folder or s3:// prefix of the shards; required to train
    eval_url: str = ""  # held-out shards; empty: no evaluation
    num_frames: Positive = 16  # frames of a clip (paper: 16)
    sampling_rate: Positive = 4  # frame stride (paper: 4, so a clip spans 61 frames)
    frame_size: Positive = 160  # pixels, height and width of a clip (paper: 160)
    # Clips cut from each decoded window, each with a crop and a mask of its own. A step decodes
    # global_batch_size / repeated_sampling samples; an epoch shows each of them so many times.
    repeated_sampling: Positive = 1
    region: Literal["voxceleb2", "centre", "full"] = (
        "voxceleb2"  # cut before augmentation, see data/clips
    )
    crop_scales: Scales = (1.0, 0.875, 0.75, 0.66)  # of the region's shorter side; released code
    num_lanes: Positive = 8  # slices of an epoch; world sizes that divide it give the same batches
    shuffle_block: Positive = 256  # samples shuffled together inside a lane
    max_bad_fraction: Fraction = 0.01  # share of unreadable samples at which the run stops
    # Processes of a rank that decode. 0: its threads do, and a video that hangs or crashes the
    # decoder takes the run with it.
    decode_workers: NonNegative = 0
    # Longest that a worker may take. With DALI, four times this without an answer end the run.
    decode_seconds: Annotated[float, Field(gt=0.0)] = 30.0
    decode_threads: Positive = 2  # threads of a rank that fetch; twice the workers keep these busy
    # Where planes of `train` shards become RGB. auto: on the device that trains, if that is a GPU.
    colours: Literal["auto", "workers", "device"] = "auto"
    prefetch_bytes: Positive = 512 << 20  # frames kept ready by a rank: 2 step batches at least
    cache_dir: str = ""  # folder for copies of shards, shared by a node's ranks; empty: none
    cache_bytes: Positive = 100 << 30  # bytes that the copies on a node may take


class DecodeConfig(Section):
    """How videos become frames."""

    # pyav: on the CPU. dali: on the GPU; a video that hangs or crashes it takes the run with it.
    # auto: settled once per run, by measurement where both decode the data set; see video/backends.
    backend: Literal["auto", "pyav", "dali"] = "auto"
    pipelines: Positive = 4  # of DALI, per GPU: one alone leaves decoding units idle


class MaskConfig(Section):
    """Which tokens the encoder does not see."""

    # tube: the same patches in every tubelet frame (paper). random: as many in every tubelet frame,
    # but other ones. frame: all patches of whole tubelet frames.
    kind: Literal["tube", "random", "frame"] = "tube"
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9  # share of what is masked (paper: 0.9)
    # Share of the masked tokens that the decoder predicts; below 1, a running cell of 2x2 patches
    # says which (VideoMAE V2's dual masking, there 0.5), and the loss is on those only.
    decoder_ratio: Annotated[float, Field(gt=0.0, le=1.0, multiple_of=0.25)] = 1.0


class ModelConfig(Section):
    """Size of the autoencoder; fields left out take the value of the named size (model/sizes).

    The paper's ablations are each one field here, [mask] or [data]."""

    encoder: Literal["tpsbt", "vit"] = "tpsbt"  # paper: TPSBT; vit: VideoMAE's, the baseline
    size: Literal["nano", "tiny", "small", "base", "large"] = "base"  # of that encoder
    tubelet_size: Positive = 2  # frames of a tubelet (paper: 2)
    patch_size: Positive = 16  # pixels of a patch (paper: 16)
    embed_dim: Positive | None = None
    num_heads: Positive | None = None
    stage_depths: tuple[Positive, ...] | None = None
    temporal_kernel_size: Positive | None = None  # tubelet frames merged between stages (paper: 2)
    # How they are merged: strided convolution (paper), or pooling, which learns nothing.
    temporal_downsampling: Literal["conv", "average", "max"] = "conv"
    # Per tubelet frame (paper: 8); a list has one number for each stage but the first.
    num_bottleneck_tokens: BottleneckTokens | None = None
    pyramid: bool = True  # false: nothing is merged, every stage has all tubelet frames
    bottleneck: bool = True  # false: later stages have standard blocks over all their tokens
    fusion: bool = True  # false: the decoder gets the last stage alone, repeated in time
    decoder_embed_dim: Positive | None = None
    decoder_num_heads: Positive | None = None
    decoder_depth: Positive | None = None

    def overrides(self) -> dict[str, object]:
        """The fields that differ from the named size."""
        fixed = {"size", "tubelet_size", "patch_size"}
        return {name: value for name, value in self if name not in fixed and value is not None}


class OptimConfig(Section):
    """AdamW and its schedule. Learning rates are for a global batch of 256 and are scaled
    linearly."""

    lr: Annotated[float, Field(gt=0.0)] = 3e-4  # released code
    min_lr: Annotated[float, Field(ge=0.0)] = 1e-5  # at the end of the cosine; released code
    warmup_lr: Annotated[float, Field(ge=0.0)] = 1e-6  # at step 0; released code
    warmup_fraction: Fraction = 0.05  # of all steps; released code: 5 of 100 epochs
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # released code
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05  # none on biases, norms and 1-D parameters
    clip_grad_norm: Annotated[float, Field(ge=0.0)] = 0.0  # 0: no clipping (released code)


class TrainConfig(Section):
    """Batch, length, precision, and what is written when."""

    global_batch_size: Positive = 256  # clips of one optimizer step, over all ranks
    micro_batch_size: Positive = 64  # clips of one forward pass on one rank
    epochs: Positive = 100
    max_steps: NonNegative = 0  # optimizer steps; 0: as many as the epochs have
    max_seconds: NonNegative = 0  # of one attempt; then it saves and ends with code 75; 0: no limit
    dtype: Literal["float32", "bfloat16"] = "float32"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2  # DeepSpeed ZeRO stage
    # torch.compile of the model, which takes a minute at the start; wants Triton on a GPU, a C++
    # compiler on a CPU.
    compile: bool = False
    # Keep only what goes into each block and compute the rest again in the backward pass: a third
    # more work, several times less memory.
    activation_checkpointing: bool = False
    log_every: Positive = 10  # steps
    eval_every: NonNegative = (
        0  # steps between evaluations on data.eval_url; 0: at the start and the end
    )
    checkpoint_every: Positive = 1000  # steps
    keep_last: Positive = 3  # newest checkpoints kept
    keep_every: NonNegative = (
        0  # also keep each checkpoint whose step is a multiple of this; 0: none
    )
    threads_per_rank: NonNegative = (
        0  # CPU threads of torch in a rank; 0: cores / ranks of the node
    )
    collective_timeout_seconds: Positive = (
        600  # a rank that does not answer for so long ends the attempt
    )


class ClusterConfig(Section):
    """The worker group that Ray Train starts."""

    num_workers: Positive = 1
    use_gpu: bool = False
    cpus_per_worker: Positive = 1
    max_failures: Annotated[int, Field(ge=-1)] = (
        3  # restarts of the group before giving up; -1: no end. Preempted nodes do not count
    )
    wait_seconds: NonNegative = 0  # for nodes to join before the cluster is called too small


class MetricsConfig(Section):
    """The Prometheus endpoint of each rank."""

    enabled: bool = True
    host: str = "127.0.0.1"  # loopback unless told otherwise
    port: Annotated[int, Field(ge=0, lt=65536)] = (
        0  # of local rank 0, the next for rank 1, ...; 0: any free port
    )
    # Of the driver's (without Ray: rank 0's) list of live ranks for Prometheus; 0: any free port.
    discovery_port: Annotated[int, Field(ge=0, lt=65536)] = 0
    # A run that ends by itself on a non-finite loss stays so long (seconds) for Prometheus to see.
    linger_seconds: Annotated[float, Field(ge=0.0)] = 0.0
