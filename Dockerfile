# Two images:  docker build --target cpu -t bothways:cpu .     docker build --target gpu -t bothways:gpu .
# Versions come from constraints.txt, the files from the list in .dockerignore. No image holds weights, data or secrets: mount them.

FROM python:3.11-slim-bookworm AS cpu-build
WORKDIR /source
RUN python -m venv /opt/bothways
ENV PATH=/opt/bothways/bin:$PATH VIRTUAL_ENV=/opt/bothways
COPY constraints.txt .
# The CPU build of torch: the default wheel is a CUDA build of several GB.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir -c constraints.txt uv && uv pip install --no-cache --torch-backend=cpu "$(grep '^torch==' constraints.txt)"
COPY . .
RUN pip install --no-cache-dir -c constraints.txt '.[serve,modelopt]'

FROM python:3.11-slim-bookworm AS cpu
# DeepSpeed compiles its operators on first use: that takes a compiler, and libaio for offloading to NVMe.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ libaio-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 bothways && install -d -o bothways /work
COPY --from=cpu-build /opt/bothways /opt/bothways
ENV PATH=/opt/bothways/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
ENTRYPOINT ["bothways"]
CMD ["--help"]

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS gpu-build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /source
RUN python3 -m venv /opt/bothways
ENV PATH=/opt/bothways/bin:$PATH
COPY constraints.txt .
RUN pip install --no-cache-dir -c constraints.txt torch
COPY . .
RUN pip install --no-cache-dir -c constraints.txt '.[serve,modelopt,tensorrt]'

# The devel image again: DeepSpeed compiles its CUDA operators on first use with nvcc.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS gpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ libaio-dev python3-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 bothways && install -d -o bothways /work
COPY --from=gpu-build /opt/bothways /opt/bothways
ENV PATH=/opt/bothways/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
ENTRYPOINT ["bothways"]
CMD ["--help"]
