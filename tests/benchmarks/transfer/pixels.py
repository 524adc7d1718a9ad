"""Print what classifiers read from pixels, on the folds and draws of `svfap bench transfer`.

    python tests/benchmarks/transfer/pixels.py shards/ck48 /data/ck48 1 2

The feature of a clip is its last frame, gray, at 24 x 24 pixels; classifiers and their settings are
those of the methods linear and knn.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
from PIL import Image

from svfap_dist.config import recipe
from svfap_dist.evaluate import feature_probe, protocol
from svfap_dist.evaluate.task_of_data import complete_config
from svfap_dist.shards.mixture import open_training_data
from svfap_dist.shards.reader import SampleReader

_RECIPE = Path(__file__).parent / "finetune_faces48.toml"


def _pixels(folder: Path) -> np.ndarray:
    """Return the last frame of a folder of frames, float32 [576]."""
    with Image.open(max(folder.glob("*.*g"))) as image:
        small = image.convert("L").resize((24, 24), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel()


def main() -> None:
    """Read the arguments and print UAR, pooled over the folds, by classifier and labels."""
    parser = argparse.ArgumentParser(description="Classify by pixels.")
    parser.add_argument("shards")
    parser.add_argument("clips", type=Path)
    parser.add_argument("folds", type=int, nargs="+")
    arguments = parser.parse_args()
    settings = [f"data.url={arguments.shards}", "run.url=unused", "task.folds=3"]
    config = complete_config(recipe.load(str(_RECIPE), [*settings, "cluster.use_gpu=false"]))
    manifest = open_training_data(config)
    reader = SampleReader(arguments.shards, manifest)
    keys = [reader.read(index).key for index in range(manifest.num_samples)]
    pixels = np.stack([_pixels(arguments.clips / key) for key in keys])
    for classifier in feature_probe.CLASSIFIERS:
        for labels in (5, 10, 0):
            scores = []
            for seed in range(5):
                true, predicted = [], []
                task = protocol.require_task(config)
                task = task.model_copy(update={"labels_per_class": labels})
                run = config.run.model_copy(update={"seed": config.run.seed + seed})
                one = config.model_copy(update={"task": task, "run": run})
                for fold in arguments.folds:
                    train, test = protocol.split_samples(one, manifest, fold)[:2]
                    known, asked = pixels[train.indices], pixels[test.indices]
                    neighbors = config.probe.neighbors
                    answer = feature_probe.predict(
                        known,
                        train.targets,
                        asked,
                        min(neighbors, labels or neighbors),
                        (classifier,),
                    )
                    true.append(test.targets)
                    predicted.append(answer[classifier])
                right = np.concatenate(true) == np.concatenate(predicted)
                classes = np.concatenate(true)
                recalls = [right[classes == one].mean() for one in np.unique(classes)]
                scores.append(100 * float(np.mean(recalls)))
            mean, deviation = statistics.fmean(scores), statistics.stdev(scores)
            print(f"{classifier}, {labels or 'all'} per class: {mean:.1f} ± {deviation:.1f}")


if __name__ == "__main__":
    main()
