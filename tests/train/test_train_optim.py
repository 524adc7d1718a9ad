from __future__ import annotations

import torch

from svfap_dist.config import OptimConfig
from svfap_dist.model import autoencoder, classifier
from svfap_dist.model.classifier import Classifier
from svfap_dist.model.sizes import ENCODERS
from svfap_dist.train import optim


def test_only_matrices_and_kernels_decay() -> None:
    model = autoencoder.build("nano", num_frames=8, frame_size=32)
    optimizer = optim.adamw(model, OptimConfig(weight_decay=0.05))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        numbers_in_a_row = parameter.squeeze().ndim <= 1
        assert decay[id(parameter)] == (0.0 if numbers_in_a_row else 0.05), name


def test_betas_come_from_the_recipe() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = optim.adamw(model, OptimConfig(betas=(0.8, 0.9)))
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9)] * 2


def _classifier() -> Classifier:
    return classifier.build("nano", 7, num_frames=16, frame_size=32)  # stages of 2, 2 and 2 blocks


def test_layers_are_numbered_from_the_patch_embedding_to_the_head() -> None:
    ids = optim.layer_ids(dict(_classifier().named_parameters()), ENCODERS["tpsbt"])
    expected = {
        "encoder.patch_embed.proj.weight": 0,
        "encoder.blocks.0.attn.q_bias": 1,
        "encoder.blocks.1.mlp.fc2.weight": 2,
        "encoder.blocks.2.cross_attn.kv.weight": 3,
        "encoder.blocks.5.norm2.bias": 6,
        "encoder.temporal_downsamples.0.weight": 7,  # as in the released code
        "encoder.spatial_downsamples.1.mlp.fc1.weight": 7,
        "fc_norm.weight": 7,
        "head.bias": 7,
    }
    assert {name: ids[name] for name in expected} == expected


def test_with_layer_decay_each_parameter_is_in_the_group_of_its_layer() -> None:
    model = _classifier()
    groups = optim.parameter_groups(model, 0.05, layer_decay=0.5)
    of = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of)
    ids = optim.layer_ids(dict(model.named_parameters()), ENCODERS["tpsbt"])
    assert set(of) == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        assert of[id(parameter)]["lr_scale"] == 0.5 ** (7 - ids[name]), name
        assert of[id(parameter)]["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0), name
    scales = [group["lr_scale"] for group in groups]
    assert scales == sorted(scales)
    assert scales[-1] == 1.0
    assert len(set(scales)) == 8


def test_frozen_parameters_are_in_no_group() -> None:
    model = _classifier()
    model.encoder.requires_grad_(False)
    groups = optim.parameter_groups(model, 0.05, layer_decay=0.75)
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for m in (model.fc_norm, model.head) for p in m.parameters()}
    assert {group["lr_scale"] for group in groups} == {1.0}


def test_pre_training_has_two_groups_without_a_scale_of_their_own() -> None:
    model = autoencoder.build("nano", num_frames=8, frame_size=32)
    groups = optim.parameter_groups(model, 0.05)
    assert [set(group) for group in groups] == [{"params", "weight_decay"}] * 2
