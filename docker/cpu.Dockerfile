# megaqad without a GPU: the demo, tests of a configuration, and every command at the size a CPU can do.
#
#   docker build --file docker/cpu.Dockerfile --tag megaqad:0.1.0-cpu .
#   docker run --rm --shm-size=1g megaqad:0.1.0-cpu megaqad demo
#
# Pinned: the base by its full version (give BASE=...@sha256:... to hold it by digest), all packages by constraints.txt.
ARG BASE=python:3.11.14-slim-bookworm
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The loss has a kernel in C++ that is compiled on first use, 5 to 10 times as fast as without. Debian drops a package's
# version from its mirrors when it fixes it, so g++ follows the base's release instead of a pin that would stop building.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libgomp1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/megaqad
COPY constraints.txt ./
# PyTorch's own index has the build without CUDA, a tenth in size; what it needs comes with the rest.
RUN pip install --no-cache-dir --no-deps --constraint constraints.txt \
    --index-url https://download.pytorch.org/whl/cpu torch

COPY pyproject.toml README.md LICENSE ./
COPY benchmarks benchmarks
COPY conf conf
COPY megaqad megaqad
RUN pip install --no-cache-dir --constraint constraints.txt . \
    && pip check

COPY launch launch

RUN useradd --create-home --uid 10001 megaqad \
    && mkdir /work \
    && chown megaqad:megaqad /work
USER 10001
WORKDIR /work

# The command line works, from the installed package, for the user who will run it.
RUN megaqad demo --help >/dev/null

CMD ["megaqad", "--help"]
