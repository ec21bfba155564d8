# This repository's code and its libraries, for every node of a cluster. `make image` builds both:
#   docker build --target gpu -t rayjobs:gpu .
#   docker build --target cpu -t rayjobs:cpu .
# Versions are those of `make setup`, from constraints.txt. Nothing in it runs as root.
ARG GPU_BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
ARG CPU_BASE=debian:bookworm-slim
ARG UV_IMAGE=ghcr.io/astral-sh/uv:0.13.9

FROM ${UV_IMAGE} AS uv

FROM ${GPU_BASE} AS gpu
# wget: KubeRay's probes. A C compiler: torch.compile (triton) builds its launchers with it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates wget gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=uv /uv /usr/local/bin/uv
# uv takes the base's Python if it is the one that the versions were locked with, or brings it.
# Debian's login shells, in which KubeRay may start Ray, would forget PATH.
ENV UV_PYTHON_INSTALL_DIR=/opt/python UV_CACHE_DIR=/var/cache/uv UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 \
    PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN uv venv --python 3.11 /opt/venv \
    && echo "export PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/venv.sh \
    && useradd --uid 1001 --create-home --shell /bin/bash ray
# The libraries before the code: a changed line of code leaves their layer as it is.
WORKDIR /opt/rayjobs
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install --python /opt/venv -c constraints.txt -r pyproject.toml --extra samplers
COPY . .
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install --python /opt/venv --no-deps . && rm -rf build ./*.egg-info
USER 1001
WORKDIR /home/ray
ENTRYPOINT ["rayjobs"]
CMD ["--help"]

FROM ${CPU_BASE} AS cpu
# Where torch for CPUs is found; empty: wherever uv looks by itself.
ARG TORCH_BACKEND=cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates wget \
    && rm -rf /var/lib/apt/lists/*
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_PYTHON_INSTALL_DIR=/opt/python UV_CACHE_DIR=/var/cache/uv UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 \
    PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN uv venv --python 3.11 /opt/venv \
    && echo "export PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/venv.sh \
    && useradd --uid 1001 --create-home --shell /bin/bash ray
WORKDIR /opt/rayjobs
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install --python /opt/venv -c constraints.txt -r pyproject.toml --extra samplers \
    ${TORCH_BACKEND:+--torch-backend ${TORCH_BACKEND}}
COPY . .
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install --python /opt/venv --no-deps . && rm -rf build ./*.egg-info
USER 1001
WORKDIR /home/ray
ENTRYPOINT ["rayjobs"]
CMD ["--help"]
