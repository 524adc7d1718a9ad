"""Map a missing module to the extra of the package that installs it."""

from __future__ import annotations

from svfap_dist.errors import ConfigError

EXTRAS = {
    "train": ("deepspeed", "prometheus_client"),
    "ray": ("ray", "aiohttp"),
    "parquet": ("pyarrow",),
    "shard": ("webdataset",),
    "gpu": ("nvidia", "pynvml"),
    "faces": ("cv2",),
    "hub": ("huggingface_hub",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "probe": ("sklearn",),
    "serve": ("starlette", "uvicorn"),
    "report": ("jinja2", "matplotlib"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "dev": ("yaml", "grafana_foundation_sdk"),
}


def missing_extra(error: ModuleNotFoundError) -> ConfigError | None:
    """Return the error that names the extra to install, None for a module of no extra.

    Args:
        error: Error of an import.
    """
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            advice = f"pip install 'svfap-dist[{extra}]'"
            return ConfigError("Missing optional dependency", module, "it is not installed", advice)
    return None
