"""The sections of a recipe that are about a downstream task: labels, protocol, fine-tuning.

A protocol is a table here, never a branch in code: which column of a sample's labels is learned,
which samples train and which test, what is reported, and what others published.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from svfap_dist.config.sections import Fraction, NonNegative, Positive, Section

METRICS = {
    "classification": ("uar", "war", "weighted_f1"),
    "regression": ("pcc", "ccc", "acc"),
}


class TaskConfig(Section):
    """What is learned from a labelled set, and how it is tested."""

    kind: Literal["classification", "regression"]
    set: str  # of the samples' labels: "dfew", "mafw", ...
    # Column of the labels (data_sharding/sources, `Labels`): "class"; "classes.arousal", where a
    # set has several classifications; "values" for regressions.
    label: str
    # The classes in order of their index, or the dimensions regressed: keys of "values".
    names: Annotated[tuple[str, ...], Field(min_length=1)]
    # k: fold i tests the samples with fold == i and trains on all others. 0: by split.
    folds: NonNegative = 0
    fold: NonNegative = 0  # the only fold to run; 0: all in turn
    train_splits: Annotated[tuple[str, ...], Field(min_length=1)] = ("train",)
    test_splits: Annotated[tuple[str, ...], Field(min_length=1)] = ("test",)
    subject_independent: bool = False  # refuse a fold with a subject on both sides
    # Training samples of each class, chosen by run.seed, for learning from few labels; 0: all.
    labels_per_class: NonNegative = 0
    metrics: Annotated[tuple[str, ...], Field(min_length=1)]  # of METRICS[kind]
    # Figures of `metrics`, in that order and in the unit in which they are published (per cent for
    # uar, war, weighted_f1); empty: none.
    published: tuple[float, ...] = ()
    published_source: str = ""

    @model_validator(mode="after")
    def _check(self) -> TaskConfig:
        known = METRICS[self.kind]
        unknown = [metric for metric in self.metrics if metric not in known]
        if unknown:
            raise ValueError(f"{unknown[0]} is no metric of a {self.kind}: use {', '.join(known)}")
        if self.published and len(self.published) != len(self.metrics):
            raise ValueError("published has a figure for each of metrics, or none")
        if len(set(self.names)) < len(self.names):
            raise ValueError("names are all different")
        if self.kind == "classification" and len(self.names) < 2:
            raise ValueError("names has two classes at least")
        if self.fold > self.folds:
            raise ValueError(f"fold is one of the {self.folds} folds, or 0")
        return self


class FinetuneConfig(Section):
    """Where the encoder comes from and how it is trained on a task; defaults: released code."""

    init: str = ""  # URL of a run, checkpoint or export; empty: from scratch
    mode: Literal["full", "linear"] = "full"  # linear: the encoder stays as it is (linear probe)
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75  # of the rate, from layer to layer
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1  # of the last block
    head_init_scale: Annotated[float, Field(gt=0.0)] = 0.001
    output: Literal["none", "sigmoid", "tanh"] = "none"  # of a regression
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    mixup: Annotated[float, Field(ge=0.0)] = 0.8  # alpha; 0: off
    cutmix: Annotated[float, Field(ge=0.0)] = 1.0  # alpha; 0: off
    mix_probability: Fraction = 1.0  # that a batch is mixed at all
    cutmix_probability: Fraction = 0.5  # of cutmix, where both are on
    test_segments: Positive = 2  # windows in time of a tested video
    test_crops: Positive = 2  # places in space of each; scores of all are averaged


class AugmentConfig(Section):
    """What is done to a training clip beside window and crop; defaults: released code."""

    flip: Fraction = 0.5  # probability of a mirrored clip
    rand_augment_ops: NonNegative = 4  # 0: no RandAugment
    rand_augment_magnitude: Annotated[float, Field(ge=0.0, le=10.0)] = 7.0
    rand_augment_std: Annotated[float, Field(ge=0.0)] = 0.5
    erasing: Fraction = 0.25  # probability of a box of noise
