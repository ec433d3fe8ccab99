# mates in an image, with what reaches other machines (ssh, pdsh, MPICH).
#
#   docker build -t mates:0.1.0 .
#   docker build -t mates:0.1.0-cuda --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 .
#
# A base without python3 gets its distribution's, which must be 3.11 or newer.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# Options of pip for torch alone, such as an index of builds without CUDA
ARG TORCH_OPTIONS=""

# g++ and Python's headers: DeepSpeed and Triton compile at the first start
RUN packages="ca-certificates g++ make openssh-client pdsh procps" \
    && if ! command -v python3 >/dev/null; then packages="$packages python3 python3-dev python3-venv"; fi \
    && apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])' \
    && python3 -m venv /opt/mates

ENV PATH=/opt/mates/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

WORKDIR /opt/source
COPY constraints.txt ./
# torch in a layer of its own: it is most of the image and changes seldom. Its builds for CUDA ask for a triton of their own.
RUN pip install --quiet $TORCH_OPTIONS "$(grep '^torch==' constraints.txt)" \
    && grep -v '^triton==' constraints.txt > /opt/constraints.txt
COPY LICENSE README.md pyproject.toml ./
COPY engine engine
COPY kernels kernels
COPY launchers launchers
COPY preprocess preprocess
RUN pip install --quiet -c /opt/constraints.txt ".[gpu,tensorboard]" mpich

RUN useradd --create-home --uid 10000 mates
USER mates
WORKDIR /home/mates
CMD ["mates", "--help"]
