# mvision in a container; docs/deploy.md has the commands.
#
#   docker build -t mvision .                                       # for CPUs
#   docker build -t mvision:cuda --build-arg VARIANT=cuda .         # for NVIDIA GPUs: docker run --gpus all
FROM python:3.12-slim-bookworm

ARG VARIANT=cpu
ARG EXTRAS=export,fast,serve
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# PyTorch alone in a layer: it is most of the image and changes least. The wheels of the package index bring CUDA along,
# so a driver is all that the host has to have. Triton compiles its kernels' launchers with a C compiler.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008,DL3013
RUN case "$VARIANT" in \
      cpu) pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu ;; \
      cuda) apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* && \
            pip install torch torchvision ;; \
      *) echo "VARIANT=$VARIANT: is cpu or cuda" >&2; exit 2 ;; \
    esac

WORKDIR /opt/mvision
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY mvision mvision
COPY heads heads
COPY cli cli
COPY configs configs
COPY docs/examples docs/examples
# hadolint ignore=DL3013
RUN pip install ".[$EXTRAS]"

# Runs and the cache lie in /work, which is the folder to mount.
RUN useradd --create-home --uid 1000 mvision && mkdir /work && chown mvision /work
USER 1000
WORKDIR /work
ENV MVISION_CACHE=/work/.cache/mvision
EXPOSE 8000
ENTRYPOINT ["mvision"]
CMD ["--help"]
