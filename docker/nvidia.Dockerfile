# megaqad for NVIDIA GPUs, on NVIDIA's PyTorch image: its torch, Transformer Engine and Apex are kept as they are.
#
#   docker build --file docker/nvidia.Dockerfile --tag megaqad:0.1.0 .
#
# Pinned: the base by its monthly tag, which NVIDIA does not move (give BASE=...@sha256:... to hold it by digest), and
# everything installed on top by constraints.txt.
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

WORKDIR /opt/megaqad
COPY docker/image.py constraints.txt ./
RUN python image.py constraints constraints.txt >image-constraints.txt

COPY pyproject.toml README.md LICENSE ./
COPY benchmarks benchmarks
COPY conf conf
COPY megaqad megaqad
# The image's own constraints (PIP_CONSTRAINT) hold packages back that megaqad needs newer; image.py names those that
# must stay.
RUN env -u PIP_CONSTRAINT pip install --no-cache-dir --constraint image-constraints.txt . \
    && python image.py check image-constraints.txt

COPY launch launch

RUN useradd --create-home --uid 10001 megaqad \
    && mkdir /work \
    && chown megaqad:megaqad /work
USER 10001
WORKDIR /work

# The command line works, from the installed package, for the user who will run it.
RUN megaqad demo --help >/dev/null

CMD ["megaqad", "--help"]
