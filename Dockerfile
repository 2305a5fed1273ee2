# The commands of the README in an image; docs/installation.md#docker has the commands to build and run it.
# Both bases are Ubuntu 24.04, whose Python is 3.12. PyTorch brings its own CUDA libraries: the host needs the driver
# and NVIDIA's container toolkit only.
#   CPU (default)   ubuntu:24.04, with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu for a smaller PyTorch
#   CUDA            nvidia/cuda:12.8.1-base-ubuntu24.04
ARG BASE=ubuntu:24.04
FROM ${BASE}

RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates git python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /predetr
# The packages first: they are installed again only when one of these files changes.
COPY requirements.txt requirements-extras.txt constraints.txt ./
ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_NO_CACHE_DIR=1
RUN python3 -m venv .venv
# What `source .venv/bin/activate` does.
ENV VIRTUAL_ENV=/predetr/.venv PATH=/predetr/.venv/bin:$PATH
RUN pip install -r requirements.txt -r requirements-extras.txt -c constraints.txt

COPY . .
CMD ["bash"]
