"""The model card (README.md) of an exported network, in the Hugging Face Hub's format.

In: the description of a network and, where it comes from a run, that run's recipe, results and
events. Out: Markdown with the Hub's metadata at its top: data, training, measured figures, license,
limits, and what the EU AI Act says about the use. Locations of files (buckets, folders) are
left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from svfap_dist import json_text, storage
from svfap_dist.checkpoint import load as checkpoints
from svfap_dist.checkpoint import store
from svfap_dist.checkpoint.best import read_best
from svfap_dist.config import Config
from svfap_dist.evaluate.metrics import SCORE_FUNCTIONS
from svfap_dist.model import weights
from svfap_dist.model.weights import ModelInfo

CARD = "README.md"
_NON_COMMERCIAL = "-nc"
# Names of licenses that the Hub knows, among those that weights have.
_KNOWN_LICENSES = {
    *("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
    *("cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail", "other", "unknown"),
}
_FOLDS = ("fold-", "seed-")  # folders of a fine-tuning's runs
_LOCATIONS = ("run_url", "data_url", "init")  # of provenance

_INTENDED_USE = """\
## Intended use

Research on facial affect in video: features of face clips, {use}, and a starting point for
fine-tuning on other labeled sets. Inputs are clips of one cropped face each, as in training.

Not for decisions about people: hiring, education, policing, border control, health, insurance,
credit or marketing. Visible expression is weak evidence of what a person feels.

## Law and ethics

- **EU AI Act** (Regulation (EU) 2024/1689). Article 5(1)(f) prohibits systems that infer emotions
  of people at the workplace and in education, except for medical or safety reasons. Other
  emotion recognition from biometric data is high-risk (Annex III, 1(c)), and the people exposed to
  it have to be informed (Article 50(3)). Those who put a system that uses this network into service
  have these duties.
- Videos of faces are personal data, and biometric data where they identify a person (GDPR,
  Articles 4 and 9). Have a legal basis, usually explicit consent, for the videos you process.
- People in collected video sets have usually not consented to the training of this network.

## Biases and limits

- The network repeats the imbalance of its data: in age, gender, skin tone, culture, pose, lighting
  and acted against spontaneous expression. {measured}
- Labels are raters' opinions of expressions, which differ between raters and cultures.
- Clips of other frame rates, crops or compression than in training lower the quality; so do
  occluded, small or profile faces. The network does not detect faces: crop them first.
"""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run says about itself; None and empty where it is not known.

    results: content of results.json. tested_step: of the weights that it is about. events: last
    event of each kind until the step of the network.
    """

    config: Config | None = None
    results: Mapping[str, Any] | None = None
    tested_step: int | None = None
    events: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def read_run(url: str, step: int | None = None) -> RunRecord:
    """Return what the run of a network says about itself.

    Args:
        url: of a run, a checkpoint, or an imported or exported folder, which has no record.
        step: of the network; None: the run's last one.

    Raises:
        CheckpointError: There is no network.
        StorageError: The store fails.
    """
    if storage.exists(storage.join(url, weights.BUILD)):
        return RunRecord()
    weights_url, config = checkpoints.locate_weights(url)
    run_url = weights_url.rpartition("/checkpoints/")[0]
    results = _read_json(storage.join(run_url, "results.json"))
    parent, _, name = run_url.rpartition("/")
    while results is None and name.startswith(_FOLDS):
        results = _read_json(storage.join(parent, "results.json"))
        parent, _, name = parent.rpartition("/")
    events = _read_events(storage.join(run_url, "events.jsonl"))
    until = [event for event in events if step is None or event.get("step", 0) <= step]
    last = {event["event"]: event for event in until}
    return RunRecord(config, results, _tested_step(run_url, config, events), last)


def _tested_step(run_url: str, config: Config, events: list[Mapping[str, Any]]) -> int | None:
    """Return the step of the weights that a fine-tuning tests: its best one, or its last one.

    Earlier versions recorded no test.
    """
    tests = [event["step"] for event in events if event["event"] == "test"]
    last = tests[-1] if tests else store.latest_committed(run_url)
    if last is None or config.task is None or not config.finetune.validation:
        return last
    best = read_best(run_url)
    return best.step if best is not None and best.step <= last else last


def _read_json(url: str) -> Any:
    try:
        return json_text.loads(storage.read_bytes(url))
    except (storage.StorageMissingError, ValueError):
        return None


def _read_events(url: str) -> list[Mapping[str, Any]]:
    try:
        lines = storage.read_bytes(url).splitlines()
    except storage.StorageMissingError:
        return []
    events = []
    for line in lines:
        try:
            event = json_text.loads(line)
        except ValueError:  # cut off by a crash
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def without_locations(info: ModelInfo) -> ModelInfo:
    """Return a description to publish: it does not say where the user's files are.

    Args:
        info: the description.
    """
    kept = {name: value for name, value in info.provenance.items() if name not in _LOCATIONS}
    return dataclasses.replace(info, provenance=kept)


def make_card(info: ModelInfo, record: RunRecord, name: str) -> str:
    """Return the model card.

    Args:
        info: description of the network.
        record: of its run.
        name: of the repository, for the example: OWNER/NAME.
    """
    use = {
        "features": "without labels (the network is pre-trained only)",
        "classification": "classification of expressions",
        "regression": "estimation of affective values",
    }[info.kind]
    measured = "Nothing was measured by group."
    if record.results and "recall" in record.results:
        measured = "Recall differs by class: see the table. " + measured
    parts = [
        _front_matter(info, record, name),
        *_introduction(info, name),
        _INTENDED_USE.format(use=use, measured=measured),
        *_data(info, record),
        *_training(info, record),
        *_figures(info, record),
        *_license(info),
    ]
    return "\n".join(parts)


def _front_matter(info: ModelInfo, record: RunRecord, name: str) -> str:
    """Return the Hub's metadata; each value as JSON, which is YAML, too."""
    known = info.license.lower() if info.license.lower() in _KNOWN_LICENSES else ""
    fields: dict[str, Any] = {
        "library_name": "svfap-dist",
        "license": known or ("other" if info.license else "unknown"),
        **({"license_name": info.license} if info.license and not known else {}),
        "pipeline_tag": "feature-extraction" if info.kind == "features" else "video-classification",
        "tags": [
            "svfap",
            "video",
            "facial-affect",
            "masked-autoencoder",
            "pytorch_model_hub_mixin",
        ],
    }
    results = record.results or {}
    if not _is_of_these_weights(info, record) or not results.get("is_complete", True):
        results = {}
    metrics = [
        {"type": metric, "name": _title(metric), "value": value}
        for metric, value in _values(results)
    ]
    if metrics:
        data = {"name": results["set"], "type": results["set"]}
        result = {"task": {"type": "video-classification"}, "dataset": data, "metrics": metrics}
        fields["model-index"] = [{"name": name.rpartition("/")[2], "results": [result]}]
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _introduction(info: ModelInfo, name: str) -> Iterator[str]:
    what = "pre-trained without labels" if info.kind == "features" else f"for {info.kind}"
    yield f"# {name.rpartition('/')[2]}"
    yield ""
    size, encoder = info.build.get("size"), info.build.get("encoder", "tpsbt")
    yield (
        f"A video network {what}, of size {size} and encoder {encoder} (SVFAP, arXiv 2401.00416), "
        "trained with svfap-dist."
    )
    yield ""
    yield "```python"
    yield "# pip install 'svfap-dist[hub]'"
    yield "import svfap_dist"
    yield ""
    yield f'network = svfap_dist.HubNetwork.from_pretrained("{name}")'
    yield f'network = svfap_dist.load("hf://{name}")  # the same'
    yield 'features = svfap_dist.extract(network, "face.mp4")  # float32 [clips, D]'
    if info.kind != "features":
        yield "outputs = network(clips)  # [B, outputs]"
    yield "```"
    yield ""
    yield (
        f"Clips: {info.num_frames} frames, {info.sampling_rate} apart in the video, "
        f"{info.frame_size} x {info.frame_size} pixels of region `{info.region}`; uint8 RGB "
        "`[B, F, H, W, 3]`, or floats `[B, 3, F, H, W]` normalized with ImageNet statistics."
    )
    if info.names:
        yield f"Outputs, in order: {', '.join(info.names)}."
    yield ""


def _data(info: ModelInfo, record: RunRecord) -> Iterator[str]:
    yield "## Data"
    yield ""
    found, config = info.provenance, record.config
    if config is not None and config.task is not None:
        yield f"- Labeled set: {config.task.set}, label {config.task.label}"
        if config.task.extra_sets:
            yield f"- Further training samples: {', '.join(config.task.extra_sets)}"
        if found.get("fold"):
            yield f"- Trained on all folds but {found['fold']}, which tests it"
    elif "set" in found:
        yield f"- Labeled set: {found['set']}, label {found.get('label', '')}"
    elif config is not None and config.data.sources:
        total = sum(source.weight for source in config.data.sources)
        for number, source in enumerate(config.data.sources, start=1):
            share = source.weight / total
            yield f"- Source {source.name or number}: {100 * share:.1f} % of the clips"
    if "data_fingerprint" in found:
        yield f"- Fingerprint of the shards: `{found['data_fingerprint']}`"
    if "clips_seen" in found:
        yield f"- Clips seen in training: {found['clips_seen']:,}"
    if not found:
        yield "Not recorded: the weights were imported."
    yield "- The licenses of the data apply to the data; this card does not list them."
    yield ""


def _training(info: ModelInfo, record: RunRecord) -> Iterator[str]:
    config, found = record.config, info.provenance
    rows = [("optimizer steps", found.get("step")), ("recipe", found.get("recipe_fingerprint"))]
    if config is not None:
        rows += [
            ("clips per step", config.train.global_batch_size),
            ("learning rate", config.optim.lr),
            ("weight decay", config.optim.weight_decay),
            ("precision", config.train.dtype),
            ("seed", config.run.seed),
        ]
        if config.task is None:
            rows += [("masked tokens", f"{100 * config.mask.ratio:g} % ({config.mask.kind})")]
        else:
            start = "pre-trained weights" if config.finetune.init else "random weights"
            rows += [("trained", config.finetune.mode), ("started from", start)]
    versions = found.get("versions") or {}
    rows += [(name, versions[name]) for name in ("svfap-dist", "torch") if name in versions]
    shown = [(key, value) for key, value in rows if value is not None]
    if shown:
        yield "## Training"
        yield ""
        yield from _table(("", ""), shown)


def _figures(info: ModelInfo, record: RunRecord) -> Iterator[str]:
    yield "## Metrics"
    yield ""
    results = record.results
    if results:
        yield from _tested(info, record, results)
        return
    rows, evaluated = [], record.events.get("eval", {})
    if "held_out_loss" in evaluated:
        loss = f"{evaluated['held_out_loss']:.4f}"
        rows.append(("validation loss", loss, evaluated["step"]))
    probe = record.events.get("probe", {})
    rows += [
        (f"UAR of {kind} on frozen features", f"{100 * uar:.2f} %", probe["step"])
        for kind, uar in probe.get("uar", {}).items()
    ]
    if rows:
        yield from _table(("measured last up to these weights", "", "at step"), rows)
    else:
        yield "None recorded for these weights. Measure before you use them."
        yield ""


def _is_of_these_weights(info: ModelInfo, record: RunRecord) -> bool:
    return record.tested_step == info.provenance.get("step")


def _tested(info: ModelInfo, record: RunRecord, results: Mapping[str, Any]) -> Iterator[str]:
    metrics = results["metrics"]
    rows = [
        (
            _title(name),
            _number(_pooled(values)),
            _number(values.get("deviation")),
            _number(values.get("published")),
        )
        for name, values in metrics.items()
    ]
    yield f"On {results['set']}, label {results['label']}, by the recipe's test protocol."
    if not _is_of_these_weights(info, record):
        yield f"Measured on step {record.tested_step} of this run: **not on these weights**, which "
        yield f"are those of step {info.provenance.get('step')}."
    if fold := info.provenance.get("fold"):
        yield f"Figures are of all folds; these weights are those of fold {fold}."
    if not results.get("is_complete", True):
        yield "Not all folds were tested: not to be compared with figures over all of them."
    yield ""
    yield from _table(("score", "value", "deviation", "published by others"), rows)
    if recall := results.get("recall"):
        of_classes = [
            (name, "no samples" if value is None else f"{_number(value)} %")
            for name, value in recall.items()
        ]
        yield from _table(("class", "recall"), of_classes)


def _license(info: ModelInfo) -> Iterator[str]:
    yield "## License"
    yield ""
    if not info.license:
        yield "Not stated: ask the authors of these weights before you use them."
    else:
        yield f"Weights: {info.license}."
        if _NON_COMMERCIAL in info.license.lower():
            yield "Commercial use is not permitted, nor is that of weights fine-tuned from them."
    yield "Code (svfap-dist): Apache-2.0."
    yield ""


def _values(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    pairs = ((name, _pooled(values)) for name, values in results.get("metrics", {}).items())
    return [(name, value) for name, value in pairs if value is not None]


def _pooled(values: Mapping[str, Any]) -> float | None:
    """Return the pooled score, or for several seeds their mean."""
    return values.get("pooled", values.get("mean"))


def _title(metric: str) -> str:
    known = SCORE_FUNCTIONS.get(metric)
    return f"{known.title} (%)" if known and known.in_percent else known.title if known else metric


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Iterator[str]:
    for row in (header, ("---",) * len(header), *rows):
        yield f"| {' | '.join(map(str, row))} |"
    yield ""
