# mekd in a container, for the CPU or for CUDA:
#   docker build -t mekd .
#   docker build -t mekd:cuda --build-arg DEVICE=cuda .
#   docker run --rm -v "$PWD:/work" mekd run --config digits
# The folder that is mounted must be writable for user 1000, or say --user "$(id -u)"; with CUDA also --gpus all.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG DEVICE=cpu
# The index that torch comes from; empty: the registry's own, whose Linux build is for CUDA.
ARG TORCH_INDEX=
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv /opt/mekd && PATH=/opt/mekd/bin:$PATH sh docker/install.sh "$DEVICE" "$TORCH_INDEX"

FROM python:${PYTHON}-slim
# torch.compile and Triton build what they run with a compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 mekd && mkdir /work && chown mekd:mekd /work
COPY --from=build /opt/mekd /opt/mekd
ENV PATH=/opt/mekd/bin:$PATH PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["mekd"]
CMD ["--help"]
