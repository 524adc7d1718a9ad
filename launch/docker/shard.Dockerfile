# Sharding and face crops on machines without a GPU. At the root of a checkout:
#   docker build -f launch/docker/shard.Dockerfile -t registry.example/svfap-shard:0.1.0 .
#   docker run -v /data:/data registry.example/svfap-shard:0.1.0 shard voxceleb2 /data/voxceleb2 /data/shards
# For `svfap shard --ray ADDRESS`: --build-arg EXTRAS=shard,faces,ray
FROM python:3.11.14-slim-bookworm AS builder
ARG EXTRAS=shard,faces
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# PyTorch's CPU build; the one on PyPI includes gigabytes of CUDA libraries.
RUN python -m venv /opt/svfap \
  && /opt/svfap/bin/pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY svfap_dist svfap_dist
COPY data_sharding data_sharding
COPY launch launch
COPY monitoring monitoring
RUN /opt/svfap/bin/pip install -c constraints.txt ".[${EXTRAS}]"

FROM python:3.11.14-slim-bookworm
LABEL org.opencontainers.image.title="svfap: sharding" org.opencontainers.image.licenses="Apache-2.0"
COPY --from=builder /opt/svfap /opt/svfap
ENV PATH=/opt/svfap/bin:$PATH
RUN useradd --create-home --uid 1000 svfap
USER 1000
WORKDIR /home/svfap
HEALTHCHECK NONE
ENTRYPOINT ["svfap"]
CMD ["shard", "--help"]
