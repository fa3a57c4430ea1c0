# torchpi with its server, datasets, training and simulators, on the CPU:
#
#     docker build -t torchpi .
#     docker run --rm torchpi trace demo
#     docker run --rm -p 8000:8000 torchpi serve demo --host 0.0.0.0
#
# With PyTorch's CUDA builds, which include CUDA; the host needs the NVIDIA Container Toolkit:
#
#     docker build --build-arg TORCH=cuda -t torchpi:cuda .
#     docker run --rm --gpus all -p 8000:8000 -v torchpi:/cache torchpi:cuda serve gs://openpi-assets/checkpoints/pi05_droid --host 0.0.0.0
FROM python:3.11-slim-bookworm
ARG TORCH=cpu
# OpenGL without a screen for the simulators; with CUDA also the compiler that Triton needs for its launcher.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libegl1 libgl1-mesa-dri libopengl0 $([ "$TORCH" = cpu ] || echo gcc libc6-dev) \
    && rm -rf /var/lib/apt/lists/*
COPY . /torchpi
WORKDIR /torchpi
RUN pip install --no-cache-dir --constraint constraints.txt \
    $([ "$TORCH" = cpu ] && echo --extra-index-url https://download.pytorch.org/whl/cpu) ./client '.[data,gcs,serve,sim]'
ENV TORCHPI_HOME=/cache NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
RUN useradd --create-home robot && mkdir /cache && chown robot /cache /work
USER robot
ENTRYPOINT ["torchpi"]
CMD ["--help"]
