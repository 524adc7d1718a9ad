"""Map a missing module to the extra of the package that installs it."""

from __future__ import annotations

import importlib.util

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
            return _missing(module, extra)
    return None


def check_extras(*extras: str) -> None:
    """Check that the modules of extras are installed, before a verb starts to work.

    Args:
        *extras: Names of extras.

    Raises:
        ConfigError: If a module is missing; it names all extras to install.
    """
    absent = {
        extra: [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
        for extra in extras
    }
    modules = [name for names in absent.values() for name in names]
    if modules:
        needed = ",".join(extra for extra, names in absent.items() if names)
        raise _missing(", ".join(modules), needed)


def _missing(modules: str, extras: str) -> ConfigError:
    advice = f"pip install 'svfap-dist[{extras}]'"
    return ConfigError("Missing optional dependency", modules, "not installed", advice)
