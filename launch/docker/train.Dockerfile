# Pre-training, fine-tuning and inference on NVIDIA GPUs; also the image of launch/kubernetes. At the root of a checkout:
#   docker build -f launch/docker/train.Dockerfile -t registry.example/svfap:0.1.0 .
# torch's and DALI's wheels bring CUDA 13; the nodes need NVIDIA's driver (580 or newer) and container toolkit.
FROM python:3.11.14-slim-bookworm AS builder
ARG EXTRAS=train,ray,gpu,probe,report,hub,parquet,track
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/svfap
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY svfap_dist svfap_dist
COPY data_sharding data_sharding
COPY launch launch
COPY monitoring monitoring
RUN /opt/svfap/bin/pip install -c constraints.txt torch==2.13.0 ".[${EXTRAS}]"

FROM python:3.11.14-slim-bookworm
LABEL org.opencontainers.image.title="svfap: training" org.opencontainers.image.licenses="Apache-2.0"
# Without "video", the container toolkit does not mount NVDEC's library (libnvcuvid).
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,video,utility
# g++ for torch.compile and Triton, wget for KubeRay's probes. Debian removes old versions, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ wget && rm -rf /var/lib/apt/lists/*
COPY --from=builder /opt/svfap /opt/svfap
ENV PATH=/opt/svfap/bin:$PATH
RUN useradd --create-home --uid 1000 ray
USER 1000
WORKDIR /home/ray
HEALTHCHECK NONE
CMD ["svfap", "--help"]
