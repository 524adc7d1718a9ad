"""The sections of a recipe: data, model, training and storage of a run, and its downstream task.

A field's comment has its unit, its range and its source, if that is the paper or the released code.
A downstream protocol is a table too, never a branch in code: the column of the labels that is
learned, the samples that train and test, the metrics, and the published values.
"""

from __future__ import annotations

import pkgutil
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from svfap_dist.errors import nearest

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Port = Annotated[int, Field(ge=0, lt=65536)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Scales = Annotated[tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...], Field(min_length=1)]


def _tokens_per_stage(value: Any) -> int | tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not numbers or not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("give a whole number greater than 0, or a list of them, one per stage")
    return numbers if isinstance(value, (list, tuple)) else numbers[0]


def table(place: str) -> Any:
    """Return a table of another room.

    Imported only when a recipe is checked: the other rooms import this one, and some are slow.

    Args:
        place: "module:attribute", a dict by name or a sequence of names.
    """
    return pkgutil.resolve_name(place)


def _one_of(place: str, *more: str) -> AfterValidator:
    """Return the check that a text is a name in a table, or one of a few others."""

    def check(name: str) -> str:
        if name in more or name in table(place):
            return name
        raise ValueError(nearest(name, [*more, *table(place)]))

    return AfterValidator(check)


# Names from tables of other rooms: a new row there is a new value here.
Backend = Annotated[str, _one_of("svfap_dist.video.backends:BACKENDS", "auto")]
Encoder = Annotated[str, _one_of("svfap_dist.model.sizes:ENCODERS")]
MaskKind = Annotated[str, _one_of("svfap_dist.data.masking:MASKS")]
Region = Annotated[str, _one_of("svfap_dist.video.info:REGIONS")]
SampleKind = Annotated[str, _one_of("svfap_dist.shards.format:KINDS")]


# One check instead of pydantic's for a union, which would name the union's branches, not the key.
BottleneckTokens = Annotated[int | tuple[int, ...], BeforeValidator(_tokens_per_stage)]


def _split_keys(value: Any) -> Any:
    """Return keys as a tuple; a text may have several, so that an override needs no brackets."""
    keys = value.replace(",", " ").split() if isinstance(value, str) else value
    return tuple(keys) if isinstance(keys, list) else keys


Keys = Annotated[tuple[str, ...], BeforeValidator(_split_keys)]


MAX_TRACED_STEPS = 100
SMALLEST_SHARE = 1e-4  # of a source in a mixture


def _true_false_or_auto(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError("use auto, true or false")


# As for BottleneckTokens.
AutoBool = Annotated[bool | Literal["auto"], BeforeValidator(_true_false_or_auto)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunConfig(Section):
    """Storage of a run and what makes it reproducible."""

    name: str = "pretrain"  # label of the metrics
    url: str = ""  # folder or s3:// prefix of the run's files; required to train
    seed: NonNegative = 0  # of weights, order of samples, windows, crops and masks
    ledger: bool = False  # write (epoch, step, lane, key) of each sample used to ledger/
    # Keys that a begun run may continue with other values of, such as train.max_steps.
    allow_change: Keys = ()


def _last_part(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2]


class SourceConfig(Section):
    """One data set of a mixture."""

    url: str  # folder or s3:// prefix of its shards
    weight: Annotated[float, Field(gt=0.0)] = 1.0  # its share is weight / sum of all weights
    region: Region | None = None  # cut before augmentation; None: data.region
    kind: SampleKind | None = None  # that its shards must have; None: data.kind
    name: str = ""  # label of its metrics; empty: the last part of the URL

    @property
    def label(self) -> str:
        """Name in metrics, reports and messages."""
        return self.name or _last_part(self.url)


class DataConfig(Section):
    """The clips of a run, their order, and how they are cut."""

    # Folder or s3:// prefix of the shards. To train, give this or `sources`.
    url: str = ""
    sources: tuple[SourceConfig, ...] = ()  # [[data.sources]]: a mixture of several data sets
    eval_url: str = ""  # held-out shards for the validation loss; empty: none
    num_frames: Positive = 16  # frames of a clip (paper: 16)
    sampling_rate: Positive = 4  # frame stride (paper: 4, so a clip spans 61 frames)
    frame_size: Positive = 160  # pixels, height and width of a clip (paper: 160)
    # Clips cut from each decoded window, each with its own crop and mask. A step decodes
    # global_batch_size / repeated_sampling samples, an epoch shows each sample this many times.
    repeated_sampling: Positive = 1
    region: Region = "voxceleb2"  # cut before augmentation
    kind: SampleKind | None = None  # that the shards must have: videos or images; None: any
    crop_scales: Scales = (1.0, 0.875, 0.75, 0.66)  # of the region's shorter side; released code
    # Longest distance by which a camera pans over a still image during its clip, as a fraction of
    # the crop's shorter side; 0: its frame is repeated unchanged.
    still_motion: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    num_lanes: Positive = 8  # slices of an epoch; world sizes that divide it give the same batches
    shuffle_block: Positive = 256  # samples shuffled together inside a lane
    # Rule of the order of samples and windows (data/sample_order). A run keeps the one it began
    # with; 1: runs that are older than this key.
    order_version: Literal[1, 2] = 2
    max_bad_fraction: Fraction = 0.01  # share of unreadable samples at which the run stops
    # Processes beside a rank that fetch its clips and own its decode workers, so that the rank
    # itself only receives batches; at most one per lane. 0: its threads do that.
    feeders: NonNegative = 0
    # Decoding processes of a rank. 0: its threads decode, and a video that hangs or crashes the
    # decoder ends the run.
    decode_workers: NonNegative = 0
    # Timeout of a worker for one video, in seconds. With DALI, four times this ends the run.
    decode_seconds: Annotated[float, Field(gt=0.0)] = 30.0
    decode_threads: Positive = 2  # threads of a rank that fetch; 2 per worker keep the workers busy
    # Where planes of `train` shards become RGB. auto: on the device that trains, if that is a GPU.
    colors: Literal["auto", "workers", "device"] = "auto"
    prefetch_bytes: Positive = 512 << 20  # decoded frames a rank buffers: 2 step batches at least
    # Bytes of samples that a rank has read and not used yet. 0: the ranks of a node share a quarter
    # of its memory.
    read_ahead_bytes: NonNegative = 0
    cache_dir: str = ""  # folder for a node's copies of shards, shared by its ranks; empty: none
    cache_bytes: Positive = 100 << 30  # limit of these copies on a node

    @property
    def window(self) -> int:
        """Source frames that a clip spans (16 frames at stride 4: 61)."""
        return (self.num_frames - 1) * self.sampling_rate + 1

    @property
    def urls(self) -> tuple[str, ...]:
        """URLs of all data sets that are trained on."""
        return tuple(source.url for source in self.sources) or (self.url,)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of all data sets that are trained on."""
        return tuple(source.label for source in self.sources) or (_last_part(self.url),)

    @property
    def is_mixture(self) -> bool:
        """Whether there are several data sets."""
        return len(self.sources) > 1


class DecodeConfig(Section):
    """How videos become frames."""

    # A row of video/backends, or auto: chosen once per run, by measurement where several backends
    # decode the data set. dali decodes on the GPU; a video that hangs or crashes it ends the run.
    backend: Backend = "auto"
    # DALI pipelines per GPU; one alone leaves decoding units idle. 0: as many as the card has.
    pipelines: NonNegative = 0


class MaskConfig(Section):
    """The tokens that the encoder does not see."""

    # tube: the same patches in every tubelet frame (paper). random: equally many in every tubelet
    # frame, drawn for each. frame: all patches of whole tubelet frames.
    kind: MaskKind = "tube"
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9  # share of masked tokens (paper: 0.9)
    # Share of the masked tokens that the decoder predicts. Below 1 a running cell of 2x2 patches
    # selects them (VideoMAE V2's dual masking, there 0.5), and the loss covers only these.
    decoder_ratio: Annotated[float, Field(gt=0.0, le=1.0, multiple_of=0.25)] = 1.0


class ModelOptions(Section):
    """Fields that a recipe's [model] and `model.sizes.Size` have in common.

    Each of the paper's ablations is one field here, in `ModelConfig`, in [mask] or in [data].
    """

    encoder: Encoder = "tpsbt"  # paper; vit: the baseline
    tubelet_size: Positive = 2  # frames of a tubelet (paper: 2)
    patch_size: Positive = 16  # pixels of a patch, height and width (paper: 16)
    # How tubelet frames are merged between two stages: by a strided convolution (paper), or by
    # pooling without parameters.
    temporal_downsampling: Literal["conv", "average", "max"] = "conv"
    pyramid: bool = True  # false: no merging, every stage has all tubelet frames
    bottleneck: bool = True  # false: later stages have standard blocks over all their tokens
    fusion: bool = True  # false: the decoder gets only the last stage, repeated in time

    @property
    def patch(self) -> tuple[int, int]:
        """Frames and pixels of a patch."""
        return self.tubelet_size, self.patch_size


class ModelConfig(ModelOptions):
    """Size of the autoencoder; omitted fields take the value of the named size (model/sizes)."""

    size: str = "base"  # of that encoder
    embed_dim: Positive | None = None
    num_heads: Positive | None = None
    stage_depths: tuple[Positive, ...] | None = None
    temporal_kernel_size: Positive | None = None  # tubelet frames merged between stages (paper: 2)
    # Per tubelet frame (paper: 8); a list has one number for each stage but the first.
    num_bottleneck_tokens: BottleneckTokens | None = None
    decoder_embed_dim: Positive | None = None
    decoder_num_heads: Positive | None = None
    decoder_depth: Positive | None = None

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: str, info: ValidationInfo) -> str:
        encoder = info.data.get("encoder")  # absent if it is wrong, which is then the error
        encoders = table("svfap_dist.model.sizes:ENCODERS")
        if encoder in encoders and size not in encoders[encoder].sizes:
            raise ValueError(nearest(size, encoders[encoder].sizes))
        return size

    def overrides(self) -> dict[str, object]:
        """Return the fields that are set, and so replace those of the named size."""
        fixed = {"size", "tubelet_size", "patch_size"}
        return {name: value for name, value in self if name not in fixed and value is not None}


class OptimConfig(Section):
    """AdamW and its schedule; learning rates are per 256 clips of global batch, scaled linearly."""

    lr: Annotated[float, Field(gt=0.0)] = 3e-4  # released code
    min_lr: Annotated[float, Field(ge=0.0)] = 1e-5  # end of the cosine; released code
    warmup_lr: Annotated[float, Field(ge=0.0)] = 1e-6  # at step 0; released code
    warmup_fraction: Fraction = 0.05  # of all steps; released code: 5 of 100 epochs
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # released code
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05  # not on biases, norms, 1-D parameters
    clip_grad_norm: Annotated[float, Field(ge=0.0)] = 0.0  # 0: no clipping (released code)


class TrainConfig(Section):
    """Batch size, length, precision, and when logs and checkpoints are written."""

    global_batch_size: Positive = 256  # clips of one optimizer step, over all ranks
    micro_batch_size: Positive = 64  # clips of one forward pass on one rank
    epochs: Positive = 100
    max_steps: NonNegative = 0  # optimizer steps; 0: those of the epochs
    max_seconds: NonNegative = 0  # of one attempt, then save and exit with 75; 0: no limit
    dtype: Literal["float32", "bfloat16"] = "float32"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2  # DeepSpeed ZeRO stage
    # torch.compile each kind of transformer block, and the loss, at the first step; needs Triton
    # (GPU) or a C++ compiler (CPU).
    compile: bool = False
    # Of torch.compile. "reduce-overhead" replays CUDA graphs: for small micro batches, where the
    # host is slower than the GPU.
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    # Keep only each block's input and recompute the rest in the backward pass: a third more
    # operations, several times less memory.
    activation_checkpointing: bool = False
    log_every: Positive = 10  # steps
    # Steps between validations on data.eval_url; 0: only at the start and the end.
    eval_every: NonNegative = 0
    checkpoint_every: Positive = 1000  # steps
    keep_last: Positive = 3  # newest checkpoints kept
    keep_every: NonNegative = 0  # also keep checkpoints at multiples of this step; 0: none
    threads_per_rank: NonNegative = 0  # torch's CPU threads; 0: cores / ranks that share them
    collective_timeout_seconds: Positive = 600  # an unresponsive rank ends the attempt after this
    # Without progress for so long, all ranks write their stacks and are restarted; 0: never. The
    # first steps, evaluations, checkpoints and tests may take collective_timeout_seconds.
    stall_seconds: NonNegative = 120

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps of the whole run: `max_steps`, or those of all epochs.

        Args:
            steps_per_epoch: Optimizer steps of an epoch.
        """
        whole = self.epochs * steps_per_epoch
        return min(self.max_steps, whole) if self.max_steps else whole


class HealthConfig(Section):
    """What a run does about losses and gradients that are not finite, and about spikes."""

    # Updates in a row that are left out because a loss or gradient is not finite. One more returns
    # to the newest checkpoint, from where the steps of all of them are passed over.
    max_skipped: NonNegative = 2
    # Such returns without a checkpoint beyond the steps passed over; one more ends the run.
    max_rollbacks: NonNegative = 2
    # Robust z-score of a loss, among those before it, from which on it is a spike; 0: none is.
    spike_zscore: Annotated[float, Field(ge=0.0)] = 0.0
    spike_window: Annotated[int, Field(ge=8)] = 128  # losses before it; judged from half of it on
    # warn: an event and a metric. roll back: also return to the checkpoint before it.
    spike_action: Literal["warn", "roll back"] = "warn"


class ProbeConfig(Section):
    """Probes of the frozen encoder while it pre-trains: how well simple classifiers read labels.

    Accuracies are UAR on samples that the classifiers have not seen: other folds, the validation
    split, or other subjects, whichever the labels have.
    """

    url: str = ""  # labeled shards; empty: no probes
    every: NonNegative = 0  # steps between probes; 0: train.checkpoint_every
    # Column of the labels; "classes.arousal" where there are several, "class_name" where classes
    # have names only, as those of the sources csv and images.
    label: str = "class"
    # Samples, at most, with one clip each: equally many of each class, as far as there are.
    max_clips: Annotated[int, Field(ge=8)] = 2000
    region: Annotated[str, _one_of("svfap_dist.video.info:REGIONS", "")] = ""  # empty: data.region
    neighbors: Positive = 5  # of the kNN classifier
    # Features of a clip, as finetune.pool, grid and stages make them of the encoder's tokens.
    pool: Literal["mean", "grid"] = "mean"
    grid: Positive = 3  # cells per side of pool = grid
    stages: Literal["last", "all"] = "last"


class ClusterConfig(Section):
    """The worker group that Ray Train starts."""

    num_workers: Positive = 1  # ranks, at most
    # Ranks, at least. While nodes are missing, Ray Train continues with the largest number of ranks
    # among which the lanes can be shared; when they are back, with more. 0: always num_workers.
    min_workers: NonNegative = 0
    # Seconds between looks for nodes that have joined; each growth costs a checkpoint and a start.
    resize_seconds: Annotated[float, Field(gt=0.0)] = 10.0
    # auto: if there is a GPU for each rank (config/device).
    use_gpu: AutoBool = False
    cpus_per_worker: Positive = 1
    # Keep a GPU rank, and what it starts, on the cores of its GPU's socket, by NVML; only if these
    # are at least cpus_per_worker.
    bind_cpus: bool = True
    # Restarts of the group before giving up; -1: unlimited. Preempted nodes do not count, nor, with
    # min_workers, lost ones.
    max_failures: Annotated[int, Field(ge=-1)] = 3
    wait_seconds: NonNegative = 0  # time for nodes to join before the cluster counts as too small
    # Keep a worker process per rank that has made its imports, so that a restart needs none.
    standby: bool = True

    @property
    def on_gpu(self) -> bool:
        """Whether ranks compute on GPUs; not while that is to be decided."""
        return self.use_gpu is True

    @property
    def fewest_workers(self) -> int:
        """Ranks without which the group does not start."""
        return self.min_workers or self.num_workers


class MetricsConfig(Section):
    """The Prometheus endpoint of each rank."""

    enabled: bool = True
    host: str = "127.0.0.1"  # default: loopback
    # Of local rank 0; local rank i listens on port + i. 0: any free port.
    port: Port = 0
    # Of the driver's (without Ray: rank 0's) service discovery of live ranks; 0: any free port.
    discovery_port: Port = 0
    # Seconds that a run ended by a non-finite loss stays up for Prometheus to scrape it.
    linger_seconds: Annotated[float, Field(ge=0.0)] = 0.0


class TrackConfig(Section):
    """Experiment trackers, which get what the run's own files have; secrets: environment only."""

    tensorboard: bool = False  # event files in tensorboard/ of the run's folder
    wandb: str = ""  # project or entity/project of Weights & Biases; empty: none
    mlflow: str = ""  # tracking URI of MLflow, or a folder; empty: none
    mlflow_experiment: str = "svfap"

    @property
    def mlflow_folder(self) -> str:
        """The folder that `mlflow` names, empty if it names none."""
        return "" if ":" in self.mlflow or self.mlflow == "databricks" else self.mlflow


class ProfileConfig(Section):
    """Steps that are traced by torch's profiler, into profile/ of the run's folder."""

    # First and last step, from 1, as in [100, 110]; empty: none. A trace of many steps is large.
    steps: tuple[Positive, ...] = ()

    @field_validator("steps")
    @classmethod
    def _check_steps(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if steps and not (len(steps) == 2 and steps[0] <= steps[1] < steps[0] + MAX_TRACED_STEPS):
            raise ValueError(
                f"give the first and the last step, at most {MAX_TRACED_STEPS} steps in all, or []"
            )
        return steps


class TaskConfig(Section):
    """The task that is learned from a labeled data set, and its test protocol."""

    # auto: this, and what is left out of label, names, folds or splits and metrics, follow from the
    # labels of the data set (evaluate/task_of_data).
    kind: Literal["classification", "regression", "auto"]
    set: str  # name of the data set in the samples' labels: "dfew", "mafw", ...
    # Column of the labels (data_sharding/sources, `Labels`): "class"; "classes.arousal" where a
    # data set has several classifications; "class_name" where classes have names only; "values" for
    # regressions.
    label: str = ""
    # The classes in the order of their index, or the regressed dimensions: keys of "values".
    names: tuple[str, ...] = ()
    # Folds of the cross-validation: fold i tests samples with fold == i, trains on all others. 0:
    # no folds, use the splits.
    folds: NonNegative = 0
    fold: NonNegative = 0  # the only fold to run; 0: all, in order
    # Where a sample's fold comes from: its labels, or `folds` folds that are made here, alike in
    # size and classes, of whole subjects or of samples.
    folds_by: Literal["labels", "subject", "sample"] = "labels"
    train_splits: Annotated[tuple[str, ...], Field(min_length=1)] = ("train",)
    test_splits: Annotated[tuple[str, ...], Field(min_length=1)] = ("test",)
    # Sets of more labeled samples, such as images, among [[data.sources]]: they are trained on in
    # every fold and never tested; their classes must have names of this task.
    extra_sets: Keys = ()
    subject_independent: bool = False  # refuse subjects in both training and test
    # Training samples per class, drawn by run.seed, for few-label experiments; 0: all.
    labels_per_class: NonNegative = 0
    metrics: tuple[str, ...] = ()  # of evaluate/metrics
    # Published values of `metrics`, in that order and in the unit of publication (percent for
    # uar, war, weighted_f1); empty: none.
    published: tuple[float, ...] = ()
    published_source: str = ""
    # What the authors published later for their released code, in the same form; empty: nothing.
    # It counts only beside `published`, so a recipe with other metrics clears that alone.
    reproduced: tuple[float, ...] = ()
    reproduced_source: str = ""

    @model_validator(mode="after")
    def _check(self) -> TaskConfig:
        scores = table("svfap_dist.evaluate.metrics:SCORE_FUNCTIONS")
        is_open = self.kind == "auto"
        known = [name for name, score in scores.items() if is_open or score.kind == self.kind]
        for name in ("label", "names", "metrics"):
            if not getattr(self, name) and not is_open:
                raise ValueError(f"give {name}, or kind = auto, which takes it from the data")
        for metric in self.metrics:
            if metric not in known:
                advice = nearest(metric, known)
                raise ValueError(f"{metric} is not a metric of a {self.kind}: {advice}")
        for name in ("published", "reproduced") if self.published else ():
            if (figures := getattr(self, name)) and len(figures) != len(self.metrics):
                raise ValueError(f"{name} must have one value for each of metrics, or none")
        if len(set(self.names)) < len(self.names):
            raise ValueError("names must all be different")
        if self.kind == "classification" and len(self.names) < 2:
            raise ValueError("names must have at least two classes")
        if self.set in self.extra_sets:
            raise ValueError(f"remove {self.set} from extra_sets: it is the task's own set")
        if self.folds_by != "labels" and self.folds < 2 and not is_open:
            raise ValueError(f"folds must be at least 2 to be made by {self.folds_by}")
        if self.fold > self.folds and not (is_open and not self.folds):
            raise ValueError(f"fold must be one of the {self.folds} folds, or 0")
        return self


class FinetuneConfig(Section):
    """The initial encoder and how it is trained on a task; defaults: released code."""

    init: str = ""  # URL of a run, checkpoint or export; empty: from scratch
    # full: all weights. linear: frozen encoder (linear probe). attentive: frozen encoder, and a
    # trained query that attends to its tokens (attentive probe, pool = attentive). lora: frozen
    # weights with a trained low-rank part beside every linear layer of the encoder (LoRA).
    mode: Literal["full", "linear", "attentive", "lora"] = "full"
    lora_rank: Positive = 8
    lora_alpha: Annotated[float, Field(gt=0.0)] = 16.0  # the low-rank part counts alpha / rank
    # What the head sees of the encoder's tokens. mean: their mean (the paper's way). grid: means
    # over the cells of a grid, end to end. attentive: what a trained query attends to.
    pool: Literal["mean", "grid", "attentive"] = "mean"
    grid: Positive = 3  # cells per side of pool = grid
    stages: Literal["last", "all"] = "last"  # of the encoder, that pool takes
    # Decay of an exponential average of the weights, which is what is tested and stored as the
    # network; it grows to this as (1 + step) / (10 + step). 0: no average.
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    # balanced: a class counts in the loss by the inverse of its number of training samples.
    class_weights: Literal["none", "balanced"] = "none"
    # all: each training sample once per epoch. balanced: each class equally often, so that samples
    # of rare classes are repeated, with other augmentation (oversampling).
    sampling: Literal["all", "balanced"] = "all"
    # Share of the training samples, of whole subjects where they are known, that is held out to
    # score each epoch: the weights of the best one are tested. 0: none, and those of the last epoch
    # are tested (the paper's way).
    validation: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    # Epochs in a row that are no better than the best before the run ends; 0: it never ends early.
    patience: NonNegative = 0
    seeds: Positive = 1  # the fine-tuning is repeated with run.seed, run.seed + 1, ...
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75  # of the learning rate, per layer
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1  # stochastic depth of the last block
    head_init_scale: Annotated[float, Field(gt=0.0)] = 0.001
    output: Literal["none", "sigmoid", "tanh"] = "none"  # activation of a regression's outputs
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    mixup: Annotated[float, Field(ge=0.0)] = 0.8  # alpha; 0: off
    cutmix: Annotated[float, Field(ge=0.0)] = 1.0  # alpha; 0: off
    mix_probability: Fraction = 1.0  # probability that a batch is mixed
    cutmix_probability: Fraction = 0.5  # probability of CutMix where both are on
    # Views of a tested video, whose scores are averaged: windows in time times crops in space.
    test_segments: Positive = 2
    test_crops: Positive = 2

    @model_validator(mode="after")
    def _check(self) -> FinetuneConfig:
        if self.mode == "attentive" and self.pool == "grid":
            raise ValueError(
                "mode = attentive pools by attention, not over a grid: use mode = linear with "
                "pool = grid, or leave pool out"
            )
        if self.patience and not self.validation:
            raise ValueError("patience needs validation, such as validation = 0.1")
        return self


class AugmentConfig(Section):
    """Augmentation of training clips beside window and crop; defaults: released code."""

    flip: Fraction = 0.5  # probability of mirroring a clip
    rand_augment_ops: NonNegative = 4  # 0: no RandAugment
    rand_augment_magnitude: Annotated[float, Field(ge=0.0, le=10.0)] = 7.0
    rand_augment_std: Annotated[float, Field(ge=0.0)] = 0.5
    erasing: Fraction = 0.25  # probability of random erasing
    # workers: in decode workers, by Pillow; a micro batch is mixed with one share. device: on the
    # device that trains, which may then also decode and convert colors; each clip is mixed with a
    # share of its own.
    run_on: Literal["workers", "device"] = "workers"
